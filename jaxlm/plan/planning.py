"""Compile a step for devices that are not there, and put together what the compiler says."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm.devices import Device, peak_share
from jaxlm.models import Model
from jaxlm.plan import flops, hlo, kernels, program, topology
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training.optimizer import OptimizerConfig

TOP = 10
"""Operations that a plan names."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. ``arguments`` are the parts that are named in ``parts`` and the padding of their layouts.

    Attributes:
        parts: parameters, optimizer, batch, ... as their shapes say.
        gradients: those of all parameters, which are among the temporaries while they are needed; 0 when decoding.
        temporaries: activations, gradients and everything else that exists only within a step.
        code: the program itself.
        total: what must fit.
        limit: the device's memory; None when it is unknown.
    """

    parts: dict[str, int]
    gradients: int
    arguments: int
    temporaries: int
    code: int
    total: int
    limit: float | None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: how many, the bytes of each device, and the seconds that these take at least
    where every link is used (None: links unknown)."""

    kind: str
    count: int
    bytes: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Operations of one JAX name (without its jit; a scan's body is a ``loop``): estimated cycles in a step, their
    share of all cycles, kernels included, and how often they run."""

    op_name: str
    cycles: int
    share: float
    times: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: calls in a step, grid steps of a call, bundles by depth (see ``plan.kernels``), and the cycles
    of all calls, an upper bound; None where it has no schedule or no known grid."""

    name: str
    calls: int
    grid: int | None
    bundles: tuple[int, ...] | None
    cycles: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step before it has run.

    Attributes:
        fits: whether the compiler found room for it; ``reason`` says what it found otherwise.
        seconds: estimated cycles and bundles of kernels over the clock: computation alone; None where either is
            unknown.
        communication: seconds of the collectives if none of them overlaps computation, and all links are used.
        mfu: model FLOPs over what the devices could do in ``seconds``; None when a peak is unknown.
        mfu_exposed: the same over ``seconds`` and ``communication``.
        memory_bound: decoding only: seconds to read parameters and state once, which no step can beat.
        notes: what the numbers leave out.
    """

    model: str
    topology: str
    mesh: str
    objective: str
    dtype: str
    batch: int
    sequence: int
    tokens: int
    devices: int
    device_kind: str
    fits: bool
    reason: str
    memory: Memory | None
    flops: float
    flops_formula: str
    cycles: int | None
    seconds: float | None
    communication: float | None
    mfu: float | None
    mfu_exposed: float | None
    memory_bound: float | None
    collectives: list[Traffic]
    top: list[Fusion]
    kernels: list[Kernel]
    notes: list[str]
    compile_seconds: float


def plan(
    model: Model,
    topology_name: str,
    mesh: str,
    *,
    batch: int,
    sequence: int | None = None,
    decode: bool = False,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
    accumulate: int = 1,
    param_dtype: str = "float32",
    layers_apart: bool = False,
    name: str | None = None,
    xla: Mapping[str, str] | None = None,
) -> Plan:
    """Compile the training step of a model (or, with ``decode``, a decoding step) for a topology, and read the result.

    Args:
        topology_name: ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2``, ``h100:8``.
        mesh: axes over its devices, ``data=4,fsdp=4``.
        batch: rows over all devices.
        sequence: tokens of a row; None takes what the model has positions for, at most 1024. Decoding: tokens before.
        param_dtype: of the parameters, when decoding; training keeps float32 masters.
        layers_apart: each layer's parameters in arrays of their own (``TrainingConfig.layers_apart``).
        name: what the plan calls the model; the family's name unless given.
        xla: options of the compiler that differ, ``{"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}``.

    Raises:
        ValueError: an unknown topology, a mesh of another size, or sizes that do not divide over it.
        ImportError: the compiler for the topology is not installed.
        TypeError: a family that cannot decode.
    """
    devices = topology.get(topology_name)
    sharding = Sharding(make_mesh(mesh, devices=devices.devices))
    sequence = program.default_sequence(model) if sequence is None else sequence
    if decode:
        step = program.decoding_step(
            model, sharding, batch, sequence, param_dtype=param_dtype, layers_apart=layers_apart
        )
    else:
        step = program.training_step(
            model, sharding, batch, sequence, optimizer=optimizer, accumulate=accumulate, layers_apart=layers_apart
        )
    begun = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    grids = flops.kernel_grids(traced.jaxpr.jaxpr)
    parts = {part: program.device_bytes(tree) for part, tree in step.parts.items()}
    first = devices.devices[0]
    described: dict[str, Any] = {
        "model": name or model.family, "topology": topology_name, "mesh": mesh, "objective": step.objective,
        "dtype": str(getattr(model.config, "dtype", "float32")), "batch": batch, "sequence": sequence,
        "tokens": step.tokens, "devices": len(devices.devices), "device_kind": first.device_kind,
        "flops": step.flops.amount, "flops_formula": step.flops.formula,
    }  # fmt: skip
    bound = None
    if decode and devices.device is not None:
        bound = (parts["parameters"] + parts["state"]) / devices.device.bandwidth
    try:
        compiled = traced.lower().compile(compiler_options=dict(xla or {}))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            raise ValueError(f"the compiler refuses {dict(xla or {})}: {error}") from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        nothing: dict[str, Any] = dict.fromkeys(("cycles", "seconds", "communication", "mfu", "mfu_exposed"))
        return Plan(
            **described, **nothing, fits=False, reason=_reason(str(error)), memory=None, memory_bound=bound,
            collectives=[], top=[], kernels=[], notes=[], compile_seconds=time.perf_counter() - begun,
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    costs = hlo.costs(hlo.parse(compiled.as_text()))
    memory = _memory(compiled.memory_analysis(), parts, devices.device, trains=not decode)
    fits = memory.limit is None or memory.total <= memory.limit
    found = _kernels(costs, grids)
    return Plan(
        **described,
        **_times(costs, found, step.flops.amount, devices),
        fits=fits,
        reason="" if fits else f"{memory.total / 2**30:.2f} GiB a device, which has {memory.limit or 0:.3g} bytes",
        memory=memory,
        memory_bound=bound,
        collectives=_traffic(costs, devices.device),
        top=_top(costs, found),
        kernels=found,
        notes=_notes(costs, found),
        compile_seconds=seconds,
    )


def _reason(message: str) -> str:
    """The one line of a compiler's refusal that says how much it needs."""
    used = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+\.[^\n]*|Ran out of memory[^\n]*|Out of memory[^\n]*", message)
    return used[0].strip() if used else message.splitlines()[0]


def _memory(analysis: Any, parts: dict[str, int], device: Device | None, *, trains: bool) -> Memory:
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parts=parts,
        gradients=parts["parameters"] if trains else 0,
        arguments=arguments,
        temporaries=temporaries,
        code=code,
        total=arguments + fresh + temporaries + code,
        limit=None if device is None else device.memory,
    )


def _times(costs: hlo.Costs, found: list[Kernel], amount: float, devices: topology.Topology) -> dict[str, Any]:
    device, count = devices.device, len(devices.devices)
    seconds = mfu = exposed = None
    known = [kernel.cycles for kernel in found if kernel.cycles is not None]
    cycles = costs.cycles + sum(known) if costs.cycles and len(known) == len(found) else None
    traffic = _traffic(costs, device)
    waits = [one.seconds for one in traffic if one.seconds is not None]
    communication = sum(waits) if len(waits) == len(traffic) else None
    if device is not None and device.clock is not None and cycles is not None:
        seconds = cycles / device.clock
        mfu = peak_share(amount / (seconds * count), device.kind)
        if communication is not None:
            exposed = peak_share(amount / ((seconds + communication) * count), device.kind)
    return {
        "cycles": cycles, "seconds": seconds, "communication": communication, "mfu": mfu, "mfu_exposed": exposed,
    }  # fmt: skip


def _traffic(costs: hlo.Costs, device: Device | None) -> list[Traffic]:
    counts: dict[str, list[float]] = {}
    for one in costs.collectives:
        group = one.group or 2
        passes = {"all-reduce": 2.0, "collective-permute": group / (group - 1) if group > 1 else 1.0}.get(one.kind, 1.0)
        sent = passes * one.bytes * (group - 1) / group
        held = counts.setdefault(one.kind, [0, 0, 0.0])
        held[0] += one.times
        held[1] += one.times * one.bytes
        held[2] += one.times * sent
    link = None if device is None else device.link
    return [
        Traffic(kind, int(count), int(size), None if link is None else sent / link)
        for kind, (count, size, sent) in counts.items()
    ]


def _top(costs: hlo.Costs, found: list[Kernel]) -> list[Fusion]:
    named: dict[str, list[int]] = {}
    for operation in costs.operations:
        held = named.setdefault(operation.instruction.readable, [0, 0])
        held[0] += operation.cycles
        held[1] = max(held[1], operation.times)
    total = max(costs.cycles + sum(kernel.cycles or 0 for kernel in found), 1)
    dearest = sorted(named.items(), key=lambda item: -item[1][0])[:TOP]
    return [Fusion(name, cycles, cycles / total, times) for name, (cycles, times) in dearest if cycles]


def _kernels(costs: hlo.Costs, grids: dict[str, int]) -> list[Kernel]:
    found: list[Kernel] = []
    schedules: dict[tuple[str, str], kernels.Schedule | None] = {}
    for operation in costs.kernels:
        name = operation.instruction.name
        kind = re.sub(r"(\.\d+)*$", "", name)
        same = kind, operation.instruction.shape  # libtpu compiles equal kernels once, under the name of the first
        schedule = schedules[same] = kernels.schedule_of(name) or schedules.get(same)
        grid = grids.get(kind)
        cycles = None if schedule is None or grid is None else schedule.cycles(grid) * operation.times
        found.append(Kernel(name, operation.times, grid, None if schedule is None else schedule.bundles, cycles))
    return found


def _notes(costs: hlo.Costs, found: list[Kernel]) -> list[str]:
    notes = [f"loop of unknown length, counted once: {name}" for name in costs.unknown_loops]
    for kernel in found:
        if kernel.cycles is None:
            notes.append(f"kernel without a static schedule, so the time of the step is unknown: {kernel.name}")
        elif len(kernel.bundles or ()) > 2:
            notes.append(f"kernel with loops of its own, each counted once: {kernel.name}")
    if found and all(kernel.cycles is not None for kernel in found):
        notes.append("kernels: bundles times grid steps, every predicated part taken; waiting for memory is left out")
    return notes

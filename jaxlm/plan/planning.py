"""The function :func:`plan` compiles a step for devices that the machine may lack. A :class:`Plan` has the estimates of
the compiler, and estimates that jaxlm computes from them."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlm.config import check_min
from jaxlm.devices import Device, peak_fraction
from jaxlm.models import Model
from jaxlm.plan import flops, hlo, kernels, program, topology
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training.optimizer import OptimizerConfig

NUM_TOP_OPERATIONS = 10
"""Maximum number of most expensive operations in a plan."""

ACCURACY = {
    "cpu": (
        "seven steps on two AMD EPYCs (Zen 4, Zen 5) needed 1.02 to 1.45 times the planned memory; a CPU plan has no "
        "time"
    ),
    "tpu": (
        "no plan was compared with a TPU yet; memory and the cycles of XLA operations are from the TPU compiler, and "
        "jaxlm computes the times of kernels and collectives"
    ),
    "gpu": "no plan was compared with a GPU yet; the GPU compiler computes the memory",
}
"""How exact plans were, by platform. ``python -m benchmarks.plans`` compares plans with steps (docs/tpu.md)."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
        parts: bytes of the parameters, the optimizer state, the batch, ..., computed from their shapes.
        gradients: bytes of the gradients of all parameters, computed from their shapes; 0 for decoding. Gradients are
            temporaries.
        arguments: bytes of all arguments of the step, including layout padding. The arguments are all ``parts``, and
            small arrays such as the step number, the random key or the tokens to decode.
        temporaries: activations, gradients and all other arrays that exist only within a step.
        code: bytes of the compiled program.
        total: the sum that must fit into the memory of the device: arguments, temporaries, code, and outputs that do
            not reuse the memory of donated arguments.
        limit: bytes of the memory of the device; None if unknown.
    """

    parts: dict[str, int]
    gradients: int
    arguments: int
    temporaries: int
    code: int
    total: int
    limit: float | None


@dataclasses.dataclass(frozen=True)
class CollectiveStats:
    """Collectives of one kind in a step.

    Attributes:
        kind: such as ``all-reduce``.
        count: number of executions in a step, summed over all collectives of this kind.
        bytes: sum over all executions. The bytes of one execution are the size of the operands or of the result on one
            device; the larger size counts. This is not the number of bytes that a device sends.
        seconds: lower bound of the total time. It assumes that a device uses all its links at the same time. None if
            the bandwidth of the links is unknown.
    """

    kind: str
    count: int
    bytes: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class OperationStats:
    """All operations with the same JAX name.

    Attributes:
        op_name: the JAX name without ``jit(...)/``. A ``while`` or ``scan`` appears in it as ``loop``.
        cycles: estimated cycles in a step, summed over the operations with this name.
        share: share of all cycles of the step, including kernel cycles.
        count: the largest number of executions in a step among the operations with this name.
    """

    op_name: str
    cycles: int
    share: float
    count: int


@dataclasses.dataclass(frozen=True)
class KernelStats:
    """A Pallas kernel.

    Attributes:
        calls: number of calls in a step.
        grid_steps: number of grid steps per call; None if unknown.
        bundles: number of VLIW bundles (one per cycle) at each loop depth (see ``jaxlm.plan.kernels``); None if there
            is no dump of the schedule.
        cycles: the cycles of all calls; None if the schedule or ``grid_steps`` is unknown, except for the kernels of
            ``jax.lax.ragged_dot``, which count one grid step. The cycles of one call are
            the cycles of its bundles (``jaxlm.plan.kernels.cycles``). If the clock rate is known, they are the largest
            of three numbers: the cycles of the bundles, of the copies between HBM and VMEM, and of the matmuls at the
            peak rate of bfloat16. The bundles include instructions that a grid step skips (``pl.when``), and one
            iteration of each inner loop.
    """

    name: str
    calls: int
    grid_steps: int | None
    bundles: tuple[int, ...] | None
    cycles: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimates for a step that has not run.

    Attributes:
        objective: a text that says what is trained or decoded.
        tokens: number of tokens that a step reads (training) or generates (decoding).
        flops: model FLOPs of a step, summed over all devices; ``flops_formula`` describes how they are counted.
        fits: True if the step fits into the memory of the device, or if the memory of the device is unknown. If False,
            ``reason`` gives the numbers.
        memory: None if the compiler rejected the step because it does not fit into memory. Then the plan has no
            estimates of the compiler.
        cycles: estimated cycles of all operations, including Pallas kernels, except operations that ``notes`` name;
            None if the compiler estimates no cycles or the cycles of a kernel are unknown.
        seconds: estimated time of the computation without communication, ``cycles`` / clock rate; None if one of them
            is unknown.
        communication_seconds: lower bound of the total seconds of the collectives (:class:`CollectiveStats`); 0 without
            collectives; None if there are collectives and the bandwidth of the links is unknown.
        mfu: model FLOPs divided by the FLOPs that the devices could compute in ``seconds`` at their peak rate; None if
            ``seconds`` or the peak rate is unknown.
        mfu_with_communication: the MFU if the step takes ``seconds + communication_seconds``; None if one of them or
            the peak rate is unknown.
        min_memory_seconds: lower bound of the time of a decoding step: the seconds to read the state and the
            parameters of its matmuls, each once. Tables that are only looked up, and the encoder, are not
            included. Of a mixture of experts, only the experts that one token selects are included. None for training
            or an unknown device.
        most_expensive: the operations with the most cycles, at most ``NUM_TOP_OPERATIONS``. Pallas kernels are not
            included.
        accuracy: how exact plans for this platform were (:data:`ACCURACY`).
        notes: costs that the numbers omit or overestimate.
        compile_seconds: time to trace and compile the step.
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
    memory: Memory | None = None
    flops: float
    flops_formula: str
    cycles: int | None = None
    seconds: float | None = None
    communication_seconds: float | None = None
    mfu: float | None = None
    mfu_with_communication: float | None = None
    min_memory_seconds: float | None
    collectives: list[CollectiveStats] = dataclasses.field(default_factory=list)
    most_expensive: list[OperationStats] = dataclasses.field(default_factory=list)
    kernels: list[KernelStats] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    accuracy: str
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
    grad_accum_steps: int = 1,
    param_dtype: str = "float32",
    compiler_options: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a model's training step, or of a decoding step if ``decode`` is True, compiled for a topology.

    Args:
        topology_name: such as ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2`` or ``h100:8``; ``local`` for the devices of this
            machine.
        mesh: axes over the devices of the topology, such as ``data=4,fsdp=4``.
        batch: rows, summed over all devices.
        sequence: tokens per row; for an encoder-decoder, tokens per source. For decoding, this is also the number of
            slots of the cache, including the slot of the new token. None: the model's ``max_positions`` (512 if there
            is no limit), at most 1024.
        decode: whether to plan a decoding step instead of a training step.
        optimizer: the optimizer of the training step. Only for training.
        grad_accum_steps: number of micro-batches per training step (``Trainer.grad_accum_steps``). Only for training.
        param_dtype: dtype of the parameters. Only for decoding; training has float32 parameters.
        compiler_options: such as ``{"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}``.

    Raises:
        ValueError: the topology, the dtype or a compiler option is unknown; an argument has no effect on the step, but
            is not the default; a number is below 1; the mesh has another number of devices than the topology; the size
            of an array axis is not divisible by the size of its mesh axes; ``grad_accum_steps`` does not divide
            ``batch``; no objective trains the task of the model; or ``sequence`` is longer than the model allows.
        ImportError: the compiler for the topology is not installed.
        TypeError: the family cannot decode.
    """
    check_min(1, batch=batch, sequence=sequence, grad_accum_steps=grad_accum_steps)
    _check_settings(decode, optimizer, grad_accum_steps, param_dtype)
    target = topology.get_topology(topology_name)
    sharding = Sharding(make_mesh(mesh, devices=target.devices))
    sequence = min(model.max_positions or 512, 1024) if sequence is None else sequence
    if decode:
        step = program.decoding_step(model, sharding, batch, sequence, param_dtype=param_dtype)
    else:
        step = program.training_step(
            model, sharding, batch, sequence, optimizer=optimizer, grad_accum_steps=grad_accum_steps
        )
    start, start_time_ns = time.perf_counter(), time.time_ns()
    traced = step.function.trace(*step.arguments)
    calls = flops.kernel_calls(traced.jaxpr.jaxpr)
    parts = {part: program.device_bytes(tree) for part, tree in step.parts.items()}
    plan_of_step = functools.partial(
        Plan, model=model.family, topology=topology_name, mesh=mesh, objective=step.objective,
        dtype=str(getattr(model.config, "dtype", "float32")), batch=batch, sequence=sequence, tokens=step.tokens,
        devices=len(target.devices), device_kind=target.devices[0].device_kind, flops=step.flops.amount,
        flops_formula=step.flops.formula, accuracy=ACCURACY[target.devices[0].platform],
        min_memory_seconds=_min_memory_seconds(model, step, parts["state"], target.device) if decode else None,
    )  # fmt: skip
    try:
        compiled = traced.lower().compile(compiler_options=dict(compiler_options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            raise ValueError(f"the compiler rejects the options {dict(compiler_options or {})}: {error}") from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return plan_of_step(fits=False, reason=_reason(str(error)), compile_seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    costs = hlo.costs(hlo.parse(compiled.as_text()))
    memory = _memory(compiled.memory_analysis(), parts, target.device, trains=not decode)
    fits = memory.limit is None or memory.total <= memory.limit
    kernel_stats = _kernels(costs, calls, start_time_ns, target.device)
    collectives = _collective_stats(costs, target.device)
    return plan_of_step(
        **_estimates(costs.cycles, kernel_stats, collectives, step.flops.amount, target),
        fits=fits,
        reason="" if fits else f"needs {memory.total / 2**30:.2f} of {(memory.limit or 0) / 2**30:.2f} GiB per device",
        memory=memory,
        collectives=collectives,
        most_expensive=_most_expensive(costs, kernel_stats),
        kernels=kernel_stats,
        notes=_notes(costs, kernel_stats),
        compile_seconds=seconds,
    )


def check_meshes(model: Model, topology_name: str, meshes: Sequence[str], batch: int) -> None:
    """Check that each mesh fits the topology, the batch and the parameters. This compiles nothing.

    Raises:
        ValueError: the topology is unknown, or a mesh has another number of devices or does not divide an axis of the
            batch or of a parameter.
        ImportError: the compiler for the topology is not installed.
    """
    devices = topology.get_topology(topology_name).devices
    for mesh in meshes:
        sharding = Sharding(make_mesh(mesh, devices=devices))
        sharding.named_sharding(("batch",), (batch,), "a batch")
        sharding.tree(model.specs)


def _check_settings(decode: bool, optimizer: OptimizerConfig, grad_accum_steps: int, param_dtype: str) -> None:
    """Raise ``ValueError`` if ``param_dtype`` is unknown, or if a setting has no effect but is not the default."""
    if decode and optimizer != OptimizerConfig():
        raise ValueError(f"optimizer={optimizer} has no effect with decode=True: leave it out")
    if decode and grad_accum_steps != 1:
        raise ValueError(f"grad_accum_steps={grad_accum_steps} has no effect with decode=True: leave it out")
    if not decode and param_dtype != "float32":
        raise ValueError(f"param_dtype={param_dtype!r} needs decode=True: training has float32 parameters")
    if param_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"param_dtype={param_dtype!r} is unknown: choose from float32, bfloat16, float16")


def _min_memory_seconds(model: Model, step: program.Step, state_bytes: int, device: Device | None) -> float | None:
    """The seconds to read the state and the parameters of the matmuls of a decoding step, each once.

    Tables that are only looked up, and the encoder, are not included. None if the bandwidth is unknown.
    """
    if device is None:
        return None
    parameters = program.bytes_read_by_a_token(model, step.parts["parameters"])
    return (parameters + state_bytes) / device.bandwidth


def _reason(message: str) -> str:
    """The part of the compiler's error message that states how much memory the program needs, or its first line."""
    used = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+\.[^\n]*|Ran out of memory[^\n]*|Out of memory[^\n]*", message)
    return used[0].strip() if used else message.splitlines()[0]


def _memory(analysis: Any, parts: dict[str, int], device: Device | None, *, trains: bool) -> Memory:
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parts=parts,
        gradients=parts["parameters"] if trains else 0,
        arguments=arguments,
        temporaries=temporaries,
        code=code,
        total=arguments + new_outputs + temporaries + code,
        limit=None if device is None else device.memory,
    )


def _estimates(
    cycles_without_kernels: int, kernel_stats: list[KernelStats], collectives: list[CollectiveStats],
    model_flops: float, target: topology.Topology,
) -> dict[str, Any]:  # fmt: skip
    device, count = target.device, len(target.devices)
    seconds = mfu = with_communication = None
    known = [kernel.cycles for kernel in kernel_stats if kernel.cycles is not None]
    is_known = cycles_without_kernels > 0 and len(known) == len(kernel_stats)
    cycles = cycles_without_kernels + sum(known) if is_known else None
    collective_seconds = [stats.seconds for stats in collectives if stats.seconds is not None]
    communication = sum(collective_seconds) if len(collective_seconds) == len(collectives) else None
    if device is not None and device.clock is not None and cycles is not None:
        seconds = cycles / device.clock
        mfu = peak_fraction(model_flops / (seconds * count), device.kind)
        if communication is not None:
            with_communication = peak_fraction(model_flops / ((seconds + communication) * count), device.kind)
    return {
        "cycles": cycles, "seconds": seconds, "communication_seconds": communication, "mfu": mfu,
        "mfu_with_communication": with_communication,
    }  # fmt: skip


def _collective_stats(costs: hlo.Costs, device: Device | None) -> list[CollectiveStats]:
    link = None if device is None else device.link
    stats = []
    for kind in dict.fromkeys(op.kind for op in costs.collectives):
        ops = [op for op in costs.collectives if op.kind == kind]
        count, size = sum(op.executions for op in ops), sum(op.executions * op.bytes for op in ops)
        seconds = None if link is None else sum(op.executions * _sent_bytes(op) for op in ops) / link
        stats.append(CollectiveStats(kind, count, size, seconds))
    return stats


def _sent_bytes(op: hlo.Collective) -> float:
    """The number of bytes that a device sends in one execution."""
    group = op.group_size or 2  # if the size is unknown, the smallest group gives a lower bound
    ring = (group - 1) / group  # the fraction of an array that a device sends in one pass around a ring
    return {"all-reduce": 2 * ring, "collective-permute": 1.0 if group > 1 else 0.0}.get(op.kind, ring) * op.bytes


def _most_expensive(costs: hlo.Costs, kernel_stats: list[KernelStats]) -> list[OperationStats]:
    totals_of_name: dict[str, list[int]] = {}
    for operation in costs.operations:
        totals = totals_of_name.setdefault(operation.instruction.display_name, [0, 0])
        totals[0] += operation.cycles
        totals[1] = max(totals[1], operation.executions)
    total = max(costs.cycles + sum(kernel.cycles or 0 for kernel in kernel_stats), 1)
    largest = sorted(totals_of_name.items(), key=lambda item: -item[1][0])[:NUM_TOP_OPERATIONS]
    return [OperationStats(name, cycles, cycles / total, times) for name, (cycles, times) in largest if cycles]


def _kernels(
    costs: hlo.Costs, calls: dict[flops.Kernel, set[flops.KernelCall]], start_time_ns: int, device: Device | None
) -> list[KernelStats]:
    kernel_stats: list[KernelStats] = []
    base_names = [re.sub(r"(\.\d+)*$", "", operation.instruction.name) for operation in costs.kernels]
    # libtpu compiles equal kernels once, so only one of them has a dump. The others share its schedule.
    keys = [(name, operation.instruction.shape) for name, operation in zip(base_names, costs.kernels, strict=True)]
    schedules = [kernels.schedule_of(operation.instruction.name, start_time_ns) for operation in costs.kernels]
    schedule_of_key = {key: schedule for key, schedule in zip(keys, schedules, strict=True) if schedule is not None}
    for operation, base_name, key, own_schedule in zip(costs.kernels, base_names, keys, schedules, strict=True):
        name, schedule = operation.instruction.name, own_schedule or schedule_of_key.get(key)
        matching_calls = calls.get((base_name, hlo.array_shapes(operation.instruction.shape)), set())
        grids = {call.grid for call in matching_calls}
        grid = grids.pop() if len(grids) == 1 else None  # unknown if kernels of this name and shape have several grids
        has_clock = device is not None and device.clock is not None
        is_ragged_dot = base_name == flops.RAGGED_DOT and bool(matching_calls) and has_clock
        cycles = None
        if schedule is not None and (grid is not None or is_ragged_dot or base_name == flops.RAGGED_DOT_METADATA):
            cycles = kernels.cycles(schedule, 1 if grid is None else grid)
            if matching_calls and device is not None and device.clock is not None:
                copy_seconds = max(call.bytes for call in matching_calls) / device.bandwidth
                matmul_seconds = max(call.flops for call in matching_calls) / (device.tflops * 1e12)
                cycles = max(cycles, round(max(copy_seconds, matmul_seconds) * device.clock))
            cycles *= operation.executions
        kernel_stats.append(KernelStats(name, operation.executions, grid, schedule, cycles))
    return kernel_stats


def _notes(costs: hlo.Costs, kernel_stats: list[KernelStats]) -> list[str]:
    notes = [f"loop of unknown length, counted once: {name}" for name in costs.unknown_loops]
    unknown = dict.fromkeys(costs.unknown_operations)
    notes += [f"operation without an estimate, not counted: {name}" for name in unknown]
    for kernel in kernel_stats:
        if kernel.cycles is None:
            notes.append(f"kernel without a known schedule or grid, so the time of the step is unknown: {kernel.name}")
        elif len(kernel.bundles or ()) > 2:
            notes.append(f"kernel with inner loops, whose iterations are counted once: {kernel.name}")
    if any(kernel.name.startswith(flops.RAGGED_DOT) and kernel.cycles is not None for kernel in kernel_stats):
        notes.append(
            "the grids of the kernels of jax.lax.ragged_dot are unknown: their cycles are a lower bound, the largest "
            "of one grid step, the copies and the matmuls"
        )
    if kernel_stats and all(kernel.cycles is not None for kernel in kernel_stats):
        notes.append(
            "the cycles of a kernel are the maximum of three estimates: bundles times grid steps (including code that "
            "a step skips), the copies between HBM and VMEM, and the matmuls at the peak of bfloat16"
        )
    return notes

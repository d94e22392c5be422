"""Measure the memory and the time of steps, and compare them with ``jaxlm plan`` for a device of this machine.

    python -m benchmarks.plans --json benchmarks/results/PROCESSOR/plans.json
    python -m benchmarks.plans --model gpt2 --batch 8 --sequence 512 --decode

Memory: the prediction is the sum of the arguments, outputs and temporaries of the step, without the compiled program
(``Plan.memory``). The measurement is the peak memory during the steps, minus the memory that the process used before it
created the arrays. On a CPU, this is resident memory (Linux only). On other devices, it is the peak of
``Device.memory_stats``. This peak also includes the creation of the arrays and, for decoding, the reading of the text.

Decoding: before the steps, the model reads a text that fills all slots of the cache except one slot for each step.

Time: the column "bound ms" is a lower bound of the time of a step. It is the larger of two times: the FLOPs of the step
/ the FLOP/s of a large matmul, and the bytes of its arguments / the bytes per second of a large sum. Both speeds are
measured first. A decoding step of a model with experts, or with separate tables for the embedding and the output head,
does not read all parameters. For such a step, the bound is too high.

Each step is planned and measured in its own process. ``benchmarks.report`` writes the table on the page of the
benchmarks, from the JSON file.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import UserError

if TYPE_CHECKING:
    from jaxlm.models import Model


WARM_UP = 2
"""Number of steps that run before the measured steps."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to plan and to measure."""

    model: str
    batch: int
    """Rows."""
    sequence: int
    """Tokens per row; for decoding, slots of the cache."""
    decode: bool = False
    """Whether the step decodes one token per row. False: a training step."""

    @property
    def name(self) -> str:
        """The name of the case in the table."""
        kind = "decode, cache" if self.decode else "train,"
        return f"{self.model}, {kind} {self.batch} x {self.sequence}"


CASES = (
    Case("gpt2", 4, 512), Case("bert-base-uncased", 8, 128), Case("t5-small", 8, 256), Case("vdcnn-9", 16, 1024),
    Case("lstm-zaremba-medium", 20, 35), Case("transformer-xl-base", 2, 128), Case("gpt2", 8, 1023, decode=True),
)  # fmt: skip
QUICK_CASES = (Case("gpt2-tiny", 16, 32), Case("gpt2-tiny", 8, 32, decode=True))
"""The cases of ``--quick``."""
HEADER = ("step", "planned GiB", "measured GiB", "measured / planned", "ms", "bound ms", "bound / time")
"""The columns of the table of the results."""


@dataclasses.dataclass(frozen=True)
class Plans:
    """Measure training and decoding steps, and compare them with their plans."""

    model: str | None = None
    """Family or variant to measure; None: several models of published sizes."""
    batch: int | None = None
    """Rows per batch for --model. Default: 8."""
    sequence: int | None = None
    """Tokens per row for --model; with --decode, slots of the cache. Default: 256."""
    decode: bool = False
    """Measure a decoding step of --model instead of a training step."""
    steps: int = 8
    """Measured steps, after two steps of warm-up. The table shows their median time."""
    quick: bool = False
    """Measure only tiny models. The numbers have no meaning."""
    json: Path | None = None
    """Also write all results to this JSON file."""


def run(options: Plans) -> None:
    """Measure and print the results."""
    if options.quick and options.model is not None:
        raise UserError("--quick measures tiny models: leave out --model")
    cases: tuple[Case, ...] = QUICK_CASES if options.quick else CASES
    if options.model is not None:
        cases = (Case(options.model, options.batch or 8, options.sequence or 256, options.decode),)
    elif options.batch or options.sequence or options.decode:
        raise UserError("--batch, --sequence and --decode are for one model: give --model, too")
    if sys.platform != "linux":
        raise UserError("the peak of resident memory is measured only on Linux")
    for case in cases:
        if case.decode and case.sequence <= options.steps + WARM_UP:
            raise UserError(
                f"{case.name}: {options.steps} measured steps and {WARM_UP} of warm-up need more than "
                f"{options.steps + WARM_UP} slots: choose a larger --sequence or fewer --steps"
            )
    description = harness.describe_machine()
    for name, value in description.items():
        print(f"{name:10} {value}")
    peak = _in_new_process(machine_peak, 512 if options.quick else 4096)
    description["peaks"] = f"{peak['flops'] / 1e9:,.0f} GFLOP/s matmul, {peak['bytes'] / 1e9:,.1f} GB/s sum"
    print(f"{'peaks':10} {description['peaks']}")
    records = []
    for case in cases:
        record = _in_new_process(measure, case, options.steps) | {"case": case.name}
        record["bound"] = max(record["flops"] / peak["flops"], record["argument_bytes"] / peak["bytes"])
        record["memory_ratio"] = record["measured_bytes"] / record["planned_bytes"]
        records.append(record)
    print(harness.table(HEADER, [cells(record) for record in records]))
    harness.write_json(options.json, "plans", options, description, records)


def cells(record: dict[str, Any]) -> list[str]:
    """The columns :data:`HEADER` of one row of the result file."""
    return [
        record["case"], f"{record['planned_bytes'] / 2**30:.3f}", f"{record['measured_bytes'] / 2**30:.3f}",
        f"{record['memory_ratio']:.2f}", f"{1e3 * record['seconds']:,.1f}", f"{1e3 * record['bound']:,.1f}",
        f"{record['bound'] / record['seconds']:.0%}",
    ]  # fmt: skip


def _in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of ``function(*arguments)`` in a new process, so that its memory contains no earlier arrays."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def machine_peak(size: int) -> dict[str, Any]:
    """``flops``: FLOP/s of a float32 matmul of [size, size] matrices. ``bytes``: bytes/s of a sum of 8 of them."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    seconds = _fastest(jax.jit(jnp.matmul), x, x)
    large = jnp.ones((8, size, size), jnp.float32)
    return {"flops": 2 * size**3 / seconds, "bytes": large.nbytes / _fastest(jax.jit(jnp.sum), large)}


def _fastest(function: Callable[..., Any], *arguments: Any) -> float:
    """The seconds of the fastest of five calls, after a call that compiles."""
    import jax

    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Plan and measure a step.

    Returns ``planned_bytes`` and ``measured_bytes`` (the peak memory), ``argument_bytes`` and ``flops`` of the plan,
    and ``seconds`` (the median of ``steps`` times).
    """
    import jax
    import numpy as np

    from jaxlm import get_model
    from jaxlm.plan import plan, program
    from jaxlm.sharding import Sharding, make_mesh
    from jaxlm.training.layouts import with_formats
    from jaxlm.training.optimizer import OptimizerConfig

    if jax.device_count() > 1:
        raise UserError(f"this benchmark needs one device, there are {jax.device_count()}: set CUDA_VISIBLE_DEVICES=0")
    model, mesh = get_model(case.model), "data=1"
    planned = plan(model, "local", mesh, batch=case.batch, sequence=case.sequence, decode=case.decode)
    assert planned.memory is not None
    sharding = Sharding(make_mesh(mesh))
    if case.decode:
        step = program.decoding_step(model, sharding, case.batch, case.sequence)
    else:
        step = program.training_step(model, sharding, case.batch, case.sequence, optimizer=OptimizerConfig())
    compiled = step.function.lower(*step.arguments).compile()
    rng, before = np.random.default_rng(0), _memory(reset=True)

    def make_array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        if np.issubdtype(leaf.dtype, np.floating):
            # Target weights and second moments of Adam must not be negative.
            return jax.device_put(np.abs(0.02 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    times: list[float] = []
    arguments: tuple[Any, ...]
    if case.decode:
        # ``state_after`` makes the state. If ``make_array`` made a state too, both would be in memory.
        params, tokens = jax.tree.map(make_array, (step.arguments[0], step.arguments[2]))
        state = state_after(model, params, case.batch, case.sequence, case.sequence - steps - WARM_UP)
        state = jax.tree.map(lambda x, argument: jax.device_put(x, argument.sharding), state, step.arguments[1])
        arguments = params, state, tokens
    else:
        arguments = jax.tree.map(make_array, step.arguments)
    arguments = with_formats(arguments, compiled.input_formats[0])
    _memory(reset=True)  # on a CPU, the peak before this line, with copies of the arrays, does not count
    for _ in range(steps + WARM_UP):
        start = time.perf_counter()
        state, result = compiled(*arguments)  # the state is donated
        jax.block_until_ready(result)
        times.append(time.perf_counter() - start)
        arguments = (arguments[0], state, result) if case.decode else (state, arguments[1])
    return {
        "planned_bytes": planned.memory.total - planned.memory.code, "measured_bytes": _memory() - before,
        "argument_bytes": planned.memory.arguments, "flops": planned.flops,
        "seconds": statistics.median(times[WARM_UP:]),
    }  # fmt: skip


def state_after(model: Model, params: Any, batch: int, length: int, count: int) -> Any:
    """The state, with a cache of ``length`` slots, of a model that has read ``count`` tokens in each of ``batch`` rows.

    An encoder-decoder has also read a source of ``length`` tokens.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def read(params: Any) -> Any:
        if model.reads_source:
            state = model.init_decode_state(params, jnp.zeros((batch, length), jnp.int32), length)
        else:
            state = model.init_state(batch, length)
        return model.apply(params, jnp.zeros((batch, count), jnp.int32), state=state)[1]

    return jax.block_until_ready(read(params))


def _memory(*, reset: bool = False) -> int:
    """The peak memory in bytes; with ``reset``, the current memory.

    The memory is that of the device, or on a CPU that of the process. On a CPU, ``reset`` also sets the peak to the
    current memory.
    """
    import jax

    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device is not None:
        return statistics_of_device["bytes_in_use" if reset else "peak_bytes_in_use"]
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, for example of the compiler, to the system
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM (the peak) to the current memory, see proc(5)
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return 1024 * int(match[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Plans, run, arguments, name="plans", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Interleaved measurement of implementations in separate processes, and their results as tables and JSON.

:func:`measure` sends requests to worker processes, and waits for each answer before the next request. So only one
worker computes at a time. The process that calls ``measure`` runs no computation of JAX or torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import complete_models
from benchmarks.shapes import Work
from benchmarks.worker import find

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "jaxlm", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "fla-core", "jax-linear-attention", "numpy",
)  # fmt: skip
JAXLM = "jaxlm"
WARM_UP_SECONDS = 0.3
"""Minimum number of seconds that an implementation runs before each measured repetition. An idle processor needs 0.1 s
to reach its full clock frequency. After a repetition of torch, its OpenMP threads still use the processor for 0.2 s."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all speed comparisons."""

    against: str = "torch,flax"
    """Baselines, separated by commas; empty: only jaxlm is measured."""
    rounds: int = 7
    """Measured repetitions of each implementation."""
    json: Path | None = None
    """Write all results to this JSON file too."""
    quick: bool = False
    """Use a tiny model and small sizes, to test that the benchmark works; the measured times have no meaning."""
    device: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Device of all implementations; any: the default device of each framework."""


DEVICES = {
    "any": {},
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"JAX_PLATFORMS": "cuda"},
    "tpu": {"JAX_PLATFORMS": "tpu"},
}
"""Environment variables of the workers, by device. If the device does not exist, JAX raises an error. torch reads
only ``CUDA_VISIBLE_DEVICES``, so it may use another device than JAX. Then :func:`check_same_device` raises an error."""


class Failure(Exception):
    """An error that ends a benchmark. Its message is one sentence for the user."""


class UserError(Failure, ValueError):
    """A ``Failure`` that the user caused, such as a wrong option or a package that is not installed."""


# -------------------------------------------------------------------------------------------------- workers


class Worker:
    """A process that runs one implementation (``benchmarks.worker``). Call :meth:`close` at the end.

    Args:
        name: name of the implementation in messages.
        target: ``module:class`` of the implementation.
        log: file for the output of the process.
        environment: environment variables that are added to those of the current process.
        arguments: arguments of the constructor of the class, JSON values.

    Raises:
        UserError: the constructor of the class raised ``ValueError`` or ``ImportError``.
        Failure: the constructor raised another error. All methods except ``close`` raise ``Failure`` if the
            implementation raises an error or its process ends.
    """

    def __init__(
        self, name: str, target: str, log: Path, environment: dict[str, str] | None = None, **arguments: Any
    ) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", target],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1, cwd=ROOT,
                env=os.environ | (environment or {}),
            )  # fmt: skip
        try:
            self._request("setup", **arguments)
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[float, Any]:
        """Run one repetition and return its time in seconds and its result."""
        result = self._request("run")
        return result["seconds"], result["value"]

    def facts(self) -> dict[str, Any]:
        """Properties of the implementation, such as ``platform`` ("cpu", "gpu" or "tpu")."""
        return self._request("facts")

    def close(self) -> None:
        """Kill the process."""
        with contextlib.suppress(BrokenPipeError), self.process:
            self.process.kill()

    def _request(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            line = self.process.stdout.readline()
        if not line:
            last_line = (self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            raise Failure(f"{self.name} ended unexpectedly (exit status {self.process.wait()}): {last_line}")
        answer = json.loads(line)
        if "error" in answer:
            is_user_error = call == "setup" and answer["is_user_error"]
            raise (UserError if is_user_error else Failure)(f"{self.name}: {answer['error']}")
        return answer["result"]


@dataclasses.dataclass(frozen=True)
class Session:
    """The checkpoint of a benchmark run, and a function that starts worker processes. See :func:`session`."""

    directory: Path
    """Directory of the checkpoint. It does not exist if the session has no model."""
    machine: Worker
    """The worker ``baselines.Machine``. It has written the checkpoint, and measures the peak FLOP/s and bandwidth."""
    model: dict[str, Any]
    """Properties of the model, such as ``family``, ``vocab_size`` and ``parameters`` (``baselines.Machine.facts``)."""
    description: dict[str, Any]
    """Properties of the machine and its software (:func:`describe_machine`), ``device``, and ``peaks`` as a text."""
    start: Callable[..., Worker]
    """``start(name, target, **arguments)`` returns a new worker. It ends when it is closed, at the latest at the end of
    the session. All workers share one persistent compilation cache, which is empty at the start of the session."""

    def compare(
        self, targets: dict[str, str], arguments: dict[str, Any], op: str, shape: str, work: Work, **options: Any
    ) -> list[Row]:
        """Start implementations, measure them, end their processes and return the rows of :func:`measure`.

        Args:
            targets: the implementations, ``{name: "module:class"}``.
            arguments: arguments of the constructor of each class, besides ``directory``.
            op, shape, work: what is measured, as in :func:`measure`.
            options: ``warm_up``, ``rounds`` and ``check`` of :func:`measure`.
        """
        with contextlib.ExitStack() as workers:
            implementations = {
                name: workers.enter_context(contextlib.closing(self.start(name, target, **arguments)))
                for name, target in targets.items()
            }
            return measure(op, shape, work, self.machine, implementations, **options)

    def add_cached_compile_seconds(self, rows: Sequence[Row], target: str, **arguments: Any) -> list[Row]:
        """``rows``, with ``cached_compile_seconds`` added to the facts of the row of jaxlm.

        A new process runs one repetition and reads the compiled program from the cache. ``cached_compile_seconds`` is
        the time of this repetition minus the median time of jaxlm, or 0 if the difference is negative.

        Args:
            rows: the rows of :meth:`compare`, jaxlm first.
            target, arguments: the class of jaxlm and the arguments of its constructor, as in :meth:`compare`.
        """
        with contextlib.closing(self.start("jaxlm again", target, **arguments)) as worker:
            first = worker.run()[0]
        cached = max(0.0, first - rows[0].median)

        def add_cached(row: Row) -> Row:
            return dataclasses.replace(row, facts={**row.facts, "cached_compile_seconds": cached})

        return [add_cached(row) if row.implementation == JAXLM else row for row in rows]


@contextlib.contextmanager
def session(model: str | None, device: str = "any", **sizes: Any) -> Iterator[Session]:
    """A context manager that returns a :class:`Session` and prints the properties of the machine.

    At the end of the ``with`` block, all workers end and the checkpoint is deleted.

    Args:
        model: name of the model whose checkpoint is written, with random weights; None writes no checkpoint.
        device: a key of :data:`DEVICES`.
        sizes: the arguments ``quick``, ``batch`` and ``length`` of ``baselines.Machine``.
    """
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as workers:
        directory = Path(temporary) / "model"
        environment = {
            **DEVICES[device], "JAX_COMPILATION_CACHE_DIR": str(Path(temporary) / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip

        def start(name: str, target: str, **arguments: Any) -> Worker:
            log = Path(temporary) / f"{name}.log"
            return workers.enter_context(
                contextlib.closing(Worker(name, target, log, environment, directory=str(directory), **arguments))
            )

        description = describe_machine()  # before the workers start, because they change the load
        machine = start("machine", "benchmarks.baselines:Machine", model=model, **sizes)
        properties = machine.facts()
        peaks = machine.run()[1]
        text = f"{peaks['FLOP'] / 1e9:,.0f} GFLOP/s float32 GEMM, {peaks['B'] / 1e9:,.1f} GB/s copy"
        text += f", {peaks['B read'] / 1e9:,.1f} GB/s read"
        description |= {"device": properties["device"], "peaks": text}
        for name, value in description.items():
            print(f"{name:10} {value}")
        print(flush=True)
        yield Session(directory, machine, properties, description, start)


def choose_implementations(against: str, implementations: dict[str, str]) -> dict[str, str]:
    """The implementations to measure, ``{name: "module:class"}``: jaxlm first, then the baselines in ``against``.

    Args:
        against: names of baselines, separated by commas.
        implementations: all implementations of the benchmark, ``{name: "module:class"}``.

    Raises:
        UserError: a baseline is unknown, or a package that it needs is not installed.
    """
    names = [name for name in against.replace(" ", "").split(",") if name and name != JAXLM]
    for name in names:
        if name not in implementations:
            baselines = [baseline for baseline in implementations if baseline != JAXLM]
            raise UserError(f"unknown baseline {name!r}: choose from {', '.join(baselines)}")
        check_packages(name, implementations[name], f", or leave {name} out of --against")
    return {name: implementations[name] for name in (JAXLM, *names)}


def check_packages(baseline: str, target: str, alternative: str = "") -> None:
    """Raise ``UserError`` if a package that a baseline needs is not installed.

    Args:
        target: ``module:class`` of the baseline.
        alternative: end of the error message, for a benchmark that can also run without this baseline.
    """
    kind = find(target)
    missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
    if missing:
        from jaxlm import extras  # imported here, because jaxlm imports jax

        raise UserError(f"{baseline} needs {' and '.join(missing)}: {extras.install_command(kind.extra)}{alternative}")


def implementations_with_family(
    targets: dict[str, str], family: str, families: Mapping[str, Collection[str]], known: Iterable[str]
) -> dict[str, str]:
    """The implementations in ``targets`` that have a model of a family. Prints the names of the other implementations.

    Args:
        targets: the result of :func:`choose_implementations`.
        families: the families that each baseline has (``complete_models.FAMILIES_BY_BASELINE``).
        known: the families that the benchmark can measure.

    Raises:
        UserError: the family is not in ``known``.
    """
    if family not in known:
        raise UserError(f"this benchmark cannot measure family {family!r}: choose a model of {', '.join(known)}")
    missing = [name for name in targets if name != JAXLM and family not in families[name]]
    if missing:
        print(f"{', '.join(missing)}: no model of the family {family}")
    return {name: target for name, target in targets.items() if name not in missing}


def names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The names in ``text``, the comma-separated value of an option.

    Raises:
        UserError: a name is not in ``known``, or is repeated.
    """
    result = split_names(option, text)
    for name in result:
        if name not in known:
            raise UserError(f"--{option} {name!r} is unknown: choose from {', '.join(known)}")
    return result


def split_names(option: str, text: str) -> list[str]:
    """The names in ``text``, the comma-separated value of an option. Raises ``UserError`` if a name is repeated."""
    result = text.replace(" ", "").split(",")
    check_distinct(option, result)
    return result


def split_models(text: str) -> list[str]:
    """The names of models in ``text``. Raises ``UserError`` if a name is repeated or unknown."""
    result = split_names("model", text)
    for name in result:
        try:
            complete_models.build(name)
        except ValueError as error:
            raise UserError(f"--model {name}: {error}") from error
    return result


def parse_numbers(option: str, text: str) -> list[int]:
    """The whole numbers in ``text``, the comma-separated value of an option.

    Raises:
        UserError: a part of ``text`` is not a whole number, is below 1, or is repeated.
    """
    try:
        result = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{option} {text!r} must be whole numbers, separated by commas") from None
    if min(result) < 1:
        raise UserError(f"--{option} {text!r}: each number must be at least 1")
    check_distinct(option, result)
    return result


def check_distinct(option: str, values: Sequence[Any]) -> None:
    """Raise ``UserError`` if a value of an option is repeated. Tables and results have one entry per value."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"--{option} has {value} more than once: give it once")


# ------------------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurement of one implementation."""

    op: str
    """Name of the measured operation, such as "training step"."""
    implementation: str
    """The name of a baseline, or "jaxlm"."""
    shape: str
    """The sizes as text, such as "gpt2 B2 T512"."""
    work: Work
    seconds: list[float]
    """Seconds of the measured repetition of each round."""
    warm_up: list[float]
    """Seconds of each repetition of the warm-up. The first repetition includes compilation."""
    peak: float
    """Peak of the machine in units of ``work`` per second, the median over the same rounds."""
    ratio: float
    """Speed of jaxlm / speed of this implementation: the median over rounds of the time of this implementation / the
    time of jaxlm in the same round. 1 for jaxlm."""
    facts: dict[str, Any]
    """Properties of the implementation (``worker.Implementation.facts``)."""
    dtype: str = "float32"

    @property
    def median(self) -> float:
        """Median seconds of a repetition."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Units of ``work`` per second."""
        return self.work.amount / self.median

    def record(self) -> dict[str, Any]:
        """All fields and statistics of them, as JSON values."""
        p10, p90 = np.percentile(self.seconds, (10, 90)).tolist()
        return {
            **dataclasses.asdict(self),
            "n": len(self.seconds),
            "median": self.median,
            "p10": p10,
            "p90": p90,
            "tokens_per_second": self.work.tokens / self.median,
            "rate": self.rate,
            "peak_percent": 100 * self.rate / self.peak,
            "compile_seconds": max(0.0, self.warm_up[0] - statistics.median(self.warm_up[1:])),
        }


def measure(
    op: str,
    shape: str,
    work: Work,
    machine: Worker,
    implementations: dict[str, Worker],
    *,
    warm_up: int,
    rounds: int,
    check: Callable[[dict[str, list[Any]]], None],
) -> list[Row]:
    """Measure the implementations and return one row for each.

    Each round measures the peak of the machine and then one repetition of every implementation. The implementation that
    is measured first changes from round to round.

    Args:
        op, shape, work: fields of the rows.
        machine: the worker that measures the peak (``Session.machine``).
        implementations: the workers by name, with the name "jaxlm" among them.
        warm_up: number of repetitions of each implementation before the rounds, at least 2. In the first repetition,
            JAX compiles.
        rounds: number of rounds, at least 1.
        check: a function of ``{name: results of the warm-up repetitions}``. It raises ``Failure`` if the results of the
            implementations differ too much.

    Raises:
        Failure: the implementations run on different devices, ``check`` fails, or an implementation fails.
    """
    check_same_device(implementations)
    warm_up_seconds: dict[str, list[float]] = {}
    values: dict[str, list[Any]] = {}
    for name, worker in implementations.items():
        print(f"warming up {name} ...", flush=True)
        runs = [worker.run() for _ in range(warm_up)]
        warm_up_seconds[name], values[name] = [second for second, _ in runs], [value for _, value in runs]
    check(values)
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    peaks = []
    for number in range(rounds):
        peaks.append(run_after_warm_up(machine)[1][work.unit])
        for name in rotated(list(implementations), number):
            seconds[name].append(run_after_warm_up(implementations[name])[0])
    peak = statistics.median(peaks)
    return [
        Row(
            op, name, shape, work, seconds[name], warm_up_seconds[name], peak,
            paired_ratio(seconds[name], seconds[JAXLM]), implementations[name].facts(),
        )
        for name in implementations
    ]  # fmt: skip


def check_same_device(implementations: dict[str, Worker]) -> None:
    """Raise ``Failure`` if the implementations, workers by name, run on different kinds of devices."""
    platforms = {name: worker.facts()["platform"] for name, worker in implementations.items()}
    if len(set(platforms.values())) > 1:
        raise Failure(
            f"implementations run on different devices, {platforms}: install all of them for one device, or give "
            "--device cpu"
        )


def run_after_warm_up(worker: Worker) -> tuple[float, Any]:
    """The time in seconds and the result of one repetition.

    Before it, other repetitions run until they have taken at least :data:`WARM_UP_SECONDS`.
    """
    elapsed = worker.run()[0]
    while elapsed < WARM_UP_SECONDS:
        elapsed += worker.run()[0]
    return worker.run()


def rotated(names: list[str], by: int) -> list[str]:
    """The list ``names``, rotated to the left by ``by`` elements."""
    by %= len(names)
    return names[by:] + names[:by]


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of ``theirs`` / ``ours``, times in seconds in the order of the rounds.

    If the load of the machine slows all implementations of a round equally, the ratio of this round stays the same.
    """
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def check_losses(losses: dict[str, list[float]], tolerances: Sequence[tuple[int, float]]) -> None:
    """Raise ``Failure`` unless the losses of all implementations agree.

    Args:
        losses: by implementation, the losses after 0, 1, 2, ... updates.
        tolerances: pairs of a number of updates, and the maximum relative difference of the losses after these updates:
            (largest - smallest loss) / smallest absolute value.
    """
    for updates, tolerance in tolerances:
        losses_now = {name: values[updates] for name, values in losses.items()}
        array = np.array(list(losses_now.values()))
        spread = np.ptp(array) / np.min(np.abs(array))
        if not spread <= tolerance:  # `not <=` also rejects NaN
            shown = ", ".join(f"{name} {value:.6f}" for name, value in losses_now.items())
            raise Failure(f"losses after {updates} updates differ by {spread:.1e} (allowed {tolerance:.0e}): {shown}")


def check_same(values: dict[str, list[Any]]) -> None:
    """Raise ``Failure`` unless all implementations generated the same tokens in all repetitions.

    Args:
        values: by implementation, the tokens of each repetition: lists [rows][tokens].
    """
    expected = values[JAXLM][0]
    for name, repetitions in values.items():
        for tokens in repetitions:
            for row, (ours, theirs) in enumerate(zip(expected, tokens, strict=True)):
                if ours != theirs:
                    pairs = enumerate(zip(ours, theirs, strict=False))
                    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                    raise Failure(
                        f"{name} and {JAXLM} generated different tokens, starting at token {first} of row {row}"
                    )


def check_samples(values: dict[str, list[Any]], tolerance: float) -> None:
    """Raise ``Failure`` unless the sampled elements of all results agree with those of jaxlm's first repetition.

    Args:
        values: by implementation, the results of each repetition: a dict from the name of a result to its sampled
            elements, or None for a repetition without samples.
        tolerance: maximum difference, relative to the largest absolute value of jaxlm's sampled elements of the result.
    """
    expected = values[JAXLM][0]
    for name, repetitions in values.items():
        for results in repetitions:
            if results is None:
                continue
            if results.keys() != expected.keys():
                raise Failure(f"{name} computes {sorted(results)}, {JAXLM} {sorted(expected)}")
            for result, sample in results.items():
                ours, theirs = np.array(expected[result]), np.array(sample)
                difference = np.max(np.abs(ours - theirs)) / np.max(np.abs(ours))
                if not difference <= tolerance:  # `not <=` also rejects NaN
                    raise Failure(
                        f"{result} of {name} differs from {JAXLM} by {difference:.1e} of the largest sampled element "
                        f"(allowed {tolerance:.0e})"
                    )


# ------------------------------------------------------------------------------------------------ reporting


def run_experiment(name: str, arguments: dict[str, Any], fields: str) -> None:
    """Train a model with ``python -m experiments.NAME`` in a new process.

    Args:
        arguments: the options and their values.
        fields: changes to the config of the model, separated by spaces (``--model.set``); empty: no change.

    Raises:
        Failure: the training failed.
    """
    words = [str(word) for argument in arguments.items() for word in argument]
    words += ["--model.set", *fields.split()] if fields else []
    if subprocess.run([sys.executable, "-m", f"experiments.{name}", *words], cwd=ROOT).returncode:
        raise Failure(f"the training with experiments.{name} failed: see its error above")


def describe_machine() -> dict[str, Any]:
    """Properties of the machine and its software that the measurements depend on, such as ``cpu`` and ``versions``."""
    from jaxlm.host import num_cores, processor_name  # imported here, because jaxlm imports jax

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu": processor_name(),
        "cores": num_cores(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
        "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAGS if name in os.environ) or "none",
        "commit": git_commit(),
    }


FLAGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "JAXLM_CHOICES",
)  # fmt: skip
"""Environment variables that change the measured times, and are written to the results."""


def git_commit() -> str | None:
    """The hash of the commit of this clone, with ``+changes`` if files differ from it; None if git fails."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table. The first column is left-aligned, and the other columns are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_UNITS = {"FLOP": ("TFLOP/s", 1e12), "B": ("GB/s", 1e9), "B read": ("GB/s", 1e9)}
"""By unit of ``Work``: the unit of speed in tables, and its scale."""


def speed_table(rows: Sequence[Row]) -> str:
    """The measurements of one operation and shape as a text: a table, explanations of its columns, and speed ratios."""
    work = rows[0].work
    unit, scale = _UNITS[work.unit]
    header = (
        "implementation", "median s", "p10", "p90", "tokens/s", unit, "% of peak", "compile s", "cached", "process GB",
        "step GB",
    )  # fmt: skip
    lines = []
    for row in rows:
        r = row.record()
        memory = [row.facts.get(name) for name in ("peak_process_bytes", "step_bytes")]
        compiled = [r["compile_seconds"], row.facts.get("cached_compile_seconds")]
        lines.append(
            [
                row.implementation, f"{r['median']:.4g}", f"{r['p10']:.4g}", f"{r['p90']:.4g}",
                f"{r['tokens_per_second']:,.1f}",
                f"{r['rate'] / scale:.3g}", f"{r['peak_percent']:.1f}",
                *("n/a" if seconds is None else f"{seconds:.1f}" for seconds in compiled),
                *("n/a" if size is None else f"{size / 1e9:.2f}" for size in memory),
            ]
        )  # fmt: skip
    first = rows[0]
    return "\n".join(
        [
            f"{first.op}, {first.dtype}, {first.shape}, {len(first.seconds)} rounds",
            table(header, lines),
            f"{unit}: {work.formula}; peak {first.peak / scale:.3g} {unit}, measured in the same rounds",
            "compile s: extra time of the first repetition; cached: the same in a new process with a compilation cache",
            "process GB: peak memory, including loading and compilation; step GB: memory of a step, as XLA reports it",
            *(
                f"{JAXLM} is {row.ratio:.2f}x as fast as {row.implementation}"
                for row in rows
                if row.implementation != JAXLM
            ),
        ]
    )


def comparison_table(rows: Sequence[Row], first: str, last: str, last_cell: Callable[[Row], str]) -> str:
    """The measurements of several operations and shapes as a text: a table and explanations of its columns.

    The column "jaxlm/baseline" and the two columns after it are the median, p10 and p90 over rounds of the time of
    jaxlm / the time of the baseline.

    Args:
        rows: the rows of :func:`measure`; for each operation and shape, one row is of jaxlm.
        first: header of the first column, which has ``Row.op``.
        last: header of the last column.
        last_cell: a function that returns the cell of a row in the last column.
    """
    header = (first, "shape", "implementation", "ms", "p10", "p90", "% of peak", "jaxlm/baseline", "p10", "p90", last)
    ours = {(row.op, row.shape): row for row in rows if row.implementation == JAXLM}
    lines = []
    for row in rows:
        r = row.record()
        cells = [row.op, row.shape, row.implementation, *(f"{1e3 * r[name]:.4g}" for name in ("median", "p10", "p90"))]
        ratios = [a / b for a, b in zip(ours[row.op, row.shape].seconds, row.seconds, strict=True)]
        shown = [f"{ratio:.2f}" for ratio in np.percentile(ratios, (50, 10, 90))]
        cells += [f"{r['peak_percent']:.1f}", *(["", "", ""] if row.implementation == JAXLM else shown), last_cell(row)]
        lines.append(cells)
    return "\n".join(
        [
            f"{rows[0].dtype}, {len(rows[0].seconds)} rounds; both: forward and backward",
            table(header, lines),
            *(f"% of peak: work / time / peak; work: {text}" for text in sorted({row.work.formula for row in rows})),
            "jaxlm/baseline: time of jaxlm / time of the baseline in the same round; below 1 jaxlm is faster",
        ]
    )


def write_json(
    path: Path | None, program: str, options: Any, description: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Write the result file of a benchmark to ``path``; None: write nothing.

    Args:
        program: name of the module in ``benchmarks``.
        options: dataclass of the options; all fields except ``json`` are written.
        description: properties of the machine.
        rows: the measurements as JSON values.
    """
    if path is None:
        return
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "json"
    }
    record = {"program": program, "arguments": arguments, "machine": description, "rows": list(rows)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ command lines


def main(
    kind: type[Any], run: Callable[[Any], None], arguments: Sequence[str] | None, *, name: str, description: str | None
) -> int:
    """Run ``python -m benchmarks.NAME`` and return its exit status (see ``jaxlm.command_line``).

    Args:
        kind: the dataclass of the options.
        run: a function of the options that measures and prints.
        arguments: the command-line arguments; None: those of the process.
        name: name of the module in ``benchmarks``.
        description: text at the start of ``--help``.
    """
    from jaxlm.command_line import exit_status, parse, split_debug  # imported here, because jaxlm imports jax

    words, debug = split_debug(arguments)

    def command() -> int:
        options = parse(kind, words, program=f"python -m benchmarks.{name}", description=description)
        check_options(options)
        run(options)
        return 0

    return exit_status(command, f"benchmarks.{name}", debug=debug)


def check_options(options: Any) -> None:
    """Check the whole numbers of the options and the path of the JSON file before the measurement.

    Raises:
        UserError: a whole number is below 1 or above 2**31 - 1.
        ValueError: the path is a directory, or its parent directory does not exist.
    """
    from jaxlm.command_line import check_output_file  # imported here, because jaxlm imports jax

    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**31:
            raise UserError(f"{option} {value} must be from 1 to {2**31 - 1}")
    check_output_file("json", getattr(options, "json", None))

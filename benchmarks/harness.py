"""Peers in processes of their own, taking turns; rows that hold what a number needs to be believed; text and JSON.

Nothing here computes: neither JAX nor torch is imported, so that only one worker uses the machine at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.shapes import Work

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
NEEDS = {"torch": ("torch", "transformers"), "torch-compile": ("torch", "transformers"), "flax": ("transformers",)}
"""What each peer imports that jaxlm does not depend on."""
OURS = "jaxlm"
WARM = 0.3
"""Seconds that a peer runs before the repetition that counts: a processor that was idle takes a tenth of a second to
get up to speed, and the threads of the peer before (OpenMP's, of torch) spin on for two."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What every comparison of speed can be asked."""

    against: str = "torch,flax"
    """Peers, separated by commas; empty measures jaxlm alone."""
    rounds: int = 7
    """Repetitions of each peer, after warm-up."""
    json: Path | None = None
    """Write everything there too."""
    quick: bool = False
    """A tiny model and shape in place of all others given, to see that it works: its numbers mean nothing."""
    device: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """What all peers must run on; any: what each finds."""


DEVICES = {
    "any": {},
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"JAX_PLATFORMS": "cuda"},
    "tpu": {"JAX_PLATFORMS": "tpu"},
}
"""Environment of the workers, by device. Without that device JAX says so; torch runs on what there is, and then peers
on different devices are refused."""


class Failure(Exception):
    """Why a benchmark stops: one sentence for the user."""


class Mistake(Failure, ValueError):
    """A failure that is a mistake of the user: an option, or a package that is not installed."""


DEBUG = "--debug"
"""The option that prints the traceback of an error."""


# -------------------------------------------------------------------------------------------------- workers


class Worker:
    """A peer in its own process, see ``worker``. To be closed.

    Args:
        name: what messages call it.
        target: ``module:class`` of the peer.
        log: file that takes what the process prints.
        environment: variables of the process beside those of this one.
        arguments: for the peer, as JSON.

    Raises:
        Failure: the peer could not be set up; so do all methods when it fails or dies.
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
            self._ask("setup", **arguments)
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[float, Any]:
        """Seconds of one repetition, and what it computed."""
        result = self._ask("run")
        return result["seconds"], result["value"]

    def facts(self) -> dict[str, Any]:
        """What is known about the peer."""
        return self._ask("facts")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self.process:
            self.process.kill()

    def _ask(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            line = self.process.stdout.readline()
        if not line:
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            raise Failure(f"{self.name} died (exit status {self.process.wait()}): {last}")
        answer = json.loads(line)
        if "error" in answer:
            mistaken = call == "setup" and answer["error"].startswith(("ValueError", "ImportError"))
            raise (Mistake if mistaken else Failure)(f"{self.name}: {answer['error']}")
        return answer["result"]


@dataclasses.dataclass(frozen=True)
class Session:
    """A checkpoint in ``directory``, the worker that wrote it and measures the roofs, and what is known of both.
    Without a model there is no checkpoint."""

    directory: Path
    machine: Worker
    model: dict[str, Any]
    description: dict[str, Any]
    start: Callable[..., Worker]
    """``start(name, target, **arguments)``: a worker that ends with the session, or when it is closed. All of them keep
    what they compile in one persistent cache, empty at first."""

    def compare(
        self, targets: dict[str, str], arguments: dict[str, Any], op: str, shape: str, work: Work, **options: Any
    ) -> list[Row]:
        """:func:`measure` peers that all take the same ``arguments``, in processes that end with it. ``options`` are
        its ``warm_up``, ``rounds`` and ``check``."""
        with contextlib.ExitStack() as workers:
            peers = {
                name: workers.enter_context(contextlib.closing(self.start(name, target, **arguments)))
                for name, target in targets.items()
            }
            return measure(op, shape, work, self.machine, peers, **options)

    def with_cached_compile(self, rows: Sequence[Row], target: str, **arguments: Any) -> list[Row]:
        """The rows of :func:`measure`; that of jaxlm also tells how long its first repetition takes longer than others
        in a new process that finds the compiled program in the cache."""
        with contextlib.closing(self.start("jaxlm again", target, **arguments)) as worker:
            first = worker.run()[0]
        cached = max(0.0, first - rows[0].median)
        return [
            dataclasses.replace(row, facts={**row.facts, "cached_compile_seconds": cached}) if row.peer == OURS else row
            for row in rows
        ]


@contextlib.contextmanager
def session(model: str | None, device: str = "any", **sizes: Any) -> Iterator[Session]:
    """Write a random ``model`` (None: none) and its batch of these ``sizes``, print what the machine is and can do, and
    end all workers at the end."""
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

        description = describe_machine()  # before the load is our own
        machine = start("machine", "benchmarks.peers:Machine", model=model, **sizes)
        known = machine.facts()
        roofs = machine.run()[1]
        shown = f"{roofs['FLOP'] / 1e9:,.0f} GFLOP/s float32 GEMM, {roofs['B'] / 1e9:,.1f} GB/s copy"
        shown += f", {roofs['B read'] / 1e9:,.1f} GB/s read"
        description |= {"device": known["device"], "roofs": shown}
        for name, value in description.items():
            print(f"{name:10} {value}")
        print(flush=True)
        yield Session(directory, machine, known, description, start)


def choose(against: str, peers: dict[str, str]) -> dict[str, str]:
    """jaxlm and the peers named, with their targets.

    Raises:
        Mistake: a peer is unknown, or what it needs is not installed.
    """
    names = [name for name in against.replace(" ", "").split(",") if name and name != OURS]
    for name in names:
        if name not in peers:
            raise Mistake(
                f"no peer is called {name!r}: choose from {', '.join(peer for peer in peers if peer != OURS)}"
            )
        missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise Mistake(f"{name} needs {' and '.join(missing)}: pip install 'jaxlm[reference]', or choose --against")
    return {name: peers[name] for name in (OURS, *names)}


def with_class(
    targets: dict[str, str], family: str, classes: dict[str, dict[str, str]], known: Iterable[str]
) -> dict[str, str]:
    """The peers that have a model of a family; those that have none are named.

    Raises:
        Mistake: jaxlm itself is not measured on this family.
    """
    if family not in known:
        raise Mistake(f"family {family!r} is not measured here: choose a model of {', '.join(known)}")
    missing = [name for name in targets if name != OURS and family not in classes[name]]
    if missing:
        print(f"left out, as there is no such model: {', '.join(missing)} of {family}")
    return {name: target for name, target in targets.items() if name not in missing}


def names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """What an option names, separated by commas.

    Raises:
        Mistake: something that is not ``known``.
    """
    found = text.replace(" ", "").split(",")
    for name in found:
        if name not in known:
            raise Mistake(f"--{option} {name!r} is unknown: choose from {', '.join(known)}")
    return found


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers of an option, separated by commas.

    Raises:
        Mistake: something else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise Mistake(f"--{option} {text!r} must be numbers with commas between them") from None
    if min(found) < 1:
        raise Mistake(f"--{option} {text!r}: each number must be at least 1")
    return found


# ------------------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class Row:
    """One peer's measurement. ``seconds`` are in order of rounds, so that peers can be compared round by round;
    ``warm_up`` are those of the repetitions before, of which the first compiles."""

    op: str
    peer: str
    shape: str
    work: Work
    seconds: list[float]
    warm_up: list[float]
    roof: float
    """Units of ``work`` a second that the machine can do, measured in the same rounds."""
    ratio: float
    """How many times as fast jaxlm is: the median over rounds of this peer's seconds over those of jaxlm."""
    facts: dict[str, Any]
    dtype: str = "float32"

    @property
    def median(self) -> float:
        """Median seconds of a repetition."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Units of ``work`` a second."""
        return self.work.amount / self.median

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        p10, p90 = np.percentile(self.seconds, (10, 90)).tolist()
        return {
            **dataclasses.asdict(self),
            "n": len(self.seconds),
            "median": self.median,
            "p10": p10,
            "p90": p90,
            "tokens_per_second": self.work.tokens / self.median,
            "rate": self.rate,
            "roof_percent": 100 * self.rate / self.roof,
            "compile_seconds": max(0.0, self.warm_up[0] - statistics.median(self.warm_up[1:])),
        }


def measure(
    op: str,
    shape: str,
    work: Work,
    machine: Worker,
    peers: dict[str, Worker],
    *,
    warm_up: int,
    rounds: int,
    check: Callable[[dict[str, list[Any]]], None],
) -> list[Row]:
    """Warm up, check, then let the peers take turns, each round beginning with another one.

    Args:
        warm_up: repetitions of each peer before the first that counts, at least 2: one of them compiles.
        check: given what each peer computed in each of them; raises ``Failure`` when they disagree.
    """
    if rounds < 1:
        raise Failure(f"--rounds {rounds} measures nothing: at least 1")
    platforms = {name: worker.facts()["platform"] for name, worker in peers.items()}
    if len(set(platforms.values())) > 1:
        raise Failure(f"peers run on different devices, {platforms}: install them for one, or set JAX_PLATFORMS=cpu")
    before: dict[str, list[float]] = {}
    values: dict[str, list[Any]] = {}
    for name, worker in peers.items():
        print(f"warming up {name} ...", flush=True)
        runs = [worker.run() for _ in range(warm_up)]
        before[name], values[name] = [second for second, _ in runs], [value for _, value in runs]
    check(values)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    roofs = []
    for turn in range(rounds):
        roofs.append(warm_run(machine)[1][work.unit])
        for name in rotated(list(peers), turn):
            seconds[name].append(warm_run(peers[name])[0])
    roof = statistics.median(roofs)
    return [
        Row(
            op, name, shape, work, seconds[name], before[name], roof,
            paired_ratio(seconds[name], seconds[OURS]), peers[name].facts(),
        )
        for name in peers
    ]  # fmt: skip


def warm_run(worker: Worker) -> tuple[float, Any]:
    """One repetition after others, at least one, that took :data:`WARM` seconds together."""
    spent = worker.run()[0]
    while spent < WARM:
        spent += worker.run()[0]
    return worker.run()


def rotated(names: list[str], by: int) -> list[str]:
    """The same circle of names, begun ``by`` places later."""
    by %= len(names)
    return names[by:] + names[:by]


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of their seconds over ours: what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def over_peer(ours: Row, theirs: Row) -> list[str]:
    """Our time over that of a peer, round by round: median, p10 and p90."""
    ratios = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return [f"{ratio:.2f}" for ratio in np.percentile(ratios, (50, 10, 90))]


def check_losses(losses: dict[str, list[float]], tolerances: Sequence[tuple[int, float]]) -> None:
    """Raise ``Failure`` unless the losses of all peers agree: ``(number of updates, relative tolerance)``."""
    for updates, tolerance in tolerances:
        found = {name: values[updates] for name, values in losses.items()}
        array = np.array(list(found.values()))
        spread = np.ptp(array) / np.min(np.abs(array))
        if not spread <= tolerance:  # not-a-number fails too
            shown = ", ".join(f"{name} {value:.6f}" for name, value in found.items())
            raise Failure(f"losses after {updates} updates differ by {spread:.1e} (allowed {tolerance:.0e}): {shown}")


def check_same(values: dict[str, list[Any]]) -> None:
    """Raise ``Failure`` unless all peers generated the same tokens, always."""
    expected = values[OURS][0]
    for name, repetitions in values.items():
        for made in repetitions:
            for row, (ours, theirs) in enumerate(zip(expected, made, strict=True)):
                if ours != theirs:
                    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
                    raise Failure(f"{name} generated other tokens than {OURS}, from token {at} of row {row} on")


def check_samples(values: dict[str, list[Any]], tolerance: float) -> None:
    """Raise ``Failure`` unless sampled elements of every result agree, in every repetition that was sampled (not None).

    ``tolerance``: how far they may be apart, relative to the largest of the result.
    """
    expected = values[OURS][0]
    for name, repetitions in values.items():
        for results in repetitions:
            if results is None:
                continue
            if results.keys() != expected.keys():
                raise Failure(f"{name} computes {sorted(results)}, {OURS} {sorted(expected)}")
            for what, sample in results.items():
                ours, theirs = np.array(expected[what]), np.array(sample)
                difference = np.max(np.abs(ours - theirs)) / np.max(np.abs(ours))
                if not difference <= tolerance:  # not-a-number fails too
                    raise Failure(
                        f"{what} of {name} differs by {difference:.1e} of its largest element (allowed {tolerance:.0e})"
                    )


# ------------------------------------------------------------------------------------------------ reporting


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on, beside the code that is measured."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
        "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAGS if name in os.environ) or "none",
        "commit": git_commit(),
    }


FLAGS = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE")
"""Environment that changes what is measured."""


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this checkout, ``+changes`` where files differ from it; None outside of one."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_PREFIX = {"FLOP": ("TFLOP/s", 1e12), "B": ("GB/s", 1e9), "B read": ("GB/s", 1e9)}


def speed_table(rows: Sequence[Row]) -> str:
    """The measurements, what they mean, and how much faster jaxlm is."""
    work = rows[0].work
    unit, scale = _PREFIX[work.unit]
    header = (
        "peer", "median s", "p10", "p90", "tokens/s", unit, "% of roof", "compile s", "cached", "process GB", "step GB",
    )  # fmt: skip
    lines = []
    for row in rows:
        r = row.record()
        memory = [row.facts.get(name) for name in ("peak_process_bytes", "step_bytes")]
        compiled = [r["compile_seconds"], row.facts.get("cached_compile_seconds")]
        lines.append(
            [
                row.peer, f"{r['median']:.4g}", f"{r['p10']:.4g}", f"{r['p90']:.4g}", f"{r['tokens_per_second']:,.1f}",
                f"{r['rate'] / scale:.3g}", f"{r['roof_percent']:.1f}",
                *("n/a" if seconds is None else f"{seconds:.1f}" for seconds in compiled),
                *("n/a" if size is None else f"{size / 1e9:.2f}" for size in memory),
            ]
        )  # fmt: skip
    first = rows[0]
    return "\n".join(
        [
            f"{first.op}, {first.dtype}, {first.shape}, {len(first.seconds)} rounds",
            table(header, lines),
            f"{unit}: {work.formula}; roof {first.roof / scale:.3g} {unit}, measured in the same rounds",
            "compile s: what the first repetition took beyond the rest of the warm-up; cached: with a persistent cache",
            "process GB: its peak, loading and compiling included; step GB: what XLA says that a step needs",
            *(f"{OURS} is {row.ratio:.2f}x of {row.peer}" for row in rows if row.peer != OURS),
        ]
    )


def write_json(
    path: Path | None, program: str, options: Any, description: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Everything but the path itself, when one is given."""
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
    """Exit status of ``python -m benchmarks.NAME``, as ``jaxlm.command_line`` defines it.

    jaxlm, and with it JAX, is imported only to explain an error.

    Args:
        kind: the dataclass of the options.
        run: measures and prints.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, program = DEBUG in given, f"python -m benchmarks.{name}"
    given = [word for word in given if word != DEBUG]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = tyro.cli(kind, args=given, prog=program, description=description)
    except SystemExit as leaving:
        if leaving.code:
            from jaxlm.command_line import parse

            parse(kind, given, program=program)  # the same error, as one line
        raise
    try:
        check_options(options)
        run(options)
    except (Exception, KeyboardInterrupt) as raised:
        from jaxlm.command_line import exit_status

        error = raised

        def fail() -> int:
            raise error

        return exit_status(fail, f"benchmarks.{name}", debug=debug)
    return 0


def check_options(options: Any) -> None:
    """Check what can be checked before anything is measured.

    Raises:
        Mistake: a number below 1, or a file that cannot be written.
    """
    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**31:
            raise Mistake(f"{option} {value} must be from 1 to {2**31 - 1}")
        if field.name == "json" and value is not None:
            if value.is_dir():
                raise Mistake(f"{option} {value} is a directory: name a file")
            if not value.absolute().parent.is_dir():
                raise Mistake(f"{option} {value}: there is no directory {value.parent}")

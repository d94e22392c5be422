"""Run the benchmarks of the section "Measurements" of docs/benchmarks.md, and write result files.

    python -m benchmarks.all --full                     about 200 minutes on two cores
    python -m benchmarks.all --quick                    tiny sizes, about 20 minutes: a test that the benchmarks work
    python -m benchmarks.all --full --only decoding     the benchmarks whose name contains "decoding"

The benchmarks need no files, except the classification of texts (``benchmarks.texts``). It runs only with
``--classifier``, the directory of a trained model, and ``--texts``, a file.

Each benchmark writes ``NAME.json`` and its log ``NAME.log`` to the output directory. To continue after an interruption
or a failure, run the same command again. It runs only the benchmarks that have no ``NAME.json``. Run no other program
on the machine during the measurement. With ``--page PAGE``, the command replaces the measured part of this page after
the last benchmark. If a benchmark failed, the page does not change.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness, report, texts
from benchmarks.harness import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """The command of one benchmark, which writes one result file.

    Attributes:
        name: name of the result file without ".json".
        arguments: name of the module in ``benchmarks``, then its options.
        minutes: expected duration on two cores. The estimate of the remaining time is the sum of ``minutes`` of the
            remaining jobs, multiplied by the measured / the expected duration of the jobs that succeeded.
        quick_minutes: the same with ``--quick``.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    quick_minutes: float = 0.7

    @property
    def implementations(self) -> dict[str, str]:
        """All implementations of the benchmark: ``{name: "module:class"}``. Empty: it has no option ``--against``."""
        return getattr(importlib.import_module(f"benchmarks.{self.arguments[0]}"), "IMPLEMENTATIONS", {})


def _jobs() -> tuple[Job, ...]:
    models = {
        "gpt2": 4, "bert-base-uncased": 6, "t5-small": 4, "xlnet-base-cased": 7, "transformer-xl-base": 11,
        "vdcnn-9": 7, "lstm-zaremba-medium": 3, "smollm2-135m": 6, "mamba2-130m": 11, "griffin-12-layers": 5,
        "gated-deltanet-12-layers": 5, "xlstm-12-layers": 5, "mixtral-12-layers": 6,
    }  # fmt: skip
    decoders = {"gpt2": 22, "t5-small": 14, "lstm-zaremba-medium": 6}
    prompt_options = ("--prompt", "32,512", "--batch", "1,8")
    xlnet = ("decoding", "--model", "xlnet-base-cased", "--tokens", "16")
    return (
        Job("attention", ("attention",), 21),
        Job("attention_decode", ("attention", "--variants", "decode", "--lengths", "128,1024,4096"), 2),
        Job("recurrence", ("recurrence",), 8),
        Job("scans", ("scans",), 8),
        *(
            Job(f"training_{name}", ("training", "--model", name, "--passes", "step,forward"), minutes)
            for name, minutes in models.items()
        ),
        *(
            Job(f"decoding_{name}", ("decoding", "--model", name, *prompt_options), minutes)
            for name, minutes in decoders.items()
        ),
        # The class of transformers has no cache, so eight rows with a prompt of 512 tokens would take about 40 minutes.
        Job("decoding_xlnet-base-cased", (*xlnet, "--batch", "1,8"), 8),
        Job("decoding_xlnet-base-cased_prompt512", (*xlnet, "--prompt", "512"), 8),
        Job("speculative", ("speculative",), 8),
        Job("texts", ("texts",), 9),
        Job("plans", ("plans",), 8),
    )


JOBS = _jobs()
"""The benchmarks of the section "Measurements" of docs/benchmarks.md that need no files."""


@dataclasses.dataclass(frozen=True)
class All:
    """Run the benchmarks. Exactly one of --full and --quick must be given."""

    full: bool = False
    """Measure the models and sizes of docs/benchmarks.md."""
    quick: bool = False
    """Use tiny models and sizes. The times have no meaning, so --page is not allowed."""
    only: str = ""
    """Run only the benchmarks whose name contains this text."""
    against: str | None = None
    """Baselines, separated by commas. A benchmark ignores baselines that it lacks. Empty: only jaxlm is measured.
    None: the default baselines of each benchmark."""
    classifier: Path | None = None
    """Run directory or Hugging Face directory of a BERT classifier for ``benchmarks.texts``. None: classification is
    not measured."""
    texts: Path | None = None
    """Texts for --classifier, one per line."""
    output: Path | None = None
    """Directory of the results. None: benchmarks/results/PROCESSOR; with --quick, benchmarks/results-quick. The page of
    --page also shows the directories beside this directory, so each of them must have results."""
    page: Path | None = None
    """Page whose measured part is replaced after the last benchmark, such as docs/benchmarks.md; None: no page."""


def run(options: All) -> None:
    """Run the jobs that have no result file, then replace the measured part of the page.

    Raises:
        UserError: an option is wrong.
        Failure: a job failed. The other jobs were run, and the page was not changed.
    """
    if options.full == options.quick:
        raise UserError("give one of the options --full and --quick")
    if options.quick and options.page is not None:
        raise UserError(f"--page {options.page} needs --full: the times of --quick have no meaning")
    all_jobs = (*JOBS, *_classification_jobs(options))
    jobs = [job for job in all_jobs if options.only in job.name]
    if not jobs:
        raise UserError(
            f"no benchmark has {options.only!r} in its name: choose from {', '.join(job.name for job in all_jobs)}"
        )
    if options.against is not None:
        harness.choose_implementations(
            options.against, {name: target for job in jobs for name, target in job.implementations.items()}
        )
    directory = options.output or _default_directory(options.quick)
    if options.page is not None:
        _check_page(options.page, directory)
    directory.mkdir(parents=True, exist_ok=True)
    remaining = [job for job in jobs if not (directory / f"{job.name}.json").exists()]
    print(f"{len(jobs)} benchmarks, {len(jobs) - len(remaining)} of them already have results in {directory}")
    if options.full and options.classifier is None and any(job.name == "texts" for job in jobs):
        print("The classification of texts is not measured: give --classifier DIRECTORY and --texts FILE")
    failed = _run_all(remaining, directory, options)
    if failed:
        logs = ", ".join(str(directory / f"{name}.log") for name in failed)
        raise harness.Failure(f"{len(failed)} of {len(jobs)} benchmarks failed: see {logs}")
    if options.page is not None:
        report.run(report.Report(results=directory.parent, page=options.page))


def _classification_jobs(options: All) -> list[Job]:
    """The job of the classification of texts, if its files are given.

    Raises:
        UserError: only one of them is given, a path is wrong, or --quick is also given.
    """
    texts.check(texts.Texts(classifier=options.classifier, texts=options.texts, quick=options.quick))
    if options.classifier is None or options.texts is None:
        return []
    classifier, file = str(options.classifier.absolute()), str(options.texts.absolute())
    return [Job("texts_classification", ("texts", "--classifier", classifier, "--texts", file), 3)]


def _check_page(page: Path, directory: Path) -> None:
    """Raise ``UserError`` if the page could not be written after the measurements.

    Reasons: the page is not a file, it has no measured part, or a directory beside ``directory`` has no valid results.
    """
    report.split_page(page)
    directory = directory.absolute()
    for other in sorted(path for path in directory.parent.glob("*") if path.is_dir() and path != directory):
        try:
            report.read(other)
        except UserError as error:
            raise UserError(
                f"--page shows all directories in {other.parent}. {error}. Fix this, or choose another --output"
            ) from error


def _default_directory(quick: bool) -> Path:
    if quick:
        return harness.ROOT / "benchmarks" / "results-quick"
    machine = harness.describe_machine()
    processor = re.sub(r"\((r|tm)\)", "", str(machine["cpu"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", f"{processor} {machine['cores']} cores").strip("-")
    return harness.ROOT / "benchmarks" / "results" / name


def _run_all(jobs: list[Job], directory: Path, options: All) -> list[str]:
    """Run the jobs and return the names of the failed jobs."""
    failed, start = [], time.perf_counter()
    minutes = [job.quick_minutes if options.quick else job.minutes for job in jobs]
    actual_minutes = expected_minutes = 0.0  # of the jobs that succeeded
    for number, job in enumerate(jobs):
        job_start = time.perf_counter()
        expected_left = sum(minutes[number:])
        minutes_left = expected_left * (actual_minutes / expected_minutes if expected_minutes else 1.0)
        bar = "#" * round(20 * (1 - expected_left / sum(minutes)))
        elapsed = (job_start - start) / 60
        progress = f"[{bar:20}] {number + 1}/{len(jobs)} {job.name}"
        print(f"{progress} · {elapsed:.0f} min, about {minutes_left:.0f} min left", flush=True)
        if _run_job(job, directory, options):
            actual_minutes += (time.perf_counter() - job_start) / 60
            expected_minutes += minutes[number]
        else:
            print(f"{job.name} failed: see {directory / job.name}.log")
            failed.append(job.name)
    return failed


def _run_job(job: Job, directory: Path, options: All) -> bool:
    """Run a job and return whether it succeeded. A failed job has no result file."""
    unfinished = directory / f"{job.name}.json.unfinished"
    command = [sys.executable, "-m", f"benchmarks.{job.arguments[0]}", *job.arguments[1:]]
    if options.quick:
        command.append("--quick")
    if options.against is not None and job.implementations:
        known = [name for name in options.against.replace(" ", "").split(",") if name in job.implementations]
        command += ["--against", ",".join(known)]
    with (directory / f"{job.name}.log").open("w") as log:
        status = subprocess.run(
            [*command, "--json", str(unfinished.absolute())], stdout=log, stderr=subprocess.STDOUT, cwd=harness.ROOT
        ).returncode
    if status == 0:
        unfinished.replace(directory / f"{job.name}.json")
    return status == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks and return the exit status."""
    return harness.main(All, run, arguments, name="all", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

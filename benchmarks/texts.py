"""Sentences per second of jaxlm and transformers, in translation with beam search and in classification.

    python -m benchmarks.texts --translator runs/translation --sources sentences.txt
    python -m benchmarks.texts --classifier runs/sentiment --texts sentences.txt --rounds 5 --json texts.json

``--translator`` is a run directory of ``experiments.translation`` (preset ``t5`` or ``verses``), or a Hugging Face
directory of a T5 model. ``--classifier`` is a run directory of ``experiments.sentiment`` (preset ``minilm``), or a
Hugging Face directory of BERT with a classification head. ``--sources`` and ``--texts`` have one text per line. Empty
lines are skipped.

There are two baselines with torch. ``torch`` calls the model of transformers with texts that the benchmark has sorted
by length, as jaxlm sorts them. ``pipeline`` is one call of ``transformers.pipeline`` with the texts in the order of the
file, so its batches have more padding. All implementations use the same batch size.

The times include tokenization. The column ``first s`` has the seconds of the first run, in which jaxlm compiles. The
column ``equal`` has the percentage of texts for which the result equals that of jaxlm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import harness

TRANSLATORS = {
    "jaxlm": "benchmarks.texts_baselines:JaxlmTranslator",
    "torch": "benchmarks.texts_baselines:TorchTranslator",
    "pipeline": "benchmarks.texts_baselines:PipelineTranslator",
}
CLASSIFIERS = {
    "jaxlm": "benchmarks.texts_baselines:JaxlmClassifier",
    "torch": "benchmarks.texts_baselines:TorchClassifier",
    "pipeline": "benchmarks.texts_baselines:PipelineClassifier",
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Measure the sentences per second of translation and classification."""

    translator: Path | None = None
    """Run directory or Hugging Face directory of a T5 model that translates; None: translation is not measured."""
    sources: Path | None = None
    """Sentences to translate, one per line."""
    classifier: Path | None = None
    """Run directory or Hugging Face directory of a BERT classifier; None: classification is not measured."""
    texts: Path | None = None
    """Texts to classify, one per line."""
    batch: int = 32
    """Sentences per batch."""
    num_beams: int = 5
    """Number of beams of the beam search."""
    max_new_tokens: int = 80
    """Maximum number of tokens of a translation."""
    rounds: int = 5
    """Number of rounds. A round measures one repetition of each implementation. Before the first round, each
    implementation runs twice."""
    json: Path | None = None
    """Write all results to this JSON file too."""
    device: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Device of jaxlm and torch; any: the default device of each of them."""


def compare(task: str, implementations: dict[str, str], rounds: int, device: str, **arguments: Any) -> dict[str, Any]:
    """Measure one task with all implementations, and return a record for :func:`show` and for JSON.

    Four values are dicts by implementation: ``seconds`` (of each round), ``first_seconds`` (of the first repetition),
    and, only for baselines, ``equal`` (the fraction of texts for which the result equals that of jaxlm) and ``ratios``
    (the speed of jaxlm / the speed of the baseline).

    Args:
        implementations: the ``module:class`` of each implementation, jaxlm first.
        device: a key of ``harness.DEVICES``.
        arguments: constructor arguments of all implementations.

    Raises:
        Failure: the implementations run on different devices, or an implementation fails.
    """
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as workers:
        running_workers = {
            name: workers.enter_context(
                contextlib.closing(
                    harness.Worker(name, target, Path(temporary) / f"{name}.log", harness.DEVICES[device], **arguments)
                )
            )
            for name, target in implementations.items()
        }
        harness.check_same_device(running_workers)
        warm_up = {name: [worker.run() for _ in range(2)] for name, worker in running_workers.items()}
        results = {name: runs[-1][1] for name, runs in warm_up.items()}
        seconds: dict[str, list[float]] = {name: [] for name in running_workers}
        for number in range(rounds):
            for name in harness.rotated(list(running_workers), number):
                seconds[name].append(harness.run_after_warm_up(running_workers[name])[0])
    ours, baselines = results["jaxlm"], [name for name in implementations if name != "jaxlm"]
    return {
        "task": task,
        "sentences": len(ours),
        "equal": {
            name: sum(a == b for a, b in zip(ours, results[name], strict=True)) / len(ours) for name in baselines
        },
        "seconds": seconds,
        "first_seconds": {name: runs[0][0] for name, runs in warm_up.items()},
        "ratios": {name: harness.paired_ratio(seconds[name], seconds["jaxlm"]) for name in baselines},
    }


def show(record: dict[str, Any]) -> str:
    """A record of :func:`compare` as text: a table, and the relative speeds."""
    lines = []
    for name, seconds in record["seconds"].items():
        p10, p90 = np.percentile(seconds, (10, 90)).tolist()
        median = statistics.median(seconds)
        lines.append(
            [name, f"{record['sentences'] / median:,.1f}", f"{median:.2f}", f"{p10:.2f}", f"{p90:.2f}",
             f"{record['first_seconds'][name]:.1f}",
             f"{100 * record['equal'][name]:.1f} %" if name in record["equal"] else ""]
        )  # fmt: skip
    header = ("implementation", "sentences/s", "median s", "p10", "p90", "first s", "equal")
    ratios = ", ".join(f"{ratio:.2f}x as fast as {name}" for name, ratio in record["ratios"].items())
    return f"{record['task']}: {record['sentences']:,} sentences\n{harness.table(header, lines)}\njaxlm is {ratios}"


def run(options: Texts) -> None:
    """Measure and print the results."""
    for name, file, model_option, directory in (
        ("sources", options.sources, "translator", options.translator),
        ("texts", options.texts, "classifier", options.classifier),
    ):
        if file is not None and directory is None:
            raise harness.UserError(f"--{name} {file} needs the directory of a model: give --{model_option} too")
    if options.translator is None and options.classifier is None:
        raise harness.UserError("nothing to measure: give --translator and --sources, or --classifier and --texts")
    translation = f"translation, {options.num_beams} beams"
    files = {
        translation: _check_files(translation, options.translator, options.sources),
        "classification": _check_files("classification", options.classifier, options.texts),
    }
    harness.check_packages("torch", CLASSIFIERS["torch"])
    description = harness.describe_machine()
    for name, value in description.items():
        print(f"{name:10} {value}")
    records = []
    beams = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    for task, implementations, settings in (
        (translation, TRANSLATORS, beams),
        ("classification", CLASSIFIERS, {}),
    ):
        if paths := files[task]:
            arguments = {**paths, "batch": options.batch, **settings}
            records.append(compare(task, implementations, options.rounds, options.device, **arguments))
            print(f"\n{show(records[-1])}", flush=True)
    harness.write_json(options.json, "texts", options, description, records)


def _check_files(task: str, directory: Path | None, file: Path | None) -> dict[str, str] | None:
    """The directory of the model and the file of sentences, as arguments of an implementation.

    None: ``directory`` is None, so the task is not measured.

    Raises:
        UserError: a path is missing or wrong, or the file has no text.
    """
    if directory is None:
        return None
    if file is None:
        raise harness.UserError(
            f"{task} needs a file of sentences: --sources for --translator, --texts for --classifier"
        )
    directory = directory / "model" if (directory / "model").is_dir() else directory
    if not (directory / "config.json").is_file():
        raise harness.UserError(f"{directory} has no config.json: give the directory of a model")
    if not file.is_file():
        raise harness.UserError(f"{file} is not a file: give a file with one text per line")
    if not file.read_text(encoding="utf-8").strip():
        raise harness.UserError(f"{file} has no text: give one text per line")
    return {"directory": str(directory), "file": str(file)}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Texts, run, arguments, name="texts", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

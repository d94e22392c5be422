"""Sentences per second of jaxlm and transformers, in translation with beam search and in classification.

    python -m benchmarks.texts                               trains a translator first: some minutes on two cores
    python -m benchmarks.texts --quick                       a short test that the benchmark works
    python -m benchmarks.texts --translator runs/translation --sources sentences.txt
    python -m benchmarks.texts --classifier runs/sentiment --texts sentences.txt --rounds 5 --json texts.json

``--translator`` is a run directory of ``experiments.translation`` (preset ``t5`` or ``verses``), or a Hugging Face
directory of a T5 model. ``--classifier`` is a run directory of ``experiments.sentiment`` (preset ``minilm``), or a
Hugging Face directory of BERT with a classification head. ``--sources`` and ``--texts`` have one text per line. Empty
lines are skipped.

Without ``--translator`` and ``--classifier``, the benchmark trains a translator on the included Bible verses (preset
``verses``; needs sacrebleu), measures the translation of 256 verses and deletes the model. It trains no classifier,
because the preset ``minilm`` needs pretrained weights and a data set.

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
IMPLEMENTATIONS = CLASSIFIERS
"""The names of the implementations, which are the same for both tasks."""
NUM_VERSES, QUICK_NUM_VERSES = 256, 8
"""Number of verses that a newly trained translator translates, without and with ``--quick``."""
QUICK_FIELDS = "num_layers=1 num_heads=2 embed_dim=16 head_dim=8 mlp_dim=16"
"""Config fields of the translator of ``--quick``."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Measure the sentences per second of translation and classification."""

    translator: Path | None = None
    """Run directory or Hugging Face directory of a T5 model that translates. None: translation is not measured; without
    --classifier, too, a translator is trained."""
    sources: Path | None = None
    """Sentences to translate, one per line."""
    classifier: Path | None = None
    """Run directory or Hugging Face directory of a BERT classifier; None: classification is not measured."""
    texts: Path | None = None
    """Texts to classify, one per line."""
    against: str = "torch,pipeline"
    """Baselines, separated by commas; empty: only jaxlm is measured."""
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
    quick: bool = False
    """Train a tiny translator for a few steps, to test that the benchmark works; the measured times have no meaning."""
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
    text = f"{record['task']}: {record['sentences']:,} sentences\n{harness.table(header, lines)}"
    return f"{text}\njaxlm is {ratios}" if ratios else text


def run(options: Texts) -> None:
    """Measure and print the results."""
    check(options)
    targets = [harness.choose_implementations(options.against, known) for known in (TRANSLATORS, CLASSIFIERS)]
    with tempfile.TemporaryDirectory() as temporary:
        trains = options.translator is None and options.classifier is None
        measured = _train(options, Path(temporary)) if trains else options
        description = harness.describe_machine()
        for name, value in description.items():
            print(f"{name:10} {value}")
        records = []
        beams: dict[str, Any] = {"num_beams": measured.num_beams, "max_new_tokens": measured.max_new_tokens}
        for (task, paths), implementations, settings in zip(check(measured).items(), targets, (beams, {}), strict=True):
            if paths is not None:
                arguments = {**paths, "batch": options.batch, **settings}
                records.append(compare(task, implementations, options.rounds, options.device, **arguments))
                print(f"\n{show(records[-1])}", flush=True)
    # Without the paths of the temporary directory.
    harness.write_json(options.json, "texts", dataclasses.replace(options, **beams), description, records)


def check(options: Texts) -> dict[str, dict[str, str] | None]:
    """By task, the directory of the model and the file of sentences; None: the task is not measured.

    Raises:
        UserError: an option is missing, a path is wrong, or a file has no text.
    """
    for name, file, model_option, directory in (
        ("sources", options.sources, "translator", options.translator),
        ("texts", options.texts, "classifier", options.classifier),
    ):
        if options.quick and directory is not None:
            raise harness.UserError(f"--quick trains a tiny translator: leave out --{model_option} {directory}")
        if file is not None and directory is None:
            raise harness.UserError(f"--{name} {file} needs the directory of a model: give --{model_option} too")
    translation = f"translation, {options.num_beams} beams"
    return {
        translation: _check_files(translation, options.translator, options.sources),
        "classification": _check_files("classification", options.classifier, options.texts),
    }


def _train(options: Texts, directory: Path) -> Texts:
    """Train a translator in ``directory``, and return ``options`` with it and a file of verses that it did not read.

    With ``--quick``, the translations are also short.

    Raises:
        Failure: the training failed.
    """
    from experiments.translation import Data, parts  # imported here, because it imports jax

    print("classification is not measured: give --classifier DIRECTORY and --texts FILE", flush=True)
    run_directory, file = directory / "translator", directory / "verses.txt"
    arguments: dict[str, Any] = {"--preset": "verses", "--output": run_directory}
    if options.quick:
        arguments |= {"--epochs": 0.02, "--optimizer.warmup-steps": 1, "--buckets": 1, "--vocab-size": 400}
    harness.run_experiment("translation", arguments, QUICK_FIELDS if options.quick else "")
    verses = parts(Data())[2].column("source")[: QUICK_NUM_VERSES if options.quick else NUM_VERSES]
    file.write_text("\n".join(verses), encoding="utf-8")
    changes: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 8} if options.quick else {}
    return dataclasses.replace(options, translator=run_directory, sources=file, quick=False, **changes)


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

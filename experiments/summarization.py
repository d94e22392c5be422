"""Train a summarizer from scratch: an RNN with attention, with or without copying, or a model with T5's architecture.

    python -m experiments.summarization        summarizes docstrings of installed packages; 6 minutes

The next commands summarize descriptions of Debian packages (docs/tasks/summarization.md describes how to get the file):

    python -m experiments.summarization --preset copy --data.file packages.txt
    python -m experiments.summarization --preset t5 --data.file packages.txt

The ROUGE-1 of ``copy`` on the test split is 0.453. The run took 227 minutes on two CPU cores that also did other work.
The ROUGE-1 of a baseline, the first sentence of the description, is 0.332. Packages of one project and packages with
similar descriptions form a group. All packages of a group are in the same split (training, validation or test).
"""

from __future__ import annotations

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import host, metrics
from jaxlm.command_line import end_process
from jaxlm.data import Batches, Tokenizer
from jaxlm.data.buckets import Bucketed
from jaxlm.data.debian import read_descriptions
from jaxlm.data.docstrings import docstrings
from jaxlm.data.duplicates import group_similar
from jaxlm.data.examples import Example, Examples
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.models import Model
from jaxlm.objectives.batch import smoothed_token_loss
from jaxlm.tasks import seq2seq
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class Data:
    """A file of texts with summaries, and its splits. Texts of one project and similar texts are in one group."""

    file: Path | None = None
    """Output of apt-cache show, or .jsonl with the keys text, summary and, optionally, package (also .gz). None:
    docstrings of the standard library and the installed packages. Their first paragraphs are the summaries."""
    validation_fraction: float = 0.03
    """Fraction of the groups for validation. With training.restore_best, validation selects the weights."""
    test_fraction: float = 0.04
    """Fraction of the groups for the test split."""
    largest_group: int = 100
    """Groups with more texts are always in the training split, because they would dominate a smaller split."""
    similarity: float = 0.5
    """Two texts are similar if the Jaccard similarity of their word trigrams is at least this number."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a summarizer and test it."""

    model: lib.ModelConfig = lib.ModelConfig("attention_rnn")
    """The model: attention_rnn or t5."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training. A batch of the longest bucket has batch_size pairs. Batches of shorter buckets may have more."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    data: Data = Data()
    """The data."""
    epochs: float = 6.0
    """Number of passes over the training split."""
    vocab_size: int = 8000
    """Maximum size of the BPE vocabulary that texts and summaries share."""
    max_source: int = 128
    """Texts are truncated to this number of tokens. The report has the number of truncated texts."""
    max_summary: int = 40
    """Maximum number of tokens per generated summary."""
    buckets: int = 4
    """Maximum number of batch shapes (length buckets)."""
    label_smoothing: float = 0.1
    """Fraction of the target probability that is spread uniformly over the vocabulary."""
    num_beams: int = 4
    """Number of beams of the beam search."""
    length_penalty: float = 1.0
    """Exponent p of the score of a beam: sum of log-probabilities / length ** p. Only with num_beams above 1."""
    output: Path | None = None
    """Run directory; None: runs/summarization-<time>."""


def preset(name: str, *changes: str, learning_rate: float = 2e-3, warmup: int = 400, **options: Any) -> Experiment:
    """An experiment with a randomly initialized model."""
    training = lib.ExperimentTraining(batch_size=64, evaluate_every=250, checkpoint_every=1000, restore_best=True)
    optimizer = OptimizerConfig(
        "adamw", learning_rate, "inverse_square_root", warmup_steps=warmup, beta2=0.98, weight_decay=0.0
    )
    return dataclasses.replace(Experiment(lib.ModelConfig(name, changes), training, optimizer), **options)


T5 = ("num_layers=3", "num_heads=4", "embed_dim=256", "head_dim=64", "mlp_dim=512", "dropout=0.1", "remat=none")
RNN = ("source_vocab_size=None", "embed_dim=192", "hidden_dim=256", "output_dim=192", "dropout=0.2")
SMALL = ("source_vocab_size=None", "embed_dim=128", "hidden_dim=128", "output_dim=128", "dropout=0.1")
LUONG = ("attention=luong", "score=general")
PRESETS = {
    "docstrings": preset(
        "attention_rnn", *SMALL, *LUONG, "copy=True", learning_rate=4e-3, warmup=50, epochs=3, vocab_size=3000,
        max_source=64, label_smoothing=0.0, num_beams=2, buckets=2,
    ),
    "copy": preset("attention_rnn", *RNN, *LUONG, "copy=True", label_smoothing=0.0),
    "rnn": preset("attention_rnn", *RNN, *LUONG),
    "t5": preset("t5", *T5, epochs=5, optimizer=dataclasses.replace(RECIPES["t5"].optimizer, hold_steps=1000)),
}  # fmt: skip


def read(data: Data) -> Examples:
    """Examples with ``source``, ``target``, ``text`` (the text in the file or docstring) and ``group``.

    In ``source``, white space is replaced by single spaces. The ``source`` of a docstring begins with the name of the
    object and a colon.
    """
    if data.file is None:
        loaded = docstrings()
        rows = [{**row, "source": f"{row['name']}: {row['text']}"} for row in loaded]
        keys = loaded.column("package")
    else:
        loaded = read_descriptions(data.file)
        rows = [{**row, "source": row["text"]} for row in loaded]
        keys = loaded.column("project")
    groups = group_similar(loaded.column("text"), keys, similarity=data.similarity)
    examples: list[Example] = [
        # The model reads no line breaks, so replace all white space by single spaces.
        {"source": " ".join(row["source"].split()), "target": row["summary"], "text": row["text"], "group": group}
        for row, group in zip(rows, groups, strict=True)
    ]
    return Examples(examples, loaded.name, loaded.rejected)


def parts(data: Data, examples: Examples) -> tuple[Examples, Examples, Examples]:
    """The training, validation and test splits. All examples of a group are in the same split.

    Groups with more than ``data.largest_group`` examples are in the training split.

    Raises:
        ValueError: every group has more than ``data.largest_group`` examples, or there are too few groups to split.
    """
    sizes = collections.Counter(examples.column("group"))
    is_large = [sizes[group] > data.largest_group for group in examples.column("group")]
    if all(is_large):
        raise ValueError(
            f"all groups have more than data.largest_group={data.largest_group} texts, so no text is left for the "
            "validation and test splits: increase data.largest_group, or change the values of the key 'package' in the "
            "file (texts with equal values are in one group)"
        )
    large, small = (examples.select(np.flatnonzero(np.equal(is_large, flag)).tolist()) for flag in (True, False))
    test, validation, training = small.split(data.test_fraction, data.validation_fraction, seed=0, by="group")
    return Examples([*training, *large], examples.name), validation, test


def shorten(examples: Examples, tokenizer: Tokenizer, limit: int) -> tuple[Examples, int]:
    """The examples with sources truncated to ``limit`` tokens, and the number of truncated sources.

    An incomplete character (U+FFFD) at the end of a truncated source is removed, unless nothing else is left.
    """
    rows, truncated = [], 0
    for row, encoding in zip(examples, tokenizer.encode_inputs_batch(examples.column("source")), strict=True):
        if encoding.ids.size > limit:
            text = tokenizer.decode(encoding.ids[: limit - 1], skip_special_tokens=True)  # leaves room for an end token
            complete = text.rstrip("\ufffd")
            row, truncated = {**row, "source": complete if complete.strip() else text}, truncated + 1
        rows.append(row)
    return Examples(rows, examples.name), truncated


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train a summarizer, summarize the test split and write the report. Returns the result of training."""
    start_time, config = time.perf_counter(), experiment.training
    metrics.import_rouge_scorer()
    lib.check_unchanged(experiment, resume, ["output", "data", "vocab_size", "max_source"])
    examples = read(experiment.data)
    training, validation, test = parts(experiment.data, examples)
    model, params, tokenizer = lib.build_encoder_decoder(
        experiment.model, training, experiment.vocab_size, config.seed, resume
    )
    shortened = [shorten(part, tokenizer, experiment.max_source) for part in (training, validation, test)]
    training, validation, test = (part for part, _ in shortened)
    counts = {"rejected lines": len(examples.rejected), "truncated texts": [number for _, number in shortened]}
    training_batches = Bucketed(
        seq2seq.encode(training, tokenizer), config.batch_size, experiment.buckets, seed=config.seed, equal_tokens=True
    )
    config = lib.with_steps_of_epochs(config, experiment.epochs, training_batches.steps_per_epoch)
    seq2seq.check_sources(test, tokenizer)
    held_out = seq2seq.batches(seq2seq.encode(validation, tokenizer), model, tokenizer, config.batch_size)
    trainer = config.trainer(model, experiment.optimizer, smoothed_token_loss(experiment.label_smoothing))
    evaluate = Evaluator(model, seq2seq.METRICS, held_out)
    directory = lib.prepare_run(
        "summarization", experiment, resume, trainer, tokenizer, evaluate, generation_config(experiment)
    )  # fmt: skip
    truncated = ", ".join(f"{n} {part}" for (_, n), part in zip(shortened, ("training", "validation", "test")))
    lib.print_once(
        f"{model.num_parameters:,} parameters · {len(training):,} pairs, {len(validation):,} for validation, "
        f"{len(test):,} for the test (truncated to {experiment.max_source} tokens: {truncated}) · "
        f"{training_batches.describe()} · {config.steps:,} steps · {directory}"
    )
    data = Batches(training_batches, to_batch=seq2seq.to_batch(model, tokenizer), prefetch=2)
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume), params)
    if lib.export(directory, model, result, tokenizer):
        summarize(directory, experiment, model, result, tokenizer, test, start_time, counts)
    return result


def generation_config(experiment: Experiment) -> GenerationConfig:
    """The generation settings of summaries."""
    length_penalty = experiment.length_penalty if experiment.num_beams > 1 else 1.0
    return GenerationConfig(experiment.max_summary, num_beams=experiment.num_beams, length_penalty=length_penalty)


def summarize(
    directory: Path, experiment: Experiment, model: Model, result: Result, tokenizer: Tokenizer, test: Examples,
    start_time: float, counts: dict[str, Any],
) -> None:  # fmt: skip
    """Summarize the test split and write the report."""
    sources, references = test.column("source"), test.column("target")
    started = time.perf_counter()
    outputs = generate_text(model, result.params, tokenizer, sources, generation_config(experiment))
    rate = len(sources) / (time.perf_counter() - started)
    lead = metrics.rouge([metrics.first_sentence(text) for text in test.column("text")], references)
    scores = [
        *metrics.rouge(outputs, references),
        *(dataclasses.replace(score, name=f"{score.name} of the first sentence") for score in lead),
    ]
    seq2seq.write_test(directory, model, result.params, tokenizer, sources, references, outputs)
    lib.report(
        directory, task="summarization", model=model, start_time=start_time, scores=scores,
        data=str(experiment.data.file or "docstrings of the installed packages"), result=result,
        beams=experiment.num_beams, test_examples_per_second=round(rate, 1), **counts,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return lib.command_line(
        PRESETS["docstrings"], PRESETS, run, name="summarization", description=__doc__ or "", arguments=arguments
    )


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

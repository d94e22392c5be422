"""Train a translator: a Transformer with the architecture of T5, or an RNN with attention.

    python -m experiments.translation           included Bible verses, English to Spanish: a BLEU of 4, 2 to 4 minutes

The next commands train on Multi30k (task 1, files train.en, train.de, val.en, ...), English to German. On the test
split of 2016, the preset t5 has a BLEU of 39.4 after 84 minutes on two CPU cores, and bahdanau has 35.1 after 78
minutes on one core.

    python -m experiments.translation --preset t5 --data.directory multi30k
    python -m experiments.translation --preset bahdanau --data.directory multi30k

BLEU is computed by sacrebleu on detokenized, cased text with tokenization 13a. Many published results for Multi30k are
for tokenized, lowercased text. So the report also has the BLEU of the lowercased text (also with tokenization 13a).
docs/tasks/translation.md has the measured results.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from jaxlm import host, metrics
from jaxlm.command_line import end_process
from jaxlm.data import Batches, Tokenizer
from jaxlm.data.buckets import Bucketed
from jaxlm.data.corpora import verses
from jaxlm.data.examples import Examples, OnError, read_pairs
from jaxlm.data.text_files import escape_line_breaks
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.models import Model
from jaxlm.objectives.batch import smoothed_token_loss
from jaxlm.tasks import seq2seq
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig, OptimizerName, Schedule


@dataclasses.dataclass(frozen=True)
class Data:
    """Parallel texts: line n of the target file is the translation of line n of the source file."""

    directory: Path | None = None
    """Directory with two files per split, such as train.en and train.de (also .gz). None: the included verses."""
    train: str = "train"
    """Name of the training split."""
    validation: str = "val"
    """Name of the validation split. The presets keep the weights with the lowest loss on this split."""
    test: str = "test_2016_flickr"
    """Name of the test split."""
    source: str = "en"
    """File name extension of the files in the source language."""
    target: str = "de"
    """File name extension of the files in the target language."""
    on_error: OnError = "raise"
    """raise: a pair with an empty line is an error. report: such pairs are skipped, and their line numbers are
    printed."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a translator and test it."""

    model: lib.ModelConfig = lib.ModelConfig("t5")
    """The model: t5 or attention_rnn."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training. A batch of the bucket with the longest pairs has batch_size pairs. Batches of other buckets have a
    multiple of this number, so that all batches have about the same number of tokens."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    data: Data = Data()
    """The data."""
    epochs: float = 10.0
    """Number of passes over the training split."""
    vocab_size: int = 6000
    """Maximum size of the BPE vocabulary that both languages share."""
    buckets: int = 6
    """Maximum number of batch shapes (length buckets)."""
    label_smoothing: float = 0.1
    """Fraction of the target probability that is spread uniformly over the vocabulary."""
    num_beams: int = 5
    """Number of beams of the beam search; 1: greedy decoding."""
    length_penalty: float = 1.0
    """The score of a beam is its log-probability divided by its length to this power. Not used with one beam."""
    output: Path | None = None
    """Run directory; None: runs/translation-<time>."""


def preset(
    name: str, *changes: str, learning_rate: float, warmup_steps: int = 400, batch_size: int = 64,
    optimizer: OptimizerName = "adamw", schedule: Schedule = "cosine", **options: Any,
) -> Experiment:  # fmt: skip
    """An experiment with a randomly initialized model.

    ``changes`` are changes to the config of the model ``name``. ``options`` are fields of ``Experiment``.
    """
    training = lib.ExperimentTraining(
        batch_size=batch_size, evaluate_every=200, checkpoint_every=1000, restore_best=True, best_metric="loss"
    )
    config = OptimizerConfig(
        optimizer, learning_rate, schedule=schedule, final_fraction=0.01, warmup_steps=warmup_steps, beta2=0.98,
        weight_decay=0.0,
    )  # fmt: skip
    return dataclasses.replace(Experiment(lib.ModelConfig(name, changes), training, config), **options)


T5 = ("num_layers=3", "num_heads=4", "embed_dim=256", "head_dim=64", "mlp_dim=512", "dropout=0.2", "remat=none")
RNN = ("source_vocab_size=None", "embed_dim=256", "hidden_dim=384", "output_dim=256", "dropout=0.3")
PRESETS = {
    "t5": preset("t5", *T5, learning_rate=3e-2, optimizer="adafactor", epochs=20),
    # The length penalty was selected on the validation split: 0.5 gives a higher BLEU than 0 and 1.
    "bahdanau": preset("attention_rnn", *RNN, learning_rate=1e-3, epochs=15, length_penalty=0.5),
    "luong": preset("attention_rnn", *RNN, "attention=luong", "score=general", learning_rate=1e-3, epochs=15),
    "verses": preset(
        "t5",
        "num_layers=2",
        "num_heads=4",
        "embed_dim=128",
        "head_dim=32",
        "mlp_dim=256",
        "dropout=0.1",
        "remat=none",
        learning_rate=2e-2,
        warmup_steps=100,
        batch_size=32,
        optimizer="adafactor",
        schedule="inverse_square_root",
        epochs=8,
        vocab_size=2000,
        num_beams=1,
    ),
}


def parts(data: Data) -> tuple[Examples, Examples, Examples]:
    """The training, validation and test splits."""
    if data.directory is None:
        test, validation, training = verses().split(0.05, 0.05, seed=0)
        return training, validation, test

    def file(part: str, language: str) -> Path:
        assert data.directory is not None
        path = data.directory / f"{part}.{language}"
        compressed = path.with_name(f"{path.name}.gz")
        return compressed if compressed.exists() and not path.exists() else path

    training, validation, test = (
        lib.read_examples(read_pairs, file(part, data.source), file(part, data.target), on_error=data.on_error)
        for part in (data.train, data.validation, data.test)
    )
    return training, validation, test


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train a translator, translate the test split and write the report. Returns the result of training."""
    start_time, config = time.perf_counter(), experiment.training
    metrics.import_sacrebleu()
    lib.check_unchanged(experiment, resume, ["output", "data", "vocab_size"])
    training, validation, test = parts(experiment.data)
    model, params, tokenizer = lib.build_encoder_decoder(
        experiment.model, training, experiment.vocab_size, config.seed, resume
    )
    source = Bucketed(
        seq2seq.encode(training, tokenizer), config.batch_size, experiment.buckets, seed=config.seed, equal_tokens=True,
        length_multiple=4,
    )  # fmt: skip
    config = lib.with_steps_of_epochs(config, experiment.epochs, source.steps_per_epoch)
    seq2seq.check_sources(test, tokenizer)
    held_out = seq2seq.batches(seq2seq.encode(validation, tokenizer), model, tokenizer, config.batch_size)
    trainer = config.trainer(model, experiment.optimizer, smoothed_token_loss(experiment.label_smoothing))
    evaluate = Evaluator(model, seq2seq.METRICS, held_out)
    generation = generation_config(experiment, tokenizer, test)
    directory = lib.prepare_run("translation", experiment, resume, trainer, tokenizer, evaluate, generation)
    lib.print_once(
        f"{model.num_parameters:,} parameters · {len(training):,} pairs, {len(validation):,} for validation, "
        f"{len(test):,} for the test · {source.describe()} · {config.steps:,} steps · {directory}"
    )
    data = Batches(source, to_batch=seq2seq.to_batch(model, tokenizer), prefetch=2)
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume), params)
    if lib.export(directory, model, result, tokenizer):
        translate(directory, experiment, model, result, tokenizer, test, start_time)
    return result


def generation_config(experiment: Experiment, tokenizer: Tokenizer, test: Examples) -> GenerationConfig:
    """The generation settings. A translation has at most twice as many tokens as the longest target of ``test``."""
    longest = max(encoding.ids.size for encoding in tokenizer.encode_inputs_batch(test.column("target")))
    length_penalty = experiment.length_penalty if experiment.num_beams > 1 else 1.0
    return GenerationConfig(2 * longest, num_beams=experiment.num_beams, length_penalty=length_penalty)


def translate(
    directory: Path, experiment: Experiment, model: Model, result: Result, tokenizer: Tokenizer, test: Examples,
    start_time: float,
) -> None:  # fmt: skip
    """Translate the test split and write the report.

    Line n of ``translations.txt`` is the translation of example n, with backslashes and line breaks escaped.
    """
    sources, references = test.column("source"), test.column("target")
    started = time.perf_counter()
    outputs = generate_text(model, result.params, tokenizer, sources, generation_config(experiment, tokenizer, test))
    rate = len(sources) / (time.perf_counter() - started)
    (directory / "translations.txt").write_text(
        "".join(f"{escape_line_breaks(text)}\n" for text in outputs), encoding="utf-8"
    )
    scores = [
        metrics.bleu(outputs, references), metrics.bleu(outputs, references, lowercase=True),
        metrics.chrf(outputs, references),
    ]  # fmt: skip
    seq2seq.write_test(directory, model, result.params, tokenizer, sources, references, outputs)
    lib.report(
        directory, task="translation", model=model, start_time=start_time, scores=scores,
        data=str(experiment.data.directory or "included verses"), result=result, beams=experiment.num_beams,
        test_examples_per_second=round(rate, 1),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return lib.command_line(
        PRESETS["verses"], PRESETS, run, name="translation", description=__doc__ or "", arguments=arguments
    )


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

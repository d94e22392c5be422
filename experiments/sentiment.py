"""Train a text classifier from scratch or from pretrained BERT weights, for example to predict sentiment.

    python -m experiments.sentiment    an RNN that predicts from which play a passage comes: accuracy 0.68, 2 minutes

The next commands train on SST-2 (files of GLUE): pretrained MiniLM (accuracy 0.90, 40 minutes), and an LSTM from
scratch (accuracy 0.84, 4 minutes).

    python -m experiments.sentiment --preset minilm --model.pretrained DIR --data.train train.tsv --data.test dev.tsv
    python -m experiments.sentiment --preset lstm --data.train train.tsv --data.test dev.tsv

The next commands train the word-level CNN of Kim (2014, CNN-rand) on MR, with 10 folds (accuracy 0.759, 42 minutes),
and on TREC, which has a test split (accuracy 0.90, 1 minute). Subj, CR and MPQA also need 10 folds.

    python -m experiments.sentiment --preset cnn --data.train rt-polarity.all --data.encoding latin-1 --folds 10
    python -m experiments.sentiment --preset cnn --data.train TREC.train.all --data.test TREC.test.all

The test split is evaluated once, after training. docs/tasks/sentiment.md has the measured and the published results.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm import config as config_lib
from jaxlm import host, metrics
from jaxlm.command_line import end_process
from jaxlm.data import Batches, Tokenizer
from jaxlm.data.buckets import Bucketed
from jaxlm.data.corpora import play_passages
from jaxlm.data.duplicates import group_phrases
from jaxlm.data.examples import Examples, OnError, read_labelled
from jaxlm.data.vocabularies import TemplateName, train_tokenizer
from jaxlm.models import Model
from jaxlm.objectives import classification as objective
from jaxlm.tasks import attention_maps, classification
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Data:
    """Files of labeled sentences, which may be compressed (.gz)."""

    train: Path | None = None
    """Training file: .tsv or .csv with a header, .jsonl, or lines "label sentence"; None: the included passages."""
    test: Path | None = None
    """File of the test split. None: test_fraction of the training file or, with folds, one fold after the other."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    on_error: OnError = "raise"
    """raise: an invalid line is an error. report: invalid lines are skipped, and their numbers are printed."""
    validation_fraction: float = 0.02
    """Fraction of the training split for validation. With training.restore_best, validation selects the weights."""
    test_fraction: float = 0.1
    """Fraction of the training file for the test split, if neither test nor folds is set."""
    group_phrases: bool = False
    """Whether a sentence and its phrases are in one split. Set it for SST-2, whose training file has both."""
    max_length: int | None = None
    """Longer sentences are truncated to this many tokens. None: a sentence above max_positions tokens is an error."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a sentence classifier and test it."""

    model: lib.ModelConfig = lib.ModelConfig()
    """The model."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training. sequence_length and evaluation_batches have no effect, so setting them is an error."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    data: Data = Data()
    """The data."""
    epochs: float | None = None
    """Number of passes over the training split. None: training.steps is the length of the training."""
    vocabulary: Literal["word", "bpe"] = "word"
    """Type of vocabulary for models from scratch. Pretrained weights have their own tokenizer."""
    vocab_size: int = 20_000
    """Maximum vocabulary size."""
    min_frequency: int = 1
    """Minimum count of a word or BPE merge in the training split. With vocabulary="word", rarer words are unknown."""
    template: TemplateName = "none"
    """Special tokens around a sentence, for models from scratch."""
    buckets: int = 4
    """Maximum number of batch shapes (length buckets)."""
    label_smoothing: float = 0.0
    """Fraction of the target probability that is spread uniformly over all labels."""
    folds: int | None = None
    """Number of cross-validation folds. The score is the accuracy over all test examples. None: one test split."""
    output: Path | None = None
    """Run directory; None: runs/sentiment-<time>."""


def scratch(name: str, *changes: str, **options: Any) -> Experiment:
    """An experiment with a small, randomly initialized model."""
    training = lib.ExperimentTraining(
        batch_size=50, evaluate_every=200, checkpoint_every=200, restore_best=True, best_metric="accuracy",
        best_mode="max",
    )  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=20, weight_decay=0.01)
    return Experiment(lib.ModelConfig(name, changes), training, **{"optimizer": optimizer, "epochs": 6, **options})


RNN = ("embed_dim=256", "hidden_dim=256", "num_layers=1", "embedding_dropout=0.1", "input_dropout=0.3",
       "hidden_dropout=0.0", "output_dropout=0.5", "weight_dropout=0.0")  # fmt: skip
ATTENTION = ("embed_dim=256", "hidden_dim=128", "attention_dim=128", "hops=4")
ENCODER = ("num_layers=2", "num_heads=4", "embed_dim=128", "max_positions=256")
PRESETS = {
    "plays": scratch(
        "attention_rnn_lm", *ATTENTION, min_frequency=2, epochs=5, data=Data(validation_fraction=0.1),
        optimizer=OptimizerConfig(learning_rate=1.2e-2, warmup_steps=20, weight_decay=0.01),
    ),
    "lstm": scratch("lstm", *RNN),
    "bilstm": scratch("lstm", *RNN, "direction=both"),
    "gru": scratch("gru", *RNN),
    "attention_rnn": scratch("attention_rnn_lm", *ATTENTION),
    "cnn": scratch("alexnet", "embedding=learned", "embed_dim=300", "channels=300", "kernels=(5,)", "fc_dim=300"),
    "resnet": scratch("resnet", "embed_dim=128", "channels=64", "blocks=(1, 1)", "shortcut=True", "fc_dim=256"),
    "mamba2": scratch("mamba2", "num_layers=2", "embed_dim=128", "head_dim=32", "state_size=32"),
    "roberta": scratch("roberta", *ENCODER, template="bos_eos"),
    "xlnet": scratch("xlnet", *ENCODER[:3], "mlp_dim=512", template="sep_cls"),
    "minilm": Experiment(
        lib.ModelConfig("bert"),
        lib.ExperimentTraining(batch_size=64, evaluate_every=500, checkpoint_every=500),
        OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=300, final_fraction=0.0, beta2=0.999, weight_decay=0.01
        ),
        epochs=3, buckets=4,
    ),
}  # fmt: skip


def read(path: Path | None, data: Data) -> Examples:
    """The examples of a file (None: the included passages)."""
    if path is None:
        return play_passages()
    return lib.read_examples(read_labelled, path, encoding=data.encoding, on_error=data.on_error)


def groups(examples: Examples, data: Data) -> list[int] | None:
    """The group of each example. A sentence and its phrases are one group, which is in one split. None: no groups."""
    return group_phrases(examples.column("text")) if data.group_phrases else None


def parts(data: Data) -> tuple[Examples, Examples, tuple[str, ...]]:
    """The training split (including validation), the test split and the labels.

    If the test split is a random part of the examples, it may have a label that the training split lacks."""
    examples = read(data.train, data)
    labels = examples.label_names()
    if data.test is not None:
        return examples, read(data.test, data), labels
    test, training = examples.split(data.test_fraction, by=groups(examples, data))
    return training, test, labels


def build(
    experiment: Experiment, training: Examples, test: Examples, labels: tuple[str, ...], resume: Path | None
) -> tuple[Model, Any, Tokenizer]:
    """The model, initial parameters (None: random) and the tokenizer. Of ``test``, only the text lengths are used."""
    config, texts, size = experiment.model, training.column("text"), experiment.vocab_size
    options: dict[str, Any] = {"template": experiment.template, "min_frequency": experiment.min_frequency}
    tokenizer = config.tokenizer(resume, lambda: train_tokenizer(texts, experiment.vocabulary, size, **options))
    fields: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if config.pretrained is None and config.name in ("alexnet", "resnet"):  # families whose inputs have a fixed length
        fields |= classification.convolution_fields(
            config.name, tokenizer, texts + test.column("text"), max_length=experiment.data.max_length,
            changes=config_lib.assignments("model.set", config.set),
        )  # fmt: skip
    model, params = config.build(experiment.training.seed, fields, task="classification", num_labels=len(labels))
    objective.check_problem_type(model)
    return model.with_labels(labels), params, tokenizer


def train_and_test(
    experiment: Experiment, training: Examples, test: Examples, labels: tuple[str, ...], resume: Path | None,
    parent: Experiment | None = None,
) -> tuple[Result, metrics.Score | None]:  # fmt: skip
    """Train on one split and test on the other. Returns the result and the accuracy (None: training was interrupted).

    ``parent`` is the configuration of the cross-validation if this training is one of its folds. Otherwise None."""
    start_time, config = time.perf_counter(), experiment.training
    model, params, tokenizer = build(experiment, training, test, labels, resume)
    fraction, by = experiment.data.validation_fraction, groups(training, experiment.data)
    validation_part, training_part = training.split(fraction, by=by)
    encoded_training, encoded_validation, encoded_test = (
        classification.encode(part, tokenizer, labels, model, max_length=experiment.data.max_length)
        for part in (training_part, validation_part, test)
    )
    limit = model.max_positions
    source = Bucketed(encoded_training, config.batch_size, experiment.buckets, seed=config.seed, max_length=limit)
    config = lib.with_steps_of_epochs(config, experiment.epochs, source.steps_per_epoch)
    validation_batches = classification.batches(encoded_validation, len(labels), config.batch_size, max_length=limit)
    loss = objective.make_loss(label_smoothing=experiment.label_smoothing)
    trainer = config.trainer(model, experiment.optimizer, loss)
    evaluate = Evaluator(model, classification.METRICS, validation_batches)
    directory = lib.prepare_run("sentiment", experiment, resume, trainer, tokenizer, evaluate, parent=parent)
    lib.print_once(
        f"{model.num_parameters:,} parameters · {len(training_part):,} examples, "
        f"{len(validation_part):,} for validation, {len(test):,} for the test · "
        f"{source.describe()} · {config.steps:,} steps · {directory}"
    )
    data = Batches(source, to_batch=classification.to_batch(len(labels)), prefetch=2)
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume, parent), params)
    if not lib.export(directory, model, result, tokenizer):
        return result, None
    test_start = time.perf_counter()
    predicted = np.argmax(classification.predict(model, result.params, encoded_test), axis=1)
    rate = len(test) / (time.perf_counter() - test_start)
    score = classification.write_test(directory, test, labels, predicted)
    sample = test.column("text")[:4]
    attention_maps.write_attention_maps(directory, model, result.params, tokenizer, sample, max_tokens=40)
    lib.report(
        directory, task="sentiment", model=model, start_time=start_time, scores=[score], result=result,
        data=str(experiment.data.train or "passages of the included plays"), test_examples_per_second=round(rate, 1),
    )  # fmt: skip
    return result, score


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train and test a classifier, and write the report. Returns the result of training (of the last fold)."""
    vocabulary_fields = ["vocabulary", "vocab_size", "min_frequency", "template"]
    lib.check_unchanged(experiment, resume, ["output", "data", *vocabulary_fields, "folds"])
    if experiment.folds is not None and resume is not None and (resume / "model").exists():  # only a fold has a model
        raise ValueError(
            f"--resume {resume} is one fold of a cross-validation: to resume all folds, use --resume "
            f"{resume.absolute().parent}"
        )
    if experiment.folds is None:
        return train_and_test(experiment, *parts(experiment.data), resume)[0]
    examples = read(experiment.data.train, experiment.data)
    folds = examples.folds(experiment.folds, by=groups(examples, experiment.data))
    labels = examples.label_names()  # a fold may lack a label
    output, scores = resume or experiment.output or lib.new_directory("sentiment"), []
    parent = dataclasses.replace(experiment, output=output)
    for fold, (training, test) in enumerate(folds):
        directory = output / f"fold-{fold}"
        fold_experiment = dataclasses.replace(experiment, output=directory)
        fold_resume = directory if (directory / "config.json").exists() else None  # only in a resumed run
        result, score = train_and_test(fold_experiment, training, test, labels, fold_resume, parent)
        if score is None or (result.signal is not None and fold + 1 < len(folds)):
            return result
        scores.append(score)
    lib.print_once(str(classification.write_folds(output, scores)))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    name = "sentiment"
    return lib.command_line(PRESETS["plays"], PRESETS, run, name=name, description=f"{__doc__}", arguments=arguments)


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

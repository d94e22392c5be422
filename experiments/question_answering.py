"""Train a model to answer questions with spans of a text, on generated stories or on SQuAD.

    python -m experiments.question_answering                    a small BERT from scratch, generated stories, 3 minutes
    python -m experiments.question_answering --preset xlnet     the same with XLNet

The next command fine-tunes MiniLM (pretrained BERT weights, 6 layers of width 384) on the development file of SQuAD
v1.1 (48 articles, 10,570 questions). Each article is in the training, the validation or the test split. The F1 on the
test split is 70.8 after a training of 69 minutes on two CPU cores.

    python -m experiments.question_answering --preset minilm --model.pretrained DIR --data dev-v1.1.json
        --extra-tests new_wiki_v1.0.json nyt_v1.0.json

The files of ``--extra-tests`` are additional test sets, to measure transfer to other kinds of text. The test split is
used once, after training. docs/tasks/question_answering.md has the measured results.
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
from jaxlm.data.examples import Examples
from jaxlm.data.squad import read_squad, read_squad_files
from jaxlm.data.stories import make_stories
from jaxlm.data.vocabularies import TemplateName, train_tokenizer
from jaxlm.models import Model
from jaxlm.objectives import span_qa
from jaxlm.tasks import question_answering as qa
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sizes of windows and answers. A window has the question and a part of a long context."""

    max_length: int | None = None
    """Maximum number of tokens per window, with the question. None: 384, or the model's max_positions if less."""
    stride: int | None = None
    """Number of context tokens that two consecutive windows share. None: a third of max_length."""
    max_answer_tokens: int = 30
    """Maximum number of tokens per answer."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a model to answer questions and test it."""

    model: lib.ModelConfig = lib.ModelConfig("bert")
    """The model."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training. sequence_length and evaluation_batches have no effect, so setting them is an error."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    windows: Windows = Windows()
    """The sizes of windows and answers."""
    data: Path | None = None
    """SQuAD file, v1.1 or v2.0, official JSON or JSONL (also .gz); None: generated stories."""
    test: Path | None = None
    """File of the test split; None: test_fraction of the articles."""
    extra_tests: tuple[Path, ...] = ()
    """Additional test files, with other kinds of text."""
    validation_fraction: float = 0.05
    """Fraction of the articles for validation. With training.restore_best, validation selects the weights."""
    test_fraction: float = 0.1
    """Fraction of the articles for the test split. If a file has no titles, its contexts are split instead."""
    stories: int = 24_000
    """Number of generated questions, if there is no data file."""
    sentences: int = 4
    """Sentences per generated story."""
    epochs: float | None = None
    """Number of passes over the training split. None: training.steps is the length of the training."""
    template: TemplateName = "cls_sep"
    """Special tokens around question and context, for models from scratch."""
    vocab_size: int = 8000
    """Maximum vocabulary size, for models from scratch."""
    buckets: int = 4
    """Maximum number of batch shapes (length buckets)."""
    output: Path | None = None
    """Run directory; None: runs/question_answering-<time>."""

    def __post_init__(self) -> None:
        if self.test is None and self.test_fraction == 0.0:
            raise ValueError("test_fraction=0 leaves no test split: use a fraction above 0, or set test to a file")


SMALL = ("num_layers=3", "num_heads=4", "embed_dim=128", "init_stddev=0.08")
STORIES = Experiment(
    lib.ModelConfig("bert", (*SMALL, "max_positions=384", "hidden_dropout=0.0", "attention_dropout=0.0")),
    lib.ExperimentTraining(
        batch_size=32, evaluate_every=250, checkpoint_every=250, restore_best=True, best_metric="f1", best_mode="max",
    ),
    OptimizerConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.01),
    epochs=2, buckets=2, validation_fraction=0.01, test_fraction=0.05,
)  # fmt: skip
PRESETS = {
    "bert": STORIES,
    "xlnet": dataclasses.replace(
        STORIES,
        model=lib.ModelConfig("xlnet", (*SMALL, "mlp_dim=512", "dropout=0.0")),
        template="sep_cls",
    ),
    "minilm": Experiment(
        lib.ModelConfig("bert"),
        lib.ExperimentTraining(
            batch_size=16, evaluate_every=300, checkpoint_every=300, restore_best=True, best_metric="f1",
            best_mode="max",
        ),
        OptimizerConfig(
            learning_rate=2e-4, schedule="linear", warmup_steps=150, final_fraction=0.0, beta2=0.999, weight_decay=0.01
        ),
        Windows(max_length=384, stride=128), epochs=2, buckets=8,
    ),
}  # fmt: skip


def parts(experiment: Experiment) -> tuple[Examples, Examples, Examples]:
    """The training, validation and test splits. An article, context or story of ``data`` is in only one split."""
    if experiment.data is None:
        examples = make_stories(experiment.stories, sentences=experiment.sentences)
    else:
        examples = read_squad(experiment.data)
    if experiment.test is not None:
        validation, training = examples.split(experiment.validation_fraction, by="group")
        return training, validation, read_squad(experiment.test)
    validation, test, training = examples.split(experiment.validation_fraction, experiment.test_fraction, by="group")
    return training, validation, test


def build(experiment: Experiment, examples: Examples, resume: Path | None) -> tuple[Model, Any, Tokenizer]:
    """The model, initial parameters (None: random) and the tokenizer. A new tokenizer is trained on ``examples``."""
    texts = [text for example in examples for text in (example["question"], example["context"])]
    tokenizer = experiment.model.tokenizer(
        resume, lambda: train_tokenizer(texts, "bpe", experiment.vocab_size, template=experiment.template)
    )
    fields = {"vocab_size": tokenizer.vocab_size}
    return *experiment.model.build(experiment.training.seed, fields, task="span_qa"), tokenizer


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Computes the answers of a model and the scores of the answers."""

    experiment: Experiment
    model: Model
    tokenizer: Tokenizer

    def answers(self, params: Any, examples: Examples, threshold: float | None = None) -> list[qa.Answer]:
        """The answer to each question. ``threshold`` is the ``no_answer_threshold`` of ``qa.answer``."""
        return qa.answer(
            self.model, params, self.tokenizer, examples.column("question"), examples.column("context"),
            no_answer_threshold=threshold, **dataclasses.asdict(self.experiment.windows),
        )  # fmt: skip

    def scores(self, params: Any, examples: Examples, threshold: float | None = None) -> list[metrics.Score]:
        """Exact match and F1 of the answers to ``examples``."""
        return qa.scores(self.answers(params, examples, threshold), examples.column("answers"))

    def validate(self, params: Any, examples: Examples) -> dict[str, float]:
        """F1 and exact match as a dictionary of metrics for the log."""
        exact, f1 = self.scores(params, examples)
        return {"f1": f1.value, "exact_match": exact.value}


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train and test a model, and write the report. Returns the result of training."""
    start_time, config = time.perf_counter(), experiment.training
    data_fields = ["data", "test", "validation_fraction", "test_fraction", "stories", "sentences"]
    lib.check_unchanged(experiment, resume, ["output", "windows", "template", "vocab_size", *data_fields])
    training, validation, test = parts(experiment)
    extra_tests = read_squad_files(experiment.extra_tests)
    model, params, tokenizer = build(experiment, training, resume)
    window_size = {"max_length": experiment.windows.max_length, "stride": experiment.windows.stride}
    windows = qa.training_windows(model, tokenizer, training, **window_size)
    limit = model.max_positions
    source = Bucketed(windows, config.batch_size, experiment.buckets, seed=config.seed, max_length=limit)
    config = lib.with_steps_of_epochs(config, experiment.epochs, source.steps_per_epoch)
    for examples in (test, *extra_tests.values()):
        qa.check_questions(model, tokenizer, examples, **window_size)
    scorer = Scorer(experiment, model, tokenizer)
    held_out = qa.batches(
        qa.training_windows(model, tokenizer, validation, **window_size), config.batch_size, max_length=limit
    )
    evaluate = Evaluator(
        model, span_qa.loss, held_out, extra_metrics=lambda params: scorer.validate(params, validation),
        extra_metric_names=("f1", "exact_match"),
    )  # fmt: skip
    trainer = config.trainer(model, experiment.optimizer, span_qa.loss)
    directory = lib.prepare_run("question_answering", experiment, resume, trainer, tokenizer, evaluate)
    lib.print_once(
        f"{model.num_parameters:,} parameters · {len(training):,} questions in {len(windows):,} windows, "
        f"{len(validation):,} questions for validation, {len(test):,} for the test · {source.describe()} · "
        f"{config.steps:,} steps · {directory}"
    )
    data = Batches(source, to_batch=qa.to_batch, prefetch=2)
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume), params)
    if lib.export(directory, model, result, tokenizer):
        report(directory, scorer, result, validation, test, extra_tests, start_time)
    return result


def report(
    directory: Path, scorer: Scorer, result: Result, validation: Examples, test: Examples,
    extra_tests: dict[str, Examples], start_time: float,
) -> None:  # fmt: skip
    """Answer the questions of the test split and of the ``--extra-tests`` files, and write the report.

    If a question of the validation split has no answer, a threshold for "no answer" is selected on this split.
    """
    experiment, threshold = scorer.experiment, None
    if not all(validation.column("answers")):
        threshold = qa.best_no_answer_threshold(scorer.answers(result.params, validation), validation.column("answers"))
    started = time.perf_counter()
    answers = scorer.answers(result.params, test, threshold)
    rate = len(test) / (time.perf_counter() - started)
    test_scores = qa.scores(answers, test.column("answers"))
    for name, examples in extra_tests.items():
        extra_scores = scorer.scores(result.params, examples, threshold)
        test_scores += [dataclasses.replace(score, name=f"{score.name} on {name}") for score in extra_scores]
    qa.write_test(directory, scorer.model, result.params, scorer.tokenizer, test, answers)
    lib.report(
        directory, task="question_answering", model=scorer.model, start_time=start_time, scores=test_scores,
        data=str(experiment.data or "generated stories"), result=result, no_answer_threshold=threshold,
        test_questions_per_second=round(rate, 1),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    name = "question_answering"
    return lib.command_line(STORIES, PRESETS, run, name=name, description=f"{__doc__}", arguments=arguments)


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

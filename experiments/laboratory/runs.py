"""Cases and plans of experiments, training runs, and the file with the results of all runs of an experiment."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.laboratory.models import model_of
from jaxlm.models import Model
from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, Loss, token_accuracy, token_loss
from jaxlm.plan.flops import counted_training_flops
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.mup import mup
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.report import MetricsFile, machine_info
from jaxlm.training.trainer import Trainer

Sample = Callable[[np.random.Generator], Batch]
VALIDATION = "validation"
"""Name of the test with new rows of the training distribution. The accuracy on this test selects the learning rate."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant of an experiment's task: its data, its metric and additional config fields of its models.

    Attributes:
        vocab_size: number of token ids.
        max_length: number of tokens of the longest row.
        training: a function that draws a training batch.
        tests: for each test, a function that draws a batch; :data:`VALIDATION` is one of them.
        accuracy: the metric of the tests. Like a loss, it returns a total, a weight and the model state. The accuracy
            is the total divided by the weight, in [0, 1].
        fields: config fields of the models of this case. A model ignores the fields that its config does not have.
        base_width: width of the base model for muP (``jaxlm.training.mup``); None: no muP.
        measures_loss: whether results contain the validation loss and the training FLOPs.
        layers: number of layers of the models; None: the number of the plan.
    """

    vocab_size: int
    max_length: int
    training: Sample
    tests: Mapping[str, Sample]
    accuracy: Loss = token_accuracy
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_width: int | None = None
    measures_loss: bool = False
    layers: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training settings of an experiment.

    Attributes:
        steps: number of updates.
        widths: widths of the models (``embed_dim``).
        layers: number of layers of the models of cases without ``Case.layers``.
        learning_rates: peak learning rates; the validation accuracy selects one for each case, model and width.
        seeds: number of runs with the selected learning rate, including seed 0. The other learning rates have only
            seed 0.
        stop_at: validation accuracy at which a run ends early; None: runs never end early.
        evaluate_every: number of updates between two checks of ``stop_at``.
        test_batches: number of batches of each test.
        share_learning_rate: whether all widths use the learning rate that is selected for the first width. Use it only
            with muP (``Case.base_width``), because otherwise the best learning rate depends on the width.
    """

    steps: int
    widths: tuple[int, ...]
    layers: int
    learning_rates: tuple[float, ...]
    seeds: int = 3
    stop_at: float | None = None
    evaluate_every: int = 500
    test_batches: int = 8
    share_learning_rate: bool = False


Key = tuple[str, str, str, int, float, int, int, int]
"""Experiment, case, model, width, learning rate, seed, number of layers and planned number of steps of a run."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        experiment, case, model, width, learning_rate, seed, layers, planned_steps: the settings of the run.
        accuracy: accuracy of each test, in [0, 1].
        parameters: number of parameters.
        steps: number of updates that were made; less than ``planned_steps`` if the run ended early.
        loss: training loss of the last update, in nats per target.
        seconds: duration of training and tests. The first run of a :class:`Training` includes the compilation.
        machine: the processor and the versions of the packages.
        validation_loss: loss on the validation batches after training, in nats per target; None: not measured.
        flops: training FLOPs (dots and convolutions of all updates); None: not counted.
    """

    experiment: str
    case: str
    model: str
    width: int
    learning_rate: float
    seed: int
    layers: int
    planned_steps: int
    accuracy: dict[str, float]
    parameters: int
    steps: int
    loss: float
    seconds: float
    machine: str
    validation_loss: float | None = None
    flops: float | None = None

    @property
    def key(self) -> Key:
        """The values that distinguish a run from all other runs."""
        return (
            self.experiment, self.case, self.model, self.width, self.learning_rate, self.seed, self.layers,
            self.planned_steps,
        )  # fmt: skip


def num_layers(case: Case, plan: Plan) -> int:
    """The number of layers of the models of a case."""
    return plan.layers if case.layers is None else case.layers


def model_of_case(name: str, case: Case, plan: Plan, width: int) -> Model:
    """The model called ``name`` with this width, for a case and a plan. For errors, see ``models.model_of``."""
    layers = num_layers(case, plan)
    model = model_of(name, vocab_size=case.vocab_size, width=width, layers=layers, max_length=case.max_length)
    return model.with_known_fields(**case.fields)


class Training:
    """Trains a model of one width on one case. All learning rates and seeds share the compiled functions.

    For one case and seed, all models and learning rates get the same training batches. All runs of a case get the same
    test batches. If a batch has a source, an encoder-decoder reads the source with its encoder. A causal model reads
    the source at the beginning of each row. The optimizer is AdamW with weight decay 0.1. The gradient is clipped to
    norm 1. The learning rate has a warm-up of 5 % of the planned steps, and then a cosine schedule to 2 % of its peak.
    """

    def __init__(self, experiment: str, case_name: str, case: Case, plan: Plan, model_name: str, width: int) -> None:
        self._names, self._case, self._plan, self._width = (experiment, case_name, model_name), case, plan, width

        self._model = model_of_case(model_name, case, plan, width)
        base = None if case.base_width is None else model_of_case(model_name, case, plan, case.base_width)
        scaling = None if base is None else mup(self._model, base)
        self._init = jax.jit(self._model.init if scaling is None else scaling.init)
        config = OptimizerConfig(
            learning_rate=1.0, warmup_steps=max(1, plan.steps // 20), final_fraction=0.02, weight_decay=0.1
        )
        # The peak learning rate is a value in the optimizer state, so that it can change without a new compilation.
        optimizer = optax.chain(
            make_optimizer(config, self._model.specs, plan.steps, rates=None if scaling is None else scaling.rates),
            optax.inject_hyperparams(optax.scale)(step_size=1.0),
        )
        self._trainer = Trainer(self._model, optimizer, token_loss)
        self._step = self._trainer.jit_step()
        self._evaluators = {}
        for name, sample in case.tests.items():
            metrics = {"accuracy": case.accuracy}
            if case.measures_loss and name == VALIDATION:
                metrics["loss"] = token_loss
            batches = [self._adapt_batch(batch) for batch in _test_batches(case_name, name, sample, plan.test_batches)]
            self._evaluators[name] = Evaluator(self._model, metrics, batches)

    def _adapt_batch(self, batch: Batch) -> Batch:
        has_source = "source" in batch.inputs
        return seq2seq.to_decoder_only_batch(batch) if has_source and not self._model.reads_source else batch

    def run(self, learning_rate: float, seed: int) -> Result:
        """Train with this peak learning rate and seed, run all tests, and return the result.

        On one machine, equal arguments give equal results, apart from ``seconds``.
        """
        flops_of_step = self._flops_of_step if self._case.measures_loss else None
        start, plan = time.perf_counter(), self._plan
        key = jax.random.key(seed)
        state = self._trainer.init(key, self._init(key))
        state = dataclasses.replace(
            state, optimizer=optax.tree_utils.tree_set(state.optimizer, step_size=jnp.float32(learning_rate))
        )
        rng, count = np.random.default_rng(seed), 0
        while count < plan.steps:
            state, metrics = self._step(state, self._adapt_batch(self._case.training(rng)))
            count += 1
            if plan.stop_at is None or count % plan.evaluate_every:
                continue
            if self._evaluators[VALIDATION](state.params)["accuracy"] >= plan.stop_at:
                break
        loss = float(metrics["loss"])
        test_metrics = {name: evaluate(state.params) for name, evaluate in self._evaluators.items()}
        accuracy = {name: metrics["accuracy"] for name, metrics in test_metrics.items()}
        experiment, case_name, model_name = self._names
        return Result(
            experiment, case_name, model_name, self._width, learning_rate, seed, num_layers(self._case, plan),
            plan.steps, accuracy, self._model.num_parameters, count, loss, time.perf_counter() - start, _machine(),
            test_metrics[VALIDATION].get("loss"), None if flops_of_step is None else flops_of_step * count,
        )  # fmt: skip

    @functools.cached_property
    def _flops_of_step(self) -> float:
        """Training FLOPs of one update (dots and convolutions)."""
        batch = self._adapt_batch(self._case.training(np.random.default_rng(0)))
        return counted_training_flops(self._model, self._trainer.loss, batch).amount


def _machine() -> str:
    info = machine_info()
    return ", ".join([info["processor"], *(f"{name} {version}" for name, version in info["versions"].items())])


def _test_batches(case_name: str, test: str, sample: Sample, count: int) -> list[Batch]:
    rng = np.random.default_rng(zlib.crc32(f"{case_name}, {test}".encode()))
    return [sample(rng) for _ in range(count)]


class Results:
    """The results of an experiment, in a file with one JSON object per line. The file need not exist.

    The last line has no line break if the disk was full or the process was killed while the line was written. Such a
    line is ignored, and the next result replaces it.

    Raises:
        ValueError: a line is not a result.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, MetricsFile(path)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self._results = {}
        for number, line in enumerate(lines, 1):
            try:
                result = Result(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a result: delete the line to repeat its run") from error
            self._results[result.key] = result

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results.values())

    def get(self, key: Key) -> Result | None:
        """The result of the run with this :attr:`Result.key`, or None."""
        return self._results.get(key)

    def add(self, result: Result) -> None:
        """Append a result to the file."""
        self._results[result.key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file.write(**dataclasses.asdict(result))


def run_model(
    experiment: str,
    case_name: str,
    case: Case,
    plan: Plan,
    model_name: str,
    width: int,
    results: Results,
    report: Callable[[Result], None],
) -> float:
    """Train one model of one width on one case, and return the best learning rate.

    First, seed 0 is run with each learning rate. The best learning rate has the highest validation accuracy. Then the
    other seeds are run with the best learning rate. Runs that have a result are skipped.

    Args:
        results: the earlier results of the experiment. New results are added.
        report: a function that is called with each new result.
    """
    training = functools.cache(lambda: Training(experiment, case_name, case, plan, model_name, width))

    def run(learning_rate: float, seed: int) -> Result:
        key = experiment, case_name, model_name, width, learning_rate, seed, num_layers(case, plan), plan.steps
        result = results.get(key)
        if result is None:
            result = training().run(learning_rate, seed)
            results.add(result)
            report(result)
        return result

    first_seed_results = [run(learning_rate, 0) for learning_rate in plan.learning_rates]
    best = max(first_seed_results, key=lambda result: result.accuracy[VALIDATION])
    for seed in range(1, plan.seeds):
        run(best.learning_rate, seed)
    return best.learning_rate

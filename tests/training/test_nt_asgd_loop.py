"""NT-ASGD in the training loop: averaging starts when the validation loss stops improving.

After that, the loop evaluates and exports the mean of the parameters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.adapt import Freeze
from jaxlm.data import Batches, RandomWindows
from jaxlm.objectives import causal, classification
from jaxlm.testing.helpers import assert_trees_equal, tiny_model
from jaxlm.training import nt_asgd
from jaxlm.training.loop import Result, Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.report import read_metrics
from jaxlm.training.trainer import Trainer
from tests.training.cached_trainer import CachedTrainer

LOSSES = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]
"""Validation losses of ten evaluations. The eighth is the first that triggers averaging.

It is the first loss that is worse than the best loss of more than five evaluations ago.
"""


MODEL = tiny_model("lstm")
OPTIMIZER = make_optimizer(
    OptimizerConfig("nt_asgd", learning_rate=0.5, schedule="constant", warmup_steps=0, beta1=0.0), MODEL.specs, 10
)


def run(directory: Path, steps: int, *, resume: bool = False) -> tuple[Result, list[Any]]:
    """Train; return the result and the parameters that each evaluation received."""
    config = TrainingConfig(steps=steps, batch_size=2, evaluate_every=1, checkpoint_every=5)
    tokens = np.random.default_rng(0).integers(0, MODEL.config.vocab_size, 400)
    data = Batches(RandomWindows(tokens, 8, 2), to_batch=lambda token_batch: causal.batch(token_batch.tokens))
    evaluated_params: list[Any] = []
    earlier_evaluations = 5 if resume else 0

    def evaluate(params: Any) -> dict[str, float]:
        evaluated_params.append(jax.device_get(params))
        return {"loss": LOSSES[earlier_evaluations + len(evaluated_params) - 1]}

    trainer = CachedTrainer(**vars(config.trainer(MODEL, OPTIMIZER, causal.loss)))
    return train(trainer, data, evaluate, config, Run(directory, resume=resume)), evaluated_params


def test_the_mean_is_exported_after_averaging_starts(tmp_path: Path) -> None:
    result, evaluated_params = run(tmp_path, 10)
    events = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "event" in record]
    assert events == [{"step": 8, "event": "averaging started"}]
    mean = nt_asgd.mean_params(result.state.optimizer)
    assert all(map(np.array_equal, jax.tree.leaves(result.params), jax.tree.leaves(mean)))
    last, exported = spec.flatten(result.state.params), spec.flatten(result.params)
    assert any(not np.array_equal(last[name], exported[name]) for name in last)


def test_a_resumed_run_starts_averaging_at_the_same_evaluation(tmp_path: Path) -> None:
    uninterrupted, _ = run(tmp_path / "uninterrupted", 10)
    run(tmp_path / "resumed", 5)
    resumed, _ = run(tmp_path / "resumed", 10, resume=True)
    for expected, actual in zip(jax.tree.leaves(uninterrupted.params), jax.tree.leaves(resumed.params), strict=True):
        assert np.array_equal(expected, actual)
    assert uninterrupted.step == resumed.step


@pytest.mark.parametrize("adaptation", [None, Freeze(("token_embedding",))])
def test_the_mean_has_the_running_statistics_of_the_last_step(adaptation: Freeze | None) -> None:
    """The means of batch normalization are not averaged: before the start, and after it."""
    model = tiny_model("resnet")
    config = OptimizerConfig("nt_asgd", learning_rate=0.1, schedule="constant", warmup_steps=0, beta1=0.0)
    specs = model.specs if adaptation is None else adaptation.specs(model.specs)
    trainer = Trainer(model, make_optimizer(config, specs, 10), classification.loss, adaptation=adaptation)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 16))
    batch = classification.batch(tokens, np.array([0, 1, 1, 0]), num_labels=model.config.num_labels)
    step, state = jax.jit(trainer.step), trainer.init(jax.random.key(0))
    for start in (False, True):
        if start:
            state = dataclasses.replace(state, optimizer=nt_asgd.start_averaging(state.optimizer))
        state, _ = step(state, batch)
        statistics = spec.flatten(state.params["statistics"])
        assert_trees_equal(spec.flatten(trainer.model_params(state)["statistics"]), statistics)

"""A trainer for tests with many short runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxlm.objectives import causal
from jaxlm.training.trainer import Trainer


class CachedTrainer(Trainer):
    """A trainer that shares its compiled functions with equal trainers.

    Trainers are equal if their fields are equal. An optimizer or a loss is equal only to itself. The initial state
    and the parameters of the model depend neither on the loss nor on the logged schedule, so trainers with different
    ones share ``init`` and ``model_params``.
    """

    def init(self, key: jax.Array, params: Any = None) -> Any:
        if self.sharding is None and params is None:
            return compiled_init(dataclasses.replace(self, loss=causal.loss, learning_rate=None))(key)
        return super().init(key, params)

    def jit_step(self) -> Any:
        return compiled_step(self)

    @property
    def model_params(self) -> Any:  # type: ignore[override]
        return model_params_of(dataclasses.replace(self, loss=causal.loss, learning_rate=None))


@functools.cache
def compiled_init(trainer: Trainer) -> Any:
    return jax.jit(functools.partial(Trainer.init, trainer))


@functools.cache
def compiled_step(trainer: Trainer) -> Any:
    return Trainer.jit_step(trainer)


@functools.cache
def model_params_of(trainer: Trainer) -> Any:
    """The same function object for equal trainers, because ``jax.jit`` compiles each function object once."""
    return functools.partial(Trainer.model_params, trainer)

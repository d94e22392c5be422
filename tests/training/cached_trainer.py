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
    depends neither on the loss nor on the logged schedule, so trainers with different ones share ``init``.
    """

    def init(self, key: jax.Array, params: Any = None) -> Any:
        if self.sharding is None and params is None:
            return compiled_init(dataclasses.replace(self, loss=causal.loss, learning_rate=None))(key)
        return super().init(key, params)

    def jit_step(self) -> Any:
        return compiled_step(self)


@functools.cache
def compiled_init(trainer: Trainer) -> Any:
    return jax.jit(functools.partial(Trainer.init, trainer))


@functools.cache
def compiled_step(trainer: Trainer) -> Any:
    return Trainer.jit_step(trainer)

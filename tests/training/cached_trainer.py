"""A trainer for tests with many short runs."""

import functools

import jax

from jaxlm.training.trainer import Trainer


class CachedTrainer(Trainer):
    """A trainer that shares its compiled functions with equal trainers.

    Trainers are equal if their fields are equal. An optimizer or a loss is equal only to itself.
    """

    def init(self, key, params=None):
        if self.sharding is None and params is None:
            return compiled_init(self)(key)
        return super().init(key, params)

    def jit_step(self):
        return compiled_step(self)


@functools.cache
def compiled_init(trainer):
    return jax.jit(functools.partial(Trainer.init, trainer))


@functools.cache
def compiled_step(trainer):
    return Trainer.jit_step(trainer)

"""Evaluation: the mean loss of an objective over a fixed set of batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.models import Model
from jaxlm.sharding import Sharding
from jaxlm.training.step import Loss, Stream, place_batch


class Evaluator:
    """Mean loss over ``batches`` (kept, so that every evaluation sees the same), in nats per token.

    With ``stream`` (batch rows, tokens remembered), the batches are consecutive parts of a stream and the model carries
    its state from one to the next, starting empty.

    Example:
        >>> evaluate = Evaluator(model, causal.loss, batches)     # doctest: +SKIP
        >>> evaluate(params)                                      # doctest: +SKIP
        4.17
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        batches: Iterable[Any],
        sharding: Sharding | None = None,
        *,
        stream: Stream | None = None,
    ) -> None:
        self._start = None if stream is None else model.init_state(*stream)
        self.batches = [place_batch(batch, sharding) for batch in batches]
        if not self.batches:
            raise ValueError("an evaluation needs at least one batch, got none")

        def add(sums: tuple[jax.Array, jax.Array], params: Any, batch: Any, state: Any) -> Any:
            with contextlib.nullcontext() if sharding is None else sharding.scope():
                *new, state = loss(model, params, batch, state=state)
                return jax.tree.map(jnp.add, sums, tuple(new)), state

        # Each call needs the sums of the one before: no two run at once, which on virtual CPU devices can deadlock.
        self._add = jax.jit(add)

    def __call__(self, params: Any) -> float:
        sums, state = (jnp.zeros(()), jnp.zeros(())), self._start
        for batch in self.batches:
            sums, state = self._add(sums, params, batch, state)
            if self._start is None:
                state = None
        total, weight = map(float, jax.device_get(sums))
        if weight == 0.0:
            raise ValueError("no token of the evaluation batches counts: they hold padding only")
        return total / weight


def bits_per_character(nats_per_token: float, tokens: int, characters: int) -> float:
    """Loss in bits per character of the text that ``tokens`` tokens spell with ``characters`` characters."""
    return nats_per_token / math.log(2.0) * tokens / characters

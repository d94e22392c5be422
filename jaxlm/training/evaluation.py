"""Evaluation: the mean loss of an objective over a fixed set of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax

from jaxlm.models import Model
from jaxlm.sharding import Sharding
from jaxlm.training.step import Loss


class Evaluator:
    """Mean loss over ``batches`` (kept, so that every evaluation sees the same), in nats per token.

    Example:
        >>> evaluate = Evaluator(model, causal.loss, batches)     # doctest: +SKIP
        >>> evaluate(params)                                      # doctest: +SKIP
        4.17
    """

    def __init__(self, model: Model, loss: Loss, batches: Iterable[Any], sharding: Sharding | None = None) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("an evaluation needs at least one batch, got none")

        def total(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            if sharding is None:
                return loss(model, params, batch)
            with sharding.scope():
                return loss(model, params, batch)

        self._total = jax.jit(total)

    def __call__(self, params: Any) -> float:
        parts = jax.device_get([self._total(params, batch) for batch in self.batches])
        weight = sum(float(weight) for _, weight in parts)
        if weight == 0.0:
            raise ValueError("no token of the evaluation batches counts: they hold padding only")
        return sum(float(total) for total, _ in parts) / weight


def bits_per_character(nats_per_token: float, tokens: int, characters: int) -> float:
    """Loss in bits per character of the text that ``tokens`` tokens spell with ``characters`` characters."""
    return nats_per_token / math.log(2.0) * tokens / characters

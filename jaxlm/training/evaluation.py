"""Evaluation: mean loss and other metrics over a fixed set of batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.models import Model
from jaxlm.objectives.batch import Loss
from jaxlm.sharding import Sharding
from jaxlm.training.trainer import Carry, place_batch


class Evaluator:
    """A callable that computes named metrics from parameters. Each metric is a mean over ``batches``.

    The batches are kept in memory, so every evaluation uses the same batches.

    Args:
        losses: the ``loss`` function of an objective, whose mean is reported as ``loss``. Or a dict from metric names
            to such functions, for example ``{"loss": classification.loss, "accuracy": classification.accuracy}``.
        sharding: how batches are distributed over devices; None uses one device.
        carry: (rows, tokens), the size of the model state that is carried from batch to batch. The first batch starts
            from an empty state. None carries no state.
        further: a function that computes additional metrics from the parameters, such as BLEU. These metrics are not
            means over batches.
        further_names: the names of the additional metrics.

    Raises:
        ValueError: ``batches`` is empty.

    Example:
        >>> evaluate = Evaluator(model, causal.loss, batches)     # doctest: +SKIP
        >>> evaluate(params)                                      # doctest: +SKIP
        {'loss': 4.17}
    """

    def __init__(
        self,
        model: Model,
        losses: Loss | Mapping[str, Loss],
        batches: Iterable[Any],
        *,
        sharding: Sharding | None = None,
        carry: Carry | None = None,
        further: Callable[[Any], Mapping[str, float]] | None = None,
        further_names: tuple[str, ...] = (),
    ) -> None:
        self._initial_state = None if carry is None else model.init_state(*carry)
        self._further, self._further_names = further, further_names
        self._losses = losses if isinstance(losses, Mapping) else {"loss": losses}
        self.batches = [place_batch(batch, sharding) for batch in batches]
        if not self.batches:
            raise ValueError("an evaluation needs at least one batch, got none")

        def add_batch(sums: dict[str, Any], params: Any, batch: Any, state: Any) -> Any:
            with contextlib.nullcontext() if sharding is None else sharding.scope():
                batch_sums, new_state = {}, None
                for name, loss in self._losses.items():
                    *batch_sums[name], new_state = loss(model, params, batch, state=state)
                return jax.tree.map(jnp.add, sums, batch_sums), new_state

        # Each call needs the sums of the previous call, so calls never run at the same time. On virtual CPU devices,
        # concurrent calls can deadlock.
        self._add_batch = jax.jit(add_batch)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the metrics; None if ``further`` is given without ``further_names``."""
        known = self._further is None or self._further_names
        return (*self._losses, *self._further_names) if known else None

    def __call__(self, params: Any) -> dict[str, float]:
        """A dict of the metrics of a model with these parameters.

        Raises:
            ValueError: all targets of the batches have weight 0.
        """
        sums, state = {name: [jnp.zeros(()), jnp.zeros(())] for name in self._losses}, self._initial_state
        for batch in self.batches:
            sums, state = self._add_batch(sums, params, batch, state)
            if self._initial_state is None:
                state = None
        values = {}
        for name, (total, weight) in jax.device_get(sums).items():
            if weight == 0.0:
                raise ValueError("all targets of the evaluation batches have weight 0: the batches are only padding")
            values[name] = float(total) / float(weight)
        return values if self._further is None else {**values, **self._further(params)}


def bits_per_character(nats_per_token: float, tokens: int, characters: int) -> float:
    """Loss in bits per character, for a text of ``tokens`` tokens and ``characters`` characters."""
    return nats_per_token / math.log(2.0) * tokens / characters

"""Evaluation: mean loss and other metrics over a fixed set of batches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data import Batches
from jaxlm.models import Model
from jaxlm.objectives.batch import Loss, loss_and_terms, term_names
from jaxlm.sharding import Sharding
from jaxlm.spec import Params
from jaxlm.training.trainer import CarriedStateSize, reset_rows, to_global_batch, to_mesh


class Evaluator:
    """A function of the parameters of a model that returns a dict of metrics.

    The metric of a loss is a weighted mean over the targets of all batches: the sum of the loss, divided by the sum of
    the weights. The batches are kept in memory, so every evaluation uses the same batches.

    Args:
        model: the model.
        losses: the ``loss`` function of an objective, whose metric is called ``loss``; or a dict from metric names to
            functions with the signature of a loss, for example
            ``{"loss": classification.loss, "accuracy": classification.accuracy}``. The terms of a
            ``jaxlm.objectives.batch.LossWithTerms`` are metrics, too.
        batches: the batches of the objective. With several processes, each batch has only the rows of this process.
        sharding: how batches are distributed over devices; None uses one device. Parameters on other devices are copied
            to the mesh.
        carry_size: (rows, tokens), the size of the model state that is carried from batch to batch. The first batch
            starts from an empty state. In later batches, a row whose ``Batch.reset`` is True starts from an empty
            state, too. With None, no state is carried.
        extra_metrics: a function that computes additional metrics from the parameters, such as BLEU. These metrics
            are not means over batches.
        extra_metric_names: the names of the additional metrics, for :attr:`names`.

    Raises:
        ValueError: ``batches`` is empty, two metrics have the same name, or ``extra_metric_names`` are given without
            ``extra_metrics``.

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
        carry_size: CarriedStateSize | None = None,
        extra_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        extra_metric_names: tuple[str, ...] = (),
    ) -> None:
        self._initial_state = None if carry_size is None else model.init_state(*carry_size)
        self._extra_metrics, self._extra_metric_names = extra_metrics, extra_metric_names
        self._specs, self._sharding = model.specs, sharding
        self._losses = losses if isinstance(losses, Mapping) else {"loss": losses}
        if extra_metric_names and extra_metrics is None:
            raise ValueError(f"extra_metric_names={extra_metric_names} needs extra_metrics, a function")
        self._names = (*self._losses, *(name for loss in self._losses.values() for name in term_names(loss)))
        names = (*self._names, *extra_metric_names)
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two metrics have the name {duplicates[0]!r}: rename one (a loss, a term of a loss or an extra metric)"
            )
        self.batches = [to_global_batch(batch, sharding) for batch in batches]
        if not self.batches:
            raise ValueError("an evaluation needs at least one batch, got none")

        def add_batch(sums: dict[str, Any], params: Params, batch: Any, state: Any) -> Any:
            with contextlib.nullcontext() if sharding is None else sharding.scope():
                if carry_size is not None:
                    state = reset_rows(model, carry_size, state, batch)
                batch_sums, new_state = dict[str, Any](), None
                for name, loss in self._losses.items():
                    total, weight, new_state, terms = loss_and_terms(loss, model, params, batch, state=state)
                    batch_sums |= {key: [value, weight] for key, value in {name: total, **terms}.items()}
                return jax.tree.map(jnp.add, sums, batch_sums), new_state

        # Each call needs the sums of the previous call, so calls never run at the same time. On virtual CPU devices,
        # concurrent calls can deadlock.
        self._add_batch = jax.jit(add_batch)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the metrics; None if ``extra_metrics`` is given without ``extra_metric_names``."""
        known = self._extra_metrics is None or self._extra_metric_names
        return (*self._names, *self._extra_metric_names) if known else None

    def __call__(self, params: Params) -> dict[str, float]:
        """The metrics of a model with these parameters: ``{name: value}``.

        Raises:
            ValueError: all targets of the batches have weight 0, ``carry_size`` has another number of rows than a
                batch, or ``extra_metrics`` returns a metric with the name of another metric.
        """
        state = self._initial_state
        params_on_mesh = to_mesh(params, self._specs, self._sharding)
        sums = {name: [jnp.zeros(()), jnp.zeros(())] for name in self._names}
        for batch in self.batches:
            sums, state = self._add_batch(sums, params_on_mesh, batch, state)
            if self._initial_state is None:
                state = None
        values = {}
        for name, (total, weight) in jax.device_get(sums).items():
            if weight == 0.0:
                raise ValueError("all targets of the evaluation batches have weight 0: the batches are only padding")
            values[name] = float(total) / float(weight)
        extra = {} if self._extra_metrics is None else self._extra_metrics(params)
        if taken := sorted(values.keys() & extra.keys()):
            raise ValueError(f"extra_metrics returns {taken[0]!r}, which is the name of another metric: rename it")
        return {**values, **extra}


def first_epoch(data: Batches, max_batches: int) -> list[Any]:
    """The first ``max_batches`` batches of the first epoch of ``data`` (all, if there are fewer), for an ``Evaluator``.

    The last batch of an epoch may also contain rows of the next epoch. The targets of these rows get weight 0, so that
    no row counts twice.

    Args:
        data: the batches of an objective. No batch may have been read from this iterator yet.
    """
    size, num_rows = data.source.batch_size, data.source.rows_per_epoch
    batches = []
    for start in range(0, min(max_batches * size, num_rows), size):
        batch = next(data)
        in_next_epoch = start + np.asarray(data.rows) >= num_rows
        if in_next_epoch.any():
            weights = np.array(batch.weights)
            weights[in_next_epoch] = 0.0
            batch = dataclasses.replace(batch, weights=weights)
        batches.append(batch)
    return batches


def bits_per_character(nats_per_token: float, tokens: int, characters: int) -> float:
    """Convert a mean loss in nats per token to bits per character.

    Args:
        tokens: number of tokens of the text.
        characters: number of characters of the text.
    """
    return nats_per_token / math.log(2.0) * tokens / characters

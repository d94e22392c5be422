"""The class :class:`Batch`, which all objectives use, and the losses and the accuracy that several objectives share.

These losses and the accuracy are for objectives whose targets are one token or one label at each target position.

Shapes: B batch, T time, P target positions (T, or fewer if the batch or the model selects positions), D model width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.models import Model
from jaxlm.nn.embedding import widen_ids
from jaxlm.nn.experts import load_balance_loss, router_z_loss
from jaxlm.nn.loss import chunked_argmax
from jaxlm.spec import Params, State

Loss = Callable[..., tuple[jax.Array, jax.Array, Any]]
"""``loss(model, params, batch, *, key, state) -> (total, weight, state)``: see ``jaxlm.objectives``."""


@dataclasses.dataclass(frozen=True)
class LossWithTerms:
    """A loss function with terms that ``Trainer`` and ``Evaluator`` report under their own names.

    Attributes:
        names: names of the terms.
        function: has the arguments of a loss and returns ``(total, weight, state, terms)``. The first three values are
            the results of a loss. ``terms`` is a dict from each name to a total. The reported mean of a term is its
            total divided by ``weight``.
    """

    names: tuple[str, ...]
    function: Callable[..., tuple[jax.Array, jax.Array, Any, dict[str, jax.Array]]]

    def __call__(self, *arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array, Any]:
        """The results of the loss without its terms."""
        total, weight, state, _ = self.function(*arguments, **options)
        return total, weight, state


def loss_and_terms(
    loss: Loss, *arguments: Any, **options: Any
) -> tuple[jax.Array, jax.Array, Any, dict[str, jax.Array]]:
    """The results of ``loss(*arguments, **options)``, and a dict of its terms, which is empty for a loss without terms.

    The total and the weight are arrays, also if the loss returns Python numbers.

    Raises:
        ValueError: the loss returns another number of values, or the names of its terms are not ``loss.names``.
    """
    function: Callable[..., Any] = loss
    expected = ["total", "weight", "state"]
    if isinstance(loss, LossWithTerms):
        function = loss.function
        expected.append("terms")
    results = function(*arguments, **options)
    if not isinstance(results, tuple) or len(results) != len(expected):
        given = f"{len(results)} values" if isinstance(results, tuple) else f"a {type(results).__name__}"
        raise ValueError(f"a loss must return a tuple ({', '.join(expected)}), but it returned {given}")
    total, weight, state, terms = (*results, {})[:4]
    if set(terms) != set(names := term_names(loss)):
        raise ValueError(f"the loss returned the terms {sorted(terms)}, but its names are {sorted(names)}")
    return jnp.asarray(total), jnp.asarray(weight, jnp.float32), state, terms


def term_names(loss: Loss) -> tuple[str, ...]:
    """The names of the terms of a loss; ``()`` for a loss without terms."""
    return loss.names if isinstance(loss, LossWithTerms) else ()


@struct.dataclass
class Batch:
    """The inputs of a model, its targets, and the weights of the targets.

    Attributes:
        tokens: [B, T] integers.
        targets: integers: [B, P] for tokens and token labels, [B] for classification, [B, 2] for spans.
        weights: float32 with the shape of the targets ([B] for spans). A target of weight 0 is ignored.
        segment_ids: [B, T], 0 for padding, 1, 2, ... for documents. None: each row is one document.
        inputs: further keyword arguments of ``apply``: ``token_types``, ``source``, ``source_segment_ids``, ...
        reset: [B] bool, True for rows whose model state is reset, because a new stream begins. None: no row is reset.
        target_positions: [B, P] integers, the position of each target in its row. Logits are computed only at these
            positions. None: for targets [B, P], the model returns one hidden state per target.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any = None
    inputs: dict[str, Any] = struct.field(default_factory=dict)
    reset: Any = None
    target_positions: Any = None


def count_examples_and_tokens(batch: Batch) -> tuple[int, int]:
    """The number of examples and the number of tokens in a batch of NumPy arrays.

    An example is a row with at least one target of positive weight. Tokens of sources are counted. Padding (segment 0)
    is not counted.
    """
    is_example = np.any(np.asarray(batch.weights) > 0, axis=tuple(range(1, np.ndim(batch.weights))))
    token_arrays = [(batch.tokens, batch.segment_ids)]
    if "source" in batch.inputs:
        token_arrays.append((batch.inputs["source"], batch.inputs.get("source_segment_ids")))
    token_counts = [np.size(ids) if segments is None else np.count_nonzero(segments) for ids, segments in token_arrays]
    return int(np.count_nonzero(is_example)), int(sum(token_counts))


def hidden_states(
    model: Model, params: Params, batch: Batch, key: jax.Array | None, state: State | None
) -> tuple[jax.Array, Any]:
    """The hidden states and the new state from ``model.apply`` for the batch. See ``Model.apply`` for the shapes.

    No gradient flows into ``state``, so training on a stream is truncated backpropagation (Williams and Peng 1990).
    """
    return model.apply(params, batch.tokens, **_inputs(batch, key, state))


def _inputs(batch: Batch, key: jax.Array | None, state: State | None) -> dict[str, Any]:
    """The keyword arguments of ``Model.apply`` for a batch."""
    inputs = {**batch.inputs, "segment_ids": batch.segment_ids, "key": key}
    return inputs if state is None else {**inputs, "state": jax.lax.stop_gradient(state)}


def _at_targets(batch: Batch, hidden: jax.Array) -> jax.Array:
    """The hidden states at the target positions, [B, P, D]; NaN for a position outside the row."""
    if batch.target_positions is None:
        return hidden
    positions = widen_ids(batch.target_positions)[..., None]
    positions = jnp.where(positions < 0, hidden.shape[1], positions)  # JAX counts negative positions from the end
    return jnp.take_along_axis(hidden, positions, axis=1, mode="fill", fill_value=jnp.nan)


def hidden_states_at_targets(
    model: Model, params: Params, batch: Batch, key: jax.Array | None, state: State | None
) -> tuple[jax.Array, Any]:
    """The hidden states at the target positions, [B, P, D], and the new model state."""
    hidden, state = hidden_states(model, params, batch, key, state)
    return _at_targets(batch, hidden), state


def token_loss(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    """The weighted sum of the negative log-likelihoods in nats, the sum of the weights, and the new model state.

    ``label_smoothing`` is described in :func:`smoothed_token_loss`.
    """
    hidden, state = hidden_states_at_targets(model, params, batch, key, state)
    total = model.cross_entropy(params, hidden, batch.targets, batch.weights, label_smoothing=label_smoothing)
    return total, jnp.sum(batch.weights), state


def smoothed_token_loss(label_smoothing: float) -> Loss:
    """Make a loss function like :func:`token_loss` with label smoothing.

    Args:
        label_smoothing: fraction of the target probability that is spread over the vocabulary.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 1). The loss function also raises it if ``label_smoothing`` is
            above 0 and the family of the model has its own ``cross_entropy`` (``transformer_xl``).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    return functools.partial(token_loss, label_smoothing=label_smoothing)


def token_loss_with_load_balance(coefficient: float, *, z_coefficient: float = 0.0) -> LossWithTerms:
    """Make a loss function for models with experts: :func:`token_loss` plus the losses of the routers.

    The mean loss, ``total / weight``, is the sum of three numbers: the mean negative log-likelihood, ``coefficient``
    times the load-balance loss, and ``z_coefficient`` times the router z-loss (``jaxlm.nn.experts``). The router losses
    are computed from all tokens of the batch except padding. With gradient accumulation, ``shard_map`` or ``pmap``,
    they are computed for each part of the batch separately.

    The terms ``load_balance_loss`` and ``router_z_loss`` (:class:`LossWithTerms`) are the losses of the routers without
    their coefficients. They are also reported if the coefficients are 0.

    Args:
        coefficient: weight of the load-balance loss. This loss is N if each token selects N experts and the router
            selects all experts equally often. Fedus et al. 2022 use 0.01 with N = 1.
        z_coefficient: weight of the z-loss. Zoph et al. 2022 use 0.001.

    Raises:
        ValueError: a coefficient is negative or not finite.
        TypeError: the loss function raises it for a model without experts.

    Example:
        >>> model = get_model("mixtral-tiny")                                              # doctest: +SKIP
        >>> trainer = Trainer(model, optimizer, causal.loss_with_load_balance(0.01))       # doctest: +SKIP
    """
    for name, value in (("coefficient", coefficient), ("z_coefficient", z_coefficient)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number of at least 0")

    def loss(
        model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, jax.Array, Any, dict[str, jax.Array]]:
        hidden, state, statistics = model.apply_with_routing(params, batch.tokens, **_inputs(batch, key, state))
        total = model.cross_entropy(params, _at_targets(batch, hidden), batch.targets, batch.weights)
        weight = jnp.sum(batch.weights)
        load_balance, router_z = weight * load_balance_loss(statistics), weight * router_z_loss(statistics)
        terms = {"load_balance_loss": load_balance, "router_z_loss": router_z}
        return total + coefficient * load_balance + z_coefficient * router_z, weight, state, terms

    return LossWithTerms(("load_balance_loss", "router_z_loss"), loss)


def token_accuracy(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None
) -> tuple[jax.Array, jax.Array, Any]:
    """The weighted number of targets that have the highest logit, the sum of the weights, and the new model state.

    This function is an evaluation metric with the signature of a loss. The accuracy is the first result divided by the
    second. Logits are computed in chunks, so no array [B, P, V] is stored.
    """
    hidden, state = hidden_states_at_targets(model, params, batch, key, state)
    predictions = chunked_argmax(model.logits, params, hidden)  # logits of vocabulary padding are never the highest
    correct = jnp.sum(jnp.where(predictions == batch.targets, batch.weights, 0.0))
    return correct, jnp.sum(batch.weights), state

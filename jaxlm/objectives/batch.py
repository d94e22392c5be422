"""What all objectives share: the batch, and the loss of predicting a token (or a label) at each of some places.

Shapes: B batch, T time, P places that are predicted (T, unless the batch or the model picks some).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.models import Model
from jaxlm.nn.loss import chunked_argmax

Loss = Callable[..., tuple[jax.Array, jax.Array, Any]]
"""``loss(model, params, batch, *, key, state) -> (total, weight, state)``: see ``jaxlm.objectives``."""


@struct.dataclass
class Batch:
    """What a model reads, what it should say, and which of that counts.

    Attributes:
        tokens: [B, T] integers.
        targets: integers: [B, P] for tokens and tags, [B] for classification, [B, 2] for spans.
        weights: float32 in the shape of the targets, [B] for spans; 0 takes a target out.
        segment_ids: [B, T], 0 padding, 1.. documents; None means one document.
        inputs: further arrays for ``apply``, by keyword: ``token_types``, ``source``, ``source_segment_ids``, ...
        reset: [B] bool, rows at which a stream begins anew; None: none.
        places: [B, P] integers, where in the text each target is predicted, so that the vocabulary is computed there
            alone; None: the model says a hidden state for each target.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any = None
    inputs: dict[str, Any] = struct.field(default_factory=dict)
    reset: Any = None
    places: Any = None


def count(batch: Batch) -> tuple[int, int]:
    """Number of examples and of tokens of a batch on the host.

    Examples are rows with a target that has a weight. Tokens are those that are not padding, a source included.
    """
    examples = np.any(np.asarray(batch.weights) > 0, axis=tuple(range(1, np.ndim(batch.weights))))
    texts = [(batch.tokens, batch.segment_ids)]
    if "source" in batch.inputs:
        texts.append((batch.inputs["source"], batch.inputs.get("source_segment_ids")))
    tokens = [np.size(ids) if segments is None else np.count_nonzero(segments) for ids, segments in texts]
    return int(np.count_nonzero(examples)), int(sum(tokens))


def hidden_states(model: Model, params: Any, batch: Batch, key: jax.Array | None, state: Any) -> tuple[jax.Array, Any]:
    """What ``apply`` makes of a batch: hidden states [B, P, D], and what it carries on from ``state``.

    No gradient flows into the past: a stream is trained by truncated back-propagation (Williams and Peng 1990).
    """
    inputs = dict(batch.inputs) if state is None else {**batch.inputs, "state": jax.lax.stop_gradient(state)}
    return model.apply(params, batch.tokens, segment_ids=batch.segment_ids, key=key, **inputs)


def predicted_states(
    model: Model, params: Any, batch: Batch, key: jax.Array | None, state: Any
) -> tuple[jax.Array, Any]:
    """Hidden states at the positions of the targets, [B, P, D], and the new model state."""
    hidden, state = hidden_states(model, params, batch, key, state)
    if batch.places is not None:
        hidden = jnp.take_along_axis(hidden, batch.places[..., None], axis=1, mode="fill", fill_value=jnp.nan)
    return hidden, state


def token_loss(
    model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None, state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Summed negative log-likelihood in nats of the targets, the sum of their weights, and the new model state."""
    hidden, state = predicted_states(model, params, batch, key, state)
    return model.cross_entropy(params, hidden, batch.targets, batch.weights), jnp.sum(batch.weights), state


def smoothed_token_loss(label_smoothing: float) -> Loss:
    """:func:`token_loss` to targets that have ``label_smoothing`` of their probability spread over the vocabulary.

    Raises:
        ValueError: a share out of [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")

    def loss(
        model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        hidden, state = predicted_states(model, params, batch, key, state)
        total = model.cross_entropy(params, hidden, batch.targets, batch.weights, label_smoothing=label_smoothing)
        return total, jnp.sum(batch.weights), state

    return loss


def token_accuracy(
    model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None, state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Weighted number of targets that are the most likely token at their position, the sum of the weights, and the new
    model state: an evaluation metric with the signature of a loss. The logits of all positions never exist together."""
    hidden, state = predicted_states(model, params, batch, key, state)

    def logits(params: Any, hidden: jax.Array) -> jax.Array:
        return model.logits(params, hidden)[..., : model.config.vocab_size]

    best = chunked_argmax(logits, params, hidden)
    return jnp.sum(jnp.where(best == batch.targets, batch.weights, 0.0)), jnp.sum(batch.weights), state

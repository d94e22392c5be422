"""Next-token prediction: each token from those before it.

Shapes: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.models import Model
from jaxlm.nn.loss import chunked_cross_entropy


@struct.dataclass
class Batch:
    """Tokens, the token after each, and which of these count. All [B, T]; ``segment_ids`` None means one document."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any = None


def batch(tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    """A window [B, T + 1] as inputs and targets. Targets that are padding or begin another document do not count."""
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"a window must be [batch, at least 2 tokens], got {list(tokens.shape)}")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if segment_ids is None:
        return Batch(inputs, targets, np.ones(targets.shape, np.float32))
    before, after = segment_ids[:, :-1], segment_ids[:, 1:]
    return Batch(inputs, targets, ((before == after) & (after > 0)).astype(np.float32), before)


def loss(model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood in nats and the number of tokens that it sums over."""
    hidden, _ = model.apply(params, batch.tokens, segment_ids=batch.segment_ids, key=key)
    total = chunked_cross_entropy(model.logits, params, hidden, batch.targets, batch.weights)
    return total, jnp.sum(batch.weights)

"""Sentence embeddings: one vector per text, from the hidden states of its tokens (Sentence-BERT, Reimers and Gurevych
2019).

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def mean_pooled(hidden_BTD: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """The mean of the hidden states of each row's real tokens, scaled to L2 norm 1, [B, D] float32.

    The dot product of two such vectors is their cosine similarity. A row that contains only padding gives zeros.

    Args:
        segment_ids_BT: 0 is padding; None: every token is real.

    Example:
        >>> mean = mean_pooled(jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), jnp.array([[1, 1, 0]]))
        >>> [round(float(x), 3) for x in mean[0]]
        [0.6, 0.8]
    """
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    if segment_ids_BT is not None:
        hidden_BTD = jnp.where(segment_ids_BT[:, :, None] > 0, hidden_BTD, 0.0)
    total_BD = jnp.sum(hidden_BTD, axis=1)  # the sum has the same direction as the mean
    return total_BD * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(total_BD), axis=1, keepdims=True), 1e-24))

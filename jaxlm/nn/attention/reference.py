"""Scaled dot-product attention by its definition (Vaswani et al. 2017, eq. 1), with O(T * S) memory.

Shapes as in ``jaxlm.nn.attention.api``; R = H / G query heads share each key head.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.bias import AttentionBias, dense_bias
from jaxlm.nn.attention.mask import Mask, keep, softmax
from jaxlm.nn.dropout import keep_rows
from jaxlm.nn.weight_record import record
from jaxlm.sharding import sharded_like


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    biases: Sequence[AttentionBias],
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``.

    While attention weights are recorded (``jaxlm.nn.weight_record``), this function records the probabilities before
    dropout.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, S) * scale
    for bias in biases:
        scores_BHTS = scores_BHTS + dense_bias(bias, T, S)
    probabilities = softmax(scores_BHTS, keep(mask, T, S))
    record(probabilities, "causal" if mask.causal else "bidirectional")
    if key is not None:
        rows = jnp.arange(B * H * T, dtype=jnp.uint32)
        keep_BHTS = sharded_like(keep_rows(key, rows, S, dropout).reshape(B, H, T, S), probabilities)
        probabilities = jnp.where(keep_BHTS, probabilities / (1.0 - dropout), 0.0)
    out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", probabilities.astype(v_BSGK.dtype).reshape(B, G, H // G, T, S), v_BSGK)
    return out_BTGRK.reshape(B, T, H, v_BSGK.shape[-1])

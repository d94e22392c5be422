"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Shapes: B batch, T query time, S key time, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.nn.kernels import blockwise_attention
from jaxlm.nn.mask import Mask, keep

Implementation = Literal["reference", "blockwise"]

BLOCKWISE_FROM = 256
"""Queries from which blocks pay off; from T = 1024 on, O(T) memory is a rule of the house and not a choice."""


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``softmax(scale * q @ k.T + mask) @ v`` for each head, [B, T, H, K] in ``v``'s dtype; softmax in float32.

    A query that may see no key at all gives zeros. Dropout acts on the probabilities; its mask depends on the key and
    the place in the matrix only, so every implementation drops the same entries.

    Args:
        scale: defaults to ``1 / sqrt(K)``.
        dropout: rate; acts only with a ``key``.
        implementation: ``reference`` (short, O(T*S) memory), ``blockwise`` (O(T) memory, own gradient), or None for the
            best that is known for the device and the shape.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
    """
    B, T, H, K = q_BTHK.shape
    S = k_BSHK.shape[1]
    if k_BSHK.shape != (B, S, H, K) or v_BSHK.shape[:3] != (B, S, H):
        raise ValueError(f"q {q_BTHK.shape}, k {k_BSHK.shape}, v {v_BSHK.shape} must agree in batch, heads and width")
    if mask.causal and mask.query_order is None and T != S:
        raise ValueError(f"a causal mask over {T} queries and {S} keys needs query_order and key_order")
    if implementation is None:
        implementation = "blockwise" if T >= BLOCKWISE_FROM else "reference"
    if scale is None:
        scale = 1.0 / math.sqrt(K)
    key = key if dropout > 0.0 else None
    if implementation == "reference":
        return _reference(q_BTHK, k_BSHK, v_BSHK, mask, scale, dropout, key)
    if implementation == "blockwise":
        # One head after the other keeps a CPU's matmuls two-dimensional and its temporaries in cache. Where heads or
        # batch are split over devices, and on accelerators, all heads go together.
        sequential = sharding.platform() == "cpu" and sharding.active() is None
        return blockwise_attention.attention(
            q_BTHK, k_BSHK, v_BSHK, mask, scale=scale, dropout=dropout, key=key, sequential=sequential
        )
    raise ValueError(
        f"no attention implementation {implementation!r}: choose from {', '.join(get_args(Implementation))}"
    )


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: float, key: jax.Array | None
) -> jax.Array:
    (B, T, H, _), S = q.shape, k.shape[1]
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    kept = keep(mask, T, S)
    if kept is not None:
        scores_BHTS = jnp.where(kept[:, None], scores_BHTS, -jnp.inf)
    top = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    exp_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0)))
    total = jnp.sum(exp_BHTS, axis=-1, keepdims=True)
    probabilities = exp_BHTS / jnp.where(total > 0.0, total, 1.0)
    if key is not None:
        rows = jnp.arange(B * H * T, dtype=jnp.uint32)
        kept_rows = blockwise_attention.dropout_keep(key, rows, S, dropout).reshape(B, H, T, S)
        probabilities = jnp.where(kept_rows, probabilities / (1.0 - dropout), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", probabilities.astype(v.dtype), v)

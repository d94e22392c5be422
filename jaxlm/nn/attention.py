"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Shapes: B batch, T query time, S key time, H heads, G heads of keys and values (each serves H / G query heads), K head
width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.nn.kernels import blockwise_attention, splash
from jaxlm.nn.mask import Mask, keep

Implementation = Literal["reference", "blockwise", "splash"]

BLOCKWISE_FROM = 256
"""Queries from which blocks pay off; from T = 1024 on, O(T) memory is a rule of the house and not a choice."""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``softmax(scale * q @ k.T + bias + mask) @ v`` for each head, [B, T, H, K] in ``v``'s dtype; softmax in float32.

    A query that may see no key at all gives zeros. Dropout acts on the probabilities; its mask depends on the key and
    the place in the matrix only, so every implementation drops the same entries.

    Args:
        k_BSGK, v_BSGK: G divides H. G = H is the usual attention, G = 1 multi-query, between them grouped queries
            (Ainslie et al. 2023); query head h reads key head ``h // (H / G)``.
        scale: defaults to ``1 / sqrt(K)``.
        bias: [1 or B, 1 or H, T, S], added to the scaled scores: position biases and relative terms. It is a dense
            array, so only ``reference`` takes it.
        dropout: rate; acts only with a ``key``.
        implementation: ``reference`` (short, O(T*S) memory), ``blockwise`` (O(T) memory, own gradient), ``splash`` (the
            same as a TPU kernel; no bias, dropout or orders), or None for the best that is known for the device, the
            shape and the mask.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that cannot do this or runs elsewhere.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if k_BSGK.shape != (B, S, G, K) or v_BSGK.shape[:3] != (B, S, G) or H % G:
        raise ValueError(
            f"q {q_BTHK.shape}, k {k_BSGK.shape}, v {v_BSGK.shape} must agree in batch and width, and the heads of k "
            "and v must divide those of q"
        )
    if bias is not None and not all(
        size in allowed for size, allowed in zip(bias.shape, ((1, B), (1, H), (T,), (S,)), strict=True)
    ):
        raise ValueError(f"bias {bias.shape} must be [1 or {B}, 1 or {H}, {T}, {S}]")
    if mask.causal and mask.query_order is None and T != S:
        raise ValueError(f"a causal mask over {T} queries and {S} keys needs query_order and key_order")
    if scale is None:
        scale = 1.0 / math.sqrt(K)
    key = key if dropout > 0.0 else None
    if implementation is None:
        implementation = "blockwise" if T >= BLOCKWISE_FROM and bias is None else "reference"
        if T >= BLOCKWISE_FROM and sharding.platform() == "tpu" and splash.refusal(mask, bias, key) is None:
            implementation = "splash"
    if implementation == "splash":
        reason = splash.refusal(mask, bias, key)
        if reason is None and sharding.platform() != "tpu":
            reason = f"is a TPU kernel, and this is compiled for {sharding.platform()}: leave the implementation out"
        if reason is not None:
            raise ValueError(f"attention implementation 'splash' {reason}")
        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    k_BSHK, v_BSHK = (x if G == H else jnp.repeat(x, H // G, axis=2) for x in (k_BSGK, v_BSGK))
    if implementation == "reference":
        return _reference(q_BTHK, k_BSHK, v_BSHK, mask, scale, bias, dropout, key)
    if implementation == "blockwise":
        if bias is not None:
            raise ValueError("attention implementation 'blockwise' takes no bias: leave the implementation out")
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
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    bias: jax.Array | None,
    dropout: float,
    key: jax.Array | None,
) -> jax.Array:
    (B, T, H, _), S = q.shape, k.shape[1]
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.astype(jnp.float32)
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

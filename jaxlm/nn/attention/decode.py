"""Attention of a few queries over a cache. The cost grows with the filled part of the cache, not with its size.

Only the slots up to the last visible slot are read. Their number is rounded up to one of a few lengths, each of which
is a branch of a ``lax.switch``. On a CPU and a TPU, one matmul computes all heads of a device,
``k [E, G*K] @ q [G*K, T*H]``, if the devices can split the key heads evenly
(``jaxlm.nn.choices.merge_heads_for_decoding``). The matrix q is block diagonal, with zeros for the keys of other heads.
This needs more arithmetic, but one matmul per head would first copy the cache into another layout.

Shapes as in ``jaxlm.nn.attention.api``; V width of values, E slots that are read, P devices that split the heads, R
query heads of a device, Q query heads of a key head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.attention.bias import AttentionBias, dense
from jaxlm.nn.attention.cache import CacheView
from jaxlm.nn.attention.mask import Mask, keep, softmax


def unsupported_reason(bias: jax.Array | None, key: jax.Array | None) -> str | None:
    """Why ``decode`` does not support the arguments, as a part of an error message; None if it supports them."""
    if bias is not None:
        return "takes no dense bias"
    return None if key is None else "has no dropout"


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array | CacheView,
    v_BSGK: jax.Array | CacheView,
    mask: Mask,
    *,
    scale: float,
    biases: tuple[AttentionBias, ...],
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``."""
    S = k_BSGK.shape[1]
    lengths = [S]
    while lengths[0] > 2 * choices.MIN_DECODE_SLOTS:
        lengths.insert(0, -(-lengths[0] // 2))

    def branch(length: int) -> Callable[[], jax.Array]:
        def read(x: jax.Array | CacheView) -> jax.Array:
            return x.read(length) if isinstance(x, CacheView) else x[:, :length]

        return lambda: attend(q_BTHK, read(k_BSGK), read(v_BSGK), mask, scale, biases)

    end = _end_of_visible(mask, S)
    index = sum(((end > length).astype(jnp.int32) for length in lengths[:-1]), jnp.int32(0))
    return lax.switch(index, [branch(length) for length in lengths])


def _end_of_visible(mask: Mask, slots: int) -> jax.Array:
    """An upper bound of ``1 + i``, where i is the index of the last slot that a query may attend to.

    The bound may be too large, because key segments are compared only with the smallest and the largest query segment
    of the row.
    """
    visible_BS = jnp.ones((1, slots), bool)
    if mask.causal and mask.query_order is not None:
        visible_BS &= mask.key_order <= jnp.max(mask.query_order, axis=1, keepdims=True)
    if mask.query_segments is not None:
        low, high = (f(mask.query_segments, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
        visible_BS &= (mask.key_segments >= low) & (mask.key_segments <= high)
    return jnp.max(jnp.where(visible_BS, jnp.arange(1, slots + 1, dtype=jnp.int32)[None], 0))


def attend(
    q_BTHK: jax.Array, k_BEGK: jax.Array, v_BEGK: jax.Array, mask: Mask, scale: float, biases: Sequence[AttentionBias]
) -> jax.Array:
    """Attention over the first E keys, [B, T, H, V]; see :func:`attention`."""
    B, T, H, K = q_BTHK.shape
    E, G, V = k_BEGK.shape[1], k_BEGK.shape[2], v_BEGK.shape[3]
    P = sharding.num_shards(("heads",))  # number of devices that split the heads; each computes one matmul
    use_one_matmul = choices.merge_heads_for_decoding(G, P)
    reads_key_head = np.arange(G // P)[:, None] == np.arange(H // P) // (H // G) if use_one_matmul else np.zeros(())
    if use_one_matmul:  # in the einsums of this branch, G is the number of key heads of a device
        q_BTPRK = q_BTHK.reshape(B, T, P, H // P, K)
        block_q = jnp.einsum("BTPRK,GR->BPGKTR", q_BTPRK, reads_key_head.astype(q_BTHK.dtype)).reshape(
            B, P, -1, T * H // P
        )
        block_q = jnp.pad(block_q, ((0, 0), (0, 0), (0, choices.lane_padding(block_q.shape[2])), (0, 0)))
        scores = _dot(_merge_heads(k_BEGK, P), block_q, (((3,), (2,)), ((0, 2), (0, 1))))
        scores = scores.reshape(B, P, E, T, H // P).transpose(0, 1, 4, 3, 2).reshape(B, H, T, E)
    else:
        grouped = q_BTHK.reshape(B, T, G, H // G, K)
        scores = jnp.einsum("BTGQK,BEGK->BGQTE", grouped, k_BEGK, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, H, T, E)
    scores_BHTE = scores * scale
    for bias in biases:
        scores_BHTE = scores_BHTE + dense(bias, T, E)
    mask_E = dataclasses.replace(
        mask,
        key_order=None if mask.key_order is None else mask.key_order[:, :E],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, :E],
    )
    probabilities = softmax(scores_BHTE, keep(mask_E, T, E)).astype(v_BEGK.dtype)
    if use_one_matmul:
        probabilities = probabilities.reshape(B, P, T * H // P, E)
        means = _dot(probabilities, _merge_heads(v_BEGK, P), (((3,), (1,)), ((0, 1), (0, 2))))[..., : G // P * V]
        means = means.reshape(B, P, H // P, T, G // P, V)
        out = jnp.einsum("BPRTGV,GR->BTPRV", means, reads_key_head.astype(np.float32))
        return out.reshape(B, T, H, V).astype(v_BEGK.dtype)
    grouped = probabilities.reshape(B, G, H // G, T, E)
    return jnp.einsum("BGQTE,BEGV->BTGQV", grouped, v_BEGK).reshape(B, T, H, V)


def _merge_heads(x_BEGK: jax.Array, shards: int) -> jax.Array:
    """``x`` as [B, E, shards, heads of a shard * width]; on a TPU, the last axis is padded to a multiple of LANES."""
    x = x_BEGK.reshape(*x_BEGK.shape[:2], shards, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, choices.lane_padding(x.shape[3]))))


def _dot(x: Any, y: Any, axes: Any) -> jax.Array:
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)

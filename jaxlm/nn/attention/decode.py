"""Attention of a few queries over a cache. The cost grows with the filled part of the cache, not with its size.

The code reads only the slots up to the last slot that any query may attend to. ``jaxlm.nn.choices.decode_products``
selects one of four ways to compute the products of queries, keys and values. Except in the kernel, the number of slots
is rounded up to one of a few lengths, each of which is a branch of a ``lax.switch``.

- ``kernel``: a Pallas kernel for few queries on TPUs v5 and later (``jaxlm.nn.attention.decode_kernel``). It does not
  support float16.
- ``merged``: one matmul computes all heads of a device, ``k [E, G*K] @ q [G*K, T*H]``. The matrix q is block diagonal,
  with zeros for the keys of other heads. This needs more arithmetic than one matmul per head.
- ``sums``: elementwise products and sums, for one query per key head.
- ``reference``: one matmul per head (``jaxlm.nn.attention.reference``). On a CPU or TPU, it would first copy the cache
  into another layout, so it is used there only if devices cannot split the key heads evenly.

Shapes as in ``jaxlm.nn.attention.api``; V width of values, E slots that are read, P devices that split the heads, R
query heads of a device, L partial sums of a product (``jaxlm.nn.choices.decode_partial_sums``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.attention import decode_kernel, reference
from jaxlm.nn.attention.bias import AttentionBias, dense_bias
from jaxlm.nn.attention.cache import CacheView
from jaxlm.nn.attention.mask import Mask, keep, softmax


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
    end_B = _end_of_visible(mask, S)
    if choices.decode_products(q_BTHK.shape, k_BSGK.shape, k_BSGK.dtype, sharding.num_shards(("heads",))) == "kernel":
        return decode_kernel.attention(q_BTHK, k_BSGK, v_BSGK, mask, end_B=end_B, scale=scale, biases=biases)
    lengths = [S]
    while lengths[0] > 2 * choices.MIN_DECODE_SLOTS:
        lengths.insert(0, -(-lengths[0] // 2))

    def branch(length: int) -> Callable[[], jax.Array]:
        def read(x: jax.Array | CacheView) -> jax.Array:
            return x.read(length) if isinstance(x, CacheView) else x[:, :length]

        return lambda: attend_to_first_keys(q_BTHK, read(k_BSGK), read(v_BSGK), mask, scale, biases)

    end = jnp.max(end_B)
    index = sum(((end > length).astype(jnp.int32) for length in lengths[:-1]), jnp.int32(0))
    return lax.switch(index, [branch(length) for length in lengths])


def _end_of_visible(mask: Mask, slots: int) -> jax.Array:
    """An upper bound of ``1 + i`` for each row, [1 or B]; i is the index of the last slot that a query may attend to.

    The bound may be too large, because key segments are compared only with the smallest and the largest query segment
    of the row.
    """
    visible_BS = jnp.ones((1, slots), bool)
    if mask.causal and mask.query_order is not None:
        visible_BS &= mask.key_order <= jnp.max(mask.query_order, axis=1, keepdims=True)
    if mask.query_segments is not None:
        low, high = (f(mask.query_segments, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
        visible_BS &= (mask.key_segments >= low) & (mask.key_segments <= high)
    return jnp.max(jnp.where(visible_BS, jnp.arange(1, slots + 1, dtype=jnp.int32)[None], 0), axis=1)


def attend_to_first_keys(
    q_BTHK: jax.Array, k_BEGK: jax.Array, v_BEGK: jax.Array, mask: Mask, scale: float, biases: Sequence[AttentionBias]
) -> jax.Array:
    """Attention over the first E of the S keys that ``mask`` describes, [B, T, H, V]; see :func:`attention`."""
    T, E = q_BTHK.shape[1], k_BEGK.shape[1]
    products = choices.decode_products(q_BTHK.shape, k_BEGK.shape, k_BEGK.dtype, sharding.num_shards(("heads",)))
    mask_E = dataclasses.replace(
        mask,
        key_order=None if mask.key_order is None else mask.key_order[:, :E],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, :E],
    )
    if products == "kernel":
        end_1 = jnp.full((1,), E, jnp.int32)
        return decode_kernel.attention(q_BTHK, k_BEGK, v_BEGK, mask_E, end_B=end_1, scale=scale, biases=biases)
    if products == "reference":
        return reference.attention(q_BTHK, k_BEGK, v_BEGK, mask_E, scale=scale, biases=biases)
    scores_BHTE = _scores(q_BTHK, k_BEGK, products) * scale
    for bias in biases:
        scores_BHTE = scores_BHTE + dense_bias(bias, T, E)
    probabilities = softmax(scores_BHTE, keep(mask_E, T, E)).astype(v_BEGK.dtype)
    return _weighted_values(probabilities, v_BEGK, products)


def _scores(q_BTHK: jax.Array, k_BEGK: jax.Array, products: choices.DecodeProducts) -> jax.Array:
    """The products of queries and keys, [B, H, T, E] float32."""
    B, T, H, K = q_BTHK.shape
    E, G = k_BEGK.shape[1:3]
    if products == "sums":
        L = choices.decode_partial_sums(K)
        q_BHK, k_BEHK = q_BTHK.reshape(B, H, K).astype(jnp.float32), k_BEGK.astype(jnp.float32)
        parts = [slice(start, start + L) for start in range(0, K, L)]
        sums_BEHL = functools.reduce(jnp.add, (k_BEHK[..., part] * q_BHK[:, None, :, part] for part in parts))
        add_partial_sums = np.repeat(np.eye(H, dtype=np.float32), L, axis=0)  # a matrix [H * L, H]
        return (sums_BEHL.reshape(B, E, H * L) @ add_partial_sums).swapaxes(1, 2)[:, :, None]
    P = sharding.num_shards(("heads",))  # the axis G of the einsum has the G / P key heads of a device
    q_BTPRK = q_BTHK.reshape(B, T, P, H // P, K)
    block_q = jnp.einsum("BTPRK,GR->BPGKTR", q_BTPRK, _reads_key_head(H, G, P).astype(q_BTHK.dtype))
    block_q = block_q.reshape(B, P, -1, T * H // P)
    scores = _dot(_merge_heads(k_BEGK, P), block_q, (((3,), (2,)), ((0, 2), (0, 1))))
    return scores.reshape(B, P, E, T, H // P).transpose(0, 1, 4, 3, 2).reshape(B, H, T, E)


def _weighted_values(p_BHTE: jax.Array, v_BEGV: jax.Array, products: choices.DecodeProducts) -> jax.Array:
    """The sums of the values, weighted by the probabilities, [B, T, H, V] in the dtype of the values."""
    B, H, T, E = p_BHTE.shape
    G, V = v_BEGV.shape[2:]
    if products == "sums":
        weighted = p_BHTE[:, :, 0].swapaxes(1, 2)[..., None].astype(jnp.float32) * v_BEGV.astype(jnp.float32)
        return weighted.sum(axis=1)[:, None].astype(v_BEGV.dtype)
    P = sharding.num_shards(("heads",))
    means = _dot(p_BHTE.reshape(B, P, T * H // P, E), _merge_heads(v_BEGV, P), (((3,), (1,)), ((0, 1), (0, 2))))
    means = means.reshape(B, P, H // P, T, G // P, V)
    out = jnp.einsum("BPRTGV,GR->BTPRV", means, _reads_key_head(H, G, P).astype(np.float32))
    return out.reshape(B, T, H, V).astype(v_BEGV.dtype)


def _reads_key_head(H: int, G: int, P: int) -> np.ndarray:
    """Whether a query head reads a key head, for the heads of one device, [key heads, query heads] bool."""
    return np.arange(G // P)[:, None] == np.arange(H // P) // (H // G)


def _merge_heads(x_BEGK: jax.Array, shards: int) -> jax.Array:
    """``x`` as [B, E, shards, heads of a shard * width]."""
    return x_BEGK.reshape(*x_BEGK.shape[:2], shards, -1)


def _dot(x: Any, y: Any, axes: Any) -> jax.Array:
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)

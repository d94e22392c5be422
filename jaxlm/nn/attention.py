"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Shapes: B batch, T query time, S key time, H query heads, G key and value heads (each is read by H / G query heads), K
head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.nn.attention_bias import AttentionBias, check, dense
from jaxlm.nn.cache import CacheView
from jaxlm.nn.kernels import blockwise_attention, cudnn_attention, decode_attention, pallas_attention, splash
from jaxlm.nn.mask import Mask, keep, softmax
from jaxlm.nn.weight_record import is_recording, record

Implementation = Literal["reference", "blockwise", "decode", "splash", "pallas", "cudnn"]

MIN_BLOCKWISE_QUERIES = 256
"""From this number of queries on, ``blockwise`` is faster. jaxlm also requires O(T) memory from T = 1024 on."""

MIN_BIASED_PALLAS_QUERIES = 64
"""From this number of queries on, biases are computed by ``pallas`` on a TPU. Its smallest block has 128 queries."""
MAX_WHOLE_ROW_KEYS = 1024
"""Up to this number of keys, a TPU is fastest with whole rows, by its compiler's estimate (docs/labbook.md): ``splash``
makes one block of so few keys, so that it does not skip anything that a causal mask hides."""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array | CacheView,
    v_BSGK: jax.Array | CacheView,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    *,
    scale: float | None = None,
    bias: jax.Array | AttentionBias | Sequence[AttentionBias] | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``softmax(scale * q @ k.T + bias + mask) @ v`` for each head, [B, T, H, K] in ``v``'s dtype.

    The softmax is computed in float32. A query that may not attend to any key gives zeros. Dropout is applied to the
    probabilities. Its mask depends only on the random key and on the indices of an entry, so that all implementations
    drop the same entries.

    Args:
        k_BSGK, v_BSGK: arrays, or the view of a cache (``jaxlm.nn.cache``). G divides H. G = H is multi-head attention,
            G = 1 multi-query attention, and any other G grouped-query attention (Ainslie et al. 2023). Query head h
            reads key head ``h // (H / G)``.
        scale: default ``1 / sqrt(K)``.
        bias: added to the scaled scores. One or several attention biases (``jaxlm.nn.attention_bias``,
            ``jaxlm.nn.relative``), which are computed tile by tile; or a dense array [1 or B, 1 or H, T, S], which only
            ``reference`` supports.
        dropout: dropout rate; used only with a ``key``.
        implementation: None chooses the fastest known for the device, the shape and the mask. The choices are

            - ``reference``: the plain definition, O(T*S) memory.
            - ``blockwise``: O(T) memory, custom gradient.
            - ``decode``: for few queries; reads only the filled part of a cache.
            - ``splash``: a TPU kernel without bias, dropout and orders.
            - ``pallas``: a TPU kernel (v5 and later) that works on whole rows, with biases and orders, up to 4096 keys,
              without dropout.
            - ``cudnn``: NVIDIA GPUs, half precision, without bias, dropout, orders and segments.

    Raises:
        ValueError: shapes that do not match, an unknown implementation, or one that does not support a requested
            feature or the platform.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if k_BSGK.shape != (B, S, G, K) or v_BSGK.shape[:3] != (B, S, G) or H % G:
        raise ValueError(
            f"q {q_BTHK.shape}, k {k_BSGK.shape}, v {v_BSGK.shape} must agree in batch and width, and the heads of k "
            "and v must divide those of q"
        )
    array, biases = _split_bias(bias)
    platform = sharding.platform()
    if array is not None and not all(
        size in allowed for size, allowed in zip(array.shape, ((1, B), (1, H), (T,), (S,)), strict=True)
    ):
        raise ValueError(f"bias {array.shape} must be [1 or {B}, 1 or {H}, {T}, {S}]")
    for attention_bias in biases:
        check(attention_bias, B, H)
    if mask.causal and mask.query_order is None and T != S:
        raise ValueError(f"a causal mask over {T} queries and {S} keys needs query_order and key_order")
    if scale is None:
        scale = 1.0 / math.sqrt(K)
    key = key if dropout > 0.0 else None
    any_bias = array if array is not None else biases or None
    reasons = {
        "blockwise": None if array is None else "takes no dense bias",
        "decode": decode_attention.unsupported_reason(array, key),
        "splash": splash.unsupported_reason(mask, any_bias, key),
        "pallas": pallas_attention.unsupported_reason(T, S, biases, array, key),
        "cudnn": cudnn_attention.unsupported_reason(mask, q_BTHK.dtype, any_bias, key),
    }
    if is_recording():
        implementation = "reference"
    elif implementation is None:
        implementation = _best(T, S, array, biases, reasons)
    elif reasons.get(implementation) is None and _PLATFORM.get(implementation, platform) != platform:
        reasons[implementation] = f"is for a {_PLATFORM[implementation]}, and this is compiled for a {platform}"
    if reasons.get(implementation) is not None:
        raise ValueError(
            f"attention implementation {implementation!r} {reasons[implementation]}: leave the implementation out"
        )
    if implementation == "decode":
        return decode_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases)
    k_BSGK, v_BSGK = (x.read(S) if isinstance(x, CacheView) else x for x in (k_BSGK, v_BSGK))
    if implementation == "splash":
        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "pallas":
        return pallas_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases)
    if implementation == "cudnn":
        return cudnn_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "reference":
        for attention_bias in biases:
            array = dense(attention_bias, T, S) if array is None else array + dense(attention_bias, T, S)
        return _reference(q_BTHK, k_BSGK, v_BSGK, mask, scale, array, dropout, key)
    if implementation == "blockwise":
        # On a CPU, one head after the other: the matmuls are two-dimensional and the temporaries stay in cache. On
        # accelerators, and if heads or batch are split over devices, all heads are computed together.
        sequential = platform == "cpu" and sharding.active() is None
        return blockwise_attention.attention(
            q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases, dropout=dropout, key=key, sequential=sequential
        )
    raise ValueError(
        f"no attention implementation {implementation!r}: choose from {', '.join(get_args(Implementation))}"
    )


_PLATFORM = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
"""The platform of each implementation that runs on one platform only."""


def _best(T: int, S: int, array: Any, biases: Any, reasons: dict[str, str | None]) -> Implementation:
    """The fastest implementation known for the device, the shape, the mask and the bias."""
    # Few queries and many keys: a decoder over its cache or over a source.
    is_decoding = T <= decode_attention.MAX_QUERIES and S > 2 * decode_attention.MIN_SLOTS_READ
    if is_decoding and reasons["decode"] is None:
        return "decode"
    if biases and T >= MIN_BIASED_PALLAS_QUERIES and sharding.platform() == "tpu" and reasons["pallas"] is None:
        return "pallas"
    if T < MIN_BLOCKWISE_QUERIES or array is not None:
        return "reference"
    kernels: tuple[Implementation, ...] = ("pallas", "splash") if S <= MAX_WHOLE_ROW_KEYS else ("splash", "pallas")
    for name in (*kernels, "cudnn"):
        if sharding.platform() == _PLATFORM[name] and reasons[name] is None:
            return name
    return "blockwise"


def _split_bias(bias: Any) -> tuple[jax.Array | None, tuple[AttentionBias, ...]]:
    """The dense array and the biases in the argument ``bias``."""
    if isinstance(bias, AttentionBias):
        return None, (bias,)
    if bias is None or hasattr(bias, "shape"):
        return bias, ()
    return None, tuple(bias)


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
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    grouped = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", grouped, k, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, S) * scale
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.astype(jnp.float32)
    probabilities = softmax(scores_BHTS, keep(mask, T, S))
    record(probabilities, "causal" if mask.causal else "bidirectional")
    if key is not None:
        rows = jnp.arange(B * H * T, dtype=jnp.uint32)
        kept_rows = blockwise_attention.dropout_keep(key, rows, S, dropout).reshape(B, H, T, S)
        probabilities = jnp.where(kept_rows, probabilities / (1.0 - dropout), 0.0)
    mixed = jnp.einsum("BGRTS,BSGK->BTGRK", probabilities.astype(v.dtype).reshape(B, G, H // G, T, S), v)
    return mixed.reshape(B, T, H, v.shape[-1])

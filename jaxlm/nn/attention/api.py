"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Shapes: B batch, T query time, S key time, H query heads, G key and value heads (each is used by H / G query heads), K
head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxlm.nn import choices
from jaxlm.nn.attention import blockwise, cudnn, decode, pallas, reference, splash
from jaxlm.nn.attention.bias import AttentionBias, Dense, check_bias_shapes
from jaxlm.nn.attention.cache import CacheView
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.weight_record import is_recording
from jaxlm.spec import require_arrays

Implementation = choices.AttentionImplementation


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
    """``softmax(scale * q @ k.T + bias + mask) @ v`` for each head, [B, T, H, width of v] in ``v``'s dtype.

    The softmax is computed in float32. A query that may not attend to any key gives zeros. Dropout is applied to the
    probabilities. With threefry keys (JAX's default), whether an entry is dropped depends only on the random key and
    on the indices of the entry. So ``reference`` and ``blockwise`` drop the same entries.

    Args:
        q_BTHK: the queries.
        k_BSGK, v_BSGK: the keys and values, as arrays or as views of a cache (``jaxlm.nn.attention.cache``). G divides
            H. G = H is multi-head attention, G = 1 multi-query attention, and any other G grouped-query attention
            (Ainslie et al. 2023). Query head h reads key head ``h // (H / G)``.
        mask: which keys each query may attend to. Default: all keys.
        scale: factor of the scores. Default: ``1 / sqrt(K)``.
        bias: added to the scaled scores. It is either a dense array [1 or B, 1 or H, T, S], or one or several attention
            biases (``jaxlm.nn.attention.bias``, ``jaxlm.nn.attention.distance_bias``). ``blockwise``
            computes attention biases tile by tile, ``reference`` and ``decode`` compute dense arrays, and ``pallas``
            uses both ways.
        dropout, key: dropout rate and random key. Without a key, there is no dropout.
        implementation: None chooses the fastest one known for the platform and the arguments. While attention weights
            are recorded (``jaxlm.nn.weight_record``), and for an empty batch, ``reference`` is always used. The
            implementations are

            - ``reference``: the plain definition, O(T*S) memory.
            - ``blockwise``: O(T) memory, custom gradient.
            - ``decode``: for few queries; reads only the filled part of a cache; no dropout.
            - ``splash``: a TPU kernel; no biases, no dropout, no ``Mask.query_order``, no mesh that splits the
              time axis.
            - ``pallas``: a TPU kernel (v5 and later) that computes whole rows of scores; supports ``Mask.query_order``
              and biases with a ``KernelBiasFn``; dense biases only if G = H, and with at most 512 queries and keys;
              with other biases or none, at most 4096 keys; these limits are lower if many heads are in one block; no
              dropout, no mesh that splits the time axis.
            - ``cudnn``: NVIDIA GPUs (Ampere and later), half precision; head widths that are multiples of 8 up to 128,
              the same for keys and values; no biases, no dropout, no ``Mask.query_order``, no
              ``Mask.query_segments``, no mesh that splits the time axis.

    Raises:
        ValueError: shapes that do not match, an unknown implementation, or an implementation that does not support the
            arguments or the platform.
        TypeError: an argument is not an array.
    """
    _check_shapes(q_BTHK, k_BSGK, v_BSGK, mask)
    S = k_BSGK.shape[1]
    biases = _attention_biases(bias, q_BTHK.shape, S)
    if scale is None:
        scale = 1.0 / math.sqrt(q_BTHK.shape[3])
    key = key if dropout > 0.0 else None
    implementation = _choose(q_BTHK, k_BSGK, v_BSGK, mask, biases, key, implementation)
    if implementation == "decode":
        return decode.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases)
    k_BSGK, v_BSGK = (x.read(S) if isinstance(x, CacheView) else x for x in (k_BSGK, v_BSGK))
    if implementation == "splash":
        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "pallas":
        return pallas.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases)
    if implementation == "cudnn":
        return cudnn.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "reference":
        return reference.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases, dropout=dropout, key=key)
    return blockwise.attention(
        q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, biases=biases, dropout=dropout, key=key,
        sequential=choices.loop_over_heads(),
    )  # fmt: skip


def _check_shapes(q_BTHK: jax.Array, k_BSGK: Any, v_BSGK: Any, mask: Mask) -> None:
    arrays = {"q_BTHK": q_BTHK, "k_BSGK": k_BSGK, "v_BSGK": v_BSGK}
    require_arrays(**{name: x for name, x in arrays.items() if not isinstance(x, CacheView)})
    if any(len(x.shape) != 4 for x in (q_BTHK, k_BSGK, v_BSGK)) or not q_BTHK.shape[1] or not k_BSGK.shape[1]:
        raise ValueError(
            f"q {q_BTHK.shape}, k {k_BSGK.shape}, v {v_BSGK.shape} must be [batch, time, heads, width], with at "
            "least one query and one key"
        )
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    for name, length in (("query_segments", T), ("key_segments", S), ("query_order", T), ("key_order", S)):
        x = getattr(mask, name)
        require_arrays(**{name: x})
        if x is not None and (x.shape[:1] not in ((1,), (B,)) or x.shape[1:] != (length,)):
            raise ValueError(f"{name} {x.shape} must be [1 or {B}, {length}]")
    if k_BSGK.shape != (B, S, G, K) or v_BSGK.shape[:3] != (B, S, G) or not G or H % G:
        raise ValueError(
            f"q {q_BTHK.shape}, k {k_BSGK.shape}, v {v_BSGK.shape} do not match: for q [B, T, H, K], k must be "
            "[B, S, G, K] and v must be [B, S, G, any width], where G divides H"
        )
    if mask.causal and mask.query_order is None and T != S:
        raise ValueError(f"a causal mask over {T} queries and {S} keys needs query_order and key_order")


def _choose(
    q_BTHK: jax.Array, k_BSGK: Any, v_BSGK: Any, mask: Mask, biases: tuple[AttentionBias, ...], key: jax.Array | None,
    implementation: Implementation | None,
) -> Implementation:  # fmt: skip
    """The implementation to run: ``implementation``, or the fastest known one if ``implementation`` is None.

    While attention weights are recorded, and for an empty batch, the result is always ``reference``.
    """
    is_known = implementation in (None, *get_args(Implementation))
    if is_known and (is_recording() or not q_BTHK.shape[0]):
        return "reference"
    T, S = q_BTHK.shape[1], v_BSGK.shape[1]
    reasons = {
        "decode": None if key is None else "has no dropout",
        "splash": splash.unsupported_reason(mask, biases, key),
        "pallas": pallas.unsupported_reason((q_BTHK, k_BSGK, v_BSGK), mask, biases, key),
        "cudnn": cudnn.unsupported_reason(mask, q_BTHK.dtype, q_BTHK.shape[-1], v_BSGK.shape[-1], biases, key),
    }
    choices.check_implementation("attention", implementation, Implementation, reasons)
    return implementation or choices.attention(T, S, biases=bool(biases), reasons=reasons)


def _attention_biases(bias: Any, q_shape: tuple[int, ...], S: int) -> tuple[AttentionBias, ...]:
    """The argument ``bias`` as a tuple of attention biases, after a check of their shapes."""
    B, T, H, _ = q_shape
    if hasattr(bias, "shape"):
        if bias.shape not in itertools.product({1, B}, {1, H}, {T}, {S}):
            raise ValueError(f"bias {bias.shape} must be [1 or {B}, 1 or {H}, {T}, {S}]")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            bias = bias.astype(jnp.float32)
        bias = AttentionBias(Dense(), {"bias": bias})
    biases = () if bias is None else (bias,) if isinstance(bias, AttentionBias) else tuple(bias)
    for attention_bias in biases:
        if not isinstance(attention_bias, AttentionBias):
            require_arrays(bias=bias)
        check_bias_shapes(attention_bias, B, H)
    return biases

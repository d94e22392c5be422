"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): one function, several implementations.

Shapes: B batch, T query time, S key time, H heads, G heads of keys and values (each serves H / G query heads), K head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.nn.cache import Slots
from jaxlm.nn.kernels import blockwise_attention, cudnn_attention, decode_attention, pallas_attention, splash
from jaxlm.nn.mask import Mask, keep, softmax
from jaxlm.nn.term import Term, check, dense
from jaxlm.nn.weight_record import is_recording, record

Implementation = Literal["reference", "blockwise", "decode", "splash", "pallas", "cudnn"]

BLOCKWISE_FROM = 256
"""Queries from which blocks pay off; from T = 1024 on, O(T) memory is a rule of the house and not a choice."""

TERMS_FROM = 64
"""Queries from which terms are worth a kernel of their own on a TPU: a block of it has 128."""
WHOLE_ROWS = 1024
"""Keys up to which a TPU is fastest with whole rows, by its compiler's estimate (docs/labbook.md): of so many, splash
makes one block, and leaves out nothing that a causal mask hides."""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array | Slots,
    v_BSGK: jax.Array | Slots,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    *,
    scale: float | None = None,
    bias: jax.Array | Term | Sequence[Term] | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """``softmax(scale * q @ k.T + bias + mask) @ v`` for each head, [B, T, H, K] in ``v``'s dtype; softmax in float32.

    A query that may see no key at all gives zeros. Dropout acts on the probabilities; its mask depends on the key and
    the place in the matrix only, so every implementation drops the same entries.

    Args:
        k_BSGK, v_BSGK: G divides H. G = H is the usual attention, G = 1 multi-query, between them grouped queries
            (Ainslie et al. 2023); query head h reads key head ``h // (H / G)``. A cache gives its slots of a layer.
        scale: defaults to ``1 / sqrt(K)``.
        bias: what is added to the scaled scores: a term or several (``jaxlm.nn.relative``), made as they are needed. Or
            a dense array [1 or B, 1 or H, T, S], which only ``reference`` takes.
        dropout: rate; acts only with a ``key``.
        implementation: ``reference`` (short, O(T*S) memory), ``blockwise`` (O(T) memory, own gradient), ``decode`` (few
            queries, reads no more of a cache than is filled), ``splash`` (a TPU kernel; no bias, dropout or orders),
            ``pallas`` (a TPU kernel of whole rows, from v5 on, with terms and orders; up to 4096 keys, no dropout),
            ``cudnn`` (NVIDIA; half precision, no bias, dropout, orders or segments), or None for the best that is known
            for the device, the shape and the mask.

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
    array, terms = _bias(bias)
    platform = sharding.platform()
    if array is not None and not all(
        size in allowed for size, allowed in zip(array.shape, ((1, B), (1, H), (T,), (S,)), strict=True)
    ):
        raise ValueError(f"bias {array.shape} must be [1 or {B}, 1 or {H}, {T}, {S}]")
    for term in terms:
        check(term, B, H)
    if mask.causal and mask.query_order is None and T != S:
        raise ValueError(f"a causal mask over {T} queries and {S} keys needs query_order and key_order")
    if scale is None:
        scale = 1.0 / math.sqrt(K)
    key = key if dropout > 0.0 else None
    given = array if array is not None else terms or None
    refusals = {
        "blockwise": None if array is None else "takes no dense bias",
        "decode": decode_attention.refusal(array, key),
        "splash": splash.refusal(mask, given, key),
        "pallas": pallas_attention.refusal(T, S, terms, array, key),
        "cudnn": cudnn_attention.refusal(mask, q_BTHK.dtype, given, key),
    }
    if is_recording():
        implementation = "reference"
    elif implementation is None:
        implementation = _best(T, S, array, terms, refusals)
    elif refusals.get(implementation) is None and _PLATFORM.get(implementation, platform) != platform:
        refusals[implementation] = f"is for a {_PLATFORM[implementation]}, and this is compiled for a {platform}"
    if refusals.get(implementation) is not None:
        raise ValueError(
            f"attention implementation {implementation!r} {refusals[implementation]}: leave the implementation out"
        )
    if implementation == "decode":
        return decode_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, terms=terms)
    k_BSGK, v_BSGK = (x.first(S) if isinstance(x, Slots) else x for x in (k_BSGK, v_BSGK))
    if implementation == "splash":
        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "pallas":
        return pallas_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, terms=terms)
    if implementation == "cudnn":
        return cudnn_attention.attention(q_BTHK, k_BSGK, v_BSGK, mask, scale=scale)
    if implementation == "reference":
        for term in terms:
            array = dense(term, T, S) if array is None else array + dense(term, T, S)
        return _reference(q_BTHK, k_BSGK, v_BSGK, mask, scale, array, dropout, key)
    if implementation == "blockwise":
        # One head after the other keeps a CPU's matmuls two-dimensional and its temporaries in cache. Where heads or
        # batch are split over devices, and on accelerators, all heads go together.
        sequential = platform == "cpu" and sharding.active() is None
        return blockwise_attention.attention(
            q_BTHK, k_BSGK, v_BSGK, mask, scale=scale, terms=terms, dropout=dropout, key=key, sequential=sequential
        )
    raise ValueError(
        f"no attention implementation {implementation!r}: choose from {', '.join(get_args(Implementation))}"
    )


_PLATFORM = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}


def _best(T: int, S: int, array: Any, terms: Any, refusals: dict[str, str | None]) -> Implementation:
    """The best implementation that is known for the device, the shape and what is added to the scores."""
    decodes = T <= decode_attention.QUERIES and S > 2 * decode_attention.SHORTEST  # over a cache, or over a source
    if decodes and refusals["decode"] is None:
        return "decode"
    if terms and T >= TERMS_FROM and sharding.platform() == "tpu" and refusals["pallas"] is None:
        return "pallas"
    if T < BLOCKWISE_FROM or array is not None:
        return "reference"
    kernels: tuple[Implementation, ...] = ("pallas", "splash") if S <= WHOLE_ROWS else ("splash", "pallas")
    for name in (*kernels, "cudnn"):
        if sharding.platform() == _PLATFORM[name] and refusals[name] is None:
            return name
    return "blockwise"


def _bias(bias: Any) -> tuple[jax.Array | None, tuple[Term, ...]]:
    """The dense array and the terms of what a caller gives."""
    if isinstance(bias, Term):
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

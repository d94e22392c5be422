"""Attention of a few queries over a cache: its cost follows what the cache holds and not what it has room for.

The slots that anybody may see are read, rounded up to one of a few lengths: each is a branch of its own. On a CPU and a
TPU all heads are one matmul, ``k [E, G*K] @ q [G*K, T*H]``, with zeros where query and key are of different heads: that
is more arithmetic than is needed, but a product for each head would first copy the cache into another order.
Shapes as in ``jaxlm.nn.attention``; E slots read.
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
from jaxlm.devices import LANES
from jaxlm.nn.cache import Slots
from jaxlm.nn.mask import Mask, keep, softmax
from jaxlm.nn.term import Term, dense

QUERIES = 8
"""Queries up to which this pays off."""
SHORTEST = 128
"""Fewest slots that are read; each further branch reads twice as many."""


def refusal(bias: jax.Array | None, key: jax.Array | None) -> str | None:
    """Why this cannot be done here, as the end of a sentence, or None."""
    if bias is not None:
        return "takes no dense bias"
    return None if key is None else "drops nothing"


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array | Slots,
    v_BSGK: jax.Array | Slots,
    mask: Mask,
    *,
    scale: float,
    terms: tuple[Term, ...],
) -> jax.Array:
    """See ``jaxlm.nn.attention.attention``."""
    S = k_BSGK.shape[1]
    lengths = [S]
    while lengths[0] > 2 * SHORTEST:
        lengths.insert(0, -(-lengths[0] // 2))

    def branch(length: int) -> Callable[[], jax.Array]:
        def read(x: jax.Array | Slots) -> jax.Array:
            return x.first(length) if isinstance(x, Slots) else x[:, :length]

        return lambda: attend(q_BTHK, read(k_BSGK), read(v_BSGK), mask, scale, terms)

    end = _end(mask, S)
    longer = sum(((end > length).astype(jnp.int32) for length in lengths[:-1]), jnp.int32(0))
    return lax.switch(longer, [branch(length) for length in lengths])


def _end(mask: Mask, slots: int) -> jax.Array:
    """One more than the last slot that any query may see."""
    seen_BS = jnp.ones((1, slots), bool)
    if mask.query_order is not None:
        seen_BS &= mask.key_order <= jnp.max(mask.query_order, axis=1, keepdims=True)
    if mask.query_segments is not None:
        low, high = (f(mask.query_segments, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
        seen_BS &= (mask.key_segments >= low) & (mask.key_segments <= high)
    return jnp.max(jnp.where(seen_BS, jnp.arange(1, slots + 1, dtype=jnp.int32)[None], 0))


def attend(
    q_BTHK: jax.Array, k_BEGK: jax.Array, v_BEGK: jax.Array, mask: Mask, scale: float, terms: Sequence[Term]
) -> jax.Array:
    """As :func:`attention`, over the first E keys only."""
    B, T, H, K = q_BTHK.shape
    E, G, V = k_BEGK.shape[1], k_BEGK.shape[2], v_BEGK.shape[3]
    active = sharding.active()
    P = 1 if active is None else active.pieces(("heads",))  # devices that share the heads: each has its own product
    flat = sharding.platform() in ("cpu", "tpu") and G % P == 0
    same = np.arange(G // P)[:, None] == np.arange(H // P) // (H // G) if flat else np.zeros(())
    if flat:
        own_BTPRK = q_BTHK.reshape(B, T, P, H // P, K)
        spread = jnp.einsum("BTPRK,GR->BPGKTR", own_BTPRK, same.astype(q_BTHK.dtype)).reshape(B, P, -1, T * H // P)
        spread = jnp.pad(spread, ((0, 0), (0, 0), (0, _missing(spread.shape[2])), (0, 0)))
        scores = _dot(_flat(k_BEGK, P), spread, (((3,), (2,)), ((0, 2), (0, 1))))
        scores = scores.reshape(B, P, E, T, H // P).transpose(0, 1, 4, 3, 2).reshape(B, H, T, E)
    else:
        grouped = q_BTHK.reshape(B, T, G, H // G, K)
        scores = jnp.einsum("BTGRK,BEGK->BGRTE", grouped, k_BEGK, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, H, T, E)
    scores_BHTE = scores * scale
    for term in terms:
        scores_BHTE = scores_BHTE + dense(term, T, E)
    shorter = dataclasses.replace(
        mask,
        key_order=None if mask.key_order is None else mask.key_order[:, :E],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, :E],
    )
    probabilities = softmax(scores_BHTE, keep(shorter, T, E)).astype(v_BEGK.dtype)
    if flat:
        own = probabilities.reshape(B, P, T * H // P, E)
        mixed = _dot(own, _flat(v_BEGK, P), (((3,), (1,)), ((0, 1), (0, 2))))[..., : G // P * V]
        mixed = mixed.reshape(B, P, H // P, T, G // P, V)
        out = jnp.einsum("BPRTGV,GR->BTPRV", mixed, same.astype(np.float32))
        return out.reshape(B, T, H, V).astype(v_BEGK.dtype)
    grouped = probabilities.reshape(B, G, H // G, T, E)
    return jnp.einsum("BGRTE,BEGV->BTGRV", grouped, v_BEGK).reshape(B, T, H, V)


def _flat(x_BEGK: jax.Array, pieces: int) -> jax.Array:
    """All heads of a piece side by side, and on a TPU zeros up to whole vectors, [B, E, P, ...]."""
    x = x_BEGK.reshape(*x_BEGK.shape[:2], pieces, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, _missing(x.shape[3]))))


def _missing(width: int) -> int:
    """What a TPU's vectors are not filled by. Unpadded, its compiler turns the whole cache round for every layer, to
    have slots where vectors are and not heads (docs/labbook.md)."""
    return -width % LANES if sharding.platform() == "tpu" else 0


def _dot(x: Any, y: Any, axes: Any) -> jax.Array:
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)

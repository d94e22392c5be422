"""Attention masks as algebra on integers, never a dense array handed around.

    keep[q, k] = segment(q) == segment(k)  and  order(k) <= order(q)  and  order(q) - order(k) < window

Causal, bidirectional, sliding window, packed documents, padding and cached decoding are all this, by choice of the
integers. Shapes: B batch, T query time, S key time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mask:
    """Who may see whom. ``Mask()`` lets everyone see everyone; ``Mask(causal=True)`` is the usual triangle.

    Attributes:
        causal: compare orders at all. Without given orders, the order is the index; queries and keys start together.
        window: a query sees only the last ``window`` orders, itself included. Needs ``causal``.
        query_order / key_order: [B, T] / [B, S] int32, both or neither.
        query_segments / key_segments: [B, T] / [B, S] int32, both or neither. 0 is padding: pads see only pads.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)
    query_order: Any = None
    key_order: Any = None
    query_segments: Any = None
    key_segments: Any = None

    def __post_init__(self) -> None:
        for one, two in (("query_order", "key_order"), ("query_segments", "key_segments")):
            if (getattr(self, one) is None) != (getattr(self, two) is None):
                raise ValueError(f"a mask takes {one} and {two} together, got only one of them")
        if self.window is not None and (not self.causal or self.window < 1):
            raise ValueError(f"window={self.window} needs causal=True and a size of at least 1")

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """The four integer arrays (or None): what a kernel slices."""
        return self.query_order, self.key_order, self.query_segments, self.key_segments


def keep(mask: Mask, queries: int, keys: int) -> jax.Array | None:
    """The dense mask [B or 1, T, S] of bools, or None when everything is kept: for reference and small blocks."""
    orders, segments = (mask.query_order, mask.key_order), (mask.query_segments, mask.key_segments)
    if mask.causal and mask.query_order is None:
        orders = jnp.arange(queries)[None], jnp.arange(keys)[None]

    def met(query_BT: Any, key_BS: Any) -> Any:
        return None if query_BT is None else (query_BT[:, :, None], key_BS[:, None, :])

    return keep_pairs(mask, met(*orders), met(*segments))


def keep_pairs(mask: Mask, orders: Any, segments: Any) -> jax.Array | None:
    """:func:`keep` of queries and keys whose orders (for a causal mask) and segments are given in pairs of arrays that
    broadcast against each other, or as None."""
    kept = None if segments is None else segments[0] == segments[1]
    if mask.causal:
        distance = orders[0] - orders[1]
        ordered = distance >= 0
        if mask.window is not None:
            ordered &= distance < mask.window
        kept = ordered if kept is None else kept & ordered
    return kept


def softmax(scores_BHTS: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Probabilities over the keys that are ``kept`` ([B or 1, T, S], of :func:`keep`); zeros where there are none."""
    if kept is not None:
        scores_BHTS = jnp.where(kept[:, None], scores_BHTS, -jnp.inf)
    top = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    exp_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0)))
    total = jnp.sum(exp_BHTS, axis=-1, keepdims=True)
    return exp_BHTS / jnp.where(total > 0.0, total, 1.0)

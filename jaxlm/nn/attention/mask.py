"""Attention masks, described by a few integers per token instead of a dense array.

    keep[q, k] = segment(q) == segment(k)  and  order(k) <= order(q)  and  order(q) - order(k) < window

The first condition exists only with segments, the second only with ``causal``, the third only with a ``window``. These
integers describe causal and bidirectional attention, sliding windows, packed documents, padding and cached
decoding. Shapes: B batch, T query time, S key time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.nn.segments import document_numbers


@struct.dataclass
class Mask:
    """Which keys each query may attend to. ``Mask()`` masks nothing; ``Mask(causal=True)`` is the causal mask.

    Attributes:
        causal: a query attends only to keys with ``order(k) <= order(q)``. The default order of a query or key is its
            index.
        window: a query attends only to keys with ``order(q) - order(k) < window``. Needs ``causal``.
        query_order / key_order: [1 or B, T] / [1 or B, S] integers; give both or neither. Used only with ``causal``,
            as int32.
        query_segments / key_segments: [1 or B, T] / [1 or B, S] integers; give both or neither. 0 (or a negative
            id) is padding, which attends only to padding.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)
    query_order: Any = None
    key_order: Any = None
    query_segments: Any = None
    key_segments: Any = None

    def __post_init__(self) -> None:
        for query, key in (("query_order", "key_order"), ("query_segments", "key_segments")):
            if (getattr(self, query) is None) != (getattr(self, key) is None):
                raise ValueError(f"a mask takes {query} and {key} together, got only one of them")
        if self.window is not None and (not self.causal or self.window < 1):
            raise ValueError(f"window={self.window} needs causal=True and a size of at least 1")

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """The four integer arrays as int32, each of which may be None."""
        arrays = self.query_order, self.key_order, self.query_segments, self.key_segments
        return jax.tree.map(lambda x: x.astype(jnp.int32), arrays)  # differences of unsigned orders would wrap


def document_mask(segment_ids: jax.Array | None, *, causal: bool = False) -> Mask:
    """The mask of self-attention within each document of a row; without segment ids, each row is one document.

    A segment id that occurs again starts a new document (``jaxlm.nn.segments.document_numbers``).
    """
    documents = None if segment_ids is None else document_numbers(segment_ids)
    return Mask(causal=causal, query_segments=documents, key_segments=documents)


def keep(mask: Mask, queries: int, keys: int) -> jax.Array | None:
    """The dense mask [B or 1, T, S], True where a query may attend to a key; None if nothing is masked.

    The mask needs O(T * S) memory.
    """
    orders, segments = mask.arrays[:2], mask.arrays[2:]
    if mask.causal and mask.query_order is None:
        orders = jnp.arange(queries)[None], jnp.arange(keys)[None]

    def as_column_and_row(query_BT: Any, key_BS: Any) -> Any:
        return None if query_BT is None else (query_BT[:, :, None], key_BS[:, None, :])

    return keep_pairs(mask, as_column_and_row(*orders), as_column_and_row(*segments))


def keep_pairs(mask: Mask, orders: Any, segments: Any) -> jax.Array | None:
    """The dense mask (or None) as in :func:`keep`, from orders and segments instead of a mask's arrays.

    Args:
        mask: only ``causal`` and ``window`` are used.
        orders: (of queries, of keys), two arrays that broadcast against each other; used only if ``mask.causal``.
        segments: (of queries, of keys), two arrays that broadcast against each other; None: one segment.
    """
    visible = None if segments is None else segments[0] == segments[1]
    if mask.causal:
        distance = orders[0] - orders[1]
        in_order = distance >= 0
        if mask.window is not None:
            in_order &= distance < mask.window
        visible = in_order if visible is None else visible & in_order
    return visible


def softmax(scores_BHTS: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Softmax over the keys for which ``kept`` is True; zeros for a query without a visible key.

    Args:
        kept: [B or 1, T, S], from :func:`keep`; None: all keys.
    """
    if kept is not None:
        scores_BHTS = jnp.where(kept[:, None], scores_BHTS, -jnp.inf)
    top = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    exp_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0)))
    total = jnp.sum(exp_BHTS, axis=-1, keepdims=True)
    return exp_BHTS / jnp.where(total > 0.0, total, 1.0)

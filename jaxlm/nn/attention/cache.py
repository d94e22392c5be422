"""The key-value cache: the keys and values that an attention layer keeps from one call to the next.

Every array has an axis with the name ``batch``; beam search, resets and shardings find the axis by this name. A slot
stores one token. ``length`` [B] is the number of used slots of each row. New tokens are appended after these slots, so
the rows of a batch may contain different numbers of tokens. Padding is stored too, with segment id 0, and real tokens
do not attend to padding. The last axis of keys and values contains all heads of a slot (G * K), because a last axis of
width K = 64 would leave half of a TPU's 128 vector lanes empty.

Shapes: L layers, B batch, S slots, T new tokens, G heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.nn.attention.mask import Mask, document_mask
from jaxlm.nn.segments import check_state_rows, document_numbers, positions_in_segments
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.spec import ArraySpec, State


def cache_specs(
    layers: int, batch: int, slots: int, heads: int, head_width: int, dtype: DTypeLike, *, stacked: bool
) -> dict[str, Any]:
    """Specs of an empty cache for ``slots`` tokens per row; ``stacked``: see ``jaxlm.spec.layers``."""
    keys = ArraySpec((batch, slots, heads * head_width), ("batch", "slots", "heads"), dtype=dtype)
    per_slot = ArraySpec((batch, slots), ("batch", "slots"), dtype=jnp.int32)
    return {
        spec.LAYERS: spec.layers([{"key": keys, "value": keys}] * layers, stacked=stacked),
        "segment_ids": per_slot,
        "positions": per_slot,
        "length": ArraySpec((batch,), ("batch",), dtype=jnp.int32),
    }


@struct.dataclass
class CacheView:
    """A view of one layer's slots [B, S, G * K] in the array of all layers, for reads and writes in place.

    A loop over layers that slices each layer's slots out of the array and writes them back would copy the whole cache
    for every token.

    Attributes:
        stack: [L, B, S, G * K]; or, if ``layer`` is None, the array of one layer [B, S, G * K].
        layer: index of the layer.
        heads: G, if the view has the shape [B, S, G, K]; None: the shape is [B, S, G * K].
    """

    stack: jax.Array
    layer: Any = None
    heads: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, S, G * K]; with ``heads``, [B, S, G, K]."""
        *rest, width = self.stack.shape[-3:]
        return (*rest, width) if self.heads is None else (*rest, self.heads, width // self.heads)

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    def read(self, length: int) -> jax.Array:
        """The first ``length`` slots of each row, [B, length, ...]."""
        if self.layer is None:
            slots = self.stack[:, :length]
        else:
            sizes = (1, self.stack.shape[1], length, self.stack.shape[3])
            slots = lax.dynamic_slice(self.stack, (self.layer, 0, 0, 0), sizes)
        return slots.reshape(self.shape[0], length, *self.shape[2:])

    def append(self, new_BT: jax.Array, length_B: jax.Array) -> CacheView:
        """The view after ``new`` is written into each row, starting at the row's ``length``; see :func:`append`."""
        B, T = new_BT.shape[:2]
        slot_BT = length_B[:, None] + jnp.arange(T, dtype=length_B.dtype)[None, :]
        rows = jnp.arange(B)[:, None]
        new = new_BT.reshape(B, T, self.stack.shape[-1]).astype(self.stack.dtype)
        index = (rows, slot_BT) if self.layer is None else (self.layer, rows, slot_BT)
        return dataclasses.replace(self, stack=self.stack.at[index].set(new, unique_indices=True))


def updates_in_place(state: State | None, num_new: int) -> bool:
    """Whether a loop over layers should update the cache in place.

    True if the cache has at least 8 slots per new token. False without a state.
    """
    return state is not None and _is_small_update(num_new, state["segment_ids"].shape[1])


def _is_small_update(num_new: int, slots: int) -> bool:
    return 8 * num_new <= slots


def append(slots_BS: Any, new_BT: jax.Array, length_B: jax.Array) -> Any:
    """``slots`` [B, S, ...] with ``new`` [B, T, ...] written into each row, starting at the row's ``length``.

    The contents of a row are undefined if it has fewer than T free slots (``CacheContext.fits_B``).
    """
    if isinstance(slots_BS, CacheView):
        return slots_BS.append(new_BT, length_B)
    if slots_BS.ndim == 3 and _is_small_update(new_BT.shape[1], slots_BS.shape[1]):
        # On a TPU, with bfloat16 and several rows, XLA turns the update at the end of this function into a float32
        # scatter, which converts the whole cache. ``CacheView.append`` stays in bfloat16 (docs/labbook.md).
        return CacheView(slots_BS).append(new_BT, length_B).stack
    if slots_BS.ndim == 2 and new_BT.shape[1] == 1:
        # On a TPU, XLA turns the update at the end of this function into a loop over the rows.
        is_new_BS = jnp.arange(slots_BS.shape[1])[None] == length_B[:, None]
        return jnp.where(is_new_BS, new_BT.astype(slots_BS.dtype), slots_BS)
    new_BT = new_BT.reshape(*new_BT.shape[:2], *slots_BS.shape[2:]).astype(slots_BS.dtype)
    write = lambda row, new, start: lax.dynamic_update_slice_in_dim(row, new, start, 0)  # noqa: E731
    return jax.vmap(write)(slots_BS, new_BT, length_B)


def split_heads(kv: Any, heads: int) -> tuple[Any, Any]:
    """Views [B, S, G, K] of a layer's cached keys and values, for attention; G is ``heads``."""
    # A plain array becomes a view as well. If it were reshaped to [B, S, G, K] here, XLA would keep a copy in each
    # shape and write the new tokens into both.
    key, value = (x if isinstance(x, CacheView) else CacheView(x) for x in (kv["key"], kv["value"]))
    return dataclasses.replace(key, heads=heads), dataclasses.replace(value, heads=heads)


def append_and_read(kv: Any, new: tuple[jax.Array, jax.Array], context: CacheContext) -> tuple[Any, tuple[Any, Any]]:
    """A layer's cache with ``new`` keys and values appended, and the keys and values that attention reads.

    Args:
        kv: ``key`` and ``value`` of the layer; None: no cache, attention reads only the new keys and values.
        new: keys and values of the new tokens, each [B, T, G, K].

    Returns:
        The cache in the layout of ``kv``, and (keys, values), each [B, S, G, K]. If ``kv`` is None, the cache is None,
        and (keys, values) is ``new``.
    """
    if kv is None:
        return None, new
    assert context.start_B is not None
    kv = {name: append(kv[name], x, context.start_B) for name, x in zip(("key", "value"), new, strict=True)}
    return kv, split_heads(kv, new[0].shape[2])


def num_slots(specs: spec.Tree, state: State | None) -> int | None:
    """The number of slots of the cache in ``state`` (arrays or specs); None if it contains no cache."""
    sizes = spec.map_axis(specs, "slots", lambda leaf, axis: leaf.shape[axis], state, optional=True)
    return next((size for size in jax.tree.leaves(sizes) if isinstance(size, int)), None)


def resize(specs: spec.Tree, state: State | None, slots: int) -> Any:
    """The state with ``slots`` slots in each cache.

    If a cache has more slots, only its first ``slots`` are kept. If it has fewer, empty slots are added at its end.
    Arrays without an axis ``slots`` are returned unchanged.
    """

    def resize_leaf(leaf: jax.Array, axis: int) -> jax.Array:
        if leaf.shape[axis] >= slots:
            return lax.slice_in_dim(leaf, 0, slots, axis=axis)
        return pad_axis(leaf, 0, slots - leaf.shape[axis], axis=axis)

    return spec.map_axis(specs, "slots", resize_leaf, state, optional=True)


def rollback(state: State, dropped_B: jax.Array) -> State:
    """The state without the last ``dropped`` tokens of each row, where padding counts as a token."""
    length_B = state["length"] - dropped_B.astype(state["length"].dtype)
    is_kept_BS = jnp.arange(state["segment_ids"].shape[1])[None, :] < length_B[:, None]
    return {**state, "length": length_B, "segment_ids": jnp.where(is_kept_BS, state["segment_ids"], 0)}


def last_real_slot(state: State) -> tuple[jax.Array, jax.Array]:
    """The slot [B, 1] and the segment id [B] of the last real token of each row; both are 0 for a row without one."""
    slot_S = jnp.arange(state["segment_ids"].shape[1], dtype=jnp.int32)
    last_B1 = jnp.argmax(jnp.where(state["segment_ids"] > 0, slot_S[None, :], -1), axis=1, keepdims=True)
    return last_B1, jnp.take_along_axis(state["segment_ids"], last_B1, axis=1)[:, 0]


@struct.dataclass
class CacheContext:
    """The positions, the mask and the slots of the new tokens of a call.

    Attributes:
        segment_ids: [B, T] of the new tokens; None if there is no state and the caller gave no segment ids.
        positions: [B, T] of the new tokens.
        mask: which keys (cached and new) each new token may attend to.
        start_B: the slot of each row's first new token; None without a state.
        fits_B: False for a row whose cache is too short for the new tokens; None without a state.
    """

    segment_ids: jax.Array | None
    positions: jax.Array
    mask: Mask
    start_B: jax.Array | None
    fits_B: jax.Array | None


def with_window(context: CacheContext, window: int, state: State | None) -> CacheContext:
    """The context with a sliding window: a token attends to at most the last ``window`` tokens, itself included.

    With a cache, ``query_order`` and ``key_order`` of the mask become counts of real tokens, so that the window does
    not count padding. Without a cache, the window counts all indices, also those of padding. So the caller must not
    put padding between tokens.

    Args:
        state: the state that :func:`make_context` returned; None: no cache.
    """
    mask = context.mask
    if state is not None:
        count_BS = jnp.cumsum(state["segment_ids"] > 0, axis=1, dtype=jnp.int32)
        query_order = jnp.take_along_axis(count_BS, mask.query_order, axis=1)
        mask = dataclasses.replace(mask, query_order=query_order, key_order=count_BS)
    return dataclasses.replace(context, mask=dataclasses.replace(mask, window=window))


def make_context(
    tokens_BT: jax.Array, state: State | None, segment_ids: jax.Array | None, positions: Any
) -> tuple[CacheContext, Any]:
    """The :class:`CacheContext` of new tokens, and the next state (None without a state).

    The next state already contains the segment ids and the positions of the new tokens. Their keys and values are not
    in it yet: each layer appends its own (:func:`append_and_read`).

    Args:
        segment_ids: [B, T]; None: all new tokens belong to document 1.
        positions: [B, T]; None: positions within the document, continued from the tokens in the state.

    Raises:
        ValueError: there are more new tokens than the state has slots, or the state has another number of rows.
    """
    B, T = tokens_BT.shape
    if state is None:
        mask = document_mask(segment_ids, causal=True)
        if positions is None:
            ones = jnp.ones((B, T), jnp.int32)
            positions = positions_in_segments(ones if segment_ids is None else segment_ids)
        return CacheContext(segment_ids, positions, mask, None, None), None
    rows, S = state["segment_ids"].shape
    check_state_rows(rows, B)
    if T > S:
        raise ValueError(
            f"{T} new tokens do not fit into a state of {S} slots: create a longer state, such as "
            f"model.init_state(batch, length={T})"
        )
    segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    length_B = state["length"]
    if positions is None:
        last_B1, last_segment_B = last_real_slot(state)
        next_position_B = jnp.take_along_axis(state["positions"], last_B1, axis=1)[:, 0] + 1
        positions = positions_in_segments(segments, jnp.where(last_segment_B > 0, last_segment_B, -1), next_position_B)
    state = {
        **state,
        "segment_ids": append(state["segment_ids"], segments, length_B),
        "positions": append(state["positions"], positions, length_B),
        "length": length_B + T,
    }
    slots_BT = length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    query_documents, key_documents = document_ids(state["segment_ids"], segments, slots_BT)
    mask = Mask(
        causal=True,
        query_order=slots_BT,
        key_order=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None, :], (B, S)),
        query_segments=query_documents,
        key_segments=key_documents,
    )
    return CacheContext(segments, positions, mask, length_B, length_B + T <= S), state


def document_ids(ids_BS: jax.Array, new_ids_BT: jax.Array, slots_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Document ids for the mask: of the new tokens [B, T], and of all slots [B, S].

    Tokens of the same document have the same id. Padding has id 0. A segment id that occurs again after another segment
    id is a new document (``jaxlm.nn.segments.document_numbers``). If T is 1, slots of earlier documents also have id 0,
    because the new token does not attend to them. If T is 1 and the new token is padding, all slots have id 0.

    Args:
        ids_BS: the segment ids of all slots, including the slots of the new tokens.
        new_ids_BT, slots_BT: the segment ids and the slots of the new tokens.
    """
    if new_ids_BT.shape[1] > 1:
        key_documents = document_numbers(ids_BS)
        return jnp.take_along_axis(key_documents, slots_BT, axis=1, mode="clip"), key_documents
    # A single token attends only to the last document. A maximum over the slots is cheaper than their document numbers.
    slot_1S = jnp.arange(ids_BS.shape[1], dtype=jnp.int32)[None]
    is_other_BS = (ids_BS > 0) & (ids_BS != new_ids_BT)
    last_other_B1 = jnp.max(jnp.where(is_other_BS, slot_1S, -1), axis=1, keepdims=True)
    return new_ids_BT, jnp.where(slot_1S > last_other_B1, ids_BS, 0)

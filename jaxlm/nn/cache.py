"""The key-value cache: what an attention layer carries between calls.

Every leaf has a ``batch`` axis, so beams, resets and shardings act on it by name. Each row writes at its own
``length``, so rows of one batch may be at different places. Slots hold what was fed, padding included: a slot of
segment 0 is seen by nobody real. The heads of a slot stand side by side in one axis: one of the width of a head would
leave half of a TPU's vectors empty. Shapes: L layers, B batch, S slots, T new tokens, G heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxlm import spec
from jaxlm.nn.mask import Mask
from jaxlm.nn.position import positions_in_segments
from jaxlm.spec import ArraySpec


def cache_specs(layers: int, batch: int, slots: int, heads: int, kv: int, dtype: Any) -> dict[str, ArraySpec]:
    """Specs of an empty cache of ``slots`` tokens per row for ``layers`` layers."""
    keys = ArraySpec((batch, slots, heads * kv), ("batch", None, "heads"), dtype=dtype)
    slot = ArraySpec((batch, slots), ("batch", None), dtype=jnp.int32)
    return {
        spec.LAYERS: spec.stack(layers, {"key": keys, "value": keys}),
        "segment_ids": slot,
        "positions": slot,
        "length": ArraySpec((batch,), ("batch",), dtype=jnp.int32),
    }


@struct.dataclass
class Slots:
    """The slots of one layer [B, S, G * K] where they stand among those of all layers: written and read in place.

    A loop over layers that took each layer's slots out and put them back would copy the whole cache for every token.
    With ``heads``, they are read as [B, S, G, K]. ``layer`` None: ``all`` are those of one layer, as where layers are
    apart (``spec.unstack``).
    """

    all: jax.Array
    layer: Any = None
    heads: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, S, G * K], or by heads."""
        *most, width = self.all.shape[-3:]
        return (*most, width) if self.heads is None else (*most, self.heads, width // self.heads)

    def first(self, length: int) -> jax.Array:
        """The first ``length`` slots of every row, [B, length, ...]."""
        if self.layer is None:
            first = self.all[:, :length]
        else:
            sizes = (1, self.all.shape[1], length, self.all.shape[3])
            first = lax.dynamic_slice(self.all, (self.layer, 0, 0, 0), sizes)
        return first.reshape(self.shape[0], length, *self.shape[2:])

    def append(self, new_BT: jax.Array, length_B: jax.Array) -> Slots:
        """As :func:`append`."""
        B, T = new_BT.shape[:2]
        slot_BT = length_B[:, None] + jnp.arange(T, dtype=length_B.dtype)[None, :]
        rows = jnp.arange(B)[:, None]
        new = new_BT.reshape(B, T, self.all.shape[-1]).astype(self.all.dtype)
        index = (rows, slot_BT) if self.layer is None else (self.layer, rows, slot_BT)
        return dataclasses.replace(self, all=self.all.at[index].set(new, unique_indices=True))


def stays_in_place(state: Any, new: int) -> bool:
    """Whether a loop over layers had better leave the cache where it is: few new tokens, much room."""
    return state is not None and _are_few(new, state["segment_ids"].shape[1])


def _are_few(new: int, slots: int) -> bool:
    return 8 * new <= slots


def append(slots_BS: Any, new_BT: jax.Array, length_B: jax.Array) -> Any:
    """Write ``new`` [B, T, ...] into ``slots`` [B, S, ...] from each row's ``length`` on."""
    if isinstance(slots_BS, Slots):
        return slots_BS.append(new_BT, length_B)
    if slots_BS.ndim == 3 and _are_few(new_BT.shape[1], slots_BS.shape[1]):
        # Not the update below, which for several rows becomes a scatter in float32 on a TPU (docs/labbook.md).
        return Slots(slots_BS).append(new_BT, length_B).all
    new_BT = new_BT.reshape(*new_BT.shape[:2], *slots_BS.shape[2:]).astype(slots_BS.dtype)
    return jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0))(slots_BS, new_BT, length_B)


def by_heads(kv: Any, heads: int) -> tuple[Any, Any]:
    """A layer's slots of keys and values as attention reads them, [B, S, G, K] of G ``heads``."""

    # Slots of one layer, too, and not reshaped here: XLA would write the new ones into two arrays, one of each shape.
    key, value = (x if isinstance(x, Slots) else Slots(x) for x in (kv["key"], kv["value"]))
    return dataclasses.replace(key, heads=heads), dataclasses.replace(value, heads=heads)


def extended(kv: Any, new: tuple[jax.Array, jax.Array], span: Span) -> tuple[Any, tuple[Any, Any]]:
    """A layer's slots of keys and values with new ones, each [B, T, G, K]: as they are carried, and as attention reads
    them, [B, S, G, K]. Without slots, the new ones are all there are."""
    if kv is None:
        return None, new
    assert span.start_B is not None
    kv = {name: append(kv[name], x, span.start_B) for name, x in zip(("key", "value"), new, strict=True)}
    return kv, by_heads(kv, new[0].shape[2])


def layer(stack: Any, number: Any) -> Any:
    """What of a state's ``layers`` belongs to one of them: :class:`Slots` of a stack, or, apart, what it has itself."""
    return stack[number] if isinstance(stack, tuple) else jax.tree.map(lambda all: Slots(all, number), stack)


@struct.dataclass
class Span:
    """Where the new tokens of a call stand: between what came before (the cache) and what they may see.

    ``mask`` is who sees whom. ``start_B`` is the slot of each row's first new token. ``valid_B`` is False for a row
    whose cache is too short for the new tokens.
    """

    segment_ids: jax.Array
    positions: jax.Array
    mask: Mask
    start_B: jax.Array | None
    valid_B: jax.Array | None


def span(tokens_BT: jax.Array, state: Any, segment_ids: Any, positions: Any) -> tuple[Span, Any]:
    """Positions and mask of new tokens, and the state with everything but keys and values written.

    Segments default to one document (1), positions to those within the document, going on where the state left off.

    Raises:
        ValueError: more new tokens than the state has slots.
    """
    B, T = tokens_BT.shape
    if state is None:
        mask = Mask(causal=True, query_segments=segment_ids, key_segments=segment_ids)
        if positions is None:
            ones = jnp.ones((B, T), jnp.int32)
            positions = positions_in_segments(ones if segment_ids is None else segment_ids)
        return Span(segment_ids, positions, mask, None, None), None
    S = state["segment_ids"].shape[1]
    if T > S:
        raise ValueError(f"{T} new tokens do not fit a state of {S} slots: make it with state_specs(cfg, batch, {T})")
    segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    length_B = state["length"]
    if positions is None:
        slot_S = jnp.arange(S, dtype=jnp.int32)
        last_B1 = jnp.argmax(jnp.where(state["segment_ids"] > 0, slot_S[None, :], -1), axis=1, keepdims=True)
        last_segment_B = jnp.take_along_axis(state["segment_ids"], last_B1, axis=1)[:, 0]
        next_position_B = jnp.take_along_axis(state["positions"], last_B1, axis=1)[:, 0] + 1
        positions = positions_in_segments(segments, jnp.where(last_segment_B > 0, last_segment_B, -1), next_position_B)
    state = {
        **state,
        "segment_ids": append(state["segment_ids"], segments, length_B),
        "positions": append(state["positions"], positions, length_B),
        "length": length_B + T,
    }
    mask = Mask(
        causal=True,
        query_order=length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :],
        key_order=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None, :], (B, S)),
        query_segments=segments,
        key_segments=state["segment_ids"],
    )
    return Span(segments, positions, mask, length_B, length_B + T <= S), state

"""The key-value cache: what an attention layer carries between calls.

Every leaf has a ``batch`` axis, so beams, resets and shardings act on it by name. Each row writes at its own
``length``, so rows of one batch may be at different places. Slots hold what was fed, padding included: a slot of
segment 0 is seen by nobody real. Shapes: L layers, B batch, S slots, T new tokens, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxlm import sharding, spec
from jaxlm.nn.mask import Mask
from jaxlm.nn.position import positions_in_segments
from jaxlm.spec import ArraySpec


def cache_specs(layers: int, batch: int, slots: int, heads: int, kv: int, dtype: Any) -> dict[str, ArraySpec]:
    """Specs of an empty cache of ``slots`` tokens per row for ``layers`` layers."""
    keys = spec.stack(layers, ArraySpec((batch, slots, heads, kv), ("batch", None, "heads", "kv"), dtype=dtype))
    slot = ArraySpec((batch, slots), ("batch", None), dtype=jnp.int32)
    return {
        "key": keys,
        "value": keys,
        "segment_ids": slot,
        "positions": slot,
        "length": ArraySpec((batch,), ("batch",), dtype=jnp.int32),
    }


@struct.dataclass
class Slots:
    """The slots of one layer [B, S, H, K] where they stand among those of all layers: written and read in place.

    A loop over layers that took each layer's slots out and put them back would copy the whole cache for every token.
    """

    all: jax.Array
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, S, H, K]."""
        return self.all.shape[1:]

    def first(self, length: int) -> jax.Array:
        """The first ``length`` slots of every row, [B, length, H, K]."""
        sizes = (1, self.all.shape[1], length, *self.all.shape[3:])
        return lax.dynamic_slice(self.all, (self.layer, *[0] * (len(sizes) - 1)), sizes)[0]

    def append(self, new_BT: jax.Array, length_B: jax.Array) -> Slots:
        """As :func:`append`."""
        B, T = new_BT.shape[:2]
        slot_BT = length_B[:, None] + jnp.arange(T, dtype=length_B.dtype)[None, :]
        rows = jnp.arange(B)[:, None]
        new = self.all.at[self.layer, rows, slot_BT].set(new_BT.astype(self.all.dtype), unique_indices=True)
        return Slots(new, self.layer)


def stays_in_place(state: Any, new: int) -> bool:
    """Whether a loop over layers had better leave the cache where it is: few new tokens, much room, nothing sharded."""
    return state is not None and 8 * new <= state["segment_ids"].shape[1] and sharding.active() is None


def append(slots_BS: Any, new_BT: jax.Array, length_B: jax.Array) -> Any:
    """Write ``new`` [B, T, ...] into ``slots`` [B, S, ...] from each row's ``length`` on."""
    if isinstance(slots_BS, Slots):
        return slots_BS.append(new_BT, length_B)
    return jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), at, 0))(
        slots_BS, new_BT, length_B
    )


@struct.dataclass
class Span:
    """Where the new tokens of a call stand: between what came before (the cache) and what they may see.

    ``mask`` is who sees whom. ``valid_B`` is False for a row whose cache is too short for the new tokens.
    """

    segment_ids: jax.Array
    positions: jax.Array
    mask: Mask
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
        return Span(segment_ids, positions, mask, None), None
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
    return Span(segments, positions, mask, length_B + T <= S), state

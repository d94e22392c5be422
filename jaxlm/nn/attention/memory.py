"""The rolling memory of models with segment recurrence (Transformer-XL, XLNet): the last inputs of every layer.

The memory starts empty. (Hugging Face's Transformer-XL starts with zeros, to which tokens attend.) Old tokens are
dropped. Padding never displaces a token. Every array has an axis with the name ``batch``; beam search, resets and
shardings find the axis by this name. A memory has one of two layouts:

- The usual layout: the newest token of a row is in its last slot. Each call copies all slots, because it returns a new
  memory.
- The decoding layout (:func:`to_decoding_layout`): the tokens of a row are in its first slots, and unused slots follow.
  Each call reads one token, and writes only the slot of this token. On an accelerator, the loops of ``generate`` and
  ``beam_search`` use this layout (``jaxlm.decoding.loop``).

Shapes: B batch, M memory slots, T new tokens, N slots that the decoding layout adds, S keys (M + T, in the decoding
layout M + N), D model width, H heads, K head width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.nn.attention import cache, decode
from jaxlm.nn.attention.bias import AttentionBias
from jaxlm.nn.attention.cache import CacheView
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.segments import check_state_rows, document_numbers
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.spec import ArraySpec, State


def memory_specs(
    layers: int | None, batch: int, slots: int, width: int, dtype: DTypeLike, *, stacked: bool = True
) -> dict[str, Any]:
    """Specs of an empty memory for ``slots`` tokens per row.

    The memory contains ``hidden`` [B, M, width] for each layer, and ``segment_ids`` [B, M] with 0 for an empty slot.
    ``hidden`` are the inputs of a layer. In ``jaxlm.models.attention_rnn_lm``, ``hidden`` contains two concatenated
    vectors for each previous output: its projected key and its value.

    Args:
        layers: number of layers; None: the specs of one layer, with ``hidden`` directly in the dict.
        stacked: see ``jaxlm.spec.layers``.

    Raises:
        ValueError: ``slots`` is less than 1.
    """
    if slots < 1:
        raise ValueError(
            f"a memory needs at least 1 slot, got slots={slots}: enlarge it, or call the model without a state"
        )
    hidden = {"hidden": ArraySpec((batch, slots, width), ("batch", None, "activation_embed"), dtype=dtype)}
    return {
        **(hidden if layers is None else {spec.LAYERS: spec.layers([hidden] * layers, stacked=stacked)}),
        "segment_ids": ArraySpec((batch, slots), ("batch", None), dtype=jnp.int32),
    }


@struct.dataclass
class MemoryContext:
    """The positions and the mask of a call. The queries are the new tokens, the keys are the memory and the new tokens.

    Attributes:
        query_positions: [1 or B, T]. Consecutive tokens have consecutive positions, even if padding is between them. So
            the distance of two tokens of a document depends neither on padding nor on how the text is split into calls.
        key_positions: [1 or B, S].
        mask: which of the S keys each of the T queries may attend to.
        kept_indices: [B, M] indices of the keys that the next memory contains (see :func:`append`). None if the next
            memory contains the last M keys, if there is no memory, and in the decoding layout.
        slots: [B, 1] the slot of the new token of each row, in the decoding layout. None: the usual layout.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    mask: Mask
    kept_indices: jax.Array | None
    slots: jax.Array | None = None


def make_context(
    tokens_BT: jax.Array,
    state: State | None,
    segment_ids: jax.Array | None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[MemoryContext, Any]:
    """The :class:`MemoryContext` of new tokens, and the state with the segment ids of these tokens (None without a
    state).

    ``hidden`` of the returned state is not updated yet. The caller updates it with :func:`append` or
    :func:`append_layers`.

    Args:
        state: a state as in :func:`memory_specs`, or in the decoding layout; None: there is no memory, and S = T.
        segment_ids: [B, T], 0 for padding (anywhere in a row), 1, 2, ... for documents. Default: one document (1).
        causal: whether later keys are masked.
        window: the number of tokens that a query may attend to, itself included; None: no limit. Needs ``causal``.

    Raises:
        ValueError: the state has the decoding layout, and T is not 1 or ``causal`` is False; or the state has another
            number of rows.
    """
    B, T = tokens_BT.shape
    if state is None and segment_ids is None:
        positions_1T = jnp.arange(T, dtype=jnp.int32)[None]
        return MemoryContext(positions_1T, positions_1T, Mask(causal=causal, window=window), None), None
    segments_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    if state is not None:
        check_state_rows(state["segment_ids"].shape[0], B)
    if state is not None and "length" in state:
        if T != 1 or not causal:
            raise ValueError(
                f"a memory in the decoding layout reads one token per call with a causal mask, got {T} tokens and "
                f"causal={causal}: convert the state with from_decoding_layout first"
            )
        return _make_decoding_context(state, segments_BT, window)
    segments_BS = segments_BT
    if state is not None:
        segments_BS = jnp.concatenate([state["segment_ids"], segments_BT], axis=1)
    positions_BS, documents_BS = jnp.cumsum(segments_BS > 0, axis=1, dtype=jnp.int32), document_numbers(segments_BS)
    positions_BT = positions_BS[:, -T:]
    mask = Mask(
        causal=causal,
        window=window,
        query_order=positions_BT,
        key_order=positions_BS,
        query_segments=documents_BS[:, -T:],
        key_segments=documents_BS,
    )
    kept_indices_BM = None
    if state is not None:
        if segment_ids is not None:
            # Padding and empty slots are sorted first, so that they are dropped before tokens.
            kept_indices_BM = jnp.argsort(segments_BS > 0, axis=1, stable=True)[:, T:]
        state = {**state, "segment_ids": _append(state["segment_ids"], segments_BT, kept_indices_BM)}
    return MemoryContext(positions_BT, positions_BS, mask, kept_indices_BM), state


def _make_decoding_context(state: State, segments_B1: jax.Array, window: int | None) -> tuple[MemoryContext, Any]:
    """The result of :func:`make_context` for a state in the decoding layout."""
    slots_B1 = state["length"][:, None]
    segments_BS = cache.append(state["segment_ids"], segments_B1, state["length"])
    query_documents, key_documents = cache.document_ids(segments_BS, segments_B1, slots_B1)
    index_1S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)[None]
    # A token attends to itself and to the M slots before it. Older slots are masked, because the usual layout would
    # have dropped their tokens.
    is_in_memory_BS = index_1S >= slots_B1 - state["capacity"][:, None]
    mask = Mask(
        causal=True,
        window=window,
        query_order=slots_B1,
        key_order=index_1S,
        query_segments=query_documents,
        key_segments=jnp.where(is_in_memory_BS, key_documents, 0),
    )
    # If the new token is padding, ``length`` stays the same, so the next token overwrites its slot.
    state = {**state, "segment_ids": segments_BS, "length": state["length"] + (segments_B1[:, 0] > 0)}
    return MemoryContext(slots_B1, index_1S, mask, None, slots_B1), state


def append_and_read(layer_memory: Any, new_BTD: jax.Array, context: MemoryContext) -> tuple[jax.Array, Any]:
    """The inputs that a layer attends to, [B, S, D], and the layer's part of the argument ``new`` of
    :func:`append_layers`. Without a memory, this part is None.

    Args:
        layer_memory: a dict with ``hidden``, the inputs of the layer at earlier tokens; None: there is no memory.
        new_BTD: the inputs of the layer at the new tokens.
    """
    if layer_memory is None:
        return new_BTD, None
    if context.slots is None:
        old_BMD = jax.lax.stop_gradient(layer_memory["hidden"])
        return jnp.concatenate([old_BMD, new_BTD], axis=1), {"hidden": new_BTD}
    hidden_BSD = append(layer_memory["hidden"], new_BTD, context)
    return hidden_BSD, {"hidden": hidden_BSD}


def append(memory_BM: jax.Array, new_BT: jax.Array, context: MemoryContext) -> jax.Array:
    """One array of the next memory: ``memory`` updated with ``new``.

    In the usual layout, the result has M entries of ``memory`` and ``new``: the entries at ``context.kept_indices``, or
    the last M entries if that is None. No gradient flows into ``memory`` or ``new``. In the decoding layout, the result
    is ``memory`` with the new entry in the slot of the new token. Gradients flow only into ``new``.

    Args:
        memory_BM: an array of the memory, [B, M, ...]; in the decoding layout [B, S, ...].
        new_BT: the entries for the new tokens, [B, T, ...].
    """
    if context.slots is not None:
        return cache.append(jax.lax.stop_gradient(memory_BM), new_BT, context.slots[:, 0])
    return _append(memory_BM, new_BT, context.kept_indices)


def _append(memory_BM: jax.Array, new_BT: jax.Array, kept_indices_BM: jax.Array | None) -> jax.Array:
    """The result of :func:`append` in the usual layout; for ``kept_indices``, see :class:`MemoryContext`."""
    both_BS = jax.lax.stop_gradient(jnp.concatenate([memory_BM, new_BT.astype(memory_BM.dtype)], axis=1))
    if kept_indices_BM is None:
        return both_BS[:, new_BT.shape[1] :]
    return _take_slots(both_BS, kept_indices_BM, 0)


def append_layers(memory: Any, new: Any, context: MemoryContext) -> Any:
    """The next memory of all layers of a state, stacked or per layer (see :func:`append`).

    Call it once, after the loop over layers. A loop that carried the memories would copy all of them in every layer.
    """
    if context.slots is not None:  # in the decoding layout, ``append_and_read`` has returned the next memory
        return new
    if isinstance(memory, tuple):
        return jax.tree.map(lambda old, x: _append(old, x, context.kept_indices), memory, new)
    append_stacked = jax.vmap(_append, in_axes=(0, 0, None))
    return jax.tree.map(lambda old, x: append_stacked(old, x, context.kept_indices), memory, new)


def decoding_specs(specs: spec.Tree, num_added: int) -> Any:
    """The specs of a state in the decoding layout (:func:`to_decoding_layout`).

    Args:
        specs: the specs of the state in the usual layout.
        num_added: N, the number of slots that the decoding layout adds.
    """

    def add_slots(leaf: ArraySpec, batch_axis: int) -> ArraySpec:
        shape = list(leaf.shape)
        shape[batch_axis + 1] += num_added
        return dataclasses.replace(leaf, shape=tuple(shape))

    count = ArraySpec(specs["segment_ids"].shape[:1], ("batch",), dtype=jnp.int32)
    return {**spec.map_axis(specs, "batch", add_slots, specs), "length": count, "capacity": count}


def to_decoding_layout(specs: spec.Tree, state: State, num_added: int) -> Any:
    """The state in the decoding layout, which can read ``num_added`` further tokens per row, one per call.

    The tokens of a row are in its first slots, and unused slots follow. The state has two more arrays: ``length`` [B],
    the number of slots that are in use, and ``capacity`` [B], which is M, the number of earlier tokens that a token may
    attend to.

    Args:
        specs: the specs of ``state``. Only their axis names are used, so their sizes may differ from those of
            ``state``. The axis of slots follows the axis ``batch``.
        state: a state in the usual layout.
        num_added: N.

    Raises:
        ValueError: an array has no axis of M slots.
    """
    is_token_BM = state["segment_ids"] > 0
    order_BM = jnp.argsort(~is_token_BM, axis=1, stable=True)  # tokens first

    slots = is_token_BM.shape[1]
    arrays = spec.flatten(state)
    for name, leaf_spec in spec.flatten(specs).items():
        shape, axis = arrays[name].shape, leaf_spec.axes.index("batch") + 1
        if shape[axis : axis + 1] != (slots,):
            raise ValueError(
                f"the array {name} {list(shape)} of the state has no axis of {slots} memory slots after the axis "
                "'batch': a family with such a state must not set HAS_MEMORY_STATE"
            )

    def sort_and_pad(leaf: jax.Array, batch_axis: int) -> jax.Array:
        return pad_axis(_take_slots(leaf, order_BM, batch_axis), 0, num_added, axis=batch_axis + 1)

    length_B = jnp.sum(is_token_BM, axis=1, dtype=jnp.int32)
    capacity_B = jnp.full_like(length_B, slots)
    return {**spec.map_axis(specs, "batch", sort_and_pad, state), "length": length_B, "capacity": capacity_B}


def from_decoding_layout(specs: spec.Tree, state: State, num_added: int) -> Any:
    """The state in the usual layout, from a state in the decoding layout.

    Args:
        specs, num_added: the arguments with which :func:`to_decoding_layout` was called.
    """
    kept_indices_BM = jnp.argsort(state["segment_ids"] > 0, axis=1, stable=True)[:, num_added:]  # tokens last
    arrays = {name: state[name] for name in specs}
    return spec.map_axis(specs, "batch", lambda leaf, axis: _take_slots(leaf, kept_indices_BM, axis), arrays)


def _take_slots(leaf: jax.Array, indices_BM: jax.Array, batch_axis: int) -> jax.Array:
    """The entries of ``leaf`` at ``indices`` of the axis after ``batch_axis``."""
    shape = [1] * leaf.ndim
    shape[batch_axis : batch_axis + 2] = indices_BM.shape
    return jnp.take_along_axis(leaf, indices_BM.reshape(shape), axis=batch_axis + 1, mode="clip")


def absorb_weight(weight_DHK: jax.Array, q_BTHK: jax.Array) -> jax.Array:
    """``weight @ q`` for each head, [B, T, H, D]: the queries of absorbed attention.

    The key of an input h is ``h @ weight``, and ``q . (h @ weight) = (weight @ q) . h``. So the queries ``weight @ q``
    attend to the inputs themselves (:func:`attend_to_inputs`). The weighted mean of the inputs is then multiplied with
    the value weights (:func:`project_heads`). In this way, the inputs in the memory are not projected again for every
    new token. If H * K = D, the inputs need half the space of cached keys and values.
    ``jaxlm.nn.choices.absorbed_attention`` decides whether absorbed attention is used.
    """
    return jnp.einsum("BTHK,DHK->BTHD", q_BTHK, weight_DHK.astype(q_BTHK.dtype))


def attend_to_inputs(
    q_BTHD: jax.Array,
    inputs_BSD: jax.Array,
    mask: Mask,
    *,
    scale: float,
    biases: Sequence[AttentionBias],
    in_decoding_layout: bool,
) -> jax.Array:
    """The attention-weighted mean of the inputs for queries from :func:`absorb_weight`, [B, T, H, D].

    Args:
        in_decoding_layout: whether the inputs are the slots of a memory in the decoding layout. If they are, unused
            slots at the end of the rows need not be read.
    """
    if in_decoding_layout:
        view = CacheView(inputs_BSD, heads=1)
        return decode.attention(q_BTHD, view, view, mask, scale=scale, biases=tuple(biases))
    inputs_BS1D = inputs_BSD[:, :, None]
    return decode.attend_to_first_keys(q_BTHD, inputs_BS1D, inputs_BS1D, mask, scale, biases)


def project_heads(weight_DHK: jax.Array, x_BTHD: jax.Array) -> jax.Array:
    """``x @ weight`` for each head, [B, T, H, K].

    With the value weights, it converts weighted means of inputs into weighted means of values.
    """
    return jnp.einsum("BTHD,DHK->BTHK", x_BTHD, weight_DHK.astype(x_BTHD.dtype))

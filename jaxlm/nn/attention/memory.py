"""The rolling memory of models with segment recurrence (Transformer-XL, XLNet): the last inputs of every layer.

The memory starts empty. (Hugging Face's Transformer-XL starts with zeros, to which tokens attend.) The newest token is
last, and the oldest tokens are dropped. Padding never displaces a token. Every array has an axis with the name
``batch``; beam search, resets and shardings find the axis by this name.

Shapes: B batch, M memory slots, T new tokens, S = M + T keys, D model width, H heads, K head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.nn.attention import decode
from jaxlm.nn.attention.bias import AttentionBias
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.segments import document_numbers
from jaxlm.spec import ArraySpec, State


def memory_specs(
    layers: int | None, batch: int, slots: int, width: int, dtype: DTypeLike, *, stacked: bool = True
) -> dict[str, Any]:
    """Specs of an empty memory for ``slots`` tokens per row.

    The memory contains ``hidden`` [B, M, width] for each layer, and ``segment_ids`` [B, M] with 0 for an empty slot.
    ``hidden`` are the inputs of a layer. In ``jaxlm.models.attention_rnn_lm``, they are the projected keys and the
    values (not projected) of previous outputs, concatenated.

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
        query_positions: [1 or B, T]. Positions count the tokens from the start of the memory, without padding. So the
            distance of two tokens of a document depends neither on padding nor on how the text is split into calls.
        key_positions: [1 or B, S].
        mask: which of the S keys each of the T queries may attend to.
        kept_indices: [B, M] indices of the keys that the next memory contains (see :func:`append`). None: the last M
            keys, or there is no memory.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    mask: Mask
    kept_indices: jax.Array | None


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
        state: a state as in :func:`memory_specs`; None: there is no memory, and S = T.
        segment_ids: [B, T], 0 for padding (anywhere in a row), 1, 2, ... for documents. Default: one document (1).
        causal: whether later keys are masked.
        window: the number of tokens that a query may attend to, itself included; None: no limit. Needs ``causal``.
    """
    B, T = tokens_BT.shape
    if state is None and segment_ids is None:
        positions_1T = jnp.arange(T, dtype=jnp.int32)[None]
        return MemoryContext(positions_1T, positions_1T, Mask(causal=causal, window=window), None), None
    segments_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
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
        state = {**state, "segment_ids": append(state["segment_ids"], segments_BT, kept_indices_BM)}
    return MemoryContext(positions_BT, positions_BS, mask, kept_indices_BM), state


def append(memory_BM: jax.Array, new_BT: jax.Array, kept_indices_BM: jax.Array | None) -> jax.Array:
    """The next memory, [B, M, ...]: M of the entries of ``memory`` and ``new``. No gradient flows into these arrays.

    Args:
        memory_BM, new_BT: [B, M, ...] and [B, T, ...]; they are concatenated to S entries.
        kept_indices_BM: indices of the S entries that the next memory contains; None: the last M.
    """
    both_BS = jax.lax.stop_gradient(jnp.concatenate([memory_BM, new_BT.astype(memory_BM.dtype)], axis=1))
    if kept_indices_BM is None:
        return both_BS[:, new_BT.shape[1] :]
    index = kept_indices_BM.reshape(kept_indices_BM.shape + (1,) * (both_BS.ndim - 2))
    return jnp.take_along_axis(both_BS, index, axis=1, mode="clip")


def append_layers(memory: Any, new: Any, kept_indices_BM: jax.Array | None) -> Any:
    """The next memory of all layers of a state, stacked or per layer (see :func:`append`).

    Call it once, after the loop over layers. A loop that carried the memories would copy all of them in every layer.
    """
    if isinstance(memory, tuple):
        return jax.tree.map(lambda old, x: append(old, x, kept_indices_BM), memory, new)
    return jax.tree.map(lambda old, x: jax.vmap(append, in_axes=(0, 0, None))(old, x, kept_indices_BM), memory, new)


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
    q_BTHD: jax.Array, inputs_BSD: jax.Array, mask: Mask, *, scale: float, biases: Sequence[AttentionBias]
) -> jax.Array:
    """The attention-weighted mean of the inputs for queries from :func:`absorb_weight`, [B, T, H, D]."""
    inputs_BS1D = inputs_BSD[:, :, None]
    return decode.attend_to_first_keys(q_BTHD, inputs_BS1D, inputs_BS1D, mask, scale, biases)


def project_heads(weight_DHK: jax.Array, x_BTHD: jax.Array) -> jax.Array:
    """``x @ weight`` for each head, [B, T, H, K]: from weighted means of inputs to weighted means of values."""
    return jnp.einsum("BTHD,DHK->BTHK", x_BTHD, weight_DHK.astype(x_BTHD.dtype))

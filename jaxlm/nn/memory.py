"""The rolling memory of segment-recurrent models (Transformer-XL, XLNet): the last inputs of every layer.

It starts empty, as in the authors' code, where Hugging Face attends to zeros. Every leaf has a ``batch`` axis, so
beams, resets and shardings act on it by name. The newest token is last; the oldest are dropped; a pad never takes the
place of a token. Shapes: L layers, B batch, M slots, T new tokens, S = M + T keys, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm import spec
from jaxlm.nn.kernels import decode_attention
from jaxlm.nn.mask import Mask
from jaxlm.nn.term import Term
from jaxlm.spec import ArraySpec


def memory_specs(layers: int | None, batch: int, slots: int, width: int, dtype: Any) -> dict[str, Any]:
    """Specs of an empty memory of ``slots`` tokens per row: ``layers/hidden`` [L, B, M, D], or with ``layers`` None
    ``hidden`` [B, M, D]; ``segment_ids`` [B, M] (0: empty).

    Raises:
        ValueError: no slots.
    """
    if slots < 1:
        raise ValueError(f"a memory of {slots} slots holds nothing: make it at least 1, or call without a state")
    hidden = {"hidden": ArraySpec((batch, slots, width), ("batch", None, "activation_embed"), dtype=dtype)}
    return {
        **(hidden if layers is None else {spec.LAYERS: spec.stack(layers, hidden)}),
        "segment_ids": ArraySpec((batch, slots), ("batch", None), dtype=jnp.int32),
    }


@struct.dataclass
class Span:
    """Where the new tokens of a call stand: after what the memory holds.

    Attributes:
        query_positions / key_positions: [1 or B, T] / [1 or B, S]. Pads do not count, so that within a document
            ``query - key`` is the distance that both would have alone and in one piece.
        mask: who sees whom, of T queries and S keys (memory, then new).
        kept: [B, M] which of the S keys the next memory holds; None: the last M. For :func:`append`.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    mask: Mask
    kept: jax.Array | None


def span(
    tokens_BT: jax.Array, state: Any, segment_ids: Any, *, causal: bool = True, window: int | None = None
) -> tuple[Span, Any]:
    """Positions and mask of new tokens, and the state with everything but ``hidden`` written.

    Without segment ids (one document that goes on), positions are plain: queries and keys end together.

    Args:
        state: of :func:`memory_specs`, or None: no memory, S = T.
        segment_ids: [B, T], 0 padding on either side or in between, 1.. documents. Default: one document (1).
        causal: False lets queries see later keys of their document as well.
        window: a query sees only so many tokens, itself included.
    """
    B, T = tokens_BT.shape
    if state is None and segment_ids is None:
        place_1T = jnp.arange(T, dtype=jnp.int32)[None]
        return Span(place_1T, place_1T, Mask(causal=causal, window=window), None), None
    segments_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    segments_BS = segments_BT
    if state is not None:
        segments_BS = jnp.concatenate([state["segment_ids"], segments_BT], axis=1)
    positions_BS = jnp.cumsum(segments_BS > 0, axis=1, dtype=jnp.int32)
    positions_BT = positions_BS[:, -T:]
    mask = Mask(
        causal=causal,
        window=window,
        query_order=positions_BT,
        key_order=positions_BS,
        query_segments=segments_BT,
        key_segments=segments_BS,
    )
    kept_BM = None
    if state is not None:
        if segment_ids is not None:
            kept_BM = jnp.argsort(segments_BS > 0, axis=1, stable=True)[:, T:]  # pads and empty slots first
        state = {**state, "segment_ids": append(state["segment_ids"], segments_BT, kept_BM)}
    return Span(positions_BT, positions_BS, mask, kept_BM), state


def append(memory_BM: jax.Array, new_BT: jax.Array, kept_BM: jax.Array | None) -> jax.Array:
    """The next memory, without gradient: what is ``kept`` of ``memory`` [B, M, ...] and then ``new`` [B, T, ...]."""
    both_BS = jax.lax.stop_gradient(jnp.concatenate([memory_BM, new_BT.astype(memory_BM.dtype)], axis=1))
    if kept_BM is None:
        return both_BS[:, new_BT.shape[1] :]
    index = kept_BM.reshape(kept_BM.shape + (1,) * (both_BS.ndim - 2))
    return jnp.take_along_axis(both_BS, index, axis=1, mode="clip")


def append_layers(memory: Any, new: Any, kept_BM: jax.Array | None) -> Any:
    """:func:`append` for a state's ``layers``, stacked or apart: at once for all, after a loop over layers that gave
    what is new of each. One that carried whole memories would copy them in and out."""
    if isinstance(memory, tuple):
        return jax.tree.map(lambda old, x: append(old, x, kept_BM), memory, new)
    return jax.tree.map(lambda old, x: jax.vmap(append, in_axes=(0, 0, None))(old, x, kept_BM), memory, new)


DIRECTLY_FROM = 128
"""Inputs, B S, from which on they are met directly: for fewer, a CPU turns weights longer than it projects inputs."""


def is_met_directly(q_BTHK: jax.Array, context_BSD: jax.Array, *, dropout: float, key: jax.Array | None) -> bool:
    """Whether so few queries had better meet what is remembered than keys and values made of it.

    ``q . (W h) = (q W) . h``: a query moved to the width of the model (:func:`absorbed`) meets the inputs themselves,
    and a mean of inputs is made a value last (:func:`projected`). So no input is projected anew for every token, and
    the memory takes half of what keys and values would. With the term of distances, that is ``3 B T S H D``
    multiplications and not ``3 B S D H K``. Nothing is dropped on the way: ``dropout`` and ``key`` are those of the
    probabilities.
    """
    if key is not None and dropout > 0.0:
        return False
    (B, T, _, K), S = q_BTHK.shape, context_BSD.shape[1]
    return 4 * T <= K and B * S >= DIRECTLY_FROM


def absorbed(weight_DHK: jax.Array, q_BTHK: jax.Array) -> jax.Array:
    """Queries that meet inputs [.., D] as they are as ``q`` meets their projections by ``weight``, [B, T, H, D]."""
    return jnp.einsum("BTHK,DHK->BTHD", q_BTHK, weight_DHK.astype(q_BTHK.dtype))


def attend(q_BTHD: jax.Array, context_BSD: jax.Array, mask: Mask, *, scale: float, terms: Sequence[Term]) -> jax.Array:
    """The mean of inputs that each query is given for its :func:`absorbed` form, [B, T, H, D]."""
    context_BS1D = context_BSD[:, :, None]
    return decode_attention.attend(q_BTHD, context_BS1D, context_BS1D, mask, scale, terms)


def projected(weight_DHK: jax.Array, x_BTHD: jax.Array) -> jax.Array:
    """For each head its own projection of what it has, [B, T, H, K]: a mean of inputs becomes one of values."""
    return jnp.einsum("BTHD,DHK->BTHK", x_BTHD, weight_DHK.astype(x_BTHD.dtype))

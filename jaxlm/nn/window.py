"""Windows over time: what a convolution or a pooling sees at each place, in one call and along a stream.

A causal window must see, of the tokens before it, the real ones of its own document, wherever padding stands. So
padding is moved behind the real tokens of its row before the first layer (:func:`open_stream`), and every place gets
its result back after the last (:func:`close_stream`). Between them the real tokens of a row are neighbours, in a call
and across calls, and a document border is a change of segment id. What a layer carries to the next call, its tail, are
its last inputs that were real.

Legend: B batch, T time, C channels, K taps of a window, W tokens that a tail reaches back, P the largest W of a model.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxlm.spec import ArraySpec

Padding = Literal["same", "valid", "causal"]
"""``same``: as many outputs as inputs, the window centred (of an even number of taps, the earlier middle one stands
at its place). ``causal``: as many, the window ends at its place. ``valid``: only whole windows, not padded."""


def windows(
    x_BTC: jax.Array,
    kernel: int,
    *,
    padding: Padding,
    stride: int = 1,
    dilation: int = 1,
    segment_ids: jax.Array | None = None,
    fill: float = 0.0,
) -> jax.Array:
    """What each window sees, [B, T', K, C].

    Args:
        kernel: K, taps of a window, ``dilation`` steps apart.
        stride: steps from one window to the next.
        segment_ids: [B, T]; a tap outside the segment of its window's place (``valid``: of its last tap) sees ``fill``.
        fill: what stands beyond the ends.

    Raises:
        ValueError: an unknown padding, or an input that is shorter than one window.
    """
    before, after, count = extent(x_BTC.shape[1], kernel, padding=padding, stride=stride, dilation=dilation)

    def taps(x: jax.Array, fill: float) -> list[jax.Array]:
        x = jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        last = (count - 1) * stride + 1
        return [lax.slice_in_dim(x, tap * dilation, tap * dilation + last, stride, axis=1) for tap in range(kernel)]

    seen_BTKC = jnp.stack(taps(x_BTC, fill), axis=2)
    if segment_ids is None:
        return seen_BTKC
    ids_BTK = jnp.stack(taps(segment_ids, 0), axis=2)
    first = (kernel - 1) * dilation if padding == "valid" else 0
    own_BT = lax.slice_in_dim(segment_ids, first, first + (count - 1) * stride + 1, stride, axis=1)
    return jnp.where((ids_BTK == own_BT[:, :, None])[..., None], seen_BTKC, fill)


def extent(length: int, kernel: int, *, padding: Padding, stride: int = 1, dilation: int = 1) -> tuple[int, int, int]:
    """What stands before and after ``length`` steps, and how many windows there are: see ``windows``."""
    reach = (kernel - 1) * dilation
    if padding not in ("same", "valid", "causal"):
        raise ValueError(f"padding={padding!r} is unknown: choose from 'same', 'valid', 'causal'")
    before = {"same": reach // 2, "valid": 0, "causal": reach}[padding]
    after = reach - reach // 2 if padding == "same" else 0
    count = (length + before + after - reach - 1) // stride + 1
    if count < 1:
        raise ValueError(
            f"{length} steps are shorter than one window of {kernel} taps with dilation={dilation}: "
            f"lengthen the input or choose padding 'same' or 'causal'"
        )
    return before, after, count


# --------------------------------------------------------------------------------------------- streams


@struct.dataclass
class Stream:
    """The new tokens of a call, each row's padding behind its real tokens, and what the row has read before.

    Attributes:
        segment_ids: [B, T] after moving; None where everything is one document and nothing was read before.
        order: [B, T], the place in the call of each moved token; None where nothing was moved.
        past: [B, P] segment ids of the last tokens that were real; None without a state.
        count_B: real tokens of the call.
    """

    segment_ids: Any
    order: Any
    past: Any
    count_B: Any


def past_specs(batch: int, reach: int) -> ArraySpec:
    """The segment ids of the last ``reach`` real tokens: what a model carries beside the tails. 0: nothing read yet."""
    return ArraySpec((batch, max(reach, 1)), ("batch", None), dtype=jnp.int32)


def tail_specs(batch: int, reach: int, channels: int, dtype: Any) -> ArraySpec:
    """The last ``reach`` real inputs of a causal window, ``(kernel - 1) * dilation`` of them."""
    return ArraySpec((batch, reach, channels), ("batch", None, "activation_embed"), dtype=dtype)


def open_stream(
    tokens_BT: jax.Array, segment_ids: jax.Array | None, past_BP: jax.Array | None
) -> tuple[jax.Array, Stream]:
    """The tokens with each row's padding moved behind, and how they go on from ``past`` (``past_specs``, or None)."""
    if segment_ids is None and past_BP is None:
        return tokens_BT, Stream(None, None, None, None)
    if segment_ids is None:
        everything = jnp.full(tokens_BT.shape[:1], tokens_BT.shape[1], jnp.int32)
        return tokens_BT, Stream(jnp.ones(tokens_BT.shape, jnp.int32), None, past_BP, everything)
    order_BT = real_first(segment_ids)
    tokens_BT, segment_ids = (jnp.take_along_axis(x, order_BT, axis=1) for x in (tokens_BT, segment_ids))
    return tokens_BT, Stream(segment_ids, order_BT, past_BP, jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32))


def real_first(segment_ids_BT: jax.Array) -> jax.Array:
    """The places of each row's real tokens in their order, then those of its padding, [B, T]."""
    return jnp.argsort(segment_ids_BT == 0, axis=1, stable=True)


def close_stream(stream: Stream, hidden_BTC: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states at the places that the tokens came from, and the ``past`` of the next call."""
    past = stream.past
    if past is not None:
        past = _last(jnp.concatenate([past, stream.segment_ids], axis=1), stream.count_B, past.shape[1])
    if stream.order is not None:
        place_BT = jnp.argsort(stream.order, axis=1)
        hidden_BTC = jnp.take_along_axis(hidden_BTC, place_BT[:, :, None], axis=1)
    return hidden_BTC, past


def causal_windows(
    stream: Stream, x_BTC: jax.Array, tail_BWC: jax.Array | None, kernel: int, *, dilation: int = 1, fill: float = 0.0
) -> tuple[jax.Array, jax.Array | None]:
    """What each causal window of a stream sees, [B, T, K, C], and the tail for the next call (None without one)."""
    if tail_BWC is None:
        ids = stream.segment_ids
        return windows(x_BTC, kernel, padding="causal", dilation=dilation, segment_ids=ids, fill=fill), None
    x_BSC, ids_BS, tail_BWC = extended(stream, x_BTC, tail_BWC)
    return windows(x_BSC, kernel, padding="valid", dilation=dilation, segment_ids=ids_BS, fill=fill), tail_BWC


def extended(stream: Stream, x_BTC: jax.Array, tail_BWC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A tail and the new inputs behind it [B, W + T, C], the segment ids of both, and the tail for the next call."""
    reach = tail_BWC.shape[1]
    x_BSC = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    ids_BS = jnp.concatenate([stream.past[:, stream.past.shape[1] - reach :], stream.segment_ids], axis=1)
    return x_BSC, ids_BS, _last(x_BSC, stream.count_B, reach)


def _last(x_BS: jax.Array, count_B: jax.Array, reach: int) -> jax.Array:
    """The ``reach`` entries of each row up to its last real one: ``reach`` old ones stand before the new."""
    return jax.vmap(lambda row, count: lax.dynamic_slice_in_dim(row, count, reach))(x_BS, count_B)


# ---------------------------------------------------------------------------------------- fixed lengths


def fixed_length(
    tokens_BT: jax.Array, segment_ids: jax.Array | None, length: int, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's real tokens first, padded to ``length``: the form in which classifiers over characters read texts.

    Args:
        reverse: put the last real token first.

    Returns:
        Tokens [B, length], which of them are real [B, length], and which rows are one text [B]: a row of several
        documents is none.

    Raises:
        ValueError: more tokens than ``length``.
    """
    T = tokens_BT.shape[1]
    if length < T:
        raise ValueError(f"{T} tokens exceed max_positions={length}: shorten them or enlarge the model")
    if reverse:
        tokens_BT, segment_ids = tokens_BT[:, ::-1], None if segment_ids is None else segment_ids[:, ::-1]
    if segment_ids is None:  # nothing to sort
        real_BT = jnp.broadcast_to(jnp.arange(length)[None] < T, (len(tokens_BT), length))
        return jnp.pad(tokens_BT, ((0, 0), (0, length - T))), real_BT, jnp.ones(len(tokens_BT), bool)
    single_B = jnp.all((segment_ids == 0) | (segment_ids == jnp.max(segment_ids, axis=1, keepdims=True)), axis=1)
    order_BT = real_first(segment_ids)
    tokens_BT, segment_ids = (
        jnp.pad(jnp.take_along_axis(x, order_BT, axis=1), ((0, 0), (0, length - T))) for x in (tokens_BT, segment_ids)
    )
    return tokens_BT, segment_ids > 0, single_B

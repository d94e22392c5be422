"""Windows over time for convolution and pooling, for complete texts and for texts that are read in several calls.

The causal window of a step must contain the last real tokens of the step's document up to this step. It must skip
padding, wherever the padding is. So the padding of each row is moved to the row's end before the first layer
(``jaxlm.nn.token_layout``). From one call to the next, each layer passes its tail: the inputs of the layer at the last
W real tokens.

Shapes: B batch, T time, T' windows, C channels, K taps of a window, W length of a tail, S = W + T.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm.nn.segments import select_state
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.nn.token_layout import TokenLayout, last_real, move_padding_last
from jaxlm.spec import ArraySpec, require_arrays

Padding = Literal["same", "valid", "causal"]
"""``same`` and ``causal`` pad the input, so that there is one output per input (with stride 1). ``valid`` does not pad,
so there is one output per window inside the input. The position of the window of output t:

    valid     begins at step ``t * stride``
    causal    ends at step ``t * stride``
    same      begins ``(K - 1) * dilation // 2`` steps before step ``t * stride``
"""


def windows(
    x_BTC: jax.Array,
    kernel: int,
    *,
    padding: Padding,
    stride: int = 1,
    dilation: int = 1,
    documents_BT: jax.Array | None = None,
    fill: float = 0.0,
) -> jax.Array:
    """The inputs in each window, [B, T', K, C].

    Args:
        kernel: K, the number of taps of a window.
        padding: see :data:`Padding`.
        stride: number of steps from one window to the next.
        dilation: number of steps from one tap to the next.
        documents_BT: the document number of each input (``jaxlm.nn.segments.document_numbers``). Taps outside the
            window's document give ``fill``. With ``same`` and ``causal``, window t belongs to the document of step
            ``t * stride``. With ``valid``, it belongs to the document of its last tap. None: each row is one document.
        fill: the value of taps outside the input or the document.

    Raises:
        ValueError: an unknown padding, no taps, or an input that is shorter than one window.
    """
    require_arrays(x_BTC=x_BTC, documents_BT=documents_BT)
    options: Any = {"padding": padding, "stride": stride, "dilation": dilation}
    windows_BTKC = jnp.stack(taps(x_BTC, kernel, fill=fill, **options), axis=2)
    if documents_BT is None:
        return windows_BTKC
    count = windows_BTKC.shape[1]
    tap_documents_BTK = jnp.stack(taps(documents_BT, kernel, fill=0, **options), axis=2)
    first_step = (kernel - 1) * dilation if padding == "valid" else 0  # window 0 belongs to the document of this step
    end = first_step + (count - 1) * stride + 1
    window_documents_BT = lax.slice_in_dim(documents_BT, first_step, end, stride, axis=1)
    return jnp.where((tap_documents_BTK == window_documents_BT[:, :, None])[..., None], windows_BTKC, fill)


def taps(
    x_BT: jax.Array, kernel: int, *, padding: Padding, stride: int = 1, dilation: int = 1, fill: float = 0.0
) -> list[jax.Array]:
    """One array [B, T', ...] for each tap: the entry of ``x`` at this tap in each window.

    The arguments and the errors are those of :func:`windows`, without ``documents_BT``.
    """
    before, after, count = padding_and_count(x_BT.shape[1], kernel, padding=padding, stride=stride, dilation=dilation)
    x_BT = jnp.pad(x_BT, ((0, 0), (before, after)) + ((0, 0),) * (x_BT.ndim - 2), constant_values=fill)
    length = (count - 1) * stride + 1
    return [lax.slice_in_dim(x_BT, tap * dilation, tap * dilation + length, stride, axis=1) for tap in range(kernel)]


def padding_and_count(
    length: int, kernel: int, *, padding: Padding, stride: int = 1, dilation: int = 1
) -> tuple[int, int, int]:
    """The numbers of steps of padding before and after an input of ``length`` steps, and the number of windows.

    The arguments and the errors are those of :func:`windows`.
    """
    last_tap = (kernel - 1) * dilation  # relative to the first tap
    if padding not in ("same", "valid", "causal"):
        raise ValueError(f"padding={padding!r} is unknown: choose from 'same', 'valid', 'causal'")
    if kernel < 1:
        raise ValueError(f"a window of {kernel} taps must have at least 1 tap")
    before = {"same": last_tap // 2, "valid": 0, "causal": last_tap}[padding]
    after = last_tap - last_tap // 2 if padding == "same" else 0
    count = (length + before + after - last_tap - 1) // stride + 1
    if count < 1:
        raise ValueError(
            f"{length} steps are shorter than one window of {kernel} taps with dilation={dilation}: "
            + ("lengthen the input or choose padding 'same' or 'causal'" if length else "give at least one step")
        )
    return before, after, count


# ---------------------------------------------------------------------------------------- several calls


def tail_specs(batch: int, tail_length: int, channels: int, dtype: DTypeLike) -> ArraySpec:
    """Spec of a layer's tail, [B, W, C], where W is ``tail_length``.

    Causal windows need a tail of length ``(kernel - 1) * dilation``.
    """
    return ArraySpec((batch, tail_length, channels), ("batch", None, "activation_embed"), dtype=dtype)


def causal_windows(
    layout: TokenLayout,
    x_BTC: jax.Array,
    tail_BWC: jax.Array | None,
    kernel: int,
    *,
    dilation: int = 1,
    fill: float = 0.0,
) -> tuple[jax.Array, jax.Array | None]:
    """The inputs in each causal window, [B, T, K, C], and the tail for the next call.

    If ``tail_BWC`` is None, there are no earlier tokens, and the returned tail is None.
    """
    require_arrays(x_BTC=x_BTC, tail_BWC=tail_BWC)
    x_BSC, documents, padding, tail_BWC = prepend_tail(layout, x_BTC, tail_BWC)
    return windows(x_BSC, kernel, padding=padding, dilation=dilation, documents_BT=documents, fill=fill), tail_BWC


def previous_inputs(
    layout: TokenLayout, x_BTC: jax.Array, tail_B1C: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The input of the previous step for each step, [B, T, C], and the tail for the next call.

    The tails are as in :func:`causal_windows`. The first step of a document gets zeros.
    """
    require_arrays(x_BTC=x_BTC, tail_B1C=tail_B1C)
    tail_B1C = None if tail_B1C is None else tail_B1C.astype(x_BTC.dtype)
    previous_BTC, documents_BS = shifted_inputs(x_BTC, tail_B1C, -1, x_BTC.shape[1]), layout.documents
    if tail_B1C is None:
        documents_BS = None if documents_BS is None else jnp.pad(documents_BS, ((0, 0), (1, 0)))
    else:
        documents_BS, tail_B1C = layout.documents_with_past(1), next_tail(layout, x_BTC, tail_B1C)
    if documents_BS is not None:
        previous_BTC = jnp.where((documents_BS[:, :-1] == documents_BS[:, 1:])[..., None], previous_BTC, 0)
    return previous_BTC, tail_B1C


def prepend_tail(
    layout: TokenLayout, x_BTC: jax.Array, tail_BWC: jax.Array | None
) -> tuple[jax.Array, Any, Padding, jax.Array | None]:
    """The tail followed by the new inputs [B, S, C]; their document numbers [B, S]; the argument ``padding`` of
    :func:`windows` for one causal window per new input; and the tail for the next call.

    If ``tail_BWC`` is None, there is no tail (S = T), and the returned tail is None. Then the argument ``padding`` is
    "causal", because the first windows need zeros before the new inputs.
    """
    if tail_BWC is None:
        return x_BTC, None if layout.documents is None else layout.documents_with_past(0), "causal", None
    tail_length = tail_BWC.shape[1]
    x_BSC = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    return x_BSC, layout.documents_with_past(tail_length), "valid", last_real(x_BSC, layout.num_real, tail_length)


def shifted_inputs(x_BTC: jax.Array, tail_BWC: jax.Array | None, first: int, count: int) -> jax.Array:
    """The inputs [first, first + count), [B, count, C]. A negative index is in the tail; None: a tail of zeros."""
    inputs_BTC = shifted(x_BTC, first, count)
    if tail_BWC is None or first >= 0:
        return inputs_BTC
    # For each index, one of the two terms is zero. Joining the tail and ``x`` instead would copy ``x`` on a TPU.
    return inputs_BTC + shifted(tail_BWC, first + tail_BWC.shape[1], count)


def shifted(x_BT: jax.Array, offset: int, count: int) -> jax.Array:
    """``x[:, t + offset]`` for t in [0, count), with zeros outside ``x``."""
    widths = [(0, 0, 0), (-offset, count + offset - x_BT.shape[1], 0)] + [(0, 0, 0)] * (x_BT.ndim - 2)
    return lax.pad(x_BT, jnp.zeros((), x_BT.dtype), widths)


def next_tail(layout: TokenLayout, x_BTC: jax.Array, tail_BWC: jax.Array) -> jax.Array:
    """The tail for the next call, [B, W, C]: the last W real inputs of each row, from the tail and the new inputs."""
    W, T = tail_BWC.shape[1], x_BTC.shape[1]
    if T <= W:
        return last_real(jnp.concatenate([tail_BWC, x_BTC], axis=1), layout.num_real, W)
    # Joining the tail and all new inputs would copy them.
    is_short_B = layout.num_real < W  # the next tail has entries of the old tail
    from_tail_BWC = last_real(jnp.concatenate([tail_BWC, x_BTC[:, :W]], axis=1), jnp.minimum(layout.num_real, W), W)
    from_x_BWC = last_real(x_BTC, jnp.maximum(layout.num_real - W, 0), W)
    return select_state(is_short_B, from_tail_BWC, from_x_BWC)


# ---------------------------------------------------------------------------------------- fixed lengths


def pad_to_length(
    tokens_BT: jax.Array, segment_ids: jax.Array | None, length: int, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The real tokens of each row, moved to the start and padded to ``length`` (for character-level classifiers).

    Args:
        reverse: reverse the order of the real tokens.

    Returns:
        Tokens [B, length]; a mask of the real tokens [B, length]; and a mask [B] that is True for rows with a single
        text and False for rows with several documents.

    Raises:
        ValueError: there are more tokens than ``length``, padding included.
    """
    T = tokens_BT.shape[1]
    if length < T:
        raise ValueError(
            f"{T} tokens exceed max_positions={length}: shorten them, or use a model with a larger max_positions"
        )
    if reverse:
        tokens_BT, segment_ids = tokens_BT[:, ::-1], None if segment_ids is None else segment_ids[:, ::-1]
    tokens_BT, layout = move_padding_last(tokens_BT, segment_ids, None)
    segment_ids = jnp.ones(tokens_BT.shape, jnp.int32) if segment_ids is None else layout.segment_ids
    single_B = jnp.all((segment_ids <= 0) | (segment_ids == jnp.max(segment_ids, axis=1, keepdims=True)), axis=1)
    tokens_BT, segment_ids = (pad_axis(x, 0, length - T) for x in (tokens_BT, segment_ids))
    return tokens_BT, segment_ids > 0, single_B

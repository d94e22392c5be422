"""Depthwise convolution over time, for complete texts and for texts that are read in several calls.

Shapes: B batch, T time, T' outputs, K taps, C channels, W length of a tail (``jaxlm.nn.convolution.window``),
S = W + T, L steps of a block, U inputs that the taps of a block read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn import choices
from jaxlm.nn.convolution.window import Padding, next_tail, padding_and_count, prepend_tail, shifted, shifted_inputs
from jaxlm.nn.custom_gradient import custom_vjp, sum_dtype
from jaxlm.nn.linear import linear_specs
from jaxlm.nn.segments import document_numbers
from jaxlm.nn.token_layout import TokenLayout
from jaxlm.spec import ArraySpec, Initializer, Params, require_arrays

DepthwiseImplementation = Literal["reference", "shifts"]


BLOCK = 32
"""Number of steps of a block, if the gradient of the weights is summed over blocks of time."""


def depthwise_convolution_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, bias: bool = True
) -> dict[str, ArraySpec]:
    """Specs of ``weight`` [K, C] and, if ``bias`` is True, ``bias`` [C]; ``axes`` contains the logical name of C.

    Example:
        >>> depthwise_convolution_specs((4, 64), ("mlp",), Normal(0.02))["weight"].axes
        (None, 'mlp')
    """
    return linear_specs(shape, (None, *axes), init, bias=bias)


def depthwise_convolution(
    params: Params,
    x_BTC: jax.Array,
    *,
    padding: Padding,
    dilation: int = 1,
    segment_ids: jax.Array | None = None,
    implementation: DepthwiseImplementation | None = None,
) -> jax.Array:
    """``y_t = bias + sum_k weight_k * x_{t + k * dilation - before}`` for each channel separately, [B, T', C].

    ``before`` is the number of steps of padding at the start (:func:`jaxlm.nn.convolution.window.padding_and_count`).

    Args:
        params: as in :func:`depthwise_convolution_specs`.
        padding: see :data:`jaxlm.nn.convolution.window.Padding`.
        dilation: number of steps from one tap to the next.
        segment_ids: [B, T]. An output reads only its own document. Inputs of other documents count as zeros. A change
            of the id starts a document (``jaxlm.nn.segments.document_numbers``). Output t belongs to the document of
            step t. With ``valid`` padding, it belongs to the document of its last tap. None: each row is one document.
        implementation: ``reference`` is ``lax.conv_general_dilated``, which does not support segments. ``shifts``
            shifts and multiplies the whole input for each tap, and sums the products in one pass, in float32 (float64
            for a float64 input). Its custom gradient saves the input, but not the products. None chooses ``shifts`` on
            a CPU or with segment ids, otherwise ``reference``.

    Raises:
        ValueError: weights that do not match the input, an unknown padding, an input that is shorter than one window,
            segments for ``reference``, or an unknown implementation.
    """
    require_arrays(x_BTC=x_BTC, segment_ids=segment_ids)
    reasons = {"reference": None if segment_ids is None else "does not support segment_ids"}
    choices.check_implementation("depthwise_convolution", implementation, DepthwiseImplementation, reasons)
    implementation = implementation or choices.depthwise_convolution(segment_ids)
    documents_BT = None if segment_ids is None else document_numbers(segment_ids)
    return _convolution(params, x_BTC, None, padding, dilation, documents_BT, implementation)


def _convolution(
    params: Params,
    x_BTC: jax.Array,
    tail_BWC: jax.Array | None,
    padding: Padding,
    dilation: int,
    documents_BS: jax.Array | None,
    implementation: DepthwiseImplementation,
) -> jax.Array:
    """The result of :func:`depthwise_convolution` or :func:`causal_depthwise_convolution`.

    Args:
        tail_BWC: the inputs before ``x``; only for ``shifts`` and ``causal`` padding. None: zeros.
        documents_BS: document numbers of the tail (if there is one) and of ``x``; None: each row is one document.
    """
    weight_KC = params["weight"].astype(x_BTC.dtype)
    kernel, channels = weight_KC.shape
    if x_BTC.ndim != 3 or x_BTC.shape[-1] != channels:
        raise ValueError(f"the input {list(x_BTC.shape)} must be [batch, time, channels] with {channels} channels")
    before, after, count = padding_and_count(x_BTC.shape[1], kernel, padding=padding, dilation=dilation)
    if implementation == "reference":
        y_BTC = lax.conv_general_dilated(
            x_BTC,
            weight_KC[:, None],
            (1,),
            [(before, after)],
            rhs_dilation=(dilation,),
            dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=channels,
        )
    else:
        offsets = tuple(tap * dilation - before for tap in range(kernel))
        document_offset = offsets[-1] if padding == "valid" else 0
        y_BTC = _shifted_products(_Taps(offsets, document_offset, count), weight_KC, x_BTC, tail_BWC, documents_BS)
    return y_BTC if "bias" not in params else y_BTC + params["bias"].astype(x_BTC.dtype)[None, None, :]


def causal_depthwise_convolution(
    params: Params, layout: TokenLayout, x_BTC: jax.Array, tail_BWC: jax.Array | None, *, dilation: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """The causal depthwise convolution over the real tokens of each row, [B, T, C], and the tail for the next call.

    If ``tail_BWC`` is None, there are no earlier tokens, and the returned tail is None. See
    ``jaxlm.nn.convolution.window`` for ``layout`` and the tails.
    """
    require_arrays(x_BTC=x_BTC, tail_BWC=tail_BWC)
    if tail_BWC is None or choices.join_tail():
        implementation = choices.depthwise_convolution(layout.segment_ids)
        x_BSC, documents_BS, padding, tail_BWC = prepend_tail(layout, x_BTC, tail_BWC)
        return _convolution(params, x_BSC, None, padding, dilation, documents_BS, implementation), tail_BWC
    tail_BWC = tail_BWC.astype(x_BTC.dtype)
    documents_BS = layout.documents_with_past(tail_BWC.shape[1])
    y_BTC = _convolution(params, x_BTC, tail_BWC, "causal", dilation, documents_BS, "shifts")
    return y_BTC, next_tail(layout, x_BTC, tail_BWC)


@dataclasses.dataclass(frozen=True)
class _Taps:
    """The taps of each of ``count`` outputs.

    Output t reads ``x[t + offset]`` for each offset in ``offsets``. Output t belongs to the document of input
    ``t + document_offset``. With a tail of W inputs, input ``t`` of a negative t is entry ``W + t`` of the tail.
    """

    offsets: tuple[int, ...]
    document_offset: int
    count: int


def _shifted_products_forward(
    taps: _Taps, weight_KC: jax.Array, x_BTC: jax.Array, tail_BWC: jax.Array | None, documents_BS: jax.Array | None
) -> Any:
    dtype = sum_dtype(x_BTC)
    total_BTC = jnp.zeros((), dtype)
    same_document = _same_document(taps, documents_BS, tail_BWC)
    for weight_C, offset, same_BT in zip(weight_KC, taps.offsets, same_document, strict=True):
        tap_BTC = _masked(same_BT, shifted_inputs(x_BTC, tail_BWC, offset, taps.count))
        total_BTC = total_BTC + tap_BTC.astype(dtype) * weight_C.astype(dtype)[None, None]
    return total_BTC.astype(x_BTC.dtype), (weight_KC, x_BTC, tail_BWC, documents_BS)


def _shifted_products_backward(taps: _Taps, saved: Any, dy_BTC: jax.Array) -> Any:
    weight_KC, x_BTC, tail_BWC, documents_BS = saved
    same_document = _same_document(taps, documents_BS, tail_BWC)
    dtype = sum_dtype(x_BTC)

    def input_gradient(first: int, count: int) -> jax.Array:
        """The gradient of the inputs [first, first + count); a negative index is in the tail."""
        total_BTC = jnp.zeros((), dtype)
        for weight_C, offset, same_BT in zip(weight_KC, taps.offsets, same_document, strict=True):
            # The mask is shifted too. If the masked gradient were shifted, XLA would store it for each tap on a TPU.
            same_BT = None if same_BT is None else shifted(same_BT, first - offset, count)
            tap_BTC = _masked(same_BT, shifted(dy_BTC, first - offset, count))
            total_BTC = total_BTC + tap_BTC.astype(dtype) * weight_C.astype(dtype)[None, None]
        return total_BTC.astype(x_BTC.dtype)

    dx_BTC = input_gradient(0, x_BTC.shape[1])
    dtail_BWC = None if tail_BWC is None else input_gradient(-tail_BWC.shape[1], tail_BWC.shape[1])
    dweight_KC = _weight_gradient(taps, x_BTC, tail_BWC, dy_BTC, same_document)
    return dweight_KC.astype(weight_KC.dtype), dx_BTC, dtail_BWC, None


_shifted_products = custom_vjp.from_rules(_shifted_products_forward, _shifted_products_backward, nondiff_argnums=(0,))


def _weight_gradient(
    taps: _Taps, x_BTC: jax.Array, tail_BWC: jax.Array | None, dy_BTC: jax.Array, same_document: Sequence[Any]
) -> jax.Array:
    """The gradient of the weights: for each tap, the sum over rows and time of inputs times output gradients, [K, C]
    in the dtype of the sums (``sum_dtype``).

    On a single CPU device, the gradient is summed over blocks of time, because one sum per tap over the whole input
    would read the input once per tap. A block has only outputs whose taps are all inside the input. The outputs before
    the first block and after the last block are summed without blocks.
    """
    dtype = sum_dtype(x_BTC)
    min_offset, max_offset = min(taps.offsets), max(taps.offsets)
    begin = min(max(0, -min_offset), taps.count)
    blocks = max(0, min(taps.count, x_BTC.shape[1] - max_offset) - begin) // BLOCK
    if not choices.sum_depthwise_gradient_in_blocks(blocks):
        blocks = 0
    end = begin + blocks * BLOCK

    def products(tap: int, start: int, stop: int) -> jax.Array:
        x_BLC = shifted_inputs(x_BTC, tail_BWC, start + taps.offsets[tap], stop - start).astype(dtype)
        same_BL = None if same_document[tap] is None else same_document[tap][:, start:stop]
        return _masked(same_BL, x_BLC * dy_BTC[:, start:stop].astype(dtype))

    def sum_without_blocks(start: int, stop: int) -> jax.Array:
        return jnp.stack([jnp.sum(products(tap, start, stop), axis=(0, 1)) for tap in range(len(taps.offsets))])

    if not blocks:
        return sum_without_blocks(0, taps.count)

    def add_block(i: jax.Array, sums: Any) -> Any:
        start = begin + i * BLOCK
        x_BUC = lax.dynamic_slice_in_dim(x_BTC, start + min_offset, BLOCK + max_offset - min_offset, axis=1)
        dy_BLC = lax.dynamic_slice_in_dim(dy_BTC, start, BLOCK, axis=1).astype(dtype)
        new_sums = []
        for sum_BLC, offset, same_BT in zip(sums, taps.offsets, same_document, strict=True):
            x_BLC = x_BUC[:, offset - min_offset : offset - min_offset + BLOCK].astype(dtype)
            same_BL = None if same_BT is None else lax.dynamic_slice_in_dim(same_BT, start, BLOCK, axis=1)
            new_sums.append(sum_BLC + _masked(same_BL, x_BLC * dy_BLC))
        return tuple(new_sums)

    zeros_BLC = jnp.zeros_like(x_BTC, dtype, (x_BTC.shape[0], BLOCK, x_BTC.shape[2]))
    sums = lax.fori_loop(0, blocks, add_block, (zeros_BLC,) * len(taps.offsets))
    dweight_KC = jnp.stack([jnp.sum(sum_BLC, axis=(0, 1)) for sum_BLC in sums])
    return dweight_KC + sum_without_blocks(0, begin) + sum_without_blocks(end, taps.count)


def _same_document(taps: _Taps, documents_BS: jax.Array | None, tail_BWC: jax.Array | None) -> list[Any]:
    """For each tap, whether its input is in the document of the output, [B, T']; None if each row is one document."""
    if documents_BS is None:
        return [None] * len(taps.offsets)
    first = 0 if tail_BWC is None else tail_BWC.shape[1]  # the index of x_0 in ``documents_BS``
    output_documents_BT = shifted(documents_BS, first + taps.document_offset, taps.count)
    return [shifted(documents_BS, first + offset, taps.count) == output_documents_BT for offset in taps.offsets]


def _masked(same_BT: jax.Array | None, x_BTC: jax.Array) -> jax.Array:
    return x_BTC if same_BT is None else jnp.where(same_BT[:, :, None], x_BTC, 0)

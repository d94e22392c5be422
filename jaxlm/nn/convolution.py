"""Convolution over time, plain, depthwise, and along a stream, and weight normalisation.

Legend: B batch, T time, K taps, C channels in, D channels out, L steps of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.window import Padding, Stream, causal_windows, extended, extent, windows
from jaxlm.sharding import active, platform
from jaxlm.spec import ArraySpec, Constant, Initializer, Normal


def convolution_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, bias: bool = True
) -> dict[str, ArraySpec]:
    """``weight`` [K, C, D...] and ``bias`` [D...] (there may be several output axes); ``axes`` name C and D...

    Example:
        >>> convolution_specs((3, 64, 128), ("embed", "mlp"), Normal(0.02))["weight"].axes
        (None, 'embed', 'mlp')
    """
    return linear_specs(shape, (None, *axes), init, inputs=2, bias=bias)


def convolution(
    params: dict[str, Any],
    x_BTC: jax.Array,
    *,
    padding: Padding,
    stride: int = 1,
    dilation: int = 1,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Cross-correlation over time (what frameworks call convolution), [B, T', D...]: see ``windows`` for the options.

    With ``segment_ids`` [B, T] no output reads another segment than its own: beyond a border stand zeros.

    The windows are laid side by side and multiplied once: on a CPU that is as fast as ``lax.conv``, gradients included,
    for 3 to 7 taps of 64 to 512 channels, and 3 to 7 times faster for a single step; and a window may be masked.
    """

    def convolve(params: Any, x: jax.Array, segment_ids: Any) -> jax.Array:
        kernel = params["weight"].shape[0]
        seen = windows(x, kernel, padding=padding, stride=stride, dilation=dilation, segment_ids=segment_ids)
        return linear(params, seen, inputs=2)

    return jax.checkpoint(convolve, prevent_cse=False)(params, x_BTC, segment_ids)  # the input is kept, not its windows


def causal_convolution(
    params: dict[str, Any], stream: Stream, x_BTC: jax.Array, tail_BWC: jax.Array | None, *, dilation: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """Convolution over each token and the real ones before it, [B, T, D...], and the tail for the next call."""

    def convolve(params: Any, stream: Stream, x: jax.Array, tail: Any) -> tuple[jax.Array, Any]:
        seen, tail = causal_windows(stream, x, tail, params["weight"].shape[0], dilation=dilation)
        return linear(params, seen, inputs=2), tail

    return jax.checkpoint(convolve, prevent_cse=False)(params, stream, x_BTC, tail_BWC)


# ---------------------------------------------------------------------------------------------------- depthwise


DepthwiseImplementation = Literal["reference", "shifts"]

BLOCK = 32
"""Steps that the gradient of depthwise weights takes together on a CPU."""


def depthwise_convolution_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, bias: bool = True
) -> dict[str, ArraySpec]:
    """``weight`` [K, C] and ``bias`` [C]; ``axes`` names C.

    Example:
        >>> depthwise_convolution_specs((4, 64), ("mlp",), Normal(0.02))["weight"].axes
        (None, 'mlp')
    """
    return linear_specs(shape, (None, *axes), init, bias=bias)


def depthwise_convolution(
    params: dict[str, Any],
    x_BTC: jax.Array,
    *,
    padding: Padding,
    dilation: int = 1,
    segment_ids: jax.Array | None = None,
    implementation: DepthwiseImplementation | None = None,
) -> jax.Array:
    """Each channel over time by taps of its own, ``y_t = bias + sum_k weight_k * x_{t + k * dilation - before}``.

    The result is [B, T', C]; see ``windows`` for the options.

    Args:
        segment_ids: [B, T]; no output reads another segment than its own: beyond a border stand zeros.
        implementation: ``reference`` (``lax.conv_general_dilated``, which knows no segments), ``shifts`` (products of
            the whole input, shifted by each tap, added up in one pass; own gradient, which keeps the input alone), or
            None for the best that is known: ``shifts`` on a CPU and for segments, ``reference`` elsewhere.

    Raises:
        ValueError: weights that do not fit, an input that is shorter than one window, segments for ``reference``, or an
            unknown implementation.
    """
    if implementation is None:
        implementation = "shifts" if platform() == "cpu" or segment_ids is not None else "reference"
    if implementation not in get_args(DepthwiseImplementation):
        choice = ", ".join(map(repr, get_args(DepthwiseImplementation)))
        raise ValueError(f"no depthwise_convolution implementation {implementation!r}: choose from {choice}")
    if implementation == "reference" and segment_ids is not None:
        raise ValueError(
            "depthwise_convolution implementation 'reference' takes no segment_ids: leave the implementation out"
        )
    weight_KC = params["weight"].astype(x_BTC.dtype)
    kernel, channels = weight_KC.shape
    if x_BTC.ndim != 3 or x_BTC.shape[-1] != channels:
        raise ValueError(f"the input {list(x_BTC.shape)} must be [batch, time, channels] with {channels} channels")
    before, after, count = extent(x_BTC.shape[1], kernel, padding=padding, dilation=dilation)
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
        place = offsets[-1] if padding == "valid" else 0
        y_BTC = _shifts(_Taps(offsets, place, count), weight_KC, x_BTC, segment_ids)
    return y_BTC if "bias" not in params else y_BTC + params["bias"].astype(x_BTC.dtype)[None, None, :]


def causal_depthwise_convolution(
    params: dict[str, Any], stream: Stream, x_BTC: jax.Array, tail_BWC: jax.Array | None, *, dilation: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """``depthwise_convolution`` of each token and the real ones before it, and the tail for the next call.

    See ``causal_convolution``.
    """
    if tail_BWC is None:
        ids = stream.segment_ids
        return depthwise_convolution(params, x_BTC, padding="causal", dilation=dilation, segment_ids=ids), None
    x_BSC, ids_BS, tail_BWC = extended(stream, x_BTC, tail_BWC)
    return depthwise_convolution(params, x_BSC, padding="valid", dilation=dilation, segment_ids=ids_BS), tail_BWC


@dataclasses.dataclass(frozen=True)
class _Taps:
    """Output t reads ``x[t + offset]`` of each tap and belongs to ``x[t + place]``; there are ``count`` outputs."""

    offsets: tuple[int, ...]
    place: int
    count: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifts(taps: _Taps, weight_KC: jax.Array, x_BTC: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return _shifts_forward(taps, weight_KC, x_BTC, segment_ids)[0]


def _shifts_forward(taps: _Taps, weight_KC: jax.Array, x_BTC: jax.Array, segment_ids: jax.Array | None) -> Any:
    total_BTC = jnp.zeros((), jnp.float32)
    for weight_C, offset, own_BT in zip(weight_KC, taps.offsets, _own(taps, segment_ids), strict=True):
        seen_BTC = _masked(own_BT, _shifted(x_BTC, offset, taps.count))
        total_BTC = total_BTC + seen_BTC.astype(jnp.float32) * weight_C.astype(jnp.float32)[None, None]
    return total_BTC.astype(x_BTC.dtype), (weight_KC, x_BTC, segment_ids)


def _shifts_backward(taps: _Taps, saved: Any, dy_BTC: jax.Array) -> Any:
    weight_KC, x_BTC, segment_ids = saved
    own = _own(taps, segment_ids)
    total_BTC = jnp.zeros((), jnp.float32)
    for weight_C, offset, own_BT in zip(weight_KC, taps.offsets, own, strict=True):
        seen_BTC = _shifted(_masked(own_BT, dy_BTC), -offset, x_BTC.shape[1])
        total_BTC = total_BTC + seen_BTC.astype(jnp.float32) * weight_C.astype(jnp.float32)[None, None]
    dweight_KC = _weight_gradient(taps, x_BTC, dy_BTC, own)
    return dweight_KC.astype(weight_KC.dtype), total_BTC.astype(x_BTC.dtype), None


_shifts.defvjp(_shifts_forward, _shifts_backward)


def _weight_gradient(taps: _Taps, x_BTC: jax.Array, dy_BTC: jax.Array, own: Sequence[Any]) -> jax.Array:
    """For each tap the sum over rows and time of the inputs that it saw times the gradients, [K, C] float32.

    On a CPU, in blocks of time: there, as many sums over the whole as there are taps read it as many times, and slowly.
    What a block cannot read whole, at both ends, is summed directly.
    """
    least, most = min(taps.offsets), max(taps.offsets)
    begin = min(max(0, -least), taps.count)
    blocks = max(0, min(taps.count, x_BTC.shape[1] - most) - begin) // BLOCK
    if platform() != "cpu" or active() is not None or blocks < 2:
        blocks = 0
    end = begin + blocks * BLOCK

    def seen(tap: int, start: int, stop: int) -> jax.Array:
        x_BLC = _shifted(x_BTC, taps.offsets[tap], taps.count)[:, start:stop].astype(jnp.float32)
        return _masked(None if own[tap] is None else own[tap][:, start:stop], x_BLC * dy_BTC[:, start:stop])

    def directly(start: int, stop: int) -> jax.Array:
        return jnp.stack([jnp.sum(seen(tap, start, stop), axis=(0, 1)) for tap in range(len(taps.offsets))])

    if not blocks:
        return directly(0, taps.count)

    def add_block(i: jax.Array, sums: Any) -> Any:
        start = begin + i * BLOCK
        x_BSC = lax.dynamic_slice_in_dim(x_BTC, start + least, BLOCK + most - least, axis=1)
        dy_BLC = lax.dynamic_slice_in_dim(dy_BTC, start, BLOCK, axis=1).astype(jnp.float32)
        added = []
        for sum_BLC, offset, own_BT in zip(sums, taps.offsets, own, strict=True):
            x_BLC = x_BSC[:, offset - least : offset - least + BLOCK].astype(jnp.float32)
            own_BL = None if own_BT is None else lax.dynamic_slice_in_dim(own_BT, start, BLOCK, axis=1)
            added.append(sum_BLC + _masked(own_BL, x_BLC * dy_BLC))
        return tuple(added)

    zeros_BLC = jnp.zeros((x_BTC.shape[0], BLOCK, x_BTC.shape[2]), jnp.float32)
    sums = lax.fori_loop(0, blocks, add_block, (zeros_BLC,) * len(taps.offsets))
    dweight_KC = jnp.stack([jnp.sum(sum_BLC, axis=(0, 1)) for sum_BLC in sums])
    return dweight_KC + directly(0, begin) + directly(end, taps.count)


def _shifted(x_BT: jax.Array, offset: int, count: int) -> jax.Array:
    """``x[:, t + offset]`` for t below ``count``, and zeros beyond its ends."""
    widths = [(0, 0, 0), (-offset, count + offset - x_BT.shape[1], 0)] + [(0, 0, 0)] * (x_BT.ndim - 2)
    return lax.pad(x_BT, jnp.zeros((), x_BT.dtype), widths)


def _own(taps: _Taps, segment_ids: jax.Array | None) -> list[Any]:
    """For each tap which outputs it reads from their own segment, [B, T']; None: all."""
    if segment_ids is None:
        return [None] * len(taps.offsets)
    own_BT = _shifted(segment_ids, taps.place, taps.count)
    return [_shifted(segment_ids, offset, taps.count) == own_BT for offset in taps.offsets]


def _masked(own_BT: jax.Array | None, x_BTC: jax.Array) -> jax.Array:
    return x_BTC if own_BT is None else jnp.where(own_BT[:, :, None], x_BTC, 0)


# ---------------------------------------------------------------------------------------- weight normalisation


def weight_norm_specs(specs: dict[str, ArraySpec], *, inputs: int) -> dict[str, ArraySpec]:
    """``direction`` and ``gain`` (one an output) for a ``weight`` whose first ``inputs`` axes are its input.

    The gain starts at the length that a Gaussian direction is expected to have, so that the weight starts as it would
    without normalisation.

    Raises:
        ValueError: a weight that does not start from a Gaussian.
    """
    weight = specs["weight"]
    if not isinstance(weight.init, Normal):
        raise ValueError(f"weight normalisation needs a weight that starts from Normal(...), got {weight.init}")
    length = weight.init.stddev * math.prod(weight.shape[:inputs]) ** 0.5
    # Decay of the direction would change nothing but the step size, decay of the gain is that of the weight.
    return {
        "direction": ArraySpec(weight.shape, weight.axes, weight.init),
        "gain": ArraySpec(weight.shape[inputs:], weight.axes[inputs:], Constant(length), decay=True),
        **{name: spec for name, spec in specs.items() if name != "weight"},
    }


def weight_norm(params: dict[str, Any], *, inputs: int) -> dict[str, Any]:
    """Parameters of ``linear`` or ``convolution``: ``weight = gain * direction / |direction|`` for each output
    (Salimans and Kingma 2016, eq. 2)."""
    direction = params["direction"].astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=tuple(range(inputs))))
    scale = jnp.broadcast_to(params["gain"] / length, direction.shape)
    rest = {name: leaf for name, leaf in params.items() if name not in ("direction", "gain")}
    return {"weight": direction * scale, **rest}

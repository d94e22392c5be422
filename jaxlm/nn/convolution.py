"""Convolution over time, plain and along a stream, and weight normalisation.

Legend: B batch, T time, K taps, C channels in, D channels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.window import Padding, Stream, causal_windows, windows
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

"""Convolution over time (not depthwise), for complete texts and for texts that are read in several calls.

Shapes: B batch, T time, T' outputs, K taps, C input channels, D output channels, W length of a tail
(``jaxlm.nn.convolution.window``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.nn.convolution.window import Padding, causal_windows, windows
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.segments import document_numbers
from jaxlm.nn.token_layout import TokenLayout
from jaxlm.spec import ArraySpec, Initializer, Params, require_arrays


def convolution_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, bias: bool = True
) -> dict[str, ArraySpec]:
    """Specs of ``weight`` [K, C, D...] and, if ``bias`` is True, ``bias`` [D...], with one or more output axes D.

    ``axes`` are the logical names of C and of each output axis.

    Example:
        >>> convolution_specs((3, 64, 128), ("embed", "mlp"), Normal(0.02))["weight"].axes
        (None, 'embed', 'mlp')
    """
    return linear_specs(shape, (None, *axes), init, num_input_axes=2, bias=bias)


def convolution(
    params: Params,
    x_BTC: jax.Array,
    *,
    padding: Padding,
    stride: int = 1,
    dilation: int = 1,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The convolution over time (a cross-correlation, as in PyTorch), [B, T', D...].

    See ``jaxlm.nn.convolution.window.windows`` for the options and the errors. With ``segment_ids`` [B, T], an output
    reads only its own document, and inputs of other documents count as zeros. A change of the id starts a document.

    The windows are gathered into one array and multiplied with the weights in one matmul. On a CPU, for 3 to 7 taps and
    64 to 512 channels, this is as fast as ``lax.conv``, gradients included. For a single token (T = 1), it is 3 to 7
    times as fast. Windows can also be masked at document boundaries, which ``lax.conv`` does not support.
    """

    def convolve(params: Params, x: jax.Array, documents: jax.Array | None) -> jax.Array:
        kernel = params["weight"].shape[0]
        windows_BTKC = windows(x, kernel, padding=padding, stride=stride, dilation=dilation, documents_BT=documents)
        return linear(params, windows_BTKC, num_input_axes=2)

    require_arrays(x_BTC=x_BTC, segment_ids=segment_ids)
    documents_BT = None if segment_ids is None else document_numbers(segment_ids)
    # Remat saves the input for the backward pass instead of its windows, which are K times as large.
    return jax.checkpoint(convolve, prevent_cse=False)(params, x_BTC, documents_BT)


def causal_convolution(
    params: Params, layout: TokenLayout, x_BTC: jax.Array, tail_BWC: jax.Array | None, *, dilation: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """The causal convolution over the real tokens of each row, [B, T, D...], and the tail for the next call.

    If ``tail_BWC`` is None, there are no earlier tokens, and the returned tail is None. See
    ``jaxlm.nn.convolution.window`` for ``layout`` and the tails.
    """

    require_arrays(x_BTC=x_BTC, tail_BWC=tail_BWC)

    def convolve(params: Params, layout: TokenLayout, x: jax.Array, tail: Any) -> tuple[jax.Array, Any]:
        windows_BTKC, tail = causal_windows(layout, x, tail, params["weight"].shape[0], dilation=dilation)
        return linear(params, windows_BTKC, num_input_axes=2), tail

    return jax.checkpoint(convolve, prevent_cse=False)(params, layout, x_BTC, tail_BWC)

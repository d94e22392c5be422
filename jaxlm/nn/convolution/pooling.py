"""Max pooling and k-max pooling over time.

Shapes: B batch, T time, T' windows, C channels, K taps of a window (or selected entries of a channel), W length of a
tail (``jaxlm.nn.convolution.window``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.convolution.window import Padding, causal_windows, taps
from jaxlm.nn.token_layout import TokenLayout
from jaxlm.spec import require_arrays


def max_pool(x_BTC: jax.Array, window: int, *, padding: Padding, stride: int = 1, dilation: int = 1) -> jax.Array:
    """The maximum of each window, for each channel, [B, T', C].

    ``window`` is the number of taps. See ``jaxlm.nn.convolution.window.windows`` for the other options and the errors.
    Padding counts as minus infinity. If several entries are equal to the maximum, they share the gradient,
    not always equally.
    """
    require_arrays(x_BTC=x_BTC)
    # On a CPU, the gradient of ``jnp.max`` over an array of windows takes 2 to 3 times as long.
    entries = taps(x_BTC, window, padding=padding, stride=stride, dilation=dilation, fill=-jnp.inf)
    return functools.reduce(jnp.maximum, entries)


def causal_max_pool(
    layout: TokenLayout, x_BTC: jax.Array, tail_BWC: jax.Array | None, window: int, *, dilation: int = 1
) -> tuple[jax.Array, Any]:
    """The maximum of each causal window over the real tokens of a row, [B, T, C], and the tail for the next call.

    If ``tail_BWC`` is None, there are no earlier tokens, and the returned tail is None. See
    ``jaxlm.nn.convolution.window`` for ``layout`` and the tails.
    """
    windows_BTKC, tail = causal_windows(layout, x_BTC, tail_BWC, window, dilation=dilation, fill=-jnp.inf)
    return jnp.max(windows_BTKC, axis=2), tail


def k_max_pool(x_BTC: jax.Array, k: int) -> jax.Array:
    """The ``k`` largest entries of each channel, in temporal order, [B, K, C].

    See Kalchbrenner et al. 2014, section 3.3. Among equal entries, the earliest are selected.

    Raises:
        ValueError: the input has fewer than ``k`` steps.
    """
    require_arrays(x_BTC=x_BTC)
    if x_BTC.shape[1] < k:
        raise ValueError(f"the input has {x_BTC.shape[1]} steps, fewer than k={k}: lengthen the input or lower k")
    _, indices_BCK = lax.top_k(jnp.swapaxes(x_BTC, 1, 2), k)
    indices_BKC = jnp.swapaxes(jnp.sort(indices_BCK, axis=-1), 1, 2)
    return jnp.take_along_axis(x_BTC, indices_BKC, axis=1)

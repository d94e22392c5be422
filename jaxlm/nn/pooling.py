"""Pooling over time.

Legend: B batch, T time, C channels, K entries kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.window import Padding, Stream, causal_windows, windows


def max_pool(x_BTC: jax.Array, window: int, *, padding: Padding, stride: int = 1, dilation: int = 1) -> jax.Array:
    """The largest entry that each window sees, channel by channel, [B, T', C]: see ``windows`` for the options.

    Beyond the ends stands minus infinity. Equal largest entries share the gradient.
    """
    seen = windows(x_BTC, window, padding=padding, stride=stride, dilation=dilation, fill=-jnp.inf)
    return jnp.max(seen, axis=2)


def causal_max_pool(
    stream: Stream, x_BTC: jax.Array, tail_BWC: jax.Array | None, window: int, *, dilation: int = 1
) -> tuple[jax.Array, Any]:
    """The largest of each entry and the real ones before it in a window, [B, T, C], and the tail for the next call."""
    seen, tail = causal_windows(stream, x_BTC, tail_BWC, window, dilation=dilation, fill=-jnp.inf)
    return jnp.max(seen, axis=2), tail


def k_max_pool(x_BTC: jax.Array, k: int) -> jax.Array:
    """The ``k`` largest entries of each channel in their order, [B, K, C] (Kalchbrenner et al. 2014, section 3.3).

    Of equal entries the earliest are kept.

    Raises:
        ValueError: fewer than ``k`` steps.
    """
    if x_BTC.shape[1] < k:
        raise ValueError(f"{x_BTC.shape[1]} steps are too few for the {k} largest: lengthen the input or lower k")
    _, places_BCK = lax.top_k(jnp.swapaxes(x_BTC, 1, 2), k)
    places_BKC = jnp.swapaxes(jnp.sort(places_BCK, axis=-1), 1, 2)
    return jnp.take_along_axis(x_BTC, places_BKC, axis=1)

"""Dropout (Srivastava et al. 2014), inverted: what is kept is scaled up, so that evaluation needs no scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_BITS = 16
"""Random bits per entry. Threefry makes 32 at a time, and is most of the cost of dropout on a CPU."""


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """``x`` with each entry set to zero with probability ``rate``, the others divided by ``1 - rate``.

    ``key=None`` or rate 0 returns ``x`` as it is.
    """
    if key is None or rate == 0.0:
        return x
    return jnp.where(keep_mask(key, rate, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Boolean array of ``shape``, True with probability ``1 - rate`` to the nearest multiple of 2^-16.

    A longer mask with one axis begins with the shorter one of the same key; attention over blocks of keys relies on it.
    """
    *batch, length = shape
    words = jax.random.bits(key, (*batch, -(-length * _BITS // 32)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*batch, -1)[..., :length]
    kept = round((1.0 - rate) * 2**_BITS)
    return bits < kept if kept < 2**_BITS else jnp.ones(shape, bool)

"""Inverted dropout (Srivastava et al. 2014): kept entries are scaled up, so that evaluation needs no scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.sharding import sharded_like

_BITS = 16
"""Random bits per mask entry. Threefry generates 32 bits at a time, so one call serves two entries. The calls of
Threefry are most of the cost of dropout on a CPU."""


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """``x`` with each entry set to zero with probability ``rate`` and all other entries divided by ``1 - rate``.

    If ``key`` is None or ``rate`` is 0, ``x`` is returned unchanged.

    Raises:
        ValueError: ``rate`` is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate} must be in [0, 1)")
    if key is None or rate == 0.0:
        return x
    return jnp.where(sharded_like(keep_mask(key, rate, x.shape), x), x / (1.0 - rate), jnp.zeros_like(x))


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """A boolean array of ``shape`` that is True with probability ``1 - rate``, rounded to a multiple of 2^-16.

    For one-dimensional masks with the same key, a longer mask starts with the shorter mask. Attention over blocks of
    keys relies on this property, which does not hold with ``jax_threefry_partitionable=False`` (not JAX's default).
    """
    *batch, length = shape
    words = jax.random.bits(key, (*batch, -(-length * _BITS // 32)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*batch, -1)[..., :length]
    threshold = round((1.0 - rate) * 2**_BITS)
    return bits < threshold if threshold < 2**_BITS else jnp.ones(shape, bool)


def keep_rows(key: jax.Array, rows: jax.Array, length: int, rate: float) -> jax.Array:
    """The dropout mask of some rows of a matrix, [R, length]; True: keep.

    Entry (row, s) depends only on the random key, the index of the row in the matrix and s. With keys of the
    implementation ``rbg``, it also depends on ``rows``, because JAX then draws all rows of a ``vmap`` from one key.

    Args:
        rows: [R], the indices of the rows.
    """
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda row_key: keep_mask(row_key, rate, (length,)))(row_keys)

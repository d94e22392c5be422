"""Inverted dropout (Srivastava et al. 2014): training scales up the kept entries, so evaluation needs no scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.sharding import sharded_like

_BITS = 16
"""Random bits per mask entry. Threefry generates words of 32 bits, so one word is enough for two entries. On a CPU, the
generation of random bits takes most of the time of dropout."""


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
    """A boolean array of ``shape`` whose entries are True (keep) with probability ``1 - rate``.

    The probability is rounded to a multiple of 2^-16. If two one-dimensional masks have the same key and rate, the
    longer mask starts with the shorter mask. Attention over blocks of keys relies on this property. It does not hold if
    ``jax_threefry_partitionable`` is False (JAX's default is True).
    """
    *batch, length = shape
    words = jax.random.bits(key, (*batch, -(-length * _BITS // 32)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*batch, 2 * words.shape[-1])[..., :length]
    threshold = round((1.0 - rate) * 2**_BITS)
    return bits < threshold if threshold < 2**_BITS else jnp.ones(shape, bool)


def keep_rows(key: jax.Array, rows: jax.Array, length: int, rate: float) -> jax.Array:
    """The dropout mask of some rows of a matrix, bool [R, length]; True: keep.

    Entry s of a row depends only on the random key, the index of the row in the matrix, and s. With a random key of the
    implementation ``rbg``, it also depends on all of ``rows``, because JAX then draws all rows of a ``vmap`` from one
    key.

    Args:
        rows: [R], the indices of the rows in the matrix.
    """
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda row_key: keep_mask(row_key, rate, (length,)))(row_keys)

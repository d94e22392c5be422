"""The time axis of an array, split into chunks of equal length.

Shapes: B batch, T time, C number of time steps of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split_time(x: jax.Array, C: int) -> jax.Array:
    """``x`` [B, T, ...] split into chunks of time, [chunks, B, C, ...]. The last chunk is padded with zeros."""
    B, T = x.shape[:2]
    chunks = -(-T // C)
    x = jnp.pad(x, ((0, 0), (0, chunks * C - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, chunks, C, *x.shape[2:]), 1, 0)


def join_time(chunks: jax.Array, T: int) -> jax.Array:
    """The first T steps of ``chunks`` [chunks, B, C, ...], as [B, T, ...]: inverse of :func:`split_time`."""
    num_chunks, B, C = chunks.shape[:3]
    return jnp.moveaxis(chunks, 0, 1).reshape(B, num_chunks * C, *chunks.shape[3:])[:, :T]

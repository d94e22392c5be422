"""The time axis of an array, split into chunks of equal length; loops over chunks; and padding.

Shapes: B batch, T time, C number of time steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def split_time(x: jax.Array, C: int) -> jax.Array:
    """``x`` [B, T, ...] split into chunks of time, [chunks, B, C, ...]. The last chunk is padded with zeros."""
    B, T = x.shape[:2]
    chunks = -(-T // C)
    return jnp.moveaxis(pad_axis(x, 0, chunks * C - T).reshape(B, chunks, C, *x.shape[2:]), 1, 0)


def join_time(chunks: jax.Array, T: int) -> jax.Array:
    """The first T steps of ``chunks`` [chunks, B, C, ...], as [B, T, ...]: inverse of :func:`split_time`."""
    num_chunks, B, C = chunks.shape[:3]
    return jnp.moveaxis(chunks, 0, 1).reshape(B, num_chunks * C, *chunks.shape[3:])[:, :T]


def pad_axis(x: jax.Array, before: int, after: int, *, axis: int = 1) -> jax.Array:
    """``x`` with zeros before and after its entries along one axis, which is the time axis by default."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return jnp.pad(x, pads)


def loop_over_chunks(T: int, C: int, run: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """The final carry of ``carry = run(steps_before, steps, carry)`` over all chunks. The last chunk may be shorter.

    ``steps_before`` is the number of steps of all earlier chunks, and ``steps`` is the number of steps of the chunk.
    """
    count, rest = divmod(T, C)
    if count == 1:
        carry = run(0, C, carry)
    elif count:
        carry = lax.fori_loop(0, count, lambda index, carry: run(index * C, C, carry), carry)
    return run(count * C, rest, carry) if rest else carry

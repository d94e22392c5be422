"""A tile of attention's scores in a TPU's fast memory: how terms are worked out there, and their gradients.

Relative terms turn diagonals into columns: rotations within the vector unit do, which JAX knows no gradient of.
Shapes: R queries of a block, E keys, P = R + E places of a strip, N rows of a table, K head width, Y any width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.devices import LANES
from jaxlm.nn.kernels.blockwise_attention import dot
from jaxlm.nn.term import Tile

SUBLANES = 8
"""Rows of a vector, in float32."""
SUBLANE_BITS, LANE_BITS = 3, 7


class Block(Tile):
    """A tile in fast memory, where integers of queries are a column already, and those of keys a row."""

    def places(self) -> tuple[jax.Array, jax.Array]:
        shape = self.rows, self.columns
        return self.row + lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)

    def queries(self, x_T: jax.Array) -> jax.Array:
        return x_T

    def keys(self, x_S: jax.Array) -> jax.Array:
        return x_S

    def diagonals(self, strip_KP: jax.Array, q_RK: jax.Array | None, scale: float) -> jax.Array:
        if q_RK is None:
            return _diagonals_of_row(self.rows, strip_KP)
        return _diagonals(scale, q_RK, strip_KP)

    def product(self, q_RK: jax.Array, table_KN: jax.Array, scale: float) -> jax.Array:
        return _product(scale, q_RK, table_KN)

    def shifted(self, x_RN: jax.Array, first_R1: jax.Array) -> jax.Array:
        return _shifted(self.columns, x_RN.shape[1] - self.columns, x_RN, first_R1)


def _rotated(x_RP: jax.Array, shift: int) -> jax.Array:
    """Row i rotated to the right by ``shift + i``."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.roll(x_RP, shift, 1, stride=1, stride_axis=0)


def _each_rotated(x_RP: jax.Array, shift_R1: jax.Array, bits: int) -> jax.Array:
    """Row i rotated to the right by ``shift[i]``, which has so many bits: by one bit after the other."""
    from jax.experimental.pallas import tpu as pltpu

    for bit in range(bits):
        x_RP = jnp.where(_bit(shift_R1, bit), pltpu.roll(x_RP, 1 << bit, 1), x_RP)
    return x_RP


def _bit(x: jax.Array, bit: int) -> jax.Array:
    return (x >> bit) & 1 > 0


def _wide(dout_RE: jax.Array, more: int) -> jax.Array:
    """With so many more columns, of zeros."""
    return jnp.concatenate([dout_RE, jnp.zeros((dout_RE.shape[0], more), dout_RE.dtype)], axis=1) if more else dout_RE


def _turn(x_RY: jax.Array) -> jax.Array:
    """Rows in the opposite order, float32: by a product, for the vector unit does not turn them. Each sum has one
    entry, so it is exact."""
    row, column = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    turned = (row + column == LANES - 1).astype(x_RY.dtype)
    precision = lax.Precision.HIGHEST if x_RY.dtype == jnp.float32 else None
    turn = functools.partial(jnp.dot, turned, precision=precision, preferred_element_type=jnp.float32)
    return jnp.concatenate([turn(x_RY[end - LANES : end]) for end in range(x_RY.shape[0], 0, -LANES)])


def _factors(dproduct_RN: jax.Array, q_RK: jax.Array, table_KN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and of the table from that of their product, which is in their dtype as all factors here are."""
    dq_RK, dtable_KN = dot(dproduct_RN, table_KN, 1, 1), dot(q_RK, dproduct_RN, 0, 0)
    return dq_RK.astype(q_RK.dtype), dtable_KN.astype(table_KN.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(scale: float, q_RK: jax.Array, table_KN: jax.Array) -> jax.Array:
    return dot(q_RK, table_KN, 1, 0) * scale


_product.defvjp(
    lambda scale, q, table: (_product(scale, q, table), (q, table)),
    lambda scale, saved, dproduct: _factors((dproduct * scale).astype(saved[0].dtype), *saved),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _shifted(columns: int, more: int, x_RN: jax.Array, first_R1: jax.Array) -> jax.Array:
    """Entry (i, first[i] + j) of x at (i, j), [R, E]; x has so many ``more`` columns, and ``first`` is none beyond.

    Whole vectors are chosen first, so that few columns are left to be rotated.
    """
    from jax.experimental.pallas import tpu as pltpu

    for bit in reversed(range(_bits_of_vectors(more))):
        size = LANES << bit
        x_RN = _wide(x_RN, max(columns + 2 * size - x_RN.shape[1], 0))
        x_RN = jnp.where(_bit(first_R1, LANE_BITS + bit), x_RN[:, size : columns + 2 * size], x_RN[:, : columns + size])
    for bit in range(LANE_BITS):
        x_RN = jnp.where(_bit(first_R1, bit), pltpu.roll(x_RN, x_RN.shape[1] - (1 << bit), 1), x_RN)
    return x_RN[:, :columns]


def _shifted_backward(columns: int, more: int, first_R1: jax.Array, dout_RE: jax.Array) -> tuple[jax.Array, None]:
    dx_RN = _each_rotated(_wide(dout_RE, LANES), first_R1, LANE_BITS)
    for bit in range(_bits_of_vectors(more)):
        zeros = jnp.zeros((dx_RN.shape[0], LANES << bit), dx_RN.dtype)
        later, as_it_is = (jnp.concatenate(both, axis=1) for both in ((zeros, dx_RN), (dx_RN, zeros)))
        dx_RN = jnp.where(_bit(first_R1, LANE_BITS + bit), later, as_it_is)
    return _wide(dx_RN, max(columns + more - dx_RN.shape[1], 0))[:, : columns + more], None


def _bits_of_vectors(more: int) -> int:
    """Bits of how many whole vectors a row may begin later."""
    return (more // LANES).bit_length()


_shifted.defvjp(lambda columns, more, x, first: (_shifted(columns, more, x, first), first), _shifted_backward)


def _aligned(x_RP: jax.Array) -> jax.Array:
    R, P = x_RP.shape
    return _rotated(x_RP, P - R)[:, : P - R]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diagonals(scale: float, q_RK: jax.Array, strip_KP: jax.Array) -> jax.Array:
    return _aligned(_product(scale, q_RK, strip_KP))


def _diagonals_backward(scale: float, saved: Any, dout_RE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With the last row first, for a rotation can only grow from row to row."""
    q_RK, strip_KP = saved
    R, dtype = q_RK.shape[0], q_RK.dtype
    dproduct_RP = _rotated(_wide(_turn((dout_RE * scale).astype(dtype)), R), 1).astype(dtype)
    dq_RK, dstrip_KP = _factors(dproduct_RP, _turn(q_RK).astype(dtype), strip_KP)
    return _turn(dq_RK).astype(dtype), dstrip_KP


_diagonals.defvjp(lambda scale, q, strip: (_diagonals(scale, q, strip), (q, strip)), _diagonals_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diagonals_of_row(R: int, strip_1P: jax.Array) -> jax.Array:
    return _aligned(jnp.broadcast_to(strip_1P, (R, strip_1P.shape[1])))


def _diagonals_of_row_backward(R: int, _: None, dout_RE: jax.Array) -> tuple[jax.Array]:
    """Sums along diagonals: groups of rows are aligned and added up, and then the rows of the sum."""
    from jax.experimental.pallas import tpu as pltpu

    wide_RP = _wide(dout_RE, R)
    groups = (pltpu.roll(wide_RP[row : row + SUBLANES], R - row, 1) for row in range(0, R, SUBLANES))
    total = functools.reduce(jnp.add, groups)
    total = _each_rotated(total, SUBLANES - 1 - lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0), SUBLANE_BITS)
    return (pltpu.roll(jnp.sum(total, axis=0, keepdims=True), total.shape[1] - SUBLANES + 1, 1),)


_diagonals_of_row.defvjp(lambda R, strip: (_diagonals_of_row(R, strip), None), _diagonals_of_row_backward)

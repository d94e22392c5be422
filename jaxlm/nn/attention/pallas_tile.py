"""Operations of attention biases on a tile of scores in the VMEM of a TPU, and their gradients.

A bias of relative positions moves the diagonals of a matrix into columns, by rotations in the vector unit
(``pltpu.roll``). The gradients are custom, because JAX has no gradient for ``pltpu.roll``.

Shapes: R queries and E keys of a tile, P = R + E columns of a strip (the columns that a tile needs from a table with
one column per distance), N columns of a table, K head width, Y any width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.devices import LANES, SUBLANES
from jaxlm.nn.attention.bias import Tile
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pltpu
from jaxlm.nn.linear import dot

SUBLANE_BITS, LANE_BITS = 3, 7
"""log2 of ``SUBLANES`` and of ``LANES``."""


class VmemTile(Tile):
    """A tile in VMEM. Its first key is key 0, so ``column`` is 0.

    Integer arrays are already sliced: a column [R, 1] for the queries, a row [1, E] for the keys.
    """

    def indices(self) -> tuple[jax.Array, jax.Array]:
        shape = self.rows, self.columns
        return self.row + lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)

    def query_column(self, x_T: jax.Array) -> jax.Array:
        return x_T

    def key_row(self, x_S: jax.Array) -> jax.Array:
        return x_S

    def shifted_product(self, strip_KP: jax.Array, q_RK: jax.Array | None, scale: float) -> jax.Array:
        if q_RK is None:
            return _shifted_row(self.rows, strip_KP)
        return _shifted_product(scale, q_RK, strip_KP)

    def product(self, q_RK: jax.Array, table_KN: jax.Array, scale: float) -> jax.Array:
        return _product(scale, q_RK, table_KN)

    def gather_shifted(self, x_RN: jax.Array, first_R1: jax.Array) -> jax.Array:
        return _gather_shifted(self.columns, x_RN.shape[1] - self.columns, x_RN, first_R1)


def _rotate_progressively(x_RP: jax.Array, shift: int) -> jax.Array:
    """``x`` with row i rotated to the right by ``shift + i``."""
    return pltpu.roll(x_RP, shift, 1, stride=1, stride_axis=0)


def _rotate_rows_by(x_RP: jax.Array, shift_R1: jax.Array, bits: int) -> jax.Array:
    """``x`` with row i rotated to the right by ``shift[i]`` < 2^bits, with one rotation for each bit."""
    for bit in range(bits):
        x_RP = jnp.where(_is_bit_set(shift_R1, bit), pltpu.roll(x_RP, 1 << bit, 1), x_RP)
    return x_RP


def _is_bit_set(x: jax.Array, bit: int) -> jax.Array:
    return (x >> bit) & 1 > 0


def _append_zero_columns(x_RY: jax.Array, count: int) -> jax.Array:
    """``x`` with ``count`` columns of zeros appended on the right."""
    return jnp.concatenate([x_RY, jnp.zeros((x_RY.shape[0], count), x_RY.dtype)], axis=1) if count else x_RY


def _reverse_rows(x_RY: jax.Array) -> jax.Array:
    """The rows of ``x`` in reverse order, float32.

    The number of rows must be a multiple of LANES. The function multiplies by a permutation matrix, because the vector
    unit cannot reverse rows. Each sum has one nonzero term, so the result is exact.
    """
    row, column = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    permutation = (row + column == LANES - 1).astype(x_RY.dtype)
    precision = lax.Precision.HIGHEST if x_RY.dtype == jnp.float32 else None
    reverse = functools.partial(jnp.dot, permutation, precision=precision, preferred_element_type=jnp.float32)
    return jnp.concatenate([reverse(x_RY[end - LANES : end]) for end in range(x_RY.shape[0], 0, -LANES)])


def _factor_gradients(dproduct_RN: jax.Array, q_RK: jax.Array, table_KN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of q and of the table, from the gradient of their product.

    The three arguments must have the same dtype, which is also the dtype of the gradients.
    """
    dq_RK, dtable_KN = dot(dproduct_RN, table_KN, (1, 1)), dot(q_RK, dproduct_RN, (0, 0))
    return dq_RK.astype(q_RK.dtype), dtable_KN.astype(table_KN.dtype)


_product = custom_vjp.from_rules(
    lambda scale, q, table: (dot(q, table, (1, 0)) * scale, (q, table)),
    lambda scale, saved, dproduct: _factor_gradients((dproduct * scale).astype(saved[0].dtype), *saved),
    nondiff_argnums=(0,),
)


def _gather_shifted_forward(
    columns: int, max_shift: int, x_RN: jax.Array, first_R1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """An array [R, E] whose entry (i, j) is entry (i, first[i] + j) of ``x`` [R, E + max_shift]; E is ``columns``.

    Each ``first[i]`` must be in [0, max_shift]. The shifts by multiples of LANES come first, so that the later
    rotations have fewer columns.
    """
    for bit in reversed(range(_vector_shift_bits(max_shift))):
        size = LANES << bit
        x_RN = _append_zero_columns(x_RN, max(columns + 2 * size - x_RN.shape[1], 0))
        shifted, unshifted = x_RN[:, size : columns + 2 * size], x_RN[:, : columns + size]
        x_RN = jnp.where(_is_bit_set(first_R1, LANE_BITS + bit), shifted, unshifted)
    for bit in range(LANE_BITS):
        x_RN = jnp.where(_is_bit_set(first_R1, bit), pltpu.roll(x_RN, x_RN.shape[1] - (1 << bit), 1), x_RN)
    return x_RN[:, :columns], first_R1


def _gather_shifted_backward(
    columns: int, max_shift: int, first_R1: jax.Array, dout_RE: jax.Array
) -> tuple[jax.Array, None]:
    dx_RN = _rotate_rows_by(_append_zero_columns(dout_RE, LANES), first_R1, LANE_BITS)
    for bit in range(_vector_shift_bits(max_shift)):
        zeros = jnp.zeros((dx_RN.shape[0], LANES << bit), dx_RN.dtype)
        shifted, unshifted = (jnp.concatenate(both, axis=1) for both in ((zeros, dx_RN), (dx_RN, zeros)))
        dx_RN = jnp.where(_is_bit_set(first_R1, LANE_BITS + bit), shifted, unshifted)
    return _append_zero_columns(dx_RN, max(columns + max_shift - dx_RN.shape[1], 0))[:, : columns + max_shift], None


def _vector_shift_bits(max_shift: int) -> int:
    """The number of bits of the largest shift, measured in units of LANES columns."""
    return (max_shift // LANES).bit_length()


_gather_shifted = custom_vjp.from_rules(_gather_shifted_forward, _gather_shifted_backward, nondiff_argnums=(0, 1))


def _diagonals_to_columns(x_RP: jax.Array) -> jax.Array:
    """An array [R, E] whose entry (i, j) is entry (i, R - i + j) of ``x`` [R, R + E]."""
    R, P = x_RP.shape
    return _rotate_progressively(x_RP, P - R)[:, : P - R]


def _shifted_product_backward(scale: float, saved: Any, dout_RE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of q and of the strip.

    Row i must be rotated by R - i, but ``pltpu.roll`` can only increase the shift from row to row. So the rows are
    reversed first.
    """
    q_RK, strip_KP = saved
    R, dtype = q_RK.shape[0], q_RK.dtype
    dproduct_RP = _rotate_progressively(
        _append_zero_columns(_reverse_rows((dout_RE * scale).astype(dtype)), R), 1
    ).astype(dtype)
    dq_RK, dstrip_KP = _factor_gradients(dproduct_RP, _reverse_rows(q_RK).astype(dtype), strip_KP)
    return _reverse_rows(dq_RK).astype(dtype), dstrip_KP


_shifted_product = custom_vjp.from_rules(
    lambda scale, q, strip: (_diagonals_to_columns(_product(scale, q, strip)), (q, strip)),
    _shifted_product_backward,
    nondiff_argnums=(0,),
)


def _shifted_row_backward(R: int, _: None, dout_RE: jax.Array) -> tuple[jax.Array]:
    """The gradient of the strip: the sums of ``dout`` along its diagonals.

    First, groups of SUBLANES rows are shifted into alignment with each other and added. Then the SUBLANES rows of this
    sum are shifted into alignment with each other and added.
    """
    padded_RP = _append_zero_columns(dout_RE, R)
    groups = (pltpu.roll(padded_RP[row : row + SUBLANES], R - row, 1) for row in range(0, R, SUBLANES))
    total = functools.reduce(jnp.add, groups)
    total = _rotate_rows_by(total, SUBLANES - 1 - lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0), SUBLANE_BITS)
    return (pltpu.roll(jnp.sum(total, axis=0, keepdims=True), total.shape[1] - SUBLANES + 1, 1),)


_shifted_row = custom_vjp.from_rules(
    lambda R, strip: (_diagonals_to_columns(jnp.broadcast_to(strip, (R, strip.shape[1]))), None),
    _shifted_row_backward,
    nondiff_argnums=(0,),
)

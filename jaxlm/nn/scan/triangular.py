"""Triangular systems of the delta rules: ``u + lower @ u = right`` with a strictly lower triangular matrix ``lower``.

Shapes: B batch, H heads, L steps (rows of the system, a power of two), V columns, P pairs of blocks of S rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp


def _forward(lower_BHLL: jax.Array, right_BHLV: jax.Array) -> Any:
    """The solution u of ``u + lower @ u = right``, [B, H, L, V] in the dtype of the arguments (float32).

    Matmuls compute the inverse of ``I + lower``. ``lax.linalg.triangular_solve`` is not used, because it cannot be
    sharded and is slower for many small systems. On a CPU, it calls BLAS, whose threads wait for each other. On two
    busy cores, it was 20 times as slow for L 32 and V 64.

    Args:
        lower_BHLL: a strictly lower triangular matrix. Entries on and above the diagonal are ignored.

    Example:
        >>> lower = jnp.array([[0.0, 0.0], [0.5, 0.0]])
        >>> solve_unit_lower(lower[None, None], jnp.ones((1, 1, 2, 1))).ravel().tolist()
        [1.0, 0.5]
    """
    inverse_BHLL = inverse_unit_lower(lower_BHLL)
    solution_BHLV = _product(inverse_BHLL, right_BHLV)
    return solution_BHLV, (inverse_BHLL, solution_BHLV)


def _backward(saved: Any, dsolution_BHLV: jax.Array) -> Any:
    inverse_BHLL, solution_BHLV = saved
    dright_BHLV = _product(inverse_BHLL.mT, dsolution_BHLV)
    return -jnp.tril(_product(dright_BHLV, solution_BHLV.mT), -1), dright_BHLV


solve_unit_lower = custom_vjp.from_rules(_forward, _backward)


def inverse_unit_lower(lower_BHLL: jax.Array) -> jax.Array:
    """The inverse of ``I + lower``, [B, H, L, L], for a strictly lower triangular matrix.

    Diagonal blocks of 1, 2, 4, ... rows of ``I + lower`` are joined in pairs. The inverse of a pair [[E, 0], [C, F]] is
    ``[[inverse(E), 0], [-inverse(F) @ C @ inverse(E), inverse(F)]]``. The Neumann series of the inverse would need
    powers of ``lower``, which could overflow.
    """
    L = lower_BHLL.shape[3]
    sizes = [1 << power for power in range(L.bit_length() - 1)]
    return (_join_masked if choices.whole_triangular_systems() else _join_blocks)(lower_BHLL, sizes)


def _join_blocks(lower_BHLL: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The inverse of ``I + lower``, computed with arrays [B, H, P, S, S] that have only the diagonal blocks of a size.

    Args:
        sizes: the sizes of the blocks that are joined, in ascending order.
    """
    B, H, L, _ = lower_BHLL.shape
    inverse_BHPSS = jnp.ones_like(lower_BHLL[:, :, :, :1, None])
    for size in sizes:
        P, pair_size = L // (2 * size), 2 * size
        # Two reshapes, because a single one would lose the sharding.
        pairs = lower_BHLL.reshape(B, H, P, pair_size, L).reshape(B, H, P, pair_size, P, pair_size)
        below_BHPSS = jnp.moveaxis(jnp.diagonal(pairs[:, :, :, size:, :, :size], axis1=2, axis2=4), -1, 2)
        first, second = inverse_BHPSS[:, :, 0::2], inverse_BHPSS[:, :, 1::2]
        below_BHPSS = -_product(_product(second, below_BHPSS), first)
        rows = ((first, jnp.zeros_like(first)), (below_BHPSS, second))
        inverse_BHPSS = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
    return inverse_BHPSS[:, :, 0]


def _join_masked(lower_BHLL: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The result of :func:`_join_blocks`, computed with matrices [L, L] that are zero outside the blocks."""
    t, s = np.indices(lower_BHLL.shape[2:])
    inverse_BHLL = jnp.broadcast_to(jnp.eye(len(t), dtype=lower_BHLL.dtype), lower_BHLL.shape)
    for size in sizes:
        is_joined = (t // (2 * size) == s // (2 * size)) & (t // size > s // size)
        below_BHLL = jnp.where(is_joined[None, None], lower_BHLL, 0.0)
        if size > 1:
            below_BHLL = _product(_product(inverse_BHLL, below_BHLL), inverse_BHLL)
        inverse_BHLL = inverse_BHLL - below_BHLL
    return inverse_BHLL


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

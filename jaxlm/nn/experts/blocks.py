"""Grouped matmuls as loops over blocks of rows (``blocks``). The rows of a block belong to one expert.

The outer loop runs over the experts that have rows, and the inner loop over the blocks of the expert. So a weight is
read once, blocks without rows take no time, and the gradient of a weight is summed in an array of the size of one
expert. The two functions of this module are each other's gradients, so they can be differentiated repeatedly in reverse
mode.

Shapes: E experts, M blocks, S rows of a block, C and D input and output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.custom_gradient import custom_vjp, sum_dtype, vary_equally


class Blocks(NamedTuple):
    """The blocks of each expert. The blocks of an expert are consecutive.

    Attributes:
        starts: [E], the first block of each expert.
        counts: [E], the number of blocks of each expert.
    """

    starts: jax.Array
    counts: jax.Array


def _loop(
    blocks: Blocks,
    run_expert: Callable[[Any, Callable[..., Any], Any], Any],
    carry: Any,
) -> Any:
    """The last carry of ``carry = run_expert(e, loop, carry)`` over the experts ``e`` that have blocks.

    ``loop(run_block, carry)`` returns the last carry of ``carry = run_block(m, carry)`` over the blocks ``m`` of the
    expert.
    """
    experts_E = jnp.argsort(blocks.counts == 0, stable=True)  # first the experts that have blocks

    def step(index: Any, carry: Any) -> Any:
        e = experts_E[index]
        start = blocks.starts[e]
        return run_expert(e, lambda run, carry: lax.fori_loop(start, start + blocks.counts[e], run, carry), carry)

    return lax.fori_loop(0, jnp.sum(blocks.counts > 0), step, carry)


def _matmul(x_MSC: jax.Array, w: jax.Array, blocks: Blocks, transposed: bool) -> jax.Array:
    """``x[m] @ w[e]`` for each block m of each expert e, [M, S, D], with zeros in the other blocks.

    Args:
        w: [E, C, D], or [E, D, C] if ``transposed``.
        transposed: compute ``x[m] @ w[e].T`` instead.
    """
    y_MSD, *_ = vary_equally((jnp.zeros((*x_MSC.shape[:2], w.shape[1 if transposed else 2]), x_MSC.dtype), x_MSC, w))

    def run_expert(e: Any, loop: Callable[..., Any], y_MSD: jax.Array) -> jax.Array:
        w_CD = w[e].T if transposed else w[e]
        return loop(lambda m, y_MSD: lax.dynamic_update_index_in_dim(y_MSD, x_MSC[m] @ w_CD, m, 0), y_MSD)

    return _loop(blocks, run_expert, y_MSD) if y_MSD.size else y_MSD


def _sum_of_products(x_MSC: jax.Array, y_MSD: jax.Array, blocks: Blocks) -> jax.Array:
    """The sum of ``x[m].T @ y[m]`` over the blocks m of each expert, [E, C, D], in float32 or float64."""
    dtype, C, D = sum_dtype(x_MSC), x_MSC.shape[2], y_MSD.shape[2]
    sum_ECD, zeros_CD, *_ = vary_equally(
        (jnp.zeros((blocks.counts.shape[0], C, D), dtype), jnp.zeros((C, D), dtype), x_MSC, y_MSD)
    )

    def run_block(m: Any, total_CD: jax.Array) -> jax.Array:
        return total_CD + jnp.matmul(x_MSC[m].T, y_MSD[m], preferred_element_type=dtype)

    def run_expert(e: Any, loop: Callable[..., Any], sum_ECD: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(sum_ECD, loop(run_block, zeros_CD), e, 0)

    return _loop(blocks, run_expert, sum_ECD) if x_MSC.size else sum_ECD


def _matmul_backward(transposed: bool, saved: Any, dy_MSD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MSC, w, blocks = saved
    left, right = (dy_MSD, x_MSC) if transposed else (x_MSC, dy_MSD)
    return matmul(dy_MSD, w, blocks, not transposed), sum_of_products(left, right, blocks).astype(w.dtype), None


def _sum_backward(saved: Any, dsum_ECD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MSC, y_MSD, blocks = saved
    dsum_ECD = dsum_ECD.astype(x_MSC.dtype)
    return matmul(y_MSD, dsum_ECD, blocks, True), matmul(x_MSC, dsum_ECD, blocks, False), None


# The forward rules call the functions with a custom gradient, so that a second differentiation uses their rules too.
matmul = custom_vjp(_matmul, nondiff_argnums=(3,))
matmul.defvjp(lambda x, w, blocks, transposed: (matmul(x, w, blocks, transposed), (x, w, blocks)), _matmul_backward)
sum_of_products = custom_vjp(_sum_of_products)
sum_of_products.defvjp(lambda x, y, blocks: (sum_of_products(x, y, blocks), (x, y, blocks)), _sum_backward)

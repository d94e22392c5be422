"""Permutations of rows whose gradient is a gather, and the grouping of rows by expert for grouped matmuls.

An assignment is a pair of a token and one of its selected experts.

Shapes: R and Q numbers of rows, D width of a row, A assignments, E experts, S rows of a block, P slots (rows of all
blocks).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.custom_gradient import custom_vjp


def _permute_forward(x_RD: jax.Array, index_Q: jax.Array, inverse_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x[index]``, [Q, D], with zeros where ``index`` is out of range.

    Args:
        index_Q: for each row of the result, its index in ``x``. The indices that are in range must be distinct.
        inverse_R: for each row of ``x``, its index in the result; out of range if the result does not contain the row.
            The gradient is a gather with ``inverse_R``. Autodiff would use a scatter, which is slow.
    """
    return _gather_rows(x_RD, index_Q), inverse_R


def _gather_rows(x_RD: jax.Array, index_Q: jax.Array) -> jax.Array:
    return x_RD.at[index_Q].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _permute_backward(inverse_R: jax.Array, dy_QD: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather_rows(dy_QD, inverse_R), None, None


permute_rows = custom_vjp.from_rules(_permute_forward, _permute_backward)


class Groups(NamedTuple):
    """The assignments, sorted by expert. The slots of each expert begin at the start of a block.

    Attributes:
        assignments: [P], the assignment in each slot; A for an empty slot.
        slots: [A], the slot of each assignment; P for an assignment without a slot (:func:`group_by_expert`).
        sizes: [E], the number of assignments of each expert.
        block_experts: [P / S], the expert of each block; the last expert for empty blocks at the end.
    """

    assignments: jax.Array
    slots: jax.Array
    sizes: jax.Array
    block_experts: jax.Array


def group_by_expert(expert_A: jax.Array, num_experts: int, block_rows: int) -> Groups:
    """The assignments, sorted by expert, in blocks of ``block_rows`` slots.

    Args:
        expert_A: the expert of each assignment. An assignment whose expert is not in [0, E) gets no slot.
        num_experts: E.
        block_rows: S.

    Example:
        >>> groups = group_by_expert(jnp.array([1, 0, 1, 1]), num_experts=2, block_rows=2)
        >>> groups.assignments.tolist(), groups.slots.tolist(), groups.block_experts.tolist()
        ([1, 4, 0, 2, 3, 4], [2, 0, 3, 4], [0, 1, 1])
    """
    A, E, S = expert_A.shape[0], num_experts, block_rows
    num_blocks = min(A, (A + E * (S - 1)) // S)  # enough for every routing
    P = num_blocks * S
    expert_A = jnp.where((expert_A >= 0) & (expert_A < E), expert_A, E)
    order_A = jnp.argsort(expert_A, stable=True)
    sorted_A = expert_A[order_A]
    start_E = jnp.searchsorted(sorted_A, jnp.arange(E + 1, dtype=sorted_A.dtype)).astype(jnp.int32)
    size_E = jnp.diff(start_E)
    blocks_E = -(-size_E // S)
    end_E = jnp.cumsum(blocks_E)
    first_slot_E = jnp.append((end_E - blocks_E) * S, P)
    rank_A = jnp.arange(A, dtype=jnp.int32) - start_E[sorted_A]
    slot_A = jnp.where(sorted_A < E, first_slot_E[sorted_A] + rank_A, P)
    assignments_P = jnp.full(P, A, jnp.int32).at[slot_A].set(order_A.astype(jnp.int32), mode="drop")
    block_experts = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(num_blocks), side="right"), E - 1)
    return Groups(assignments_P, jnp.zeros(A, jnp.int32).at[order_A].set(slot_A), size_E, block_experts)

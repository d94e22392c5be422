"""Pallas kernels for the gated delta rule, and for its gradients, on TPU.

The equations of a chunk are those of ``_gated_chunk`` in delta_rule.py. D(s, t) is the product of the decays of
steps s + 1 to t, and S is the state before the chunk. A is a strictly lower triangular matrix with
``A[t, s] = beta_t * D(s, t) * (k_t @ k_s)``. The vectors u solve ``(I + A) @ u = r`` with
``r_t = beta_t * (v_t - D(0, t) * k_t @ S)``. The outputs and the state after the chunk are those of linear attention
with the values u. A kernel keeps the inverse of ``I + A``, the scores and the states in VMEM. The backward kernel
computes the inverse again. ``head_blocks`` defines the blocks of heads and the products of decays.

A variable whose name ends with ``_in`` is cast to the dtype of the values, because it is an input of matmuls.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values, C chunks, L steps of a chunk, N blocks
of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.linear import dot
from jaxlm.nn.scan.head_blocks import Blocks, Decays, Kernels, chunk_decays, split_non_finite


def accurate_dot(a: jax.Array, b: jax.Array, dtype: Any, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The matmul of float32 matrices over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``, float32.

    ``dtype``, the dtype of the values, determines the precision. With float32, the matmul has float32 precision. With
    bfloat16, each matrix is split into a sum of two bfloat16 matrices, and the product of the two smaller summands is
    left out. The relative error is then about 1e-5. This takes half the time of a matmul with float32 precision.
    """
    if dtype == jnp.float32:
        return dot(a, b, contract, precision=lax.Precision.HIGHEST)
    (a_high, a_low), (b_high, b_low) = _high_and_low(a), _high_and_low(b)
    return dot(a_high, b_high, contract) + (dot(a_high, b_low, contract) + dot(a_low, b_high, contract))


def _high_and_low(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 matrices whose sum is about ``x``: ``x`` rounded to bfloat16, and the rounding error."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def invert_unit_lower(lowers: list[jax.Array], dtype: Any) -> list[jax.Array]:
    """The inverse of ``I + lower`` for each strictly lower triangular matrix, [L, L].

    Diagonal blocks of 1, 2, 4, ... rows are joined in pairs. As in ``triangular._join_masked``, one formula joins all
    pairs at once: ``X - X @ C @ X``. X is the matrix of the inverses of the diagonal blocks. C is the matrix of the
    lower left blocks of all pairs.
    """
    L = lowers[0].shape[0]
    t, s = (lax.broadcasted_iota(jnp.int32, (L, L), axis) for axis in (0, 1))
    inverses = [jnp.where(t == s, 1.0, 0.0)] * len(lowers)
    for power in range((L - 1).bit_length()):
        size = 1 << power
        is_joined = (t // (2 * size) == s // (2 * size)) & (t // size != s // size)
        joined = [jnp.where(is_joined, lower, 0.0) for lower in lowers]
        if size > 1:
            joined = [accurate_dot(below, inverse, dtype) for below, inverse in zip(joined, inverses, strict=True)]
            joined = [accurate_dot(inverse, below, dtype) for inverse, below in zip(inverses, joined, strict=True)]
        inverses = [inverse - below for inverse, below in zip(inverses, joined, strict=True)]
    return inverses


def _is_earlier(L: int) -> jax.Array:
    """Whether step s (column) is before step t (row), [L, L]."""
    t, s = (lax.broadcasted_iota(jnp.int32, (L, L), axis) for axis in (0, 1))
    return s < t


def _key_products(blocks: Blocks, key: Any, decays: Decays) -> list[jax.Array]:
    """For each head, a matrix [L, L]: ``D(s, t) * (k_t @ k_s)`` in row t and column s, and zeros for s >= t."""
    K, is_earlier = blocks.K, _is_earlier(blocks.L)
    keys = [key[:, head * K : (head + 1) * K] for head in range(blocks.J)]
    return [jnp.where(is_earlier, dot(k, k, (1, 1)) * decays.pairs(head), 0.0) for head, k in enumerate(keys)]


def _forward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute a chunk for a block of heads. ``carry``: the state after the previous chunk."""
    query, key, value, columns, rows, out, states, carry = references
    states[...] = carry[...]
    J, K, V, dtype = blocks.J, blocks.K, blocks.V, value.dtype
    decays, out_heads = chunk_decays(columns, rows, J), []
    betas = decays.scale
    inverses = invert_unit_lower(
        [betas[:, head : head + 1] * x for head, x in enumerate(_key_products(blocks, key, decays))], dtype
    )
    for head in range(J):
        column = slice(head, head + 1)
        key_slice, value_slice = slice(head * K, (head + 1) * K), slice(head * V, (head + 1) * V)
        q, k, v = query[:, key_slice], key[:, key_slice], value[:, value_slice]
        (state, nan_row), prefix = split_non_finite(carry[head]), decays.prefix[:, column]
        state_in = state.astype(dtype)
        k_from_state = prefix * dot(k, state_in, (1, 0))
        right = betas[:, column] * (v.astype(jnp.float32) - k_from_state)
        u = accurate_dot(inverses[head], right, dtype).astype(dtype)
        weights = (dot(q, k, (1, 1)) * decays.pairs(head)).astype(dtype)
        q_from_state = prefix * dot(q, state_in, (1, 0)) + jnp.where(decays.is_before_reset, nan_row, 0.0)
        out_heads.append(dot(weights, u, (1, 0)) + q_from_state)
        scaled_key = (k.astype(jnp.float32).T * decays.suffix_rows[column]).astype(dtype)
        decayed_state = decays.total[:, column] * state + jnp.where(decays.is_before_reset[-1:], nan_row, 0.0)
        carry[head] = decayed_state + dot(scaled_key, u, (1, 0))
    out[...] = jnp.concatenate(out_heads, axis=1).astype(dtype)


def _backward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute the gradients of a chunk for a block of heads. ``carry``: the gradient of the state after the chunk."""
    query, key, value, columns, rows, states, dout, dquery, dkey, dvalue, dlog, dbeta, carry = references
    J, K, V, dtype = blocks.J, blocks.K, blocks.V, value.dtype
    is_earlier, decays = _is_earlier(blocks.L), chunk_decays(columns, rows, J)
    key_products = _key_products(blocks, key, decays)
    inverses = invert_unit_lower([decays.scale[:, head : head + 1] * x for head, x in enumerate(key_products)], dtype)
    gradients = []
    for head in range(J):
        key_slice, value_slice = slice(head * K, (head + 1) * K), slice(head * V, (head + 1) * V)
        arrays = query[:, key_slice], key[:, key_slice], value[:, value_slice], dout[:, value_slice]
        state, _ = split_non_finite(states[head])
        *head_gradients, carry[head] = _head_gradients(
            arrays, decays, head, state, carry[head], key_products[head], inverses[head], is_earlier
        )
        gradients.append(head_gradients)
    join = functools.partial(jnp.concatenate, axis=1)
    dq, dk, dv, dbetas, dlog_pairs, dlog_prefix, dlog_suffix = (join(heads) for heads in zip(*gradients, strict=True))
    dquery[...], dkey[...], dvalue[...] = (x.astype(dtype) for x in (dq, dk, dv))
    # The prefix of step t is the product of the decays of the steps up to and including t. The suffix of step t is the
    # product of the decays of the steps after t.
    at_or_after = jnp.where(is_earlier, 0.0, 1.0)  # [t, s]: 1 if s >= t
    dlog[...] = (
        dlog_pairs + accurate_dot(at_or_after, dlog_prefix, dtype) + accurate_dot(1.0 - at_or_after, dlog_suffix, dtype)
    )
    dbeta[...] = dbetas


def _head_gradients(
    arrays: tuple[jax.Array, ...], decays: Decays, head: int, state: jax.Array, dafter: jax.Array,
    key_product: jax.Array, inverse: jax.Array, is_earlier: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The gradients of a chunk for one head.

    Returns:
        The gradients of query, key, value and beta; the gradient of the log decays [L, 1] through D(s, t) and through
        the product of all decays of the chunk; the gradients of the logarithms of ``prefix`` and of ``suffix``, [L, 1]
        each; and the gradient of the state before the chunk.

    Args:
        arrays: query, key, value and the gradient of the output.
        state: the state before the chunk, finite.
        dafter: the gradient of the state after the chunk.
        key_product, inverse: the entries of :func:`_key_products` and :func:`invert_unit_lower` for this head.
        is_earlier: the result of :func:`_is_earlier`.
    """
    (q, k, v, dy), column, dtype = arrays, slice(head, head + 1), arrays[2].dtype
    pairs, beta = decays.pairs(head), decays.scale[:, column]
    prefix, suffix, total = decays.prefix[:, column], decays.suffix[:, column], decays.total[:, column]
    state_in, dafter_in = state.astype(dtype), dafter.astype(dtype)
    k32, q32, dy32 = (x.astype(jnp.float32) for x in (k, q, dy))
    # Recompute the values of the forward pass.
    q_from_state = prefix * dot(q, state_in, (1, 0))
    k_from_state = prefix * dot(k, state_in, (1, 0))
    error = v.astype(jnp.float32) - k_from_state
    u = accurate_dot(inverse, beta * error, dtype)
    u_in = u.astype(dtype)
    weights = dot(q, k, (1, 1)) * pairs
    # Compute the gradients, starting at the outputs and at the state after the chunk.
    du_of_state = suffix * dot(k, dafter_in, (1, 0))
    du = dot(weights.astype(dtype), dy, (0, 0)) + du_of_state
    dright = accurate_dot(inverse, du, dtype, (0, 0))
    dright_in = (beta * dright).astype(dtype)
    dA = jnp.where(is_earlier, -accurate_dot(dright, u, dtype, (1, 1)), 0.0)
    dweights = dot(dy, u_in, (1, 1))
    dscores = (dweights * pairs).astype(dtype)
    dk_pairs = (beta * dA * pairs).astype(dtype)
    dq = dot(dscores, k, (1, 0)) + prefix * dot(dy, state_in, (1, 1))
    dk = (
        dot(dscores, q, (0, 0)) + dot(dk_pairs, k, (1, 0)) + dot(dk_pairs, k, (0, 0))
        + suffix * dot(u_in, dafter_in, (1, 1)) - prefix * dot(dright_in, state_in, (1, 1))
    )  # fmt: skip
    dbeta = jnp.sum(dright * error, axis=1, keepdims=True) + jnp.sum(dA * key_product, axis=1, keepdims=True)
    dbefore = (
        total * dafter
        + dot((prefix * q32).astype(dtype), dy, (0, 0))
        - dot((prefix * k32).astype(dtype), dright_in, (0, 0))
    )
    # The log decay of step i is a summand of log D(s, t) for all s < i <= t.
    dlog_by_pair = jnp.where(is_earlier, dweights * weights, 0.0) + dA * beta * key_product
    at_or_after = jnp.where(is_earlier, 0.0, 1.0)  # [t, s]: 1 if s >= t
    later = accurate_dot(at_or_after, dlog_by_pair, dtype)  # [i, s]: the sum over t >= i
    dlog_total = total * jnp.sum(state * dafter, keepdims=True)
    dlog_pairs = jnp.sum(jnp.where(is_earlier, later, 0.0), axis=1, keepdims=True) + dlog_total
    dlog_prefix = jnp.sum(q_from_state * dy32 - k_from_state * (beta * dright), axis=1, keepdims=True)
    dlog_suffix = jnp.sum(u * du_of_state, axis=1, keepdims=True)
    return dq, dk, beta * dright, dbeta, dlog_pairs, dlog_prefix, dlog_suffix, dbefore


KERNELS = Kernels("gated_delta_rule", _forward_kernel, _backward_kernel, returns_gradient_of_sums=False)

"""Pallas kernels for TPUs: linear attention with one decay per head, and its gradients.

The implementation ``chunked`` of ``linear_attention`` writes the scores of a chunk, the products of decays and the
states to memory between its matmuls. A kernel keeps them in VMEM. It computes several heads (a block of heads)
together. For each block of heads, it reads the queries, keys and values of a chunk once. The forward kernel keeps the
states of these heads in VMEM from the first chunk to the last one. For the gradients, it also writes the state before
each chunk to memory. The backward kernel goes from the last chunk to the first, and keeps the gradients of the states
in VMEM.

``jaxlm.nn.scan.head_blocks`` defines the blocks of heads, the sums b_t of log decays and the products of decays.
A variable whose name ends with ``_in`` is cast to the dtype of the values, because it is an input of matmuls.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, C chunks, L steps
of a chunk, N blocks of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlm.nn.linear import dot
from jaxlm.nn.scan.head_blocks import Blocks, Kernels, chunk_decays, split_non_finite


def _forward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute the outputs of a chunk for a block of heads.

    ``carry``: at the start, the state before the chunk; at the end, the state after the chunk.
    """
    query, key, value, columns, rows, out, states, carry = references
    states[...] = carry[...]
    J, K, V, dtype = blocks.J, blocks.K, blocks.V, value.dtype
    decays, out_heads = chunk_decays(columns, rows, J), []
    for head in range(J):
        if blocks.has_own_keys or head == 0:
            q, k = query[:, head * K : (head + 1) * K], key[:, head * K : (head + 1) * K]
            scores, k_transposed = dot(q, k, (1, 1)), k.T.astype(jnp.float32)
        v, column = value[:, head * V : (head + 1) * V], slice(head, head + 1)
        state, nan_row = split_non_finite(carry[head])
        from_state = decays.prefix[:, column] * dot(q, state.astype(dtype), (1, 0))
        from_state += jnp.where(decays.is_before_reset, nan_row, 0.0)
        scale_row = decays.scale_rows[column]
        out_heads.append(dot((scores * decays.pairs(head) * scale_row).astype(dtype), v, (1, 0)) + from_state)
        scaled_key = (k_transposed * (decays.suffix_rows[column] * scale_row)).astype(dtype)
        decayed_state = decays.total[:, column] * state + jnp.where(decays.is_before_reset[-1:], nan_row, 0.0)
        carry[head] = decayed_state + dot(scaled_key, v, (1, 0))
    out[...] = jnp.concatenate(out_heads, axis=1).astype(dtype)


def _backward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute the gradients of a chunk for a block of heads.

    ``carry``: at the start, the gradient of the state after the chunk; at the end, the gradient of the state before the
    chunk.
    """
    query, key, value, columns, rows, states, dout, dquery, dkey, dvalue, db, dscale, carry = references
    J, K, V, L, dtype = blocks.J, blocks.K, blocks.V, blocks.L, value.dtype
    is_last_row = lax.broadcasted_iota(jnp.int32, (L, 1), 0) == L - 1
    decays = chunk_decays(columns, rows, J)
    dq_heads, dk_heads, dv_heads, db_heads, dscale_heads = ([] for _ in range(5))
    for head in range(J):
        if blocks.has_own_keys or head == 0:
            q, k = query[:, head * K : (head + 1) * K], key[:, head * K : (head + 1) * K]
            scores, q_transposed = dot(q, k, (1, 1)), q.T
        v, dy = value[:, head * V : (head + 1) * V], dout[:, head * V : (head + 1) * V]
        column = slice(head, head + 1)
        pairs, state, dafter = decays.pairs(head), split_non_finite(states[head])[0], carry[head]
        prefix, suffix, total = decays.prefix[:, column], decays.suffix[:, column], decays.total[:, column]
        state_in, dafter_in = state.astype(dtype), dafter.astype(dtype)
        scale = decays.scale[:, column]
        # The products of decays of steps s + 1 to t, times the scale of step s.
        scaled_pairs = pairs * decays.scale_rows[column]
        # The gradient of a log decay is a sum of ``db_head`` over steps. In this sum, the rounding errors of ``y * dy``
        # and ``scaled_v * dscaled`` must cancel. So both are computed from the same rounded ``weights`` and
        # ``scaled_v``.
        weights, scaled_v = (scores * pairs).astype(dtype), (scale * v.astype(jnp.float32)).astype(dtype)
        dscores = (dot(dy, v, (1, 1)) * scaled_pairs).astype(dtype)
        y = dot(weights, scaled_v, (1, 0)) + prefix * dot(q, state_in, (1, 0))
        dq_heads.append(dot(dscores, k, (1, 0)) + prefix * dot(dy, state_in, (1, 1)))
        dk_heads.append(dot(dscores, q, (0, 0)) + scale * suffix * dot(v, dafter_in, (1, 1)))
        dscaled_of_state = suffix * dot(k, dafter_in, (1, 0))
        dscaled = dot(weights, dy, (0, 0)) + dscaled_of_state  # the gradient of scale * v
        # ``db_head`` is the gradient of b_t. The state after the chunk is proportional to exp(b_t) of the last step. So
        # the gradient of this b_t also has the inner product of that state and its gradient.
        v32, dy32, scaled_v32 = v.astype(jnp.float32), dy.astype(jnp.float32), scaled_v.astype(jnp.float32)
        db_of_state = total * jnp.sum(state * dafter, keepdims=True) + jnp.sum(
            scaled_v32 * dscaled_of_state, keepdims=True
        )
        db_head = jnp.sum(y * dy32 - scaled_v32 * dscaled, axis=1, keepdims=True)
        db_heads.append(jnp.where(is_last_row, db_head + db_of_state, db_head))
        dscale_heads.append(jnp.sum(v32 * dscaled, axis=1, keepdims=True))
        dv_heads.append(scale * dscaled)
        carry[head] = total * dafter + dot(q_transposed, (prefix * dy32).astype(dtype), (1, 0))
    # The gradient of a query or key that the heads of a block share is the sum over these heads.
    for dx, heads in ((dquery, dq_heads), (dkey, dk_heads)):
        dx[...] = (jnp.concatenate(heads, axis=1) if blocks.has_own_keys else functools.reduce(jnp.add, heads)).astype(
            dx.dtype
        )
    dvalue[...] = jnp.concatenate(dv_heads, axis=1).astype(dtype)
    db[...], dscale[...] = jnp.concatenate(db_heads, axis=1), jnp.concatenate(dscale_heads, axis=1)


KERNELS = Kernels("linear_attention", _forward_kernel, _backward_kernel, returns_gradient_of_sums=True)

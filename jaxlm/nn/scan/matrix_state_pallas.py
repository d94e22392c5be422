"""Pallas kernels for linear attention with one decay per head, and for its gradients, on TPU.

The implementation ``chunked`` of ``linear_attention`` writes the scores of a chunk, the products of decays and the
states to memory between its matmuls. A kernel keeps them in VMEM. It reads the queries, keys and values of a chunk
once, for several heads, and keeps the state of these heads until the last chunk. For the gradients, the forward kernel
also writes the state before each chunk.

``head_blocks`` defines the blocks of heads, the sums b_t of log decays and the products of decays. Variables whose
names end with ``_in`` are inputs of matmuls, in the dtype of the values.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, C chunks, L steps
of a chunk, N blocks of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxlm.nn.lazy_pallas import start_with
from jaxlm.nn.scan.head_blocks import Blocks, Kernels, chunk_decays, dot


def _forward_kernel(
    blocks: Blocks, query: Any, key: Any, value: Any, columns: Any, rows: Any, first: Any, out: Any, last: Any,
    states: Any, carry: Any,
) -> None:  # fmt: skip
    """Compute a chunk of a block of heads. ``carry``: the state after the previous chunk."""
    start_with(carry, first)
    states[...] = carry[...]
    J, K, V, dtype = blocks.J, blocks.K, blocks.V, value.dtype
    decays, outputs = chunk_decays(columns, rows, J), []
    for head in range(J):
        if blocks.has_own_keys or head == 0:
            q, k = query[:, head * K : (head + 1) * K], key[:, head * K : (head + 1) * K]
            scores, k_transposed = dot(q, k, (1, 1)), k.T.astype(jnp.float32)
        v, state, column = value[:, head * V : (head + 1) * V], carry[head], slice(head, head + 1)
        from_state = decays.prefix[:, column] * dot(q, state.astype(dtype), (1, 0))
        scale_row = decays.scale_rows[column]
        outputs.append(dot((scores * decays.pairs(head) * scale_row).astype(dtype), v, (1, 0)) + from_state)
        scaled_key = (k_transposed * (decays.suffix_rows[column] * scale_row)).astype(dtype)
        carry[head] = decays.total[:, column] * state + dot(scaled_key, v, (1, 0))
    out[...] = jnp.concatenate(outputs, axis=1).astype(dtype)
    last[...] = carry[...]


def _backward_kernel(
    blocks: Blocks, query: Any, key: Any, value: Any, columns: Any, rows: Any, states: Any, dout: Any, dlast: Any,
    dquery: Any, dkey: Any, dvalue: Any, db: Any, dscale: Any, dstate: Any, carry: Any,
) -> None:  # fmt: skip
    """Compute the gradients of a chunk. ``carry``: the gradient of the state after the chunk."""
    start_with(carry, dlast)
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
        pairs, state, dafter = decays.pairs(head), states[head], carry[head]
        prefix, suffix, total = decays.prefix[:, column], decays.suffix[:, column], decays.total[:, column]
        state_in, dafter_in = state.astype(dtype), dafter.astype(dtype)
        scale = decays.scale[:, column]
        # ``pairs`` times the scale of step s.
        scaled_pairs = pairs * decays.scale_rows[column]
        # y and ``dscaled`` use the same rounded weights and values, because their errors must cancel in the sum over
        # steps.
        weights, scaled_v = (scores * pairs).astype(dtype), (scale * v.astype(jnp.float32)).astype(dtype)
        dscores = (dot(dy, v, (1, 1)) * scaled_pairs).astype(dtype)
        y = dot(weights, scaled_v, (1, 0)) + prefix * dot(q, state_in, (1, 0))
        dq_heads.append(dot(dscores, k, (1, 0)) + prefix * dot(dy, state_in, (1, 1)))
        dk_heads.append(dot(dscores, q, (0, 0)) + scale * suffix * dot(v, dafter_in, (1, 1)))
        dscaled_of_state = suffix * dot(k, dafter_in, (1, 0))
        dscaled = dot(weights, dy, (0, 0)) + dscaled_of_state  # the gradient of scale * v
        # The gradient of b_t. The last b_t also gets the inner product of the state after the chunk and its gradient.
        v32, dy32, scaled_v32 = v.astype(jnp.float32), dy.astype(jnp.float32), scaled_v.astype(jnp.float32)
        last = total * jnp.sum(state * dafter, keepdims=True) + jnp.sum(scaled_v32 * dscaled_of_state, keepdims=True)
        db_head = jnp.sum(y * dy32 - scaled_v32 * dscaled, axis=1, keepdims=True)
        db_heads.append(jnp.where(is_last_row, db_head + last, db_head))
        dscale_heads.append(jnp.sum(v32 * dscaled, axis=1, keepdims=True))
        dv_heads.append(scale * dscaled)
        carry[head] = total * dafter + dot(q_transposed, (prefix * dy32).astype(dtype), (1, 0))
    # Shared queries and keys get the sum of the gradients of the heads.
    for dx, heads in ((dquery, dq_heads), (dkey, dk_heads)):
        dx[...] = (jnp.concatenate(heads, axis=1) if blocks.has_own_keys else functools.reduce(jnp.add, heads)).astype(
            dx.dtype
        )
    dvalue[...] = jnp.concatenate(dv_heads, axis=1).astype(dtype)
    db[...], dscale[...] = jnp.concatenate(db_heads, axis=1), jnp.concatenate(dscale_heads, axis=1)
    dstate[...] = carry[...]


KERNELS = Kernels("linear_attention", _forward_kernel, _backward_kernel, gradient_of_sums=True)

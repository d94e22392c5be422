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

import jax
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
    for heads in _heads_with_the_same_key(blocks):
        own_keys = slice(heads[0] * K, (heads[0] + 1) * K)
        q, k = query[:, own_keys], key[:, own_keys]
        scores, k_transposed = dot(q, k, (1, 1)), k.T.astype(jnp.float32)
        for head in heads:
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


def _heads_with_the_same_key(blocks: Blocks) -> list[tuple[int, ...]]:
    """The heads of a block, grouped by their query and key."""
    return [(head,) for head in range(blocks.J)] if blocks.has_own_keys else [tuple(range(blocks.J))]


def _repeat_columns(heads: tuple[int, ...], V: int, x_LJ: jax.Array) -> jax.Array:
    """The columns of the heads, each of them repeated V times, [L, V * number of heads]."""
    return jnp.concatenate([jnp.broadcast_to(x_LJ[:, h : h + 1], (x_LJ.shape[0], V)) for h in heads], axis=1)


def _backward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute the gradients of a chunk for a block of heads.

    ``carry``: at the start, the gradient of the state after the chunk; at the end, the gradient of the state before the
    chunk.
    """
    query, key, value, columns, rows, states, dout, dquery, dkey, dvalue, db, dscale, carry = references
    J, K, V, L, dtype = blocks.J, blocks.K, blocks.V, blocks.L, value.dtype
    is_last_row = lax.broadcasted_iota(jnp.int32, (L, 1), 0) == L - 1
    decays = chunk_decays(columns, rows, J)
    dq_parts, dk_parts, dv_heads, db_heads, dscale_heads = ([] for _ in range(5))
    for heads in _heads_with_the_same_key(blocks):
        own_keys = slice(heads[0] * K, (heads[0] + 1) * K)
        q, k = query[:, own_keys], key[:, own_keys]
        all_columns = slice(heads[0] * V, (heads[-1] + 1) * V)
        own = [slice(i * V, (i + 1) * V) for i in range(len(heads))]
        repeated = functools.partial(_repeat_columns, heads, V)
        scores = dot(q, k, (1, 1))
        state = jnp.concatenate([split_non_finite(states[head])[0] for head in heads], axis=1)
        dafter = jnp.concatenate([carry[head] for head in heads], axis=1)
        state_in, dafter_in = state.astype(dtype), dafter.astype(dtype)
        v, dy = value[:, all_columns], dout[:, all_columns]
        v32, dy32 = v.astype(jnp.float32), dy.astype(jnp.float32)
        scale, prefix, suffix, total = (repeated(x) for x in (decays.scale, decays.prefix, decays.suffix, decays.total))
        scaled_v = (scale * v32).astype(dtype)
        scaled_v32 = scaled_v.astype(jnp.float32)
        dy_in, v_in = (prefix * dy32).astype(dtype), (suffix * scaled_v32).astype(dtype)
        dscores, ys, dscaleds = jnp.zeros((L, L), jnp.float32), [], []
        for i, head in enumerate(heads):
            pairs = decays.pairs(head)
            # The gradient of a log decay is a sum of ``db`` over steps. In this sum, the rounding errors of
            # ``y * dy`` and ``scaled_v * dscaled`` must cancel. So both are computed from the same rounded ``weights``
            # and ``scaled_v``.
            weights = (scores * pairs).astype(dtype)
            # The forward pass multiplies the scores by ``pairs`` and by the scales. So the gradient of the scores has
            # these factors too.
            dscores += dot(dy[:, own[i]], v[:, own[i]], (1, 1)) * (pairs * decays.scale_rows[head : head + 1])
            ys.append(dot(weights, scaled_v[:, own[i]], (1, 0)))
            dscaleds.append(dot(weights, dy[:, own[i]], (0, 0)))
        y = jnp.concatenate(ys, axis=1) + prefix * dot(q, state_in, (1, 0))
        dscaled_of_state = suffix * dot(k, dafter_in, (1, 0))
        dscaled = jnp.concatenate(dscaleds, axis=1) + dscaled_of_state  # the gradient of scale * v
        # ``db`` is the gradient of b_t. The state after the chunk is proportional to exp(b_t) of the last step. So the
        # gradient of this b_t also has the inner product of that state and its gradient.
        products = y * dy32 - scaled_v32 * dscaled
        last = jnp.sum(total * state * dafter, axis=0, keepdims=True) + jnp.sum(
            scaled_v32 * dscaled_of_state, axis=0, keepdims=True
        )
        products = jnp.where(is_last_row, products + last, products)
        dscale_products = v32 * dscaled
        for i in range(len(heads)):
            db_heads.append(jnp.sum(products[:, own[i]], axis=1, keepdims=True))
            dscale_heads.append(jnp.sum(dscale_products[:, own[i]], axis=1, keepdims=True))
        dv_heads.append(scale * dscaled)
        # The gradient of a query or key that several heads share is the sum over these heads.
        dscores_in = dscores.astype(dtype)
        dq_parts.append(dot(dscores_in, k, (1, 0)) + dot(dy_in, state_in, (1, 1)))
        dk_parts.append(dot(dscores_in, q, (0, 0)) + dot(v_in, dafter_in, (1, 1)))
        dstate = total * dafter + dot(q.T, dy_in, (1, 0))
        for i, head in enumerate(heads):
            carry[head] = dstate[:, own[i]]
    for dx, parts in ((dquery, dq_parts), (dkey, dk_parts)):
        dx[...] = jnp.concatenate(parts, axis=1).astype(dx.dtype)
    dvalue[...] = jnp.concatenate(dv_heads, axis=1).astype(dtype)
    db[...], dscale[...] = jnp.concatenate(db_heads, axis=1), jnp.concatenate(dscale_heads, axis=1)


KERNELS = Kernels("linear_attention", _forward_kernel, _backward_kernel, returns_gradient_of_sums=True)

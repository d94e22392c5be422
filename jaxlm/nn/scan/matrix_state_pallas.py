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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.scan.head_blocks import (
    HEAD_AXES,
    STATE_AXES,
    STATES_AXES,
    Blocks,
    chunk_decays,
    dot,
    groups_are_sharded,
    prepare_log_decays,
    run_backward,
    run_forward,
)


def linear_attention(
    inputs: tuple[jax.Array, ...], state_BHKV: jax.Array, reset_BT: jax.Array | None, L: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The outputs [B, T, H, V] in the dtype of the values, and the last state [B, H, K, V] float32.

    Args:
        inputs: queries, keys, values, and log decays and scales [B, T, H], as for ``jaxlm.nn.scan.linear_attention``.
            Padding has zeros in all of them.
        reset_BT: True where the state is set to zeros before the step; None: nowhere.
        L: number of steps of a chunk, a multiple of 128, or at least T.
        interpret: use Pallas's interpreter, on any device.
    """
    query, key, value, log_BTH, scale_BTH = inputs
    log_BTH, reset_BT = prepare_log_decays(log_BTH, reset_BT)
    return _attention((query, key, value, log_BTH, scale_BTH, reset_BT), state_BHKV, L, interpret)


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _attention(inputs: Any, state_BHKV: jax.Array, L: int, interpret: bool) -> Any:
    return _run_forward(inputs, state_BHKV, L=L, interpret=interpret, save_states=False)[:2]


def _attention_forward(inputs: Any, state_BHKV: jax.Array, L: int, interpret: bool) -> Any:
    out_BTHV, last_BHKV, states_BCHKV = _run_forward(inputs, state_BHKV, L=L, interpret=interpret, save_states=True)
    return (out_BTHV, last_BHKV), (inputs, states_BCHKV)


def _run_forward(inputs: Any, state_BHKV: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The results of ``run_forward`` for all devices."""
    run = functools.partial(run_forward, _forward_kernel, "linear_attention", **options)
    return _map_shards(run, _key_axes(inputs), [STATE_AXES], [HEAD_AXES, STATE_AXES, STATES_AXES])(*inputs, state_BHKV)


def _attention_backward(L: int, interpret: bool, saved: Any, cotangents: Any) -> Any:
    inputs, states_BCHKV = saved
    query, key, _, log_BTH, *_ = inputs
    dout_BTHV, dlast_BHKV = cotangents
    # Gradients of shared queries and keys are [B, T, blocks of a group, G, K]: each device has its own groups, or its
    # own blocks of heads. Gradients of queries and keys for each head are [B, T, H, K].
    key_axes, is_shared = _key_axes(inputs), query.shape[2] != log_BTH.shape[2]
    run = functools.partial(
        run_backward, _backward_kernel, "linear_attention_backward", L=L, interpret=interpret, is_shared=is_shared
    )
    dkey_axes: tuple[str | None, ...] = HEAD_AXES
    if is_shared:
        is_split_by_group = key_axes == HEAD_AXES
        dkey_axes = ("batch", None, None, "heads", None) if is_split_by_group else ("batch", None, "heads", None, None)
    out_axes = [dkey_axes, dkey_axes, HEAD_AXES, HEAD_AXES[:3], HEAD_AXES[:3], STATE_AXES]
    mapped = _map_shards(run, key_axes, [STATES_AXES, HEAD_AXES, STATE_AXES], out_axes)
    dquery, dkey, dvalue, db_BTH, dscale_BTH, dstate_BHKV = mapped(*inputs, states_BCHKV, dout_BTHV, dlast_BHKV)
    if is_shared:
        dquery, dkey = jnp.sum(dquery, axis=2), jnp.sum(dkey, axis=2)
    dquery, dkey = dquery.astype(query.dtype), dkey.astype(key.dtype)
    # The log decay of a step is a summand of b_t for this step and all later steps of the chunk.
    db_BCLH = db_BTH.reshape(db_BTH.shape[0], -1, L, db_BTH.shape[2])
    dlog_BTH = lax.cumsum(db_BCLH, axis=2, reverse=True).reshape(db_BTH.shape)[:, : log_BTH.shape[1]]
    return (dquery, dkey, dvalue, dlog_BTH, dscale_BTH, None), dstate_BHKV


_attention.defvjp(_attention_forward, _attention_backward)


def _key_axes(inputs: Any) -> tuple[str | None, ...]:
    """The logical axes of queries and keys."""
    return HEAD_AXES if groups_are_sharded(inputs[0].shape[2], inputs[2].shape[2]) else ("batch", None, None, None)


def _map_shards(
    function: Callable[..., Any], key_axes: tuple[str | None, ...], other_axes: list[Any], out_axes: list[Any]
) -> Callable[..., Any]:
    """A function that runs ``function`` on each device, with its shards of the inputs and of further arrays."""
    in_axes = [key_axes, key_axes, HEAD_AXES, HEAD_AXES[:3], HEAD_AXES[:3], HEAD_AXES[:2], *other_axes]
    return sharding.map_shards(function, in_axes, out_axes)


# ------------------------------------------------------------------------------------------------ the kernels


def _forward_kernel(
    blocks: Blocks, query: Any, key: Any, value: Any, columns: Any, rows: Any, first: Any, out: Any, last: Any,
    states: Any, carry: Any,
) -> None:  # fmt: skip
    """Compute a chunk of a block of heads. ``carry``: the state after the previous chunk."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def initialize() -> None:
        carry[...] = first[...]

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
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def initialize() -> None:
        carry[...] = dlast[...]

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

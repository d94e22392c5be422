"""Attention in blocks of queries: O(T) memory, scores recomputed in the backward pass (after Dao et al. 2022).

For each head, a block of queries meets all the keys that it may see: with a causal mask in index order, those up to the
diagonal. Only the output and the log-sum-exp of each row are saved. Shapes as in ``jaxlm.nn.attention``; N = B*H heads,
R rows of a block, E keys that a block meets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn.mask import Mask, keep

ROWS = 128
"""Queries per block while blocks are unrolled (up to MAX_UNROLLED of them); longer sequences loop over ROWS_LOOPED."""
ROWS_LOOPED = 256
MAX_UNROLLED = 16
SAVED = "attention"
"""Name (``jax.ad_checkpoint.checkpoint_name``) of what the forward pass leaves for the backward pass."""


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known while tracing."""

    causal: bool
    window: int | None
    scale: float
    dropout: float
    sequential: bool


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    dropout: float,
    key: jax.Array | None,
    sequential: bool,
) -> jax.Array:
    """See ``jaxlm.nn.attention.attention``. ``sequential``: one head after the other instead of all together."""
    static = _Static(mask.causal, mask.window, scale, dropout, sequential)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return jnp.swapaxes(_attention(static, q, k, v, jax.tree.map(jnp.asarray, mask.arrays), key), 1, 2)


def dropout_keep(key: jax.Array, rows: jax.Array, keys: int, rate: float) -> jax.Array:
    """Which probabilities stay, [R, keys]. Entry (row, s) depends on the key, the row's global number and s alone."""
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda row_key: jax.random.bernoulli(row_key, 1.0 - rate, (keys,)))(row_keys)


# ------------------------------------------------------------------------------------------------ one block


def _scores(static: _Static, q_RK: jax.Array, k_EK: jax.Array, row: Any, ints: tuple[Any, ...]) -> jax.Array:
    """Masked scores of one block of queries, the first of which is number ``row``, [R, E] float32."""
    scores = lax.dot_general(q_RK, k_EK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * static.scale
    R, E = scores.shape
    query_order, key_order, query_segments, key_segments = ints
    if static.causal and query_order is None:
        query_order, key_order = row + jnp.arange(R), jnp.arange(E)
    lead = jax.tree.map(lambda x: x[None], (query_order, key_order, query_segments, key_segments))
    kept = keep(Mask(static.causal, static.window, *lead), R, E)
    return scores if kept is None else jnp.where(kept[0], scores, -jnp.inf)


def _drop(static: _Static, key: Any, head: Any, length: int, row: Any, shape: tuple[int, ...]) -> jax.Array | None:
    if key is None:
        return None
    rows = (head * length + row + jnp.arange(shape[0])).astype(jnp.uint32)
    return dropout_keep(key, rows, shape[1], static.dropout)


def _forward_block(
    static: _Static,
    q_RK: jax.Array,
    k_EK: jax.Array,
    v_EK: jax.Array,
    row: Any,
    ints: Any,
    key: Any,
    head: Any,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    scores = _scores(static, q_RK, k_EK, row, ints)
    top_R = jnp.max(scores, axis=1)
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0.0)  # a query that sees nothing
    weights = jnp.exp(scores - top_R[:, None])
    total_R = jnp.sum(weights, axis=1)
    kept = _drop(static, key, head, length, row, weights.shape)
    if kept is not None:
        weights = jnp.where(kept, weights / (1.0 - static.dropout), 0.0)
    out = lax.dot_general(
        weights.astype(v_EK.dtype), v_EK, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    seen_R = total_R > 0.0
    total_R = jnp.where(seen_R, total_R, 1.0)
    # Where nothing is seen, +inf makes exp(score - lse) vanish in the backward pass.
    lse_R = jnp.where(seen_R, top_R + jnp.log(total_R), jnp.inf)
    return (out / total_R[:, None]).astype(v_EK.dtype), lse_R


def _backward_block(
    static: _Static, q_RK: jax.Array, k_EK: jax.Array, v_EK: jax.Array, row: Any, ints: Any, key: Any, head: Any,
    length: int, out_RK: jax.Array, lse_R: jax.Array, dout_RK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of one block: dq [R, K], and what it adds to dk and dv [E, K], all float32."""
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    weights = jnp.exp(_scores(static, q_RK, k_EK, row, ints) - lse_R[:, None])
    dweights = dot(dout_RK, v_EK, (((1,), (1,)), ((), ())))
    kept = _drop(static, key, head, length, row, weights.shape)
    dropped = weights
    if kept is not None:
        dropped = jnp.where(kept, weights / (1.0 - static.dropout), 0.0)
        dweights = jnp.where(kept, dweights / (1.0 - static.dropout), 0.0)
    delta_R = jnp.sum(dout_RK.astype(jnp.float32) * out_RK.astype(jnp.float32), axis=1)
    dscores = (weights * (dweights - delta_R[:, None]) * static.scale).astype(q_RK.dtype)
    dv_EK = dot(dropped.astype(v_EK.dtype), dout_RK, (((0,), (0,)), ((), ())))
    dq_RK = dot(dscores, k_EK, (((1,), (0,)), ((), ())))
    dk_EK = dot(dscores, q_RK, (((0,), (0,)), ((), ())))
    return dq_RK, dk_EK, dv_EK


# ------------------------------------------------------------------------------------------- blocks of a head


def _over_blocks(
    static: _Static,
    T: int,
    S: int,
    ints: tuple[Any, ...],
    carry: Any,
    visit: Callable[[Any, Any, int, int, tuple[Any, ...]], Any],
) -> Any:
    """``carry = visit(carry, first row, rows, keys, integers of the block)`` for every block of queries."""

    def sliced(row: Any, rows: int, keys: int) -> tuple[Any, ...]:
        query = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, row, rows)  # noqa: E731
        keyed = lambda x: None if x is None else x[:keys]  # noqa: E731
        return query(ints[0]), keyed(ints[1]), query(ints[2]), keyed(ints[3])

    if -(-T // ROWS) <= MAX_UNROLLED:
        diagonal = static.causal and ints[0] is None
        for row in range(0, T, ROWS):
            rows = min(ROWS, T - row)
            keys = row + rows if diagonal else S
            carry = visit(carry, row, rows, keys, sliced(row, rows, keys))
        return carry
    whole = T // ROWS_LOOPED
    carry = lax.fori_loop(
        0,
        whole,
        lambda i, c: visit(c, i * ROWS_LOOPED, ROWS_LOOPED, S, sliced(i * ROWS_LOOPED, ROWS_LOOPED, S)),
        carry,
    )
    if T % ROWS_LOOPED:
        row, rows = whole * ROWS_LOOPED, T % ROWS_LOOPED
        carry = visit(carry, row, rows, S, sliced(row, rows, S))
    return carry


def _rows(x: jax.Array, row: Any, rows: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, row, rows)


def _put(x: jax.Array, value: jax.Array, row: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), row, 0)


def _head_forward(
    static: _Static, key: Any, head: Any, q: Any, k: Any, v: Any, ints: Any
) -> tuple[jax.Array, jax.Array]:
    T, S = q.shape[0], k.shape[0]

    def visit(carry: Any, row: Any, rows: int, keys: int, block_ints: Any) -> Any:
        out, lse = _forward_block(static, _rows(q, row, rows), k[:keys], v[:keys], row, block_ints, key, head, T)
        return _put(carry[0], out, row), _put(carry[1], lse, row)

    return _over_blocks(static, T, S, ints, (jnp.zeros((T, v.shape[1]), v.dtype), jnp.zeros((T,), jnp.float32)), visit)


def _head_backward(
    static: _Static, key: Any, head: Any, q: Any, k: Any, v: Any, ints: Any, out: Any, lse: Any, dout: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    T, S = q.shape[0], k.shape[0]

    def visit(carry: Any, row: Any, rows: int, keys: int, block_ints: Any) -> Any:
        dq, dk, dv = carry
        saved = (_rows(x, row, rows) for x in (out, lse, dout))
        block = _backward_block(static, _rows(q, row, rows), k[:keys], v[:keys], row, block_ints, key, head, T, *saved)
        return _put(dq, block[0], row), dk.at[:keys].add(block[1]), dv.at[:keys].add(block[2])

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = _over_blocks(static, T, S, ints, start, visit)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _over_heads(static: _Static, function: Callable[..., Any], B: int, H: int, ints: Any, *arrays: jax.Array) -> Any:
    """``function(head number, arrays of the head, integers of its row)`` for arrays [B, H, ...], integers [B, ...]."""
    number_BH = jnp.arange(B * H).reshape(B, H)
    if static.sequential:
        flat = jax.tree.map(lambda x: x.reshape(B * H, *x.shape[2:]), (number_BH, arrays))

        def one(item: Any) -> Any:
            number, slices = item
            return function(number, slices, jax.tree.map(lambda x: x[number // H], ints))

        return jax.tree.map(lambda x: x.reshape(B, H, *x.shape[1:]), lax.map(one, flat))
    over_heads = jax.vmap(function, in_axes=(0, 0, None))
    return jax.vmap(over_heads)(number_BH, arrays, ints)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, ints: Any, key: Any) -> jax.Array:
    return _forward(static, q, k, v, ints, key)[0]


def _forward(static: _Static, q: jax.Array, k: jax.Array, v: jax.Array, ints: Any, key: Any) -> tuple[jax.Array, Any]:
    B, H = q.shape[:2]

    def one(head: Any, arrays: Any, ints: Any) -> Any:
        q, k, v = arrays
        return _head_forward(static, key, head, q, k, v, ints)

    out, lse = _over_heads(static, one, B, H, ints, q, k, v)
    # Named, so that a remat policy can keep them: recomputing them is a second forward pass.
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, ints, key, out, lse)


def _backward(static: _Static, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, ints, key, out, lse = saved
    B, H = q.shape[:2]

    def one(head: Any, arrays: Any, ints: Any) -> Any:
        q, k, v, out, lse, dout = arrays
        return _head_backward(static, key, head, q, k, v, ints, out, lse, dout)

    dq, dk, dv = _over_heads(static, one, B, H, ints, q, k, v, out, lse, dout)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)

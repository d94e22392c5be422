"""Attention in blocks of queries: O(T) memory, scores recomputed in the backward pass (after Dao et al. 2022).

For each head, a block of queries meets the keys that it may see, all at once: with a causal mask in index order those
up to the diagonal (and within the window), which is known while tracing; with other masks over many keys the range that
the integers of the block leave, rounded up to one of a few lengths. Only the output and the log-sum-exp of each row are
saved. Shapes as in ``jaxlm.nn.attention``; R rows of a block, E keys that a block meets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.nn.dropout import keep_mask
from jaxlm.nn.mask import Mask, keep_pairs
from jaxlm.nn.term import Form, Term, Tile, add_parts, axes_over, parts, without_ones

ROWS = (256, 512)
"""Queries per block, below and from ``LONG`` on: small blocks leave small matmuls, large ones more that is masked."""
LONG = 4096
SECTIONS = 8
"""A causal mask in index order cuts the keys at the end of each section of the queries. There are at most so many, for
each is compiled by itself, and a CPU runs several at once. The blocks of a section loop, one after the other."""
ALIGN = 128
"""Where a range of keys may begin and end."""
RANGES_FROM = 1024
"""Keys from which ranges that only the integers of a mask tell are worth a branch."""
SAVED = "attention"
"""Name (``jax.ad_checkpoint.checkpoint_name``) of what the forward pass leaves for the backward pass."""
ROWS_OF_BATCH = "attention_rows"
"""Name of the axis over which all rows are worked on together."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores are made, as far as it is known while tracing."""

    causal: bool
    window: int | None
    scale: float
    forms: tuple[Form, ...]


@dataclasses.dataclass(frozen=True)
class _Static(Rule):
    """What is known while tracing."""

    dropout: float
    sequential: bool
    shared: tuple[bool, ...]
    """Which terms are one for all rows of the batch, where these are worked on together."""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    terms: tuple[Term, ...],
    dropout: float,
    key: jax.Array | None,
    sequential: bool,
) -> jax.Array:
    """See ``jaxlm.nn.attention.attention``. ``sequential``: one head after the other instead of all together."""
    arrays = [jax.tree.leaves((term.floats, term.integers)) for term in terms]
    shared = tuple(not sequential and all(x.shape[0] == 1 for x in own) for own in arrays)
    static = _Static(mask.causal, mask.window, scale, tuple(term.form for term in terms), dropout, sequential, shared)
    if not sequential and k_BSGK.shape[2] != q_BTHK.shape[2]:
        k_BSGK, v_BSGK = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BSGK, v_BSGK))
    floats = (q_BTHK, k_BSGK, v_BSGK, tuple(term.floats for term in terms))
    integers = jax.tree.map(jnp.asarray, (mask.arrays, tuple(term.integers for term in terms)))
    return _attention(static, floats, integers, key)


def dropout_keep(key: jax.Array, rows: jax.Array, keys: int, rate: float) -> jax.Array:
    """Which probabilities stay, [R, keys]. Entry (row, s) depends on the key, the row's global number and s alone."""
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda row_key: keep_mask(row_key, rate, (keys,)))(row_keys)


# ------------------------------------------------------------------------------------------------ one block


def scores(rule: Rule, q_RK: jax.Array, k_EK: jax.Array, of_tile: Any, integers: Any, tile: Tile) -> jax.Array:
    """Masked scores of a block, [R, E] float32.

    Args:
        of_tile: what the tile needs of each term's arrays.
        integers: orders of queries and keys, segments of both (or None); and the integers of each term.
    """
    scores_RE = dot(q_RK, k_EK, 1, 1) * rule.scale
    of_mask, of_terms = integers
    for form, parts_, own in zip(rule.forms, of_tile, of_terms, strict=True):
        scores_RE = scores_RE + form(parts_, own, tile)
    query_order, key_order, query_segments, key_segments = of_mask
    orders = tile.places() if query_order is None else (tile.queries(query_order), tile.keys(key_order))
    segments = None if query_segments is None else (tile.queries(query_segments), tile.keys(key_segments))
    kept = keep_pairs(Mask(rule.causal, rule.window), orders, segments)
    return scores_RE if kept is None else jnp.where(kept, scores_RE, -jnp.inf)


def products(
    rule: Rule, q_RK: jax.Array, k_EK: jax.Array, v_EK: jax.Array, dout_RK: jax.Array, kept: jax.Array,
    dscores: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of a block, float32: dq [R, K], and what it adds to dk and dv [K, E].

    Keys last: on a CPU the matmul that gives [E, K] from arrays of R rows takes four times as long, and on a TPU the
    larger factor would have to be turned.

    Args:
        kept: [R, E], probabilities as they met the values.
        dscores: [R, E], the gradient of the scores.
    """
    scaled = (dscores * rule.scale).astype(q_RK.dtype)
    return dot(scaled, k_EK, 1, 0), dot(q_RK, scaled, 0, 0), dot(dout_RK, kept.astype(v_EK.dtype), 0, 0)


def dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    """The product of two matrices over an axis of each, float32."""
    return lax.dot_general(x, y, (((of_x,), (of_y,)), ((), ())), preferred_element_type=jnp.float32)


def pull(form: Form, of_tile: Any, integers: Any, tile: Tile, dscores: jax.Array) -> Any:
    """What the gradient of a tile's scores adds to that of what the tile needs of a term's arrays."""
    return jax.vjp(lambda of_tile: form(of_tile, integers, tile), of_tile)[1](dscores)[0]


def _drop(static: _Static, key: Any, head: Any, queries: int, keys: int, tile: Tile) -> jax.Array | None:
    if key is None:
        return None
    rows = (head * queries + tile.row + jnp.arange(tile.rows)).astype(jnp.uint32)
    if isinstance(tile.column, int):
        return dropout_keep(key, rows, tile.column + tile.columns, static.dropout)[:, tile.column :]
    return lax.dynamic_slice_in_dim(dropout_keep(key, rows, keys, static.dropout), tile.column, tile.columns, axis=1)


def _forward_block(
    static: _Static, q_RK: jax.Array, k_EK: jax.Array, v_EK: jax.Array, of_tile: Any, integers: Any, tile: Tile,
    dropped: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    scores_RE = scores(static, q_RK, k_EK, of_tile, integers, tile)
    top_R = jnp.max(scores_RE, axis=1)
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0.0)  # a query that sees nothing
    weights = jnp.exp(scores_RE - top_R[:, None])
    total_R = jnp.sum(weights, axis=1)
    if dropped is not None:
        weights = jnp.where(dropped, weights / (1.0 - static.dropout), 0.0)
    out = dot(weights.astype(v_EK.dtype), v_EK, 1, 0)
    seen_R = total_R > 0.0
    total_R = jnp.where(seen_R, total_R, 1.0)
    # Where nothing is seen, +inf makes exp(score - lse) vanish in the backward pass.
    lse_R = jnp.where(seen_R, top_R + jnp.log(total_R), jnp.inf)
    return (out / total_R[:, None]).astype(v_EK.dtype), lse_R


def _backward_block(
    static: _Static, q_RK: jax.Array, k_EK: jax.Array, v_EK: jax.Array, of_tile: Any, integers: Any, tile: Tile,
    dropped: jax.Array | None, out_RK: jax.Array, lse_R: jax.Array, dout_RK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:  # fmt: skip
    """Gradients of a block: dq [R, K], and what it adds to dk and dv [K, E] and to its part of the terms; float32."""
    weights = jnp.exp(scores(static, q_RK, k_EK, of_tile, integers, tile) - lse_R[:, None])
    dweights = dot(dout_RK, v_EK, 1, 1)
    kept = weights
    if dropped is not None:
        kept = jnp.where(dropped, weights / (1.0 - static.dropout), 0.0)
        dweights = jnp.where(dropped, dweights / (1.0 - static.dropout), 0.0)
    delta_R = jnp.sum(dout_RK.astype(jnp.float32) * out_RK.astype(jnp.float32), axis=1)
    dscores = weights * (dweights - delta_R[:, None])
    dq_RK, dk_KE, dv_KE = products(static, q_RK, k_EK, v_EK, dout_RK, kept, dscores)
    return dq_RK, dk_KE, dv_KE, _term_gradients(static, of_tile, integers[1], tile, dscores)


def _term_gradients(static: _Static, of_tile: Any, integers: Any, tile: Tile, dscores: jax.Array) -> tuple[Any, ...]:
    """What a block adds to the gradients of each term's parts."""

    def one(form: Form, shared: bool, of_tile: Any, integers: Any) -> Any:
        # Linear in dscores: summed over the rows first, it is worked out once and not for each of them.
        return pull(form, of_tile, integers, tile, lax.psum(dscores, ROWS_OF_BATCH) if shared else dscores)

    return tuple(map(one, static.forms, static.shared, of_tile, integers))


# ------------------------------------------------------------------------------------------- blocks of a head


def _over_blocks(
    static: _Static, queries: int, keys: int, integers: Any, carry: Any, visit: Callable[[Any, Tile], Any]
) -> Any:
    """``carry = visit(carry, tile)`` for every block of queries, with the keys that it may see."""
    order, _, segments, _ = integers[0]
    block = ROWS[queries >= LONG]
    diagonal = static.causal and order is None
    # Many heads at once may need different keys, and a branch per head would run all branches.
    ranges = static.sequential and keys >= RANGES_FROM and (order is not None or segments is not None)
    if diagonal and not ranges:
        rows = -(-max(queries // SECTIONS, 1) // block) * block
        for row in range(0, queries, rows):
            end = min(row + rows, queries)
            first = 0 if static.window is None else max(row - static.window + 1, 0) // ALIGN * ALIGN
            carry = _section(row, end, block, carry, functools.partial(_with_keys, visit, first, end))
        return carry

    def choose(carry: Any, row: Any, rows: int) -> Any:
        if not ranges:
            return visit(carry, Tile(row, rows, 0, keys))
        lengths = sorted({min(-(-keys // (part * ALIGN)) * ALIGN, keys) for part in (16, 8, 4, 2, 1)})
        first, end = _visible(static, row, rows, queries, keys, integers[0])
        first = first // ALIGN * ALIGN

        def branch(length: int) -> Callable[[Any], Any]:
            return lambda carry: visit(carry, Tile(row, rows, jnp.minimum(first, keys - length), length))

        longer = sum((end - first > length).astype(jnp.int32) for length in lengths[:-1])
        return lax.switch(longer, [branch(length) for length in lengths], carry)

    return _section(0, queries, block, carry, choose)


def _with_keys(visit: Callable[[Any, Tile], Any], first: int, end: int, carry: Any, row: Any, rows: int) -> Any:
    return visit(carry, Tile(row, rows, first, end - first))


def _section(start: int, end: int, block: int, carry: Any, visit: Callable[[Any, Any, int], Any]) -> Any:
    """``carry = visit(carry, row, rows)`` for the blocks between two rows."""
    whole = (end - start) // block
    if whole == 1:
        carry = visit(carry, start, block)
    elif whole > 1:
        carry = lax.fori_loop(0, whole, lambda i, c: visit(c, start + i * block, block), carry)
    if rest := (end - start) % block:
        carry = visit(carry, end - rest, rest)
    return carry


def _visible(static: _Static, row: Any, rows: int, queries: int, keys: int, integers: Any) -> tuple[Any, Any]:
    """First key that a block may see, and one beyond the last."""
    query_order, key_order, query_segments, key_segments = integers
    tile = Tile(row, rows, 0, keys)
    seen_S = jnp.ones((keys,), bool)
    if static.causal:
        if query_order is None:
            query_order, key_order = jnp.arange(queries), jnp.arange(keys)
        order_R = tile.of_queries(query_order)
        seen_S &= key_order <= jnp.max(order_R)
        if static.window is not None:
            seen_S &= key_order > jnp.min(order_R) - static.window
    if query_segments is not None:
        segments_R = tile.of_queries(query_segments)
        seen_S &= (key_segments >= jnp.min(segments_R)) & (key_segments <= jnp.max(segments_R))
    first = jnp.argmax(seen_S).astype(jnp.int32)
    return first, jnp.where(jnp.any(seen_S), keys - jnp.argmax(seen_S[::-1]).astype(jnp.int32), first)


def _put(x: jax.Array, value: jax.Array, row: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), row, 0)


def _add(x_KS: jax.Array, value_KE: jax.Array, tile: Tile) -> jax.Array:
    sums_KE = lax.dynamic_slice_in_dim(x_KS, tile.column, tile.columns, 1) + value_KE
    return lax.dynamic_update_slice_in_dim(x_KS, sums_KE, tile.column, 1)


def _head_forward(static: _Static, key: Any, head: Any, floats: Any, integers: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v, added = floats
    T, S = q.shape[0], k.shape[0]

    def visit(carry: Any, tile: Tile) -> Any:
        dropped = _drop(static, key, head, T, S, tile)
        of_tile = tuple(parts(form, x, tile) for form, x in zip(static.forms, added))
        out, lse = _forward_block(
            static, tile.of_queries(q), tile.of_keys(k), tile.of_keys(v), of_tile, integers, tile, dropped
        )
        return _put(carry[0], out, tile.row), _put(carry[1], lse, tile.row)

    start = jnp.zeros((T, v.shape[1]), v.dtype), jnp.zeros((T,), jnp.float32)
    return _over_blocks(static, T, S, integers, start, visit)


def _head_backward(
    static: _Static, key: Any, head: Any, floats: Any, integers: Any, out: Any, lse: Any, dout: Any
) -> Any:
    q, k, v, added = floats
    T, S = q.shape[0], k.shape[0]

    def visit(carry: Any, tile: Tile) -> Any:
        dq, dk, dv, dadded = carry
        dropped = _drop(static, key, head, T, S, tile)
        of_tile = tuple(parts(form, x, tile) for form, x in zip(static.forms, added))
        rows = (tile.of_queries(x) for x in (out, lse, dout))
        block = _backward_block(
            static, tile.of_queries(q), tile.of_keys(k), tile.of_keys(v), of_tile, integers, tile, dropped, *rows
        )
        dadded = tuple(add_parts(form, old, new, tile) for form, old, new in zip(static.forms, dadded, block[3]))
        return _put(dq, block[0], tile.row), _add(dk, block[1], tile), _add(dv, block[2], tile), dadded

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, k.T, v.T, added))
    dq, dk, dv, dadded = _over_blocks(static, T, S, integers, start, visit)
    return dq, dk.T, dv.T, dadded


# ------------------------------------------------------------------------------------------------ all heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, floats: Any, integers: Any, key: Any) -> jax.Array:
    """``floats``: q [B, T, H, K], k and v [B, S, G, K], and for each term its arrays [1 or B, 1 or H, ...]."""
    return _forward(static, floats, integers, key)[0]


def _forward(static: _Static, floats: Any, integers: Any, key: Any) -> tuple[jax.Array, Any]:
    of_head = functools.partial(_head_forward, static, key)
    (B, T, H, _), v = floats[0].shape, floats[2]
    if static.sequential:

        def one(number: Any, carry: Any) -> Any:
            out, lse = of_head(number, *_at(number, H, floats, _AXES, integers))
            return _write(carry[0], out, number, H, 2), _write(carry[1], lse, number, H, 1)

        start = jnp.zeros((B, T, H, v.shape[3]), v.dtype), jnp.zeros((B, H, T), jnp.float32)
        out_BTHK, lse_BHT = lax.fori_loop(0, B * H, one, start)
    else:
        out_BHTK, lse_BHT = _together(of_head, _heads_first(floats), integers)
        out_BTHK = jnp.swapaxes(out_BHTK, 1, 2)
    # Named, so that a remat policy can keep them: recomputing them is a second forward pass.
    out_BTHK, lse_BHT = checkpoint_name(out_BTHK, SAVED), checkpoint_name(lse_BHT, SAVED)
    return out_BTHK, (floats, integers, key, out_BTHK, lse_BHT)


def _backward(static: _Static, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    floats, integers, key, out, lse = saved

    def of_head(number: Any, both: Any, integers: Any) -> Any:
        of_floats, (out, lse, dout) = both
        return _head_backward(static, key, number, of_floats, integers, out, lse, dout)

    if static.sequential:
        B, _, H, _ = floats[0].shape

        def one(number: Any, gradients: Any) -> Any:
            both = (floats, (out, lse, dout))
            new = of_head(number, *_at(number, H, both, (_AXES, (2, 1, 2)), integers))

            def add(total: jax.Array, x: jax.Array, axis: int) -> jax.Array:
                return _write(total, _read(total, number, H, axis) + x, number, H, axis)

            return _axes_map(add, gradients, new, axes=_AXES)

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), floats)
        gradients = lax.fori_loop(0, B * H, one, start)
        return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, floats), None, None

    turned = _heads_first(floats)
    both = turned, (jnp.swapaxes(out, 1, 2), lse, jnp.swapaxes(dout, 1, 2))

    def collected(gradient: jax.Array, x: jax.Array) -> jax.Array:
        """The sum over the rows and heads that share an array."""
        B, H = gradient.shape[:2]
        shape = (x.shape[0], B // x.shape[0], x.shape[1], H // x.shape[1], *x.shape[2:])
        return gradient.reshape(shape).sum(axis=(1, 3)).astype(x.dtype)

    # What all rows share is summed over those of a device, and not of another, before its gradient is worked out.
    active = sharding.active()
    B = lse.shape[0]
    devices = 1 if active is None or not any(static.shared) else math.gcd(B, active.pieces(("batch",)))
    *own, added = _together(of_head, both, integers, devices)
    once = lambda x: x.reshape(devices, B // devices, *x.shape[1:])[:, 0]  # noqa: E731 (every row has the sum)
    added = tuple(jax.tree.map(once, x) if shared else x for x, shared in zip(added, static.shared, strict=True))
    gradients = jax.tree.map(collected, (*own, added), turned)
    return _heads_first(gradients), None, None


_attention.defvjp(_forward, _backward)

_AXES = (2, 2, 2, 1)
"""Where heads are in q, k, v, and in all arrays of terms."""


def _axes_map(function: Callable[..., Any], *trees: Any, axes: Any) -> Any:
    """``function(leaf of each tree, axis of heads)``; an axis stands for all arrays of its part of the trees."""
    if isinstance(axes, int):
        return jax.tree.map(lambda *x: function(*x, axes), *trees)
    return tuple(_axes_map(function, *part, axes=own) for *part, own in zip(*trees, axes, strict=True))


def _at(number: Any, heads: int, floats: Any, axes: Any, integers: Any) -> tuple[Any, Any]:
    """The arrays of head ``number`` of all rows, where they lie: only what a head needs is copied."""
    row = number // heads
    of_head = _axes_map(lambda x, axis: _read(x, number, heads, axis), floats, axes=axes)
    return of_head, jax.tree.map(lambda x: x[row if x.shape[0] > 1 else 0], integers)


def _starts(x: jax.Array, number: Any, heads: int, axis: int) -> list[Any]:
    """Where head ``number`` of all rows begins in an array that rows and heads may share."""
    starts = [number // heads if x.shape[0] > 1 else 0, *[0] * (x.ndim - 1)]
    starts[axis] = number % heads // (heads // x.shape[axis])
    return starts


def _read(x: jax.Array, number: Any, heads: int, axis: int) -> jax.Array:
    sizes = [1 if at in (0, axis) else size for at, size in enumerate(x.shape)]
    return lax.squeeze(lax.dynamic_slice(x, _starts(x, number, heads, axis), sizes), (0, axis))


def _write(x: jax.Array, own: jax.Array, number: Any, heads: int, axis: int) -> jax.Array:
    return lax.dynamic_update_slice(x, jnp.expand_dims(own, (0, axis)), _starts(x, number, heads, axis))


def _heads_first(floats: Any) -> Any:
    """q, k and v with heads before time, or back; terms have them there."""
    q, k, v, added = floats
    return *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), added


def _together(function: Callable[..., Any], floats: Any, integers: Any, parts_of_batch: int = 1) -> Any:
    """``function(head number, arrays of the head, integers of its row)`` of all at once, [B, H, ...].

    Arrays may have 1 in place of B or H, integers 1 in place of B. ``parts_of_batch``: what the function sums over
    :data:`ROWS_OF_BATCH` are the rows of one of so many parts.
    """
    B, H = jax.tree.leaves(floats)[0].shape[:2]
    over_heads = jax.vmap(function, in_axes=(0, axes_over(floats, 1), None))
    axes = 0, axes_over(floats, 0), axes_over(integers, 0)
    over_rows = jax.vmap(over_heads, in_axes=axes, axis_name=ROWS_OF_BATCH)
    arguments = jnp.arange(B * H).reshape(B, H), without_ones(floats), without_ones(integers, 1)
    if parts_of_batch == 1:
        return over_rows(*arguments)

    def cut(axis: int | None, x: Any) -> Any:
        return x if axis is None else x.reshape(parts_of_batch, -1, *x.shape[1:])

    arguments = jax.tree.map(cut, axes, arguments, is_leaf=lambda axis: axis is None)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), jax.vmap(over_rows, in_axes=axes)(*arguments))

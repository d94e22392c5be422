"""Attention in blocks of queries, with O(T) memory. The backward pass recomputes the scores, as in Dao et al. 2022.

For each head, one matmul multiplies a block of queries with a range of keys. The range contains all visible keys, which
are the keys that at least one query of the block may attend to. There are three cases:

- The range is computed at run time from the integers of the mask, and its length is rounded up to one of a few lengths.
  This case has three conditions: a loop computes one head at a time (``sequential``), the mask has ``query_order`` or
  segments, and there are at least :data:`MIN_KEYS_FOR_RANGES` keys.
- Otherwise, if the mask is causal by index (no ``query_order``), the range is known at trace time. It ends at the last
  query of the block's section (:data:`MAX_SECTIONS`). With a window, it starts at the first key in the window of the
  section's first query, or up to ``KEY_RANGE_MULTIPLE - 1`` keys before.
- Otherwise, the range contains all keys.

In a loop over heads, all heads of a batch row may share the mask of a block (``choices.share_mask_between_heads``).

In addition to the inputs, the forward pass saves only the output and the log-sum-exp of the scores of each query.

Shapes as in ``jaxlm.nn.attention.api``; V width of values, R queries of a block, E keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.attention.bias import (
    AttentionBias,
    BiasFn,
    Tile,
    add_tile_gradients,
    drop_unit_axes,
    slice_for_tile,
    vmap_axes,
)
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.attention.tile_scores import (
    CHECKPOINT_NAME,
    ScoreConfig,
    bias_gradients,
    qkv_gradients,
    scores,
    visible_keys,
)
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.dropout import keep_rows
from jaxlm.nn.linear import dot
from jaxlm.nn.time_chunks import loop_over_chunks

BLOCK_ROWS = (256, 512)
"""Queries per block: the first number for fewer than ``LONG_SEQUENCE`` queries, otherwise the second. Small blocks give
small matmuls; large blocks compute more masked scores."""
LONG_SEQUENCE = 4096
MAX_SECTIONS = 8
"""Maximum number of sections into which the queries are split for a causal mask by index. If the queries cannot be
split evenly, there may be one more section, with fewer than ``MAX_SECTIONS`` queries. A section reads the keys up to
its own end and computes its blocks in a loop. The number is limited because each section is compiled separately, and
because a CPU runs several sections at the same time, each with its own temporaries."""
KEY_RANGE_MULTIPLE = 128
"""The start of a range of keys is a multiple of this number, unless the range ends at the last key. A length that is
computed at run time is also a multiple, unless the range contains all keys."""
MIN_KEYS_FOR_RANGES = 1024
"""Minimum number of keys for which computing the range of visible keys at run time saves time."""
BATCH_AXIS = "attention_rows"
"""``axis_name`` of the batch axis in ``jax.vmap``."""


@dataclasses.dataclass(frozen=True)
class _StaticArguments(ScoreConfig):
    """The static (trace-time) arguments of attention."""

    dropout: float
    sequential: bool
    shared: tuple[bool, ...]
    """For each bias, whether all rows of the batch share it. False if ``sequential``."""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    biases: tuple[AttentionBias, ...],
    dropout: float,
    key: jax.Array | None,
    sequential: bool,
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``. ``sequential``: a loop computes one head at a time."""
    bias_arrays = [jax.tree.leaves((bias.floats, bias.integers)) for bias in biases]
    shared = tuple(not sequential and all(x.shape[0] == 1 for x in arrays) for arrays in bias_arrays)
    static = _StaticArguments(
        mask.causal, mask.window, scale, tuple(bias.bias_fn for bias in biases), dropout, sequential, shared
    )
    if not sequential and k_BSGK.shape[2] != q_BTHK.shape[2]:
        k_BSGK, v_BSGK = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BSGK, v_BSGK))
    floats = (q_BTHK, k_BSGK, v_BSGK, tuple(bias.floats for bias in biases))
    integers = jax.tree.map(jnp.asarray, (mask.arrays, tuple(bias.integers for bias in biases)))
    attend = functools.partial(_attention, static)
    if sharding.has_explicit_axes(q_BTHK):  # vmap does not support arrays of which only some are sharded
        attend = jax.sharding.auto_axes(attend, out_sharding=jax.typeof(q_BTHK).sharding)
    return attend(floats, integers, key)


# ------------------------------------------------------------------------------------------------ one block


def _dropout_mask(
    static: _StaticArguments, key: jax.Array | None, head: Any, queries: int, keys: int, tile: Tile
) -> jax.Array | None:
    if key is None:
        return None
    rows = (head * queries + tile.row + jnp.arange(tile.rows)).astype(jnp.uint32)
    if isinstance(tile.column, int):
        return keep_rows(key, rows, tile.column + tile.columns, static.dropout)[:, tile.column :]
    return lax.dynamic_slice_in_dim(keep_rows(key, rows, keys, static.dropout), tile.column, tile.columns, axis=1)


class _Block(NamedTuple):
    """The inputs of a block: its tile, and the slices of the arrays of a head that the tile needs.

    Attributes:
        visible_RE: the mask; None: nothing is masked.
        keep: [R, E], the dropout mask of the probabilities; None: no dropout.
    """

    tile: Tile
    visible_RE: jax.Array | None
    q_RK: jax.Array
    k_EK: jax.Array
    v_EV: jax.Array
    bias_arrays: Any
    keep: jax.Array | None

    @classmethod
    def slice(
        cls,
        static: _StaticArguments,
        tile: Tile,
        visible_RE: jax.Array | None,
        key: jax.Array | None,
        head: Any,
        floats: Any,
    ) -> _Block:
        """The block of a tile, from the arrays of a head. ``head`` is the index among all B * H heads."""
        q, k, v, bias_floats = floats
        bias_arrays = tuple(slice_for_tile(bias_fn, x, tile) for bias_fn, x in zip(static.bias_fns, bias_floats))
        keep = _dropout_mask(static, key, head, q.shape[0], k.shape[0], tile)
        return cls(tile, visible_RE, tile.slice_queries(q), tile.slice_keys(k), tile.slice_keys(v), bias_arrays, keep)

    def scores(self, static: _StaticArguments, bias_integers: Any) -> jax.Array:
        """The masked scores, [R, E] float32."""
        return scores(static, self.q_RK, self.k_EK, self.bias_arrays, bias_integers, self.tile, self.visible_RE)


def _forward_block(static: _StaticArguments, block: _Block, bias_integers: Any) -> tuple[jax.Array, jax.Array]:
    """The output [R, V] of the queries of a block, and the log-sum-exp of their scores, [R]."""
    scores_RE, keep, v_EV = block.scores(static, bias_integers), block.keep, block.v_EV
    top_R = jnp.max(scores_RE, axis=1)
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0.0)  # -inf for a query that may not attend to any key
    weights = jnp.exp(scores_RE - top_R[:, None])
    total_R = jnp.sum(weights, axis=1)
    if keep is not None:
        weights = jnp.where(keep, weights / (1.0 - static.dropout), 0.0)
    out = dot(weights.astype(v_EV.dtype), v_EV, (1, 0))
    visible_R = total_R > 0.0
    total_R = jnp.where(visible_R, total_R, 1.0)
    # For a query without visible keys, lse = +inf makes exp(score - lse) zero in the backward pass.
    lse_R = jnp.where(visible_R, top_R + jnp.log(total_R), jnp.inf)
    return (out / total_R[:, None]).astype(v_EV.dtype), lse_R


def _backward_block(
    static: _StaticArguments, block: _Block, bias_integers: Any, out_RV: jax.Array, lse_R: jax.Array, dout_RV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """The gradients of a block: dq [R, K] and the contributions to dk [K, E] and dv [V, E], float32; and the gradients
    of ``block.bias_arrays``."""
    weights, keep = jnp.exp(block.scores(static, bias_integers) - lse_R[:, None]), block.keep
    if static.bias_fns:
        # If a bias is large, such as -1e9, the rounding error of lse is large, so that a row does not sum to 1.
        total_R1 = jnp.sum(weights, axis=1, keepdims=True)
        weights = weights / jnp.where(total_R1 > 0.0, total_R1, 1.0)
    dweights = dot(dout_RV, block.v_EV, (1, 1))
    kept_weights = weights
    if keep is not None:
        kept_weights = jnp.where(keep, weights / (1.0 - static.dropout), 0.0)
        dweights = jnp.where(keep, dweights / (1.0 - static.dropout), 0.0)
    delta_R = jnp.sum(dout_RV.astype(jnp.float32) * out_RV.astype(jnp.float32), axis=1)
    dscores = weights * (dweights - delta_R[:, None])
    dq_RK, dk_KE, dv_VE = qkv_gradients(static, block.q_RK, block.k_EK, block.v_EV, dout_RV, kept_weights, dscores)
    biases = zip(static.bias_fns, static.shared, block.bias_arrays, bias_integers, strict=True)
    # The gradient of a bias is linear in dscores. So for a shared bias, dscores are summed over the batch first, and
    # the gradient is computed once instead of once per row.
    dbias = tuple(
        bias_gradients(fn, arrays, integers, block.tile, lax.psum(dscores, BATCH_AXIS) if shared else dscores)
        for fn, shared, arrays, integers in biases
    )
    return dq_RK, dk_KE, dv_VE, dbias


# ----------------------------------------------------------------------------- blocks of one or all heads of a row


def _loop_over_blocks(
    static: _StaticArguments, queries: int, keys: int, integers: Any, carry: Any, visit: Callable[[Any, Tile], Any]
) -> Any:
    """The final carry of a loop ``carry = visit(carry, tile)``, with one tile for each block of queries and its visible
    keys."""
    order, _, segments, _ = integers[0]
    block = BLOCK_ROWS[queries >= LONG_SEQUENCE]
    is_causal_by_index = static.causal and order is None
    # The range is computed only in a loop over heads. Without the loop, vmap computes all rows of the batch together.
    # The rows may need ranges of different lengths, so vmap would run all branches of the switch.
    find_visible_keys = (
        static.sequential and keys >= MIN_KEYS_FOR_RANGES and (order is not None or segments is not None)
    )

    def visit_section(start: int, end: int, carry: Any) -> Any:
        first = 0 if static.window is None else max(start - static.window + 1, 0)
        first = first // KEY_RANGE_MULTIPLE * KEY_RANGE_MULTIPLE

        def visit_block(rows_before: Any, rows: int, carry: Any) -> Any:
            return visit(carry, Tile(start + rows_before, rows, first, end - first))

        return loop_over_chunks(end - start, block, visit_block, carry)

    if is_causal_by_index and not find_visible_keys:
        rows = -(-max(queries // MAX_SECTIONS, 1) // block) * block
        for start in range(0, queries, rows):
            carry = visit_section(start, min(start + rows, queries), carry)
        return carry

    def visit_visible_keys(row: Any, rows: int, carry: Any) -> Any:
        if not find_visible_keys:
            return visit(carry, Tile(row, rows, 0, keys))
        lengths = sorted(
            {min(-(-keys // (divisor * KEY_RANGE_MULTIPLE)) * KEY_RANGE_MULTIPLE, keys) for divisor in (16, 8, 4, 2, 1)}
        )
        first, end = _visible_range(static, row, rows, queries, keys, integers[0])
        first = first // KEY_RANGE_MULTIPLE * KEY_RANGE_MULTIPLE

        def branch(length: int) -> Callable[[Any], Any]:
            return lambda carry: visit(carry, Tile(row, rows, jnp.minimum(first, keys - length), length))

        index = sum((end - first > length).astype(jnp.int32) for length in lengths[:-1])
        return lax.switch(index, [branch(length) for length in lengths], carry)

    return loop_over_chunks(queries, block, visit_visible_keys, carry)


def _visible_range(
    static: _StaticArguments, row: Any, rows: int, queries: int, keys: int, integers: Any
) -> tuple[Any, Any]:
    """The range [first, end) of keys that contains all keys visible to a block."""
    query_order, key_order, query_segments, key_segments = integers
    tile = Tile(row, rows, 0, keys)
    visible_S = jnp.ones((keys,), bool)
    if static.causal:
        if query_order is None:
            query_order, key_order = jnp.arange(queries), jnp.arange(keys)
        order_R = tile.slice_queries(query_order)
        visible_S &= key_order <= jnp.max(order_R)
        if static.window is not None:
            visible_S &= key_order > jnp.min(order_R) - static.window
    if query_segments is not None:
        segments_R = tile.slice_queries(query_segments)
        visible_S &= (key_segments >= jnp.min(segments_R)) & (key_segments <= jnp.max(segments_R))
    first = jnp.argmax(visible_S).astype(jnp.int32)
    return first, jnp.where(jnp.any(visible_S), keys - jnp.argmax(visible_S[::-1]).astype(jnp.int32), first)


def _heads_forward(
    static: _StaticArguments, key: jax.Array | None, first_head: Any, floats: Any, integers: Any
) -> tuple[jax.Array, jax.Array]:
    """The output [T, H, V] of the heads of one row of the batch, and the log-sum-exp of their scores, [H, T].

    ``floats`` contain one head or all heads of the row, and H is their number.

    Args:
        first_head: index of the first head among the heads of all rows.
        floats: q [T, H, K], k [S, G, K], v [S, G, V], and for each bias its arrays [1 or H, ...].
    """
    q, k, v, _ = floats
    (T, H, _), S = q.shape, k.shape[0]

    def visit(carry: Any, tile: Tile) -> Any:
        visible = visible_keys(static, integers[0], tile)

        def add_head(head: Any, carry: Any) -> Any:
            out_THV, lse_HT = carry
            block = _Block.slice(static, tile, visible, key, first_head + head, _read_head(floats, head, H))
            out_RV, lse_R = _forward_block(static, block, integers[1])
            out_THV = lax.dynamic_update_slice(out_THV, out_RV[:, None], (tile.row, head, 0))
            return out_THV, lax.dynamic_update_slice(lse_HT, lse_R[None], (head, tile.row))

        return _loop_over_heads(H, add_head, carry)

    init = jnp.zeros_like(v, shape=(T, H, v.shape[2])), jnp.zeros_like(v, jnp.float32, (H, T))
    return _loop_over_blocks(static, T, S, integers, init, visit)


def _heads_backward(
    static: _StaticArguments, key: jax.Array | None, first_head: Any, floats: Any, integers: Any, out_THV: jax.Array,
    lse_HT: jax.Array, dout_THV: jax.Array,
) -> Any:  # fmt: skip
    """The gradients of ``floats``, float32.

    The arguments are those of :func:`_heads_forward`, its results, and the gradient of its output.
    """
    q, k, v, bias_floats = floats
    (T, H, _), (S, G, _) = q.shape, k.shape

    def visit(carry: Any, tile: Tile) -> Any:
        visible = visible_keys(static, integers[0], tile)

        def add_head(head: Any, carry: Any) -> Any:
            dq_THK, dk_GKS, dv_GVS, dbias = carry
            block = _Block.slice(static, tile, visible, key, first_head + head, _read_head(floats, head, H))
            rows = (tile.slice_queries(_index(x, head, axis)) for x, axis in ((out_THV, 1), (lse_HT, 0), (dout_THV, 1)))
            dq_RK, dk_KE, dv_VE, block_dbias = _backward_block(static, block, integers[1], *rows)
            dq_THK = lax.dynamic_update_slice(dq_THK, dq_RK[:, None], (tile.row, head, 0))
            group = head // (H // G)
            dk_GKS, dv_GVS = _add_columns(dk_GKS, dk_KE, group, tile), _add_columns(dv_GVS, dv_VE, group, tile)
            dbias = tuple(
                _add_bias_gradients(bias_fn, total, added, head, tile)
                for bias_fn, total, added in zip(static.bias_fns, dbias, block_dbias, strict=True)
            )
            return dq_THK, dk_GKS, dv_GVS, dbias

        return _loop_over_heads(H, add_head, carry)

    # The keys are the last axis of the sums, as in ``tile_scores.qkv_gradients``.
    keys_last = q, jnp.moveaxis(k, 0, 2), jnp.moveaxis(v, 0, 2), bias_floats
    init = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), keys_last)
    dq_THK, dk_GKS, dv_GVS, dbias = _loop_over_blocks(static, T, S, integers, init, visit)
    return dq_THK, jnp.moveaxis(dk_GKS, 2, 0), jnp.moveaxis(dv_GVS, 2, 0), dbias


def _loop_over_heads(heads: int, add_head: Callable[[Any, Any], Any], carry: Any) -> Any:
    """The final carry of ``carry = add_head(head, carry)`` for all heads."""
    return add_head(0, carry) if heads == 1 else lax.fori_loop(0, heads, add_head, carry)


def _index(x: jax.Array, index: Any, axis: int) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def _read_head(floats: Any, head: Any, heads: int) -> Any:
    """The arrays of one head, without the axis of heads. Several heads may share keys, values and biases."""
    q, k, v, bias_floats = floats
    group = head // (heads // k.shape[1])
    biases = jax.tree.map(lambda x: _index(x, head if x.shape[0] > 1 else 0, 0), bias_floats)
    return _index(q, head, 1), _index(k, group, 1), _index(v, group, 1), biases


def _add_columns(x_GKS: jax.Array, value_KE: jax.Array, group: Any, tile: Tile) -> jax.Array:
    start = tuple(jnp.asarray(index, jnp.int32) for index in (group, 0, tile.column))
    sizes = (1, *value_KE.shape)
    sums_1KE = lax.dynamic_slice(x_GKS, start, sizes) + value_KE[None]
    return lax.dynamic_update_slice(x_GKS, sums_1KE, start)


def _add_bias_gradients(bias_fn: BiasFn, total: Any, added: Any, head: Any, tile: Tile) -> Any:
    """``total`` plus the gradients of one head's tile. The arrays of ``total`` have the shape [1 or H, ...]."""
    heads = {name: head if x.shape[0] > 1 else 0 for name, x in total.items()}
    sums = add_tile_gradients(bias_fn, {name: _index(x, heads[name], 0) for name, x in total.items()}, added, tile)
    return {name: lax.dynamic_update_index_in_dim(x, sums[name], heads[name], 0) for name, x in total.items()}


# ------------------------------------------------------------------------------------------------ all heads


def _forward(static: _StaticArguments, floats: Any, integers: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """The output [B, T, H, V] of attention, and the arrays for the backward pass.

    Args:
        floats: q [B, T, H, K], k [B, S, G, K], v [B, S, G, V], and for each bias its arrays [1 or B, 1 or H, ...].
    """
    (B, T, H, _), v = floats[0].shape, floats[2]
    if static.sequential:

        def add_heads(heads: _Heads, carry: Any) -> Any:
            selected = heads.read(floats, _HEAD_AXES), heads.read_row(integers)
            return heads.write(carry, _heads_forward(static, key, heads.first, *selected), (2, 1))

        init = jnp.zeros_like(v, shape=(B, T, H, v.shape[3])), jnp.zeros_like(v, jnp.float32, (B, H, T))
        out_BTHV, lse_BHT = _loop_over_rows_and_heads(floats, integers, add_heads, init)
    else:

        def head_forward(head: Any, floats: Any, integers: Any) -> tuple[jax.Array, jax.Array]:
            out_T1V, lse_1T = _heads_forward(static, key, head, _add_head_axis(floats), integers)
            return out_T1V[:, 0], lse_1T[0]

        out_BHTV, lse_BHT = _map_all_heads(head_forward, _swap_heads_and_time(floats), integers)
        out_BTHV = jnp.swapaxes(out_BHTV, 1, 2)
    # The names let a remat policy save these arrays. Recomputing them would need a second forward pass.
    out_BTHV, lse_BHT = checkpoint_name(out_BTHV, CHECKPOINT_NAME), checkpoint_name(lse_BHT, CHECKPOINT_NAME)
    return out_BTHV, (floats, integers, key, out_BTHV, lse_BHT)


def _backward(static: _StaticArguments, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    floats, integers, key, out, lse = saved
    if static.sequential:

        def add_heads(heads: _Heads, gradients: Any) -> Any:
            selected = heads.read(floats, _HEAD_AXES), heads.read_row(integers)
            results = heads.read((out, lse, dout), (2, 1, 2))
            new = _heads_backward(static, key, heads.first, *selected, *results)
            sums = jax.tree.map(jnp.add, heads.read(gradients, _HEAD_AXES), new)
            return heads.write(gradients, sums, _HEAD_AXES)

        init = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), floats)
        gradients = _loop_over_rows_and_heads(floats, integers, add_heads, init)
        return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, floats), None, None

    def head_backward(head: Any, arrays: Any, integers: Any) -> Any:
        floats, (out, lse, dout) = arrays
        dq, dk, dv, dbias = _heads_backward(
            static, key, head, _add_head_axis(floats), integers, out[:, None], lse[None], dout[:, None]
        )  # fmt: skip
        return dq[:, 0], dk[:, 0], dv[:, 0], jax.tree.map(lambda x: x[0], dbias)

    heads_first = _swap_heads_and_time(floats)
    arrays = heads_first, (jnp.swapaxes(out, 1, 2), lse, jnp.swapaxes(dout, 1, 2))

    def sum_over_shared(gradient: jax.Array, x: jax.Array) -> jax.Array:
        """The gradient of ``x``, summed over the rows and heads that share it."""
        B, H = gradient.shape[:2]
        shape = (x.shape[0], B // x.shape[0], x.shape[1], H // x.shape[1], *x.shape[2:])
        return gradient.reshape(shape).sum(axis=(1, 3)).astype(x.dtype)

    # For a bias that all rows share, dscores are summed over the rows of each device before the gradient is computed.
    active = sharding.active()
    B = lse.shape[0]
    batch_parts = 1 if active is None or not any(static.shared) else math.gcd(B, active.num_shards(("batch",)))
    *dqkv, bias_floats = _map_all_heads(head_backward, arrays, integers, batch_parts)
    # All rows of a device have the same sum, so only the first row is used.
    first_row = lambda x: x.reshape(batch_parts, B // batch_parts, *x.shape[1:])[:, 0]  # noqa: E731
    bias_floats = tuple(
        jax.tree.map(first_row, x) if shared else x for x, shared in zip(bias_floats, static.shared, strict=True)
    )
    gradients = jax.tree.map(sum_over_shared, (*dqkv, bias_floats), heads_first)
    return _swap_heads_and_time(gradients), None, None


_attention = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0,))


_HEAD_AXES = (2, 2, 2, 1)
"""The axis of heads in q, k, v and in all arrays of biases."""


class _Heads(NamedTuple):
    """One head or all heads of one row of the batch.

    Attributes:
        first: index of the first head among the heads of all rows.
        size: number of these heads.
        per_row: H, the number of heads of a row.
    """

    first: Any
    size: int
    per_row: int

    def read(self, arrays: Any, axes: Any) -> Any:
        """The slices of arrays [1 or B, ...] for these heads, without the axis of the batch.

        ``axes`` are the axes of heads in the arrays. One entry may apply to a whole subtree.
        """

        def read(x: jax.Array, axis: int) -> jax.Array:
            sizes = [1, *x.shape[1:]]
            sizes[axis] = max(1, self.size * x.shape[axis] // self.per_row)
            return lax.dynamic_slice(x, self._starts(x, axis), sizes)[0]

        return _map_with_axes(read, arrays, axes=axes)

    def write(self, arrays: Any, values: Any, axes: Any) -> Any:
        """The arrays after ``values`` are written to the slices that :meth:`read` returns."""

        def write(x: jax.Array, value: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_update_slice(x, value[None], self._starts(x, axis))

        return _map_with_axes(write, arrays, values, axes=axes)

    def read_row(self, integers: Any) -> Any:
        """The arrays [1 or B, ...] of the row, without the axis of the batch."""
        row = self.first // self.per_row
        return jax.tree.map(lambda x: _index(x, row if x.shape[0] > 1 else 0, 0), integers)

    def _starts(self, x: jax.Array, axis: int) -> list[Any]:
        """The start indices of the slice in an array with 1, G or H heads."""
        starts = [self.first // self.per_row if x.shape[0] > 1 else 0, *[0] * (x.ndim - 1)]
        starts[axis] = self.first % self.per_row // (self.per_row // x.shape[axis])
        return starts


def _map_with_axes(function: Callable[..., Any], *trees: Any, axes: Any) -> Any:
    """A tree of ``function(leaf of each tree, axis of heads)``. One entry of ``axes`` may apply to a whole subtree."""
    if isinstance(axes, int):
        return jax.tree.map(lambda *x: function(*x, axes), *trees)
    return tuple(_map_with_axes(function, *subtrees, axes=axis) for *subtrees, axis in zip(*trees, axes, strict=True))


def _loop_over_rows_and_heads(floats: Any, integers: Any, add_heads: Callable[[_Heads, Any], Any], carry: Any) -> Any:
    """The final carry of ``carry = add_heads(heads, carry)`` for the heads of all rows."""
    B, T, H, _ = floats[0].shape
    has_integers = any(x is not None for x in integers[0])
    count = H if choices.share_mask_between_heads(T, has_integers=has_integers) else 1
    return lax.fori_loop(0, B * H // count, lambda i, carry: add_heads(_Heads(i * count, count, H), carry), carry)


def _add_head_axis(floats: Any) -> Any:
    """The arrays of one head in the layout of :func:`_heads_forward`, with an axis of one head."""
    q, k, v, bias_floats = floats
    return q[:, None], k[:, None], v[:, None], jax.tree.map(lambda x: x[None], bias_floats)


def _swap_heads_and_time(floats: Any) -> Any:
    """q, k and v with the axes of heads and time swapped. Arrays of biases already have heads first."""
    q, k, v, bias_floats = floats
    return *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), bias_floats


def _map_all_heads(function: Callable[..., Any], floats: Any, integers: Any, batch_parts: int = 1) -> Any:
    """``function(index of the head, arrays of the head, integers of its row)`` for all heads together, [B, H, ...].

    The arrays may have size 1 instead of B or H, and the integers size 1 instead of B.

    Args:
        batch_parts: number of parts of the batch. A ``psum`` over :data:`BATCH_AXIS` in ``function`` sums over the
            rows of one part.
    """
    B, H = jax.tree.leaves(floats)[0].shape[:2]
    over_heads = jax.vmap(function, in_axes=(0, vmap_axes(floats, 1), None))
    axes = 0, vmap_axes(floats, 0), vmap_axes(integers, 0)
    over_rows = jax.vmap(over_heads, in_axes=axes, axis_name=BATCH_AXIS)
    arguments = jnp.arange(B * H).reshape(B, H), drop_unit_axes(floats), drop_unit_axes(integers, 1)
    if batch_parts == 1:
        return over_rows(*arguments)

    def split_batch(axis: int | None, x: Any) -> Any:
        return x if axis is None else x.reshape(batch_parts, -1, *x.shape[1:])

    arguments = jax.tree.map(split_batch, axes, arguments, is_leaf=lambda axis: axis is None)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), jax.vmap(over_rows, in_axes=axes)(*arguments))

"""Pallas kernels for attention on TPU, with biases and ``Mask.query_order``; each tile has whole rows of scores.

A tile of queries is multiplied with all its keys at once. Its scores, with biases, stay in VMEM until they are
multiplied with the values. Without the kernel, XLA writes each tile of the scores to HBM. It does so several times if a
relative bias shifts each row of the scores by a different amount (``jaxlm.nn.attention.pallas_tile``).

The kernels read queries, keys and values as the projections write them: [B, T, H * K], with the heads of a token beside
each other. With a separate axis of heads, a TPU would pad a head of width 64 to a vector of 128 entries. XLA would also
transpose the arrays, and the projections would use half of the matrix unit.

A grid step computes a block: some or all queries of a few heads. The total width of these heads is a multiple of 128,
or the block has all heads (:func:`_heads_of_block`). The kernels compute the heads of a block one after the other. The
queries of a head in a block are one tile by default. With a causal mask that compares indices (``Mask.query_order`` is
None), they are split into causal tiles of at most ``jaxlm.nn.choices.causal_tile`` queries. This needs (after padding)
as many keys as queries, and at most ``MAX_CAUSAL_BLOCK`` queries. A causal tile has no keys after its last query. All
other scores that the mask excludes are computed and then masked.

The backward pass recomputes the scores. Because a tile has whole rows, the backward kernel computes the sums over rows
itself. It reads no log-sum-exps and no row sums from HBM.

Shapes as in ``jaxlm.nn.attention.api``, with V width of values, R queries of a tile, X and Y the last axes of a bias's
array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.attention import split, tile_scores
from jaxlm.nn.attention.bias import AttentionBias, BiasFn, Dense, KernelBiasFn, Tile, as_dense
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.attention.pallas_tile import VmemTile
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot

MAX_BLOCK = 512
"""Maximum number of queries of a block that is one tile."""
MAX_CAUSAL_BLOCK = 1024
"""Maximum number of queries of a block that is split into causal tiles. The kernel has separate code for each tile of
each head of a block, so its code grows with this number."""
MAX_BIAS_BLOCK_ENTRIES = 512 * 1536
"""Maximum number of entries of the product [R, R + S] that ``Tile.shifted_product`` shifts, for a tile with R queries
and all S keys. Several arrays of this size must fit into VMEM."""
MAX_KEYS = 4096
"""Maximum number of keys. The keys and values of the heads of a block must fit into VMEM beside its other arrays."""
VMEM_LIMIT_BYTES = 32 * 2**20
"""Bytes of VMEM that a kernel may use."""


def unsupported_reason(qkv: Any, mask: Mask, biases: tuple[AttentionBias, ...], dropout_key: Any) -> str | None:
    """Why the kernels cannot run with the arguments, the TPU and the mesh, as a part of an error message.

    None if they can run.

    Args:
        qkv: q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V]; only their shapes and dtypes are used.
    """
    if dropout_key is not None:
        return "has no dropout"
    for bias in biases:
        if isinstance(bias.bias_fn, Dense):
            if not _takes_dense_biases(qkv):
                return (
                    f"takes dense biases only with as many key heads as query heads, at most {MAX_BLOCK} queries and "
                    f"{MAX_BLOCK} keys, and few enough heads in a block that their biases fit into VMEM"
                )
        elif not isinstance(bias.bias_fn, KernelBiasFn):
            name = type(bias.bias_fn).__name__.strip("_")
            return f"does not support the bias {name}: TPU kernels need a KernelBiasFn (jaxlm.nn.attention.bias)"
    if sharding.device_kind().startswith(lazy_pallas.OLD_TPUS):
        return "needs a TPU v5 or newer: older TPUs cannot rotate each row by a different amount"
    if (keys := qkv[1].shape[1]) > MAX_KEYS:
        return f"supports at most {MAX_KEYS} keys, got {keys}"
    if _block_bytes(qkv, mask) > VMEM_LIMIT_BYTES:
        _, _, H, K = qkv[0].shape
        return f"needs blocks that do not fit into VMEM: {H} query heads and {qkv[1].shape[2]} key heads of width {K}"
    return split.unsupported_reason()


@dataclasses.dataclass(frozen=True)
class _StaticArguments(tile_scores.ScoreConfig):
    """The static (trace-time) arguments of the kernels.

    Attributes:
        queries, keys: numbers of queries and keys without padding. With padding, both are multiples of LANES.
        heads: numbers H and G of the query heads and the key heads: of all devices together in :func:`attention`, of
            one device in the kernels.
        causal_tile: maximum number of queries of a tile if a block is split into causal tiles.
    """

    queries: int
    keys: int
    heads: tuple[int, int]
    causal_tile: int


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    biases: tuple[AttentionBias, ...],
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``."""
    B, T, H, _ = q_BTHK.shape
    S = k_BSGK.shape[1]
    grouped = k_BSGK.shape[2] != H
    if B > 1 and _takes_dense_biases((q_BTHK, k_BSGK, v_BSGK)):
        # A bias that all rows of the batch share is computed once, as an array [1, H, T, S]. A block has all queries,
        # so its part of the array stays in VMEM while the grid computes the rows of the batch. Otherwise, the kernel
        # would compute the bias again for each row. For T5 with 512 tokens, that would be a sixth of the instruction
        # bundles of the forward kernel and a quarter of those of the backward kernel (TPU compiler).
        biases = tuple(as_dense(bias, T, S) if _is_shared_by_rows(bias) else bias for bias in biases)

    def broadcast(bias_fn: BiasFn, name: str, x: jax.Array) -> jax.Array:
        """``x`` broadcast to all heads and, if necessary, to all rows of the batch.

        Different grid steps compute different heads, so every array is broadcast to all heads. The kernel can sum a
        gradient only over consecutive grid steps. So rows of the batch can share an array only if the grid steps that
        use the same part of the array are consecutive. These grid steps are not consecutive in two cases, in which an
        array is broadcast to all rows:

        - Query-indexed arrays: the grid computes all blocks of queries of a row before the next row.
        - All arrays, with grouped query heads: the grid may compute several blocks of query heads before the next row.
        """
        rows = B if grouped or _is_query_indexed(bias_fn, name) else x.shape[0]
        return jnp.broadcast_to(x, (rows, H, *x.shape[2:]))

    bias_fns = tuple(bias.bias_fn for bias in biases)
    integers = jax.tree.map(jnp.asarray, (mask.arrays, tuple(bias.integers for bias in biases)))
    static = _StaticArguments(
        mask.causal, mask.window, scale, bias_fns, queries=T, keys=S, heads=(H, k_BSGK.shape[2]),
        causal_tile=choices.causal_tile(),
    )  # fmt: skip
    floats = _map_bias_arrays(static, broadcast, tuple(bias.floats for bias in biases))
    return split.shard_attention(
        functools.partial(_device_attention, static), (q_BTHK, k_BSGK, v_BSGK), floats, integers
    )


def _takes_dense_biases(qkv: Any) -> bool:
    """Whether the kernels support dense biases.

    There must be at most ``MAX_BLOCK`` queries (so a block has all of them) and at most ``MAX_BLOCK`` keys. Each query
    head must have its own key head. For the heads of a block, the dense bias and its gradient must fit into half of
    ``VMEM_LIMIT_BYTES``.
    """
    (_, T, H, _), (_, S, G, _) = qkv[0].shape, qkv[1].shape
    key_heads, group_size = _heads_of_device_block(qkv)
    num_bytes = 16 * key_heads * group_size * _padded(T) * _padded(S)  # two float32 arrays with two buffers each
    return max(T, S) <= MAX_BLOCK and G == H and num_bytes <= VMEM_LIMIT_BYTES // 2


def _is_shared_by_rows(bias: AttentionBias) -> bool:
    """Whether all rows of the batch have the same bias."""
    return all(x.shape[0] == 1 for x in jax.tree.leaves((bias.floats, bias.integers)))


def _device_attention(static: _StaticArguments, qkv: Any, bias_floats: Any, integers: Any) -> jax.Array:
    """Attention for the rows and heads of one device, [B, T, H, V]."""
    H, K = qkv[0].shape[2:]
    query_padding, key_padding = -static.queries % LANES, -static.keys % LANES

    def merge_heads(x_BTHK: jax.Array) -> jax.Array:
        merged = x_BTHK.reshape(*x_BTHK.shape[:2], -1)
        # If a remat policy saves the arrays with this name, the backward pass does not recompute the projection.
        return checkpoint_name(merged, tile_scores.CHECKPOINT_NAME)

    def column(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT, ((0, 0), (0, query_padding)))[:, :, None]

    def row(x_BS: jax.Array) -> jax.Array:
        return jnp.pad(x_BS, ((0, 0), (0, key_padding)))[:, None, :]

    q, k, v = map(merge_heads, qkv)
    padded_biases = [
        cast(KernelBiasFn, bias_fn).padded(floats, query_padding, key_padding)
        for bias_fn, floats in zip(static.bias_fns, bias_floats, strict=True)
    ]
    static = dataclasses.replace(
        static, bias_fns=tuple(bias_fn for bias_fn, _ in padded_biases), heads=(H, qkv[1].shape[2])
    )
    mask_integers, bias_integers = integers
    mask_integers = tuple(
        None if x is None else pad_and_reshape(x)
        for x, pad_and_reshape in zip(mask_integers, (column, row, column, row), strict=True)
    )

    def merge_query_vectors(bias_fn: BiasFn, name: str, x: jax.Array) -> jax.Array:
        """``x`` [B, H, T, K] in the layout of the queries, [B, T, H * K], if it has one vector of width K per query.

        Other arrays are returned unchanged.
        """
        if not _is_query_indexed(bias_fn, name) or x.shape[3] != K:
            return x
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    layouts = {"query": column, "key": row}
    bias_integers = tuple(arrays and {name: layouts[name](x) for name, x in arrays.items()} for arrays in bias_integers)
    bias_floats = _map_bias_arrays(static, merge_query_vectors, [floats for _, floats in padded_biases])
    floats = (q, k, v, bias_floats)
    out = _attention(static, floats, (mask_integers, bias_integers))
    return out.reshape(*qkv[0].shape[:3], -1)


def _block_size(queries: int, keys: int) -> int:
    """The number of queries of a block that is one tile.

    It is the largest multiple of LANES that divides ``queries`` and is within ``MAX_BLOCK`` and
    ``MAX_BIAS_BLOCK_ENTRIES``.
    """
    sizes = range(LANES, min(queries, MAX_BLOCK) + 1, LANES)
    return max(size for size in sizes if queries % size == 0 and size * (size + keys) <= MAX_BIAS_BLOCK_ENTRIES)


def _is_query_indexed(bias_fn: BiasFn, name: str) -> bool:
    """Whether the grid splits an array of a bias into blocks of queries: it has one row per query and is not dense.

    The grid does not split a dense array: with a dense bias, each block has all queries (:func:`_takes_dense_biases`).
    """
    if isinstance(bias_fn, Dense):
        return False
    required = bias_fn.required_slices(Tile(0, LANES, 0, LANES)).get(name)
    return required is not None and required[2] == 0


# ------------------------------------------------------------------------------------------------ the kernels


class _HeadTile(NamedTuple):
    """A tile of one head: some queries of the block, and the keys with which they are multiplied.

    Attributes:
        head: index of the query head in the block.
        rows: the slice of the block's queries that the tile has.
        q, k, v: the indices of the tile in the block's arrays of queries, keys and values. Each index is a pair: a
            slice of tokens and a slice of lanes.
        score_tile: the position and the size of the tile in the scores [T, S] of the head.
    """

    head: int
    rows: slice
    q: tuple[slice, slice]
    k: tuple[slice, slice]
    v: tuple[slice, slice]
    score_tile: VmemTile


def _tiles(layout: _Layout) -> Iterator[_HeadTile]:
    """The tiles of a block: all heads for the first ``tile_queries`` queries, then all heads for the next queries."""
    for row in range(0, layout.block_queries, layout.tile_queries):
        # A block with causal tiles has all queries, so the index of the first query of a tile is static.
        first = row if layout.has_causal_tiles else pl.program_id(3) * layout.block_queries + row
        keys = min(row + layout.tile_queries, layout.block_keys) if layout.has_causal_tiles else layout.block_keys
        rows, columns = slice(row, row + layout.tile_queries), slice(0, keys)
        score_tile = VmemTile(first, layout.tile_queries, 0, keys)
        for head in range(layout.key_heads * layout.group_size):
            q = _lanes(head, layout.widths[0])
            k, v = (_lanes(head // layout.group_size, width) for width in layout.widths)
            yield _HeadTile(head, rows, (rows, q), (columns, k), (columns, v), score_tile)


def _lanes(head: int, width: int) -> slice:
    """The entries of a head in the last axis of an array [..., heads * width]."""
    return slice(head * width, (head + 1) * width)


def _bias_index(bias_fn: BiasFn, name: str, x: Any, tile: _HeadTile) -> tuple[Any, ...]:
    """The index of the part of a bias's array that a tile needs (``required_slices``).

    The array ``x`` of a block is [heads, X, Y]. If it has the layout of the queries, it is [queries, heads * K].

    The grid already splits query-indexed arrays into blocks. Other slices are lane-aligned, because all block sizes and
    padded lengths are multiples of LANES.
    """
    if isinstance(bias_fn, Dense):
        return tile.head, tile.rows, tile.k[0]
    required = bias_fn.required_slices(tile.score_tile).get(name)
    if required is None:
        return (tile.head,)
    start, size, axis = required
    if axis == 0:
        return (tile.head, tile.rows) if len(x.shape) == 3 else tile.q
    return tile.head, slice(None), pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)


def _load(static: _StaticArguments, tile: _HeadTile, refs: Any) -> tuple[Any, Any, Any]:
    """The arrays of a tile: (q, k, v); the slices of the biases' arrays; the integers of the mask and the biases."""
    (q, k, v), bias_floats, integers = refs
    bias_arrays = _map_bias_arrays(static, lambda bias_fn, name, x: x[_bias_index(bias_fn, name, x, tile)], bias_floats)

    def load_integers(x: Any) -> jax.Array:
        return x[tile.rows] if x.shape[1] == 1 else x[:, tile.k[0]]

    qkv = (
        _load_rows(q, tile.q, tile.score_tile.row, static.queries),
        _load_rows(k, tile.k, 0, static.keys),
        _load_rows(v, tile.v, 0, static.keys),
    )
    return qkv, bias_arrays, jax.tree.map(load_integers, integers)


def _load_rows(x: Any, index: tuple[slice, slice], first: Any, count: int) -> jax.Array:
    """The part of a block's array with the given index, with zeros instead of the padding.

    In HBM, the queries, keys and values have no padding. So the rows of a block after the end of an array may have any
    value, also NaN.

    Args:
        first: the index of the first row of the result among all rows.
        count: the number of rows without padding.
    """
    rows = x[index]
    if count % LANES == 0:
        return rows
    return jnp.where(first + lax.broadcasted_iota(jnp.int32, rows.shape, 0) < count, rows, 0)


def _weights(
    static: _StaticArguments, qkv: Any, bias_arrays: Any, integers: Any, tile: Tile
) -> tuple[jax.Array, jax.Array]:
    """``exp(scores - maximum of the row)`` of a tile, [R, keys of the tile], and the inverse of the row sums, [R, 1].

    The inverse is 0 for a query that may not attend to any key.
    """
    visible = tile_scores.visible_keys(static, integers[0], tile)
    scores = tile_scores.scores(static, qkv[0], qkv[1], bias_arrays, integers[1], tile, visible)
    if static.keys < tile.columns:
        scores = jnp.where(tile.indices()[1] < static.keys, scores, -jnp.inf)
    max_R1 = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(max_R1), max_R1, 0.0))
    denominator_R1 = jnp.sum(weights, axis=1, keepdims=True)
    return weights, jnp.where(denominator_R1 > 0.0, 1.0 / denominator_R1, 0.0)


def _forward_kernel(static: _StaticArguments, layout: _Layout, refs: Any, out: Any) -> None:
    for tile in _tiles(layout):
        qkv, bias_arrays, integers = _load(static, tile, refs)
        weights, inv_denominator_R1 = _weights(static, qkv, bias_arrays, integers, tile.score_tile)
        weighted_sum_RV = dot(weights.astype(qkv[2].dtype), qkv[2], (1, 0))
        out[tile.rows, _lanes(tile.head, layout.widths[1])] = (weighted_sum_RV * inv_denominator_R1).astype(out.dtype)


def _backward_kernel(
    static: _StaticArguments, layout: _Layout, shared: Any, refs: Any, dout: Any, dqkv: Any, dbias: Any, *sums: Any
) -> None:
    """Write the gradients of a block.

    Args:
        shared: for each array of the biases, whether all rows of the batch share it.
        sums: scratch arrays [heads * width, keys] in which dk and dv are summed over the queries and over the query
            heads of each key head.
    """
    _, batch_row, head_block, query_block = map(pl.program_id, range(4))
    _, _, num_head_blocks, num_query_blocks = map(pl.num_programs, range(4))

    def clear(total: Any, is_first_step: Any) -> None:
        @pl.when(is_first_step)
        def initialize() -> None:
            total[...] = jnp.zeros(total.shape, total.dtype)

    for total in sums:
        clear(total, (head_block == 0) & (query_block == 0))
    for i, bias_fn in enumerate(static.bias_fns):
        for name, out in dbias[i].items():
            if not _is_query_indexed(bias_fn, name):
                clear(out, (batch_row == 0) & (query_block == 0) if shared[i][name] else query_block == 0)

    for tile in _tiles(layout):
        (q, k, v), bias_arrays, integers = _load(static, tile, refs)
        weights, inv_denominator_R1 = _weights(static, (q, k, v), bias_arrays, integers, tile.score_tile)
        index = tile.rows, _lanes(tile.head, layout.widths[1])
        probabilities = weights * inv_denominator_R1
        dout_RV = _load_rows(dout, index, tile.score_tile.row, static.queries)
        dprobabilities = dot(dout_RV, v, (1, 1))
        row_sum_R1 = jnp.sum(probabilities * dprobabilities, axis=1, keepdims=True)
        dscores = probabilities * (dprobabilities - row_sum_R1)
        dq_RK, *dkv = tile_scores.qkv_gradients(static, q, k, v, dout_RV, probabilities, dscores)
        dqkv[0][tile.q] = dq_RK.astype(dqkv[0].dtype)
        for total, new, (columns, lanes) in zip(sums, dkv, (tile.k, tile.v), strict=True):
            total[lanes, columns] += new
        for i, bias_fn in enumerate(static.bias_fns):
            gradients = tile_scores.bias_gradients(bias_fn, bias_arrays[i], integers[1][i], tile.score_tile, dscores)
            for name, new in gradients.items():
                out = dbias[i][name]
                index = _bias_index(bias_fn, name, out, tile)
                total = new if _is_query_indexed(bias_fn, name) else out[index] + new
                out[index] = total.astype(out.dtype)

    @pl.when((head_block == num_head_blocks - 1) & (query_block == num_query_blocks - 1))
    def write_dkv() -> None:
        for out, total in zip(dqkv[1:], sums, strict=True):
            out[...] = total[...].T.astype(out.dtype)


# ------------------------------------------------------------------------------------------- calls of the kernels


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How arrays are split into blocks.

    The grid has four axes: blocks of key heads; rows of the batch; blocks of the query heads that read one block of key
    heads; blocks of queries.

    Attributes:
        block_queries: queries of a block.
        tile_queries: queries of a tile.
        block_keys: keys of a block: all, with padding.
        has_causal_tiles: whether a tile has only the keys up to its last query. Then a block has all queries.
        key_heads: key heads of a block.
        group_size: query heads of a block for each of its key heads.
        widths: K and V.
        grid: number of grid steps on each of the four axes.
        in_specs: block specs of q, k and v; of the biases' arrays; of the integers.
        out_spec: block spec of the output.
    """

    block_queries: int
    tile_queries: int
    block_keys: int
    has_causal_tiles: bool
    key_heads: int
    group_size: int
    widths: tuple[int, int]
    grid: tuple[int, int, int, int]
    in_specs: Any
    out_spec: Any


def _heads_of_block(heads: tuple[int, int], widths: tuple[int, int]) -> tuple[int, int]:
    """The numbers of key heads of a block, and of query heads for each of its key heads.

    The number n of key heads is the smallest divisor of G for which n * K and n * V are multiples of LANES, or G if
    there is no such divisor. If n is 1, the number of query heads is the divisor of H / G that is found in the same
    way. Otherwise, a block has all query heads of its key heads.

    Args:
        heads: H and G.
        widths: K and V.
    """
    H, G = heads

    def fewest_aligned_heads(count: int) -> int:
        sizes = (n for n in range(1, count + 1) if count % n == 0)
        return next((n for n in sizes if all(n * width % LANES == 0 for width in widths)), count)

    key_heads, group_size = fewest_aligned_heads(G), H // G
    return key_heads, fewest_aligned_heads(group_size) if key_heads == 1 else group_size


def _heads_of_device_block(qkv: Any) -> tuple[int, int]:
    """The result of :func:`_heads_of_block` for the heads of one device of the active mesh."""
    q_BTHK, k_BSGK, v_BSGK = qkv
    H, G, shards = q_BTHK.shape[2], k_BSGK.shape[2], sharding.num_shards(("heads",))
    G = H if G % shards else G  # ``split.shard_attention`` repeats key heads that the devices cannot split evenly
    # ``max`` avoids a division by zero if there are fewer heads than shards. ``shard_attention`` then raises an error.
    return _heads_of_block((max(H // shards, 1), max(G // shards, 1)), (q_BTHK.shape[3], v_BSGK.shape[3]))


def _block_bytes(qkv: Any, mask: Mask) -> int:
    """The bytes of VMEM for the arrays of a block in the backward kernel, without biases and scores.

    Each array that is copied from or to HBM has two buffers: one is copied while the kernel uses the other.
    """
    q_BTHK, k_BSGK, v_BSGK = qkv
    K, V = q_BTHK.shape[3], v_BSGK.shape[3]
    key_heads, group_size = _heads_of_device_block(qkv)
    T, S = _padded(q_BTHK.shape[1]), _padded(k_BSGK.shape[1])
    block_queries = T if _has_causal_tiles(mask.causal, mask.query_order, T, S) else _block_size(T, S)
    query_entries = block_queries * key_heads * group_size * (2 * K + V)  # q, dq and dout
    key_entries = S * key_heads * (K + V)  # k and v; dk and dv have the same size
    # The last term is for the float32 sums of dk and dv. Each sum has one buffer.
    return 2 * q_BTHK.dtype.itemsize * (query_entries + 2 * key_entries) + 4 * key_entries


def _padded(count: int) -> int:
    """``count`` rounded up to a multiple of LANES."""
    return count + -count % LANES


def _has_causal_tiles(causal: bool, query_order: Any, T: int, S: int) -> bool:
    """Whether a block has all queries and is split into causal tiles. T and S include the padding."""
    return causal and query_order is None and T == S <= MAX_CAUSAL_BLOCK


def _layout(static: _StaticArguments, floats: Any, integers: Any) -> _Layout:
    B, _, q_width = floats[0].shape
    T, S = _padded(static.queries), _padded(static.keys)
    H, G = static.heads
    K, V = q_width // H, floats[2].shape[2] // G
    has_causal_tiles = _has_causal_tiles(static.causal, integers[0][0], T, S)
    R = lazy_pallas.largest_divisor(T, LANES, static.causal_tile) if has_causal_tiles else _block_size(T, S)
    block_queries = T if has_causal_tiles else R
    key_heads, group_size = _heads_of_block((H, G), (K, V))
    num_head_blocks = H // G // group_size  # blocks of the query heads that read one block of key heads

    def query_block(width: int) -> Any:
        size = key_heads * group_size * width
        return pl.BlockSpec((None, block_queries, size), lambda g, b, h, t: (b, t, g * num_head_blocks + h))

    def key_block(width: int) -> Any:
        return pl.BlockSpec((None, S, key_heads * width), lambda g, b, h, t: (b, 0, g))

    def bias_block(bias_fn: BiasFn, name: str, x: jax.Array) -> Any:
        heads = key_heads * group_size
        if _is_query_indexed(bias_fn, name):
            if x.ndim == 3:
                return query_block(K)
            shape = None, heads, block_queries, x.shape[3]
            return pl.BlockSpec(shape, lambda g, b, h, t: (b, g * num_head_blocks + h, t, 0))
        shared = x.shape[0] == 1
        return pl.BlockSpec(
            (None, heads, *x.shape[2:]), lambda g, b, h, t: (0 if shared else b, g * num_head_blocks + h, 0, 0)
        )

    def integer_block(x: jax.Array) -> Any:
        shared, column = x.shape[0] == 1, x.shape[2] == 1
        shape = (None, block_queries, 1) if column else (None, 1, S)
        return pl.BlockSpec(shape, lambda g, b, h, t: (0 if shared else b, t if column else 0, 0))

    bias_blocks = _map_bias_arrays(static, bias_block, floats[3])
    qkv_blocks = query_block(K), key_block(K), key_block(V)
    in_specs = qkv_blocks, bias_blocks, jax.tree.map(integer_block, integers)
    grid = G // key_heads, B, num_head_blocks, T // block_queries
    return _Layout(block_queries, R, S, has_causal_tiles, key_heads, group_size, (K, V), grid, in_specs, query_block(V))


def _map_bias_arrays(
    static: _StaticArguments, function: Callable[[BiasFn, str, jax.Array], Any], bias_floats: Any
) -> tuple[dict[str, Any], ...]:
    """The results of ``function(bias_fn, array name, array)`` for each array of each bias."""
    return tuple(
        {name: function(bias_fn, name, x) for name, x in arrays.items()}
        for bias_fn, arrays in zip(static.bias_fns, bias_floats, strict=True)
    )


def _pallas_call(layout: _Layout, kernel: Callable[..., None], name: str, **arguments: Any) -> Any:
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
    )
    return pl.pallas_call(
        kernel, grid=layout.grid, interpret=lazy_pallas.INTERPRET, name=name, compiler_params=params, **arguments
    )


def _forward(static: _StaticArguments, floats: Any, integers: Any) -> tuple[jax.Array, Any]:
    """The output [B, T, H * V] of attention, and the arrays for the backward pass.

    Args:
        floats: q [B, T, H * K], k [B, S, G * K], v [B, S, G * V], and for each bias its arrays [1 or B, H, X, Y]
            or [B, T, H * K].
    """
    layout = _layout(static, floats, integers)
    q, k, v, bias_floats = floats
    run = _pallas_call(
        layout, functools.partial(_forward_kernel, static, layout), "attention_forward",
        in_specs=(layout.in_specs,), out_specs=layout.out_spec,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:2], static.heads[0] * layout.widths[1]), v.dtype),
    )  # fmt: skip
    out = run(((q, k, v), bias_floats, integers))
    return checkpoint_name(out, tile_scores.CHECKPOINT_NAME), (floats, integers)


def _backward(static: _StaticArguments, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    floats, integers = saved
    layout = _layout(static, floats, integers)
    *qkv, bias_floats = floats

    def bias_gradient(bias_fn: BiasFn, name: str, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if _is_query_indexed(bias_fn, name) else jnp.float32)

    shared = jax.tree.map(lambda x: x.shape[0] == 1, bias_floats)
    qkv_blocks, bias_blocks, _ = layout.in_specs
    run = _pallas_call(
        layout, functools.partial(_backward_kernel, static, layout, shared), "attention_backward",
        in_specs=(layout.in_specs, layout.out_spec), out_specs=(qkv_blocks, bias_blocks),
        out_shape=(
            tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv),
            _map_bias_arrays(static, bias_gradient, bias_floats),
        ),
        scratch_shapes=[
            pltpu.VMEM((layout.key_heads * width, layout.block_keys), jnp.float32) for width in layout.widths
        ],
    )  # fmt: skip
    dqkv, dbias = run((tuple(qkv), bias_floats, integers), dout)
    dbias = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), dbias, bias_floats)
    return (*dqkv, dbias), None


_attention = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0,))

"""Pallas kernels for attention on TPU, with biases and ``Mask.query_order``; each block has whole rows of scores.

A block of queries is multiplied with all keys at once. Its scores, with biases, stay in VMEM until they are multiplied
with the values. Without the kernel, XLA writes each tile of the scores to HBM. It does so several times if a relative
bias shifts each row of the scores by a different amount (``jaxlm.nn.attention.pallas_tile``).

The backward pass recomputes the scores. A block has whole rows, so the backward pass also computes the sums over rows,
and reads no log-sum-exps and no row sums from HBM. Scores that a causal mask hides are computed as well.

Shapes as in ``jaxlm.nn.attention.api``, with V width of values, R queries of a block, X and Y the last axes of a bias's
array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.attention import split, tile_scores
from jaxlm.nn.attention.bias import AttentionBias, BiasFn, Dense, KernelBiasFn, Tile
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.attention.pallas_tile import VmemTile
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot

MAX_BLOCK = 512
"""Maximum number of queries of a block."""
MAX_BIAS_BLOCK_ENTRIES = 512 * 1536
"""Maximum number of entries of an array [R, R + S] from which the bias of a block is made. Several arrays of this size
must fit into VMEM."""
MAX_KEYS = 4096
"""Maximum number of keys. Keys and values of a head must fit into VMEM beside the arrays of a block."""
VMEM_LIMIT_BYTES = 32 * 2**20
"""Bytes of VMEM that a kernel may use."""


def unsupported_reason(keys: int, biases: tuple[AttentionBias, ...], dropout_key: Any) -> str | None:
    """Why the kernel does not support the arguments, as a part of an error message; None if it supports them."""
    if dropout_key is not None:
        return "has no dropout: set the rate to 0"
    for bias in biases:
        if isinstance(bias.bias_fn, Dense):
            return "takes no dense bias"
        if not isinstance(bias.bias_fn, KernelBiasFn):
            name = type(bias.bias_fn).__name__.strip("_")
            return f"does not support the bias {name}: TPU kernels need a KernelBiasFn (jaxlm.nn.attention.bias)"
    if sharding.device_kind().startswith(lazy_pallas.OLD_TPUS):
        return "needs a TPU v5 or newer: older TPUs cannot rotate each row by a different amount"
    if keys > MAX_KEYS:
        return f"supports at most {MAX_KEYS} keys, got {keys}"
    return split.unsupported_reason()


@dataclasses.dataclass(frozen=True)
class _StaticArguments(tile_scores.ScoreConfig):
    """The static (trace-time) arguments of the kernels. ``keys``: number of real keys; keys after them are padding."""

    keys: int


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
    B, _, H, _ = q_BTHK.shape
    grouped = k_BSGK.shape[2] != H

    def broadcast(bias_fn: BiasFn, name: str, x: jax.Array) -> jax.Array:
        """``x`` broadcast to all heads and, if necessary, to all rows of the batch.

        Each block has one head, so every array is broadcast to all heads. The kernel can sum a gradient only over
        consecutive grid steps. Between the same block of queries of two batch rows, the grid computes other blocks. So
        query-indexed arrays are broadcast to all rows. With grouped query heads, the grid computes all query heads of a
        group before the next row. Then, for one head, the grid steps of different rows of the batch are not
        consecutive, so all arrays are broadcast to all rows.
        """
        rows = B if grouped or _is_query_indexed(bias_fn, name) else x.shape[0]
        return jnp.broadcast_to(x, (rows, H, *x.shape[2:]))

    bias_fns = tuple(bias.bias_fn for bias in biases)
    integers = jax.tree.map(jnp.asarray, (mask.arrays, tuple(bias.integers for bias in biases)))
    static = _StaticArguments(mask.causal, mask.window, scale, bias_fns, keys=k_BSGK.shape[1])
    floats = _map_bias_arrays(static, broadcast, tuple(bias.floats for bias in biases))
    return split.shard_attention(
        functools.partial(_device_attention, static), (q_BTHK, k_BSGK, v_BSGK), floats, integers
    )


def _device_attention(static: _StaticArguments, qkv: Any, bias_floats: Any, integers: Any) -> jax.Array:
    """Attention for the rows and heads of one device, [B, T, H, V]."""
    T = qkv[0].shape[1]
    query_padding, key_padding = -T % LANES, -static.keys % LANES

    def heads_first(x_BTHK: jax.Array, padding: int) -> jax.Array:
        # The checkpoint name marks the transposed arrays. If remat saves them, it recomputes neither the projection nor
        # the transpose.
        x_BTHK = jnp.pad(x_BTHK, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return checkpoint_name(jnp.swapaxes(x_BTHK, 1, 2), tile_scores.CHECKPOINT_NAME)

    def column(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT, ((0, 0), (0, query_padding)))[:, :, None]

    def row(x_BS: jax.Array) -> jax.Array:
        return jnp.pad(x_BS, ((0, 0), (0, key_padding)))[:, None, :]

    q, k, v = map(heads_first, qkv, (query_padding, key_padding, key_padding))
    padded_biases = [
        cast(KernelBiasFn, bias_fn).padded(floats, query_padding, key_padding)
        for bias_fn, floats in zip(static.bias_fns, bias_floats, strict=True)
    ]
    static = dataclasses.replace(static, bias_fns=tuple(bias_fn for bias_fn, _ in padded_biases))
    mask_integers, bias_integers = integers
    mask_integers = tuple(
        None if x is None else layout(x) for x, layout in zip(mask_integers, (column, row, column, row), strict=True)
    )
    layouts = {"query": column, "key": row}
    bias_integers = tuple(arrays and {name: layouts[name](x) for name, x in arrays.items()} for arrays in bias_integers)
    floats = (q, k, v, tuple(floats for _, floats in padded_biases))
    out_BHTV = _attention(static, floats, (mask_integers, bias_integers))
    return jnp.swapaxes(out_BHTV, 1, 2)[:, :T]


def _block_size(queries: int, keys: int) -> int:
    """The number of queries of a block: the largest multiple of LANES that divides ``queries`` and fits into VMEM."""
    sizes = range(LANES, min(queries, MAX_BLOCK) + 1, LANES)
    return max(size for size in sizes if queries % size == 0 and size * (size + keys) <= MAX_BIAS_BLOCK_ENTRIES)


def _is_query_indexed(bias_fn: BiasFn, name: str) -> bool:
    """Whether an array of a bias has one row per query."""
    required = bias_fn.required_slices(Tile(0, LANES, 0, LANES)).get(name)
    return required is not None and required[2] == 0


# ------------------------------------------------------------------------------------------------ the kernels


def _slice_indices(bias_fn: BiasFn, tile: Tile) -> dict[str, Any]:
    """``{name: index}`` of the slices that a tile needs (``required_slices``), except for query-indexed arrays.

    The grid already splits query-indexed arrays into blocks. The slices are lane-aligned, because all block sizes and
    padded lengths are multiples of LANES.
    """
    return {
        name: (slice(None), pl.ds(pl.multiple_of(start, LANES), size))
        for name, (start, size, axis) in bias_fn.required_slices(tile).items()
        if axis != 0
    }


def _load(static: _StaticArguments, R: int, refs: Any) -> tuple[Any, Any, Any, VmemTile]:
    """The arrays of a block: (q, k, v); the sliced arrays of the biases; the integers of mask and biases; the tile."""
    qkv, bias_floats, integers = refs
    tile = VmemTile(pl.program_id(3) * R, R, 0, qkv[1].shape[0])
    bias_arrays = _map_bias_arrays(
        static, lambda bias_fn, name, x: x[_slice_indices(bias_fn, tile).get(name, ...)], bias_floats
    )
    read = functools.partial(jax.tree.map, lambda x: x[...])
    return read(qkv), bias_arrays, read(integers), tile


def _weights(
    static: _StaticArguments, qkv: Any, bias_arrays: Any, integers: Any, tile: Tile
) -> tuple[jax.Array, jax.Array]:
    """``exp(scores - maximum of the row)`` of a block, [R, S], and the inverse of the row sums [R, 1].

    The inverse is 0 for a query that may not attend to any key.
    """
    visible = tile_scores.visible_keys(static, integers[0], tile)
    scores = tile_scores.scores(static, qkv[0], qkv[1], bias_arrays, integers[1], tile, visible)
    if static.keys < tile.columns:
        scores = jnp.where(tile.indices()[1] < static.keys, scores, -jnp.inf)
    top_R1 = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top_R1), top_R1, 0.0))
    total_R1 = jnp.sum(weights, axis=1, keepdims=True)
    return weights, jnp.where(total_R1 > 0.0, 1.0 / total_R1, 0.0)


def _forward_kernel(static: _StaticArguments, R: int, refs: Any, out: Any) -> None:
    qkv, bias_arrays, integers, tile = _load(static, R, refs)
    weights, inv_denominator_R1 = _weights(static, qkv, bias_arrays, integers, tile)
    mixed_RV = dot(weights.astype(qkv[2].dtype), qkv[2], (1, 0))
    out[...] = (mixed_RV * inv_denominator_R1).astype(out.dtype)


def _backward_kernel(
    static: _StaticArguments, R: int, shared: Any, refs: Any, dout: Any, dqkv: Any, dbias: Any, *sums: Any
) -> None:
    """Write the gradients of a block.

    Args:
        shared: for each array of the biases, whether all rows of the batch share it.
        sums: scratch memory for the sums of dk and dv, with keys last.
    """
    qkv, bias_arrays, integers, tile = _load(static, R, refs)
    weights, inv_denominator_R1 = _weights(static, qkv, bias_arrays, integers, tile)
    probabilities, dout_RV = weights * inv_denominator_R1, dout[...]
    dprobabilities = dot(dout_RV, qkv[2], (1, 1))
    row_sum_R1 = jnp.sum(probabilities * dprobabilities, axis=1, keepdims=True)
    dscores = probabilities * (dprobabilities - row_sum_R1)

    _, row, head, block = map(pl.program_id, range(4))
    _, _, heads, blocks = map(pl.num_programs, range(4))

    def add(total: Any, new: jax.Array, index: Any, first: Any) -> None:
        @pl.when(first)
        def initialize() -> None:
            total[...] = jnp.zeros(total.shape, total.dtype)

        total[index] += new.astype(total.dtype)

    q, k, v = qkv
    dq_RK, *dkv = tile_scores.qkv_gradients(static, q, k, v, dout_RV, probabilities, dscores)
    dqkv[0][...] = dq_RK.astype(dqkv[0].dtype)
    for total, new in zip(sums, dkv, strict=True):
        add(total, new, ..., (head == 0) & (block == 0))

    @pl.when((head == heads - 1) & (block == blocks - 1))
    def write_dkv() -> None:
        for out, total in zip(dqkv[1:], sums, strict=True):
            out[...] = total[...].astype(out.dtype)

    for i, bias_fn in enumerate(static.bias_fns):
        for name, new in tile_scores.bias_gradients(bias_fn, bias_arrays[i], integers[1][i], tile, dscores).items():
            out = dbias[i][name]
            if _is_query_indexed(bias_fn, name):
                out[...] = new.astype(out.dtype)
            else:
                first = (row == 0) & (block == 0) if shared[i][name] else block == 0
                add(out, new, _slice_indices(bias_fn, tile).get(name, ...), first)


# ------------------------------------------------------------------------------------------- calls of the kernels


class _Layout(NamedTuple):
    """How arrays are split into blocks. The grid is (key heads, rows of the batch, query heads of a key head, blocks of
    queries)."""

    R: int
    grid: tuple[int, int, int, int]
    inputs: Any
    """Block specs of q, k and v; of the biases' arrays; of the integers."""
    out: Any
    """Block spec of the output."""


def _layout(static: _StaticArguments, floats: Any, integers: Any) -> _Layout:
    (B, H, T, K), (G, S, V) = floats[0].shape, floats[2].shape[1:]
    R = _block_size(T, S)

    group = H // G

    def query_block(width: int) -> Any:
        return pl.BlockSpec((None, None, R, width), lambda g, b, h, t: (b, g * group + h, t, 0))

    def key_block(width: int) -> Any:
        return pl.BlockSpec((None, None, S, width), lambda g, b, h, t: (b, g, 0, 0))

    def bias_block(bias_fn: BiasFn, name: str, x: jax.Array) -> Any:
        if _is_query_indexed(bias_fn, name):
            return query_block(x.shape[3])
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda g, b, h, t: (0 if shared else b, g * group + h, 0, 0))

    def integer_block(x: jax.Array) -> Any:
        shared, column = x.shape[0] == 1, x.shape[2] == 1
        shape = (None, R, 1) if column else (None, 1, S)
        return pl.BlockSpec(shape, lambda g, b, h, t: (0 if shared else b, t if column else 0, 0))

    bias_blocks = _map_bias_arrays(static, bias_block, floats[3])
    qkv_blocks = query_block(K), key_block(K), key_block(V)
    inputs = qkv_blocks, bias_blocks, jax.tree.map(integer_block, integers)
    return _Layout(R, (G, B, group, T // R), inputs, query_block(V))


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
    """The output [B, H, T, V] of attention, and the arrays for the backward pass.

    Args:
        floats: q [B, H, T, K], k [B, G, S, K], v [B, G, S, V], and for each bias its arrays [1 or B, H, X, Y].
    """
    layout = _layout(static, floats, integers)
    q, k, v, bias_floats = floats
    run = _pallas_call(
        layout, functools.partial(_forward_kernel, static, layout.R), "attention_forward",
        in_specs=(layout.inputs,), out_specs=layout.out,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype),
    )  # fmt: skip
    out_BHTV = run(((q, k, v), bias_floats, integers))
    return checkpoint_name(out_BHTV, tile_scores.CHECKPOINT_NAME), (floats, integers)


def _backward(static: _StaticArguments, saved: Any, dout_BHTV: jax.Array) -> tuple[Any, ...]:
    floats, integers = saved
    layout = _layout(static, floats, integers)
    q, *kv, bias_floats = floats
    S, widths = kv[0].shape[2], [x.shape[3] for x in kv]

    def bias_gradient(bias_fn: BiasFn, name: str, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if _is_query_indexed(bias_fn, name) else jnp.float32)

    def keys_last(x_BGSK: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x_BGSK.shape[:2], x_BGSK.shape[3], x_BGSK.shape[2]), x_BGSK.dtype)

    shared = jax.tree.map(lambda x: x.shape[0] == 1, bias_floats)
    dkv_blocks = [pl.BlockSpec((None, None, width, S), lambda g, b, h, t: (b, g, 0, 0)) for width in widths]
    qkv_blocks, bias_blocks, _ = layout.inputs
    run = _pallas_call(
        layout, functools.partial(_backward_kernel, static, layout.R, shared), "attention_backward",
        in_specs=(layout.inputs, layout.out), out_specs=((qkv_blocks[0], *dkv_blocks), bias_blocks),
        out_shape=(
            (jax.ShapeDtypeStruct(q.shape, q.dtype), *map(keys_last, kv)),
            _map_bias_arrays(static, bias_gradient, bias_floats),
        ),
        scratch_shapes=[pltpu.VMEM((width, S), jnp.float32) for width in widths],
    )  # fmt: skip
    (dq, dk, dv), dbias = run(((q, *kv), bias_floats, integers), dout_BHTV)
    dbias = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), dbias, bias_floats)
    return (dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), dbias), None


_attention = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0,))

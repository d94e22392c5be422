"""A Pallas kernel for attention of a few queries over a cache on a TPU. ``jaxlm.nn.attention.decode`` calls it.

XLA computes one layer's attention to a cache with about 15 operations. Even if each operation takes only one or two
microseconds, all together take longer than reading the cache. The kernel is a single operation. A grid step computes a
block of heads and slots of one row, with the running maximum and sum of FlashAttention (Dao et al. 2022, algorithm 1).
Blocks after the last visible slot of a row are not read.

The heads of a slot are beside each other in the cache, so one matmul with the keys [E, C * K] computes the scores of
all heads of a block. The matrix of the queries [P, C * K] has one row per query head, with zeros for the key heads that
this query head does not read.

Shapes as in ``jaxlm.nn.attention.api``; V width of values, R = H / G query heads per key head. In a block: C key heads,
P = C * R query heads, E slots; N blocks of heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.attention.bias import AttentionBias, dense_bias
from jaxlm.nn.attention.cache import CacheView
from jaxlm.nn.attention.mask import Mask, keep, softmax
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot

MAX_BLOCK_SLOTS = 512
"""Maximum number of slots of a block of a cache with several blocks. With smaller blocks, a row with few visible slots
reads fewer masked slots."""
MAX_SLOTS_OF_ONE_BLOCK = 768
"""A cache with at most this many slots is one block. A second block would take longer than reading a few more slots."""
MAX_BLOCK_BYTES = 2**20
"""Maximum number of bytes of the keys of a block, and of its values, if the block has more than LANES slots."""
MAX_BLOCK_WIDTH = 1024
"""Maximum width C * K of the keys of a block, and C * V of its values, if the block has fewer than all heads."""
VMEM_LIMIT_BYTES = 32 * 2**20
"""Bytes of VMEM that the kernel may use."""


@dataclasses.dataclass(frozen=True)
class _Static:
    """The static (trace-time) arguments of the kernel: the factor of the scores, and C, the key heads of a block."""

    scale: float
    block_heads: int


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array | CacheView,
    v_BSGK: jax.Array | CacheView,
    mask: Mask,
    *,
    end_B: jax.Array,
    scale: float,
    biases: Sequence[AttentionBias],
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``.

    If ``v_BSGK`` is ``k_BSGK`` (the same object), the kernel reads the array once.

    Args:
        end_B: [1 or B] int32. No query of a row may attend to slot ``end`` of the row or to a later slot.
    """
    B, T = q_BTHK.shape[:2]
    S, G = k_BSGK.shape[1:3]
    visible = keep(mask, T, S)
    bias = jnp.zeros((1, T, 1, S), jnp.float32)
    if visible is not None:
        bias = jnp.where(visible[:, :, None], bias, -jnp.inf)
    for attention_bias in biases:
        bias = bias + dense_bias(attention_bias, T, S).swapaxes(1, 2)
    arrays = (k_BSGK,) if v_BSGK is k_BSGK else (k_BSGK, v_BSGK)
    views = [x if isinstance(x, CacheView) else CacheView(x.reshape(B, S, -1)) for x in arrays]
    layer = jnp.asarray(0 if views[0].layer is None else views[0].layer, jnp.int32)
    stacks = [view.stack[None] if view.layer is None else view.stack for view in views]
    arguments = q_BTHK, bias, jnp.broadcast_to(end_B, (B,)), layer, *stacks
    active = sharding.active()
    if active is None:
        return _device_attention(scale, G, *arguments)
    axes = [
        ("batch", None, "heads", None),
        tuple(None if size == 1 else name for size, name in zip(bias.shape, ("batch", None, "heads", None))),
        ("batch",), (), *[(None, "batch", None, "heads")] * len(stacks),
    ]  # fmt: skip
    names = "queries", "an attention bias", "the ends of the rows", "the layer", "cached keys", "cached values"
    specs = tuple(
        active.named_sharding(a, x.shape, name).spec
        for a, x, name in zip(axes, arguments, names[: len(arguments)], strict=True)
    )
    run = functools.partial(_device_attention, scale, G // active.num_shards(("heads",)))
    return jax.shard_map(run, mesh=active.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def _device_attention(
    scale: float, G: int, q_BTHK: jax.Array, bias: jax.Array, end_B: jax.Array, layer: Any, *kv: jax.Array
) -> jax.Array:
    """Attention for the rows and heads of one device, [B, T, H, V].

    Args:
        bias: [1 or B, T, 1 or H, S], -inf for slots that a query may not attend to.
        kv: the caches of all layers: keys [L, B, S, G * K], and values [L, B, S, G * V] if they are not the keys.
    """
    B, T, H, K = q_BTHK.shape
    C = _block_heads(G, K, kv[-1].shape[3] // G)
    N, P = G // C, H // G * C
    reads_PC1 = (np.arange(P)[:, None] // (H // G) == np.arange(C))[:, :, None]
    q = jnp.where(reads_PC1, q_BTHK.reshape(B, T, N, P, 1, K), 0).reshape(B, T, N, P, -1)
    bias = bias[:, :, None] if bias.shape[2] == 1 else bias.reshape(*bias.shape[:2], N, P, -1)
    out = _attend(_Static(scale, C), (q, bias, *kv), (end_B, layer[None]))
    return out.reshape(B, T, N, P // C, C, -1).swapaxes(3, 4).reshape(B, T, H, -1)


def _block_heads(G: int, *widths: int) -> int:
    """The number of key heads of a block.

    It is the largest divisor of G for which the total width of these heads is a multiple of LANES and at most
    ``MAX_BLOCK_WIDTH``, for keys and for values. If there is no such divisor, a block has all heads.

    Args:
        widths: K and V.
    """
    sizes = (n for n in range(G, 0, -1) if G % n == 0 and all(n * width % LANES == 0 for width in widths))
    return next((n for n in sizes if n * max(widths) <= MAX_BLOCK_WIDTH), G)


def _reference(static: _Static, floats: Any, layer: jax.Array) -> jax.Array:
    """The result of :func:`_attend`, computed with XLA; its gradient is the gradient of the kernel."""
    q, bias, *kv = floats
    N, P = q.shape[2:4]
    k, v = (x[layer[0]].reshape(*x.shape[1:3], N, -1) for x in (kv[0], kv[-1]))
    scores = jnp.einsum("BTNPK,BSNK->BTNPS", q, k, preferred_element_type=jnp.float32) * static.scale + bias
    probabilities = softmax(jnp.where(bias == -jnp.inf, -jnp.inf, scores), None).astype(v.dtype)
    mixed = jnp.einsum("BTNPS,BSNV->BTNPV", probabilities, v, preferred_element_type=jnp.float32)
    selected_RPV = _selected_entries(P, static.block_heads, v.shape[3])
    return jnp.einsum("BTNPV,RPV->BTNRV", mixed, selected_RPV).astype(v.dtype)


def _selected_entries(P: int, C: int, width: int) -> np.ndarray:
    """Which entries of the weighted values [P, C * V] of a block are in each row of the output: 0 or 1, [R, P, C * V].

    In the columns of key head c, row r of the output has the weighted values of query head c * R + r.
    """
    R = P // C
    row, head, entry = np.ogrid[:R, :P, :width]
    return (head == entry // (width // C) * R + row).astype(np.float32)


def _kernel(
    static: _Static, slots: int, blocks: Any, layer: Any, inputs: Sequence[Any], out: Any, top: Any, total: Any,
    mixed: Any,
) -> None:  # fmt: skip
    """Update the running maximum, sum and weighted values, and write the output after the last block.

    Args:
        slots: S.
        blocks: for each row, the number of blocks of slots that are read.
        layer: not used here; the block specs of the keys and values use it.
        inputs: the queries [T, P, C * K], the bias [T, 1 or P, E], the result of :func:`_selected_entries`, the keys
            [E, C * K], and the values [E, C * V] if they are not the keys.
        out: [T, R, C * V].
        top, total, mixed: [T, P, 1], [T, P, 1] and [T, P, C * V] float32, kept from block to block.
    """
    del layer
    q, bias, selected, k, v = (*inputs, inputs[-1])[:5]  # without values, the keys are the values
    row, block = pl.program_id(0), pl.program_id(2)
    queries, size = q.shape[0], k.shape[0]

    @pl.when(block == 0)
    def initialize() -> None:
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    def clear(x: jax.Array, slot_axis: int, value: float) -> jax.Array:
        """``x`` with ``value`` after the end of the cache. There, a block may have any entries, also NaN."""
        if slots % size == 0:
            return x
        return jnp.where(block * size + jax.lax.broadcasted_iota(jnp.int32, x.shape, slot_axis) < slots, x, value)

    @pl.when(block < blocks[row])
    def update() -> None:
        keys, values = k[...], clear(v[...], 0, 0.0)
        for t in range(queries):
            # The scores of masked slots may be NaN. So they are replaced, like those after the end of the cache.
            scores_PE = jnp.where(bias[t] == -jnp.inf, -jnp.inf, dot(q[t], keys, (1, 1)) * static.scale + bias[t])
            scores_PE = clear(scores_PE, 1, -jnp.inf)
            new_top_P1 = jnp.maximum(top[t], jnp.max(scores_PE, axis=1, keepdims=True))
            finite_top_P1 = jnp.where(jnp.isfinite(new_top_P1), new_top_P1, 0.0)
            weights_PE = jnp.exp(scores_PE - finite_top_P1)
            rescale_P1 = jnp.exp(top[t] - finite_top_P1)
            top[t] = new_top_P1
            total[t] = total[t] * rescale_P1 + jnp.sum(weights_PE, axis=1, keepdims=True)
            mixed[t] = mixed[t] * rescale_P1 + dot(weights_PE.astype(values.dtype), values, (1, 0))

    @pl.when(block == pl.num_programs(2) - 1)
    def write() -> None:
        for t in range(queries):
            means = mixed[t] / jnp.where(total[t] > 0.0, total[t], 1.0)
            for r in range(selected.shape[0]):
                values = jnp.sum(jnp.where(selected[r] > 0.0, means, 0.0), axis=0, keepdims=True)
                out[t, r : r + 1] = values.astype(out.dtype)


def _block_slots(slots: int, bytes_of_slot: int) -> int:
    """The number of slots of a block: a multiple of LANES, or all slots of a small cache.

    The multiple is the largest within ``MAX_BLOCK_SLOTS`` and ``MAX_BLOCK_BYTES``, but at least LANES.
    """
    if slots <= MAX_SLOTS_OF_ONE_BLOCK and slots * bytes_of_slot <= MAX_BLOCK_BYTES:
        return slots
    size = max(min(MAX_BLOCK_SLOTS, MAX_BLOCK_BYTES // bytes_of_slot) // LANES, 1) * LANES
    return min(size, slots)


def _forward(static: _Static, floats: Any, integers: Any) -> tuple[jax.Array, Any]:
    """The weighted values, [B, T, N, R, C * V], and the arrays for the backward pass.

    Args:
        floats: q [B, T, N, P, C * K], the bias [1 or B, T, 1 or N, 1 or P, S], k [L, B, S, G * K], and v [L, B, S,
            G * V] if the values are not the keys.
        integers: the argument ``end_B`` of :func:`attention`, [B], and the index of the layer, [1].
    """
    q, bias, *kv = floats
    end_B, layer = integers
    B, T, N, P, _ = q.shape
    S, width, dtype = kv[0].shape[2], kv[-1].shape[3] // N, kv[-1].dtype
    E = _block_slots(S, max(q.shape[4], width) * dtype.itemsize)
    blocks_B = jnp.maximum(-(-end_B // E), 1)
    selected = _selected_entries(P, static.block_heads, width)
    R = selected.shape[0]

    # Pallas copies a block to VMEM only if the block's index differs from that of the previous grid step. So a block of
    # slots that is not needed gets the index of the last needed block.
    def slot_block(x: jax.Array) -> Any:
        return pl.BlockSpec(
            (None, None, E, x.shape[3] // N),
            lambda b, n, s, blocks, layer: (layer[0], b, jnp.minimum(s, blocks[b] - 1), n),
        )

    def bias_index(b: Any, n: Any, s: Any, blocks: Any, layer: Any) -> Any:
        row, head_block = (0 if size == 1 else i for size, i in ((bias.shape[0], b), (bias.shape[2], n)))
        return row, 0, head_block, 0, jnp.minimum(s, blocks[b] - 1)

    def row_block(*shape: int) -> Any:
        return pl.BlockSpec((None, T, None, *shape), lambda b, n, s, blocks, layer: (b, 0, n, 0, 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(B, N, -(-S // E)),
        in_specs=[(
            row_block(P, q.shape[4]),
            pl.BlockSpec((None, T, None, bias.shape[3], E), bias_index),
            pl.BlockSpec(selected.shape, lambda b, n, s, blocks, layer: (0, 0, 0)),
            *map(slot_block, kv),
        )],
        out_specs=row_block(R, width),
        scratch_shapes=[pltpu.VMEM((T, P, size), jnp.float32) for size in (1, 1, width)],
    )  # fmt: skip
    run = pl.pallas_call(
        functools.partial(_kernel, static, S), grid_spec=grid, interpret=lazy_pallas.INTERPRET, name="decode_attention",
        out_shape=jax.ShapeDtypeStruct((B, T, N, R, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
    )  # fmt: skip
    return run(blocks_B, layer, (q, bias, selected, *kv)), (floats, layer)


def _backward(static: _Static, saved: Any, dout: jax.Array) -> tuple[Any, None]:
    floats, layer = saved
    return jax.vjp(lambda floats: _reference(static, floats, layer), floats)[1](dout)[0], None


_attend = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0,))

"""Splash attention, JAX's Pallas kernel for TPU that skips fully masked blocks.

``jax.experimental.pallas.ops.tpu.splash_attention`` has O(T) memory and a custom gradient. This module uses one kernel
in the forward pass and one in the backward pass. The default blocks of 128 leave a TPU partly idle, so this module uses
blocks of up to ``MAX_BLOCK`` queries and keys. Queries and keys are padded to multiples of ``LANES``. On a mesh, each
device runs the kernel on its own rows and heads (``jaxlm.nn.attention.split``).

Shapes as in ``jaxlm.nn.attention.api``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.attention import split, tile_scores
from jaxlm.nn.attention.mask import Mask, keep

MAX_BLOCK = 1024
"""Maximum number of queries, and of keys, of a block."""
_PADDED_QUERY, _PADDED_KEY = -1, -2  # Segment ids of the padding to LANES. No other token has them.


def unsupported_reason(mask: Mask, biases: Sequence[Any], key: jax.Array | None) -> str | None:
    """Why the kernel does not support the arguments or the mesh, as a part of an error message; None if it does."""
    if biases:
        return "takes no bias"
    if key is not None:
        return "has no dropout"
    if mask.query_order is not None:
        return "takes no query_order and key_order: its causal mask compares indices only"
    return split.unsupported_reason()


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``."""
    if math.frexp(scale)[0] == 0.5:
        q_BTHK = q_BTHK * jnp.asarray(scale, q_BTHK.dtype)  # exact for a power of two; XLA fuses it with the projection
    else:
        q_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    run = functools.partial(_device_attention, mask.causal, mask.window)
    out_BTHK = split.shard_attention(run, (q_BTHK, k_BSGK, v_BSGK), (), (mask.query_segments, mask.key_segments))
    return _zero_fully_masked(mask, out_BTHK, k_BSGK.shape[1]).astype(v_BSGK.dtype)


def _zero_fully_masked(mask: Mask, out_BTHK: jax.Array, keys: int) -> jax.Array:
    """The output, with zeros for queries without a visible key.

    For these queries, the kernel returns a mean of values that they may not attend to.
    """
    if mask.query_segments is None or mask.query_segments is mask.key_segments:
        return out_BTHK  # each query may attend to itself, or to all keys if nothing is masked
    visible = keep(mask, out_BTHK.shape[1], keys)
    assert visible is not None
    return jnp.where(jnp.any(visible, axis=-1)[:, :, None, None], out_BTHK, 0)  # XLA fuses the mask with ``any``


def _device_attention(causal: bool, window: int | None, qkv: Any, _: Any, segments: Any) -> jax.Array:
    """Attention for the rows and heads of one device, [B, T, H, width of v]; the queries are already scaled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    (q, k, v), (q_segments, k_segments) = qkv, segments
    (B, T, H), S = q.shape[:3], k.shape[1]
    padding = [-T % LANES, -S % LANES]
    if padding[1] and q_segments is None and not causal:  # only segments or a causal mask hide padding keys
        q_segments, k_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, size), (0, 0), (0, 0))), 1, 2)
        for x, size in ((q, padding[0]), (k, padding[1]), (v, padding[1]))
    )
    # The transposed arrays get the checkpoint name. If remat saves them, it recomputes neither the projection nor the
    # transpose.
    q, k, v = (checkpoint_name(x, tile_scores.CHECKPOINT_NAME) for x in (q, k, v))
    lengths = T + padding[0], S + padding[1]
    blocks = tuple(lazy_pallas.largest_divisor(length, LANES, MAX_BLOCK) for length in lengths)
    kernel = _kernel(causal, window, *lengths, blocks, H, lazy_pallas.INTERPRET)
    if q_segments is None:
        out = jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    else:
        q_segments, k_segments = (x.astype(jnp.int32) for x in (q_segments, k_segments))  # the padding has negative ids
        q_segments = jnp.pad(q_segments, ((0, 0), (0, padding[0])), constant_values=_PADDED_QUERY)
        k_segments = jnp.pad(k_segments, ((0, 0), (0, padding[1])), constant_values=_PADDED_KEY)
        # The segments may have one row for the whole batch.
        q_segments, k_segments = (jnp.broadcast_to(x, (B, x.shape[1])) for x in (q_segments, k_segments))
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=q_segments, kv=k_segments))
    return jnp.swapaxes(out, 1, 2)[:, :T]


@functools.cache
def _kernel(
    causal: bool, window: int | None, queries: int, keys: int, blocks: tuple[int, ...], heads: int, interpret: bool
) -> Any:
    """The kernel for a mask and a shape. The list of blocks that are not fully masked is computed once, on the host."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (queries, keys)
    mask: masks.Mask
    if window is not None:
        mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    q_block, k_block = blocks
    sizes = splash.BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=k_block,
        block_q_dkv=q_block, block_kv_dkv=k_block, block_kv_dkv_compute=k_block,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret,
            residual_checkpoint_name=tile_scores.CHECKPOINT_NAME,
        )  # fmt: skip
        # NumPy arrays belong to no device, so they can become constants of each program that uses the cached kernel.
        return jax.tree.map(np.asarray, kernel)

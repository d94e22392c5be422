"""A Pallas kernel for the elementwise linear recurrence ``h = decay * h + input`` on TPU.

The kernel reads the decays and the inputs once and writes the states once. The implementation ``chunked`` of
``linear_scan`` reads and writes a chunk in each of its log2(CHUNK) rounds.

A TPU register has 8 rows (time) of 128 channels. The kernel combines the steps of a tile of rows by doubling: after
round s, each row has the product of the decays and the state of the 2^s steps that end at it. One more step then adds
the state before the tile.

Shapes: B batch, T time, D channels, C steps of a block, W channels of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.devices import LANES

MAX_STEPS = 256
"""Maximum number of steps of a block."""
MAX_CHANNELS = 512
"""Maximum number of channels of a block, if the number of channels is a multiple of 128."""
_TILE_ROWS = {4: 8, 2: 16}
"""Rows of a tile by the bytes of an entry."""


def scan(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, reverse: bool, *, interpret: bool = False
) -> jax.Array:
    """The state after each step, [B, T, D] float32.

    Args:
        state_BD: the state before the first step, float32.
        reverse: go from the last step to the first.
        interpret: use Pallas's interpreter, on any device.
    """
    axes = ("batch", None, "mlp")
    scan_shard = functools.partial(_scan, reverse=reverse, interpret=interpret)
    run = sharding.map_shards(scan_shard, [axes, axes, ("batch", "mlp")], axes, sum_over=())
    return run(decay_BTD, input_BTD, state_BD)


def _scan(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, *, reverse: bool, interpret: bool
) -> jax.Array:
    """The result of :func:`scan` on one device."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, T, D = input_BTD.shape
    rows = max(_TILE_ROWS.get(x.dtype.itemsize, 8) for x in (decay_BTD, input_BTD))
    num_padding = -T % rows
    # In the order of the scan, the padding comes after the last step.
    padding = ((0, 0), (num_padding, 0) if reverse else (0, num_padding), (0, 0))
    decay_BTD, input_BTD = (jnp.pad(x, padding) for x in (decay_BTD, input_BTD))
    C = _largest_divisor(T + num_padding, rows, MAX_STEPS)
    W = D if D % LANES else _largest_divisor(D, LANES, MAX_CHANNELS)
    count = (T + num_padding) // C
    block = pl.BlockSpec((None, C, W), lambda b, d, t: (b, count - 1 - t if reverse else t, d))
    hidden_BTD = pl.pallas_call(
        functools.partial(_kernel, rows, reverse), name="linear_scan", grid=(B, D // W, count), interpret=interpret,
        in_specs=[block, block, pl.BlockSpec((None, 1, W), lambda b, d, t: (b, 0, d))], out_specs=block,
        out_shape=jax.ShapeDtypeStruct(input_BTD.shape, jnp.float32), scratch_shapes=[pltpu.VMEM((1, W), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(decay_BTD, input_BTD, state_BD[:, None])  # fmt: skip
    return hidden_BTD[:, num_padding:] if reverse else hidden_BTD[:, :T]


def _kernel(rows: int, reverse: bool, decay: Any, new: Any, first: Any, hidden: Any, carry: Any) -> None:
    """Run the steps of a block, one tile of rows after the other. ``carry``: the state after the previous tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    @pl.when(pl.program_id(2) == 0)
    def initialize() -> None:
        carry[...] = first[...]

    C, W = decay.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, W), 0)
    state = carry[...]
    starts = range(0, C, rows)
    for start in reversed(starts) if reverse else starts:
        a, h = (x[start : start + rows].astype(jnp.float32) for x in (decay, new))
        shift = 1
        while shift < rows:
            has_earlier = row < rows - shift if reverse else row >= shift
            # pltpu.roll moves entries to higher rows.
            roll = functools.partial(pltpu.roll, shift=rows - shift if reverse else shift, axis=0)
            h = jnp.where(has_earlier, a * roll(h) + h, h)
            a = jnp.where(has_earlier, a * roll(a), a)
            shift *= 2
        h = a * state + h
        hidden[start : start + rows] = h
        state = h[:1] if reverse else h[rows - 1 :]
    carry[...] = state


def _largest_divisor(size: int, multiple: int, maximum: int) -> int:
    """The largest divisor of ``size`` that is a multiple of ``multiple`` and at most ``maximum``."""
    return max(x for x in range(multiple, min(size, maximum) + 1, multiple) if size % x == 0)

"""Pallas kernels for TPUs: the elementwise linear recurrence ``h = decay * h + input``, and its gradient.

The kernels read and write each array once. The implementation ``chunked`` of ``linear_scan`` (``lax.associative_scan``)
also writes the intermediate results of each chunk to memory and reads them again.

The backward pass is also a recurrence, in the opposite order. Let dhidden[t] be the gradient of the output h[t], and
e[t] the gradient that step t passes back to h[t - 1]. Then ``e[t] = decay[t] * (e[t + 1] + dhidden[t])``.

A row of a TPU register has 128 channels of one step. A tile has 8 rows (one register), or 16 rows for bfloat16. Within
a tile, the kernel runs a parallel scan by doubling. After round s, each row has the product of the decays of the 2^s
steps that end at this row (fewer at the start of the tile). It also has the state that these steps give from a zero
state. After the last round, the kernel multiplies each product by the state before the tile and adds the result to the
state of its row.

Shapes: B batch, T time, D channels, C steps of a block, W channels of a block, N blocks of steps, P steps of padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn.lazy_pallas import call_with_carry, largest_divisor, pl, pltpu, shapes

MAX_STEPS = 256
"""Maximum number of steps of a block."""
MAX_CHANNELS = 512
"""Maximum number of channels of a block if D is a multiple of 128. For other D, a block has all channels."""
MAX_ENTRIES = 256 * 512
"""Maximum number of entries of a block. A block of a single tile may have more. A kernel has up to ten blocks in VMEM:
five arrays with two buffers each."""
_TILE_ROWS = {4: 8, 2: 16}
"""Number of rows of a tile, by the number of bytes of an entry."""
_AXES = ("batch", None, "mlp")
_STATE_AXES = ("batch", "mlp")


def unsupported_reason(decay_BTD: jax.Array, input_BTD: jax.Array) -> str | None:
    """Why the kernels do not support the arguments, as a part of an error message; None if they support them."""
    for x in (decay_BTD, input_BTD):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"supports float32 and bfloat16, not {x.dtype}"
    return None if input_BTD.shape[0] else "needs at least one row"


def scan(decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """The state after each step, [B, T, D] in the dtype of the input, and the last state, [B, D] float32.

    Args:
        state_BD: the state before the first step, float32.
        reverse: whether the recurrence goes from the last step to the first.
    """
    scan_shard = functools.partial(_scan, reverse=reverse)
    run = sharding.map_shards(scan_shard, [_AXES, _AXES, _STATE_AXES], [_AXES, _STATE_AXES])
    return run(decay_BTD, input_BTD, state_BD)


def backward(
    decay_BTD: jax.Array, hidden_BTD: jax.Array, state_BD: jax.Array, dhidden_BTD: jax.Array, dlast_BD: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradients of the decay [B, T, D], of the input [B, T, D] and of the state before the first step [B, D].

    Their dtypes, in this order, are the dtype of the decay, the dtype of ``dhidden``, and float32.

    Args:
        hidden_BTD: the state after each step.
        dhidden_BTD: the gradient of the outputs ``hidden``.
        dlast_BD: the gradient of the last state.
        reverse: whether the forward pass went from the last step to the first.
    """
    shard_gradients = functools.partial(_backward, reverse=reverse)
    in_axes = [_AXES, _AXES, _STATE_AXES, _AXES, _STATE_AXES]
    run = sharding.map_shards(shard_gradients, in_axes, [_AXES, _AXES, _STATE_AXES])
    return run(decay_BTD, hidden_BTD, state_BD, dhidden_BTD, dlast_BD)


class _Blocks(NamedTuple):
    """How arrays [B, T, D] are split into blocks [C, W] of steps and channels. The grid is (batch, channels, steps).

    Attributes:
        tile_rows: number of rows of a tile.
        num_padding: number of steps of padding, so that blocks have whole tiles.
        C, W: number of steps and of channels of a block.
        grid: number of rows of the batch, of blocks of channels and of blocks of steps.
        from_last: whether the grid goes from the last block of steps to the first.
    """

    tile_rows: int
    num_padding: int
    C: int
    W: int
    grid: tuple[int, int, int]
    from_last: bool

    def _index(self, t: Any) -> Any:
        """The index of the block of steps at the grid index ``t``."""
        return self.grid[2] - 1 - t if self.from_last else t

    @property
    def steps_spec(self) -> Any:
        """The block spec of an array [B, T, D]."""
        return pl.BlockSpec((None, self.C, self.W), lambda b, d, t: (b, self._index(t), d))

    @property
    def state_spec(self) -> Any:
        """The block spec of an array [B, 1, D]."""
        return pl.BlockSpec((None, 1, self.W), lambda b, d, t: (b, 0, d))

    @property
    def row_spec(self) -> Any:
        """The block spec of an array [B, N, 1, D]."""
        return pl.BlockSpec((None, None, 1, self.W), lambda b, d, t: (b, self._index(t), 0, d))


def _blocks(arrays: Sequence[jax.Array], from_last: bool) -> _Blocks:
    B, T, D = arrays[0].shape
    rows = max(_TILE_ROWS.get(x.dtype.itemsize, 8) for x in arrays)
    num_padding = -T % rows
    W = D if D % LANES else largest_divisor(D, LANES, MAX_CHANNELS)
    C = largest_divisor(T + num_padding, rows, max(rows, min(MAX_STEPS, MAX_ENTRIES // W)))
    return _Blocks(rows, num_padding, C, W, (B, D // W, (T + num_padding) // C), from_last)


def _call(kernel: Callable[..., None], name: str, blocks: _Blocks, **arguments: Any) -> Any:
    return call_with_carry(functools.partial(kernel, blocks), name, blocks.grid, (1, blocks.W), **arguments)


def _scan(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """The outputs of :func:`scan` for the arrays of one device."""
    T = input_BTD.shape[1]
    blocks = _blocks((decay_BTD, input_BTD), reverse)
    # In the order of the scan, the padding comes after the last step. It does not change the state.
    padding = ((0, 0), (blocks.num_padding, 0) if reverse else (0, blocks.num_padding), (0, 0))
    decay_BTD, input_BTD = jnp.pad(decay_BTD, padding, constant_values=1), jnp.pad(input_BTD, padding)
    arrays = decay_BTD, input_BTD, state_BD[:, None]
    hidden_BTD, last_B1D = _call(
        _forward_kernel, "linear_scan", blocks, in_specs=[blocks.steps_spec, blocks.steps_spec, blocks.state_spec],
        out_specs=(blocks.steps_spec, blocks.state_spec), out_shape=shapes(*arrays[1:]),
    )(*arrays)  # fmt: skip
    return hidden_BTD[:, blocks.num_padding :] if reverse else hidden_BTD[:, :T], last_B1D[:, 0]


def _backward(
    decay_BTD: jax.Array, hidden_BTD: jax.Array, state_BD: jax.Array, dhidden_BTD: jax.Array, dlast_BD: jax.Array,
    *, reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The outputs of :func:`backward` for the arrays of one device."""
    T = hidden_BTD.shape[1]
    blocks = _blocks((decay_BTD, hidden_BTD, dhidden_BTD), not reverse)
    # In the order of the scan, the padding comes before the first step, so the backward pass reads it last.
    num_padding = blocks.num_padding
    padding = ((0, 0), (0, num_padding) if reverse else (num_padding, 0), (0, 0))
    decay_BTD = jnp.pad(decay_BTD, padding, constant_values=1)
    dhidden_BTD = jnp.pad(dhidden_BTD, padding)
    state_B1D = state_BD[:, None].astype(hidden_BTD.dtype)
    state_BPD = jnp.broadcast_to(state_B1D, (state_BD.shape[0], num_padding, state_BD.shape[1]))
    hidden_BTD = jnp.concatenate([hidden_BTD, state_BPD] if reverse else [state_BPD, hidden_BTD], axis=1)
    # The state before each block, in the order of the scan.
    C = blocks.C
    if reverse:
        before_BND = jnp.concatenate([hidden_BTD[:, C::C], state_B1D], axis=1)
    else:
        before_BND = jnp.concatenate([state_B1D, hidden_BTD[:, C - 1 : -1 : C]], axis=1)
    ddecay_BTD, dinput_BTD, dstate_B1D = _call(
        _backward_kernel, "linear_scan_backward", blocks,
        in_specs=[blocks.steps_spec, blocks.steps_spec, blocks.row_spec, blocks.steps_spec, blocks.state_spec],
        out_specs=(blocks.steps_spec, blocks.steps_spec, blocks.state_spec),
        out_shape=shapes(decay_BTD, dhidden_BTD, dlast_BD[:, None]),
    )(decay_BTD, hidden_BTD, before_BND[:, :, None], dhidden_BTD, dlast_BD[:, None])  # fmt: skip
    real = slice(0, T) if reverse else slice(num_padding, None)
    return ddecay_BTD[:, real], dinput_BTD[:, real], dstate_B1D[:, 0]


# ------------------------------------------------------------------------------------------------ the kernels


def _tiles(steps: int, rows: int, reverse: bool) -> list[slice]:
    starts = range(0, steps, rows)
    return [slice(start, start + rows) for start in (reversed(starts) if reverse else starts)]


def _shifted(x: jax.Array, shift: int, reverse: bool, fill: Any) -> jax.Array:
    """The rows of a tile, moved by ``shift`` rows in the order of the kernel. The first ``shift`` rows are ``fill``."""
    rows = x.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    is_first = row >= rows - shift if reverse else row < shift
    return jnp.where(is_first, fill, pltpu.roll(x, rows - shift if reverse else shift, axis=0))


def _scan_tile(a: jax.Array, h: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    """The state after each row of a tile, from the decays ``a``, the inputs ``h`` and the state before the tile."""
    shift = 1
    while shift < a.shape[0]:
        h = a * _shifted(h, shift, reverse, 0.0) + h
        a = a * _shifted(a, shift, reverse, 1.0)
        shift *= 2
    # From a reset on, ``a`` is 0, and the state before the tile may be NaN.
    return jnp.where(a == 0.0, 0.0, a * state) + h


def _last_row(x: jax.Array, reverse: bool) -> jax.Array:
    return x[:1] if reverse else x[-1:]


def _forward_kernel(blocks: _Blocks, decay: Any, inputs: Any, hidden: Any, carry: Any) -> None:
    """Run the steps of a block, one tile of rows after the other. ``carry``: the state after the previous block."""
    rows, reverse = blocks.tile_rows, blocks.from_last
    state = carry[...]
    for tile in _tiles(decay.shape[0], rows, reverse):
        h = _scan_tile(decay[tile].astype(jnp.float32), inputs[tile].astype(jnp.float32), state, reverse)
        hidden[tile] = h.astype(hidden.dtype)
        state = _last_row(h, reverse)
    carry[...] = state


def _backward_kernel(
    blocks: _Blocks, decay: Any, hidden: Any, before: Any, dhidden: Any, ddecay: Any, dinput: Any, carry: Any
) -> None:
    """Compute the gradients of the steps of a block. The forward pass went in the opposite order.

    Args:
        before: the state before the block in the order of the forward pass.
        carry: the last e of the previous block of the kernel; for the first block, the gradient of the last state.
    """
    rows, reverse = blocks.tile_rows, blocks.from_last
    e_next = carry[...]
    tiles = _tiles(decay.shape[0], rows, reverse)
    for index, tile in enumerate(tiles):
        a, dh = decay[tile].astype(jnp.float32), dhidden[tile].astype(jnp.float32)
        e = _scan_tile(a, a * dh, e_next, reverse)
        gradient = dh + _shifted(e, 1, reverse, e_next)
        # The states before the tile and before each of its rows, in the order of the forward pass.
        before_tile = before[...] if index == len(tiles) - 1 else _last_row(hidden[tiles[index + 1]], not reverse)
        h_before = _shifted(hidden[tile].astype(jnp.float32), 1, not reverse, before_tile.astype(jnp.float32))
        ddecay[tile] = (gradient * h_before).astype(ddecay.dtype)
        dinput[tile] = gradient.astype(dinput.dtype)
        e_next = _last_row(e, reverse)
    carry[...] = e_next

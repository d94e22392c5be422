"""Blocks of heads and products of decays, for the TPU kernels of recurrences whose state is a matrix.

The kernels compute a recurrence in chunks of the time axis, for several heads at once. They keep the state of these
heads in VMEM from the first chunk to the last one.

Let b_t be the sum of the log decays of the steps of a chunk up to and including step t. The product of the decays of
steps s + 1 to t is ``exp(b_t - b_s)``. Log decays below ``MIN_LOG_DECAY`` are set to this value, so that all sums are
finite. The rounding error of b_t is about 6e-8 times its magnitude. The logarithm of a decay near 0 has a large
magnitude. From a step with such a decay to the end of the chunk, b_t then has a large magnitude too. So the products of
the later decays are less accurate.

A reset starts a new segment of the chunk. Within the chunk, a step reads itself and the earlier steps of its segment.
Only steps before the first reset of a chunk read the state before the chunk.

Each step has a scale for each head: ``scale`` of ``linear_attention``, or ``beta`` of ``gated_delta_rule``.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, C chunks, L steps
of a chunk, N blocks of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import call_with_carry, pl
from jaxlm.nn.time_chunks import pad_axis

MIN_LOG_DECAY = -104.0
"""Lower bound of log decays. Smaller log decays are set to this value; its exponential is 0 in float32."""
MAX_HEADS = 8
"""Maximum number of heads of a block. A block has more heads only if no number up to this maximum is possible
(:func:`heads_per_block`)."""
MAX_VMEM_BYTES = 15 * 2**20
"""Maximum number of bytes of VMEM for the arrays of a block of heads. The compiler gives a kernel 16 MiB."""


def vmem_bytes(J: int, K: int, V: int, itemsize: int) -> int:
    """Estimate of the bytes in VMEM of a backward kernel for a block of J heads and chunks of 128 steps.

    The inputs and outputs are four arrays of the size of the keys, three of the size of the values, three of the size
    of the states, and four arrays with scalars of each step. Each of them has two buffers. The carry is another array
    of the size of the states, with one buffer. The last axis of states and scalars is padded to a multiple of 128. If
    the heads of a block share one query and key, the four arrays of the size of the keys are smaller than estimated.
    For each head, the intermediate results take about as much memory as ten matrices of scores.

    Args:
        itemsize: bytes of an entry of queries, keys and values. Everything else is float32.
    """
    L, padded_V = LANES, -(-V // LANES) * LANES
    float32_entries = 7 * J * K * padded_V + 2 * 4 * L * LANES + 10 * J * L**2
    return 2 * L * J * (4 * K + 3 * V) * itemsize + 4 * float32_entries


def unsupported_reason(
    query_BTGK: jax.Array,
    value_BTHV: jax.Array | jax.ShapeDtypeStruct,
    vmem_bytes: Callable[[int, int, int, int], int] = vmem_bytes,
) -> str | None:
    """Why the kernels do not support the arguments, as a part of an error message; None if they support them.

    Args:
        vmem_bytes: a function that estimates the VMEM of the kernels, such as the function :func:`vmem_bytes`.
    """
    if value_BTHV.dtype not in (jnp.float32, jnp.bfloat16):
        return f"supports float32 and bfloat16, not {value_BTHV.dtype}"
    if not query_BTGK.shape[0]:
        return "needs at least one row"
    (G, K), (H, V), num_shards = query_BTGK.shape[2:], value_BTHV.shape[2:], sharding.num_shards(("heads",))
    if not shards_divide_heads(G, H):
        return (
            f"needs numbers of heads and groups that are divisible by {num_shards} (a single group is allowed), "
            f"not {H} and {G}"
        )
    local_groups = G // num_shards if groups_are_sharded(G, H) else G
    if heads_per_block(local_groups, H // num_shards, K, V, value_BTHV.dtype.itemsize, vmem_bytes) is None:
        return (
            "needs a block of J heads that fits into VMEM. J * V must be a multiple of 128, or J must be the number of "
            "all heads. If each head has its own key, the same holds for J * K. If heads share keys, K must be a "
            "multiple of 128, or all heads must share one key"
        )
    return None


def shards_divide_heads(G: int, H: int) -> bool:
    """Whether the shards of the head axis get equal numbers of heads, and of groups if there are several groups."""
    num_shards = sharding.num_shards(("heads",))
    return H % num_shards == 0 and (G == 1 or G % num_shards == 0)


def groups_are_sharded(G: int, H: int) -> bool:
    """Whether the group axis is sharded like the head axis. Otherwise, every device has a copy of the single group."""
    return G > 1 or H == 1


def heads_per_block(
    G: int, H: int, K: int, V: int, itemsize: int, vmem_bytes: Callable[[int, int, int, int], int] = vmem_bytes
) -> int | None:
    """J, the number of heads of a block; None if no number is possible. G and H are the numbers on one device.

    J divides H. The heads of a block either all share one query and key, or each of them has its own. So J also divides
    H / G if heads share keys. The last axis of each block, J * V or J * K (K, if heads share keys), must be a multiple
    of 128 or the whole axis of the array. The arrays of a block must fit into VMEM (``MAX_VMEM_BYTES``), according to
    ``vmem_bytes``.
    """

    def is_possible(J: int) -> bool:
        has_own_keys = H == G
        whole_values = J * V % LANES == 0 or J == H
        whole_keys = (J * K % LANES == 0 or J == H) if has_own_keys else (K % LANES == 0 or G == 1)
        one_group = has_own_keys or (H // G) % J == 0
        return (
            H % J == 0 and whole_values and whole_keys and one_group and vmem_bytes(J, K, V, itemsize) <= MAX_VMEM_BYTES
        )

    possible = [J for J in range(1, H + 1) if is_possible(J)]
    return max((J for J in possible if J <= MAX_HEADS), default=min(possible, default=None))


HEAD_AXES = ("batch", None, "heads", None)
"""Logical axes of an array [B, T, H, X] with any width X, such as the values."""
STATE_AXES = ("batch", "heads", None, None)
"""Logical axes of a state [B, H, K, V]."""
CHUNK_STATES_AXES = ("batch", None, "heads", None, None)
"""Logical axes of the states before the chunks, [B, C, H, K, V]."""


class Blocks(NamedTuple):
    """How the arrays of one device are split into blocks. The grid of a kernel is [B, N, C].

    Attributes:
        B, C, L, G, H, K, V, J: the sizes of the axes on the device (see the module).
        from_last: whether the kernel goes from the last chunk to the first, as in a backward pass.
    """

    B: int
    C: int
    L: int
    G: int
    H: int
    K: int
    V: int
    J: int
    from_last: bool

    @property
    def T(self) -> int:
        """The number of steps, including the padding of the last chunk."""
        return self.C * self.L

    @property
    def has_own_keys(self) -> bool:
        """Whether each head has its own query and key."""
        return self.G == self.H

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.H // self.J, self.C

    def _chunk(self, c: Any) -> Any:
        return self.C - 1 - c if self.from_last else c

    def array(self, kind: str) -> tuple[tuple[int, ...], Any]:
        """The shape and the ``BlockSpec`` of an array of this kind.

        ``keys``: queries or keys. ``columns`` and ``rows``: the scalars of each step. ``per head``: the gradient of one
        scalar per step and head. ``dkeys``: gradients of queries or keys that heads share. ``state``: the state before
        the first step or after the last one. ``states``: the states before the chunks. ``one state``: the output that
        replaces ``states`` if they are not saved. ``segments``: the number of resets of the chunk up to and including
        each step, the same for all heads. Other gradients have the kind of their array.
        """
        T, L, H, K, V, J, N, chunk = self.T, self.L, self.H, self.K, self.V, self.J, self.grid[1], self._chunk
        block_keys, heads_per_group = J if self.has_own_keys else 1, H // self.G

        def key_index(b: Any, n: Any, c: Any) -> Any:
            return b, chunk(c), n if self.has_own_keys else n * J // heads_per_group

        def scalar_index(b: Any, n: Any, c: Any) -> Any:
            return b, n, chunk(c), 0

        arrays: dict[str, tuple[tuple[int, ...], tuple[int | None, ...], Callable[..., Any]]] = {
            "keys": ((T, self.G * K), (L, block_keys * K), key_index),
            "values": ((T, H * V), (L, J * V), lambda b, n, c: (b, chunk(c), n)),
            "columns": ((N, T, 2 * J + 1), (None, L, 2 * J + 1), scalar_index),
            "rows": ((N, 2 * J + 1, T), (None, 2 * J + 1, L), lambda b, n, c: (b, n, 0, chunk(c))),
            "per head": ((N, T, J), (None, L, J), scalar_index),
            "dkeys": ((N, T, K), (None, L, K), scalar_index),
            "state": ((H, K, V), (J, K, V), lambda b, n, c: (b, n, 0, 0)),
            "states": ((self.C, H, K, V), (None, J, K, V), lambda b, n, c: (b, chunk(c), n, 0, 0)),
            "segments": ((T, 1), (L, 1), lambda b, n, c: (b, chunk(c), 0)),
            "one state": ((1, H, K, V), (None, J, K, V), lambda b, n, c: (b, 0, n, 0, 0)),  # the same for all chunks
        }
        shape, block, index = arrays[kind]
        return (self.B, *shape), pl.BlockSpec((None, *block), index)


def make_blocks(
    query: jax.Array,
    value: jax.Array,
    L: int,
    from_last: bool,
    vmem_bytes: Callable[[int, int, int, int], int] = vmem_bytes,
) -> Blocks:
    """The :class:`Blocks` for queries [B, T, G, K] and values [B, T, H, V] of one device."""
    (B, T, G, K), (H, V) = query.shape, value.shape[2:]
    J = heads_per_block(G, H, K, V, value.dtype.itemsize, vmem_bytes)
    assert J is not None  # unsupported_reason checks this
    return Blocks(B, -(-T // L), L, G, H, K, V, J, from_last)


def _step_scalars(blocks: Blocks, log_BTH: jax.Array, scale_BTH: jax.Array, reset_BT: jax.Array) -> tuple[Any, Any]:
    """The scalars of each step, as columns [B, N, T, 2 * J + 1] and as rows [B, N, 2 * J + 1, T].

    The scalars are the sum b_t of each head, the scale of each head, and the index of the step's segment in the chunk.
    """
    B, T, C, L, J = blocks.B, blocks.T, blocks.C, blocks.L, blocks.J
    b_BTNJ = jnp.cumsum(log_BTH.reshape(B, C, L, -1), axis=2).reshape(B, T, -1, J)
    segment_BT = jnp.cumsum(reset_BT.reshape(B, C, L).astype(jnp.float32), axis=2).reshape(B, T, 1, 1)
    segment_BTN1 = jnp.broadcast_to(segment_BT, (*b_BTNJ.shape[:3], 1))
    columns = jnp.concatenate([b_BTNJ, scale_BTH.reshape(b_BTNJ.shape), segment_BTN1], axis=-1).transpose(0, 2, 1, 3)
    return columns, columns.transpose(0, 1, 3, 2)


def join_heads(x_BNTJ: jax.Array, blocks: Blocks) -> jax.Array:
    """``x`` as an array [B, T, H]. The time axis keeps its padding."""
    return x_BNTJ.transpose(0, 2, 1, 3).reshape(blocks.B, blocks.T, blocks.H)


_INPUTS = ("keys", "keys", "values", "columns", "rows")
"""The kinds of the arrays of :func:`padded_inputs`."""


def call_kernel(
    kernel: Any, name: str, blocks: Blocks, inputs: Sequence[str], outputs: Sequence[tuple[str, DTypeLike]]
) -> Any:
    """A function that runs the kernel. ``inputs``: the kind of each input. ``outputs``: kind and dtype of each output.

    The carry is [J, K, V].
    """
    return call_with_carry(
        functools.partial(kernel, blocks), name, blocks.grid, (blocks.J, blocks.K, blocks.V),
        in_specs=[blocks.array(kind)[1] for kind in inputs],
        out_specs=tuple(blocks.array(kind)[1] for kind, _ in outputs),
        out_shape=tuple(jax.ShapeDtypeStruct(blocks.array(kind)[0], dtype) for kind, dtype in outputs),
    )  # fmt: skip


def padded_inputs(inputs: Sequence[jax.Array], blocks: Blocks) -> tuple[jax.Array, ...]:
    """Queries and keys [B, T, G * K], values [B, T, H * V], and the scalars of each step as columns and as rows.

    The time axis of all of them is padded. ``inputs``: query, key, value, log decay, scale and reset.
    """
    query, key, value, *scalars = (pad_axis(x, 0, blocks.T - x.shape[1]) for x in inputs)
    arrays = query.astype(value.dtype), key.astype(value.dtype), value
    return *(x.reshape(blocks.B, blocks.T, -1) for x in arrays), *_step_scalars(blocks, *scalars)


class Decays(NamedTuple):
    """Products of the decays of a chunk, for a block of heads, and the scales of its steps.

    Attributes:
        is_read: [L, L], whether step t (row) reads step s (column): s <= t, in the same segment.
        columns, rows: the sums b_t of log decays, [L, J] and [J, L].
        scale, scale_rows: the scales of the steps, [L, J] and [J, L].
        prefix: [L, J], the product of the decays of all steps up to and including t; 0 from the first reset on.
        suffix, suffix_rows: [L, J] and [J, L], the product of the decays of all steps after t; 0 before the last reset.
        total: [1, J], the product of the decays of all steps; 0 if the chunk has a reset.
        is_before_reset: [L, 1], whether neither step t nor an earlier step of the chunk has a reset.
    """

    is_read: jax.Array
    columns: jax.Array
    rows: jax.Array
    scale: jax.Array
    scale_rows: jax.Array
    prefix: jax.Array
    suffix: jax.Array
    suffix_rows: jax.Array
    total: jax.Array
    is_before_reset: jax.Array

    def pairs(self, head: int) -> jax.Array:
        """The products of the decays of steps s + 1 to t for one head, [L, L]; 0 if t does not read s."""
        difference = self.columns[:, head : head + 1] - self.rows[head : head + 1]
        return jnp.exp(jnp.where(self.is_read, difference, -jnp.inf))


def chunk_decays(columns: Any, rows: Any, J: int) -> Decays:
    """The products of decays, from the blocks ``columns`` [L, 2 * J + 1] and ``rows`` [2 * J + 1, L]."""
    b_t, segment_t, b_s, segment_s = columns[:, :J], columns[:, 2 * J :], rows[:J], rows[2 * J :]
    L = b_t.shape[0]
    t, s = (lax.broadcasted_iota(jnp.int32, (L, L), axis) for axis in (0, 1))
    b_last, last_segment = b_t[-1:], segment_t[-1:]
    prefix = jnp.where(segment_t == 0, jnp.exp(b_t), 0.0)
    return Decays(
        (t >= s) & (segment_t == segment_s), b_t, b_s, columns[:, J : 2 * J], rows[J : 2 * J], prefix,
        jnp.where(segment_t == last_segment, jnp.exp(b_last - b_t), 0.0),
        jnp.where(segment_s == last_segment, jnp.exp(b_s[:, -1:] - b_s), 0.0),
        prefix[-1:], segment_t == 0,
    )  # fmt: skip


def split_non_finite(state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state [K, V] with zeros in each column that has a non-finite entry, and a row [1, V] with NaN for these
    columns and 0 for all other columns.

    A kernel multiplies the state by a decay of 0 at a reset, and 0 * NaN is NaN. So the kernel multiplies the state
    without non-finite entries, and adds the row to the results of the steps before the reset.
    """
    num_non_finite = jnp.sum(jnp.where(jnp.abs(state) < jnp.inf, 0.0, 1.0), axis=0, keepdims=True)
    return jnp.where(num_non_finite == 0.0, state, 0.0), jnp.where(num_non_finite == 0.0, 0.0, jnp.nan)


class Kernels(NamedTuple):
    """The kernels of a recurrence.

    Attributes:
        name: the name of ``forward`` in the compiled program. ``backward`` has the name ``{name}_backward``.
        forward, backward: the kernels. Their first argument is a :class:`Blocks`. Their other arguments are those of a
            kernel of ``lazy_pallas.call_with_carry`` whose carry is [J, K, V]. The order of inputs and outputs is that
            of the calls in :func:`_device_forward` and :func:`_device_backward`.
        returns_gradient_of_sums: True if ``backward`` returns the gradients of the sums b_t; False if it returns the
            gradients of the log decays.
    """

    name: str
    forward: Any
    backward: Any
    returns_gradient_of_sums: bool


def run(
    kernels: Kernels, inputs: Sequence[jax.Array], state_BHKV: jax.Array, reset_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The outputs [B, T, H, V] in the dtype of the values, and the last state [B, H, K, V] float32.

    Args:
        inputs: queries and keys [B, T, G, K], values [B, T, H, V], and float32 log decays and scales [B, T, H, 1].
            Padding has zeros in all of them.
        state_BHKV: the state before the first step, float32.
        reset_BT: True where the state is set to zeros before the step; False at padding. None: nowhere.
    """
    query, key, value, log_BTH, scale_BTH = *inputs[:3], *(x[..., 0] for x in inputs[3:])
    if reset_BT is None:
        reset_BT = jnp.zeros_like(log_BTH[..., 0], bool)
    log_BTH = jnp.where(reset_BT[..., None], 0.0, jnp.maximum(log_BTH, MIN_LOG_DECAY))
    L = choices.kernel_chunk(query.shape[1])
    return _run(kernels, L, (query, key, value, log_BTH, scale_BTH, reset_BT), state_BHKV)


def _forward(kernels: Kernels, L: int, inputs: Any, state_BHKV: jax.Array, *, save_states: bool = True) -> Any:
    run = functools.partial(_device_forward, kernels, L, save_states)
    mapped = sharding.map_shards(run, [*_input_axes(inputs), STATE_AXES], [HEAD_AXES, STATE_AXES, CHUNK_STATES_AXES])
    out_BTHV, last_BHKV, states_BCHKV = mapped(*inputs, state_BHKV)
    return (out_BTHV, last_BHKV), (inputs, states_BCHKV)


def _backward(kernels: Kernels, L: int, saved: Any, cotangents: Any) -> Any:
    inputs, states_BCHKV = saved
    query, key, _, log_BTH, *_ = inputs
    # If each head has its own query and key, their gradients are [B, T, H, K]. If heads share them, each block of heads
    # has its own part of the gradients: [B, T, blocks of a group, G, K]. The parts are summed below. If the groups are
    # sharded, a device has the parts of its groups. Otherwise, it has the parts of its blocks of heads.
    axes, is_shared = _input_axes(inputs), query.shape[2] != log_BTH.shape[2]
    dkey_axes: tuple[str | None, ...] = HEAD_AXES
    if is_shared:
        is_split_by_group = axes[0] == HEAD_AXES
        dkey_axes = ("batch", None, None, "heads", None) if is_split_by_group else ("batch", None, "heads", None, None)
    mapped = sharding.map_shards(
        functools.partial(_device_backward, kernels, L, is_shared),
        [*axes, CHUNK_STATES_AXES, HEAD_AXES, STATE_AXES],
        [dkey_axes, dkey_axes, *axes[2:5], STATE_AXES],
    )
    dquery, dkey, dvalue, dlog_BTH, dscale_BTH, dstate_BHKV = mapped(*inputs, states_BCHKV, *cotangents)
    if is_shared:
        dquery, dkey = jnp.sum(dquery, axis=2), jnp.sum(dkey, axis=2)
    if kernels.returns_gradient_of_sums:
        # The log decay of a step is a summand of b_t for this step and all later steps of the chunk.
        db_BCLH = dlog_BTH.reshape(dlog_BTH.shape[0], -1, L, dlog_BTH.shape[2])
        dlog_BTH = lax.cumsum(db_BCLH, axis=2, reverse=True).reshape(dlog_BTH.shape)
    dlog_BTH = dlog_BTH[:, : log_BTH.shape[1]]
    return (dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue, dlog_BTH, dscale_BTH, None), dstate_BHKV


_run = custom_vjp.from_rules(_forward, _backward, (0, 1), functools.partial(_forward, save_states=False))


def _input_axes(inputs: Any) -> list[tuple[str | None, ...]]:
    """The logical axes of the inputs: query, key, value, log decay, scale and reset."""
    (_, _, G, _), (_, _, H, _) = inputs[0].shape, inputs[2].shape
    key_axes = HEAD_AXES if groups_are_sharded(G, H) else ("batch", None, None, None)
    return [key_axes, key_axes, HEAD_AXES, HEAD_AXES[:3], HEAD_AXES[:3], HEAD_AXES[:2]]


def _device_forward(
    kernels: Kernels, L: int, save_states: bool, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """The outputs of one device, the last state, and the state before each chunk.

    Without ``save_states``, the third result is not used.

    Args:
        arrays: query, key, value, log decay, scale, reset, and the state before the first step.
    """
    *inputs, state_BHKV = arrays
    query, _, value = inputs[:3]
    blocks = make_blocks(query, value, L, from_last=False)
    states = "states" if save_states else "one state"
    outputs = [("values", value.dtype), (states, jnp.float32), ("state", jnp.float32)]
    run = call_kernel(kernels.forward, kernels.name, blocks, (*_INPUTS, "state"), outputs)
    out_BTX, states_BCHKV, last_BHKV = run(*padded_inputs(inputs, blocks), state_BHKV)
    return out_BTX[:, : query.shape[1]].reshape(value.shape), last_BHKV, states_BCHKV


def _device_backward(kernels: Kernels, L: int, is_shared: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The gradients of queries, keys, values, log decays, scales and the state before the first step, for one device.

    The gradients of queries and keys are [B, T, H, K]; if ``is_shared``, they are [B, T, blocks of a group, G, K]. The
    gradient of the log decays, or of the sums b_t (``Kernels.returns_gradient_of_sums``), includes the padded steps.

    Args:
        is_shared: whether several heads share queries and keys, on this device or on several devices.
        arrays: query, key, value, log decay, scale, reset, the state before each chunk, and the gradients of the
            outputs and of the last state.
    """
    *inputs, states_BCHKV, dout_BTHV, dlast_BHKV = arrays
    query, key, value = inputs[:3]
    blocks = make_blocks(query, value, L, from_last=True)
    T = query.shape[1]
    dout_BTX = pad_axis(dout_BTHV, 0, blocks.T - T).reshape(blocks.array("values")[0])
    dkeys = "keys" if blocks.has_own_keys else "dkeys", jnp.float32 if is_shared else value.dtype
    outputs = [dkeys, dkeys, ("values", value.dtype), *[("per head", jnp.float32)] * 2, ("state", jnp.float32)]
    kinds = (*_INPUTS, "states", "values", "state")
    run = call_kernel(kernels.backward, f"{kernels.name}_backward", blocks, kinds, outputs)
    dquery, dkey, dvalue, ddecay, dscale, dstate = run(
        *padded_inputs(inputs, blocks), states_BCHKV, dout_BTX, dlast_BHKV
    )

    def per_group(dx: jax.Array) -> jax.Array:
        if blocks.has_own_keys:
            dx = dx[:, :T].reshape(key.shape)
            return dx[:, :, None] if is_shared else dx
        # The blocks of a group are consecutive.
        return dx[:, :, :T].reshape(blocks.B, blocks.G, -1, T, blocks.K).transpose(0, 3, 2, 1, 4)

    ddecay_BTH, dscale_BTH = (join_heads(x, blocks) for x in (ddecay, dscale))
    return (
        per_group(dquery), per_group(dkey), dvalue[:, :T].reshape(value.shape), ddecay_BTH, dscale_BTH[:, :T], dstate
    )  # fmt: skip

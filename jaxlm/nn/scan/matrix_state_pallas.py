"""Pallas kernels for linear attention with one decay per head, and for its gradients, on TPU.

The implementation ``chunked`` of ``linear_attention`` writes the scores of a chunk, the products of decays and the
states to memory between its matmuls. A kernel keeps them in VMEM. It reads the queries, keys and values of a chunk
once, for several heads, and keeps the state of these heads until the last chunk. For the gradients, the forward kernel
also writes the state before each chunk.

Let b_t be the sum of the log decays of a chunk up to step t. The product of the decays of steps s + 1 to t is
``exp(b_t - b_s)``. A reset starts a new segment of the chunk. Within the chunk, a step reads itself and the earlier
steps of its segment. Only the first segment reads the state before the chunk. Log decays below ``MIN_LOG_DECAY`` are
set to it, so that all sums are finite. The rounding error of a sum is about 6e-8 times its magnitude. A decay of almost
0 has a large negative logarithm, so products of later decays are less accurate.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, C chunks, L steps
of a chunk, N blocks of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.devices import LANES

MIN_LOG_DECAY = -104.0
"""Smaller log decays are set to this value, whose exponential is 0 in float32."""
MAX_HEADS = 8
"""Maximum number of heads of a block. A block has more heads only if fewer heads do not fill whole registers."""
MAX_STATE = 2**21
"""Maximum bytes of the states of a block of heads. A kernel has up to five arrays of this size in VMEM."""


def unsupported_reason(query_BTGK: jax.Array, value_BTHV: jax.Array, num_decays: int) -> str | None:
    """Why the kernels do not support the arguments, as the end of a sentence; None if they support them.

    Args:
        num_decays: number of decays per head.
    """
    if value_BTHV.dtype not in (jnp.float32, jnp.bfloat16):
        return f"supports float32 and bfloat16, not {value_BTHV.dtype}"
    if num_decays != 1:
        return "supports one decay per head, not one per channel"
    if not query_BTGK.shape[0]:
        return "needs at least one row"
    (G, K), (H, V), num_shards = query_BTGK.shape[2:], value_BTHV.shape[2:], sharding.num_shards(("heads",))
    if H % num_shards or (G % num_shards and G > 1):
        return f"needs {num_shards} shards to divide the numbers of heads and groups, {H} and {G}"
    local_groups = G // num_shards if _groups_are_sharded(G, H) else G
    if _heads_per_block(local_groups, H // num_shards, K, V) is None:
        return (
            "needs widths of heads for which a block of heads fills registers of 128 lanes and its states fit into VMEM"
        )
    return None


def _groups_are_sharded(G: int, H: int) -> bool:
    """Whether the groups are sharded like the heads. A single group of several heads is on every device."""
    return G > 1 or H == 1


def _heads_per_block(G: int, H: int, K: int, V: int) -> int | None:
    """The number of heads of a block on one device. None: no number of heads gives a block of whole registers whose
    states fit into VMEM.

    All heads of a block share one query and key, or each has its own.
    """

    def is_possible(J: int) -> bool:
        has_own = H == G
        whole_values = J * V % LANES == 0 or J == H
        whole_keys = (J * K % LANES == 0 or J == H) if has_own else (K % LANES == 0 or G == 1)
        one_group = has_own or (H // G) % J == 0
        return H % J == 0 and whole_values and whole_keys and one_group and 4 * J * K * V <= MAX_STATE

    possible = [J for J in range(1, H + 1) if is_possible(J)]
    return max((J for J in possible if J <= MAX_HEADS), default=min(possible, default=None))


def linear_attention(
    inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array], state_BHKV: jax.Array, reset_BT: jax.Array | None,
    L: int, *, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The outputs [B, T, H, V] in the dtype of the values, and the last state [B, H, K, V] float32.

    Args:
        inputs: queries, keys, values and log decays [B, T, H], as for ``jaxlm.nn.scan.linear_attention``. Padding has
            zeros in all of them.
        reset_BT: True where the state is set to zeros before the step; None: nowhere.
        L: number of steps of a chunk, a multiple of 128, or at least T.
        interpret: use Pallas's interpreter, on any device.
    """
    query, key, value, log_BTH = inputs
    log_BTH = jnp.maximum(log_BTH.astype(jnp.float32), MIN_LOG_DECAY)
    if reset_BT is None:
        reset_BT = jnp.zeros_like(log_BTH[..., 0], bool)
    log_BTH = jnp.where(reset_BT[..., None], 0.0, log_BTH)
    return _attention((query, key, value, log_BTH, reset_BT), state_BHKV, L, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(inputs: Any, state_BHKV: jax.Array, L: int, interpret: bool) -> Any:
    return _run_forward(inputs, state_BHKV, L=L, interpret=interpret, save_states=False)[:2]


def _attention_forward(inputs: Any, state_BHKV: jax.Array, L: int, interpret: bool) -> Any:
    out_BTHV, last_BHKV, states_BCHKV = _run_forward(inputs, state_BHKV, L=L, interpret=interpret, save_states=True)
    return (out_BTHV, last_BHKV), (inputs, states_BCHKV)


def _run_forward(inputs: Any, state_BHKV: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The results of :func:`_forward` for all devices."""
    run = functools.partial(_forward, **options)
    return _map_shards(run, _groups_axes(inputs), [_STATE], [_HEADS, _STATE, _STATES])(*inputs, state_BHKV)


def _attention_backward(L: int, interpret: bool, saved: Any, cotangents: Any) -> Any:
    inputs, states_BCHKV = saved
    query, key, _, log_BTH, _ = inputs
    dout_BTHV, dlast_BHKV = cotangents
    run = functools.partial(_backward, L=L, interpret=interpret)
    # Gradients of queries and keys [B, T, N, G, K]: each device has its own groups, or its own blocks of heads.
    groups = _groups_axes(inputs)
    gradient = ("batch", None, None, "heads", None) if groups == _HEADS else ("batch", None, "heads", None, None)
    out_axes = [gradient, gradient, _HEADS, _HEADS[:3], _STATE]
    mapped = _map_shards(run, groups, [_STATES, _HEADS, _STATE], out_axes)
    dquery, dkey, dvalue, dsum_BTH, dstate_BHKV = mapped(*inputs, states_BCHKV, dout_BTHV, dlast_BHKV)
    dquery, dkey = (jnp.sum(dx, axis=2).astype(x.dtype) for dx, x in ((dquery, query), (dkey, key)))
    # A log decay is a summand of b_t for this step and all later steps of its chunk.
    dsum_BCLH = dsum_BTH.reshape(dsum_BTH.shape[0], -1, L, dsum_BTH.shape[2])
    dlog_BTH = lax.cumsum(dsum_BCLH, axis=2, reverse=True).reshape(dsum_BTH.shape)[:, : log_BTH.shape[1]]
    return (dquery, dkey, dvalue, dlog_BTH, None), dstate_BHKV


_attention.defvjp(_attention_forward, _attention_backward)

_HEADS = ("batch", None, "heads", None)
_STATE = ("batch", "heads", None, None)
_STATES = ("batch", None, "heads", None, None)


def _groups_axes(inputs: Any) -> tuple[str | None, ...]:
    """The logical axes of queries and keys."""
    return _HEADS if _groups_are_sharded(inputs[0].shape[2], inputs[2].shape[2]) else ("batch", None, None, None)


def _map_shards(
    function: Callable[..., Any], groups: tuple[str | None, ...], other_axes: list[Any], out_axes: list[Any]
) -> Callable[..., Any]:
    """A function that runs ``function`` on each device, with its shards of the inputs and of further arrays."""
    in_axes = [groups, groups, _HEADS, _HEADS[:3], _HEADS[:2], *other_axes]
    return sharding.map_shards(function, in_axes, out_axes)


class _Blocks(NamedTuple):
    """How the arrays of one device are split into blocks. The grid is (batch, blocks of heads, chunks).

    Attributes:
        from_last: whether the grid goes from the last chunk to the first.
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
        """The number of steps, with padding."""
        return self.C * self.L

    @property
    def has_own(self) -> bool:
        """Whether each head has its own query and key."""
        return self.G == self.H

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.H // self.J, self.C

    def _chunk(self, c: Any) -> Any:
        return self.C - 1 - c if self.from_last else c

    def spec(self, kind: str) -> Any:
        """The block spec of an array of this kind.

        Kinds: ``keys`` [B, T, G * K], ``values`` [B, T, H * V], ``columns``, ``dsum`` and ``dkeys`` [B, N, T, X],
        ``rows`` [B, N, X, T], ``state`` [B, H, K, V], ``states`` [B, C, H, K, V],
        ``one state`` [B, 1, H, K, V].
        """
        from jax.experimental import pallas as pl

        L, J, heads_per_group = self.L, self.J, self.H // self.G
        if kind == "keys":
            if self.has_own:
                return pl.BlockSpec((None, L, J * self.K), lambda b, n, c: (b, self._chunk(c), n))
            return pl.BlockSpec((None, L, self.K), lambda b, n, c: (b, self._chunk(c), n * J // heads_per_group))
        if kind == "values":
            return pl.BlockSpec((None, L, J * self.V), lambda b, n, c: (b, self._chunk(c), n))
        if kind == "state":
            return pl.BlockSpec((None, J, self.K, self.V), lambda b, n, c: (b, n, 0, 0))
        if kind == "one state":  # for every chunk, the same block
            return pl.BlockSpec((None, None, J, self.K, self.V), lambda b, n, c: (b, 0, n, 0, 0))
        if kind == "states":
            return pl.BlockSpec((None, None, J, self.K, self.V), lambda b, n, c: (b, self._chunk(c), n, 0, 0))
        width = {"columns": J + 1, "rows": J + 1, "dsum": J, "dkeys": self.K * (J if self.has_own else 1)}[kind]
        if kind == "rows":
            return pl.BlockSpec((None, None, width, L), lambda b, n, c: (b, n, 0, self._chunk(c)))
        return pl.BlockSpec((None, None, L, width), lambda b, n, c: (b, n, self._chunk(c), 0))


def _blocks(query: jax.Array, value: jax.Array, L: int, from_last: bool) -> _Blocks:
    (B, T, G, K), (H, V) = query.shape, value.shape[2:]
    J = _heads_per_block(G, H, K, V)
    assert J is not None  # unsupported_reason checks this
    return _Blocks(B, -(-T // L), L, G, H, K, V, J, from_last)


def _pad_time(x_BT: jax.Array, L: int) -> jax.Array:
    """The array with zeros after the last step, so that it has whole chunks."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % L), *((0, 0),) * (x_BT.ndim - 2)))


def _sums_and_segments(log_BTH: jax.Array, reset_BT: jax.Array, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """The sums b of each head and the segments of the chunks, as columns [B, N, T, J + 1] and rows [B, N, J + 1, T].

    The first J entries are the sums. The last entry is the number of the segment in the chunk.
    """
    B, T, C, L, J = blocks.B, blocks.T, blocks.C, blocks.L, blocks.J
    b_BTH = jnp.cumsum(log_BTH.reshape(B, C, L, -1), axis=2).reshape(B, T, -1, J)
    segment_BT = jnp.cumsum(reset_BT.reshape(B, C, L).astype(jnp.float32), axis=2).reshape(B, T, 1, 1)
    segment_BTN1 = jnp.broadcast_to(segment_BT, (*b_BTH.shape[:3], 1))
    columns = jnp.concatenate([b_BTH, segment_BTN1], axis=-1).transpose(0, 2, 1, 3)
    return columns, columns.transpose(0, 1, 3, 2)


def _call(kernel: Any, name: str, blocks: _Blocks, interpret: bool, **arguments: Any) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    return pl.pallas_call(
        functools.partial(kernel, blocks), name=name, grid=blocks.grid, interpret=interpret,
        scratch_shapes=[pltpu.VMEM((blocks.J, blocks.K, blocks.V), jnp.float32)], **arguments,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )  # fmt: skip


def _padded_inputs(
    query: jax.Array, key: jax.Array, value: jax.Array, log_BTH: jax.Array, reset_BT: jax.Array, blocks: _Blocks
) -> tuple[jax.Array, ...]:
    """Queries and keys [B, T, G * K], values [B, T, H * V], and the columns and rows of the log decays."""
    L = blocks.L
    flat = [_pad_time(x, L).reshape(blocks.B, blocks.T, -1) for x in (query, key, value)]
    flat[:2] = (x.astype(value.dtype) for x in flat[:2])
    return *flat, *_sums_and_segments(_pad_time(log_BTH, L), _pad_time(reset_BT, L), blocks)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, log_BTH: jax.Array, reset_BT: jax.Array, state_BHKV: jax.Array,
    *, L: int, interpret: bool, save_states: bool,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    """The outputs of one device, the last state, and the state before each chunk (unused if not ``save_states``)."""
    blocks = _blocks(query, value, L, from_last=False)
    T, C = query.shape[1], blocks.C if save_states else 1
    out_BTX, last_BHKV, states_BCHKV = _call(
        _forward_kernel, "linear_attention", blocks, interpret,
        in_specs=[blocks.spec(kind) for kind in ("keys", "keys", "values", "columns", "rows", "state")],
        out_specs=tuple(
            blocks.spec(kind) for kind in ("values", "state", "states" if save_states else "one state")
        ),
        out_shape=(
            jax.ShapeDtypeStruct((blocks.B, blocks.T, blocks.H * blocks.V), value.dtype),
            jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32),
            jax.ShapeDtypeStruct((blocks.B, C, *state_BHKV.shape[1:]), jnp.float32),
        ),
    )(*_padded_inputs(query, key, value, log_BTH, reset_BT, blocks), state_BHKV)  # fmt: skip
    return out_BTX[:, :T].reshape(value.shape), last_BHKV, states_BCHKV


def _backward(
    query: jax.Array, key: jax.Array, value: jax.Array, log_BTH: jax.Array, reset_BT: jax.Array,
    states_BCHKV: jax.Array, dout_BTHV: jax.Array, dlast_BHKV: jax.Array, *, L: int, interpret: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The gradients of one device.

    They are those of queries and keys, [B, T, N, G, K] float32 (N = 1 if each head has its own); of the values; of b,
    [B, T, H] float32, with the padding; and of the first state.
    """
    blocks = _blocks(query, value, L, from_last=True)
    B, T, N, K = blocks.B, query.shape[1], blocks.H // blocks.J, blocks.K
    dkeys = jax.ShapeDtypeStruct((B, N, blocks.T, K * (blocks.J if blocks.has_own else 1)), jnp.float32)
    dout_BTX = _pad_time(dout_BTHV, L).reshape(B, blocks.T, -1)
    dquery, dkey, dvalue, dsum, dstate = _call(
        _backward_kernel, "linear_attention_backward", blocks, interpret,
        in_specs=[
            blocks.spec(kind)
            for kind in ("keys", "keys", "values", "columns", "rows", "states", "values", "state")
        ],
        out_specs=tuple(blocks.spec(kind) for kind in ("dkeys", "dkeys", "values", "dsum", "state")),
        out_shape=(
            dkeys, dkeys, jax.ShapeDtypeStruct((B, blocks.T, blocks.H * blocks.V), value.dtype),
            jax.ShapeDtypeStruct((B, N, blocks.T, blocks.J), jnp.float32),
            jax.ShapeDtypeStruct(dlast_BHKV.shape, jnp.float32),
        ),
    )(*_padded_inputs(query, key, value, log_BTH, reset_BT, blocks), states_BCHKV, dout_BTX, dlast_BHKV)  # fmt: skip

    def per_group(dx_BNTX: jax.Array) -> jax.Array:
        if blocks.has_own:
            return dx_BNTX[:, :, :T].transpose(0, 2, 1, 3).reshape(B, T, 1, blocks.G, K)
        # The blocks of a group are consecutive.
        return dx_BNTX[:, :, :T].reshape(B, blocks.G, -1, T, K).transpose(0, 3, 2, 1, 4)

    dsum_BTH = dsum.transpose(0, 2, 1, 3).reshape(B, blocks.T, blocks.H)
    return per_group(dquery), per_group(dkey), dvalue[:, :T].reshape(value.shape), dsum_BTH, dstate


# ------------------------------------------------------------------------------------------------ the kernels


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The matmul over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``, float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


class _Decays(NamedTuple):
    """Products of the decays of a chunk, for a block of heads.

    Attributes:
        is_pair: [L, L], whether step t (row) reads step s (column): s <= t, in the same segment.
        columns, rows: b_t, [L, J] and [J, L].
        prefix: [L, J], of all steps up to and including t. 0 after a reset.
        suffix, suffix_rows: [L, J] and [J, L], of all steps after t. 0 before a reset.
        total: [1, J], of all steps.
    """

    is_pair: jax.Array
    columns: jax.Array
    rows: jax.Array
    prefix: jax.Array
    suffix: jax.Array
    suffix_rows: jax.Array
    total: jax.Array

    def pairs(self, head: int) -> jax.Array:
        """The products of the decays of steps s + 1 to t for one head, [L, L]; 0 if t does not read s."""
        difference = self.columns[:, head : head + 1] - self.rows[head : head + 1]
        return jnp.exp(jnp.where(self.is_pair, difference, -jnp.inf))


def _decays(columns: Any, rows: Any, J: int) -> _Decays:
    """The products of decays, from the blocks ``columns`` [L, J + 1] and ``rows`` [J + 1, L]."""
    b_t, segment_t, b_s, segment_s = columns[:, :J], columns[:, J:], rows[:J], rows[J:]
    L = b_t.shape[0]
    t, s = (lax.broadcasted_iota(jnp.int32, (L, L), axis) for axis in (0, 1))
    b_last, last_segment = b_t[-1:], segment_t[-1:]
    prefix = jnp.where(segment_t == 0, jnp.exp(b_t), 0.0)
    return _Decays(
        (t >= s) & (segment_t == segment_s), b_t, b_s, prefix,
        jnp.where(segment_t == last_segment, jnp.exp(b_last - b_t), 0.0),
        jnp.where(segment_s == last_segment, jnp.exp(b_s[:, -1:] - b_s), 0.0),
        prefix[-1:],
    )  # fmt: skip


def _forward_kernel(
    blocks: _Blocks, query: Any, key: Any, value: Any, columns: Any, rows: Any, first: Any, out: Any, last: Any,
    states: Any, carry: Any,
) -> None:  # fmt: skip
    """Compute a chunk of a block of heads. ``carry``: the state after the previous chunk."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def initialize() -> None:
        carry[...] = first[...]

    states[...] = carry[...]
    J, K, V, dtype = blocks.J, blocks.K, blocks.V, value.dtype
    decays, outputs = _decays(columns, rows, J), []
    for head in range(J):
        if blocks.has_own or head == 0:
            q, k = query[:, head * K : (head + 1) * K], key[:, head * K : (head + 1) * K]
            scores, k_transposed = _dot(q, k, (1, 1)), k.T.astype(jnp.float32)
        v, state, column = value[:, head * V : (head + 1) * V], carry[head], slice(head, head + 1)
        from_state = decays.prefix[:, column] * _dot(q, state.astype(dtype), (1, 0))
        outputs.append(_dot((scores * decays.pairs(head)).astype(dtype), v, (1, 0)) + from_state)
        scaled_key = (k_transposed * decays.suffix_rows[column]).astype(dtype)
        carry[head] = decays.total[:, column] * state + _dot(scaled_key, v, (1, 0))
    out[...] = jnp.concatenate(outputs, axis=1).astype(dtype)
    last[...] = carry[...]


def _backward_kernel(
    blocks: _Blocks, query: Any, key: Any, value: Any, columns: Any, rows: Any, states: Any, dout: Any, dlast: Any,
    dquery: Any, dkey: Any, dvalue: Any, dsum: Any, dstate: Any, carry: Any,
) -> None:  # fmt: skip
    """Compute the gradients of a chunk. ``carry``: the gradient of the state after the chunk."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(2) == 0)
    def initialize() -> None:
        carry[...] = dlast[...]

    J, K, V, L, dtype = blocks.J, blocks.K, blocks.V, blocks.L, value.dtype
    is_last_row = lax.broadcasted_iota(jnp.int32, (L, 1), 0) == L - 1
    decays = _decays(columns, rows, J)
    dq_heads, dk_heads, dv_heads, dsum_heads = [], [], [], []
    for head in range(J):
        if blocks.has_own or head == 0:
            q, k = query[:, head * K : (head + 1) * K], key[:, head * K : (head + 1) * K]
            scores, q_transposed = _dot(q, k, (1, 1)), q.T
        v, dy = value[:, head * V : (head + 1) * V], dout[:, head * V : (head + 1) * V]
        column = slice(head, head + 1)
        pairs, state, dafter = decays.pairs(head), states[head], carry[head]
        prefix, suffix, total = decays.prefix[:, column], decays.suffix[:, column], decays.total[:, column]
        state_in, dafter_in = state.astype(dtype), dafter.astype(dtype)
        weights = (scores * pairs).astype(dtype)
        dscores = (_dot(dy, v, (1, 1)) * pairs).astype(dtype)
        y = _dot(weights, v, (1, 0)) + prefix * _dot(q, state_in, (1, 0))
        dq_heads.append(_dot(dscores, k, (1, 0)) + prefix * _dot(dy, state_in, (1, 1)))
        dk_heads.append(_dot(dscores, q, (0, 0)) + suffix * _dot(v, dafter_in, (1, 1)))
        dv_of_state = suffix * _dot(k, dafter_in, (1, 0))
        dv = _dot(weights, dy, (0, 0)) + dv_of_state
        # The gradient of b_t. The last b_t also gets the inner product of the state after the chunk and its gradient.
        v32, dy32 = v.astype(jnp.float32), dy.astype(jnp.float32)
        last = total * jnp.sum(state * dafter, keepdims=True) + jnp.sum(v32 * dv_of_state, keepdims=True)
        db = jnp.sum(y * dy32 - v32 * dv, axis=1, keepdims=True)
        dsum_heads.append(jnp.where(is_last_row, db + last, db))
        dv_heads.append(dv)
        carry[head] = total * dafter + _dot(q_transposed, (prefix * dy32).astype(dtype), (1, 0))
    join = functools.partial(jnp.concatenate, axis=1) if blocks.has_own else sum
    dquery[...], dkey[...] = join(dq_heads), join(dk_heads)
    dvalue[...] = jnp.concatenate(dv_heads, axis=1).astype(dtype)
    dsum[...] = jnp.concatenate(dsum_heads, axis=1)
    dstate[...] = carry[...]

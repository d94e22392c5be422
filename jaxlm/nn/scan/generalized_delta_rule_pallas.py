"""Pallas kernels for the generalized delta rule with bounded log decays, and for its gradients, on TPU.

The equations of a chunk are those of ``_generalized_chunk`` and ``_bounded_scores`` in delta_rule.py. A kernel keeps
the scores, the inverse of the triangular system and the states in VMEM. The backward kernel differentiates the function
of the forward kernel (:func:`_compute_chunk`) by autodiff. ``head_blocks`` defines the blocks of heads.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values, C chunks, L steps of a chunk, N blocks
of heads, J heads of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn.custom_gradient import custom_vjp, vary_equally
from jaxlm.nn.linear import dot
from jaxlm.nn.scan.delta_rule_pallas import accurate_dot, invert_unit_lower
from jaxlm.nn.scan.head_blocks import (
    CHUNK_STATES_AXES,
    HEAD_AXES,
    STATE_AXES,
    Blocks,
    call_kernel,
    make_blocks,
    split_non_finite,
)
from jaxlm.nn.time_chunks import pad_axis

CHUNK = 64
"""L. The scores of two queries and two keys per step are then a matrix of 128 x 128."""


def vmem_bytes(J: int, K: int, V: int, itemsize: int) -> int:
    """Estimate of the bytes in VMEM of the backward kernel for a block of J heads; see ``head_blocks.vmem_bytes``.

    The inputs and outputs are twelve arrays of the size of the keys (four of them float32), three of the size of the
    values, three of the size of the states, and the segments. Each of them has two buffers. The carry is another array
    of the size of the states. For each head, the intermediate results take about as much memory as ten matrices of
    scores. :func:`_column` has a matrix of K x K.
    """
    padded_V = -(-V // LANES) * LANES
    float32_entries = 2 * CHUNK * (4 * J * K + LANES) + 7 * J * K * padded_V + 10 * J * (2 * CHUNK) ** 2 + K * K
    return 2 * CHUNK * J * (8 * K + 3 * V) * itemsize + 4 * float32_entries


def run(
    inputs: Sequence[jax.Array],
    state_BHKV: jax.Array | None,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs [B, T, H, V] in the dtype of the values, and the last state [B, H, K, V] float32.

    Args:
        inputs: queries and keys [B, T, H, K], values [B, T, H, V], log decays, a and b [B, T, H, K].
        state_BHKV, reset_BT, keep_BT: as in ``generalized_delta_rule``.
    """
    query, _, value, *_ = inputs
    (B, T, H, K), dtype, padding = query.shape, value.dtype, -query.shape[1] % CHUNK
    if state_BHKV is None:
        state_BHKV = jnp.zeros_like(query[:, 0, :, :, None] * value[:, 0, :, None], jnp.float32)
    # A TPU pads a last axis of K entries to 128, so the masks are applied to arrays with merged axes H and K.
    flat = [sharding.constrain(x.reshape(B, T, -1), ("batch", None, "heads")) for x in inputs]
    flat[3] = flat[3].astype(jnp.float32)
    if keep_BT is not None:
        flat = [jnp.where(keep_BT[..., None], x, 0) for x in flat]
    segment_BT1 = jnp.zeros((B, T + padding, 1), jnp.float32)
    if reset_BT is not None:
        reset_BT = reset_BT if keep_BT is None else reset_BT & keep_BT
        for index in (3, 4):  # at a reset, the log decay and a are 0
            flat[index] = jnp.where(reset_BT[..., None], 0, flat[index])
        resets_BCL = pad_axis(reset_BT.astype(jnp.float32), 0, padding).reshape(B, -1, CHUNK)
        segment_BT1 = jnp.cumsum(resets_BCL, axis=2).reshape(B, -1, 1)
    query, key, value, log_BTX, a, b = (pad_axis(x, 0, padding) for x in flat)
    # The sums are a matmul with ones, because ``cumsum`` is slow on a TPU. With a batch axis (A, of size 1), the policy
    # of remat="dots" does not save the result.
    log_ABCLX, is_read_ALM = log_BTX.reshape(1, B, -1, CHUNK, H * K), jnp.tri(CHUNK)[None]
    sums_ABCLX = jnp.einsum("ALM,ABCMX->ABCLX", is_read_ALM, log_ABCLX, precision=lax.Precision.HIGHEST)
    sums_BTX = sums_ABCLX.reshape(log_BTX.shape)
    arrays = *(x.astype(dtype) for x in (query, key, value, a, b)), sums_BTX, sums_BTX - log_BTX
    per_head = [x.reshape(*x.shape[:2], H, -1) for x in arrays]
    out_BTHV, last_BHKV = _run(*vary_equally(((*per_head, segment_BT1), state_BHKV.astype(jnp.float32))))
    return out_BTHV[:, :T], last_BHKV


def _compute_chunk(
    segment_L1: jax.Array, states: Sequence[jax.Array], heads: Sequence[tuple[jax.Array, ...]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The outputs [L, V] of the steps of a chunk, and the states [K, V] after the chunk, for each head of a block.

    Args:
        segment_L1: the number of resets of the chunk up to and including each step, float32.
        states: the state before the chunk of each head, finite.
        heads: for each head, query, key, value, a, b, and two arrays of sums of log decays. At each step, the first
            array has the sum over the steps of the chunk up to and including this step, and the second array has the
            sum over the earlier steps only.
    """
    L, dtype = segment_L1.shape[0], heads[0][2].dtype
    # The first L rows and columns are for q and k, the others for a and b.
    row, column = (lax.broadcasted_iota(jnp.int32, (2 * L, 2 * L), axis) for axis in (0, 1))
    t, s = row % L, column % L
    segment_t = jnp.concatenate([segment_L1] * 2, axis=0)
    segment_s = jnp.sum(jnp.where(row == column, segment_t, 0.0), axis=0, keepdims=True)
    is_read = (segment_t == segment_s) & ((s < t) | ((s == t) & (row < L)))
    has_no_reset, has_last_segment = segment_L1 == 0.0, segment_L1 == segment_L1[-1:]
    reads, scores, written = [], [], []
    for state, (q, k, _, a, b, sums, sums_before) in zip(states, heads, strict=True):
        q, k, a, b = (x.astype(jnp.float32) for x in (q, k, a, b))
        middle = lax.stop_gradient(sums[(L - 1) // 2 :][:1])
        queries = jnp.concatenate([q * jnp.exp(sums - middle), a * jnp.exp(sums_before - middle)], axis=0)
        keys = jnp.concatenate([k, b], axis=0) * jnp.concatenate([jnp.exp(middle - sums)] * 2, axis=0)
        scores.append(jnp.where(is_read, _dot(queries, keys, (1, 1), dtype), 0.0))
        prefix, prefix_before = (jnp.where(has_no_reset, jnp.exp(x), 0.0) for x in (sums, sums_before))
        suffix = jnp.where(has_last_segment, jnp.exp(sums[-1:] - sums), 0.0)
        reads.append(_dot(jnp.concatenate([q * prefix, a * prefix_before], axis=0), state, (1, 0), dtype))
        written.append((jnp.concatenate([k * suffix, b * suffix], axis=0), prefix[-1:]))
    rights = [
        read[L:] + _dot(score[L:, :L], head[2], (1, 0), dtype)
        for read, score, head in zip(reads, scores, heads, strict=True)
    ]
    solutions = _solve(dtype, [-score[L:, L:] for score in scores], rights)
    outs, new_states = [], []
    for state, head, read, score, (keys, total), u in zip(
        states, heads, reads, scores, written, solutions, strict=True
    ):
        values = jnp.concatenate([head[2].astype(jnp.float32), u], axis=0)
        outs.append(read[:L] + _dot(score[:L], values, (1, 0), dtype))
        new_states.append(_column(total) * state + _dot(keys, values, (0, 0), dtype))
    return outs, new_states


def _column(x_1K: jax.Array) -> jax.Array:
    """The row ``x`` as a column, [K, 1]."""
    K = x_1K.shape[1]
    is_diagonal = lax.broadcasted_iota(jnp.int32, (K, K), 0) == lax.broadcasted_iota(jnp.int32, (K, K), 1)
    return jnp.sum(jnp.where(is_diagonal, x_1K, 0.0), axis=1, keepdims=True)


def _dot_forward(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: DTypeLike) -> Any:
    """The matmul over axis ``contract[0]`` of x and ``contract[1]`` of y, float32.

    The inputs of the matmul are cast to ``dtype``, and so are the inputs of the matmuls of its gradients.
    """
    return dot(x.astype(dtype), y.astype(dtype), contract), (x, y)


def _dot_backward(contract: tuple[int, int], dtype: DTypeLike, saved: Any, dout: jax.Array) -> Any:
    x, y = saved
    x_in, y_in, dout_in = (z.astype(dtype) for z in (x, y, dout))
    x_axis, y_axis = contract
    dx = dot(dout_in, y_in, (1, 1 - y_axis)) if x_axis == 1 else dot(y_in, dout_in, (1 - y_axis, 1))
    dy = dot(x_in, dout_in, (1 - x_axis, 0)) if y_axis == 0 else dot(dout_in, x_in, (0, 1 - x_axis))
    return dx.astype(x.dtype), dy.astype(y.dtype)


_dot = custom_vjp.from_rules(_dot_forward, _dot_backward, (2, 3))


def _solve_forward(dtype: DTypeLike, lowers: list[jax.Array], rights: list[jax.Array]) -> Any:
    """The solution u of ``u + lower @ u = right`` for each strictly lower triangular matrix [L, L], float32."""
    inverse = invert_unit_lower(lowers, dtype)
    solutions = [accurate_dot(x, right, dtype) for x, right in zip(inverse, rights, strict=True)]
    return solutions, (inverse, solutions)


def _solve_backward(dtype: DTypeLike, saved: Any, dsolutions: list[jax.Array]) -> Any:
    inverse, solutions = saved
    drights = [accurate_dot(x, dsolution, dtype, (0, 0)) for x, dsolution in zip(inverse, dsolutions, strict=True)]
    # The caller sets the entries on and above the diagonal to zeros.
    return [-accurate_dot(dright, u, dtype, (1, 1)) for dright, u in zip(drights, solutions, strict=True)], drights


_solve = custom_vjp.from_rules(_solve_forward, _solve_backward, (0,))


def _heads_of_block(blocks: Blocks, references: Sequence[Any]) -> list[tuple[jax.Array, ...]]:
    """For each head of a block, its columns of each array [L, J * X]."""

    def columns(reference: Any, head: int) -> jax.Array:
        width = reference.shape[1] // blocks.J
        return reference[:, head * width : (head + 1) * width]

    return [tuple(columns(reference, head) for reference in references) for head in range(blocks.J)]


def _forward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute a chunk for a block of heads. ``carry``: the state after the previous chunk."""
    *inputs, segment, out, states, carry = references
    states[...] = carry[...]
    before = [split_non_finite(carry[head]) for head in range(blocks.J)]
    segment_L1 = segment[...]
    outs, new_states = _compute_chunk(segment_L1, [state for state, _ in before], _heads_of_block(blocks, inputs))
    is_before_reset = segment_L1 == 0.0
    for head, (_, nan_row) in enumerate(before):
        outs[head] += jnp.where(is_before_reset, nan_row, 0.0)
        carry[head] = new_states[head] + jnp.where(is_before_reset[-1:], nan_row, 0.0)
    out[...] = jnp.concatenate(outs, axis=1).astype(out.dtype)


def _backward_kernel(blocks: Blocks, *references: Any) -> None:
    """Compute the gradients of a chunk for a block of heads. ``carry``: the gradient of the state after the chunk."""
    num_inputs = len(_INPUTS) + 2
    *inputs, segment, states, dout = references[:num_inputs]
    *gradients, carry = references[num_inputs:]
    before = [split_non_finite(states[head])[0] for head in range(blocks.J)]
    heads = _heads_of_block(blocks, inputs)
    _, pull_back = jax.vjp(functools.partial(_compute_chunk, segment[...]), before, heads)
    douts = [dy.astype(jnp.float32) for (dy,) in _heads_of_block(blocks, [dout])]
    dbefore, dheads = pull_back((douts, [carry[head] for head in range(blocks.J)]))
    for head, dstate in enumerate(dbefore):
        carry[head] = dstate
    for reference, parts in zip(gradients, zip(*dheads, strict=True), strict=True):
        reference[...] = jnp.concatenate(parts, axis=1).astype(reference.dtype)


_INPUTS = ("keys", "keys", "values", "keys", "keys", "keys", "keys", "segments")
"""The kinds (``Blocks.array``) of query, key, value, a, b, the two sums of log decays, and the segments."""
_AXES = (*[HEAD_AXES] * 7, (*HEAD_AXES[:2], None))
"""The logical axes of the inputs. The segments are [B, T, 1]."""


def _flat(inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The inputs with merged axes of heads and widths, and the segments."""
    return [*(x.reshape(*x.shape[:2], -1) for x in inputs[:-1]), inputs[-1]]


def _forward(inputs: Any, state_BHKV: jax.Array, *, save_states: bool = True) -> Any:
    mapped = sharding.map_shards(
        functools.partial(_device_forward, save_states),
        [*_AXES, STATE_AXES],
        [HEAD_AXES, STATE_AXES, CHUNK_STATES_AXES],
    )
    out_BTHV, last_BHKV, states_BCHKV = mapped(*inputs, state_BHKV)
    return (out_BTHV, last_BHKV), (inputs, states_BCHKV)


def _device_forward(save_states: bool, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs of one device, the last state, and (only with ``save_states``) the state before each chunk."""
    *inputs, state_BHKV = arrays
    query, value = inputs[0], inputs[2]
    blocks = make_blocks(query, value, CHUNK, False, vmem_bytes)
    states = "states" if save_states else "one state"
    outputs = [("values", value.dtype), (states, jnp.float32), ("state", jnp.float32)]
    run = call_kernel(_forward_kernel, "generalized_delta_rule", blocks, (*_INPUTS, "state"), outputs)
    out_BTX, states_BCHKV, last_BHKV = run(*_flat(inputs), state_BHKV)
    return out_BTX.reshape(value.shape), last_BHKV, states_BCHKV


def _backward(saved: Any, cotangents: Any) -> Any:
    inputs, states_BCHKV = saved
    mapped = sharding.map_shards(
        _device_backward, [*_AXES, CHUNK_STATES_AXES, HEAD_AXES, STATE_AXES], [*[HEAD_AXES] * 7, STATE_AXES]
    )
    *gradients, dstate_BHKV = mapped(*inputs, states_BCHKV, *cotangents)
    return (*gradients, None), dstate_BHKV


def _device_backward(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The gradients of the inputs of one device (without the segments), and of the state before the first step."""
    *inputs, states_BCHKV, dout_BTHV, dlast_BHKV = arrays
    blocks = make_blocks(inputs[0], inputs[2], CHUNK, True, vmem_bytes)
    outputs = [*((kind, x.dtype) for kind, x in zip(_INPUTS[:-1], inputs[:-1], strict=True)), ("state", jnp.float32)]
    kinds = (*_INPUTS, "states", "values", "state")
    run = call_kernel(_backward_kernel, "generalized_delta_rule_backward", blocks, kinds, outputs)
    dout_BTX = dout_BTHV.reshape(*dout_BTHV.shape[:2], -1)
    *gradients, dstate_BHKV = run(*_flat(inputs), states_BCHKV, dout_BTX, dlast_BHKV)
    return *(dx.reshape(x.shape) for dx, x in zip(gradients, inputs[:-1], strict=True)), dstate_BHKV


_run = custom_vjp.from_rules(_forward, _backward, (), functools.partial(_forward, save_states=False))

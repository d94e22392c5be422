"""Pallas kernels for LSTM and GRU layers on TPU: one kernel runs all steps, and the hidden weights stay in VMEM.

Without the kernel, XLA runs several operations per step, and each of them reads its arguments from HBM and writes its
results to HBM. The kernel keeps the state and the gates of a step in VMEM. Some results need no loop over steps: the
contribution of the inputs to the gates, the gradients of the weights and the gradient of the inputs. Matmuls over all
steps compute them outside the kernel.

In the kernels, the last two axes of states and gates are the rows of the batch and the hidden width, because a TPU
stores the last two axes in tiles (float32: 8 x 128, bfloat16: 16 x 128). Second derivatives are not supported.

Shapes: B batch, T time, D input width, G gates, H hidden width (K: the same width, on the output axis of
``weight_hidden``), R rows and C steps of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot
from jaxlm.nn.recurrence.chunked import State, Weights, gru_gradients, lstm_gradients

MAX_WEIGHT_BYTES = 32 * 2**20
"""Maximum number of bytes of the hidden weights. They must fit into VMEM together with the other arrays."""
MIN_STEPS = 8
"""Minimum number of steps. With fewer steps, such as in decoding, the transpose of the hidden weights before the kernel
takes longer than the steps."""
MAX_BLOCK_STEPS = 4
"""Maximum number of steps of a block."""
MAX_UNROLLED_WEIGHTS = 2**24
"""Maximum product of the number of hidden weights and the number of steps of a block, if a block has several steps. The
steps of a block are unrolled. With a larger product, the program is so large that it takes minutes to compile. A
float32 weight counts as four weights, because a float32 matmul has about four times as many instructions as a bfloat16
matmul."""
MAX_BLOCK_ROWS = 256
"""Maximum number of rows of a block."""
MAX_BLOCK_ENTRIES = 128 * 1024
"""Maximum number of entries of an array [R, H] of a block, with H rounded up to a multiple of 128. About 50 such arrays
are in VMEM."""
ROW_TILE = 16
"""If there are several blocks of rows, the number of rows of a block is a multiple of this number, which is the number
of rows of a bfloat16 tile."""
VMEM_LIMIT_BYTES = {"TPU v5": 56 * 2**20, "TPU7x": 56 * 2**20}
"""Bytes of VMEM that a kernel may use, by device kind. "TPU v5" is a TPU v5p."""
DEFAULT_VMEM_LIMIT_BYTES = 100 * 2**20
"""The same limit for all other device kinds. A core of a TPU v5e or v6e has 128 MiB of VMEM."""
NUM_STORED_ARRAYS = 4
"""Number of arrays that a step stores for the backward pass. LSTM: i, f, g and o; the cell before the step is stored
separately. GRU: r, z, n, and the product of the state with the hidden weights of n, plus ``bias_hidden``. The backward
pass of a step returns the same number of gradients."""

Kind = Literal["lstm", "gru"]
"""``gru``: the reset gate is applied after the product with the hidden weights."""


def unsupported_reason(weights: Weights, x_BTD: jax.Array) -> str | None:
    """Why the kernel does not support the arguments, as a part of an error message; None if it supports them."""
    weight, (batch, steps, _) = weights["weight_hidden"], x_BTD.shape
    rows, width, size = batch // sharding.num_shards(("batch",)), weight.shape[0], weight.size * x_BTD.dtype.itemsize
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if weight.shape[1] == 3 and "bias_hidden" not in weights:
        return "does not support a GRU whose reset gate is applied before the product"
    if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"supports float32 and bfloat16, not {x_BTD.dtype}"
    if precision not in (None, "default", "highest", "float32"):
        return f"does not support jax_default_matmul_precision={precision!r}"
    if size > MAX_WEIGHT_BYTES:
        return f"supports hidden weights of at most {MAX_WEIGHT_BYTES // 2**20} MiB, got {size / 2**20:.0f} MiB"
    if steps < MIN_STEPS:
        return f"needs at least {MIN_STEPS} steps, got {steps}"
    if not rows:
        return "needs at least one row per device"
    if _block_rows(rows, width) > _max_block_rows(width):
        return f"supports at most {_max_block_rows(width)} rows per device, or a multiple of {ROW_TILE}, got {rows}"
    if sharding.num_shards(("mlp",)) > 1:
        return "does not split the hidden width over devices"
    if sharding.device_kind().startswith(lazy_pallas.OLD_TPUS):
        return "needs a TPU v5 or newer, because older TPUs have too little VMEM"
    return None


Gates = Sequence[jax.Array]
"""Arrays [R, H] float32: one for each gate, or the ``NUM_STORED_ARRAYS`` arrays of a step."""


class _Cell(NamedTuple):
    """The elementwise functions of a cell, for one step and R rows. Arrays are [R, H] float32; a bias is [1, H]."""

    num_gates: int
    forward: Callable[..., tuple[State, Gates]]
    """``forward(inputs, products, bias_hidden, before=state)``: the state after the step, and the ``NUM_STORED_ARRAYS``
    arrays for the backward pass. ``inputs`` are the contributions of the input to the gates, with bias. ``products``
    are the products of the hidden state with the hidden weights. Only a GRU has the argument ``bias_hidden``."""
    backward: Callable[[Gates, State, State], tuple[State, Gates]]
    """``backward(stored, before, dafter)``: the gradient of the state before the step, without its part through the
    hidden weights, and the gradients of the products. ``before`` has one array: the cell of an LSTM or the hidden state
    of a GRU before the step. For a GRU, there is a fourth gradient: the gradient of the contribution of the input to
    gate n. It differs from the gradient of the product, because the reset gate r multiplies only the product."""


class _Static(NamedTuple):
    """The static (trace-time) arguments of the kernels. ``masked``: whether there are resets or padding."""

    kind: Kind
    reverse: bool
    masked: bool


def layer(
    kind: Kind, weights: Weights, x_BTD: jax.Array, first: State, masks: tuple[jax.Array, jax.Array] | None,
    *, reverse: bool = False,
) -> tuple[jax.Array, State]:  # fmt: skip
    """The hidden states [B, T, H] in the dtype of ``x``, and the last state.

    Args:
        kind: the kind of the cell.
        weights, x_BTD, first, masks, reverse: see ``chunked.layer``.
    """
    T = x_BTD.shape[1]
    num_padding = -T % _block_steps(weights["weight_hidden"])
    if num_padding:  # in the order of the kernel, the padding steps come after the last real step
        if masks is None:
            masks = jnp.zeros((*x_BTD.shape[:2], 1), bool), jnp.ones((*x_BTD.shape[:2], 1), bool)
        padding = ((0, 0), (num_padding, 0) if reverse else (0, num_padding), (0, 0))
        x_BTD, reset_BT1, keep_BT1 = (jnp.pad(x, padding) for x in (x_BTD, *masks))
        masks = reset_BT1, keep_BT1
    # One integer per token: bit 0 is set where the state is reset, and bit 1 at real tokens.
    mask_TB1 = None if masks is None else jnp.swapaxes(masks[0] + 2 * masks[1].astype(jnp.int32), 0, 1)
    static = _Static(kind, reverse, mask_TB1 is not None)
    names = ("weight_input", "weight_hidden", "bias", "bias_hidden")
    layer_weights = {name: weights[name] for name in names if name in weights}
    hidden_BTH, last = _layer(static, layer_weights, x_BTD, first, mask_TB1)
    return hidden_BTH[:, num_padding:] if reverse else hidden_BTH[:, :T], last


def _forward(
    static: _Static, weights: Weights, x_BTD: jax.Array, first: State, mask_TB1: Any, *, store: bool = True
) -> tuple[tuple[jax.Array, State], Any]:
    projected_GTBH = jnp.einsum("BTD,DGH->GTBH", x_BTD, weights["weight_input"])
    constants = [jnp.swapaxes(weights["weight_hidden"], 0, 1), weights["bias"][:, None].astype(jnp.float32)]
    if static.kind == "gru":
        constants.append(weights["bias_hidden"][None, None].astype(jnp.float32))
    outputs: list[tuple[int, Any]] = [(1, x_BTD.dtype)]
    if store:
        outputs += [(NUM_STORED_ARRAYS, x_BTD.dtype), *[(1, jnp.float32)] * (len(first) - 1)]
    run = functools.partial(_device_call, static, "forward", outputs)
    last, hidden_1TBH, *stored = _over_devices(run, (projected_GTBH,), mask_TB1, tuple(constants), first)
    hidden_BTH = jnp.swapaxes(hidden_1TBH[0], 0, 1)
    return (hidden_BTH, last), (weights, x_BTD, first, mask_TB1, hidden_1TBH[0], stored)


def _backward(static: _Static, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    weights, x_BTD, first, mask_TB1, hidden_TBH, stored = saved
    doutput_BTH, dlast = cotangents
    first_1BH = first[0][None].astype(hidden_TBH.dtype)
    if static.reverse:
        before_TBH = jnp.concatenate([hidden_TBH[1:], first_1BH])
    else:
        before_TBH = jnp.concatenate([first_1BH, hidden_TBH[:-1]])
    if mask_TB1 is not None:
        before_TBH = jnp.where((mask_TB1 & 1) == 1, jnp.zeros_like(before_TBH), before_TBH)
    if static.kind == "gru":  # an LSTM needs only the cell before the step, which is stored already
        stored = (*stored, before_TBH[None])
    time_arrays = jnp.swapaxes(doutput_BTH, 0, 1)[None], *stored
    weight_GKH = jnp.transpose(weights["weight_hidden"], (1, 2, 0))  # transposed once, not in every step
    run = functools.partial(_device_call, static, "backward", [(NUM_STORED_ARRAYS, x_BTD.dtype)])
    dfirst, sums_GBH, dgates_GTBH = _over_devices(run, time_arrays, mask_TB1, (weight_GKH,), dlast)
    sums_GH = jnp.sum(sums_GBH, axis=1)
    num_gates = _CELLS[static.kind].num_gates
    dweights = {"weight_hidden": jnp.einsum("TBH,GTBK->HGK", before_TBH, dgates_GTBH[:num_gates]), "bias": sums_GH}
    dinputs = [(slice(0, num_gates), dgates_GTBH)]
    if static.kind == "gru":
        dweights |= {"bias": sums_GH[jnp.array([0, 1, 3])], "bias_hidden": sums_GH[2]}
        dinputs = [(slice(0, 2), dgates_GTBH[:2]), (slice(2, 3), dgates_GTBH[3:])]
    parts = [jnp.einsum("BTD,GTBH->DGH", x_BTD, d_GTBH) for _, d_GTBH in dinputs]
    dweights["weight_input"] = jnp.concatenate(parts, axis=1)
    dx_BTD = sum(jnp.einsum("GTBH,DGH->BTD", d_GTBH, weights["weight_input"][:, index]) for index, d_GTBH in dinputs)
    return {name: dweights[name].astype(x.dtype) for name, x in weights.items()}, dx_BTD, dfirst, None


_layer = custom_vjp.from_rules(_forward, _backward, (0,), functools.partial(_forward, store=False))


def _over_devices(
    run: Callable[..., Any], time_arrays: tuple[jax.Array, ...], mask_TB1: Any, constants: tuple[jax.Array, ...],
    state: State,
) -> Any:  # fmt: skip
    """The result of ``run(time_arrays, mask_TB1, constants, state)``. Each device computes it for its own rows.

    Args:
        run: returns a state and arrays [G, B, H] or [G, T, B, H].
        time_arrays: arrays [G, T, B, H].
        constants: arrays that every device reads completely.
    """
    active = sharding.active()
    if active is None:
        return run(time_arrays, mask_TB1, constants, state)
    rows = active.named_sharding(("batch",), (state[0].shape[0],), "rows").spec[0]
    arguments = time_arrays, mask_TB1, constants, state

    def spec(x: Any) -> PartitionSpec:
        """The partition of an array whose rows are the axis before the last one."""
        return PartitionSpec(*[None] * (x.ndim - 2), rows)

    return jax.shard_map(
        run, mesh=active.mesh,
        in_specs=(spec(time_arrays[0]), PartitionSpec(None, rows), PartitionSpec(), spec(state[0])),
        out_specs=jax.tree.map(spec, jax.eval_shape(run, *arguments)), check_vma=False,
    )(*arguments)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the kernels


def _forward_kernel(
    static: _Static, time_arrays: Any, mask: Any, constants: Any, first: Any, last: Any, hidden: Any,
    *stored_and_scratch: Any,
) -> None:  # fmt: skip
    """Run the steps of a block.

    ``stored_and_scratch``: the stored arrays, if any, and the state between blocks (scratch memory).
    """
    (projected,), (weight, bias, *bias_hidden) = time_arrays, constants
    *stored, scratch = stored_and_scratch

    def step(t: int, state: State) -> State:
        before = _after_reset(static, mask, t, state)
        inputs = [projected[gate, t].astype(jnp.float32) + bias[gate] for gate in range(projected.shape[0])]
        products = [_product(before[0], weight[gate]) for gate in range(weight.shape[0])]
        after, values = _CELLS[static.kind].forward(inputs, products, *(x[0] for x in bias_hidden), before=before)
        after = _at_real_tokens(static, mask, t, after, before)
        hidden[0, t] = after[0].astype(hidden.dtype)
        if stored:
            for ref, arrays in zip(stored, (values, before[1:])):
                _write(ref, t, arrays)
        return after

    _run_steps(step, projected.shape[1], static.reverse, first, last, scratch)


def _backward_kernel(
    static: _Static, time_arrays: Any, mask: Any, constants: Any, dlast: Any, dfirst: Any, sums: Any, dgates: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Run the backward pass of the steps of a block. ``sums``: the sum of ``dgates`` over all steps."""
    (doutput, stored, before_ref), (weight,) = time_arrays, constants

    @pl.when(pl.program_id(1) == 0)
    def initialize() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def step(t: int, dstate: State) -> State:
        dafter = (dstate[0] + doutput[0, t].astype(jnp.float32), *dstate[1:])
        dafter_real = _at_real_tokens(static, mask, t, dafter, tuple(jnp.zeros_like(x) for x in dafter))
        values = [stored[i, t].astype(jnp.float32) for i in range(stored.shape[0])]
        dbefore, gradients = _CELLS[static.kind].backward(values, (before_ref[0, t].astype(jnp.float32),), dafter_real)
        _write(dgates, t, gradients)
        for i, x in enumerate(gradients):
            sums[i] += x
        products = [_product(gradients[gate], weight[gate]) for gate in range(weight.shape[0])]
        dbefore = (dbefore[0] + functools.reduce(jnp.add, products), *dbefore[1:])
        return _after_reset(static, mask, t, _at_real_tokens(static, mask, t, dbefore, dafter))

    _run_steps(step, doutput.shape[1], not static.reverse, dlast, dfirst, scratch)


def _run_steps(
    step: Callable[[int, State], State], count: int, reverse: bool, first: Any, last: Any, scratch: Any
) -> None:
    """Run the steps of a block. ``scratch`` keeps the state from one block of steps to the next one."""

    @pl.when(pl.program_id(1) == 0)
    def initialize() -> None:
        for ref, x in zip(scratch, first, strict=True):
            ref[...] = x[...]

    state = tuple(x[...] for x in scratch)
    for t in reversed(range(count)) if reverse else range(count):
        state = step(t, state)
    for ref, x in zip(scratch, state, strict=True):
        ref[...] = x

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def write_last() -> None:
        for ref, x in zip(last, state, strict=True):
            ref[...] = x


def _after_reset(static: _Static, mask: Any, t: int, state: State) -> State:
    return tuple(jnp.where((mask[t] & 1) == 1, 0.0, x) for x in state) if static.masked else state


def _at_real_tokens(static: _Static, mask: Any, t: int, new: State, old: State) -> State:
    """``new`` at real tokens, ``old`` at padding."""
    return tuple(jnp.where(mask[t] >= 2, a, b) for a, b in zip(new, old, strict=True)) if static.masked else new


def _write(ref: Any, t: int, arrays: Gates) -> None:
    for i, x in enumerate(arrays):
        ref[i, t] = x.astype(ref.dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return dot(x.astype(weight.dtype), weight, (1, 0))


# ------------------------------------------------------------------------------------------------- the cells


def _lstm_forward(inputs: Gates, products: Gates, *, before: State) -> tuple[State, Gates]:
    i, f, g, o = (x + y for x, y in zip(inputs, products, strict=True))
    i, f, g, o = _sigmoid(i), _sigmoid(f), jnp.tanh(g), _sigmoid(o)
    cell = f * before[1] + i * g
    return (o * jnp.tanh(cell), cell), (i, f, g, o)


def _lstm_backward(stored: Gates, before: State, dafter: State) -> tuple[State, Gates]:
    dcell, gradients = lstm_gradients(stored, before[0], dafter)
    return (jnp.zeros_like(dcell), dcell), gradients


def _gru_forward(inputs: Gates, products: Gates, bias_hidden: jax.Array, *, before: State) -> tuple[State, Gates]:
    r, z = (_sigmoid(x + y) for x, y in zip(inputs[:2], products[:2], strict=True))
    hidden_n = products[2] + bias_hidden
    n = jnp.tanh(inputs[2] + r * hidden_n)
    return ((1.0 - z) * n + z * before[0],), (r, z, n, hidden_n)


def _gru_backward(stored: Gates, before: State, dafter: State) -> tuple[State, Gates]:
    dhidden, gradients = gru_gradients(stored, before[0], dafter[0])
    return (dhidden,), gradients


def _sigmoid(x: jax.Array) -> jax.Array:
    """The sigmoid, with one transcendental operation."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


_CELLS = {"lstm": _Cell(4, _lstm_forward, _lstm_backward), "gru": _Cell(3, _gru_forward, _gru_backward)}


# ------------------------------------------------------------------------------------------- call of a kernel


def _device_call(
    static: _Static, name: Literal["forward", "backward"], outputs: Sequence[tuple[int, Any]], time_arrays: Any,
    mask_TB1: Any, constants: Any, state: State,
) -> tuple[Any, ...]:  # fmt: skip
    """The results of a kernel for the rows of one device: a state, the sums (only for ``backward``), and arrays.

    Args:
        outputs: for each array [size, T, B, H] of the results, its size and dtype.
        state: the state before the first step; for ``backward``, the gradient of the state after the last step.
    """
    _, T, B, _ = time_arrays[0].shape
    H = state[0].shape[1]
    R, C = _block_rows(B, H), _block_steps(constants[0])
    from_last = static.reverse == (name == "forward")

    def index(t: Any) -> Any:
        return T // C - 1 - t if from_last else t

    def time_block(size: int) -> Any:
        return pl.BlockSpec((size, C, R, H), lambda b, t: (0, index(t), b, 0))

    def constant(x: jax.Array) -> Any:
        return pl.BlockSpec(x.shape, lambda b, t: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((*sizes, B, H), dtype)

    states = tuple(pl.BlockSpec((R, H), lambda b, t: (b, 0)) for _ in state)
    has_sums = name == "backward"
    sums = [pl.BlockSpec((NUM_STORED_ARRAYS, R, H), lambda b, t: (0, b, 0))] if has_sums else []
    return pl.pallas_call(
        functools.partial(_KERNELS[name], static), name=f"{static.kind}_{name}", grid=(B // R, T // C),
        interpret=lazy_pallas.INTERPRET,
        in_specs=(
            tuple(time_block(x.shape[0]) for x in time_arrays),
            None if mask_TB1 is None else pl.BlockSpec((C, R, 1), lambda b, t: (index(t), b, 0)),
            tuple(constant(x) for x in constants), states,
        ),
        out_specs=(states, *sums, *(time_block(size) for size, _ in outputs)),
        out_shape=(
            tuple(shape() for _ in state), *([shape(NUM_STORED_ARRAYS)] if has_sums else []),
            *(shape(size, T, dtype=dtype) for size, dtype in outputs),
        ),
        scratch_shapes=(tuple(pltpu.VMEM((R, H), jnp.float32) for _ in state),),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES.get(sharding.device_kind(), DEFAULT_VMEM_LIMIT_BYTES),
        ),
    )(time_arrays, mask_TB1, constants, state)  # fmt: skip


_KERNELS: dict[str, Callable[..., None]] = {"forward": _forward_kernel, "backward": _backward_kernel}


def _max_block_rows(H: int) -> int:
    return min(MAX_BLOCK_ROWS, MAX_BLOCK_ENTRIES // (-(-H // LANES) * LANES))


def _block_rows(B: int, H: int) -> int:
    """R, the number of rows of a block: B, if B is allowed; otherwise the largest allowed multiple of ROW_TILE that
    divides B. If there is no such multiple, the result is B, which ``unsupported_reason`` rejects."""
    largest = _max_block_rows(H)
    if largest >= B:
        return B
    return max((R for R in range(ROW_TILE, largest + 1, ROW_TILE) if B % R == 0), default=B)


def _block_steps(weight: jax.Array) -> int:
    """C, the number of steps of a block."""
    num_weights = weight.size * (4 if weight.dtype == jnp.float32 else 1)
    return max(1, min(MAX_BLOCK_STEPS, MAX_UNROLLED_WEIGHTS // num_weights))

"""The implementation ``chunked`` of LSTM and GRU layers: a loop over chunks of time, with a custom gradient.

The forward pass of a chunk multiplies all its inputs with the input weights in one matmul. Then it loops over the steps
of the chunk. The backward pass of a chunk loops over the steps in reverse order. Then it computes the weight gradients
of the chunk with matmuls over all its steps. So these matmuls are large, and the arrays of a chunk stay in the cache of
a CPU. With autodiff, the loop over steps would carry the weight gradients and update them in each step; here, it does
not. With a single chunk, this is the usual implementation: one matmul for all inputs before the loop.

The backward pass needs the gates of each step, and the cells of an LSTM. With ``remat``, the forward pass does not
store the gates. The backward pass recomputes them from the inputs and the hidden states before the steps. All hidden
states are stored, because they are the output of the layer. So one matmul with the input weights and one with the
hidden weights (two with ``reset="before"``) recompute the gates of all steps of a chunk, without a loop.

One ``tanh`` computes the nonlinearities of all gates of an LSTM step, or of the gates r and z of a GRU step, with
``sigmoid(x) = tanh(x / 2) / 2 + 1 / 2``. If each gate had a separate nonlinearity, XLA would compute it again in every
fusion that reads the gate.

Shapes: B batch, T time, C steps of a chunk, D input width, G gates (LSTM 4, GRU 3), H hidden width (K: the same width,
on the output axis of ``weight_hidden``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm import sharding
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.segments import Masks, keep_state, reset_state
from jaxlm.nn.time_chunks import loop_over_chunks

Weights = dict[str, Any]
"""``weight_input`` [D, G, H] and ``weight_hidden`` [H, G, K] in the compute dtype; ``bias`` [G, H] and, for a GRU with
the reset after the product, ``bias_hidden`` [H], both in the dtype of the parameters."""
State = tuple[jax.Array, ...]
"""``(hidden,)`` or ``(hidden, cell)``, [..., H] float32."""
SavedGates = tuple[jax.Array, ...]
"""The result of ``Cell.gates``: the gates of a step and, for ``GRU_AFTER``, the product of the state with the hidden
weights of gate n, plus ``bias_hidden``. The backward pass reads these arrays; with ``remat``, it recomputes them."""
InputContribution = Callable[[int, int], jax.Array]
"""``projected(begin, end)``: the contribution of the inputs, without bias, to the gates with the indices ``begin`` to
``end - 1``, [..., end - begin, H]."""
TransposedProduct = Callable[[jax.Array], jax.Array]
"""A function that multiplies with transposed weights. For the product of a state with hidden weights, it returns the
gradient of the state [B, H] for the gradient of the product [B, G, K]."""


class Cell(NamedTuple):
    """The functions of a recurrent cell, for arrays of one step [B, ...] or of a chunk [B, C, ...]."""

    gates_per_matmul: tuple[int, ...]
    """The number of gates of each matmul of a state with hidden weights. For example, (2, 1) means one matmul for the
    gates r and z and a second matmul for n. ``weight_hidden`` is split into one part per matmul."""
    gates: Callable[[Weights, InputContribution, jax.Array], SavedGates]
    """``gates(weights, projected, hidden)``: the gates of a step, or of all steps of a chunk. ``hidden`` is the hidden
    state before each of these steps."""
    advance: Callable[[SavedGates, State], State]
    """``advance(gates, before)``: the state after the step."""
    backward: Callable[[tuple[TransposedProduct, ...], SavedGates, State, State], tuple[Any, ...]]
    """``backward(transposes, gates, before, dafter)`` of one step: the gradient of the state before the step, the
    gradient of the products of the state with the hidden weights [B, G, H], and, for ``GRU_AFTER``, another array that
    ``dprojected`` needs. ``before`` is the state before the step, and ``dafter`` is the gradient of the state after the
    step. Here, ``gates`` has a separate array [B, H] for each gate."""
    dprojected: Callable[..., jax.Array]
    """``dprojected(dproduct, ...)``: the gradient of the contribution of the inputs. The arguments are the results of
    ``backward`` after the first one, for all steps of a chunk."""
    dweights: Callable[[SavedGates, jax.Array, jax.Array], Weights]
    """``dweights(gates, hidden, dproduct)``: the gradients of ``weight_hidden`` and, for ``GRU_AFTER``, of
    ``bias_hidden``, summed over the steps of a chunk."""


def layer(
    cell: Cell,
    weights: Weights,
    x_BTD: jax.Array,
    first: State,
    masks: tuple[jax.Array, jax.Array] | None,
    *,
    chunk: int,
    reverse: bool = False,
    remat: bool = False,
) -> tuple[jax.Array, State]:
    """The hidden states [B, T, H] in the dtype of ``x``, and the last state.

    Args:
        first: the initial state.
        masks: two masks [B, T, 1]. The first is True where the state is reset to zeros before the token, the second at
            real tokens. None: no resets and no padding.
        chunk: number of steps of a chunk; the last chunk may be shorter.
        reverse: read from the last token to the first.
        remat: recompute the gates in the backward pass instead of storing them.
    """
    return _layer((cell, min(chunk, x_BTD.shape[1]), reverse, remat), weights, x_BTD, first, masks)


StaticArguments = tuple[Cell, int, bool, bool]
"""The static (trace-time) arguments: (cell, chunk, reverse, remat)."""


def _forward(
    static: StaticArguments,
    weights: Weights,
    x_BTD: jax.Array,
    first: State,
    masks: Masks,
    *,
    save_residuals: bool = True,
) -> Any:
    cell, chunk, reverse, remat = static
    T, dtype, original_weights = x_BTD.shape[1], x_BTD.dtype, weights
    weights = _split_hidden(cell, weights)

    def step(state: State, projected: InputContribution, mask: Masks) -> tuple[State, tuple[jax.Array, ...]]:
        """The state after the step, and the arrays to store.

        The output is always stored. With ``save_residuals``, the step also stores the cell of an LSTM before the step
        and, without ``remat``, the gates.
        """
        before = reset_state(mask, state)
        gates = cell.gates(weights, projected, before[0])
        after = keep_state(mask, cell.advance(gates, before), before)
        if not save_residuals:
            return after, (after[0].astype(dtype),)
        stored_gates = () if remat else tuple(x.astype(dtype) for x in gates)
        return after, (after[0].astype(dtype), *before[1:], *stored_gates)

    def run_chunk(steps_before: Any, steps: int, carry: Any) -> Any:
        start = T - steps_before - steps if reverse else steps_before  # time index of the first token of the chunk
        projected_BCGH = _project(weights, lax.dynamic_slice_in_dim(x_BTD, start, steps, 1))

        def body(i: Any, carry: Any) -> Any:
            state, stored = carry
            i = steps - 1 - i if reverse else i
            state, outputs = step(state, _projected_at(projected_BCGH, i), _mask_at(masks, start + i))
            return state, tuple(
                _write_at(array, x, start + i, axis) for array, x, axis in zip(stored, outputs, axes, strict=True)
            )

        return lax.fori_loop(0, steps, body, carry)

    def example_step() -> Any:
        return step(first, _projected_at(_project(weights, x_BTD[:, :1]), 0), _mask_at(masks, 0))

    _, output_shapes = jax.eval_shape(example_step)  # adds no operations to the program
    # Time is the first axis of the stored cells and gates, so that a step of the backward pass reads contiguous memory.
    axes = (1, *(0 for _ in output_shapes[1:]))
    stored = tuple(_zeros(x, T, axis) for x, axis in zip(output_shapes, axes, strict=True))
    last, (hidden_BTH, *residuals) = loop_over_chunks(T, chunk, run_chunk, (first, stored))
    return (hidden_BTH, last), (original_weights, x_BTD, first, masks, hidden_BTH, tuple(residuals))


def _backward(static: StaticArguments, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    cell, chunk, reverse, remat = static
    weights, x_BTD, first, masks, hidden_BTH, residuals = saved
    cell_states, gates = residuals[: len(first) - 1], residuals[len(first) - 1 :]
    doutput_BTH, dlast = cotangents
    T, dtype = x_BTD.shape[1], x_BTD.dtype
    split_weights = _split_hidden(cell, weights)
    # For B > 1, the hidden weights are transposed once for all steps; this makes a copy. For B = 1, there is no copy if
    # the weights are float32 and not sharded. Time per step on a CPU, without and with the transposed copy: B1 H650: 41
    # and 56 us; B4 H512: 145 and 37 us; B32 H512: 260 and 166 us. The input weights are not copied if they are float32
    # and not sharded: there is one matmul per chunk, which takes the same time with and without the copy.
    transposes = tuple(_transpose(weight_HGK, x_BTD.shape[0] != 1) for weight_HGK in split_weights["weight_hidden"])
    transpose_input = _transpose(weights["weight_input"], False)

    def step(dafter: State, gates: SavedGates, before: State, mask: Masks) -> tuple[State, tuple[jax.Array, ...]]:
        """The gradient of the state before the step, and the arrays to store for the matmuls of the chunk."""
        dbefore, *stored = cell.backward(transposes, gates, before, _zero_at_padding(mask, dafter))
        dbefore = reset_state(mask, keep_state(mask, dbefore, dafter))
        return dbefore, tuple(x.astype(dtype) for x in stored)

    def run_chunk(steps_before: Any, steps: int, carry: Any) -> Any:
        start = steps_before if reverse else T - steps_before - steps  # the order of the forward pass, reversed
        dstate, dx_BTD, dweight_sums = carry
        x_BCD = lax.dynamic_slice_in_dim(x_BTD, start, steps, 1)
        hidden_BCH = _hidden_before(hidden_BTH, first[0], masks, start, steps, reverse)
        if remat:
            recomputed = cell.gates(
                split_weights, _projected(_project(split_weights, x_BCD)), hidden_BCH.astype(jnp.float32)
            )
            chunk_gates = tuple(x.astype(dtype) for x in recomputed)

        def body(i: Any, carry: Any) -> Any:
            dstate, stored = carry
            i = i if reverse else steps - 1 - i
            step_gates = _gates_at(chunk_gates, i, 1) if remat else _gates_at(gates, start + i, 0)
            before = (_read_at(hidden_BCH, i, 1).astype(jnp.float32), *(_read_at(x, start + i, 0) for x in cell_states))
            doutput = _read_at(doutput_BTH, start + i, 1).astype(jnp.float32)
            dstate, outputs = step((dstate[0] + doutput, *dstate[1:]), step_gates, before, _mask_at(masks, start + i))
            return dstate, tuple(_write_at(array, x, i, 1) for array, x in zip(stored, outputs, strict=True))

        stored = tuple(_zeros(x, steps, 1) for x in output_shapes)
        dstate, (dproduct_BCGH, *dprojected_args) = lax.fori_loop(0, steps, body, (dstate, stored))
        if not remat:
            chunk_gates = tuple(jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, steps, 0), 0, 1) for x in gates)
        dprojected_BCGH = cell.dprojected(dproduct_BCGH, *dprojected_args)
        dx_BCD = transpose_input(dprojected_BCGH).astype(dtype)
        chunk_dweights = {
            "weight_input": _outer(x_BCD, dprojected_BCGH),
            "bias": jnp.sum(dprojected_BCGH, axis=(0, 1), dtype=jnp.float32),
            **cell.dweights(chunk_gates, hidden_BCH, dproduct_BCGH),
        }
        dweight_sums = chunk_dweights if dweight_sums is None else jax.tree.map(jnp.add, dweight_sums, chunk_dweights)
        return dstate, lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, start, 1), dweight_sums

    def example_step() -> Any:
        if remat:
            projected = _projected(_project(split_weights, x_BTD[:, :1]))
            example_gates = _gates_at(cell.gates(split_weights, projected, hidden_BTH[:, :1]), 0, 1)
        else:
            example_gates = _gates_at(gates, 0, 0)
        return step(dlast, example_gates, first, _mask_at(masks, 0))

    _, output_shapes = jax.eval_shape(example_step)
    # The first chunk of the backward pass runs before the loop, because its weight gradients initialize the sums.
    carry = run_chunk(0, chunk, (dlast, jnp.zeros_like(x_BTD), None))

    def run_later_chunk(steps_before: Any, steps: int, carry: Any) -> Any:
        return run_chunk(steps_before + chunk, steps, carry)

    dfirst, dx_BTD, dweight_sums = loop_over_chunks(T - chunk, chunk, run_later_chunk, carry)
    dweights = {name: x.astype(weights[name].dtype) for name, x in dweight_sums.items()}
    return dweights, dx_BTD, dfirst, None


_layer = custom_vjp.from_rules(_forward, _backward, (0,), functools.partial(_forward, save_residuals=False))


# ---------------------------------------------------------------------------------------------------------- LSTM


def _lstm_gates(weights: Weights, projected: InputContribution, hidden: jax.Array) -> SavedGates:
    preactivation = _with_bias(weights, projected, 0, 4) + _product(hidden, weights["weight_hidden"][0])
    return (_nonlinearities(preactivation, _LSTM_SCALE),)


def _lstm_advance(gates: SavedGates, before: State) -> State:
    i, f, g, o = (gates[0][..., gate, :] for gate in range(4))
    cell_state = f * before[1] + i * g
    return o * jnp.tanh(cell_state), cell_state


def _lstm_backward(
    transposes: tuple[TransposedProduct, ...], gates: SavedGates, before: State, dafter: State
) -> tuple[Any, ...]:
    dcell, gradients = lstm_gradients(gates, before[1], dafter)
    dpreactivation = _stack_gates(*gradients)
    return (transposes[0](dpreactivation), dcell), dpreactivation


def lstm_gradients(
    gates: Sequence[jax.Array], cell: jax.Array, dafter: State
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of the cell before a step and of the pre-activations of the gates, [B, H] each.

    Args:
        gates: i, f, g, o of the step.
        cell: the cell before the step.
        dafter: the gradients of ``(hidden, cell)`` after the step.
    """
    (i, f, g, o), (dhidden, dcell) = gates, dafter
    tanh_cell = jnp.tanh(f * cell + i * g)
    dcell = dcell + dhidden * o * (1.0 - tanh_cell**2)
    di, df, dg, do = dcell * g, dcell * cell, dcell * i, dhidden * tanh_cell
    return dcell * f, (di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o))


_LSTM_SCALE = (0.5, 0.5, 1.0, 0.5)
"""The scale of each gate: 1/2 for a sigmoid, 1 for a tanh."""
LSTM = Cell(
    (4,),
    _lstm_gates,
    _lstm_advance,
    _lstm_backward,
    dprojected=lambda dproduct: dproduct,
    dweights=lambda gates, hidden, dproduct: {"weight_hidden": _outer(hidden, dproduct)},
)


# ----------------------------------------------------------------------------------------------------------- GRU


def _gru_advance(gates: SavedGates, before: State) -> State:
    z, n = gates[0][..., 1, :], gates[1]
    return ((1.0 - z) * n + z * before[0],)


def _gru_after_gates(weights: Weights, projected: InputContribution, hidden: jax.Array) -> SavedGates:
    product = _product(hidden, weights["weight_hidden"][0])
    rz = _nonlinearities(_with_bias(weights, projected, 0, 2) + product[..., :2, :], (0.5, 0.5))
    hidden_n = product[..., 2, :] + _add_leading_axes(weights["bias_hidden"], hidden.ndim)
    n = jnp.tanh(_with_bias(weights, projected, 2, 3)[..., 0, :] + rz[..., 0, :] * hidden_n)
    return rz, n, hidden_n


def _gru_after_backward(
    transposes: tuple[TransposedProduct, ...], gates: SavedGates, before: State, dafter: State
) -> tuple[Any, ...]:
    dbefore, (*dproducts, dn) = gru_gradients(gates, before[0], dafter[0])
    dproduct = _stack_gates(*dproducts)
    return (dbefore + transposes[0](dproduct),), dproduct, dn


def gru_gradients(
    gates: Sequence[jax.Array], before: jax.Array, dhidden: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gradients of a GRU step whose reset gate is applied after the product with the hidden weights, [B, H] each.

    Args:
        gates: r, z, n, and the product of the state with the hidden weights of n, plus ``bias_hidden``.
        before: the hidden state before the step.
        dhidden: the gradient of the hidden state after the step.

    Returns:
        First, the gradient of the hidden state before the step, without its part through the hidden weights. Second, a
        tuple of four gradients: of the products of the state with the hidden weights of r, z and n, and of the
        contribution of the inputs to n.
    """
    r, z, n, hidden_n = gates
    dn = dhidden * (1.0 - z) * (1.0 - n**2)
    dr = dn * hidden_n * r * (1.0 - r)
    dz = dhidden * (before - n) * z * (1.0 - z)
    return dhidden * z, (dr, dz, dn * r, dn)


def _gru_after_dweights(gates: SavedGates, hidden: jax.Array, dproduct: jax.Array) -> Weights:
    dbias = jnp.sum(dproduct[..., 2, :], axis=(0, 1), dtype=jnp.float32)
    return {"weight_hidden": _outer(hidden, dproduct), "bias_hidden": dbias}


GRU_AFTER = Cell(
    (3,),
    _gru_after_gates,
    _gru_advance,
    _gru_after_backward,
    dprojected=lambda dproduct, dn: jnp.concatenate([dproduct[..., :2, :], dn[..., None, :]], axis=-2),
    dweights=_gru_after_dweights,
)
"""The reset gate is applied after the product with the hidden weights (cuDNN, torch)."""


def _gru_before_gates(weights: Weights, projected: InputContribution, hidden: jax.Array) -> SavedGates:
    weight_rz, weight_n = weights["weight_hidden"]
    rz = _nonlinearities(_with_bias(weights, projected, 0, 2) + _product(hidden, weight_rz), (0.5, 0.5))
    product = _product(rz[..., 0, :] * hidden, weight_n)
    return rz, jnp.tanh(_with_bias(weights, projected, 2, 3) + product)[..., 0, :]


def _gru_before_backward(
    transposes: tuple[TransposedProduct, ...], gates: SavedGates, before: State, dafter: State
) -> tuple[Any, ...]:
    (r, z, n), (dhidden,), (transpose_rz, transpose_n) = gates, dafter, transposes
    dn = dhidden * (1.0 - z) * (1.0 - n**2)
    dscaled = transpose_n(dn[:, None])  # the gradient of r * before
    dr = dscaled * before[0] * r * (1.0 - r)
    dz = dhidden * (before[0] - n) * z * (1.0 - z)
    dbefore = dhidden * z + dscaled * r + transpose_rz(_stack_gates(dr, dz))
    return (dbefore,), _stack_gates(dr, dz, dn)


def _gru_before_dweights(gates: SavedGates, hidden: jax.Array, dproduct: jax.Array) -> Weights:
    scaled = gates[0][..., 0, :] * hidden
    parts = [_outer(hidden, dproduct[..., :2, :]), _outer(scaled, dproduct[..., 2:, :])]
    return {"weight_hidden": jnp.concatenate(parts, axis=1)}


GRU_BEFORE = Cell(
    (2, 1),
    _gru_before_gates,
    _gru_advance,
    _gru_before_backward,
    dprojected=lambda dproduct: dproduct,
    dweights=_gru_before_dweights,
)
"""The reset gate is applied before the product, to the state itself (Cho et al. 2014)."""


# -------------------------------------------------------------------------------------------------------- shared


def _project(weights: Weights, x: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,DGH->BTGH", x, weights["weight_input"])


def _projected(projected_BCGH: jax.Array) -> InputContribution:
    return lambda begin, end: projected_BCGH[:, :, begin:end]


def _projected_at(projected_BCGH: jax.Array, index: Any) -> InputContribution:
    """The contribution of the inputs at one step.

    One slice of the time axis and the gate axis is 3 times as fast on a CPU as two slices, one for each axis.
    """
    B, _, _, H = projected_BCGH.shape
    return lambda begin, end: lax.dynamic_slice(projected_BCGH, (0, index, begin, 0), (B, 1, end - begin, H))[:, 0]


def _with_bias(weights: Weights, projected: InputContribution, begin: int, end: int) -> jax.Array:
    input_part = projected(begin, end).astype(jnp.float32)
    return input_part + _add_leading_axes(weights["bias"][begin:end], input_part.ndim)


def _add_leading_axes(x: jax.Array, ndim: int) -> jax.Array:
    return x.astype(jnp.float32).reshape((1,) * (ndim - x.ndim) + x.shape)


def _product(hidden: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    hidden = hidden.astype(weight_HGK.dtype)
    return jnp.einsum("...H,HGK->...GK", hidden, weight_HGK, preferred_element_type=jnp.float32)


def _split_hidden(cell: Cell, weights: Weights) -> Weights:
    """The weights with ``weight_hidden`` split into a list of parts, one for each matmul (``Cell.gates_per_matmul``).

    Call it outside of loops, so that the split is not repeated in each step.
    """
    split_points = np.cumsum(cell.gates_per_matmul)[:-1].tolist()
    return {**weights, "weight_hidden": jnp.split(weights["weight_hidden"], split_points, axis=1)}


def _transpose(weight_DGH: jax.Array, copy: bool) -> TransposedProduct:
    """A function that multiplies [..., G, H] with the transposed weights and returns [..., D].

    Args:
        copy: False means no transposed copy of float32 weights without sharding. Other weights are always copied.
    """
    if not copy and weight_DGH.dtype == jnp.float32 and sharding.active() is None:
        weight_DX = weight_DGH.reshape(weight_DGH.shape[0], -1)  # XLA would transpose before a sum over two axes

        def multiply(x: jax.Array) -> jax.Array:
            x_NX = x.reshape(-1, weight_DX.shape[1])
            product_ND = lax.dot_general(x_NX, weight_DX, (((1,), (1,)), ((), ())))
            return product_ND.reshape(*x.shape[:-2], product_ND.shape[1])

        return multiply
    weight_GHD = jnp.moveaxis(weight_DGH, 0, 2)  # transposed once, not in each step

    def multiply_copy(x: jax.Array) -> jax.Array:
        x = x.astype(weight_GHD.dtype)
        return jnp.einsum("...GH,GHD->...D", x, weight_GHD, preferred_element_type=jnp.float32)

    return multiply_copy


def _hidden_before(
    hidden_BTH: jax.Array, first_BH: jax.Array, masks: Masks, start: Any, steps: int, reverse: bool
) -> jax.Array:
    """The hidden state before each step of a chunk, [B, C, H], with zeros where the state is reset."""
    T = hidden_BTH.shape[1]
    first_B1H = first_BH[:, None].astype(hidden_BTH.dtype)

    def first_chunk() -> jax.Array:
        if reverse:
            return jnp.concatenate([hidden_BTH[:, T - steps + 1 :], first_B1H], axis=1)
        return jnp.concatenate([first_B1H, hidden_BTH[:, : steps - 1]], axis=1)

    def later_chunk() -> jax.Array:
        return lax.dynamic_slice_in_dim(hidden_BTH, start + 1 if reverse else start - 1, steps, 1)

    is_first = start + steps == T if reverse else start == 0
    before_BCH = first_chunk() if steps == T else lax.cond(is_first, first_chunk, later_chunk)
    if masks is None:
        return before_BCH
    return jnp.where(lax.dynamic_slice_in_dim(masks[0], start, steps, 1), jnp.zeros_like(before_BCH), before_BCH)


def _outer(x_BCH: jax.Array, dproduct_BCGK: jax.Array) -> jax.Array:
    # Batch and time are merged into one axis, because XLA would transpose x before a sum over two axes.
    x_NH, dproduct_NGK = (x.reshape(-1, *x.shape[2:]) for x in (x_BCH, dproduct_BCGK))
    return jnp.einsum("NH,NGK->HGK", x_NH, dproduct_NGK).astype(jnp.float32)


def _stack_gates(*gates: jax.Array) -> jax.Array:
    """The gates [B, H] as one array [B, G, H]."""
    if sharding.active() is not None:
        return jnp.stack(gates, axis=1)  # keeps the sharding of H
    # On a CPU, this is 1.6 times as fast as ``jnp.stack``.
    B, H = gates[0].shape
    return jnp.concatenate(gates, axis=1).reshape(B, len(gates), H)


def _nonlinearities(preactivation: jax.Array, scale: Sequence[float]) -> jax.Array:
    """The nonlinearity of each gate, [..., G, H]: a sigmoid for the scale 1/2, a tanh for the scale 1."""
    s = jnp.asarray(scale, jnp.float32).reshape((1,) * (preactivation.ndim - 2) + (-1, 1))
    return s * jnp.tanh(s * preactivation) + (1.0 - s)


def _read_at(x: jax.Array, index: Any, axis: int) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def _write_at(array: jax.Array, x: jax.Array, index: Any, axis: int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, x, index, axis)


def _zeros(x: jax.ShapeDtypeStruct, steps: int, axis: int) -> jax.Array:
    """An array of zeros for storing one ``x`` per step, with the sharding of ``x``. ``axis``: the position of the time
    axis."""
    zeros = jnp.expand_dims(jnp.zeros_like(x), axis)
    return jnp.broadcast_to(zeros, (*x.shape[:axis], steps, *x.shape[axis:]))


def _gates_at(gates: SavedGates, index: Any, axis: int) -> SavedGates:
    """The gates of one step, each [B, H] float32.

    One slice of the time axis and the gate axis is 3 times as fast on a CPU as two slices, one for each axis.
    """
    result: list[jax.Array] = []
    for x in gates:
        if x.ndim == 3:
            result.append(_read_at(x, index, axis))
            continue
        for gate in range(x.shape[2]):
            begin, size = [0, 0, gate, 0], [*x.shape[:2], 1, x.shape[3]]
            begin[axis], size[axis] = index, 1
            result.append(lax.dynamic_slice(x, begin, size).reshape(x.shape[1 - axis], x.shape[3]))
    return tuple(gate.astype(jnp.float32) for gate in result)


def _mask_at(masks: Masks, index: Any) -> Any:
    return None if masks is None else tuple(_read_at(mask, index, 1) for mask in masks)


def _zero_at_padding(mask: Masks, dstate: State) -> State:
    """The gradient of the state after a step, with zeros at padding, so that the gates get no gradient there."""
    return dstate if mask is None else tuple(jnp.where(mask[1], x, 0.0) for x in dstate)

"""LSTM and GRU layers in chunks of time, with a gradient of their own: what ``recurrence`` runs by default.

A chunk of time multiplies its inputs with the weights at once, then goes on step by step; its gradient goes back step
by step and then multiplies at once. So products are large, what lies between them stays in a CPU's cache, and no loop
over steps carries a weight gradient, as that of autodiff does. One chunk of all steps is the usual form with the
input's product hoisted out of the loop.

Of each step the gates are kept for the gradient (and an LSTM's cell), or with ``remat`` they are computed anew from the
states before the steps: these are known, so that the gates of a chunk are one product and not a loop.

Each nonlinearity of a step is one ``tanh`` of all gates side by side: XLA would compute separate ones again in each of
the fusions that read them. ``sigmoid(x) = tanh(x / 2) / 2 + 1 / 2``.

Shapes: B batch, T time, C steps of a chunk, D input width, G gates (LSTM 4, GRU 3), H hidden width (K where there are
two).
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

Weights = dict[str, Any]
"""``weight_input`` [D, G, H] and ``weight_hidden`` [H, G, K] in the compute dtype; ``bias`` [G, H] and, for a GRU that
resets after the product, ``bias_hidden`` [H], float32."""
State = tuple[jax.Array, ...]
"""``(hidden,)`` or ``(hidden, cell)``, [..., H] float32."""
Kept = tuple[jax.Array, ...]
"""What a cell computes from input and state with effort, and its gradient reads again."""


Projected = Callable[[int, int], jax.Array]
"""The input's part of gates ``begin`` to ``end``, [..., end - begin, H]: one slice of what is projected."""
Pull = Callable[[jax.Array], jax.Array]
"""The gradient of a state from that of its product with weights, [B, G, K] to [B, H]."""


class Cell(NamedTuple):
    """A recurrent cell in parts. Leading axes are those of its arguments: one step, or all steps of a chunk."""

    products: tuple[int, ...]
    """How many gates each product with a state is for: ``weight_hidden`` comes to the functions in such parts."""
    gates: Callable[[Weights, Projected, jax.Array], Kept]
    """``gates(weights, projected, hidden)``: products with the state, and nonlinearities."""
    advance: Callable[[Kept, State], State]
    """The state after the step."""
    back: Callable[[tuple[Pull, ...], Kept, State, State], tuple[Any, ...]]
    """``back(pulls, kept, before, dafter)`` of one step: gradients of the state before, of the products with it [B, G,
    H], and what ``dprojected`` needs beside the latter. Each gate in ``kept`` is an array of its own, [B, H]."""
    dprojected: Callable[..., jax.Array]
    """The gradient of the input's part of the gates, from what ``back`` gave."""
    dweights: Callable[[Kept, jax.Array, jax.Array], Weights]
    """``dweights(kept, hidden, dproduct)``: of ``weight_hidden`` and ``bias_hidden``, over a whole chunk."""


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
    """Hidden states [B, T, H] in ``x``'s dtype, and the last state.

    Args:
        masks: where the state goes back to zeros before the token, and where a token is real, [B, T, 1] bool each.
        chunk: steps of a chunk. T need not be a multiple.
        reverse: read from the last token to the first.
        remat: keep no gates, and compute them again in the gradient.
    """
    return _layer((cell, min(chunk, x_BTD.shape[1]), reverse, remat), weights, x_BTD, first, masks)


Form = tuple[Cell, int, bool, bool]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(form: Form, weights: Weights, x_BTD: jax.Array, first: State, masks: Any) -> tuple[jax.Array, State]:
    return _forward(form, weights, x_BTD, first, masks, keep=False)[0]


def _forward_and_kept(form: Form, weights: Weights, x_BTD: jax.Array, first: State, masks: Any) -> Any:
    return _forward(form, weights, x_BTD, first, masks, keep=True)


def _forward(form: Form, weights: Weights, x_BTD: jax.Array, first: State, masks: Any, *, keep: bool) -> Any:
    cell, chunk, reverse, remat = form
    T, dtype, weights_given = x_BTD.shape[1], x_BTD.dtype, weights
    weights = _in_parts(cell, weights)

    def step(state: State, projected: Projected, mask: Any) -> tuple[State, tuple[jax.Array, ...]]:
        """The state after it, and what is written down: output and, for the gradient, cell before and gates."""
        before = _reset(mask, state)
        kept = cell.gates(weights, projected, before[0])
        after = _keep(mask, cell.advance(kept, before), before)
        if not keep:
            return after, (after[0].astype(dtype),)
        gates = () if remat else tuple(x.astype(dtype) for x in kept)
        return after, (after[0].astype(dtype), *before[1:], *gates)

    def run(begin: Any, steps: int, carry: Any) -> Any:
        at = T - begin - steps if reverse else begin
        projected_BCGH = _project(weights, lax.dynamic_slice_in_dim(x_BTD, at, steps, 1))

        def one(i: Any, carry: Any) -> Any:
            state, written = carry
            i = steps - 1 - i if reverse else i
            state, new = step(state, _projected_at(projected_BCGH, i), _mask_at(masks, at + i))
            return state, tuple(_put(all, x, at + i, axis) for all, x, axis in zip(written, new, axes, strict=True))

        return lax.fori_loop(0, steps, one, carry)

    _, examples = step(first, _projected_at(_project(weights, x_BTD[:, :1]), 0), _mask_at(masks, 0))
    # The rest with time in front, so that a step reads what lies together.
    axes = (1, *(0 for _ in examples[1:]))
    written = tuple(_zeros(x, T, axis) for x, axis in zip(examples, axes, strict=True))
    last, (hidden_BTH, *kept) = _over_chunks(T, chunk, run, (first, written))
    return (hidden_BTH, last), (weights_given, x_BTD, first, masks, hidden_BTH, tuple(kept))


def _backward(form: Form, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    cell, chunk, reverse, remat = form
    weights, x_BTD, first, masks, hidden_BTH, kept = saved
    cells, kept = kept[: len(first) - 1], kept[len(first) - 1 :]
    doutput_BTH, dlast = cotangents
    T, dtype = x_BTD.shape[1], x_BTD.dtype
    parts = _in_parts(cell, weights)
    # The weights as they lie, or turned once. On a CPU, as they lie is the faster way for one row (41 us a step, turned
    # 56, with H 650), not for a few (B4 H512: 145 and 37; B32 H512: 260 and 166), and as good for a chunk's many.
    pulls = tuple(_pull(weight_HGK, x_BTD.shape[0] == 1) for weight_HGK in parts["weight_hidden"])
    pull_input = _pull(weights["weight_input"], True)

    def step(dafter: State, kept: Kept, before: State, mask: Any) -> tuple[State, tuple[jax.Array, ...]]:
        """Gradients of the state before, and those that a chunk's products need."""
        dbefore, *written = cell.back(pulls, kept, before, _real(mask, dafter))
        dbefore = _reset(mask, _keep(mask, dbefore, dafter))
        return dbefore, tuple(x.astype(dtype) for x in written)

    def run(begin: Any, steps: int, carry: Any) -> Any:
        at = begin if reverse else T - begin - steps  # the other way round
        dstate, dx_BTD, totals = carry
        x_BCD = lax.dynamic_slice_in_dim(x_BTD, at, steps, 1)
        hidden_BCH = _hidden_before(hidden_BTH, first[0], masks, at, steps, reverse)
        if remat:
            again = cell.gates(parts, _projected(_project(parts, x_BCD)), hidden_BCH.astype(jnp.float32))
            chunk_kept = tuple(x.astype(dtype) for x in again)

        def one(i: Any, carry: Any) -> Any:
            dstate, written = carry
            i = i if reverse else steps - 1 - i
            own = _gates_at(chunk_kept, i, 1) if remat else _gates_at(kept, at + i, 0)
            before = (_at(hidden_BCH, i, 1).astype(jnp.float32), *(_at(x, at + i, 0) for x in cells))
            doutput = _at(doutput_BTH, at + i, 1).astype(jnp.float32)
            dstate, new = step((dstate[0] + doutput, *dstate[1:]), own, before, _mask_at(masks, at + i))
            return dstate, tuple(_put(all, x, i, 1) for all, x in zip(written, new, strict=True))

        written = tuple(_zeros(x, steps, 1) for x in examples)
        dstate, (dproduct_BCGH, *more) = lax.fori_loop(0, steps, one, (dstate, written))
        if not remat:
            chunk_kept = tuple(jnp.moveaxis(lax.dynamic_slice_in_dim(x, at, steps, 0), 0, 1) for x in kept)
        dprojected_BCGH = cell.dprojected(dproduct_BCGH, *more)
        dx_BCD = pull_input(dprojected_BCGH).astype(dtype)
        new = {
            "weight_input": _outer(x_BCD, dprojected_BCGH),
            "bias": jnp.sum(dprojected_BCGH, axis=(0, 1), dtype=jnp.float32),
            **cell.dweights(chunk_kept, hidden_BCH, dproduct_BCGH),
        }
        totals = new if totals is None else jax.tree.map(jnp.add, totals, new)
        return dstate, lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, at, 1), totals

    if remat:
        own = _gates_at(cell.gates(parts, _projected(_project(parts, x_BTD[:, :1])), hidden_BTH[:, :1]), 0, 1)
    else:
        own = _gates_at(kept, 0, 0)
    _, examples = step(dlast, own, first, _mask_at(masks, 0))
    # The first chunk is apart: it begins the sums.
    carry = run(0, chunk, (dlast, jnp.zeros_like(x_BTD), None))
    dfirst, dx_BTD, totals = _over_chunks(T - chunk, chunk, lambda begin, *a: run(begin + chunk, *a), carry)
    dweights = {name: total.astype(weights[name].dtype) for name, total in totals.items()}
    return dweights, dx_BTD, dfirst, None


_layer.defvjp(_forward_and_kept, _backward)


def _over_chunks(T: int, chunk: int, run: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """``carry`` after ``run(begin, steps, carry)`` for all chunks, the last of which may be shorter."""
    whole, rest = divmod(T, chunk)
    if whole == 1:
        carry = run(0, chunk, carry)
    elif whole:
        carry = lax.fori_loop(0, whole, lambda index, carry: run(index * chunk, chunk, carry), carry)
    return run(whole * chunk, rest, carry) if rest else carry


# ---------------------------------------------------------------------------------------------------------- LSTM


def _lstm_gates(weights: Weights, projected: Projected, hidden: jax.Array) -> Kept:
    total = _with_bias(weights, projected, 0, 4) + _product(hidden, weights["weight_hidden"][0])
    return (_squashed(total, _LSTM_SCALE),)


def _lstm_advance(kept: Kept, before: State) -> State:
    i, f, g, o = (kept[0][..., gate, :] for gate in range(4))
    cell = f * before[1] + i * g
    return o * jnp.tanh(cell), cell


def _lstm_back(pulls: tuple[Pull, ...], kept: Kept, before: State, dafter: State) -> tuple[Any, ...]:
    (i, f, g, o), (dhidden, dcell) = kept, dafter
    squashed = jnp.tanh(f * before[1] + i * g)
    dcell = dcell + dhidden * o * (1.0 - squashed**2)
    di, df, dg, do = dcell * g, dcell * before[1], dcell * i, dhidden * squashed
    dtotal = _side_by_side(di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o))
    return (pulls[0](dtotal), dcell * f), dtotal


_LSTM_SCALE = (0.5, 0.5, 1.0, 0.5)
"""Of each gate: 1/2 for a sigmoid, 1 for a tanh."""
LSTM = Cell(
    (4,),
    _lstm_gates,
    _lstm_advance,
    _lstm_back,
    dprojected=lambda dproduct: dproduct,
    dweights=lambda kept, hidden, dproduct: {"weight_hidden": _outer(hidden, dproduct)},
)


# ----------------------------------------------------------------------------------------------------------- GRU


def _gru_advance(kept: Kept, before: State) -> State:
    z, n = kept[0][..., 1, :], kept[1]
    return ((1.0 - z) * n + z * before[0],)


def _gru_after_gates(weights: Weights, projected: Projected, hidden: jax.Array) -> Kept:
    product = _product(hidden, weights["weight_hidden"][0])
    rz = _squashed(_with_bias(weights, projected, 0, 2) + product[..., :2, :], (0.5, 0.5))
    inner = product[..., 2, :] + _over_leading(weights["bias_hidden"], hidden.ndim)
    n = jnp.tanh(_with_bias(weights, projected, 2, 3)[..., 0, :] + rz[..., 0, :] * inner)
    return rz, n, inner


def _gru_after_back(pulls: tuple[Pull, ...], kept: Kept, before: State, dafter: State) -> tuple[Any, ...]:
    (r, z, n, inner), (dhidden,) = kept, dafter
    dn = dhidden * (1.0 - z) * (1.0 - n**2)
    dr = dn * inner * r * (1.0 - r)
    dz = dhidden * (before[0] - n) * z * (1.0 - z)
    dproduct = _side_by_side(dr, dz, dn * r)
    return (dhidden * z + pulls[0](dproduct),), dproduct, dn


def _gru_after_dweights(kept: Kept, hidden: jax.Array, dproduct: jax.Array) -> Weights:
    dbias = jnp.sum(dproduct[..., 2, :], axis=(0, 1), dtype=jnp.float32)
    return {"weight_hidden": _outer(hidden, dproduct), "bias_hidden": dbias}


GRU_AFTER = Cell(
    (3,),
    _gru_after_gates,
    _gru_advance,
    _gru_after_back,
    dprojected=lambda dproduct, dn: jnp.concatenate([dproduct[..., :2, :], dn[..., None, :]], axis=-2),
    dweights=_gru_after_dweights,
)
"""The reset gate acts after the product with the hidden weights (cuDNN, torch)."""


def _gru_before_gates(weights: Weights, projected: Projected, hidden: jax.Array) -> Kept:
    weight_rz, weight_n = weights["weight_hidden"]
    rz = _squashed(_with_bias(weights, projected, 0, 2) + _product(hidden, weight_rz), (0.5, 0.5))
    product = _product(rz[..., 0, :] * hidden, weight_n)
    return rz, jnp.tanh(_with_bias(weights, projected, 2, 3) + product)[..., 0, :]


def _gru_before_back(pulls: tuple[Pull, ...], kept: Kept, before: State, dafter: State) -> tuple[Any, ...]:
    (r, z, n), (dhidden,), (pull_rz, pull_n) = kept, dafter, pulls
    dn = dhidden * (1.0 - z) * (1.0 - n**2)
    dscaled = pull_n(dn[:, None])  # of r * before
    dr = dscaled * before[0] * r * (1.0 - r)
    dz = dhidden * (before[0] - n) * z * (1.0 - z)
    dbefore = dhidden * z + dscaled * r + pull_rz(_side_by_side(dr, dz))
    return (dbefore,), _side_by_side(dr, dz, dn)


def _gru_before_dweights(kept: Kept, hidden: jax.Array, dproduct: jax.Array) -> Weights:
    scaled = kept[0][..., 0, :] * hidden
    parts = [_outer(hidden, dproduct[..., :2, :]), _outer(scaled, dproduct[..., 2:, :])]
    return {"weight_hidden": jnp.concatenate(parts, axis=1)}


GRU_BEFORE = Cell(
    (2, 1),
    _gru_before_gates,
    _gru_advance,
    _gru_before_back,
    dprojected=lambda dproduct: dproduct,
    dweights=_gru_before_dweights,
)
"""The reset gate acts before the product, on the state itself (Cho et al. 2014)."""


# ------------------------------------------------------------------------------------------------- what all need


def _project(weights: Weights, x: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,DGH->BTGH", x, weights["weight_input"])


def _projected(projected_BCGH: jax.Array) -> Projected:
    return lambda begin, end: projected_BCGH[:, :, begin:end]


def _projected_at(projected_BCGH: jax.Array, index: Any) -> Projected:
    """Of one step. One slice for time and gates: a CPU's loop over two of them is 3 times as slow."""
    B, _, _, H = projected_BCGH.shape
    return lambda begin, end: lax.dynamic_slice(projected_BCGH, (0, index, begin, 0), (B, 1, end - begin, H))[:, 0]


def _with_bias(weights: Weights, projected: Projected, begin: int, end: int) -> jax.Array:
    part = projected(begin, end).astype(jnp.float32)
    return part + _over_leading(weights["bias"][begin:end], part.ndim)


def _over_leading(x: jax.Array, ndim: int) -> jax.Array:
    return x.astype(jnp.float32).reshape((1,) * (ndim - x.ndim) + x.shape)


def _product(hidden: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    hidden = hidden.astype(weight_HGK.dtype)
    return jnp.einsum("...H,HGK->...GK", hidden, weight_HGK, preferred_element_type=jnp.float32)


def _in_parts(cell: Cell, weights: Weights) -> Weights:
    """``weight_hidden`` in parts, cut outside of all loops."""
    cuts = np.cumsum(cell.products)[:-1].tolist()
    return {**weights, "weight_hidden": jnp.split(weights["weight_hidden"], cuts, axis=1)}


def _pull(weight_DGH: jax.Array, as_it_lies: bool) -> Pull:
    """``pull(dtotal [..., G, H])``: its product with the turned weights, [..., D]."""
    if as_it_lies and weight_DGH.dtype == jnp.float32 and sharding.active() is None:
        weight_DX = weight_DGH.reshape(weight_DGH.shape[0], -1)  # one axis to contract: XLA would turn for two

        def pull(dtotal: jax.Array) -> jax.Array:
            dtotal_NX = dtotal.reshape(-1, weight_DX.shape[1])
            return lax.dot_general(dtotal_NX, weight_DX, (((1,), (1,)), ((), ()))).reshape(*dtotal.shape[:-2], -1)

        return pull
    weight_GHD = jnp.moveaxis(weight_DGH, 0, 2)  # once, for all steps: XLA would turn them again in each

    def pull_turned(dtotal: jax.Array) -> jax.Array:
        dtotal = dtotal.astype(weight_GHD.dtype)
        return jnp.einsum("...GH,GHD->...D", dtotal, weight_GHD, preferred_element_type=jnp.float32)

    return pull_turned


def _hidden_before(
    hidden_BTH: jax.Array, first_BH: jax.Array, masks: Any, at: Any, steps: int, reverse: bool
) -> jax.Array:
    """The hidden states that the steps of a chunk started from, [B, C, H]: those after the steps before them."""
    T = hidden_BTH.shape[1]
    first_B1H = first_BH[:, None].astype(hidden_BTH.dtype)

    def of_first_chunk() -> jax.Array:
        if reverse:
            return jnp.concatenate([hidden_BTH[:, T - steps + 1 :], first_B1H], axis=1)
        return jnp.concatenate([first_B1H, hidden_BTH[:, : steps - 1]], axis=1)

    def of_others() -> jax.Array:
        return lax.dynamic_slice_in_dim(hidden_BTH, at + 1 if reverse else at - 1, steps, 1)

    begins = at + steps == T if reverse else at == 0
    before_BCH = of_first_chunk() if steps == T else lax.cond(begins, of_first_chunk, of_others)
    if masks is None:
        return before_BCH
    return jnp.where(lax.dynamic_slice_in_dim(masks[0], at, steps, 1), jnp.zeros_like(before_BCH), before_BCH)


def _outer(x_BCH: jax.Array, dtotal_BCGK: jax.Array) -> jax.Array:
    # Batch and time as one axis: XLA would turn x explicitly to contract two.
    x_NH, dtotal_NGK = (x.reshape(-1, *x.shape[2:]) for x in (x_BCH, dtotal_BCGK))
    return jnp.einsum("NH,NGK->HGK", x_NH, dtotal_NGK).astype(jnp.float32)


def _side_by_side(*gates: jax.Array) -> jax.Array:
    """Gates [B, H] as [B, G, H]."""
    if sharding.active() is not None:
        return jnp.stack(gates, axis=1)  # a split of H stays
    # On a CPU this loop of XLA's is 1.6 times as fast as that of a stack.
    return jnp.concatenate(gates, axis=1).reshape(gates[0].shape[0], len(gates), -1)


def _squashed(total: jax.Array, scale: Sequence[float]) -> jax.Array:
    """Sigmoids and tanhs of gates [..., G, H]."""
    s = jnp.asarray(scale, jnp.float32).reshape((1,) * (total.ndim - 2) + (-1, 1))
    return s * jnp.tanh(s * total) + (1.0 - s)


def _at(x: jax.Array, index: Any, axis: int) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def _put(all: jax.Array, x: jax.Array, index: Any, axis: int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(all, x, index, axis)


def _zeros(x: jax.Array, steps: int, axis: int) -> jax.Array:
    """Room for one ``x`` a step. Made from ``x``, so that it is split over devices alike."""
    zeros = jnp.expand_dims(jnp.zeros_like(x), axis)
    return jnp.broadcast_to(zeros, (*x.shape[:axis], steps, *x.shape[axis:]))


def _gates_at(kept: Kept, index: Any, axis: int) -> Kept:
    """Each gate of a step, float32. One slice for time and gate: a CPU's loop over two of them is 3 times as slow."""
    gates: list[jax.Array] = []
    for x in kept:
        if x.ndim == 3:
            gates.append(_at(x, index, axis))
            continue
        for gate in range(x.shape[2]):
            begin, size = [0, 0, gate, 0], [*x.shape[:2], 1, x.shape[3]]
            begin[axis], size[axis] = index, 1
            gates.append(lax.dynamic_slice(x, begin, size).reshape(x.shape[1 - axis], x.shape[3]))
    return tuple(gate.astype(jnp.float32) for gate in gates)


def _mask_at(masks: Any, index: Any) -> Any:
    return None if masks is None else tuple(_at(mask, index, 1) for mask in masks)


def _reset(mask: Any, state: State) -> State:
    return state if mask is None else tuple(jnp.where(mask[0], 0.0, x) for x in state)


def _keep(mask: Any, new: State, old: State) -> State:
    return new if mask is None else tuple(jnp.where(mask[1], a, b) for a, b in zip(new, old, strict=True))


def _real(mask: Any, dstate: State) -> State:
    """Zero at pads, through which no gradient reaches the gates."""
    return dstate if mask is None else tuple(jnp.where(mask[1], x, 0.0) for x in dstate)

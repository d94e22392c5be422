"""Recurrent layers: LSTM (Hochreiter & Schmidhuber 1997, with forget gate) and GRU (Cho et al. 2014).

A layer is ``project`` (the input's part of all gates, for all steps at once) and then a scan of a cell, which adds the
state's part. What a cell does alone, ``lstm_cell`` and ``gru_cell``, may stand in another loop, such as a decoder that
attends. Conventions are those of torch and cuDNN: gates i, f, g, o and r, z, n; ``h' = (1 - z) * n + z * h``.

The state is float32, whatever the compute dtype. A document border puts it back to zeros *before* the token there is
read; a pad leaves it as it is. Both scans have their own gradient: autodiff adds up the gradient of the hidden weights
step by step inside the backward loop, here it is one matmul after it.

Shapes: B batch, T time, D input width, G gates (LSTM 4, GRU 3), H hidden width (K where there are two).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn.linear import linear
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Uniform

GRUReset = Literal["after", "before"]
"""Where the reset gate acts: ``after`` the product with the hidden weights (cuDNN, torch, Keras, Flax), which can then
be one for all gates, or ``before`` it, on the state itself (Cho et al. 2014)."""


def lstm_specs(inputs: int, width: int, init: Initializer | None = None) -> dict[str, ArraySpec]:
    """Parameters of one LSTM layer. Default ``init``: uniform within ``1 / sqrt(width)``, as torch has it."""
    return _specs(4, inputs, width, init)


def gru_specs(
    inputs: int, width: int, init: Initializer | None = None, *, reset: GRUReset = "after"
) -> dict[str, ArraySpec]:
    """Parameters of one GRU layer: gates r, z, n. ``bias_hidden`` [H], of n alone, exists where reset is ``after``."""
    _check_reset(reset)
    specs = _specs(3, inputs, width, init)
    return specs | ({"bias_hidden": ArraySpec((width,), ("norm",), ZEROS)} if reset == "after" else {})


def _specs(gates: int, inputs: int, width: int, init: Initializer | None) -> dict[str, ArraySpec]:
    init = Uniform(width**-0.5) if init is None else init
    return {
        "weight_input": ArraySpec((inputs, gates, width), ("embed", None, "mlp"), init, decay=True),
        "weight_hidden": ArraySpec((width, gates, width), ("embed", None, "mlp"), init, decay=True),
        "bias": ArraySpec((gates, width), (None, "mlp"), ZEROS),
    }


def lstm_state_specs(batch: int, width: int) -> dict[str, ArraySpec]:
    """What an LSTM layer carries: ``hidden`` and ``cell``, [B, H] float32, from zeros."""
    return {**gru_state_specs(batch, width), "cell": ArraySpec((batch, width), ("batch", "activation_embed"))}


def gru_state_specs(batch: int, width: int) -> dict[str, ArraySpec]:
    """What a GRU layer carries: ``hidden``, [B, H] float32, from zeros."""
    return {"hidden": ArraySpec((batch, width), ("batch", "activation_embed"))}


def borders(
    segment_ids_BT: jax.Array, last_segment_B: jax.Array | None = None, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(reset_BT, keep_BT, last_segment_B)`` of documents (1, 2, ...) and padding (0), for the layers of this file.

    A document goes on across pads and, with ``last_segment_B`` (the document that each row was in, 0 for none), across
    calls; the new one is the third result.

    Example:
        >>> reset, keep, last = borders(jnp.array([[0, 1, 1, 2, 0, 2]]))
        >>> reset.astype(int).tolist(), keep.astype(int).tolist(), last.tolist()
        ([[0, 0, 0, 1, 0, 0]], [[0, 1, 1, 1, 0, 1]], [2])
    """
    if reverse:
        segment_ids_BT = jnp.flip(segment_ids_BT, axis=1)
    T = segment_ids_BT.shape[1]
    first_B = jnp.zeros_like(segment_ids_BT[:, 0]) if last_segment_B is None else last_segment_B
    all_BT = jnp.concatenate([first_B[:, None], segment_ids_BT], axis=1)  # one longer than T
    index_BT = jnp.where(all_BT > 0, jnp.arange(T + 1, dtype=jnp.int32)[None, :], 0)
    last_real_BT = jnp.take_along_axis(all_BT, lax.cummax(index_BT, axis=1), axis=1)
    keep_BT = segment_ids_BT > 0
    reset_BT = keep_BT & (last_real_BT[:, :-1] > 0) & (last_real_BT[:, :-1] != segment_ids_BT)
    if reverse:
        reset_BT, keep_BT = jnp.flip(reset_BT, axis=1), jnp.flip(keep_BT, axis=1)
    return reset_BT, keep_BT, last_real_BT[:, -1]


def project(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The input's part of every gate, bias included: ``x`` [..., D] to [..., G, H] in ``x``'s dtype.

    Raises:
        ValueError: ``x`` is not as wide as the weights.
    """
    width = params["weight_input"].shape[0]
    if x.shape[-1] != width:
        raise ValueError(f"the input is {x.shape[-1]} wide, but weight_input is made for {width}")
    return linear({"weight": params["weight_input"], "bias": params["bias"]}, x)


# ---------------------------------------------------------------------------------------------------------- LSTM


def lstm_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """One step: the state {"hidden", "cell"} after a token whose ``project`` is given. The output is its ``hidden``."""
    weight = params["weight_hidden"].astype(projected_BGH.dtype)
    hidden_BH, cell_BH, _ = _lstm_step(projected_BGH, weight, state["hidden"], state["cell"])
    return {"hidden": hidden_BH, "cell": cell_BH}


def lstm(
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One LSTM layer: the hidden state after each token, [B, T, H] in ``x``'s dtype, and the last state.

    Args:
        params: as ``lstm_specs``. For DropConnect, drop ``weight_hidden`` before.
        state: {"hidden", "cell"}, [B, H] float32 each; None is zeros.
        reset_BT: True where the state goes back to zeros before the token is read (see ``borders``). None: nowhere.
        keep_BT: False where the token is padding: the state stays as it is, and the output repeats it. None: all real.
        reverse: read from the last token to the first; outputs stay at their tokens.
    """
    projected_TBGH, masks = _prepare(params, x_BTD, reset_BT, keep_BT)
    if state is None:
        zeros_BH = jnp.zeros_like(projected_TBGH[0, :, 0], jnp.float32)
        state = {"hidden": zeros_BH, "cell": zeros_BH}
    hidden_TBH, hidden_BH, cell_BH = _lstm_scan(
        reverse, projected_TBGH, _weight_hidden(params, x_BTD), state["hidden"], state["cell"], masks
    )
    return jnp.swapaxes(hidden_TBH, 0, 1), {"hidden": hidden_BH, "cell": cell_BH}


def _lstm_step(
    projected_BGH: jax.Array, weight_HGK: jax.Array, hidden_BH: jax.Array, cell_BH: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    total_BGH = projected_BGH.astype(jnp.float32) + _recurrent(hidden_BH, weight_HGK)
    i, f, o = (jax.nn.sigmoid(total_BGH[:, gate]) for gate in (0, 1, 3))
    g = jnp.tanh(total_BGH[:, 2])
    cell_BH = f * cell_BH + i * g
    return o * jnp.tanh(cell_BH), cell_BH, [i, f, g, o]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lstm_scan(
    reverse: bool,
    projected_TBGH: jax.Array,
    weight_HGK: jax.Array,
    hidden_BH: jax.Array,
    cell_BH: jax.Array,
    masks: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _lstm_forward(reverse, projected_TBGH, weight_HGK, hidden_BH, cell_BH, masks)[0]


def _lstm_forward(
    reverse: bool,
    projected_TBGH: jax.Array,
    weight_HGK: jax.Array,
    hidden_BH: jax.Array,
    cell_BH: jax.Array,
    masks: Any,
) -> Any:
    dtype = projected_TBGH.dtype

    def step(carry: Any, inputs: Any) -> Any:
        projected, mask = inputs
        hidden, cell = _reset(mask, *carry)
        new_hidden, new_cell, gates = _lstm_step(projected, weight_HGK, hidden, cell)
        carry = _keep(mask, (new_hidden, new_cell), (hidden, cell))
        return carry, (carry[0].astype(dtype), carry[1], jnp.stack(gates, axis=1).astype(dtype))

    first = (hidden_BH, cell_BH)
    last, (hidden_TBH, cell_TBH, gates_TBGH) = lax.scan(step, first, (projected_TBGH, masks), reverse=reverse)
    return (hidden_TBH, *last), (weight_HGK, first, hidden_TBH, cell_TBH, gates_TBGH, masks)


def _lstm_backward(reverse: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    weight_HGK, (hidden_BH, cell_BH), hidden_TBH, cell_TBH, gates_TBGH, masks = saved
    dtype = weight_HGK.dtype
    before_TBH = _before(hidden_TBH, hidden_BH, masks, reverse)
    cell_before_TBH = _before(cell_TBH, cell_BH, masks, reverse)

    def step(carry: Any, inputs: Any) -> Any:
        doutput, gates, cell, cell_before, mask = inputs
        dhidden, dcell = carry[0] + doutput, carry[1]
        i, f, g, o = (gates[:, gate].astype(jnp.float32) for gate in range(4))
        squashed = jnp.tanh(cell)
        dsum = dcell + dhidden * o * (1.0 - squashed**2)
        di, df, dg, do = dsum * g, dsum * cell_before, dsum * i, dhidden * squashed
        dtotal = [di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o)]
        dtotal_BGH = _real(mask, jnp.stack(dtotal, axis=1)).astype(dtype)
        dbefore = (_recurrent_transposed(dtotal_BGH, weight_HGK), dsum * f)
        return _reset(mask, *_keep(mask, dbefore, (dhidden, dcell))), dtotal_BGH

    doutput_TBH, *dlast = cotangents
    dfirst, dtotal_TBGH = lax.scan(
        step,
        tuple(dlast),
        (doutput_TBH.astype(jnp.float32), gates_TBGH, cell_TBH, cell_before_TBH, masks),
        reverse=not reverse,
    )
    return dtotal_TBGH, _weight_gradient(before_TBH, dtotal_TBGH), *dfirst, None


_lstm_scan.defvjp(_lstm_forward, _lstm_backward)


# ----------------------------------------------------------------------------------------------------------- GRU


def gru_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """One step: the state {"hidden"} after a token whose ``project`` is given.

    The reset gate acts after the product where the params have a ``bias_hidden``, before it where not (``gru_specs``).
    """
    weight = params["weight_hidden"].astype(projected_BGH.dtype)
    return {"hidden": _gru_step(projected_BGH, weight, params.get("bias_hidden"), state["hidden"])[0]}


def gru(
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One GRU layer, as ``lstm`` (which explains the arguments), with the state {"hidden"}.

    The reset gate acts after the product where the params have a ``bias_hidden``, before it where not (``gru_specs``).
    """
    projected_TBGH, masks = _prepare(params, x_BTD, reset_BT, keep_BT)
    hidden_BH = jnp.zeros_like(projected_TBGH[0, :, 0], jnp.float32) if state is None else state["hidden"]
    hidden_TBH, hidden_BH = _gru_scan(
        reverse, projected_TBGH, _weight_hidden(params, x_BTD), params.get("bias_hidden"), hidden_BH, masks
    )
    return jnp.swapaxes(hidden_TBH, 0, 1), {"hidden": hidden_BH}


def _gru_step(
    projected_BGH: jax.Array, weight_HGK: jax.Array, bias_H: jax.Array | None, hidden_BH: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The new hidden state, and what its gradient needs: r, z, n and, with a bias (reset after), n's product."""
    projected_BGH = projected_BGH.astype(jnp.float32)
    if bias_H is None:
        gates_BGH = jax.nn.sigmoid(projected_BGH[:, :2] + _recurrent(hidden_BH, weight_HGK[:, :2]))
        r, z = gates_BGH[:, 0], gates_BGH[:, 1]
        n = jnp.tanh(projected_BGH[:, 2] + _recurrent(r * hidden_BH, weight_HGK[:, 2:])[:, 0])
        return (1.0 - z) * n + z * hidden_BH, [r, z, n]
    product_BGH = _recurrent(hidden_BH, weight_HGK)
    r, z = (jax.nn.sigmoid(projected_BGH[:, gate] + product_BGH[:, gate]) for gate in (0, 1))
    product = product_BGH[:, 2] + bias_H.astype(jnp.float32)[None, :]
    n = jnp.tanh(projected_BGH[:, 2] + r * product)
    return (1.0 - z) * n + z * hidden_BH, [r, z, n, product]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gru_scan(
    reverse: bool,
    projected_TBGH: jax.Array,
    weight_HGK: jax.Array,
    bias_H: jax.Array | None,
    hidden_BH: jax.Array,
    masks: Any,
) -> tuple[jax.Array, jax.Array]:
    return _gru_forward(reverse, projected_TBGH, weight_HGK, bias_H, hidden_BH, masks)[0]


def _gru_forward(
    reverse: bool,
    projected_TBGH: jax.Array,
    weight_HGK: jax.Array,
    bias_H: jax.Array | None,
    hidden_BH: jax.Array,
    masks: Any,
) -> Any:
    dtype = projected_TBGH.dtype

    def step(hidden: jax.Array, inputs: Any) -> Any:
        projected, mask = inputs
        (hidden,) = _reset(mask, hidden)
        new, saved = _gru_step(projected, weight_HGK, bias_H, hidden)
        (hidden,) = _keep(mask, (new,), (hidden,))
        return hidden, (hidden.astype(dtype), jnp.stack(saved, axis=1).astype(dtype))

    last, (hidden_TBH, gates_TBGH) = lax.scan(step, hidden_BH, (projected_TBGH, masks), reverse=reverse)
    return (hidden_TBH, last), (weight_HGK, bias_H, hidden_BH, hidden_TBH, gates_TBGH, masks)


def _gru_backward(reverse: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    weight_HGK, bias_H, hidden_BH, hidden_TBH, gates_TBGH, masks = saved
    dtype = weight_HGK.dtype
    before_TBH = _before(hidden_TBH, hidden_BH, masks, reverse)

    def step(dhidden: jax.Array, inputs: Any) -> Any:
        doutput, gates, before, mask = inputs
        dhidden, before = dhidden + doutput, before.astype(jnp.float32)
        r, z, n, *product = (gates[:, gate].astype(jnp.float32) for gate in range(gates.shape[1]))
        dn = _real(mask, dhidden * (1.0 - z) * (1.0 - n**2))
        dz = _real(mask, dhidden * (before - n) * z * (1.0 - z))
        if product:
            dr = dn * product[0] * r * (1.0 - r)
            dtotal_BGH = jnp.stack([dr, dz, dn * r], axis=1).astype(dtype)  # of the three products
            dbefore = dhidden * z + _recurrent_transposed(dtotal_BGH, weight_HGK)
        else:
            dscaled = _recurrent_transposed(dn[:, None].astype(dtype), weight_HGK[:, 2:])  # of r * before
            dr = dscaled * before * r * (1.0 - r)
            dtotal_BGH = jnp.stack([dr, dz, dn], axis=1).astype(dtype)
            dbefore = dhidden * z + dscaled * r + _recurrent_transposed(dtotal_BGH[:, :2], weight_HGK[:, :2])
        (dbefore,) = _reset(mask, *_keep(mask, (dbefore,), (dhidden,)))
        return dbefore, (dtotal_BGH, dn.astype(dtype))

    doutput_TBH, dlast_BH = cotangents
    inputs = (doutput_TBH.astype(jnp.float32), gates_TBGH, before_TBH, masks)
    dfirst_BH, (dtotal_TBGH, dn_TBH) = lax.scan(step, dlast_BH, inputs, reverse=not reverse)
    if bias_H is None:
        scaled_TBH = gates_TBGH[:, :, 0] * before_TBH
        dweight_HGK = jnp.concatenate(
            [
                _weight_gradient(before_TBH, dtotal_TBGH[:, :, :2]),
                _weight_gradient(scaled_TBH, dtotal_TBGH[:, :, 2:]),
            ],
            axis=1,
        )
        return dtotal_TBGH, dweight_HGK, None, dfirst_BH, None
    dbias_H = jnp.sum(dtotal_TBGH[:, :, 2], axis=(0, 1), dtype=jnp.float32).astype(bias_H.dtype)
    dprojected_TBGH = dtotal_TBGH.at[:, :, 2].set(dn_TBH)
    return dprojected_TBGH, _weight_gradient(before_TBH, dtotal_TBGH), dbias_H, dfirst_BH, None


_gru_scan.defvjp(_gru_forward, _gru_backward)


# ------------------------------------------------------------------------------------------------- what both need


def _check_reset(reset: str) -> None:
    if reset not in get_args(GRUReset):
        raise ValueError(f"reset={reset!r} is unknown: choose from {', '.join(map(repr, get_args(GRUReset)))}")


def _prepare(
    params: dict[str, Any], x_BTD: jax.Array, reset_BT: jax.Array | None, keep_BT: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Projection and masks with time in front, as a scan wants them. No masks at all: None, and no time is spent."""
    for name, mask in (("reset_BT", reset_BT), ("keep_BT", keep_BT)):
        if mask is not None and mask.shape != x_BTD.shape[:2]:
            raise ValueError(f"{name} {list(mask.shape)} must be [batch, time] of the input, {list(x_BTD.shape[:2])}")
    # A split of time ends here: the steps go one after the other.
    projected_TBGH = constrain(project(params, jnp.swapaxes(x_BTD, 0, 1)), (None, "batch", None, "mlp"))
    if reset_BT is None and keep_BT is None:
        return projected_TBGH, None
    if keep_BT is None:
        keep_BT = jnp.ones(x_BTD.shape[:2], bool)
    reset_BT = jnp.zeros_like(keep_BT) if reset_BT is None else reset_BT & keep_BT  # a pad changes nothing
    return projected_TBGH, (reset_BT.T[:, :, None], keep_BT.T[:, :, None])


def _weight_hidden(params: dict[str, Any], x: jax.Array) -> jax.Array:
    # Fully sharded weights are gathered once, before the loop, and not in each of its steps.
    return constrain(params["weight_hidden"].astype(x.dtype), ("activation_embed", None, "mlp"))


def _recurrent(hidden_BH: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    return jnp.einsum("BH,HGK->BGK", hidden_BH.astype(weight_HGK.dtype), weight_HGK, preferred_element_type=jnp.float32)


def _recurrent_transposed(dtotal_BGK: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    return jnp.einsum("BGK,HGK->BH", dtotal_BGK, weight_HGK, preferred_element_type=jnp.float32)


def _weight_gradient(before_TBH: jax.Array, dtotal_TBGK: jax.Array) -> jax.Array:
    dtype = dtotal_TBGK.dtype
    return jnp.einsum("TBH,TBGK->HGK", before_TBH.astype(dtype), dtotal_TBGK)


def _reset(mask: Any, *state: jax.Array) -> Sequence[jax.Array]:
    return state if mask is None else tuple(jnp.where(mask[0], 0.0, x) for x in state)


def _keep(mask: Any, new: Sequence[jax.Array], old: Sequence[jax.Array]) -> Any:
    return new if mask is None else tuple(jnp.where(mask[1], one, two) for one, two in zip(new, old, strict=True))


def _real(mask: Any, x: jax.Array) -> jax.Array:
    """``x`` [B, ...], zero at pads."""
    return x if mask is None else jnp.where(mask[1].reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)


def _before(states_TBH: jax.Array, first_BH: jax.Array, masks: Any, reverse: bool) -> jax.Array:
    """The state that each step started from, in the order of the tokens."""
    first_1BH = first_BH[None].astype(states_TBH.dtype)
    parts = (states_TBH[1:], first_1BH) if reverse else (first_1BH, states_TBH[:-1])
    before_TBH = jnp.concatenate(parts)
    return before_TBH if masks is None else jnp.where(masks[0], jnp.zeros_like(before_TBH), before_TBH)

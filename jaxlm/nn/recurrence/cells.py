"""The cells of an LSTM (Hochreiter & Schmidhuber 1997, with forget gate) and a GRU (Cho et al. 2014), and their specs.

The contribution of the inputs to all gates (:func:`project`) is computed before the loop over steps. In each step, the
cell adds the contribution of the hidden state. A model can also call the cells in a loop of its own, such as the loop
of a decoder with attention. The order of the gates is as in torch and cuDNN: i, f, g, o for an LSTM and r, z, n for a
GRU. The new state of a GRU is ``h' = (1 - z) * n + z * h``.

The state is float32 for every compute dtype. Shapes: B batch, D input width, G gates (LSTM 4, GRU 3), H hidden width
(K: the same width, on the output axis of ``weight_hidden``).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.nn.linear import linear
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Params, State, Uniform, require_arrays

GRUReset = Literal["after", "before"]
"""The array that the reset gate of a GRU multiplies.

``after``: the product of the state and the hidden weights of gate n, plus ``bias_hidden`` (cuDNN, torch, Keras, Flax).
One matmul can then multiply the state with the hidden weights of all gates. ``before``: the state, before it is
multiplied with the hidden weights of gate n (Cho et al. 2014)."""


def lstm_specs(inputs: int, width: int, init: Initializer | None = None) -> dict[str, ArraySpec]:
    """The specs of an LSTM layer: ``weight_input`` [D, G, H], ``weight_hidden`` [H, G, K] and ``bias`` [G, H].

    Args:
        inputs: D, the input width.
        width: H, the hidden width.
        init: initializer of the weights. None: uniform between ``-1 / sqrt(width)`` and ``1 / sqrt(width)``, as in
            torch. The bias is initialized with zeros.
    """
    return _specs(4, inputs, width, init)


def gru_specs(
    inputs: int, width: int, init: Initializer | None = None, *, reset: GRUReset = "after"
) -> dict[str, ArraySpec]:
    """The specs of a GRU layer: the arrays of :func:`lstm_specs`. If ``reset`` is "after", also ``bias_hidden`` [H].

    Args:
        inputs, width, init: see :func:`lstm_specs`. ``bias_hidden`` is initialized with zeros.
        reset: see ``GRUReset``.

    Raises:
        ValueError: an unknown ``reset``.
    """
    if reset not in get_args(GRUReset):
        raise ValueError(f"reset={reset!r} is unknown: choose from {', '.join(map(repr, get_args(GRUReset)))}")
    specs = _specs(3, inputs, width, init)
    return specs | ({"bias_hidden": ArraySpec((width,), ("norm",), ZEROS)} if reset == "after" else {})


def _specs(num_gates: int, inputs: int, width: int, init: Initializer | None) -> dict[str, ArraySpec]:
    init = Uniform(width**-0.5) if init is None else init
    return {
        "weight_input": ArraySpec((inputs, num_gates, width), ("embed", None, "mlp"), init, decay=True),
        "weight_hidden": ArraySpec((width, num_gates, width), ("embed", None, "mlp"), init, decay=True),
        "bias": ArraySpec((num_gates, width), (None, "mlp"), ZEROS),
    }


def lstm_state_specs(batch: int, width: int) -> dict[str, ArraySpec]:
    """The specs of the state of an LSTM layer: ``hidden`` and ``cell``, [B, H] float32, initially zeros."""
    return {**gru_state_specs(batch, width), "cell": ArraySpec((batch, width), ("batch", "activation_embed"))}


def gru_state_specs(batch: int, width: int) -> dict[str, ArraySpec]:
    """The specs of the state of a GRU layer: ``hidden``, [B, H] float32, initially zeros."""
    return {"hidden": ArraySpec((batch, width), ("batch", "activation_embed"))}


def project(params: Params, x: jax.Array) -> jax.Array:
    """The contribution of the inputs ``x`` [..., D] to all gates, with bias: [..., G, H] in the dtype of ``x``.

    Raises:
        ValueError: the last axis of ``x`` does not match the weights.
    """
    check_width(params, x)
    return linear({"weight": params["weight_input"], "bias": params["bias"]}, x)


def project_time_major(params: Params, x_BTD: jax.Array) -> jax.Array:
    """The result of :func:`project` with the time axis first, [T, B, G, H]. The time axis is not sharded."""
    return constrain(project(params, jnp.swapaxes(x_BTD, 0, 1)), (None, "batch", None, "mlp"))


def check_width(params: Params, x: jax.Array) -> None:
    """Check that the last axis of ``x`` matches ``weight_input``.

    Raises:
        ValueError: the widths differ.
    """
    require_arrays(x=x)
    width = params["weight_input"].shape[0]
    if x.shape[-1] != width:
        raise ValueError(f"the input has width {x.shape[-1]}, but weight_input needs width {width}")


def lstm_cell(params: Params, projected_BGH: jax.Array, state: State) -> dict[str, jax.Array]:
    """The state {"hidden", "cell"} of an LSTM after one token, [B, H] float32 each. ``hidden`` is also the output.

    Args:
        params: see :func:`lstm_specs`.
        projected_BGH: the result of :func:`project` for the token.
        state: the state before the token.
    """
    require_arrays(projected_BGH=projected_BGH)
    weight = params["weight_hidden"].astype(projected_BGH.dtype)
    preactivation_BGH = projected_BGH.astype(jnp.float32) + _hidden_product(state["hidden"], weight)
    i, f, o = (jax.nn.sigmoid(preactivation_BGH[:, gate]) for gate in (0, 1, 3))
    cell_BH = f * state["cell"] + i * jnp.tanh(preactivation_BGH[:, 2])
    return {"hidden": o * jnp.tanh(cell_BH), "cell": cell_BH}


def gru_cell(params: Params, projected_BGH: jax.Array, state: State) -> dict[str, jax.Array]:
    """The state {"hidden"} of a GRU after one token, [B, H] float32. ``hidden`` is also the output.

    Args:
        params: see :func:`gru_specs`. If they contain ``bias_hidden``, the reset gate is applied "after" the product
            with the hidden weights, otherwise "before" it (``GRUReset``).
        projected_BGH: the result of :func:`project` for the token.
        state: the state before the token.
    """
    require_arrays(projected_BGH=projected_BGH)
    weight, hidden_BH = params["weight_hidden"].astype(projected_BGH.dtype), state["hidden"]
    projected_BGH = projected_BGH.astype(jnp.float32)
    gates_BGH = jax.nn.sigmoid(projected_BGH[:, :2] + _hidden_product(hidden_BH, weight[:, :2]))
    r, z = gates_BGH[:, 0], gates_BGH[:, 1]
    if "bias_hidden" in params:
        bias_H = params["bias_hidden"].astype(jnp.float32)
        product_BH = r * (_hidden_product(hidden_BH, weight[:, 2:])[:, 0] + bias_H[None, :])
    else:
        product_BH = _hidden_product(r * hidden_BH, weight[:, 2:])[:, 0]
    n = jnp.tanh(projected_BGH[:, 2] + product_BH)
    return {"hidden": (1.0 - z) * n + z * hidden_BH}


def _hidden_product(hidden_BH: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    return jnp.einsum("BH,HGK->BGK", hidden_BH.astype(weight_HGK.dtype), weight_HGK, preferred_element_type=jnp.float32)

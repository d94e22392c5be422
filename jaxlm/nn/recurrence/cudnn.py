"""The LSTM of cuDNN (``jax.experimental.rnn``). Shapes as in ``jaxlm.nn.recurrence.cells``; T is time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.spec import Params, State


def unsupported_reason(kind: str, x_BTD: jax.Array, reset_BT: jax.Array | None) -> str | None:
    """Why cuDNN does not support the arguments, as a part of an error message; None if it supports them."""
    if kind != "lstm":
        return "supports only an LSTM"
    if x_BTD.dtype != jnp.float32:
        return f"supports only float32, got {x_BTD.dtype}"
    return None if reset_BT is None else "cannot reset the state at segment boundaries"


def lstm(
    params: Params,
    x_BTD: jax.Array,
    state: State | None,
    keep_BT: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden states [B, T, H] and the last state. The arguments are those of ``jaxlm.nn.recurrence.lstm``."""
    from jax.experimental import rnn

    (B, T, D), H = x_BTD.shape, params["weight_hidden"].shape[0]
    lengths_B = jnp.full((B,), T, jnp.int32)
    if keep_BT is not None:
        lengths_B = jnp.maximum(jnp.sum(keep_BT, axis=1, dtype=jnp.int32), 1)  # 1 for a row without real tokens
    time_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    is_real_BT = time_BT < lengths_B[:, None]
    # A unidirectional LSTM of cuDNN reads from the first token to the last. For the other direction, reverse the tokens
    # of each row. The padding stays at the end of the row.
    order_BT1 = jnp.where(is_real_BT, lengths_B[:, None] - 1 - time_BT, time_BT)[:, :, None]
    if reverse:
        x_BTD = jnp.take_along_axis(x_BTD, order_BT1, axis=1)
    # cuDNN takes one flat array: input weights and hidden weights, each [gates, outputs, inputs], and two biases.
    matrices = [params[name].astype(jnp.float32) for name in ("weight_input", "weight_hidden")]
    bias = params["bias"].astype(jnp.float32).ravel()
    weights = jnp.concatenate(
        [*(jnp.moveaxis(matrix, 0, 2).ravel() for matrix in matrices), bias, jnp.zeros_like(bias)]
    )
    initial = [
        jnp.zeros((1, B, H)) if state is None else state[name][None].astype(jnp.float32) for name in ("hidden", "cell")
    ]
    hidden_BTH, *last = rnn.lstm(x_BTD, *initial, weights, lengths_B, D, H, 1, 0.0, False)
    if reverse:
        hidden_BTH = jnp.take_along_axis(hidden_BTH, order_BT1, axis=1)
    hidden_BH, cell_BH = (x[0] for x in last)
    if keep_BT is not None:
        # The output at padding is the unchanged hidden state. A reverse layer reads the padding at the end of a row
        # before all tokens, so the output there is the initial state.
        padding_output_BH = initial[0][0] if reverse else hidden_BH
        hidden_BTH = jnp.where(is_real_BT[:, :, None], hidden_BTH, padding_output_BH[:, None])
        # cuDNN supports padding only at the end of a row. A row with padding elsewhere, or without real tokens, gives
        # NaN.
        invalid_B1 = jnp.any(is_real_BT != keep_BT, axis=1, keepdims=True)
        hidden_BTH = jnp.where(invalid_B1[:, :, None], jnp.nan, hidden_BTH)
        hidden_BH, cell_BH = (jnp.where(invalid_B1, jnp.nan, x) for x in (hidden_BH, cell_BH))
    return hidden_BTH, {"hidden": hidden_BH, "cell": cell_BH}

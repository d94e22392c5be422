"""Recurrent layers: LSTM (Hochreiter & Schmidhuber 1997, with forget gate) and GRU (Cho et al. 2014).

A layer first computes the contribution of the inputs to all gates (``project``), then loops over a cell, which adds the
contribution of the state. The cells ``lstm_cell`` and ``gru_cell`` can also be used in other loops, such as a decoder
with attention. The conventions are those of torch and cuDNN: gates i, f, g, o of an LSTM and r, z, n of a GRU, with
``h' = (1 - z) * n + z * h``.

The state is float32 for every compute dtype. It is reset to zeros before the first token of a document, and padding
does not change it.

Shapes: B batch, T time, D input width, G gates (LSTM 4, GRU 3), H hidden width (K for the second hidden axis).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn import chunked_recurrence
from jaxlm.nn.chunked_recurrence import GRU_AFTER, GRU_BEFORE, LSTM
from jaxlm.nn.linear import linear
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Uniform

GRUReset = Literal["after", "before"]
"""Where the reset gate acts: ``after`` the product with the hidden weights (cuDNN, torch, Keras, Flax), so that one
product serves all gates; or ``before`` it, on the state itself (Cho et al. 2014)."""

Implementation = Literal["reference", "chunked", "cudnn"]
"""``reference`` is a loop over ``lstm_cell`` or ``gru_cell``, ``chunked`` is ``jaxlm.nn.chunked_recurrence``, ``cudnn``
is the LSTM of ``jax.experimental.rnn``."""


def lstm_specs(inputs: int, width: int, init: Initializer | None = None) -> dict[str, ArraySpec]:
    """The specs of one LSTM layer. The default ``init`` is torch's: uniform with the bound ``1 / sqrt(width)``."""
    return _specs(4, inputs, width, init)


def gru_specs(
    inputs: int, width: int, init: Initializer | None = None, *, reset: GRUReset = "after"
) -> dict[str, ArraySpec]:
    """The specs of one GRU layer: gates r, z, n. ``bias_hidden`` [H] of gate n exists only if ``reset`` is "after"."""
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
    """The specs of the state of an LSTM layer: ``hidden`` and ``cell``, [B, H] float32, initially zeros."""
    return {**gru_state_specs(batch, width), "cell": ArraySpec((batch, width), ("batch", "activation_embed"))}


def gru_state_specs(batch: int, width: int) -> dict[str, ArraySpec]:
    """The specs of the state of a GRU layer: ``hidden``, [B, H] float32, initially zeros."""
    return {"hidden": ArraySpec((batch, width), ("batch", "activation_embed"))}


def segment_boundaries(
    segment_ids_BT: jax.Array, last_segment_B: jax.Array | None = None, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The masks ``(reset_BT, keep_BT)`` for the layers of this module, and the last segment of each row, [B].

    A document continues after padding. It also continues in the next call, if that call gets the last segment.

    Args:
        segment_ids_BT: 0 for padding, 1, 2, ... for documents.
        last_segment_B: the last segment of the previous call, 0 for none.
        reverse: the layer reads from the last token to the first.

    Example:
        >>> reset, keep, last = segment_boundaries(jnp.array([[0, 1, 1, 2, 0, 2]]))
        >>> reset.astype(int).tolist(), keep.astype(int).tolist(), last.tolist()
        ([[0, 0, 0, 1, 0, 0]], [[0, 1, 1, 1, 0, 1]], [2])
    """
    if reverse:
        segment_ids_BT = jnp.flip(segment_ids_BT, axis=1)
    T = segment_ids_BT.shape[1]
    previous_B = jnp.zeros_like(segment_ids_BT[:, 0]) if last_segment_B is None else last_segment_B
    all_BT = jnp.concatenate([previous_B[:, None], segment_ids_BT], axis=1)  # [B, T + 1]
    index_BT = jnp.where(all_BT > 0, jnp.arange(T + 1, dtype=jnp.int32)[None, :], 0)
    last_real_BT = jnp.take_along_axis(all_BT, lax.cummax(index_BT, axis=1), axis=1)
    keep_BT = segment_ids_BT > 0
    reset_BT = keep_BT & (last_real_BT[:, :-1] > 0) & (last_real_BT[:, :-1] != segment_ids_BT)
    if reverse:
        reset_BT, keep_BT = jnp.flip(reset_BT, axis=1), jnp.flip(keep_BT, axis=1)
    return reset_BT, keep_BT, last_real_BT[:, -1]


def check_masks(reset_BT: Any, keep_BT: Any, shape: Sequence[int], what: str = "input") -> None:
    """Check that the masks have the ``shape`` [B, T].

    Raises:
        ValueError: a mask has another shape. The message calls the array with this shape ``what``.
    """
    for name, mask in (("reset_BT", reset_BT), ("keep_BT", keep_BT)):
        if mask is not None and mask.shape != tuple(shape):
            raise ValueError(f"{name} {list(mask.shape)} must be [batch, time] of the {what}, {list(shape)}")


def both_masks(reset_BT: Any, keep_BT: Any, shape: Sequence[int]) -> tuple[jax.Array, jax.Array] | None:
    """``(reset_BT, keep_BT)`` without resets at padding; None if both are None."""
    if reset_BT is None and keep_BT is None:
        return None
    keep_BT = jnp.ones(shape, bool) if keep_BT is None else keep_BT
    return jnp.zeros_like(keep_BT) if reset_BT is None else reset_BT & keep_BT, keep_BT


def project(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The contribution of the inputs ``x`` [..., D] to all gates, with bias: [..., G, H] in the dtype of ``x``.

    Raises:
        ValueError: the last axis of ``x`` does not match the weights.
    """
    _check_width(params, x)
    return linear({"weight": params["weight_input"], "bias": params["bias"]}, x)


def _check_width(params: dict[str, Any], x: jax.Array) -> None:
    width = params["weight_input"].shape[0]
    if x.shape[-1] != width:
        raise ValueError(f"the input has width {x.shape[-1]}, but weight_input needs width {width}")


# ---------------------------------------------------------------------------------------------------------- LSTM


def lstm_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """The state {"hidden", "cell"} after one token; its ``hidden`` is the output.

    Args:
        projected_BGH: the result of :func:`project` for the token.
        state: the state before the token.
    """
    weight = params["weight_hidden"].astype(projected_BGH.dtype)
    total_BGH = projected_BGH.astype(jnp.float32) + _hidden_product(state["hidden"], weight)
    i, f, o = (jax.nn.sigmoid(total_BGH[:, gate]) for gate in (0, 1, 3))
    cell_BH = f * state["cell"] + i * jnp.tanh(total_BGH[:, 2])
    return {"hidden": o * jnp.tanh(cell_BH), "cell": cell_BH}


def lstm(
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden state of an LSTM layer after each token, [B, T, H] in the dtype of ``x``, and the last state.

    Args:
        params: parameters as in :func:`lstm_specs`. For DropConnect, apply dropout to ``weight_hidden`` first.
        state: {"hidden", "cell"}, [B, H] float32 each; None: zeros.
        reset_BT: True where the state is reset to zeros before the token (:func:`segment_boundaries`). None: no resets.
        keep_BT: False for padding: the state does not change, and the output is the unchanged state. None: no padding.
        reverse: read from the last token to the first; each output keeps the index of its token.
        implementation: ``reference`` (short, gradient by autodiff); ``chunked`` (custom gradient); ``cudnn`` (float32
            on an NVIDIA GPU, no resets; a row without tokens, or with padding before a token, gives NaN); or None for
            the fastest one, which is ``chunked``.
        remat: recompute the gates of each chunk in the backward pass instead of storing them (only ``chunked``).

    Raises:
        ValueError: the shapes do not match, or the implementation does not support the arguments.
    """
    _check(params, x_BTD, reset_BT, keep_BT, implementation, remat)
    if implementation == "cudnn":
        return _cudnn_lstm(params, x_BTD, state, reset_BT, keep_BT, reverse)
    names = ("hidden", "cell")
    return _run_layer(names, lstm_cell, LSTM, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat)


# ----------------------------------------------------------------------------------------------------------- GRU


def gru_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """The state {"hidden"} after one token, whose ``projected`` is the result of :func:`project`.

    The reset gate acts after the product if the parameters contain ``bias_hidden``, otherwise before it.
    """
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


def gru(
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden state of a GRU layer after each token, [B, T, H] in the dtype of ``x``, and the last state {"hidden"}.

    The arguments are those of :func:`lstm`, except that JAX has no ``cudnn`` implementation of a GRU. The reset gate
    acts after the product if the parameters contain ``bias_hidden``, otherwise before it.
    """
    _check(params, x_BTD, reset_BT, keep_BT, implementation, remat)
    if implementation == "cudnn":
        raise ValueError("implementation='cudnn' supports only an LSTM: for a GRU, choose reference or chunked")
    cell = GRU_AFTER if "bias_hidden" in params else GRU_BEFORE
    return _run_layer(
        ("hidden",), gru_cell, cell, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat
    )


# -------------------------------------------------------------------------------------------------------- shared


def _check_reset(reset: str) -> None:
    if reset not in get_args(GRUReset):
        raise ValueError(f"reset={reset!r} is unknown: choose from {', '.join(map(repr, get_args(GRUReset)))}")


def _check(
    params: dict[str, Any],
    x_BTD: jax.Array,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
    implementation: str | None,
    remat: bool,
) -> None:
    _check_width(params, x_BTD)
    check_masks(reset_BT, keep_BT, x_BTD.shape[:2])
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"no recurrent implementation {implementation!r}: choose from {', '.join(get_args(Implementation))}"
        )
    if remat and implementation not in (None, "chunked"):
        raise ValueError(f"implementation={implementation!r} does not support remat: use implementation='chunked'")


def _run_layer(
    names: tuple[str, ...],
    step: Any,
    cell: chunked_recurrence.Cell,
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
    reverse: bool,
    implementation: Implementation | None,
    remat: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    B, T, _ = x_BTD.shape
    x_BTD = constrain(x_BTD, ("batch", None, None))  # the time axis is not sharded: steps are sequential
    # Fully sharded weights are gathered once before the loop instead of in every step.
    weights = {
        name: constrain(params[name].astype(x_BTD.dtype), ("activation_embed", None, "mlp"))
        for name in ("weight_input", "weight_hidden")
    }
    params = {**params, **weights}
    if state is None:
        like_BH = project(params, x_BTD[:, 0])[:, 0]  # has the sharding of the state
        state = {name: jnp.zeros_like(like_BH, jnp.float32) for name in names}
    masks = jax.tree.map(lambda mask_BT: mask_BT[:, :, None], both_masks(reset_BT, keep_BT, (B, T)))
    if implementation == "reference":
        return _reference(step, params, x_BTD, state, masks, reverse)
    hidden_BTH, last = chunked_recurrence.layer(
        cell, params, x_BTD, tuple(state[name] for name in names), masks,
        chunk=_chunk(B, T), reverse=reverse, remat=remat,
    )  # fmt: skip
    return hidden_BTH, dict(zip(names, last, strict=True))


def _chunk(B: int, T: int) -> int:
    """The number of steps of a chunk: all steps on an accelerator or over several devices, fewer on a CPU.

    On a CPU, the arrays of a chunk should fit into the cache, and allocation is slow (0.4 ms/MB for arrays over 32 MB).
    """
    if sharding.platform() != "cpu" or sharding.active() is not None:
        return T
    return max(1, CHUNK_ROWS // B)


CHUNK_ROWS = 512
"""The number of rows of the matmuls of a chunk, steps times B.

CPU time in ms of an LSTM, forward / forward and backward (jaxlib 0.10.2, AMD Zen 5):

    rows              128      256      512      1024     all
    T128 B32 H512     103/344  98/311   92/312   91/306   109/326
    T256 B64 H256     100/388  100/361  99/343   100/350  138/401
"""


def _cudnn_lstm(
    params: dict[str, Any],
    x_BTD: jax.Array,
    state: dict[str, Any] | None,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    if sharding.platform() != "gpu":
        raise ValueError(
            f"implementation='cudnn' needs an NVIDIA GPU, but the platform is {sharding.platform()}: leave it out"
        )
    if x_BTD.dtype != jnp.float32:
        raise ValueError(f"implementation='cudnn' computes in float32, not in {x_BTD.dtype}: choose 'chunked'")
    if reset_BT is not None:
        raise ValueError("implementation='cudnn' cannot reset the state at segment boundaries: choose 'chunked'")
    from jax.experimental import rnn

    (B, T, D), H = x_BTD.shape, params["weight_hidden"].shape[0]
    lengths_B = jnp.full((B,), T, jnp.int32)
    if keep_BT is not None:
        lengths_B = jnp.maximum(jnp.sum(keep_BT, axis=1, dtype=jnp.int32), 1)  # a row without tokens becomes NaN below
    time_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    real_BT = time_BT < lengths_B[:, None]
    # cuDNN reads only forward. To read backward, reverse the tokens of each row and leave its padding at the end.
    order_BT1 = jnp.where(real_BT, lengths_B[:, None] - 1 - time_BT, time_BT)[:, :, None]
    if reverse:
        x_BTD = jnp.take_along_axis(x_BTD, order_BT1, axis=1)
    # One flat array: input weights, hidden weights, and two biases, each in the order (gates, outputs, inputs).
    matrices = [params[name].astype(jnp.float32) for name in ("weight_input", "weight_hidden")]
    bias = params["bias"].astype(jnp.float32).ravel()
    weights = jnp.concatenate(
        [*(jnp.moveaxis(matrix, 0, 2).ravel() for matrix in matrices), bias, jnp.zeros_like(bias)]
    )
    initial = [jnp.zeros((1, B, H)) if state is None else state[name][None] for name in ("hidden", "cell")]
    hidden_BTH, *last = rnn.lstm(x_BTD, *initial, weights, lengths_B, D, H, 1, 0.0, False)
    if reverse:
        hidden_BTH = jnp.take_along_axis(hidden_BTH, order_BT1, axis=1)
    hidden_BH, cell_BH = (x[0] for x in last)
    if keep_BT is not None:
        # The output at padding is the unchanged state. A reverse layer reads the padding first, in the initial state.
        pad_BH = initial[0][0] if reverse else hidden_BH
        hidden_BTH = jnp.where(real_BT[:, :, None], hidden_BTH, pad_BH[:, None])
        invalid_B1 = jnp.any(real_BT != keep_BT, axis=1, keepdims=True)
        hidden_BTH = jnp.where(invalid_B1[:, :, None], jnp.nan, hidden_BTH)
        hidden_BH, cell_BH = (jnp.where(invalid_B1, jnp.nan, x) for x in (hidden_BH, cell_BH))
    return hidden_BTH, {"hidden": hidden_BH, "cell": cell_BH}


def _reference(
    step: Any, params: dict[str, Any], x_BTD: jax.Array, state: dict[str, Any], masks: Any, reverse: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A ``lax.scan`` over the cell; its gradient comes from autodiff."""

    def scan_step(state: dict[str, Any], inputs: Any) -> Any:
        projected_BGH, mask = inputs
        if mask is not None:
            state = {name: jnp.where(mask[0], 0.0, old) for name, old in state.items()}
        new = step(params, projected_BGH, state)
        if mask is not None:
            new = {name: jnp.where(mask[1], new[name], old) for name, old in state.items()}
        return new, new["hidden"].astype(x_BTD.dtype)

    projected_BTGH = constrain(project(params, x_BTD), ("batch", None, None, "mlp"))
    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (projected_BTGH, masks))
    last, hidden_TBH = lax.scan(scan_step, state, by_time, reverse=reverse)
    return jnp.swapaxes(hidden_TBH, 0, 1), last


def _hidden_product(hidden_BH: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    return jnp.einsum("BH,HGK->BGK", hidden_BH.astype(weight_HGK.dtype), weight_HGK, preferred_element_type=jnp.float32)

"""LSTM and GRU layers. The cells and their conventions are in ``jaxlm.nn.recurrence.cells``.

Two masks describe the documents of a row. ``reset_BT`` marks the tokens before which the state is reset to zeros.
``keep_BT`` marks the real tokens; padding does not change the state. Shapes: B batch, T time, D input width, G gates
(LSTM 4, GRU 3), H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn import choices
from jaxlm.nn.recurrence import chunked, cudnn, pallas
from jaxlm.nn.recurrence.cells import (
    check_width,
    gru_cell,
    gru_state_specs,
    lstm_cell,
    lstm_state_specs,
    project,
    project_time_major,
)
from jaxlm.nn.segments import Masks, check_masks, check_state, complete_masks, keep_state, reset_state
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Params, State, require_arrays

Implementation = Literal["reference", "chunked", "pallas", "cudnn"]
"""``reference`` is a ``lax.scan`` over ``lstm_cell`` or ``gru_cell``; ``chunked`` is ``jaxlm.nn.recurrence.chunked``;
``pallas`` is a TPU kernel; ``cudnn`` is the LSTM of cuDNN."""


# ---------------------------------------------------------------------------------------------------------- LSTM


def lstm(
    params: Params,
    x_BTD: jax.Array,
    state: State | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden state of an LSTM layer after each token, [B, T, H] in the dtype of ``x``, and the last state.

    Args:
        params: see ``jaxlm.nn.recurrence.lstm_specs``. For DropConnect, apply dropout to ``weight_hidden`` before the
            call.
        state: {"hidden", "cell"}, [B, H] each, cast to float32; None: zeros.
        reset_BT: True where the state is reset to zeros before the token (``jaxlm.nn.segments.segment_boundaries``).
            None: no resets.
        keep_BT: False at padding. There, the state does not change, and the output is the unchanged hidden state. None:
            no padding.
        reverse: read from the last token to the first. Output t still belongs to token t.
        implementation: ``reference`` is a loop over the steps, differentiated by autodiff. ``chunked`` is a loop over
            chunks of steps with a custom gradient. ``pallas`` is a TPU kernel with a custom gradient; it has no second
            derivatives. ``cudnn`` is for float32 on an NVIDIA GPU, without resets; a row without real tokens, or with
            padding before a real token, gives NaN. None chooses ``pallas`` on a TPU if ``pallas`` supports the
            arguments, otherwise ``chunked``.
        remat: True recomputes the gates in the backward pass instead of storing them. Only ``chunked`` supports it.

    Raises:
        ValueError: the shapes do not match, there are no steps, a mask is not boolean, the implementation is unknown,
            or the implementation does not support the arguments or the platform.
    """
    return _layer(_LSTM, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat)


def lstm_states(params: Params, x_BTD: jax.Array, reset_BT: jax.Array, keep_BT: jax.Array) -> dict[str, jax.Array]:
    """The state of an LSTM layer after each token: ``hidden`` and ``cell``, [B, T, H] float32.

    :func:`lstm` is faster, but it returns the cell only after the last token. The masks are as in :func:`lstm`, but
    None is not allowed. The state before the first token is zeros.

    Raises:
        ValueError: the shapes do not match, there are no steps, or a mask is not boolean.
    """
    _check_shapes(_LSTM, params, x_BTD, None, reset_BT, keep_BT)
    masks = reset_BT & keep_BT, keep_BT
    # A NaN input at padding would make the gradient of the weights NaN.
    x_BTD = jnp.where(keep_BT[:, :, None], x_BTD, jnp.zeros_like(x_BTD))
    zeros_BH = jnp.zeros_like(project(params, x_BTD[:, 0])[:, 0], jnp.float32)
    state = {"hidden": zeros_BH, "cell": zeros_BH}
    return _scan_cell(lstm_cell, params, x_BTD, state, masks, output=lambda state: state)[0]


# ----------------------------------------------------------------------------------------------------------- GRU


def gru(
    params: Params,
    x_BTD: jax.Array,
    state: State | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hidden state of a GRU layer after each token, [B, T, H] in the dtype of ``x``, and the last state {"hidden"}.

    The arguments and errors are as in :func:`lstm`, but ``cudnn`` is not supported, because JAX has no GRU of cuDNN. If
    the parameters contain ``bias_hidden``, the reset gate is applied after the product with the hidden weights,
    otherwise before it (``GRUReset``). ``pallas`` supports only parameters with ``bias_hidden``.
    """
    cell = _GRU_AFTER if "bias_hidden" in params else _GRU_BEFORE
    return _layer(cell, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat)


# -------------------------------------------------------------------------------------------------------- shared


class _Cell(NamedTuple):
    """The functions of a cell that the implementations of its layer use.

    Attributes:
        kind: the name of the layer in error messages; for ``pallas``, the kind of the kernel.
        state_specs: the specs of the state, from the batch size and the hidden width.
        step: for ``reference``, the function that computes one step.
        chunked: for ``chunked``, the functions of the cell.
    """

    kind: pallas.Kind
    state_specs: Callable[[int, int], dict[str, ArraySpec]]
    step: Callable[..., dict[str, jax.Array]]
    chunked: chunked.Cell


_LSTM = _Cell("lstm", lstm_state_specs, lstm_cell, chunked.LSTM)
_GRU_AFTER = _Cell("gru", gru_state_specs, gru_cell, chunked.GRU_AFTER)
_GRU_BEFORE = _Cell("gru", gru_state_specs, gru_cell, chunked.GRU_BEFORE)


def _check_shapes(
    cell: _Cell, params: Params, x_BTD: jax.Array, state: State | None, reset_BT: Any, keep_BT: Any
) -> None:
    require_arrays(x_BTD=x_BTD)
    if x_BTD.ndim != 3 or not x_BTD.shape[1]:
        raise ValueError(f"the input {list(x_BTD.shape)} must be [batch, time, width], with at least one step")
    check_width(params, x_BTD)
    if state is not None:
        check_state(state, x_BTD.shape[0], cell.state_specs(1, params["weight_hidden"].shape[0]))
    check_masks(reset_BT, keep_BT, x_BTD.shape[:2])


def _layer(
    cell: _Cell,
    params: Params,
    x_BTD: jax.Array,
    state: State | None,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
    reverse: bool,
    implementation: Implementation | None,
    remat: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    _check_shapes(cell, params, x_BTD, state, reset_BT, keep_BT)
    unsupported = pallas.unsupported_reason(params, x_BTD)
    reasons = {"pallas": unsupported, "cudnn": cudnn.unsupported_reason(cell.kind, x_BTD, reset_BT)}
    if remat:
        reasons = dict.fromkeys(("reference", "pallas", "cudnn"), "does not support remat")
    choices.check_implementation(cell.kind, implementation, Implementation, reasons)
    if implementation == "cudnn":
        return cudnn.lstm(params, x_BTD, state, keep_BT, reverse)
    B, T, _ = x_BTD.shape
    masks = complete_masks(reset_BT, keep_BT, (B, T))
    x_BTD = constrain(x_BTD, ("batch", None, None))  # the time axis is not sharded, because steps are sequential
    # Fully sharded weights are gathered once before the loop, not in every step.
    weights = {
        name: constrain(params[name].astype(x_BTD.dtype), ("activation_embed", None, "mlp"))
        for name in ("weight_input", "weight_hidden")
    }
    params = {**params, **weights}
    if masks is not None:  # a NaN input at padding would make the gradient of the weights NaN
        x_BTD = jnp.where(masks[1][:, :, None], x_BTD, jnp.zeros_like(x_BTD))
    names = tuple(cell.state_specs(1, params["weight_hidden"].shape[0]))
    if state is None:
        like_BH = project(params, x_BTD[:, 0])[:, 0]  # an array with the sharding of the state
        state = {name: jnp.zeros_like(like_BH) for name in names}
    state = {name: state[name].astype(jnp.float32) for name in names}
    if implementation == "reference":
        output = lambda state: state["hidden"].astype(x_BTD.dtype)  # noqa: E731
        return _scan_cell(cell.step, params, x_BTD, state, masks, output, reverse)
    masks_BT1 = jax.tree.map(lambda mask_BT: mask_BT[:, :, None], masks)
    arguments = params, x_BTD, tuple(state.values()), masks_BT1
    if (implementation or choices.recurrence(unsupported, remat=remat)) == "pallas":
        hidden_BTH, last = pallas.layer(cell.kind, *arguments, reverse=reverse)
    else:
        chunk = choices.recurrence_chunk(B, T)
        hidden_BTH, last = chunked.layer(cell.chunked, *arguments, chunk=chunk, reverse=reverse, remat=remat)
    return hidden_BTH, dict(zip(names, last, strict=True))


def _scan_cell(
    step: Any, params: Params, x_BTD: jax.Array, state: State, masks: Masks, output: Callable[[State], Any],
    reverse: bool = False,
) -> tuple[Any, dict[str, jax.Array]]:  # fmt: skip
    """``output(state)`` of the state after each token, [B, T, ...], and the last state.

    A ``lax.scan`` calls ``step`` for each token. Autodiff computes the gradient.
    """

    def scan_step(state: State, inputs: Any) -> Any:
        projected_BGH, mask = inputs
        state = reset_state(mask, state)
        state = keep_state(mask, step(params, projected_BGH, state), state)
        return state, output(state)

    inputs = project_time_major(params, x_BTD), jax.tree.map(jnp.transpose, masks)
    last, outputs = lax.scan(scan_step, state, inputs, reverse=reverse)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs), last

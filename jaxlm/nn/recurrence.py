"""Recurrent layers: LSTM (Hochreiter & Schmidhuber 1997, with forget gate) and GRU (Cho et al. 2014).

A layer is ``project`` (the input's part of all gates) and then a loop of a cell, which adds the state's part. What a
cell does alone, ``lstm_cell`` and ``gru_cell``, may stand in another loop, such as a decoder that attends. Conventions
are those of torch and cuDNN: gates i, f, g, o and r, z, n; ``h' = (1 - z) * n + z * h``.

The state is float32, whatever the compute dtype. A document border puts it back to zeros *before* the token there is
read; a pad leaves it as it is.

Shapes: B batch, T time, D input width, G gates (LSTM 4, GRU 3), H hidden width (K where there are two).
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
"""Where the reset gate acts: ``after`` the product with the hidden weights (cuDNN, torch, Keras, Flax), which can then
be one for all gates, or ``before`` it, on the state itself (Cho et al. 2014)."""

Implementation = Literal["reference", "chunked", "cudnn"]
"""``reference`` is a loop of ``lstm_cell`` or ``gru_cell``, ``chunked`` is in ``chunked_recurrence``, ``cudnn`` an LSTM
by ``jax.experimental.rnn``."""


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


def check_masks(reset_BT: Any, keep_BT: Any, shape: Sequence[int], what: str = "input") -> None:
    """Refuse masks of steps that have not the ``shape`` [B, T] of ``what`` is read.

    Raises:
        ValueError: a mask of another shape.
    """
    for name, mask in (("reset_BT", reset_BT), ("keep_BT", keep_BT)):
        if mask is not None and mask.shape != tuple(shape):
            raise ValueError(f"{name} {list(mask.shape)} must be [batch, time] of the {what}, {list(shape)}")


def both_masks(reset_BT: Any, keep_BT: Any, shape: Sequence[int]) -> tuple[jax.Array, jax.Array] | None:
    """``(reset_BT, keep_BT)`` where at least one is given, a pad resetting nothing; else None."""
    if reset_BT is None and keep_BT is None:
        return None
    keep_BT = jnp.ones(shape, bool) if keep_BT is None else keep_BT
    return jnp.zeros_like(keep_BT) if reset_BT is None else reset_BT & keep_BT, keep_BT


def project(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The input's part of every gate, bias included: ``x`` [..., D] to [..., G, H] in ``x``'s dtype.

    Raises:
        ValueError: ``x`` is not as wide as the weights.
    """
    _check_width(params, x)
    return linear({"weight": params["weight_input"], "bias": params["bias"]}, x)


def _check_width(params: dict[str, Any], x: jax.Array) -> None:
    width = params["weight_input"].shape[0]
    if x.shape[-1] != width:
        raise ValueError(f"the input is {x.shape[-1]} wide, but weight_input is made for {width}")


# ---------------------------------------------------------------------------------------------------------- LSTM


def lstm_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """One step: the state {"hidden", "cell"} after a token whose ``project`` is given. The output is its ``hidden``."""
    weight = params["weight_hidden"].astype(projected_BGH.dtype)
    total_BGH = projected_BGH.astype(jnp.float32) + _recurrent(state["hidden"], weight)
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
    """One LSTM layer: the hidden state after each token, [B, T, H] in ``x``'s dtype, and the last state.

    Args:
        params: as ``lstm_specs``. For DropConnect, drop ``weight_hidden`` before.
        state: {"hidden", "cell"}, [B, H] float32 each; None is zeros.
        reset_BT: True where the state goes back to zeros before the token is read (see ``borders``). None: nowhere.
        keep_BT: False where the token is padding: the state stays as it is, and the output repeats it. None: all real.
        reverse: read from the last token to the first; outputs stay at their tokens.
        implementation: ``reference`` (short; autodiff's gradient), ``chunked`` (gradient of its own), ``cudnn``
            (float32 on an NVIDIA GPU; no resets; each row has a token, and pads behind its tokens alone, or is NaN), or
            None for the best that is known, which is ``chunked``.
        remat: keep no gates for the gradient, but compute those of a chunk of time again (``chunked`` alone).

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot run.
    """
    _check(params, x_BTD, reset_BT, keep_BT, implementation, remat)
    if implementation == "cudnn":
        return _cudnn_lstm(params, x_BTD, state, reset_BT, keep_BT, reverse)
    names = ("hidden", "cell")
    return _run(names, lstm_cell, LSTM, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat)


# ----------------------------------------------------------------------------------------------------------- GRU


def gru_cell(params: dict[str, Any], projected_BGH: jax.Array, state: dict[str, Any]) -> dict[str, jax.Array]:
    """One step: the state {"hidden"} after a token whose ``project`` is given.

    The reset gate acts after the product where the params have a ``bias_hidden``, before it where not (``gru_specs``).
    """
    weight, hidden_BH = params["weight_hidden"].astype(projected_BGH.dtype), state["hidden"]
    projected_BGH = projected_BGH.astype(jnp.float32)
    gates_BGH = jax.nn.sigmoid(projected_BGH[:, :2] + _recurrent(hidden_BH, weight[:, :2]))
    r, z = gates_BGH[:, 0], gates_BGH[:, 1]
    if "bias_hidden" in params:
        bias_H = params["bias_hidden"].astype(jnp.float32)
        product_BH = r * (_recurrent(hidden_BH, weight[:, 2:])[:, 0] + bias_H[None, :])
    else:
        product_BH = _recurrent(r * hidden_BH, weight[:, 2:])[:, 0]
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
    """One GRU layer, as ``lstm`` (which explains the arguments), with the state {"hidden"}. No ``cudnn``: JAX has none.

    The reset gate acts after the product where the params have a ``bias_hidden``, before it where not (``gru_specs``).
    """
    _check(params, x_BTD, reset_BT, keep_BT, implementation, remat)
    if implementation == "cudnn":
        raise ValueError("implementation='cudnn' runs an LSTM alone: for a GRU choose reference or chunked")
    cell = GRU_AFTER if "bias_hidden" in params else GRU_BEFORE
    return _run(("hidden",), gru_cell, cell, params, x_BTD, state, reset_BT, keep_BT, reverse, implementation, remat)


# ------------------------------------------------------------------------------------------------- what both need


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
        raise ValueError(f"implementation={implementation!r} has no remat: take implementation='chunked'")


def _run(
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
    x_BTD = constrain(x_BTD, ("batch", None, None))  # a split of time ends here: the steps go one after the other
    # Fully sharded weights are gathered once, before the loop, and not in each of its steps.
    weights = {
        name: constrain(params[name].astype(x_BTD.dtype), ("activation_embed", None, "mlp"))
        for name in ("weight_input", "weight_hidden")
    }
    params = {**params, **weights}
    if state is None:
        like_BH = project(params, x_BTD[:, 0])[:, 0]  # split over devices as the state will be
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
    """Steps of a chunk of time: one product for all steps where memory is fast or split over devices, but on a CPU what
    a chunk makes must stay in cache, and new memory is slow (0.4 ms/MB to get pages for what exceeds 32 MB)."""
    if sharding.platform() != "cpu" or sharding.active() is not None:
        return T
    return max(1, ROWS_OF_A_CHUNK // B)


ROWS_OF_A_CHUNK = 512
"""Rows of a chunk's products: its steps times B. Milliseconds of CPU time of an LSTM, forward and with all gradients
(jaxlib 0.10.2, AMD Zen 5), with 128, 256, 512, 1024 and all rows: T128 B32 H512: 103 and 344, 98 and 311, 92 and 312,
91 and 306, 109 and 326; T256 B64 H256: 100 and 388, 100 and 361, 99 and 343, 100 and 350, 138 and 401."""


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
            f"implementation='cudnn' needs an NVIDIA GPU, this is a {sharding.platform()}: leave the implementation out"
        )
    if x_BTD.dtype != jnp.float32:
        raise ValueError(f"implementation='cudnn' computes in float32, not in {x_BTD.dtype}: choose 'chunked'")
    if reset_BT is not None:
        raise ValueError("implementation='cudnn' cannot go back to zeros at document borders: choose 'chunked'")
    from jax.experimental import rnn

    (B, T, D), H = x_BTD.shape, params["weight_hidden"].shape[0]
    lengths_B = jnp.full((B,), T, jnp.int32)
    if keep_BT is not None:
        lengths_B = jnp.maximum(jnp.sum(keep_BT, axis=1, dtype=jnp.int32), 1)  # a row without tokens is NaN below
    time_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    real_BT = time_BT < lengths_B[:, None]
    # cuDNN reads a text in one direction: the other is the text turned round, its pads left behind it.
    order_BT1 = jnp.where(real_BT, lengths_B[:, None] - 1 - time_BT, time_BT)[:, :, None]
    if reverse:
        x_BTD = jnp.take_along_axis(x_BTD, order_BT1, axis=1)
    # One flat array: input weights, hidden weights, and two biases, each with gates and outputs first.
    matrices = [params[name].astype(jnp.float32) for name in ("weight_input", "weight_hidden")]
    bias = params["bias"].astype(jnp.float32).ravel()
    weights = jnp.concatenate(
        [*(jnp.moveaxis(matrix, 0, 2).ravel() for matrix in matrices), bias, jnp.zeros_like(bias)]
    )
    first = [jnp.zeros((1, B, H)) if state is None else state[name][None] for name in ("hidden", "cell")]
    hidden_BTH, *last = rnn.lstm(x_BTD, *first, weights, lengths_B, D, H, 1, 0.0, False)
    if reverse:
        hidden_BTH = jnp.take_along_axis(hidden_BTH, order_BT1, axis=1)
    hidden_BH, cell_BH = (x[0] for x in last)
    if keep_BT is not None:
        # A pad repeats the state: before the text, when read backwards, the first one.
        pad_BH = first[0][0] if reverse else hidden_BH
        hidden_BTH = jnp.where(real_BT[:, :, None], hidden_BTH, pad_BH[:, None])
        bad_B1 = jnp.any(real_BT != keep_BT, axis=1, keepdims=True)
        hidden_BTH = jnp.where(bad_B1[:, :, None], jnp.nan, hidden_BTH)
        hidden_BH, cell_BH = (jnp.where(bad_B1, jnp.nan, x) for x in (hidden_BH, cell_BH))
    return hidden_BTH, {"hidden": hidden_BH, "cell": cell_BH}


def _reference(
    step: Any, params: dict[str, Any], x_BTD: jax.Array, state: dict[str, Any], masks: Any, reverse: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One cell after the other; the gradient is autodiff's."""

    def one(state: dict[str, Any], inputs: Any) -> Any:
        projected_BGH, mask = inputs
        if mask is not None:
            state = {name: jnp.where(mask[0], 0.0, old) for name, old in state.items()}
        new = step(params, projected_BGH, state)
        if mask is not None:
            new = {name: jnp.where(mask[1], new[name], old) for name, old in state.items()}
        return new, new["hidden"].astype(x_BTD.dtype)

    projected_BTGH = constrain(project(params, x_BTD), ("batch", None, None, "mlp"))
    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (projected_BTGH, masks))
    last, hidden_TBH = lax.scan(one, state, by_time, reverse=reverse)
    return jnp.swapaxes(hidden_TBH, 0, 1), last


def _recurrent(hidden_BH: jax.Array, weight_HGK: jax.Array) -> jax.Array:
    return jnp.einsum("BH,HGK->BGK", hidden_BH.astype(weight_HGK.dtype), weight_HGK, preferred_element_type=jnp.float32)

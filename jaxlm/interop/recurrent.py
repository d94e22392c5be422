"""Weights of recurrent layers from and to torch and Keras, as plain arrays: neither library is imported.

    >>> weights = {name: tensor.numpy() for name, tensor in torch_lstm.state_dict().items()}     # doctest: +SKIP
    >>> params["layer_1"] = from_torch(weights, layer=1)                                         # doctest: +SKIP
    >>> params["layer_0"] = from_keras(keras_layer.get_weights())                                # doctest: +SKIP

An LSTM is told from a GRU by its number of gates. What differs:

    ours            LSTM i, f, g, o    GRU r, z, n    [D, G, H]     one bias, and one of n's hidden part (reset after)
    torch, cuDNN         i, f, g, o        r, z, n    [G * H, D]    two biases: added on import, the second 0 on export
    Keras                i, f, c, o        z, r, h    [D, G * H]    LSTM one bias, GRU [2, G * H] (reset_after)
    CuDNNLSTM, CuDNNGRU  i, f, c, o        z, r, h    [D, G * H]    two biases in one array, [2 * G * H]

``CuDNNLSTM`` and ``CuDNNGRU`` of Keras 1 and 2 keep the matrix of each gate as cuDNN reads it, [H, D] row by row, in
an array whose shape is [D, H], and the hidden matrix of each gate as [out, in]. The size of the bias tells them from
the other Keras layers.

Keras before version 2.3 had ``hard_sigmoid`` gates by default; those layers have another nonlinearity than ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.nn.recurrence import GRUReset

Params = dict[str, np.ndarray]
"""The parameters of one layer and direction: ``recurrence.lstm_specs`` or ``recurrence.gru_specs``."""


def from_torch(weights: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> Params:
    """One layer of a ``torch.nn.LSTM`` or ``torch.nn.GRU`` (or ...Cell), from its ``state_dict`` turned into numpy.

    Args:
        weights: by torch's names, such as ``weight_ih_l0``; biases may be missing (``bias=False``).
        layer, reverse: which of its layers and directions.

    Raises:
        ValueError: missing weights, another kind of layer, or ``proj_size``.
    """
    suffix = _suffix(weights, layer, reverse)
    if f"weight_hr{suffix}" in weights:
        raise ValueError("an LSTM with proj_size has no counterpart here: only layers without weight_hr are read")
    missing = [name for name in (f"weight_ih{suffix}", f"weight_hh{suffix}") if name not in weights]
    if missing:
        raise ValueError(f"no {' and '.join(missing)} in the weights: they hold {', '.join(weights)}")
    weight_input, weight_hidden = (np.asarray(weights[f"weight_{part}{suffix}"]).T for part in ("ih", "hh"))
    gates, width = _gates(weight_input, weight_hidden)
    zeros = np.zeros(gates * width, weight_input.dtype)
    bias, bias_hidden = (
        np.asarray(weights.get(f"bias_{part}{suffix}", zeros)).reshape(gates, width) for part in ("ih", "hh")
    )
    return _ours(weight_input, weight_hidden, bias, bias_hidden)


def to_torch(params: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> dict[str, np.ndarray]:
    """The arrays of one layer of a ``torch.nn.LSTM`` or ``torch.nn.GRU``, by torch's names.

    Raises:
        ValueError: a GRU whose reset gate acts before the product, which torch does not have.
    """
    weight_input, weight_hidden, bias = (np.asarray(params[name]) for name in ("weight_input", "weight_hidden", "bias"))
    bias_hidden = np.zeros_like(bias)
    if bias.shape[0] == 3:
        if "bias_hidden" not in params:
            raise ValueError("torch has no GRU with reset='before': only one with reset='after' can be exported")
        bias_hidden[2] = params["bias_hidden"]
    suffix = f"_l{layer}{'_reverse' if reverse else ''}"
    return {
        f"weight_ih{suffix}": _flat(weight_input).T.copy(),
        f"weight_hh{suffix}": _flat(weight_hidden).T.copy(),
        f"bias_ih{suffix}": bias.flatten(),
        f"bias_hh{suffix}": bias_hidden.flatten(),
    }


def from_keras(weights: Sequence[Any], *, reset: GRUReset | None = None) -> Params:
    """A Keras ``LSTM`` or ``GRU``, from its ``get_weights()``: [kernel, recurrent_kernel] and, with ``use_bias``, bias.

    ``CuDNNLSTM`` and ``CuDNNGRU`` are read as well.

    The weights of a ``Bidirectional`` layer are those of its forward layer and then those of its backward layer.

    Args:
        reset: only for a GRU without bias, which does not show it: "after" where ``reset_after`` is True.

    Raises:
        ValueError: other weights than these.
    """
    if len(weights) not in (2, 3):
        raise ValueError(f"{len(weights)} arrays, but one LSTM or GRU has [kernel, recurrent_kernel] or these and bias")
    weight_input, weight_hidden = (np.asarray(x) for x in weights[:2])
    gates, width = _gates(weight_input, weight_hidden)
    if len(weights) == 2:
        if gates == 3 and reset is None:
            raise ValueError("a GRU without bias does not show its reset_after: pass reset='after' or reset='before'")
        bias = np.zeros((2 if reset == "after" else 1, gates, width), weight_input.dtype)
    else:
        bias = np.asarray(weights[2])
        if bias.shape == (2 * gates * width,):  # of a CuDNN layer; GRU's two biases are [2, G * H] otherwise
            weight_input, weight_hidden = _from_cudnn(weight_input, gates), _from_cudnn(weight_hidden, gates)
            bias = bias.reshape(2, gates * width)
        elif bias.size not in ((gates * width, 2 * gates * width) if gates == 3 else (gates * width,)):
            raise ValueError(f"bias {list(bias.shape)} does not fit {gates} gates of width {width}")
        bias = bias.reshape(-1, gates, width)
    params = _ours(weight_input, weight_hidden, bias[0], bias[1] if len(bias) == 2 else None)
    return {name: _exchange(name, x) for name, x in params.items()} if gates == 3 else params


def to_keras(params: Mapping[str, Any]) -> list[np.ndarray]:
    """What ``set_weights`` of a Keras ``LSTM`` or ``GRU`` takes; ``reset_after`` is True if there is a bias_hidden."""
    ours = {name: np.asarray(x) for name, x in params.items()}
    if ours["bias"].shape[0] == 3:
        ours = {name: _exchange(name, x) for name, x in ours.items()}
    bias = ours["bias"].flatten()
    if "bias_hidden" in ours:
        second = np.zeros_like(ours["bias"])
        second[2] = ours["bias_hidden"]
        bias = np.stack([bias, second.flatten()])
    return [_flat(ours["weight_input"]), _flat(ours["weight_hidden"]), bias]


def _from_cudnn(matrix: np.ndarray, gates: int) -> np.ndarray:
    """[D, G * H] of a matrix whose gates [D, H] hold the entries of [H, D] row by row."""
    of_gates = [gate.reshape(gate.shape[::-1]).T for gate in np.split(matrix, gates, axis=1)]
    return np.concatenate(of_gates, axis=1)


def _suffix(weights: Mapping[str, Any], layer: int, reverse: bool) -> str:
    if "weight_ih" in weights:  # a cell
        return ""
    return f"_l{layer}{'_reverse' if reverse else ''}"


def _gates(weight_input: np.ndarray, weight_hidden: np.ndarray) -> tuple[int, int]:
    """Number and width of the gates of matrices [D, G * H] and [H, G * H]."""
    width = weight_hidden.shape[0]
    gates = weight_hidden.size // width**2
    if (
        gates not in (3, 4)
        or weight_hidden.shape != (width, gates * width)
        or weight_input.shape[1:] != (gates * width,)
    ):
        raise ValueError(
            f"weights of the input {list(weight_input.shape)} and of the state {list(weight_hidden.shape)} are neither "
            "those of an LSTM (4 gates) nor of a GRU (3 gates)"
        )
    return gates, width


def _ours(
    weight_input: np.ndarray, weight_hidden: np.ndarray, bias: np.ndarray, bias_hidden: np.ndarray | None
) -> Params:
    """The parameters of gates in their order: matrices [D, G * H], biases [G, H]."""
    gates, width = bias.shape
    params = {
        "weight_input": weight_input.reshape(-1, gates, width),
        "weight_hidden": weight_hidden.reshape(-1, gates, width),
    }
    if bias_hidden is None:
        return {**params, "bias": bias}
    if gates == 4:
        return {**params, "bias": bias + bias_hidden}
    total = bias + bias_hidden
    total[2] = bias[2]  # what is added inside the reset gate's product stays apart
    return {**params, "bias": total, "bias_hidden": bias_hidden[2]}


def _flat(weight_DGH: np.ndarray) -> np.ndarray:
    return weight_DGH.reshape(len(weight_DGH), -1)


def _exchange(name: str, x: np.ndarray) -> np.ndarray:
    """Keras' z, r, h to r, z, n, and back."""
    order = [1, 0, 2]
    return x if name == "bias_hidden" else x[order] if name == "bias" else x[:, order]

"""Convert weights of recurrent layers from and to torch and Keras, as arrays. Neither library is imported.

    >>> weights = {name: tensor.numpy() for name, tensor in torch_lstm.state_dict().items()}     # doctest: +SKIP
    >>> params["layer_1"] = from_torch(weights, layer=1)                                         # doctest: +SKIP
    >>> params["layer_0"] = from_keras(keras_layer.get_weights())                                # doctest: +SKIP

The number of gates G decides whether a layer is an LSTM (4) or a GRU (3). D is the width of the input, H the width of
the state. The libraries differ in the order of the gates, the layout of a weight, and the biases:

    jaxlm           LSTM i, f, g, o    GRU r, z, n    [D, G, H]     one bias; GRU with reset='after': also bias_hidden
    torch, cuDNN         i, f, g, o        r, z, n    [G * H, D]    two biases, bias_ih and bias_hh
    Keras                i, f, c, o        z, r, h    [D, G * H]    one bias; GRU with reset_after: two, [2, G * H]
    CuDNNLSTM, CuDNNGRU  i, f, c, o        z, r, h    [D, G * H]    two biases in one array, [2 * G * H]

If a layer has two biases, an import adds them, and an export sets the second bias to 0. Gate n of a GRU with
reset='after' is an exception, because the reset gate multiplies its second bias: an import stores this bias as
``bias_hidden``, and an export writes it back.

``CuDNNLSTM`` and ``CuDNNGRU`` of Keras 2 store a gate's input weight in an array of shape [D, H], but the entries are
in the row-major order of the transposed matrix [H, D], as in cuDNN. They store a gate's hidden weight as [out, in]. An
import recognizes these two layers by the shape [2 * G * H] of their bias.

Before version 2.3, Keras used ``hard_sigmoid`` gates by default. jaxlm uses sigmoid gates, so a layer with
``hard_sigmoid`` gates has other outputs after the import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from jaxlm.nn.recurrence import GRUReset

Params = dict[str, np.ndarray]
"""The parameters of one layer and direction, as in ``recurrence.lstm_specs`` or ``recurrence.gru_specs``."""


def from_torch(weights: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> Params:
    """The parameters of one layer of a ``torch.nn.LSTM`` or ``torch.nn.GRU``, or of an ``LSTMCell`` or ``GRUCell``.

    Args:
        weights: the ``state_dict`` as NumPy arrays, with torch's names such as ``weight_ih_l0``. Biases may be missing
            (``bias=False``).
        layer: index of the layer; ignored for a cell.
        reverse: whether to read the backward direction; ignored for a cell.

    Raises:
        ValueError: a weight is missing, the shapes do not fit an LSTM or GRU, or the LSTM uses ``proj_size``.
    """
    suffix = "" if "weight_ih" in weights else _suffix(layer, reverse)  # the names of a cell have no suffix
    if f"weight_hr{suffix}" in weights:
        raise ValueError("an LSTM with proj_size (weight_hr) is not supported")
    missing = [name for name in (f"weight_ih{suffix}", f"weight_hh{suffix}") if name not in weights]
    if missing:
        raise ValueError(f"no {' and '.join(missing)} in the weights: they have {', '.join(weights)}")
    weight_input, weight_hidden = (np.asarray(weights[f"weight_{source}{suffix}"]).T for source in ("ih", "hh"))
    num_gates, width = _num_gates_and_width(weight_input, weight_hidden)
    zeros = np.zeros(num_gates * width, weight_input.dtype)
    bias, bias_hidden = (
        np.asarray(weights.get(f"bias_{source}{suffix}", zeros)).reshape(num_gates, width) for source in ("ih", "hh")
    )
    return _params(weight_input, weight_hidden, bias, bias_hidden)


def to_torch(params: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> dict[str, np.ndarray]:
    """The arrays of one layer of a ``torch.nn.LSTM`` or ``torch.nn.GRU``, by torch's names.

    Args:
        layer: index of the layer in the names.
        reverse: whether the names are those of the backward direction.

    Raises:
        ValueError: a GRU with ``reset="before"``, which torch does not have.
    """
    weight_input, weight_hidden, bias = (np.asarray(params[name]) for name in ("weight_input", "weight_hidden", "bias"))
    bias_hidden = np.zeros_like(bias)
    if bias.shape[0] == 3:
        if "bias_hidden" not in params:
            raise ValueError("torch has no GRU with reset='before': only a GRU with reset='after' can be exported")
        bias_hidden[2] = params["bias_hidden"]
    suffix = _suffix(layer, reverse)
    return {
        f"weight_ih{suffix}": _flat(weight_input).T.copy(),
        f"weight_hh{suffix}": _flat(weight_hidden).T.copy(),
        f"bias_ih{suffix}": bias.flatten(),
        f"bias_hh{suffix}": bias_hidden.flatten(),
    }


def from_keras(weights: Sequence[Any], *, reset: GRUReset | None = None) -> Params:
    """The parameters of a Keras ``LSTM``, ``GRU``, ``CuDNNLSTM`` or ``CuDNNGRU``.

    ``get_weights()`` of a ``Bidirectional`` layer returns the arrays of the forward layer, then the arrays of the
    backward layer. Call this function once per direction.

    Args:
        weights: ``get_weights()`` of the layer: [kernel, recurrent_kernel], and the bias if ``use_bias`` is True.
        reset: "after" if ``reset_after`` is True, otherwise "before". Required for a GRU without a bias. Ignored for an
            LSTM, and for a GRU with a bias, because the shape of the bias determines ``reset_after``.

    Raises:
        ValueError: the number or the shapes of the arrays do not fit an LSTM or GRU, or ``reset`` is missing or
            unknown.
    """
    if reset not in (None, *get_args(GRUReset)):
        raise ValueError(f"reset={reset!r} is unknown: choose from {', '.join(map(repr, get_args(GRUReset)))}")
    if len(weights) not in (2, 3):
        raise ValueError(f"{len(weights)} arrays, but one LSTM or GRU has kernel, recurrent_kernel and maybe a bias")
    weight_input, weight_hidden = (np.asarray(x) for x in weights[:2])
    num_gates, width = _num_gates_and_width(weight_input, weight_hidden)
    if len(weights) == 2:
        if num_gates == 3 and reset is None:
            raise ValueError("reset_after of a GRU without bias is unknown: pass reset='after' or reset='before'")
        bias = np.zeros((2 if reset == "after" else 1, num_gates, width), weight_input.dtype)
    else:
        bias = np.asarray(weights[2])
        size = num_gates * width
        if bias.shape == (2 * size,):  # a CuDNN layer; a GRU with reset_after has [2, G * H]
            weight_input, weight_hidden = _from_cudnn(weight_input, num_gates), _from_cudnn(weight_hidden, num_gates)
            bias = bias.reshape(2, size)
        elif bias.size not in ((size, 2 * size) if num_gates == 3 else (size,)):
            raise ValueError(f"bias {list(bias.shape)} does not fit {num_gates} gates of width {width}")
        bias = bias.reshape(-1, num_gates, width)
    params = _params(weight_input, weight_hidden, bias[0], bias[1] if len(bias) == 2 else None)
    return {name: _swap_reset_and_update_gates(name, x) for name, x in params.items()} if num_gates == 3 else params


def to_keras(params: Mapping[str, Any]) -> list[np.ndarray]:
    """The arrays for ``set_weights`` of a Keras ``LSTM`` or ``GRU``.

    The Keras layer must have a bias. A GRU must have ``reset_after=True`` if ``params`` contains ``bias_hidden``, and
    ``reset_after=False`` otherwise.
    """
    arrays = {name: np.asarray(x) for name, x in params.items()}
    if arrays["bias"].shape[0] == 3:
        arrays = {name: _swap_reset_and_update_gates(name, x) for name, x in arrays.items()}
    bias = arrays["bias"].flatten()
    if "bias_hidden" in arrays:
        bias_hidden = np.zeros_like(arrays["bias"])
        bias_hidden[2] = arrays["bias_hidden"]
        bias = np.stack([bias, bias_hidden.flatten()])
    return [_flat(arrays["weight_input"]), _flat(arrays["weight_hidden"]), bias]


def _from_cudnn(matrix: np.ndarray, num_gates: int) -> np.ndarray:
    """The weight [D, G * H], from the weight of a CuDNN layer (see the module docstring).

    The hidden weight has D = H.
    """
    gate_matrices = [gate.reshape(gate.shape[::-1]).T for gate in np.split(matrix, num_gates, axis=1)]
    return np.concatenate(gate_matrices, axis=1)


def _suffix(layer: int, reverse: bool) -> str:
    """The suffix of torch's names for a layer, such as ``_l0_reverse``."""
    return f"_l{layer}{'_reverse' if reverse else ''}"


def _num_gates_and_width(weight_input: np.ndarray, weight_hidden: np.ndarray) -> tuple[int, int]:
    """The number G and the width H of the gates, from weights [D, G * H] and [H, G * H]."""
    width = weight_hidden.shape[0]
    num_gates = weight_hidden.size // width**2
    if (
        num_gates not in (3, 4)
        or weight_hidden.shape != (width, num_gates * width)
        or weight_input.shape[1:] != (num_gates * width,)
    ):
        raise ValueError(
            f"the input weight {list(weight_input.shape)} and the hidden weight {list(weight_hidden.shape)} are "
            "neither those of an LSTM (4 gates) nor of a GRU (3 gates)"
        )
    return num_gates, width


def _params(
    weight_input: np.ndarray, weight_hidden: np.ndarray, bias: np.ndarray, bias_hidden: np.ndarray | None
) -> Params:
    """The parameters from weights [D, G * H] and biases [G, H]. The order of the gates does not change."""
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
    total[2] = bias[2]  # the hidden bias of n is multiplied by the reset gate, so it is a separate parameter
    return {**params, "bias": total, "bias_hidden": bias_hidden[2]}


def _flat(weight_DGH: np.ndarray) -> np.ndarray:
    """The weight as a matrix [D, G * H]."""
    return weight_DGH.reshape(len(weight_DGH), -1)


def _swap_reset_and_update_gates(name: str, x: np.ndarray) -> np.ndarray:
    """The parameter with its first two gates exchanged: Keras has z, r, h, and jaxlm has r, z, n."""
    order = [1, 0, 2]
    return x if name == "bias_hidden" else x[order] if name == "bias" else x[:, order]

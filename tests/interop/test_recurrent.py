"""Tests of weights of torch and Keras recurrent layers, against golden outputs (``make_recurrent_goldens.py``)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.interop.recurrent import from_keras, from_torch, to_keras, to_torch
from jaxlm.nn import recurrence
from jaxlm.testing.helpers import assert_trees_equal, relative_error

TORCH = ("lstm", "lstm_no_bias", "gru", "gru_no_bias")
KERAS = ("lstm", "lstm_no_bias", "gru_after", "gru_before", "gru_after_no_bias")


def golden(case):
    """(input, the layer's weights by name, output)."""
    with np.load(Path(__file__).parent / "recurrent_goldens.npz") as file:
        arrays = {name.removeprefix(f"{case}/"): file[name] for name in file.files if name.startswith(f"{case}/")}
        return file["input"], arrays, arrays.pop("output")


def run(case, params, x, reverse=False):
    params = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    specs = {
        "lstm": recurrence.lstm_specs,
        "gru": lambda *shape: recurrence.gru_specs(*shape, reset="before" if "before" in case else "after"),
    }[case.split("_")[0]]
    assert spec.differences(specs(x.shape[-1], 4), params) == []
    layer = recurrence.lstm if case.startswith("lstm") else recurrence.gru
    return layer(params, jnp.asarray(x), reverse=reverse)[0]


@pytest.mark.parametrize("case", TORCH)
def test_two_bidirectional_layers_with_torch_weights_equal_torch(case):
    x, weights, output = golden(f"torch_{case}")
    for layer in (0, 1):
        directions = [
            run(case, from_torch(weights, layer=layer, reverse=reverse), x, reverse) for reverse in (False, True)
        ]
        x = jnp.concatenate(directions, axis=-1)
    assert relative_error(x, output) < 1e-6


@pytest.mark.parametrize("case", KERAS)
def test_layers_with_keras_weights_equal_keras(case):
    x, weights, output = golden(f"keras_{case}")
    reset = "after" if case == "gru_after_no_bias" else None
    params = from_keras([weights[str(number)] for number in range(len(weights))], reset=reset)
    assert relative_error(run(case, params, x), output) < 1e-6


def cudnn_layer(weights, suffix, order):
    """The arrays of a Keras CuDNNLSTM or CuDNNGRU, made from torch's arrays, which have cuDNN's matrix layout.

    Args:
        order: the indices of the torch gates in the order of Keras.
    """
    gates = len(order)

    def reordered_gates(name):
        return [np.split(weights[f"{name}_{suffix}"], gates)[gate] for gate in order]

    kernel = np.concatenate([gate.ravel().reshape(gate.shape[::-1]) for gate in reordered_gates("weight_ih")], axis=1)
    recurrent = np.concatenate(reordered_gates("weight_hh"), axis=1)
    return [kernel, recurrent, np.concatenate(reordered_gates("bias_ih") + reordered_gates("bias_hh"))]


@pytest.mark.parametrize(("case", "order"), [("lstm", (0, 1, 2, 3)), ("gru", (1, 0, 2))])
def test_keras_cudnn_weights_give_the_same_layer(case, order):
    x, weights, output = golden(f"torch_{case}")
    for layer in (0, 1):
        directions = []
        for reverse in (False, True):
            arrays = cudnn_layer(weights, f"l{layer}{'_reverse' if reverse else ''}", order)
            assert [array.shape for array in arrays] == [
                (x.shape[-1], 4 * len(order)), (4, 4 * len(order)), (8 * len(order),),
            ]  # fmt: skip
            directions.append(run(case, from_keras(arrays), x, reverse))
        x = jnp.concatenate(directions, axis=-1)
    assert relative_error(x, output) < 1e-6


def test_cudnn_kernels_are_transposed_as_in_keras():
    # The example from the conversion code of Keras, repeated for the four gates of width 3.
    kernel = np.tile(np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), (1, 4))
    params = from_keras([kernel, np.zeros((3, 12)), np.arange(24.0)])
    assert params["weight_input"][:, 3].tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert params["bias"].tolist() == (np.arange(12.0) + np.arange(12.0, 24.0)).reshape(4, 3).tolist()


@pytest.mark.parametrize("case", ["lstm", "gru"])
def test_export_to_torch_and_back(case):
    _, weights, _ = golden(f"torch_{case}")
    params = from_torch(weights, layer=1, reverse=True)
    exported = to_torch(params, layer=1, reverse=True)
    assert {name: x.shape for name, x in exported.items()} == {
        name: x.shape for name, x in weights.items() if name.endswith("_l1_reverse")
    }
    for part in ("weight_ih", "weight_hh"):
        assert_trees_equal(exported[f"{part}_l1_reverse"], weights[f"{part}_l1_reverse"])
    assert_trees_equal(from_torch(exported, layer=1, reverse=True), params)
    cell = {name.removesuffix("_l1_reverse"): x for name, x in exported.items()}
    assert_trees_equal(from_torch(cell), params)


@pytest.mark.parametrize("case", ["lstm", "gru_after", "gru_before"])
def test_export_to_keras_and_back(case):
    _, weights, _ = golden(f"keras_{case}")
    arrays = [weights[str(number)] for number in range(3)]
    params = from_keras(arrays)
    exported = to_keras(params)
    assert [x.shape for x in exported] == [x.shape for x in arrays]
    assert_trees_equal(exported[:2], arrays[:2])
    assert_trees_equal(from_keras(exported), params)


def test_errors_name_unsupported_weights():
    _, lstm, _ = golden("torch_lstm")
    with pytest.raises(ValueError, match="no weight_ih_l2 and weight_hh_l2 in the weights: they have weight_ih_l0"):
        from_torch(lstm, layer=2)
    with pytest.raises(ValueError, match="proj_size"):
        from_torch({**lstm, "weight_hr_l0": np.ones((2, 4))})
    plain = {"weight_ih_l0": np.ones((4, 3)), "weight_hh_l0": np.ones((4, 4))}  # torch.nn.RNN
    with pytest.raises(ValueError, match="neither those of an LSTM"):
        from_torch(plain)
    before = from_keras([golden("keras_gru_before")[1][str(number)] for number in range(3)])
    with pytest.raises(ValueError, match="torch has no GRU with reset='before'"):
        to_torch(before)
    gru = to_keras(before)
    with pytest.raises(ValueError, match="pass reset='after' or reset='before'"):
        from_keras(gru[:2])
    with pytest.raises(ValueError, match="6 arrays, but one LSTM or GRU has"):
        from_keras(gru * 2)
    with pytest.raises(ValueError, match=r"bias \[5\] does not fit 3 gates of width 4"):
        from_keras([*gru[:2], np.zeros(5)])
    with pytest.raises(ValueError, match="reset='reset_after' is unknown: choose from 'after', 'before'"):
        from_keras(gru[:2], reset="reset_after")  # type: ignore[arg-type]

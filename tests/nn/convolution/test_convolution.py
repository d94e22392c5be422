"""Tests of convolution over time: padding, segments, streams and weight normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.convolution import causal_convolution, convolution, convolution_specs, weight_norm, weight_norm_specs
from jaxlm.nn.convolution.window import causal_windows, pad_to_length, tail_specs, windows
from jaxlm.nn.segments import document_numbers
from jaxlm.nn.token_layout import move_padding_last, past_segment_specs, restore_order
from jaxlm.spec import ONES, Normal
from jaxlm.testing.helpers import initial_values, relative_error

RNG = np.random.default_rng(0)


def arrays(kernel=3, channels=5, out=4, length=11, batch=2):
    params = {"weight": RNG.standard_normal((kernel, channels, out)), "bias": RNG.standard_normal(out)}
    x = RNG.standard_normal((batch, length, channels))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (3, 2)])
def test_every_padding_equals_the_convolution_of_xla(kernel, stride, dilation):
    params, x = arrays(kernel)
    reach = (kernel - 1) * dilation
    pads = {"same": (reach // 2, reach - reach // 2), "valid": (0, 0), "causal": (reach, 0)}
    for padding, pad in pads.items():
        want = jax.lax.conv_general_dilated(
            x, params["weight"], (stride,), [pad], rhs_dilation=(dilation,), dimension_numbers=("NTC", "TIO", "NTC")
        )
        got = convolution(params, x, padding=padding, stride=stride, dilation=dilation)
        assert relative_error(got, want + params["bias"][None, None]) < 1e-6


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("padding", ["same", "causal", "valid"])
def test_no_window_reads_another_segment(padding):
    params, x = arrays(kernel=3, length=12)
    ids = np.array([[1] * 5 + [2] * 7, [1] * 12])
    packed = convolution(params, x, padding=padding, dilation=2, segment_ids=ids)
    separate = convolution(params, x[1:], padding=padding, dilation=2)
    assert relative_error(packed[1:], separate) < 1e-6
    if padding == "valid":  # inputs outside the segment of the last tap count as zeros
        zeroed = jnp.concatenate([jnp.zeros((1, 4, 5)), x[:1, 5:]], axis=1)
        assert relative_error(packed[:1, 1:], convolution(params, zeroed, padding="valid", dilation=2)) < 1e-6
        return
    for segment in (slice(0, 5), slice(5, 12)):
        separate = convolution(params, x[:1, segment], padding=padding, dilation=2)
        assert relative_error(packed[:1, segment], separate) < 1e-6


def test_gradients_equal_those_of_xla():
    params, x = arrays(kernel=4)

    def jaxlm_loss(params, x):
        return jnp.sum(jnp.sin(convolution(params, x, padding="causal", dilation=2)))

    def xla_loss(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["weight"], (1,), [(6, 0)], rhs_dilation=(2,), dimension_numbers=("NTC", "TIO", "NTC")
        )
        return jnp.sum(jnp.sin(y + params["bias"][None, None]))

    for got, want in zip(
        *(jax.tree.leaves(jax.grad(f, (0, 1))(params, x)) for f in (jaxlm_loss, xla_loss)), strict=True
    ):
        assert relative_error(got, want) < 1e-5


def test_several_output_axes_and_their_names():
    specs = convolution_specs((3, 5, 2, 4), ("embed", None, "mlp"), ONES)
    assert specs["weight"].axes == (None, "embed", None, "mlp")
    assert specs["bias"].shape == (2, 4)
    assert "bias" not in convolution_specs((3, 5, 4), ("embed", "mlp"), ONES, bias=False)
    params = {"weight": jnp.ones((3, 5, 2, 4)), "bias": jnp.zeros((2, 4))}
    assert convolution(params, jnp.ones((1, 6, 5)), padding="same").shape == (1, 6, 2, 4)


def test_errors_name_bad_input():
    params, x = arrays(kernel=3, length=4)
    with pytest.raises(ValueError, match="padding='full' is unknown"):
        convolution(params, x, padding="full")
    with pytest.raises(ValueError, match="4 steps are shorter than one window of 3 taps with dilation=2"):
        convolution(params, x, padding="valid", dilation=2)


# ------------------------------------------------------------------------------------------------ streams


def numpy_causal_convolution(params, x, dilation=1):
    """The causal convolution in NumPy, from [T, C] to [T, D]."""
    weight, bias = np.asarray(params["weight"], np.float64), np.asarray(params["bias"])
    y = np.tile(bias, (len(x), 1)).astype(np.float64)
    for tap, matrix in enumerate(weight):
        back = (len(weight) - 1 - tap) * dilation
        if back < len(x):
            y[back:] += x[: len(x) - back] @ matrix
    return y


@jax.jit
def run_call(params, x, indices, ids, past, tail):
    reordered, layout = move_padding_last(indices, ids, past)
    x = jnp.take_along_axis(x, reordered[:, :, None], axis=1)
    y, tail = causal_convolution(params, layout, x, tail, dilation=tail.shape[1] // (params["weight"].shape[0] - 1))
    return *restore_order(layout, y), tail


def run_in_calls(params, x, ids, cuts, dilation=1):
    """The outputs of a layer that reads ``x`` in several calls, split at ``cuts``."""
    B, T, C = x.shape
    reach = (params["weight"].shape[0] - 1) * dilation
    past, tail = spec.init((past_segment_specs(B, reach), tail_specs(B, reach, C, jnp.float32)))
    indices = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        call_ids = None if ids is None else ids[:, start:stop]
        y, past, tail = run_call(params, x, indices[:, start:stop], call_ids, past, tail)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("cuts", [(), (3, 4, 5), tuple(range(1, 11))])
@pytest.mark.parametrize("dilation", [1, 2])
def test_several_calls_equal_one_call(cuts, dilation):
    params, x = arrays(kernel=4)
    got = run_in_calls(params, x, None, cuts, dilation)
    for row in range(2):
        assert relative_error(got[row], numpy_causal_convolution(params, np.asarray(x[row]), dilation)) < 1e-6


@pytest.mark.parametrize("cuts", [(), (2, 4, 8), tuple(range(1, 11))])
def test_each_padded_document_equals_a_separate_document(cuts):
    params, x = arrays(kernel=3, batch=4)
    ids = jnp.asarray(
        [
            [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],  # padding on the left
            [1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1],  # a short prompt that continues after padding
            [1, 1, 1, 1, 2, 2, 0, 0, 2, 3, 3],  # several documents
            [0, 1, 0, 2, 0, 2, 0, 2, 0, 2, 0],
        ]
    )
    got, x, ids = (np.asarray(a) for a in (run_in_calls(params, x, ids, cuts), x, ids))
    assert np.isfinite(got).all()
    for row in range(4):
        for document in range(1, int(ids[row].max()) + 1):
            index = np.nonzero(ids[row] == document)[0]
            assert relative_error(got[row, index], numpy_causal_convolution(params, x[row, index])) < 1e-6


@pytest.mark.thorough
def test_a_segment_id_that_occurs_again_is_another_document():
    x, ids = np.arange(10.0, 60.0, 10.0, dtype=np.float32)[None, :, None], np.array([[1, 2, 0, 1, 1]])
    got = windows(x, 3, padding="causal", documents_BT=document_numbers(ids))[0, :, :, 0]
    want = [[0, 0, 10], [0, 0, 20], [0, 0, 30], [0, 0, 40], [0, 40, 50]]
    assert got.tolist() == want
    # A call ends with document 2, and the ids of the next call begin with 1. The padding moves to the end.
    past, tail = np.zeros((1, 2), np.int32), np.zeros((1, 2, 1), np.float32)
    _, layout = move_padding_last(ids, np.array([[1, 1, 1, 2, 2]]), past)
    got, tail = causal_windows(layout, x, tail, 3)
    assert got[0, :, :, 0].tolist() == [[0, 0, 10], [0, 10, 20], [10, 20, 30], [0, 0, 40], [0, 40, 50]]
    _, past = restore_order(layout, x)
    _, layout = move_padding_last(ids, np.array([[2, 1, 2, 0, 2]]), past)
    got, _ = causal_windows(layout, x, tail, 3)
    assert got[0, :4, :, 0].tolist() == [[40, 50, 10], [0, 0, 20], [0, 0, 30], [0, 30, 40]]


def test_pad_to_length_moves_padding_to_the_end_and_reverses_texts():
    tokens = jnp.asarray([[9, 1, 2, 9, 3], [4, 5, 6, 7, 8]])
    ids = jnp.asarray([[0, 1, 1, 0, 1], [1, 1, 2, 2, 2]])
    output, is_real, has_one_document = pad_to_length(tokens, ids, 6)
    assert output[0, :3].tolist() == [1, 2, 3]
    assert is_real.tolist() == [[True] * 3 + [False] * 3, [True] * 5 + [False]]
    assert has_one_document.tolist() == [True, False]
    output, is_real, _ = pad_to_length(tokens, ids, 6, reverse=True)
    assert output[0, :3].tolist() == [3, 2, 1]
    assert is_real[0].tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="5 tokens exceed max_positions=4"):
        pad_to_length(tokens, ids, 4)


# ----------------------------------------------------------------------------------- weight normalization


def test_initial_weight_norm_has_the_scale_of_the_weight_and_ignores_the_norm_of_the_direction():
    plain = convolution_specs((3, 40, 2, 16), ("embed", None, "mlp"), Normal(0.1))
    specs = weight_norm_specs(plain, num_input_axes=2)
    assert specs["direction"].axes == plain["weight"].axes
    assert specs["gain"].axes == (None, "mlp")
    assert specs["gain"].decay
    assert not specs["direction"].decay
    params = initial_values(specs)
    weight = weight_norm(params, num_input_axes=2)["weight"]
    lengths = np.sqrt(np.square(weight).sum((0, 1)))
    assert relative_error(lengths, params["gain"]) < 1e-6
    assert np.asarray(weight).std() == pytest.approx(0.1, rel=0.05)
    longer = weight_norm({**params, "direction": 7.0 * params["direction"]}, num_input_axes=2)["weight"]
    assert relative_error(longer, weight) < 1e-6
    with pytest.raises(ValueError, match="weight normalization needs a weight initialized by Normal"):
        weight_norm_specs(convolution_specs((3, 4, 5), ("embed", "mlp"), ONES), num_input_axes=2)

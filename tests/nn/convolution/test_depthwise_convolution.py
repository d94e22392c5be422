"""Tests of depthwise convolution: the implementation ``shifts`` and its gradients against XLA's convolution, segments,
and texts that are read in several calls.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn import choices
from jaxlm.nn.convolution import (
    causal_depthwise_convolution,
    depthwise,
    depthwise_convolution,
    depthwise_convolution_specs,
)
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.token_layout import move_padding_last, past_segment_specs, restore_order
from jaxlm.spec import Normal
from jaxlm.testing.helpers import add_noise, assert_trees_close, initial_values, relative_error

B, C = 3, 5
SHAPES = {  # (kernel, dilation, length): shorter than the window, one tap, blocks with incomplete ends
    "short": (4, 2, 5),
    "one tap": (1, 1, 6),
    "blocks": (4, 1, 23),
    "dilated blocks": (3, 4, 30),
}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(depthwise, "BLOCK", 4)


def arrays(kernel, length, dtype=jnp.float32):
    params = add_noise(initial_values(depthwise_convolution_specs((kernel, C), ("mlp",), Normal(1.0))))
    return params, jax.random.normal(jax.random.key(1), (B, length, C)).astype(dtype)


def results(convolve, params, x):
    """The outputs and all gradients."""

    def weighted(params, x):
        y = convolve(params, x).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)
    return y, gradients


@pytest.mark.plain_cases(5)
@pytest.mark.parametrize("padding", ["same", "causal", "valid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_all_gradients_equal_those_of_xla(shape, padding):
    kernel, dilation, length = SHAPES[shape]
    params, x = arrays(kernel, length)
    functions = {
        name: functools.partial(depthwise_convolution, padding=padding, dilation=dilation, implementation=name)
        for name in ("reference", "shifts")
    }
    if shape == "short" and padding == "valid":
        for function in functions.values():
            with pytest.raises(ValueError, match="5 steps are shorter than one window of 4 taps with dilation=2"):
                function(params, x)
        return
    got, want = (results(function, params, x) for function in functions.values())
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    assert_trees_close(got, want, 2e-6)


def numpy_convolution(params, x, ids, padding, dilation):
    """The depthwise convolution in NumPy, from [T, C] to [T', C], computed output by output."""
    weight, bias = (np.asarray(params[name], np.float64) for name in ("weight", "bias"))
    reach = (len(weight) - 1) * dilation
    before = {"same": reach // 2, "causal": reach, "valid": 0}[padding]
    outputs = []
    for t in range(len(x) - reach if padding == "valid" else len(x)):
        position = t + reach if padding == "valid" else t
        sources = [t + tap * dilation - before for tap in range(len(weight))]
        products = [w * x[s] for w, s in zip(weight, sources) if 0 <= s < len(x) and ids[s] == ids[position]]
        outputs.append(bias + sum(products))
    return np.stack(outputs)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("padding", ["same", "causal", "valid"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_no_window_reads_another_segment(padding, dilation):
    params, x = arrays(4, 26)
    ids = jnp.asarray([[1] * 3 + [2] * 14 + [3] * 9, [0] * 4 + [1] * 20 + [0] * 2, [1] * 26])
    convolve = functools.partial(depthwise_convolution, padding=padding, dilation=dilation, segment_ids=ids)
    y, (gradients, dx) = results(convolve, params, x)
    want = np.stack([numpy_convolution(params, np.asarray(x[row]), ids[row], padding, dilation) for row in range(B)])
    assert relative_error(y, want) < 1e-6
    # Without its bias, the function is linear in the input and in the weights, so its gradients can be computed from
    # its values.
    cosines = np.cos(np.arange(y.size).reshape(y.shape))
    assert float(jnp.vdot(gradients["weight"], params["weight"])) == pytest.approx(
        float(np.vdot(cosines, want - np.asarray(params["bias"]))), rel=1e-4
    )
    without_bias = {"weight": params["weight"], "bias": jnp.zeros(C)}
    for row in range(B):
        direction = np.asarray(jax.random.normal(jax.random.key(7 + row), x.shape[1:]))
        change = numpy_convolution(without_bias, direction, ids[row], padding, dilation)
        assert np.vdot(dx[row], direction) == pytest.approx(np.vdot(cosines[row], change), rel=1e-4)
    for tap in range(4):
        one_weight = {"weight": jnp.zeros((4, C)).at[tap, 2].set(1.0), "bias": jnp.zeros(C)}
        change = np.stack(
            [numpy_convolution(one_weight, np.asarray(x[row]), ids[row], padding, dilation) for row in range(B)]
        )
        assert gradients["weight"][tap, 2] == pytest.approx(np.vdot(cosines, change), rel=1e-4)


def test_float64_sums_in_float64():
    def loss(params, x):
        return jnp.sum(depthwise_convolution(params, x, padding="causal", implementation="shifts"))

    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays(4, 23))
        jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments))
    assert "f64[" in jaxpr
    assert "f32[" not in jaxpr


@pytest.mark.thorough
def test_bfloat16_sums_in_float32():
    params, x = arrays(4, 23)
    want = results(functools.partial(depthwise_convolution, padding="causal"), params, x)
    bfloat16_x = x.astype(jnp.bfloat16)
    convolve = functools.partial(depthwise_convolution, padding="causal")
    assert convolve(params, bfloat16_x).dtype == jnp.bfloat16
    y, (gradients, dx) = results(convolve, params, bfloat16_x)
    assert dx.dtype == jnp.bfloat16
    assert gradients["weight"].dtype == jnp.float32
    assert_trees_close(
        (y, (gradients, dx)), want, 0.05
    )  # large tolerance, because the terms of the bias gradient (cosines) nearly cancel
    ones = {"weight": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    total = jax.grad(lambda p: jnp.sum(convolve(p, jnp.ones((1, 4096, 1), jnp.bfloat16)).astype(jnp.float32)))(ones)
    assert float(total["weight"][0, 0]) == 4096  # a sum in bfloat16 would stop growing at 256


def test_errors_name_bad_input():
    params, x = arrays(4, 8)
    with pytest.raises(ValueError, match="padding='full' is unknown"):
        depthwise_convolution(params, x, padding="full")
    with pytest.raises(ValueError, match=r"the input \[3, 8, 4\] must be \[batch, time, channels\] with 5 channels"):
        depthwise_convolution(params, x[..., :4], padding="same")
    ids = jnp.ones((B, 8), jnp.int32)
    message = "implementation 'reference' does not support segment_ids: leave the implementation out"
    with pytest.raises(ValueError, match=message):
        depthwise_convolution(params, x, padding="same", segment_ids=ids, implementation="reference")
    with pytest.raises(ValueError, match="no depthwise_convolution implementation 'fast'"):
        depthwise_convolution(params, x, padding="same", implementation="fast")


# ------------------------------------------------------------------------------------------ several calls


@functools.partial(jax.jit, static_argnames="dilation")
def run_call(params, x, indices, ids, past, tail, dilation):
    reordered, layout = move_padding_last(indices, ids, past)
    x = jnp.take_along_axis(x, reordered[:, :, None], axis=1)
    y, tail = causal_depthwise_convolution(params, layout, x, tail, dilation=dilation)
    return *restore_order(layout, y), tail


@pytest.mark.parametrize("cuts", [(), (2, 4, 8), tuple(range(1, 11))])
@pytest.mark.parametrize("dilation", [1, 2])
def test_each_padded_document_in_several_calls_equals_a_separate_document(cuts, dilation):
    """The layer reads each row in several calls, split at ``cuts``."""
    params, x = arrays(3, 11)
    ids = jnp.asarray(
        [
            [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],  # padding on the left
            [1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1],  # a short prompt that continues after padding
            [1, 1, 1, 1, 2, 2, 0, 0, 2, 3, 3],  # several documents
        ]
    )
    past, tail = spec.init((past_segment_specs(B, 2 * dilation), tail_specs(B, 2 * dilation, C, jnp.float32)))
    indices = jnp.broadcast_to(jnp.arange(11)[None], (B, 11))
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
        y, past, tail = run_call(params, x, indices[:, start:stop], ids[:, start:stop], past, tail, dilation)
        outputs.append(y)
    got, x, ids = (np.asarray(a) for a in (jnp.concatenate(outputs, axis=1), x, ids))
    for row in range(B):
        for document in range(1, int(ids[row].max()) + 1):
            index = np.nonzero(ids[row] == document)[0]
            want = numpy_convolution(params, x[row, index], np.ones(len(index)), "causal", dilation)
            assert relative_error(got[row, index], want) < 1e-6
    # Without a state, the result is that of a plain call.
    _, layout = move_padding_last(indices, None, None)
    y, no_state = causal_depthwise_convolution(params, layout, x, None, dilation=dilation)
    assert no_state is None
    assert relative_error(y, depthwise_convolution(params, x, padding="causal", dilation=dilation)) < 1e-6


def test_a_segment_id_that_occurs_again_is_another_document():
    params, x = arrays(3, 8)
    ids, documents = np.array([[1, 1, 2, 1, 1, 1, 2, 1]] * B), [1, 1, 2, 3, 3, 3, 4, 5]
    want = np.stack([numpy_convolution(params, row, documents, "causal", 1) for row in np.asarray(x)])
    assert relative_error(depthwise_convolution(params, x, padding="causal", segment_ids=ids), want) < 1e-6
    past, tail = spec.init((past_segment_specs(B, 2), tail_specs(B, 2, C, jnp.float32)))
    indices, outputs = np.broadcast_to(np.arange(8), (B, 8)), []
    for call in (slice(0, 4), slice(4, 8)):  # document 3 continues in the second call
        y, past, tail = run_call(params, x, indices[:, call], ids[:, call], past, tail, 1)
        outputs.append(y)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_joining_the_tail_and_the_inputs_changes_nothing(length, monkeypatch):
    """Outputs, the next tail and the gradients of weights, inputs and tail; ``join_tail`` is False on a TPU."""
    params, x = arrays(3, length)
    rng = np.random.default_rng(0)
    tail = rng.normal(size=(B, 2, C)).astype(np.float32)
    ids = np.sort(rng.integers(0, 3, (B, length)))  # padding, then two documents
    past = np.array([[0, 1], [1, 1], [1, 2]])

    def loss(params, x, tail):
        _, layout = move_padding_last(np.zeros_like(ids), ids, past)
        y, tail = causal_depthwise_convolution(params, layout, x, tail)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(tail)), (y, tail)

    results = []
    for joins in (True, False):
        monkeypatch.setattr(choices, "join_tail", lambda joins=joins: joins)
        results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, tail))
    assert_trees_close(results[1], results[0], 1e-6)

"""Tests of max pooling over time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.convolution.pooling import causal_max_pool, k_max_pool, max_pool
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.token_layout import move_padding_last, past_segment_specs, restore_order

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 13, 5)) - 3.0, jnp.float32)  # all below 0


@pytest.mark.parametrize(
    ("padding", "stride", "pads", "dilation"),
    [("valid", 3, (0, 0), 1), ("same", 2, (1, 1), 1), ("causal", 1, (4, 0), 2), ("valid", 1, (0, 0), 4)],
)
def test_max_pool_equals_that_of_xla(padding, stride, pads, dilation):
    def pool(x):
        return max_pool(x, 3, padding=padding, stride=stride, dilation=dilation)

    def pool_of_xla(x):
        windows = {"window_dilation": (1, dilation, 1), "padding": [(0, 0), pads, (0, 0)]}
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 1), (1, stride, 1), **windows)

    want = pool_of_xla(X)
    np.testing.assert_array_equal(pool(X), want)
    if dilation == 1:  # XLA has no gradient of windows with dilation
        weights = jnp.arange(want.size, dtype=jnp.float32).reshape(want.shape)
        got_gradient, want_gradient = (jax.grad(lambda x, f=f: jnp.sum(weights * f(x)))(X) for f in (pool, pool_of_xla))
        np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-6)


def test_a_window_without_taps_is_an_error():
    with pytest.raises(ValueError, match="at least 1 tap"):
        max_pool(X, 0, padding="valid")


@jax.jit
def run_call(indices, ids, past, tail):
    reordered, layout = move_padding_last(indices, ids, past)
    y, tail = causal_max_pool(layout, jnp.take_along_axis(X, reordered[:, :, None], axis=1), tail, 3, dilation=2)
    return *restore_order(layout, y), tail


def test_causal_max_pool_in_several_calls_with_padding_and_documents():
    ids = jnp.asarray([[0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 0, 3, 3, 3, 0]])
    indices = jnp.broadcast_to(jnp.arange(13)[None], (2, 13))
    for cuts in ((), (5,), tuple(range(1, 13))):
        # P = 9: another layer has a longer tail.
        past, tail = spec.init((past_segment_specs(2, 9), tail_specs(2, 4, 5, jnp.float32)))
        outputs = []
        for start, stop in itertools.pairwise((0, *cuts, 13)):
            y, past, tail = run_call(indices[:, start:stop], ids[:, start:stop], past, tail)
            outputs.append(y)
        got = np.concatenate(outputs, axis=1)
        assert np.isfinite(got).all()
        for row, document in ((0, 1), (1, 1), (1, 2), (1, 3)):
            index = np.nonzero(np.asarray(ids[row]) == document)[0]
            document_x = np.asarray(X)[row, index]
            for t in range(len(index)):
                np.testing.assert_array_equal(got[row, index[t]], document_x[t::-2][:3].max(axis=0))


def test_k_max_pool_keeps_the_order_and_the_first_of_equal_entries():
    x = jnp.asarray([0.0, 5.0, 0.0, 3.0, 0.0, 7.0])[None, :, None]
    assert k_max_pool(x, 2)[0, :, 0].tolist() == [5.0, 7.0]
    assert k_max_pool(x, 4)[0, :, 0].tolist() == [0.0, 5.0, 3.0, 7.0]
    assert k_max_pool(x, 6)[0, :, 0].tolist() == x[0, :, 0].tolist()
    gradient = jax.grad(lambda x: jnp.sum(k_max_pool(x, 4) * jnp.arange(1.0, 5.0)[None, :, None]))(x)
    assert gradient[0, :, 0].tolist() == [1.0, 2.0, 0.0, 3.0, 0.0, 4.0]
    with pytest.raises(ValueError, match="the input has 6 steps, fewer than k=7"):
        k_max_pool(x, 7)

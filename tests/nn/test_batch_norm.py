"""Tests of batch normalization and its running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.batch_norm import batch_norm, batch_norm_specs, statistics_specs
from jaxlm.testing.helpers import relative_error

RNG = np.random.default_rng(0)
X = jnp.asarray(3.0 * RNG.standard_normal((4, 6, 5)) + 2.0, jnp.float32)
PARAMS = {name: jnp.asarray(RNG.standard_normal(5), jnp.float32) for name in ("scale", "bias")}
RUNNING = {"mean": jnp.arange(5.0), "variance": jnp.arange(1.0, 6.0)}


def expected(x, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5) * np.asarray(PARAMS["scale"]) + np.asarray(PARAMS["bias"])


def test_training_normalizes_by_the_batch_and_updates_the_running_statistics():
    y, updated = batch_norm(PARAMS, RUNNING, X, 1e-5, training=True, momentum=0.25)
    flat = np.asarray(X, np.float64).reshape(-1, 5)
    want = expected(flat, flat.mean(0), flat.var(0))
    assert relative_error(y.reshape(-1, 5), want) < 1e-6
    assert relative_error(updated["mean"], 0.75 * RUNNING["mean"] + 0.25 * flat.mean(0)) < 1e-6
    assert relative_error(updated["variance"], 0.75 * RUNNING["variance"] + 0.25 * flat.var(0, ddof=1)) < 1e-6


def test_evaluation_uses_the_running_statistics_and_does_not_change_them():
    y, unchanged = batch_norm(PARAMS, RUNNING, X, 1e-5, training=False)
    want = expected(np.asarray(X), np.arange(5.0), np.arange(1.0, 6.0))
    assert relative_error(y, want) < 1e-6
    np.testing.assert_array_equal(unchanged["mean"], RUNNING["mean"])
    np.testing.assert_array_equal(unchanged["variance"], RUNNING["variance"])


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_have_no_gradient(training):
    def total(statistics, x):
        y, updated = batch_norm(PARAMS, statistics, x, 1e-5, training=training)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updated))

    statistics, x = jax.grad(total, (0, 1))(RUNNING, X)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(statistics))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(batch_norm(PARAMS, RUNNING, x, 1e-5, training=training)[0])))(X)
    np.testing.assert_array_equal(x, gradient)


def test_statistics_are_float32_in_bfloat16():
    x = (X + 200.0).astype(jnp.bfloat16)
    y, updated = batch_norm(PARAMS, RUNNING, x, 1e-5, training=True)
    assert y.dtype == jnp.bfloat16
    assert updated["mean"].dtype == jnp.float32
    want, _ = batch_norm(PARAMS, RUNNING, x.astype(jnp.float32), 1e-5, training=True)
    assert relative_error(y.astype(jnp.float32), want) < 5e-3


def test_initial_parameters_are_the_identity_and_fewer_than_two_entries_raise():
    params, statistics = spec.init((batch_norm_specs(5), statistics_specs(5)))
    y, _ = batch_norm(params, statistics, X, 0.0, training=False)
    np.testing.assert_array_equal(y, X)
    assert not any(jax.tree.leaves(spec.decay_mask((batch_norm_specs(5), statistics_specs(5)))))
    for rows in (0, 1):
        message = (
            rf"batch normalization of \[{rows}, 1, 5\] has {rows} entries per channel, but training needs at least"
        )
        with pytest.raises(ValueError, match=message):
            batch_norm(params, statistics, X[:rows, :1], 1e-5, training=True)

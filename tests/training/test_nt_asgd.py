"""NT-ASGD: when averaging starts, and what it averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal
from jaxlm.training.nt_asgd import (
    averaging,
    has_averaging,
    has_started,
    mean_params,
    should_start_averaging,
    start_averaging,
)


def published_start(losses, nonmono):
    """Return the evaluation at which the authors' code (awd-lstm-lm, main.py, copied here) switches to ASGD."""
    best_val_loss = []
    for evaluation, val_loss in enumerate(losses):
        if len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono]):
            return evaluation
        best_val_loss.append(val_loss)
    return None


@pytest.mark.parametrize("nonmono", [1, 5])
def test_averaging_starts_at_the_same_evaluation_as_in_the_published_code(nonmono):
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(50):
        losses = list(5.0 / np.arange(1, 25) ** 0.3 + 0.15 * rng.standard_normal(24))
        start_evaluation = next(
            (n for n in range(len(losses)) if should_start_averaging(losses[: n + 1], nonmono)), None
        )
        assert start_evaluation == published_start(losses, nonmono)
        starts.add(start_evaluation)
    assert len(starts) > 3


def test_should_start_at_boundary_values_and_with_nan():
    assert not should_start_averaging([])
    assert not should_start_averaging([1.0] + [2.0] * 5)  # the best loss is only 5 evaluations old
    assert should_start_averaging([1.0] + [2.0] * 6)
    assert not should_start_averaging([2.0] + [3.0] * 5 + [2.0])  # the last loss equals the best loss
    assert should_start_averaging([2.0] * 6 + [float("nan")])
    assert not should_start_averaging([float("nan")] + [3.0] * 5 + [2.0])
    with pytest.raises(ValueError, match="nonmono=0 must be at least 1"):
        should_start_averaging([1.0], 0)


def test_averaging_covers_all_iterates_since_the_start_and_changes_no_update():
    optimizer = optax.chain(optax.trace(0.5), optax.scale(-0.3), averaging())
    plain = optax.chain(optax.trace(0.5), optax.scale(-0.3))
    params = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([0.5])}
    state, plain_state = optimizer.init(params), plain.init(params)
    gradient = jax.grad(lambda p: jnp.sum((p["w"] - 3.0) ** 2) + jnp.sum(p["b"] ** 4))
    update = jax.jit(optimizer.update)
    iterates = []
    for step_index in range(9):
        updates, state = update(gradient(params), state, params)
        expected, plain_state = plain.update(gradient(params), plain_state)
        assert_trees_close(updates, expected, 1e-6)
        params = optax.apply_updates(params, updates)
        if step_index < 4:
            assert_trees_close(mean_params(state), params, 1e-6)
        if step_index == 3:
            state = start_averaging(state)
        if step_index == 6:
            state = start_averaging(state)  # a second start changes nothing
        if step_index >= 3:
            iterates.append(params)
            assert_trees_close(mean_params(state), jax.tree.map(lambda *x: sum(x) / len(x), *iterates), 1e-6)
    assert update._cache_size() == 1


def test_the_mean_is_a_copy_of_the_parameters():
    """A training step donates the parameters, so the mean must be a copy."""
    params = {"w": jnp.ones(3)}
    mean = mean_params(averaging().init(params))
    params["w"].delete()
    assert mean["w"].tolist() == [1.0, 1.0, 1.0]


def test_parameters_without_a_mean_keep_their_values():
    params = {"a": jnp.ones(2), "b": jnp.zeros(3)}
    optimizers = {"averaged": optax.chain(optax.sgd(1.0), averaging()), "fixed": optax.set_to_zero()}
    optimizer = optax.partition(optimizers, {"a": "averaged", "b": "fixed"})
    assert_trees_equal(mean_params(optimizer.init(params), params), params)


def test_wrong_use_raises_an_error():
    with pytest.raises(ValueError, match="0 averages: put averaging"):
        mean_params(optax.sgd(1.0).init({"w": jnp.ones(3)}))
    twice = optax.chain(averaging(), averaging())
    with pytest.raises(ValueError, match="2 averages"):
        start_averaging(twice.init({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match="averaging needs the parameters"):
        averaging().update({"w": jnp.ones(3)}, averaging().init({"w": jnp.ones(3)}))


def test_has_started_reads_the_optimizer_state():
    params = {"w": jnp.ones(3)}
    plain, averaged_sgd = optax.sgd(0.1).init(params), optax.chain(optax.sgd(0.1), averaging()).init(params)
    assert not has_averaging(plain)
    assert not has_started(plain)
    assert has_averaging(averaged_sgd)
    assert not has_started(averaged_sgd)
    assert has_started(start_averaging(averaged_sgd))

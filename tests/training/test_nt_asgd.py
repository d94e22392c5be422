"""NT-ASGD: when averaging starts, and what it averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.training.nt_asgd import averaged, averaging, has_averaging, has_started, should_start, start
from tests.helpers import assert_trees_close


def starts_at(losses, nonmono):
    """Where the code of the authors (awd-lstm-lm, main.py) would switch to ASGD, transcribed."""
    best_val_loss = []
    for evaluation, val_loss in enumerate(losses):
        if len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono]):
            return evaluation
        best_val_loss.append(val_loss)
    return None


@pytest.mark.parametrize("nonmono", [1, 5])
def test_starts_where_the_published_code_does(nonmono):
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(50):
        losses = list(5.0 / np.arange(1, 25) ** 0.3 + 0.15 * rng.standard_normal(24))
        ours = next((n for n in range(len(losses)) if should_start(losses[: n + 1], nonmono)), None)
        assert ours == starts_at(losses, nonmono)
        found.add(ours)
    assert len(found) > 3


def test_edges_of_the_start():
    assert not should_start([])
    assert not should_start([1.0] + [2.0] * 5)  # the first is only 5 evaluations back
    assert should_start([1.0] + [2.0] * 6)
    assert not should_start([2.0] + [3.0] * 5 + [2.0])  # not worse
    assert should_start([2.0] * 6 + [float("nan")])
    assert not should_start([float("nan")] + [3.0] * 5 + [2.0])
    with pytest.raises(ValueError, match="nonmono=0 must be at least 1"):
        should_start([1.0], 0)


def test_averages_every_iterate_from_the_start_on_and_changes_no_update():
    optimizer = optax.chain(optax.trace(0.5), optax.scale(-0.3), averaging())
    plain = optax.chain(optax.trace(0.5), optax.scale(-0.3))
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    state, plain_state = optimizer.init(params), plain.init(params)
    gradient = jax.grad(lambda p: jnp.sum((p["w"] - 3.0) ** 2) + jnp.sum(p["b"] ** 4))
    step = jax.jit(optimizer.update)
    iterates = []
    for n in range(9):
        updates, state = step(gradient(params), state, params)
        want, plain_state = plain.update(gradient(params), plain_state)
        assert_trees_close(updates, want, 1e-6)
        params = optax.apply_updates(params, updates)
        if n < 4:
            assert_trees_close(averaged(state), params, 1e-6)
        if n == 3:
            state = start(state)
        if n == 6:
            state = start(state)  # again: nothing changes
        if n >= 3:
            iterates.append(params)
            assert_trees_close(averaged(state), jax.tree.map(lambda *x: sum(x) / len(x), *iterates), 1e-6)
    assert step._cache_size() == 1


def test_the_state_is_no_alias_of_the_parameters():
    """Parameters are donated by a training step; the mean must survive."""
    params = {"w": jnp.ones(3)}
    mean = averaged(averaging().init(params))
    params["w"].delete()
    assert mean["w"].tolist() == [1.0, 1.0, 1.0]


def test_misuse_is_named():
    with pytest.raises(ValueError, match="0 averages: put averaging"):
        averaged(optax.sgd(1.0).init({"w": jnp.ones(3)}))
    twice = optax.chain(averaging(), averaging())
    with pytest.raises(ValueError, match="2 averages"):
        start(twice.init({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match="averaging needs the parameters"):
        averaging().update({"w": jnp.ones(3)}, averaging().init({"w": jnp.ones(3)}))


def test_a_state_tells_whether_averaging_has_started():
    params = {"w": jnp.ones(3)}
    plain, averaged_sgd = optax.sgd(0.1).init(params), optax.chain(optax.sgd(0.1), averaging()).init(params)
    assert not has_averaging(plain)
    assert not has_started(plain)
    assert has_averaging(averaged_sgd)
    assert not has_started(averaged_sgd)
    assert has_started(start(averaged_sgd))

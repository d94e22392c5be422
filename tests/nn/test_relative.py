"""Relative terms against a dense form that picks each row with a one-hot vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.relative import relative_term, shifted_relative_term, sinusoids
from tests.helpers import assert_trees_close, relative_error

B, T, S, H, K = 2, 5, 8, 3, 4
PLAIN = (S - T + np.arange(T))[None, :, None] - np.arange(S)[None, None, :]  # queries and keys end together


def arrays(rows):
    q_key, r_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(q_key, (B, T, H, K)), jax.random.normal(r_key, (rows, H, K))


def dense(q, r, distance, longest):
    picked_BTSR = jax.nn.one_hot(longest - jnp.asarray(distance), len(r))
    picked_BTSR = jnp.broadcast_to(picked_BTSR, (B, *picked_BTSR.shape[1:]))
    return 0.5 * jnp.einsum("BTHK,BTSR,RHK->BHTS", q, picked_BTSR, r)


def test_sinusoids_are_concatenated_and_not_interleaved():
    table = np.asarray(sinusoids(jnp.array([3, 0, -2]), 6))
    for row, distance in zip(table, (3, 0, -2)):
        angles = distance / np.array([1.0, 10000 ** (2 / 6), 10000 ** (4 / 6)])
        assert relative_error(row, np.concatenate([np.sin(angles), np.cos(angles)])) < 1e-6
    with pytest.raises(ValueError, match="width=5 must be even"):
        sinusoids(jnp.arange(3), 5)


def test_terms_of_any_distances_and_their_gradients():
    """Each row has distances of its own, negative and repeated ones too."""
    q, r = arrays(rows=9)
    distance = np.random.default_rng(0).integers(-3, 6, (B, T, S))
    outer = jax.random.normal(jax.random.key(1), (B, H, T, S))

    def of(form):
        return jax.jit(jax.value_and_grad(lambda q, r: jnp.sum(outer * form(q, r)), argnums=(0, 1)))(q, r)

    ours = of(lambda q, r: relative_term(q, r, jnp.asarray(distance), 5, scale=0.5))
    assert_trees_close(ours, of(lambda q, r: dense(q, r, distance, 5)), 1e-5)


def test_distances_beyond_the_rows_take_the_nearest():
    q, r = arrays(rows=3)
    far = relative_term(q, r, jnp.full((1, T, S), 99), 2, scale=0.5)
    near = relative_term(q, r, jnp.full((1, T, S), 2), 2, scale=0.5)
    assert np.array_equal(far, near)


@pytest.mark.parametrize("rows", [S, S + T - 1])
def test_shifted_terms_are_those_of_plain_distances_and_so_are_their_gradients(rows):
    q, r = arrays(rows)
    # Rows for a causal mask alone: what later keys get is arbitrary, so it must not count.
    seen = np.broadcast_to((rows > S) | (PLAIN >= 0), (1, T, S))[:, None]
    outer = jnp.where(seen, jax.random.normal(jax.random.key(1), (B, H, T, S)), 0.0)

    def of(form):
        return jax.jit(jax.value_and_grad(lambda q, r: jnp.sum(outer * form(q, r)), argnums=(0, 1)))(q, r)

    ours = of(lambda q, r: shifted_relative_term(q, r, S, scale=0.5))
    assert_trees_close(ours, of(lambda q, r: dense(q, r, PLAIN, S - 1)), 1e-5)
    assert np.isfinite(np.asarray(shifted_relative_term(q, r, S, scale=0.5))).all()


def test_too_few_rows_are_an_error():
    q, r = arrays(rows=7)
    with pytest.raises(ValueError, match="7 relative rows do not reach over 8 keys"):
        shifted_relative_term(q, r, S, scale=1.0)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.alignment import (
    align,
    alignment_keys,
    alignment_specs,
    context,
    masked_softmax,
    pooling_specs,
    pooling_weights,
)
from jaxlm.spec import Uniform
from jaxlm.testing.helpers import initial_values, relative_error

B, S, Q, C, A = 3, 7, 4, 6, 5
RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((B, Q)).astype(np.float32)
KEEP = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]], bool)


def make_case(score, local=False):
    source = np.random.default_rng(1).standard_normal((B, S, Q if score == "dot" else C)).astype(np.float32)
    specs = alignment_specs(score, Q, source.shape[-1], A, Uniform(1.0), local=local)
    return jax.tree.map(np.asarray, initial_values(specs)), source


def energy(params, score, query, source):
    if score == "dot":
        return query @ source
    if score == "general":
        return query @ (source @ params["key"]["weight"])
    return params["score"] @ np.tanh(query @ params["query"]["weight"] + source @ params["key"]["weight"])


@functools.partial(jax.jit, static_argnames="window")
def weights_of(params, query, source, keep, window=None):
    return align(params, query, alignment_keys(params, source), keep, window=window)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("window", [None, 2])
def test_weights_equal_the_formula_over_the_kept_positions(score, window):
    params, source = make_case(score, local=window is not None)
    got = weights_of(params, QUERY, source, KEEP, window)
    assert got.dtype == jnp.float32
    for row in range(B):
        kept = np.nonzero(KEEP[row])[0]
        positions = np.arange(len(kept))
        weights = np.exp([energy(params, score, QUERY[row], source[row, index]) for index in kept])
        if window is not None:
            hidden = np.tanh(QUERY[row] @ params["place"]["hidden"]["weight"])
            centre = len(kept) / (1 + np.exp(-hidden @ params["place"]["score"]))
            weights[np.abs(positions - centre) > window] = 0.0
        weights /= weights.sum()
        if window is not None:
            weights *= np.exp(-((positions - centre) ** 2) / (2 * (window / 2) ** 2))
        expected = np.zeros(S)
        expected[kept] = weights
        assert relative_error(got[row], expected) < 1e-5
        assert np.all(np.asarray(got[row])[~KEEP[row]] == 0.0)
    assert relative_error(context(got, source), np.einsum("bs,bsc->bc", got, source)) < 1e-5


def test_no_mask_equals_a_mask_that_keeps_everything():
    for score, window in (("concat", None), ("general", 3)):
        params, source = make_case(score, local=window is not None)
        want = weights_of(params, QUERY, source, np.ones((B, S), bool), window)
        assert relative_error(weights_of(params, QUERY, source, None, window), want) < 1e-6


def test_a_fully_masked_row_gives_zeros_and_has_no_gradient():
    params, source = make_case("concat")
    keep = KEEP.copy()
    keep[1] = False

    def context_of(params, query, source):
        return context(weights_of(params, query, source, keep), source)

    assert np.all(np.asarray(context_of(params, QUERY, source))[1] == 0.0)
    gradients = jax.grad(lambda *inputs: jnp.sum(context_of(*inputs) ** 2), argnums=(0, 1, 2))(params, QUERY, source)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.all(np.asarray(gradients[1])[1] == 0.0)
    assert np.any(np.asarray(gradients[1])[0] != 0.0)


def test_large_scores_do_not_overflow():
    got = masked_softmax(jnp.asarray([[3e38, -3e38, 1e30]]), jnp.asarray([[False, True, True]]))
    np.testing.assert_array_equal(got, [[0.0, 0.0, 1.0]])


def test_pooling_weights_of_each_row_and_hop():
    source = RNG.standard_normal((B, S, C)).astype(np.float32)
    params = initial_values(pooling_specs(C, A, 2, Uniform(1.0)), 3)
    got = pooling_weights(params, source, KEEP)
    assert got.shape == (B, 2, S)
    hidden = np.tanh(source @ np.asarray(params["key"]["weight"]) + np.asarray(params["key"]["bias"]))
    weights = np.exp(hidden @ np.asarray(params["score"]["weight"])) * KEEP[:, :, None]
    assert relative_error(got, np.swapaxes(weights / weights.sum(1, keepdims=True), 1, 2)) < 1e-5


def test_errors_name_bad_input():
    with pytest.raises(ValueError, match="score='cosine' is unknown: choose from 'dot', 'general', 'concat'"):
        alignment_specs("cosine", 4, 4, 4, Uniform(1.0))
    with pytest.raises(ValueError, match="score='dot' needs queries as wide as the source, got 4 and 6"):
        alignment_specs("dot", 4, 6, 4, Uniform(1.0))
    params, source = make_case("dot", local=True)
    with pytest.raises(ValueError, match="window=0 must be at least 1, or None for no local attention"):
        align(params, QUERY, source, window=0)

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.sentence import mean_pooled
from jaxlm.testing.helpers import relative_error


def test_mean_pooled_has_the_direction_of_the_mean_over_real_tokens():
    hidden = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    segments = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]], np.int32)
    hidden[segments == 0] = np.nan  # padding must be ignored
    means = np.stack([row[real > 0].mean(axis=0) for row, real in zip(hidden, segments)])
    want = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert relative_error(mean_pooled(jnp.asarray(hidden), jnp.asarray(segments)), want) < 1e-6
    assert relative_error(mean_pooled(jnp.asarray(hidden[:1]))[0], want[0]) < 1e-6


def test_a_row_of_padding_gives_zeros_and_a_finite_gradient():
    hidden, segments = jnp.ones((2, 3, 4)), jnp.asarray([[0, 0, 0], [1, 1, 0]])
    assert not mean_pooled(hidden, segments)[0].any()
    gradient = jax.grad(lambda h: mean_pooled(h, segments)[:, 0].sum())(hidden)
    assert np.isfinite(np.asarray(gradient)).all()
    assert mean_pooled(hidden.astype(jnp.bfloat16)).dtype == jnp.float32

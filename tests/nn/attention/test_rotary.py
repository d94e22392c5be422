"""Tests of rotary position embeddings: their properties, and their scalings against numbers from transformers 4.57."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.attention.rotary import RotaryScaling, rotary_angles, rotary_frequencies, rotate
from jaxlm.testing.helpers import relative_error


def random_normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_scores_depend_on_distances_only():
    q, k = random_normal(1, 1, 2, 8), random_normal(1, 1, 2, 8) + 1

    def score(q_position, k_position):
        q_angles, k_angles = (rotary_angles(jnp.asarray([[p]]), 8, 100.0) for p in (q_position, k_position))
        return jnp.sum(rotate(q, q_angles) * rotate(k, k_angles))

    assert relative_error(score(7, 3), score(54, 50)) < 1e-5
    assert relative_error(score(7, 3), score(8, 3)) > 1e-3


def test_entry_i_is_paired_with_entry_i_plus_half_the_width():
    rotated = rotate(jnp.eye(4)[None, :1, None, :], rotary_angles(jnp.asarray([[3]]), 4, 100.0))
    assert relative_error(rotated[0, 0, 0], [np.cos(3), 0, np.sin(3), 0]) < 1e-6
    rotated = rotate(jnp.eye(4)[None, 1:2, None, :], rotary_angles(jnp.asarray([[3]]), 4, 100.0))
    assert relative_error(rotated[0, 0, 0], [0, np.cos(0.3), 0, np.sin(0.3)]) < 1e-6


def test_the_norm_and_the_dtype_do_not_change():
    x = random_normal(2, 5, 3, 16)
    angles = rotary_angles(jnp.arange(10).reshape(2, 5) * 1000, 16, 10000.0)
    assert relative_error(jnp.linalg.norm(rotate(x, angles), axis=-1), jnp.linalg.norm(x, axis=-1)) < 1e-6
    assert rotate(x.astype(jnp.bfloat16), angles).dtype == jnp.bfloat16


# Width 8, base 100, 64 positions: from `ROPE_INIT_FUNCTIONS` of transformers (test_rotary_live.py computes them live).
SCALINGS = {
    "linear": RotaryScaling("linear", 4.0),
    "dynamic": RotaryScaling("dynamic", 4.0, original_positions=16),
    "llama3": RotaryScaling("llama3", 4.0, 16, low_frequency_factor=0.5, high_frequency_factor=2.0),
    "yarn": RotaryScaling("yarn", 4.0, original_positions=16, beta_fast=2.0, beta_slow=0.25),
    "fractional": RotaryScaling(
        "yarn", 4.0, original_positions=16, beta_fast=2.0, beta_slow=0.25, truncate=False, attention_factor=0.7
    ),
    "all pairs slow": RotaryScaling("yarn", 4.0, 8, beta_fast=4.0, beta_slow=2.0, truncate=False),
}
EXPECTED = {
    "linear": ([0.25, 0.079056941, 0.025, 0.0079056947], 1),
    "dynamic": ([1.0, 0.13448863, 0.01808719, 0.0024325212], 1),
    "llama3": ([1.0, 0.12732396, 0.025, 0.0079056947], 1),
    "yarn": ([1.0, 0.23717082, 0.049999997, 0.0079056947], 1.1386294),
    "fractional": ([1.0, 0.21246868, 0.025664398, 0.0079056947], 0.7),
    "all pairs slow": ([1.0, 0.31622776, 0.1, 0.031622779], 1.1386294),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name):
    """Frequencies and magnitude of each scaling equal those of transformers."""
    frequencies, magnitude = rotary_frequencies(8, 100.0, SCALINGS[name], max_positions=64)
    assert relative_error(frequencies, EXPECTED[name][0]) < 1e-6
    assert magnitude == pytest.approx(EXPECTED[name][1])
    cosine, sine = rotary_angles(jnp.asarray([[0, 9]]), 8, 100.0, SCALINGS[name], max_positions=64)
    assert relative_error(jnp.hypot(cosine, sine), np.full((1, 2, 4), magnitude)) < 1e-6


def test_dynamic_scaling_changes_nothing_up_to_the_original_length():
    unscaled, _ = rotary_frequencies(8, 100.0)
    with pytest.raises(ValueError, match="dynamic rotary scaling needs max_positions"):
        rotary_frequencies(8, 100.0, SCALINGS["dynamic"])
    for positions in (7, 16):
        assert np.array_equal(rotary_frequencies(8, 100.0, SCALINGS["dynamic"], positions)[0], unscaled)
    assert not np.array_equal(rotary_frequencies(8, 100.0, SCALINGS["dynamic"], 17)[0], unscaled)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "longrope", "factor": 2.0}, "kind='longrope' of rotary scaling is unknown: choose from linear"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5 of rotary scaling must be at least 1"),
        (
            {"kind": "yarn", "factor": 2.0, "original_positions": 8, "beta_slow": 0.0},
            "beta_slow=0.0 must be above 0 and below beta_fast=32.0",
        ),
        ({"kind": "linear", "factor": float("nan")}, "factor=nan of rotary scaling must be at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "original_positions=None of yarn rotary scaling must be at least 1"),
        (
            {"kind": "llama3", "factor": 2.0, "original_positions": 8, "high_frequency_factor": 1.0},
            "high_frequency_factor=1.0 must exceed low_frequency_factor=1.0",
        ),
        ({"kind": "yarn", "factor": 2.0, "original_positions": 8, "beta_fast": 0.5}, "below beta_fast=0.5"),
    ],
)
def test_bad_scalings_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling(**fields)


def test_an_odd_width_raises():
    with pytest.raises(ValueError, match="a head width of 7 is odd"):
        rotary_frequencies(7, 100.0)


def test_dynamic_scaling_of_one_pair_raises():
    with pytest.raises(ValueError, match="dynamic rotary scaling needs at least 4 rotated entries per head, not 2"):
        rotary_frequencies(2, 100.0, RotaryScaling("dynamic", 4.0, original_positions=16), 32)

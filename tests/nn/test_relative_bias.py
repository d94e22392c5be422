import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.relative_bias import distance_buckets, relative_bias
from tests.helpers import relative_error

# Where a bucket of T5's 32 begins, after the exact ones: 8 * 16**(i/8) and 16 * 8**(i/16), rounded up.
BIDIRECTIONAL = (8, 12, 16, 23, 32, 46, 64, 91)
UNIDIRECTIONAL = (16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)


def test_buckets_of_t5():
    def count(distance, begins):
        exact = begins[0]
        return distance if distance < exact else exact - 1 + sum(distance >= begin for begin in begins)

    both = distance_buckets(32, 128, bidirectional=True)
    assert both.tolist() == [count(abs(d), BIDIRECTIONAL) + 16 * (d > 0) for d in range(-128, 129)]
    past = distance_buckets(32, 128, bidirectional=False)
    assert past.tolist() == [count(max(-d, 0), UNIDIRECTIONAL) for d in range(-128, 129)]
    assert set(both) == set(range(32)) - {16}  # distance 0 is an earlier one
    assert set(past) == set(range(32))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_of_a_pair_follows_from_its_own_positions(bidirectional):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(8, 3)).astype(np.float32)
    query, key = rng.integers(0, 40, (2, 5)), rng.integers(0, 40, (2, 7))
    bias = relative_bias(jnp.asarray(table), jnp.asarray(query), jnp.asarray(key), 12, bidirectional=bidirectional)
    buckets = distance_buckets(8, 12, bidirectional=bidirectional)
    for b, t, s in np.ndindex(2, 5, 7):
        bucket = buckets[np.clip(key[b, s] - query[b, t], -12, 12) + 12]
        np.testing.assert_array_equal(bias[b, :, t, s], table[bucket])


def test_positions_of_every_row_give_one_bias():
    table = jax.random.normal(jax.random.key(0), (8, 3))
    place = jnp.arange(6)[None]
    bias = relative_bias(table, place, place, 12, bidirectional=True)
    assert bias.shape == (1, 3, 6, 6)
    moved = relative_bias(table, place + jnp.array([[0], [9]]), place + jnp.array([[0], [9]]), 12, bidirectional=True)
    np.testing.assert_array_equal(moved, np.broadcast_to(bias, (2, 3, 6, 6)))  # only distances count


@pytest.mark.parametrize("bidirectional", [True, False])
def test_gradient_of_the_table_is_the_sum_over_the_pairs_of_a_bucket(bidirectional):
    rng = np.random.default_rng(1)
    query, key = rng.integers(0, 40, (3, 6)), rng.integers(0, 40, (3, 9))
    weight = rng.normal(size=(3, 2, 6, 9)).astype(np.float32)

    def value(table):
        bias = relative_bias(table, jnp.asarray(query), jnp.asarray(key), 12, bidirectional=bidirectional)
        return jnp.sum(weight * jnp.square(bias))

    table = rng.normal(size=(8, 2)).astype(np.float32)
    buckets = distance_buckets(8, 12, bidirectional=bidirectional)[
        np.clip(key[:, None, :] - query[:, :, None], -12, 12) + 12
    ]
    want = np.zeros((8, 2))
    np.add.at(want, buckets, np.moveaxis(weight, 1, -1) * 2.0 * table[buckets].astype(np.float64))
    assert relative_error(jax.jit(jax.grad(value))(table), want) < 1e-6
    unused = sorted(set(range(8)) - set(buckets.ravel()))
    assert unused == ([4] if bidirectional else [])
    assert np.all(want[unused] == 0.0)


@pytest.mark.parametrize(
    ("buckets", "max_distance", "bidirectional", "message"),
    [
        (2, 128, True, "2 buckets are too few or odd"),
        (7, 128, True, "7 buckets are too few or odd"),
        (1, 128, False, "1 buckets are too few"),
        (32, 8, True, "max_distance=8 must exceed 8"),
        (32, 16, False, "max_distance=16 must exceed 16"),
    ],
)
def test_numbers_that_do_not_fit_are_named(buckets, max_distance, bidirectional, message):
    with pytest.raises(ValueError, match=message):
        distance_buckets(buckets, max_distance, bidirectional=bidirectional)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.attention.bucket_bias import bias_of_each_distance, distance_buckets
from jaxlm.testing.helpers import relative_error

# First distance of each of T5's 32 buckets after the exact ones: 8 * 16**(i/8) and 16 * 8**(i/16), rounded up.
BIDIRECTIONAL = (8, 12, 16, 23, 32, 46, 64, 91)
UNIDIRECTIONAL = (16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)


def test_buckets_of_t5():
    """The bucket of each distance equals its definition, in both directions and in one."""

    def bucket(distance, starts):
        exact = starts[0]
        return distance if distance < exact else exact - 1 + sum(distance >= start for start in starts)

    bidirectional = distance_buckets(32, 128, bidirectional=True)
    assert bidirectional.tolist() == [bucket(abs(d), BIDIRECTIONAL) + 16 * (d > 0) for d in range(-128, 129)]
    unidirectional = distance_buckets(32, 128, bidirectional=False)
    assert unidirectional.tolist() == [bucket(max(-d, 0), UNIDIRECTIONAL) for d in range(-128, 129)]
    assert set(bidirectional) == set(range(32)) - {16}  # bucket 16 is unused: distance 0 is in bucket 0
    assert set(unidirectional) == set(range(32))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_table_of_distances_and_its_gradient(bidirectional):
    rng = np.random.default_rng(1)
    table, weight = (rng.normal(size=(n, 2)).astype(np.float32) for n in (8, 25))
    buckets = distance_buckets(8, 12, bidirectional=bidirectional)
    got = bias_of_each_distance(jnp.asarray(table), 12, bidirectional=bidirectional)
    np.testing.assert_array_equal(got, table[buckets])

    def value(table):
        return jnp.sum(weight * jnp.square(bias_of_each_distance(table, 12, bidirectional=bidirectional)))

    want = np.zeros((8, 2))
    np.add.at(want, buckets, weight * 2.0 * table[buckets].astype(np.float64))
    assert relative_error(jax.jit(jax.grad(value))(table), want) < 1e-6
    unused = sorted(set(range(8)) - set(buckets))
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
def test_bad_bucket_settings_raise(buckets, max_distance, bidirectional, message):
    with pytest.raises(ValueError, match=message):
        distance_buckets(buckets, max_distance, bidirectional=bidirectional)

"""Position biases of T5 (Raffel et al. 2020, section 2.1): one learned number per head and bucket of distances.

    bias[head, query, key] = table[bucket(key position - query position), head]

Bidirectional attention has N / 2 buckets for each direction. Causal attention has N buckets for one direction. Half of
the buckets of a direction (rounded down) contain one distance each. The other buckets contain ranges of distances. The
size of the ranges grows exponentially. The last bucket of a direction also contains all distances from ``max_distance``
on. In bidirectional attention, bucket N / 2, the first bucket for keys after the query, is empty, because the distance
of such keys is at least 1 (as in the published code).

Shapes: H heads, N buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sharding import gather_sharding
from jaxlm.spec import require_arrays


def distance_buckets(buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance from ``-max_distance`` to ``max_distance``, [2 * max_distance + 1] int32.

    The distance is ``key position - query position``.

    The buckets are computed on the host, in float32 as in the published code, so that their boundaries do not depend on
    the rounding of a device.

    Args:
        buckets: N, the number of buckets.
        max_distance: all distances from this one on are in the last bucket of their direction.
        bidirectional: True: the upper half of the buckets is for keys after the query. False: such keys are in bucket
            0, because they are masked anyway.

    Raises:
        ValueError: too few buckets, an odd number of buckets for bidirectional attention, or a ``max_distance`` that
            leaves no distances for the buckets of ranges.
    """
    buckets_per_side = buckets // 2 if bidirectional else buckets
    num_exact = buckets_per_side // 2
    if num_exact < 1 or (bidirectional and buckets % 2):
        raise ValueError(
            f"{buckets} buckets are too few or odd: bidirectional attention needs an even number of at least 4, "
            "causal attention at least 2"
        )
    if max_distance <= num_exact:
        raise ValueError(
            f"max_distance={max_distance} must exceed {num_exact}, the number of buckets with one distance each "
            f"(buckets={buckets})"
        )
    distance = np.arange(-max_distance, max_distance + 1)
    magnitude = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    log_ratio = np.log(np.maximum(magnitude, num_exact).astype(np.float32) / np.float32(num_exact)) / np.float32(
        math.log(max_distance / num_exact)
    )
    range_bucket = num_exact + (log_ratio * np.float32(buckets_per_side - num_exact)).astype(np.int32)
    bucket = np.where(magnitude < num_exact, magnitude, np.minimum(range_bucket, buckets_per_side - 1))
    return (bucket + np.where(bidirectional & (distance > 0), buckets_per_side, 0)).astype(np.int32)


def bias_of_each_distance(table_NH: jax.Array, max_distance: int, *, bidirectional: bool) -> jax.Array:
    """The bias of each distance, [2 * max_distance + 1, H] float32.

    Row n is the bias for ``query position - key position = max_distance - n``.

    The result is the argument ``table`` of ``jaxlm.nn.attention.distance_bias.distance_bias`` with
    ``max_distance=max_distance``.
    """
    require_arrays(table_NH=table_NH)
    buckets = jnp.asarray(distance_buckets(table_NH.shape[0], max_distance, bidirectional=bidirectional))
    # There are few rows: on a CPU, this gather and its gradient are 10 times as fast as a matmul with one-hot vectors.
    return table_NH.astype(jnp.float32).at[buckets].get(mode="promise_in_bounds", out_sharding=gather_sharding(buckets))

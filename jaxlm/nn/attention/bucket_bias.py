"""Position biases of T5 (Raffel et al. 2020, section 2.1): a learned number for each head and bucket of distances.

    bias[head, query, key] = table[bucket(key position - query position), head]

Half of the buckets contain one distance each. The other buckets contain ranges of distances that grow logarithmically;
the last one contains all distances from ``max_distance`` on. Shapes: H heads, N buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sharding import gathered


def distance_buckets(buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance from ``-max_distance`` to ``max_distance``, [2 * max_distance + 1] int32.

    It is computed on the host, in float32 as in the published code, so that the boundaries of the buckets do not depend
    on the rounding of a device.

    Args:
        buckets: N, the number of buckets.
        max_distance: all distances from here on share the last bucket.
        bidirectional: True: the upper half of the buckets is for keys after the query. False: such keys are in bucket
            0, because they are masked anyway.

    Raises:
        ValueError: too few buckets, or a ``max_distance`` that leaves no distances for the logarithmic buckets.
    """
    one_side = buckets // 2 if bidirectional else buckets
    exact = one_side // 2
    if exact < 1 or (bidirectional and buckets % 2):
        raise ValueError(
            f"{buckets} buckets are too few or odd: bidirectional attention needs an even number from 4 on, causal "
            "attention at least 2"
        )
    if max_distance <= exact:
        raise ValueError(
            f"max_distance={max_distance} must exceed {exact}, the number of distances with a bucket of their own "
            f"(buckets={buckets})"
        )
    distance = np.arange(-max_distance, max_distance + 1)
    size = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    far = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    logarithmic = exact + (far * np.float32(one_side - exact)).astype(np.int32)
    bucket = np.where(size < exact, size, np.minimum(logarithmic, one_side - 1))
    return (bucket + np.where(bidirectional & (distance > 0), one_side, 0)).astype(np.int32)


def distance_table(table_NH: jax.Array, max_distance: int, *, bidirectional: bool) -> jax.Array:
    """The bias of each distance, [2 * max_distance + 1, H] float32; row n is for the distance ``max_distance - n``.

    It is the table for ``distance_bias`` with ``longest=max_distance``.
    """
    buckets = jnp.asarray(distance_buckets(table_NH.shape[0], max_distance, bidirectional=bidirectional))
    # There are few rows: on a CPU, this gather and its gradient are 10 times as fast as a matmul with one-hot vectors.
    return table_NH.astype(jnp.float32).at[buckets].get(mode="promise_in_bounds", out_sharding=gathered(buckets))

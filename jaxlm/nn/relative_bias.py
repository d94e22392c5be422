"""Position biases of T5 (Raffel et al. 2020, section 2.1): a learned number for each head and bucket of distances.

    bias[head, query, key] = table[bucket(key position - query position), head]

Half of the buckets stand for one distance each, the others for ranges that grow logarithmically; from ``max_distance``
on all distances share the last. Shapes: H heads, N buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sharding import gathered


def distance_buckets(buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance from ``-max_distance`` to ``max_distance``, [2 * max_distance + 1] int32.

    Worked out on the host, in the float32 of the published code, so that no device rounds a border another way.

    Args:
        bidirectional: later keys have the upper half of the buckets to themselves; otherwise they share bucket 0, being
            masked anyway.

    Raises:
        ValueError: too few buckets, or none left for distances beyond the exact ones.
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
            f"max_distance={max_distance} must exceed {exact}, the distances that have one of {buckets} buckets each"
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
    """The bias of every distance, [2 * max_distance + 1, H] float32: row n is that of ``max_distance - n``.

    What ``distance_term`` takes, with ``longest=max_distance``.
    """
    buckets = jnp.asarray(distance_buckets(table_NH.shape[0], max_distance, bidirectional=bidirectional))
    # Few rows: on a CPU this and its gradient are 10 times as fast as a product with one-hot vectors.
    return table_NH.astype(jnp.float32).at[buckets].get(mode="promise_in_bounds", out_sharding=gathered(buckets))

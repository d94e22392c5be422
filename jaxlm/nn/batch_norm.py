"""Batch normalization (Ioffe and Szegedy 2015). The running statistics are an argument and a result.

The parameters of a model contain the running statistics under the key ``statistics``. The statistics get no gradient
and no weight decay. During training, ``apply`` of the model returns the updated statistics, and the training step
writes them into the parameters.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.spec import ONES, ZEROS, ArraySpec, Params


def batch_norm_specs(width: int) -> dict[str, ArraySpec]:
    """Specs of ``scale`` [width], initially ones, and ``bias`` [width], initially zeros."""
    return {"scale": ArraySpec((width,), ("norm",), ONES), "bias": ArraySpec((width,), ("norm",), ZEROS)}


def statistics_specs(width: int) -> dict[str, ArraySpec]:
    """Specs of the running ``mean`` [width], initially zeros, and the running ``variance`` [width], initially ones."""
    return {"mean": ArraySpec((width,), ("norm",), ZEROS), "variance": ArraySpec((width,), ("norm",), ONES)}


def batch_norm(
    params: Params,
    statistics: dict[str, Any],
    x: jax.Array,
    epsilon: float,
    *,
    training: bool,
    momentum: float = 0.1,
) -> tuple[jax.Array, dict[str, Any]]:
    """``x`` normalized per channel (last axis), scaled and shifted, in the dtype of ``x``; and the running statistics.

    Statistics are computed in float32.

    Args:
        params: ``scale`` and ``bias``, as in :func:`batch_norm_specs`.
        statistics: the running ``mean`` and ``variance``, as in :func:`statistics_specs`.
        epsilon: added to the variance.
        training: True: normalize with the mean and the biased variance of ``x`` over all axes except the last. The
            returned statistics are ``(1 - momentum) * old + momentum * new``, where ``new`` has the mean and the
            unbiased variance of ``x``. False: normalize with the running statistics and return them unchanged.
        momentum: weight of the statistics of ``x`` in the returned statistics.

    Raises:
        ValueError: training with fewer than 2 entries per channel, which have no unbiased variance.
    """
    x32 = x.astype(jnp.float32)
    reduced_axes = tuple(range(x.ndim - 1))
    statistics = lax.stop_gradient(statistics)
    params, old = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, statistics))

    def broadcast(leaf: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(leaf, x.shape, (x.ndim - 1,))

    mean, variance = old["mean"], old["variance"]
    if training:
        count = math.prod(x.shape[:-1])
        if count < 2:
            raise ValueError(
                f"batch normalization of {list(x.shape)} has {count} entries per channel, but training needs at least "
                "2: train with a larger batch"
            )
        mean = jnp.mean(x32, axis=reduced_axes)
        variance = jnp.mean(jnp.square(x32 - broadcast(mean)), axis=reduced_axes)
        new = lax.stop_gradient({"mean": mean, "variance": variance * (count / (count - 1))})
        statistics = jax.tree.map(lambda before, now: (1.0 - momentum) * before + momentum * now, old, new)
    scale = params["scale"] * lax.rsqrt(variance + epsilon)
    return ((x32 - broadcast(mean)) * broadcast(scale) + broadcast(params["bias"])).astype(x.dtype), statistics

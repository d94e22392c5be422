"""Batch normalisation (Ioffe and Szegedy 2015), its running statistics passed in and handed on.

Running statistics stand among the parameters of a family, under the key ``statistics``; no gradient trains them and
no decay shrinks them. While training, ``apply`` hands on where they moved, and the training step puts them in place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.spec import ONES, ZEROS, ArraySpec


def batch_norm_specs(width: int) -> dict[str, ArraySpec]:
    """``scale`` (ones) and ``bias`` (zeros) of ``[width]``."""
    return {"scale": ArraySpec((width,), ("norm",), ONES), "bias": ArraySpec((width,), ("norm",), ZEROS)}


def statistics_specs(width: int) -> dict[str, ArraySpec]:
    """Running ``mean`` (zeros) and ``variance`` (ones) of ``[width]``."""
    return {"mean": ArraySpec((width,), ("norm",), ZEROS), "variance": ArraySpec((width,), ("norm",), ONES)}


def batch_norm(
    params: dict[str, Any],
    statistics: dict[str, Any],
    x: jax.Array,
    epsilon: float,
    *,
    training: bool,
    momentum: float = 0.1,
) -> tuple[jax.Array, dict[str, Any]]:
    """Normalise each entry of the last axis of ``x`` over all the others, and the statistics to go on with.

    Args:
        training: use the mean and (biased) variance of ``x``, and move the running ones (whose variance is unbiased)
            towards them by ``momentum``. Otherwise the running ones are used, and handed on as they are.

    Statistics are float32; the result keeps the dtype of ``x``.

    Raises:
        ValueError: training on a single entry, whose variance does not exist.
    """
    x32 = x.astype(jnp.float32)
    rest = tuple(range(x.ndim - 1))
    statistics = lax.stop_gradient(statistics)

    def wide(leaf: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(leaf, x.shape, (x.ndim - 1,))

    mean, variance = statistics["mean"], statistics["variance"]
    if training:
        count = x.size // x.shape[-1]
        if count < 2:
            raise ValueError(f"batch normalisation of {list(x.shape)} sees one entry a channel: train on more")
        mean = jnp.mean(x32, axis=rest)
        variance = jnp.mean(jnp.square(x32 - wide(mean)), axis=rest)
        new = lax.stop_gradient({"mean": mean, "variance": variance * (count / (count - 1))})
        statistics = jax.tree.map(lambda old, new: (1.0 - momentum) * old + momentum * new, statistics, new)
    scale = params["scale"] * lax.rsqrt(variance + epsilon)
    return ((x32 - wide(mean)) * wide(scale) + wide(params["bias"])).astype(x.dtype), statistics

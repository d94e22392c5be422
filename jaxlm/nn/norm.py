"""Normalisation. Statistics are float32, whatever the compute dtype."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.spec import ONES, ZEROS, ArraySpec


def layer_norm_specs(width: int) -> dict[str, ArraySpec]:
    """``scale`` (ones) and ``bias`` (zeros) of ``[width]``."""
    return {"scale": ArraySpec((width,), ("norm",), ONES), "bias": ArraySpec((width,), ("norm",), ZEROS)}


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def layer_norm(params: dict[str, Any], x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation over the last axis (Ba et al. 2016, eq. 3), with the biased variance. Keeps ``x``'s dtype."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    if jnp.finfo(x.dtype).bits < 32:
        # Both sums in one pass, which a TPU makes as it computes x. What cancels here is less than rounding x to half
        # precision has cost, until a mean of thousands of deviations leaves x no digits.
        variance = jnp.maximum(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + epsilon)
    scale, bias = (lax.broadcast_in_dim(params[name], x.shape, (x.ndim - 1,)) for name in ("scale", "bias"))
    return (normal * scale + bias).astype(x.dtype)


def rms_norm_specs(width: int) -> dict[str, ArraySpec]:
    """``scale`` (ones) of ``[width]``."""
    return {"scale": ArraySpec((width,), ("norm",), ONES)}


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(params: dict[str, Any], x: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, eq. 4). Keeps ``x``'s dtype."""
    x32 = x.astype(jnp.float32)
    normal = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normal * lax.broadcast_in_dim(params["scale"], x.shape, (x.ndim - 1,))).astype(x.dtype)

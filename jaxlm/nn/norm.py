"""Normalisation layers. Statistics are computed in float32 for every compute dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.spec import ONES, ZEROS, ArraySpec, Params


def layer_norm_specs(width: int) -> dict[str, ArraySpec]:
    """Specs of ``scale`` [width], initialized with ones, and ``bias`` [width], initialized with zeros."""
    return {"scale": ArraySpec((width,), ("norm",), ONES), "bias": ArraySpec((width,), ("norm",), ZEROS)}


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation over the last axis, with biased variance (Ba et al. 2016, eq. 3), in the dtype of ``x``.

    If the parameters have several axes, such as [groups, width], these axes are the last axes of ``x``. The result is
    then a group norm (Wu and He 2018), which normalises the channels of each group separately.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    if jnp.finfo(x.dtype).bits < 32:
        # Compute the sums of x and x**2 in one pass, which a TPU fuses with the computation of x. The error by
        # cancellation is smaller than that of rounding x to half precision, unless the mean is thousands of standard
        # deviations. In that case, the rounding of x to half precision has already removed its deviations from the
        # mean.
        variance = jnp.maximum(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normalised = centred * lax.rsqrt(variance + epsilon)
    axes = tuple(range(x.ndim - params["scale"].ndim, x.ndim))
    scale, bias = (lax.broadcast_in_dim(params[name], x.shape, axes) for name in ("scale", "bias"))
    return (normalised * scale + bias).astype(x.dtype)


def multi_head_layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """:func:`layer_norm` of each head of ``x`` [..., heads, width], without a bias.

    ``scale`` [heads * width] has the specs of :func:`rms_norm_specs`.
    """
    ones = jnp.ones((x.shape[-1],), jnp.float32)
    normalised = layer_norm({"scale": ones, "bias": jnp.zeros_like(ones)}, x, epsilon)
    scale = params["scale"].astype(x.dtype).reshape(x.shape[-2:])
    return normalised * lax.broadcast_in_dim(scale, x.shape, (x.ndim - 2, x.ndim - 1))


def rms_norm_specs(width: int, *, minus_one: bool = False) -> dict[str, ArraySpec]:
    """Specs of ``scale`` [width], initialized with ones.

    Args:
        minus_one: instead of the scale, the parameter is ``scale_minus_one``, initialized with zeros (Gemma).
    """
    if minus_one:
        return {"scale_minus_one": ArraySpec((width,), ("norm",), ZEROS)}
    return {"scale": ArraySpec((width,), ("norm",), ONES)}


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, eq. 4), in the dtype of ``x``.

    If the scale has several axes, such as [groups, width], these axes are the last axes of ``x``.

    Args:
        params: ``scale``, or ``scale_minus_one``, to which 1 is added (:func:`rms_norm_specs`).
    """
    x32 = x.astype(jnp.float32)
    normalised = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    scale = params["scale"] if "scale" in params else 1.0 + params["scale_minus_one"].astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    return (normalised * lax.broadcast_in_dim(scale, x.shape, axes)).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=1, prevent_cse=False)
def l2_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """``x`` divided by its L2 norm over the last axis, ``x / sqrt(sum(x**2) + epsilon)``, in the dtype of ``x``. Zeros
    stay zeros."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)

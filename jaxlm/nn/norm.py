"""Normalization layers. Means and variances are float32 for every dtype of the input.

The backward pass recomputes the float32 arrays from the input (``jax.checkpoint``), so that they are not stored. The
gradient of the kernel for few rows (``jaxlm.nn.norm_pallas``) does not do this, because the kernel is for decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn import choices, norm_pallas
from jaxlm.spec import ONES, ZEROS, ArraySpec, Params, require_arrays


def layer_norm_specs(width: int) -> dict[str, ArraySpec]:
    """Specs of ``scale`` [width], initialized with ones, and ``bias`` [width], initialized with zeros."""
    return {"scale": ArraySpec((width,), ("norm",), ONES), "bias": ArraySpec((width,), ("norm",), ZEROS)}


def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalization over the last axis, with biased variance (Ba et al. 2016, eq. 3), in the dtype of ``x``.

    If the parameters have several axes, such as [groups, width], then ``x`` must end with the same axes. Each group is
    then normalized separately, as in group normalization (Wu and He 2018), but with separate statistics for each token.
    """
    return _normalize(_layer_norm, epsilon, x, params["scale"], params["bias"])


def _layer_norm(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    standardized = standardize(x, functools.partial(jnp.mean, axis=-1, keepdims=True), epsilon)
    return (standardized * _broadcast(scale, x) + _broadcast(bias, x)).astype(x.dtype)


def standardize(x: jax.Array, mean_of: Callable[[jax.Array], jax.Array], epsilon: float) -> jax.Array:
    """``(x - mean) / sqrt(variance + epsilon)``, float32, with biased variance.

    Args:
        mean_of: computes the means of a float32 array with the shape of ``x``, for example over the last axis.
    """
    x32 = x.astype(jnp.float32)
    mean = mean_of(x32)
    centered = x32 - mean
    if jnp.finfo(x.dtype).bits < 32:
        # One pass computes the sums of x and x**2. On a TPU, XLA fuses this pass with the computation of x. The
        # difference of the mean of x**2 and the square of the mean has a cancellation error. If the mean is at most
        # about 1000 standard deviations, this error is smaller than the error of rounding x to half precision. If the
        # mean is larger, the rounding error of x is itself a large part of the standard deviation, or exceeds it.
        variance = jnp.maximum(mean_of(jnp.square(x32)) - jnp.square(mean), 0.0)
    else:
        variance = mean_of(jnp.square(centered))
    return centered * lax.rsqrt(variance + epsilon)


def _normalize(function: Callable[..., jax.Array], epsilon: float, x: jax.Array, *params: jax.Array) -> jax.Array:
    """``function(epsilon, x, *params)``, computed by the TPU kernel if ``choices.norm_kernel`` chooses it."""
    require_arrays(x=x)
    if choices.norm_kernel(x, *params):
        return norm_pallas.run(functools.partial(function, epsilon), x, *params)
    return jax.checkpoint(functools.partial(function, epsilon), prevent_cse=False)(x, *params)


def _broadcast(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """The parameter in float32, broadcast to the shape of ``x``, whose last axes it has."""
    return lax.broadcast_in_dim(parameter.astype(jnp.float32), x.shape, tuple(range(x.ndim - parameter.ndim, x.ndim)))


def multi_head_layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """:func:`layer_norm` of each head of ``x`` [..., heads, width] without a bias, in the dtype of ``x``.

    Args:
        params: ``scale`` [heads * width] (``rms_norm_specs(heads * width)``).
    """
    ones = jnp.ones((x.shape[-1],), jnp.float32)
    normalized = layer_norm({"scale": ones, "bias": jnp.zeros_like(ones)}, x, epsilon)
    scale = params["scale"].astype(x.dtype).reshape(x.shape[-2:])
    return normalized * lax.broadcast_in_dim(scale, x.shape, (x.ndim - 2, x.ndim - 1))


def rms_norm_specs(width: int, *, minus_one: bool = False) -> dict[str, ArraySpec]:
    """Specs of ``scale`` [width], initialized with ones.

    Args:
        minus_one: True replaces ``scale`` by ``scale_minus_one`` [width], initialized with zeros (Gemma).
    """
    if minus_one:
        return {"scale_minus_one": ArraySpec((width,), ("norm",), ZEROS)}
    return {"scale": ArraySpec((width,), ("norm",), ONES)}


def rms_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square normalization over the last axis (Zhang and Sennrich 2019, eq. 4), in the dtype of ``x``.

    The result is ``scale * x / sqrt(mean(x**2) + epsilon)``. If the scale has several axes, such as [groups, width],
    then ``x`` must end with the same axes.

    Args:
        params: ``scale``, or ``scale_minus_one`` for the scale ``1 + scale_minus_one`` (:func:`rms_norm_specs`).
    """
    scale = params["scale"] if "scale" in params else 1.0 + params["scale_minus_one"].astype(jnp.float32)
    return _normalize(_rms_norm, epsilon, x, scale)


def _rms_norm(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normalized = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normalized * _broadcast(scale, x)).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=1, prevent_cse=False)
def l2_normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """``x`` divided by its L2 norm over the last axis: ``x / sqrt(sum(x**2) + epsilon)``, in the dtype of ``x``. With
    ``epsilon`` > 0, zeros give zeros."""
    require_arrays(x=x)
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)

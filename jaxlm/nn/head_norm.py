"""Sums and norms over the channels of each head, for arrays whose heads are merged into one axis.

If the width of a head is less than 128, a TPU pads an array with a separate axis of heads. Elementwise operations on
[B, T, D] need no padding. Sums and norms are float32 for every dtype of the input.

Shapes: B batch, T time, H heads, K width of a head, D = H * K channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.norm import standardize
from jaxlm.spec import Params, require_arrays

_AXES = "batch", "seq", "heads"
"""Logical axes of an array [B, T, D]."""


def head_sums(x_BTD: jax.Array, width: int) -> jax.Array:
    """For each channel, the sum over the channels of its head, [B, T, D] float32; ``width`` is K."""
    require_arrays(x_BTD=x_BTD)
    if choices.head_sums_by_matmul():
        return sharding.map_shards(functools.partial(_sums_by_matmul, width), [_AXES], _AXES)(x_BTD)
    B, T, D = x_BTD.shape
    x_BTHK = x_BTD.astype(jnp.float32).reshape(B, T, D // width, width)
    return jnp.broadcast_to(jnp.sum(x_BTHK, axis=-1, keepdims=True), x_BTHK.shape).reshape(B, T, D)


def _sums_by_matmul(width: int, x_BTD: jax.Array) -> jax.Array:
    """The result of :func:`head_sums` on one device: a matmul with a matrix of zeros and ones, and one with its
    transpose."""
    D = x_BTD.shape[-1]
    is_in_head_DH = jnp.arange(D)[:, None] // width == jnp.arange(D // width)[None]
    matrix_DH = is_in_head_DH.astype(jnp.float32)

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        # With a batch axis (A, of size 1), the policy of remat="dots" does not save the result.
        return jnp.einsum("ABTX,AXY->ABTY", x[None], matrix[None], precision=lax.Precision.HIGHEST)[0]

    return product(product(x_BTD.astype(jnp.float32), matrix_DH), matrix_DH.T)


@functools.partial(jax.checkpoint, static_argnums=(1, 2), prevent_cse=False)
def head_l2_normalize(x_BTD: jax.Array, width: int, epsilon: float) -> jax.Array:
    """``jaxlm.nn.norm.l2_normalize`` of each head, [B, T, D] in the dtype of ``x``; ``width`` is K."""
    x32 = x_BTD.astype(jnp.float32)
    return (x32 * lax.rsqrt(head_sums(jnp.square(x32), width) + epsilon)).astype(x_BTD.dtype)


def head_layer_norm(params: Params, x_BTD: jax.Array, epsilon: float) -> jax.Array:
    """``jaxlm.nn.norm.layer_norm`` of each head, [B, T, D] in the dtype of ``x``.

    Args:
        params: ``scale`` and ``bias``, [H, K].
    """
    return _head_layer_norm(x_BTD, params["scale"], params["bias"], epsilon)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _head_layer_norm(x_BTD: jax.Array, scale_HK: jax.Array, bias_HK: jax.Array, epsilon: float) -> jax.Array:
    width = scale_HK.shape[1]
    standardized = standardize(x_BTD, lambda x: head_sums(x, width) / width, epsilon)
    scale, bias = (p.astype(jnp.float32).reshape(1, 1, -1) for p in (scale_HK, bias_HK))
    return (standardized * scale + bias).astype(x_BTD.dtype)

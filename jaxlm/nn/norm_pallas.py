"""A Pallas kernel for TPUs: the normalization of a few rows, as in decoding.

XLA normalizes rows with three operations: one for the sums, one for mean and variance, and one for the result. With few
rows, the start of an operation takes longer than its arithmetic. The kernel is a single operation.

Shapes: B batch, T time, R = B * T rows, W width, G groups that are normalized separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm import sharding
from jaxlm.nn import lazy_pallas
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.lazy_pallas import pl


def run(normalize: Callable[..., jax.Array], x: jax.Array, *params: jax.Array) -> jax.Array:
    """``normalize(x, *params)``, in the shape and dtype of ``x`` [B, T, W] or [B, T, G, W].

    Args:
        normalize: the normalization of rows [R, W] or [R, G, W] over their last axis.
        params: arrays [W] or [G, W].
    """
    group_axes = ("heads",) * (x.ndim - 3)

    def forward(x: jax.Array, *params: jax.Array) -> tuple[jax.Array, Any]:
        def device_norm(x: jax.Array, *params: jax.Array) -> jax.Array:
            rows = x.reshape(-1, *x.shape[2:])

            def kernel(*references: Any) -> None:
                *inputs, out = references
                out[...] = normalize(*(array[...] for array in inputs))

            out = pl.pallas_call(
                kernel, name="norm", interpret=lazy_pallas.INTERPRET,
                out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
            )(rows, *params)  # fmt: skip
            return out.reshape(x.shape)

        axes = [("batch", None, *group_axes, None), *[(*group_axes, None)] * len(params)]
        return sharding.map_shards(device_norm, axes, axes[0])(x, *params), (x, *params)

    def backward(saved: Any, dout: jax.Array) -> Any:
        return jax.vjp(normalize, *saved)[1](dout)

    return custom_vjp.from_rules(forward, backward)(x, *params)

"""A Pallas kernel for TPUs: the normalization of a few rows, as in decoding.

XLA normalizes rows with three operations: one for the sums, one for mean and variance, and one for the result. With few
rows, the start of an operation takes longer than its arithmetic. The kernel is a single operation.

Shapes: B batch, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm import sharding
from jaxlm.nn import lazy_pallas
from jaxlm.nn.lazy_pallas import pl


def run(normalize: Callable[..., jax.Array], x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
    """``normalize(x, *params)``, in the shape and dtype of ``x``. The derivatives are those of ``normalize``.

    Args:
        normalize: the normalization of rows [B, W] over their last axis, with parameters [W] or [1, W].
    """
    axes = [("batch", None, None), *[(None,)] * len(params_W)]

    @jax.custom_jvp
    def norm(x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
        return sharding.map_shards(device_norm, axes, axes[0])(x_B1W, *params_W)

    def device_norm(x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
        rows_BW = x_B1W[:, 0]

        def kernel(*references: Any) -> None:
            *inputs, out = references
            out[...] = normalize(*(array[...] for array in inputs))

        # With ``vmap``, a block of vectors [W] would have no axis of rows, which the TPU compiler rejects.
        params_1W = (parameter[None] for parameter in params_W)
        out_BW = pl.pallas_call(
            kernel, name="norm", interpret=lazy_pallas.INTERPRET,
            out_shape=jax.ShapeDtypeStruct(rows_BW.shape, rows_BW.dtype),
        )(rows_BW, *params_1W)  # fmt: skip
        return out_BW[:, None]

    @norm.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        return jax.jvp(normalize, primals, tangents)

    return norm(x_B1W, *params_W)

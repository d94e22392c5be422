"""A Pallas kernel for TPUs: the normalization of a few rows, as in decoding.

XLA normalizes rows with three operations: the sums, then mean and variance, then the result. With few rows, the start
of an operation takes longer than its arithmetic. The kernel is a single operation.

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
    """``normalize(x, *params)``, computed by the kernel, in the shape and dtype of ``x``.

    For derivatives and under ``vmap``, see ``lazy_pallas.with_reference``; the reference is ``normalize``.

    Args:
        normalize: a normalization over the last axis of ``x``, for ``x`` of shape [B, W] or [B, 1, W].
    """
    axes = [("batch", None, None), *[(None,)] * len(params_W)]

    def device_norm(x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
        rows_BW = x_B1W[:, 0]

        def kernel(*refs: Any) -> None:
            *inputs, out = refs
            out[...] = normalize(*(ref[...] for ref in inputs))

        (out_shape,) = lazy_pallas.shapes(rows_BW)
        run_kernel = pl.pallas_call(kernel, name="norm", interpret=lazy_pallas.INTERPRET, out_shape=out_shape)
        return run_kernel(rows_BW, *params_W)[:, None]

    def norm(*arrays: jax.Array) -> jax.Array:
        return sharding.map_shards(device_norm, axes, axes[0])(*arrays)

    return lazy_pallas.with_reference(norm, normalize)(x_B1W, *params_W)

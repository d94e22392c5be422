"""A Pallas kernel for TPUs: the normalization of a few rows, as in decoding.

XLA normalizes rows with three operations: the sums, then mean and variance, then the result. With few rows, the start
of an operation takes longer than its arithmetic. The kernel is a single operation.

Shapes: B batch, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlm import sharding
from jaxlm.nn import lazy_pallas
from jaxlm.nn.lazy_pallas import pl


def run(normalize: Callable[..., jax.Array], x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
    """``normalize(x, *params)``, computed by the kernel, in the shape and dtype of ``x``.

    Derivatives are those of ``normalize``. Under ``vmap``, ``normalize`` runs instead of the kernel, because the TPU
    compiler would reject the kernel's blocks of mapped parameters.

    Args:
        normalize: a normalization over the last axis of ``x``, for ``x`` of shape [B, W] or [B, 1, W].
    """
    axes = [("batch", None, None), *[(None,)] * len(params_W)]

    def device_norm(x_B1W: jax.Array, *params_W: jax.Array) -> jax.Array:
        rows_BW = x_B1W[:, 0]

        def kernel(*refs: Any) -> None:
            *inputs, out = refs
            out[...] = normalize(*(ref[...] for ref in inputs))

        out_BW = pl.pallas_call(
            kernel, name="norm", interpret=lazy_pallas.INTERPRET,
            out_shape=jax.ShapeDtypeStruct(rows_BW.shape, rows_BW.dtype),
        )(rows_BW, *params_W)  # fmt: skip
        return out_BW[:, None]

    @jax.custom_batching.custom_vmap
    def norm_with_vmap_rule(*arrays: jax.Array) -> jax.Array:
        return sharding.map_shards(device_norm, axes, axes[0])(*arrays)

    @norm_with_vmap_rule.def_vmap
    def vmap_rule(axis_size: int, is_mapped: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        in_axes = tuple(0 if mapped else None for mapped in is_mapped)
        return jax.vmap(normalize, in_axes, axis_size=axis_size)(*arrays), True

    @jax.custom_jvp
    def norm(*arrays: jax.Array) -> jax.Array:
        return norm_with_vmap_rule(*arrays)

    @norm.defjvp
    def jvp_rule(primals: Any, tangents: Any) -> Any:
        return jax.jvp(normalize, primals, tangents)

    return norm(x_B1W, *params_W)

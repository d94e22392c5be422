"""Pallas kernels on a mesh: each device runs the kernel on its own shard.

Kernels have no partitioning rule, so the compiler cannot split them over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding


def unsupported_reason() -> str | None:
    """Why kernels do not support the active mesh, as a part of an error message; None if they support it."""
    active = sharding.active()
    if active is not None and active.num_shards(("seq",)) > 1:
        return "does not split queries over devices: use a mesh without a sequence axis"
    return None


def shard_attention(run: Callable[..., jax.Array], qkv: tuple[Any, Any, Any], floats: Any, integers: Any) -> jax.Array:
    """The result of ``run((q, k, v), floats, integers)``, [B, T, H, V].

    On a mesh, each device computes its shard (``shard_map``). Without a mesh, ``run`` is called directly.

    Args:
        run: computes attention for the rows and heads in its arguments.
        qkv: q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V].
        floats: any tree of arrays [1 or B, 1 or H, ...].
        integers: any tree of arrays [1 or B, ...].
    """
    active = sharding.active()
    if active is None:
        return run(qkv, floats, integers)
    q, k, v = qkv
    if k.shape[2] % active.num_shards(("heads",)):
        # The devices cannot split the key heads evenly, so each query head gets its own copy of its key head.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def partition_spec(x: Any, names: tuple[str | None, ...], what: str) -> Any:
        axes = [None if size == 1 else name for size, name in zip(x.shape, names)]
        return active.named_sharding((*axes, *[None] * (x.ndim - len(axes))), x.shape, what).spec

    qkv_specs = tuple(
        active.named_sharding(("batch", None, "heads", None), x.shape, what).spec
        for what, x in (("queries", q), ("keys", k), ("values", v))
    )
    float_specs = jax.tree.map(lambda x: partition_spec(x, ("batch", "heads"), "an attention bias"), floats)
    integer_specs = jax.tree.map(lambda x: partition_spec(x, ("batch",), "a mask"), integers)
    return jax.shard_map(
        run, mesh=active.mesh, in_specs=(qkv_specs, float_specs, integer_specs), out_specs=qkv_specs[0], check_vma=False
    )((q, k, v), floats, integers)  # fmt: skip

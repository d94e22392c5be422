"""A Pallas kernel for TPUs: the logits of a few rows, as in decoding.

A matmul of few rows takes as long as reading the table. By the TPU compiler's estimate, XLA's matmul reads the table at
about 0.7 of the bandwidth, and the kernel at about 0.97. A grid step computes the logits of all rows for a block of the
vocabulary.

Shapes: B batch, T time, R = B * T rows, D model width, V vocabulary, E block of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot

MAX_BLOCK_BYTES = 2**21
"""Maximum number of bytes of a block of the table, if the block has more than LANES rows. VMEM contains two blocks: the
kernel copies the next block while it reads the current one."""


def logits(table_VD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """``hidden @ table.T``, [B, T, V] float32.

    For derivatives and under ``vmap``, see ``lazy_pallas.with_reference``; the reference is :func:`reference`.
    """
    return lazy_pallas.with_reference(_logits, reference)(table_VD, hidden_BTD)


def _logits(table_VD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    axes = [("vocab", "activation_embed"), ("batch", None, "activation_embed")]
    return sharding.map_shards(_device_logits, axes, ("batch", None, "vocab"))(table_VD, hidden_BTD)


def reference(table_VD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """``hidden @ table.T`` as in :func:`logits`, computed by XLA."""
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)


def _device_logits(table_VD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """The logits of one device: of its rows of ``hidden`` and its rows of the table."""
    (B, T, D), V = hidden_BTD.shape, table_VD.shape[0]
    padded_width = D + -D % LANES
    E = min(max(MAX_BLOCK_BYTES // (padded_width * table_VD.dtype.itemsize) // LANES, 1) * LANES, V)

    def kernel(table: Any, rows: Any, out: Any) -> None:
        out[...] = dot(rows[...], table[...], (1, 1))

    logits_RV = pl.pallas_call(
        kernel, name="unembed", grid=(-(-V // E),), interpret=lazy_pallas.INTERPRET,
        in_specs=[pl.BlockSpec((E, D), lambda i: (i, 0)), pl.BlockSpec((B * T, D), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((B * T, E), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((B * T, V), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(table_VD, hidden_BTD.reshape(B * T, D))  # fmt: skip
    return logits_RV.reshape(B, T, V)

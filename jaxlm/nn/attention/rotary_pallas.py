"""A Pallas kernel for TPUs: the rotation of queries or keys by the angles of their positions.

XLA computes both halves of each head as separate arrays. If a half has fewer than 128 entries, it pads these arrays to
128 entries. Then it joins them. The kernel exchanges the halves in registers. It reads and writes each entry once.

Shapes: B batch, T time, H heads, K head width, P rotated pairs of a head, D = H * K channels, N = B * T rows on a
device, R rows of a block, G channels of a group: K, or 128 if K is smaller.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.lazy_pallas import pl, pltpu

MAX_BLOCK_ENTRIES = 2**19
"""Maximum number of entries of a block [R, D], unless R is ``ROW_MULTIPLE``."""
MAX_BLOCK_ROWS = 512
"""Maximum of R."""
ROW_MULTIPLE = 16
"""The number of rows of a register for bfloat16. R is a multiple of it, or one block has all N rows."""
X_AXES = "batch", "seq", "heads", None
"""The logical axes of the queries or keys."""


def rotate(x_BTHK: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
    """The result of ``jaxlm.nn.attention.rotary.rotate``, computed by the kernel. The kernel has no derivatives."""
    return sharding.map_shards(_rotate, [X_AXES, *[("batch", "seq", None)] * 2], X_AXES)(x_BTHK, cos_BTP, sin_BTP)


def _rotate(x_BTHK: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
    B, T, H, K = x_BTHK.shape
    N, D, P, G = B * T, H * K, cos_BTP.shape[-1], max(K, LANES)
    R = min(N, MAX_BLOCK_ROWS, max(ROW_MULTIPLE, MAX_BLOCK_ENTRIES // D // ROW_MULTIPLE * ROW_MULTIPLE))
    block = pl.BlockSpec((R, pl.cdiv(D, G) * G), lambda n: (n, 0))
    table = pl.BlockSpec((R, G), lambda n: (n, 0))
    run = pl.pallas_call(
        functools.partial(_kernel, K, P), name="rotate", interpret=lazy_pallas.INTERPRET, grid=(pl.cdiv(N, R),),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        in_specs=[block, table, table], out_specs=block, out_shape=jax.ShapeDtypeStruct((N, D), x_BTHK.dtype),
    )  # fmt: skip
    cos_NP, sin_NP = cos_BTP.reshape(N, P), sin_BTP.reshape(N, P)
    rest = jnp.zeros((N, K - 2 * P), jnp.float32)
    factors = [cos_NP, cos_NP, rest + 1.0], [-sin_NP, sin_NP, rest]
    tables = [jnp.tile(jnp.concatenate(parts, axis=-1), G // K) for parts in factors]
    return run(x_BTHK.reshape(N, D), *tables).reshape(x_BTHK.shape)


def _kernel(width: int, pairs: int, x: Any, factors: Any, partner_factors: Any, out: Any) -> None:
    """Write ``x * factors + partner * partner_factors``, where the entries i and i + pairs of a head are partners."""
    factors_RG, partner_factors_RG = factors[...], partner_factors[...]
    G = factors_RG.shape[1]
    entry_RG = lax.broadcasted_iota(jnp.int32, factors_RG.shape, 1) % width
    for start in range(0, x.shape[1], G):
        x_RG = x[:, start : start + G].astype(jnp.float32)
        partner_RG = pltpu.roll(x_RG, pairs, 1)
        if 2 * pairs != G:
            partner_RG = jnp.where(entry_RG < pairs, pltpu.roll(x_RG, G - pairs, 1), partner_RG)
        if 2 * pairs < width:  # entries without a partner
            partner_RG = jnp.where(entry_RG < 2 * pairs, partner_RG, 0.0)
        out[:, start : start + G] = (x_RG * factors_RG + partner_RG * partner_factors_RG).astype(out.dtype)

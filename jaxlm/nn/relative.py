"""What a query and a key add to their score by the distance between them.

    T5 (Raffel et al. 2020, section 2.1):             a number for each head and distance
    Transformer-XL (Dai et al. 2019, section 3.3):    (q + v) . r[distance], a vector for each; XLNet has the same

distance = query position - key position. Both are a table, the rows of which stand for descending distances, and are
given to ``attention`` as a ``Term``: no implementation holds more of it than the tile at which it is.
Shapes: B batch, T query time, S key time, H heads, K head width, N rows of the table, D model; R rows and E columns of
a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn.term import Term, Tile


def sinusoids(distance_R: jax.Array, width: int) -> jax.Array:
    """``[sin | cos]`` (concatenated, not interleaved) of each distance at ``width / 2`` frequencies, [R, D] float32.

    Raises:
        ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"sinusoids come in pairs: width={width} must be even")
    frequency = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = frequency[:, None] * distance_R.astype(jnp.float32)[None, :]
    # Made as it is met (``_floats``): XLA would turn it round again for every layer.
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)]).T


def distance_term(
    table: jax.Array,
    longest: int,
    queries: int,
    keys: int,
    *,
    ahead: int,
    q_BTHK: jax.Array | None = None,
    scale: float = 1.0,
) -> Term:
    """A term of distances between places: query t stands ``ahead + t`` places after key 0, in every row of the batch.

    Args:
        table: [N, H], or [N, H, K] with ``q_BTHK``; row n stands for distance ``longest - n``. Beyond its ends the
            nearest row counts.
        ahead: 0 where queries and keys start together, ``keys - queries`` where they end together.
        q_BTHK: what meets the vectors of the table.
        scale: of the products; numbers are taken as they are.
    """
    # From now on row 1 belongs to the last query and the first key. One row more than pairs have: see ``_aligned``.
    first, rows = longest - (ahead + queries), queries + keys
    low, high = (min(max(row, 0), table.shape[0] - 1) for row in (first, first + rows - 1))
    before, after = (min(max(beyond, 0), rows - 1) for beyond in (low - first, first + rows - 1 - high))
    floats = _floats(table, q_BTHK)
    wanted = floats["table"][..., low : high + 1]
    floats["table"] = jnp.pad(wanted, (*[(0, 0)] * (wanted.ndim - 1), (before, after)), mode="edge")
    return Term(_Places(queries, scale), floats)


def distance_term_of_positions(
    table: jax.Array,
    longest: int,
    query_BT: jax.Array,
    key_BS: jax.Array,
    *,
    q_BTHK: jax.Array | None = None,
    scale: float = 1.0,
) -> Term:
    """:func:`distance_term` for any positions, [1 or B, T] and [1 or B, S] integers: it picks, where places shift."""
    return Term(_Positions(longest, scale), _floats(table, q_BTHK), {"query": query_BT, "key": key_BS})


def type_term(
    q_BTHK: jax.Array, table_2HK: jax.Array, query_types_BT: jax.Array, key_types_BS: jax.Array, *, scale: float
) -> Term:
    """``scale * q . table[types differ]`` (XLNet; Yang et al. 2019, section 2.5): row 0 for equal token types."""
    pair_BHT2 = scale * jnp.einsum("BTHK,IHK->BHTI", q_BTHK, table_2HK, preferred_element_type=jnp.float32)
    return Term(_Types(), {"pair": pair_BHT2}, {"query": query_types_BT, "key": key_types_BS})


def _floats(table: jax.Array, q_BTHK: jax.Array | None) -> dict[str, jax.Array]:
    """Distances last: the product with a query and its gradient are then matmuls as a CPU likes them."""
    if q_BTHK is None:
        return {"table": jnp.moveaxis(table.astype(jnp.float32), 0, -1)[None]}
    return {"table": jnp.moveaxis(table.astype(q_BTHK.dtype), 0, -1)[None], "query": jnp.moveaxis(q_BTHK, 2, 1)}


@dataclasses.dataclass(frozen=True)
class _Places:
    """Row ``shift - t + s`` of the table for query t and key s."""

    shift: int
    scale: float

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        first = self.shift - tile.row - tile.rows + tile.column
        return {"table": (first, tile.rows + tile.columns, -1), "query": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        strip = parts["table"]
        if "query" in parts:
            return _aligned(_product(parts["query"], strip, self.scale))
        return _aligned(jnp.broadcast_to(strip[None, :], (tile.rows, len(strip))))


def _aligned(x_RP: jax.Array) -> jax.Array:
    """Entry (i, R - i + j) of x [R, R + E] at (i, j), [R, E]: diagonals become columns."""
    R, P = x_RP.shape
    if sharding.platform() == "cpu":  # whose gradient of the other form takes three times as long
        flat, width = x_RP.reshape(R * P), P - R
        return jax.vmap(lambda i: lax.dynamic_slice(flat, (i * (P - 1) + R,), (width,)))(jnp.arange(R))
    # Reading rows of P as rows of P - 1 shifts each against the one before (Dai et al. 2019, appendix B). From R on and
    # not from R - 1, where whole vectors begin.
    return x_RP.reshape(R * P)[R:].reshape(R, P - 1)[:, : P - R]


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Row ``longest - distance`` of the table, or the nearest."""

    longest: int
    scale: float

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"query": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        query_R, key_E = tile.of_queries(integers["query"]), tile.of_keys(integers["key"])
        table = parts["table"]
        row_RE = jnp.clip(self.longest - (query_R[:, None] - key_E[None, :]), 0, table.shape[-1] - 1)
        if "query" not in parts:
            return table.at[row_RE].get(mode="promise_in_bounds")
        return jnp.take_along_axis(
            _product(parts["query"], table, self.scale), row_RE, axis=1, mode="promise_in_bounds"
        )


@dataclasses.dataclass(frozen=True)
class _Types:
    """One of two numbers of the query."""

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"pair": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        same = tile.of_queries(integers["query"])[:, None] == tile.of_keys(integers["key"])[None, :]
        return jnp.where(same, parts["pair"][:, :1], parts["pair"][:, 1:])


def _product(q_RK: jax.Array, table_KN: jax.Array, scale: float) -> jax.Array:
    return jnp.dot(q_RK, table_KN, preferred_element_type=jnp.float32) * scale

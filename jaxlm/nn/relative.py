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

from jaxlm.devices import LANES
from jaxlm.nn.term import Form, Term, Tile


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
    # From now on row 1 belongs to the last query and the first key: one row more than pairs have (``Tile.diagonals``).
    first, rows = longest - (ahead + queries), queries + keys
    low, high = (min(max(row, 0), table.shape[0] - 1) for row in (first, first + rows - 1))
    before, after = (min(max(beyond, 0), rows - 1) for beyond in (low - first, first + rows - 1 - high))
    floats = _floats(table, q_BTHK)
    wanted = floats["table"][..., low : high + 1]
    floats["table"] = jnp.pad(wanted, (*[(0, 0)] * (wanted.ndim - 1), (before, after)), mode="edge")
    return Term(_Places(queries, scale), floats)


def distance_term_of_queries(
    table: jax.Array, longest: int, query_BT: jax.Array, keys: int, *, q_BTHK: jax.Array, scale: float = 1.0
) -> Term:
    """:func:`distance_term` for queries that stand anywhere, before keys that stand at their places.

    The table must have a row for every pair: ``longest`` at least the last query, and ``longest - N`` below the first
    query minus the last key. Without these rows the term is undefined.

    Args:
        query_BT: [1 or B, T] integers, how many places after key 0 each query stands.
        keys: how many keys there are.

    Raises:
        ValueError: a table that is too short for any query.
    """
    if table.shape[0] < keys:
        raise ValueError(f"a table of {table.shape[0]} distances has none for each of {keys} keys: make it longer")
    return Term(_Queries(longest, keys, scale), _floats(table, q_BTHK), {"query": query_BT})


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
        return {"table": jnp.moveaxis(table.astype(jnp.float32)[..., None], 0, -1)[None]}
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
        return tile.diagonals(parts["table"], parts.get("query"), self.scale)

    def extended(self, floats: Mapping[str, jax.Array], queries: int, keys: int) -> tuple[Form, dict[str, jax.Array]]:
        longer = {"table": _longer(floats["table"], queries, keys, axis=-1)}
        if "query" in floats:
            longer["query"] = _longer(floats["query"], 0, queries, axis=-2)
        return dataclasses.replace(self, shift=self.shift + queries), longer


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Row ``longest - query position + s`` of the table for key s."""

    longest: int
    keys: int
    scale: float

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"query": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        product_RN = tile.product(parts["query"], parts["table"], self.scale)
        return tile.shifted(product_RN, self.longest - tile.queries(integers["query"]))

    def extended(self, floats: Mapping[str, jax.Array], queries: int, keys: int) -> tuple[Form, dict[str, jax.Array]]:
        table, query = floats["table"], _longer(floats["query"], 0, queries, axis=-2)
        rows = max(table.shape[-1], self.keys + keys)
        return self, {"table": _longer(table, 0, rows + -rows % LANES - table.shape[-1], axis=-1), "query": query}


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Row ``longest - distance`` of the table, or the nearest."""

    longest: int
    scale: float

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"query": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        query_R1, key_1E = tile.queries(integers["query"]), tile.keys(integers["key"])
        table = parts["table"]
        row_RE = jnp.clip(self.longest - (query_R1 - key_1E), 0, table.shape[-1] - 1)
        if "query" not in parts:
            return table[0].at[row_RE].get(mode="promise_in_bounds")
        product_RN = tile.product(parts["query"], table, self.scale)
        return jnp.take_along_axis(product_RN, row_RE, axis=1, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class _Types:
    """One of two numbers of the query."""

    def windows(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"pair": (tile.row, tile.rows, 0)}

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        query_R1, key_1E = tile.queries(integers["query"]), tile.keys(integers["key"])
        return jnp.where(query_R1 == key_1E, parts["pair"][:, :1], parts["pair"][:, 1:])

    def extended(self, floats: Mapping[str, jax.Array], queries: int, keys: int) -> tuple[Form, dict[str, jax.Array]]:
        return self, {"pair": _longer(floats["pair"], 0, queries, axis=-2)}


def _longer(x: jax.Array, before: int, after: int, *, axis: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return jnp.pad(x, pads)

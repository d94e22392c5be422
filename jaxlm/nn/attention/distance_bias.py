"""Attention biases that depend on the distance between query and key, or on XLNet's token types (:func:`type_bias`).

    T5 (Raffel et al. 2020, section 2.1):             one number per head and distance
    Transformer-XL (Dai et al. 2019, section 3.3):    (q + v) . r[distance], with a learned vector v for each head, and
                                                      a vector r for each head and distance; XLNet uses the same

The distance is ``query position - key position``. The numbers or vectors are the rows of a table, sorted by descending
distance. All public functions except :func:`sinusoids` return an ``AttentionBias`` (``jaxlm.nn.attention.bias``).

Shapes: B batch, T query time, S key time, H heads, K head width, N rows of the table, D model width, R rows and E
columns of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.devices import LANES
from jaxlm.nn import choices
from jaxlm.nn.attention.bias import AttentionBias, BiasFn, Tile
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.sharding import row_sharding


def sinusoids(distance_N: jax.Array, width: int) -> jax.Array:
    """``[sin | cos]`` (concatenated, not interleaved) of each distance at ``width / 2`` frequencies, [N, D] float32.

    Raises:
        ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"sinusoids come in pairs: width={width} must be even")
    frequency = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = frequency[:, None] * distance_N.astype(jnp.float32)[None, :]
    # The sines and cosines are computed as [D, N] and then transposed, because the matmuls with this table need N as
    # the last axis in memory. If the table were computed as [N, D], XLA would transpose it in every layer.
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)]).T


def distance_bias(
    table: jax.Array,
    max_distance: int,
    queries: int,
    keys: int,
    *,
    query_offset: int,
    q_BTHK: jax.Array | None = None,
    scale: float = 1.0,
) -> AttentionBias:
    """The bias for consecutive positions: query t has position ``query_offset + t``, and key s has position s.

    Args:
        table: numbers [N, 1 or H] if ``q_BTHK`` is None, otherwise vectors [N, 1 or H, K]. Row n is for distance
            ``max_distance - n``. For distances outside the table, the nearest row is used.
        max_distance: the distance of row 0.
        queries, keys: T and S.
        query_offset: position of query 0 relative to key 0, the same for the whole batch: 0 if queries and keys start
            at the same position, ``keys - queries`` if they end at the same position.
        q_BTHK: the vectors that are multiplied with the vectors of the table: q + v in the module docstring.
        scale: factor of these products; not used if ``q_BTHK`` is None.
    """
    # The bias stores T + S rows of ``table``. The first of these rows is not used for any score, but
    # ``Tile.shifted_product`` needs it. The second row is for the largest distance, from the last query to the first
    # key. Rows outside ``table`` are copies of its first or last row.
    first_row, num_rows = max_distance - (query_offset + queries), queries + keys
    last_row = first_row + num_rows - 1
    low, high = (min(max(row, 0), table.shape[0] - 1) for row in (first_row, last_row))
    before, after = (min(max(missing, 0), num_rows - 1) for missing in (low - first_row, last_row - high))
    floats = _table_arrays(table, q_BTHK)
    used_rows = floats["table"][..., low : high + 1]
    floats["table"] = jnp.pad(used_rows, (*[(0, 0)] * (used_rows.ndim - 1), (before, after)), mode="edge")
    return AttentionBias(_ByDistance(queries, scale), floats)


def distance_bias_at_query_positions(
    table: jax.Array, max_distance: int, query_BT: jax.Array, keys: int, *, q_BTHK: jax.Array, scale: float = 1.0
) -> AttentionBias:
    """The bias as in :func:`distance_bias`, for any positions of queries. The position of a key is its index.

    The table must have a row for every distance that occurs: ``max_distance - N < query position - key index <=
    max_distance`` for all queries and keys. Otherwise the bias is undefined.

    Args:
        query_BT: [1 or B, T] integers, the position of each query relative to key 0.
        keys: S, the number of keys.

    Raises:
        ValueError: the table has fewer rows than there are keys.
    """
    if table.shape[0] < keys:
        raise ValueError(
            f"a table of {table.shape[0]} distances is too short for {keys} keys: it needs at least {keys} rows"
        )
    query_BT = query_BT.astype(jnp.int32)  # differences of smaller integers would wrap
    return AttentionBias(_ByQueryPosition(max_distance, keys, scale), _table_arrays(table, q_BTHK), {"query": query_BT})


def distance_bias_at_positions(
    table: jax.Array,
    max_distance: int,
    query_BT: jax.Array,
    key_BS: jax.Array,
    *,
    q_BTHK: jax.Array | None = None,
    scale: float = 1.0,
) -> AttentionBias:
    """The bias as in :func:`distance_bias`, for any integer positions of queries [1 or B, T] and keys [1 or B, S].

    This bias gathers single entries, so it is slower than :func:`distance_bias`, which shifts whole rows.
    """
    return AttentionBias(
        _ByPositions(max_distance, scale),
        _table_arrays(table, q_BTHK),
        {"query": query_BT.astype(jnp.int32), "key": key_BS.astype(jnp.int32)},  # unsigned differences would wrap
    )


def type_bias(
    q_BTHK: jax.Array, table_2HK: jax.Array, query_types_BT: jax.Array, key_types_BS: jax.Array, *, scale: float
) -> AttentionBias:
    """The bias ``scale * q . table[0 if the token types are equal else 1]`` (XLNet; Yang et al. 2019, section 2.5)."""
    if choices.merge_head_axes():
        # One matmul with a block-diagonal matrix [H * K, H * 2], one block per head, computes the products of all
        # heads. By the TPU compiler's estimate, it takes 0.23 M cycles instead of 0.79 M, gradients included (32 x 512
        # tokens, 12 heads of width 64).
        B, T, H, K = q_BTHK.shape
        blocks = jnp.einsum("IHK,HG->HKGI", table_2HK, jnp.eye(H, dtype=table_2HK.dtype)).reshape(H * K, H * 2)
        products = jnp.dot(q_BTHK.reshape(B, T, H * K), blocks, preferred_element_type=jnp.float32)
        products_BHT2 = jnp.swapaxes(products.reshape(B, T, H, 2), 1, 2)
    else:
        products_BHT2 = jnp.einsum("BTHK,IHK->BHTI", q_BTHK, table_2HK, preferred_element_type=jnp.float32)
    biases_BHT2 = scale * products_BHT2
    return AttentionBias(_ByTokenTypes(), {"biases": biases_BHT2}, {"query": query_types_BT, "key": key_types_BS})


def _table_arrays(table: jax.Array, q_BTHK: jax.Array | None) -> dict[str, jax.Array]:
    """The float arrays of a bias, by name: ``table`` [1, 1 or H, 1 or K, N] and, with queries, ``query`` [B, H, T, K].

    Distances are the last axis of the table, because its matmul with the queries is then fast on a CPU.
    """
    if q_BTHK is None:
        return {"table": jnp.moveaxis(table.astype(jnp.float32)[..., None], 0, -1)[None]}
    return {"table": jnp.moveaxis(table.astype(q_BTHK.dtype), 0, -1)[None], "query": jnp.moveaxis(q_BTHK, 2, 1)}


@dataclasses.dataclass(frozen=True)
class _ByDistance:
    """Bias function that uses entry ``offset - t + s`` of the last axis of ``table`` for query t and key s.

    ``table`` is padded in :func:`distance_bias`.
    """

    offset: int
    scale: float

    def required_slices(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        first = self.offset - tile.row - tile.rows + tile.column
        return {"table": (first, tile.rows + tile.columns, -1), "query": (tile.row, tile.rows, 0)}

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        return tile.shifted_product(arrays["table"], arrays.get("query"), self.scale)

    def padded(
        self, floats: Mapping[str, jax.Array], query_padding: int, key_padding: int
    ) -> tuple[BiasFn, dict[str, jax.Array]]:
        padded_floats = {"table": pad_axis(floats["table"], query_padding, key_padding, axis=-1)}
        if "query" in floats:
            padded_floats["query"] = pad_axis(floats["query"], 0, query_padding, axis=-2)
        return dataclasses.replace(self, offset=self.offset + query_padding), padded_floats


@dataclasses.dataclass(frozen=True)
class _ByQueryPosition:
    """Bias function that uses entry ``max_distance - query position + s`` of the last axis of ``table`` for key s."""

    max_distance: int
    keys: int
    scale: float

    def required_slices(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"query": (tile.row, tile.rows, 0)}

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        product_RN = tile.product(arrays["query"], arrays["table"], self.scale)
        return tile.gather_shifted(product_RN, self.max_distance - tile.query_column(integers["query"]))

    def padded(
        self, floats: Mapping[str, jax.Array], query_padding: int, key_padding: int
    ) -> tuple[BiasFn, dict[str, jax.Array]]:
        table, query = floats["table"], pad_axis(floats["query"], 0, query_padding, axis=-2)
        rows = max(table.shape[-1], self.keys + key_padding)
        return self, {"table": pad_axis(table, 0, rows + -rows % LANES - table.shape[-1], axis=-1), "query": query}


@dataclasses.dataclass(frozen=True)
class _ByPositions:
    """Bias function that uses entry ``max_distance - distance`` of the last axis of ``table``, or the nearest entry."""

    max_distance: int
    scale: float

    def required_slices(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"query": (tile.row, tile.rows, 0)}

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        query_R1, key_1E = tile.query_column(integers["query"]), tile.key_row(integers["key"])
        table = arrays["table"]
        row_RE = jnp.clip(self.max_distance - (query_R1 - key_1E), 0, table.shape[-1] - 1)
        if "query" not in arrays:
            return table[0].at[row_RE].get(mode="promise_in_bounds", out_sharding=row_sharding(row_RE))
        product_RN = tile.product(arrays["query"], table, self.scale)
        return jnp.take_along_axis(product_RN, row_RE, axis=1, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class _ByTokenTypes:
    """Bias function with two biases per query: one for keys of the same token type, one for keys of another type."""

    def required_slices(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"biases": (tile.row, tile.rows, 0)}

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        query_R1, key_1E = tile.query_column(integers["query"]), tile.key_row(integers["key"])
        biases_R2 = arrays["biases"]
        return jnp.where(query_R1 == key_1E, biases_R2[:, :1], biases_R2[:, 1:])

    def padded(
        self, floats: Mapping[str, jax.Array], query_padding: int, key_padding: int
    ) -> tuple[BiasFn, dict[str, jax.Array]]:
        return self, {name: pad_axis(x, 0, query_padding, axis=-2) for name, x in floats.items()}

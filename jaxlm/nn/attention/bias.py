"""Attention biases (position biases, relative encodings) that are computed tile by tile.

An :class:`AttentionBias` consists of arrays and of a function of these arrays, its ``bias_fn``. An implementation of
attention calls the function for one tile of the scores at a time, and also computes the gradients of the arrays tile by
tile. So a bias needs no array [H, T, S]. The implementations ``reference`` and ``decode`` are exceptions: they compute
the whole array (:func:`dense_bias`). ``pallas`` also does so for a bias that all rows of the batch share, if the input
is short. The ``bias_fn`` declares which slices of the float arrays a tile needs (``required_slices``) and gets these
slices. A float array without a declared slice is passed whole. The ``bias_fn`` reads integer arrays with
``Tile.query_column`` and ``Tile.key_row``.

Shapes: B batch, T query time, S key time, H heads, K head width, R rows of a tile, E columns of a tile, N columns of
a table, P = R + E columns of a strip (the columns that a tile needs from a table with one column per distance).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxlm.nn import choices


class Tile(NamedTuple):
    """A tile of the scores: queries [row, row + rows) and keys [column, column + columns).

    ``row`` and ``column`` may be traced. TPU kernels pass a subclass (``pallas_tile.VmemTile``) that implements
    ``query_column``, ``key_row``, ``product``, ``shifted_product`` and ``gather_shifted`` with operations of a kernel.
    So a :class:`KernelBiasFn` must use only these methods to read integer arrays, to multiply and to gather.
    """

    row: Any
    rows: int
    column: Any
    columns: int

    def slice_queries(self, x_T: jax.Array) -> jax.Array:
        """The entries of ``x`` for the queries of the tile, [R, ...]."""
        return lax.dynamic_slice_in_dim(x_T, self.row, self.rows)

    def slice_keys(self, x_S: jax.Array) -> jax.Array:
        """The entries of ``x`` for the keys of the tile, [E, ...]."""
        return lax.dynamic_slice_in_dim(x_S, self.column, self.columns)

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """The indices of the queries, [R, 1], and of the keys, [1, E]."""
        rows, columns = (jnp.arange(size, dtype=jnp.int32) for size in (self.rows, self.columns))
        return (self.row + rows)[:, None], (self.column + columns)[None, :]

    def query_column(self, x_T: jax.Array) -> jax.Array:
        """An integer array with one entry per query, sliced to the tile, as a column [R, 1]."""
        return self.slice_queries(x_T)[:, None]

    def key_row(self, x_S: jax.Array) -> jax.Array:
        """An integer array with one entry per key, sliced to the tile, as a row [1, E]."""
        return self.slice_keys(x_S)[None, :]

    def shifted_product(self, strip_KP: jax.Array, q_RK: jax.Array | None, scale: float) -> jax.Array:
        """The array [R, E] float32 whose entry (i, j) is entry (i, R - i + j) of the product ``scale * q @ strip``.

        The product is [R, R + E]. Row i of the product is shifted to the left by R - i entries, and its first E entries
        remain. ``strip`` [K, R + E] has the columns that the tile needs from a table with one column per distance. If
        ``q_RK`` is None, the strip has one row [1, R + E], which replaces every row of the product, without ``scale``.
        """
        if q_RK is None:
            return _diagonals_to_columns(jnp.broadcast_to(strip_KP, (self.rows, strip_KP.shape[1])))
        return _diagonals_to_columns(self.product(q_RK, strip_KP, scale))

    def product(self, q_RK: jax.Array, table_KN: jax.Array, scale: float) -> jax.Array:
        """``scale * q @ table``, [R, N] float32."""
        return jnp.dot(q_RK, table_KN, preferred_element_type=jnp.float32) * scale

    def gather_shifted(self, x_RN: jax.Array, first_R1: jax.Array) -> jax.Array:
        """The array [R, E] whose entry in row i and in the column of key s is ``x[i, first[i] + s]``.

        The row index i starts at the first query of the tile. The key index s starts at the first of all S keys. Each
        ``first[i] + s`` must be a column of ``x``.
        """
        index_RE = first_R1 + self.indices()[1]
        return jnp.take_along_axis(x_RN, index_RE, axis=1, mode="clip")


def _diagonals_to_columns(x_RP: jax.Array) -> jax.Array:
    """An array [R, E] whose entry (i, j) is entry (i, R - i + j) of ``x`` [R, R + E]."""
    R, P = x_RP.shape
    if not choices.shift_rows_by_reshape():
        flat, width = x_RP.reshape(R * P), P - R
        return jax.vmap(lambda i: lax.dynamic_slice(flat, (i * (P - 1) + R,), (width,)))(jnp.arange(R))
    # A reshape from rows of P to rows of P - 1 entries shifts each row by one entry relative to the row before (Dai et
    # al. 2019, appendix B). A tile has R + E - 1 distances. Column 0 of ``x`` is additional and not used. With it, the
    # slice starts at entry R; without it, the slice would start at entry R - 1. R is usually a multiple of the vector
    # width, so the start of the slice is aligned.
    return x_RP.reshape(R * P)[R:].reshape(R, P - 1)[:, : P - R]


class BiasFn(Protocol):
    """A function from arrays to the bias of a tile. It must be hashable, because it is a key of JAX's compile cache."""

    def required_slices(self, tile: Tile) -> Mapping[str, tuple[Any, int, int]]:
        """``{name: (start, size, axis)}``: the slices that the tile needs. Arrays without an entry are not sliced."""

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        """The bias that is added to the scaled scores of the tile, [R, E] float32.

        Args:
            arrays: the slices (:meth:`required_slices`) of the float arrays of one row of the batch and one head.
            integers: ``AttentionBias.integers`` of this row.
        """


@runtime_checkable
class KernelBiasFn(BiasFn, Protocol):
    """A bias function that the ``pallas`` kernels support: it gathers only with ``Tile.gather_shifted``."""

    def padded(
        self, floats: Mapping[str, jax.Array], query_padding: int, key_padding: int
    ) -> tuple[BiasFn, dict[str, jax.Array]]:
        """The bias function and the arrays for an input that is padded at the end by ``query_padding`` queries and
        ``key_padding`` keys.

        The bias of the padding may have any finite value.
        """


@struct.dataclass
class AttentionBias:
    """An attention bias: it is added to the scaled scores.

    Attributes:
        bias_fn: computes the bias of a tile. It gets the arrays of one row of the batch and one head, without these two
            axes.
        floats: the differentiable arrays by name, each [1 or B, 1 or H, ...].
        integers: a dict of integer arrays, such as positions: ``query`` [1 or B, T], ``key`` [1 or B, S], or both.
            None: the function needs no integer arrays.
    """

    bias_fn: BiasFn = struct.field(pytree_node=False)
    floats: dict[str, Any]
    integers: Any = None


def slice_for_tile(bias_fn: BiasFn, floats: Mapping[str, jax.Array], tile: Tile) -> dict[str, jax.Array]:
    """The slices of ``floats``, the arrays of one row and one head, that the tile needs (``required_slices``)."""
    slices = bias_fn.required_slices(tile)
    return {name: lax.dynamic_slice_in_dim(x, *slices[name]) if name in slices else x for name, x in floats.items()}


def add_tile_gradients(
    bias_fn: BiasFn, total: Mapping[str, jax.Array], added: Mapping[str, jax.Array], tile: Tile
) -> dict[str, jax.Array]:
    """The gradients ``total`` of the arrays, plus the gradients ``added`` of the slices of one tile.

    The sums have the dtypes of ``total``.
    """
    slices = bias_fn.required_slices(tile)

    def new_total(name: str) -> jax.Array:
        new = added[name].astype(total[name].dtype)
        if name not in slices:
            return total[name] + new
        start, size, axis = slices[name]
        sums = lax.dynamic_slice_in_dim(total[name], start, size, axis) + new
        return lax.dynamic_update_slice_in_dim(total[name], sums, start, axis)

    return {name: new_total(name) for name in total}


@dataclasses.dataclass(frozen=True)
class Dense:
    """Bias function with one number for each query and key: its array ``bias`` is [1 or B, 1 or H, T, S]."""

    def required_slices(self, tile: Tile) -> dict[str, tuple[Any, int, int]]:
        return {"bias": (tile.row, tile.rows, 0)}

    def __call__(self, arrays: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        bias = arrays["bias"]
        # ``pallas`` passes only the columns of the tile. Other implementations pass all columns.
        if bias.shape[1] != tile.columns:
            bias = lax.dynamic_slice_in_dim(bias, tile.column, tile.columns, 1)
        return bias.astype(jnp.float32)

    def padded(
        self, floats: Mapping[str, jax.Array], query_padding: int, key_padding: int
    ) -> tuple[BiasFn, dict[str, jax.Array]]:
        return self, {"bias": jnp.pad(floats["bias"], ((0, 0), (0, 0), (0, query_padding), (0, key_padding)))}


def check_bias_shapes(bias: AttentionBias, batch: int, heads: int) -> None:
    """Check that the arrays of a bias match the batch and the heads of the queries.

    Raises:
        ValueError: the first axis of an array is neither 1 nor the batch size, or the second axis of a float array is
            neither 1 nor the number of heads.
    """
    for x in jax.tree.leaves(bias.floats):
        if x.ndim < 2 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(f"an array {x.shape} of an attention bias must be [1 or {batch}, 1 or {heads}, ...]")
    for x in jax.tree.leaves(bias.integers):
        if x.ndim < 1 or x.shape[0] not in (1, batch):
            raise ValueError(f"an integer array {x.shape} of an attention bias must be [1 or {batch}, ...]")


def dense_bias(bias: AttentionBias, queries: int, keys: int) -> jax.Array:
    """The bias as one dense array, [1 or B, 1 or H, T, S] float32; see the module docstring."""
    tile = Tile(0, queries, 0, keys)
    # The first axis of each array has size 1 or the batch size. If an array has the batch size, the product of the
    # distinct sizes is the batch size, otherwise 1. (A maximum would be wrong for an empty batch.)
    B = math.prod({x.shape[0] for x in jax.tree.leaves((bias.floats, bias.integers))})
    H = max((x.shape[1] for x in jax.tree.leaves(bias.floats)), default=1)

    # Axes of size 1 are removed instead of mapped over, so that a bias that all heads or rows share is computed only
    # once.
    def head_bias(floats: Any, integers: Any) -> jax.Array:
        return bias.bias_fn(slice_for_tile(bias.bias_fn, floats, tile), integers, tile)

    row_bias = head_bias if H == 1 else jax.vmap(head_bias, in_axes=(vmap_axes(bias.floats, 1), None))
    arrays = bias.floats, bias.integers
    batch_bias = row_bias if B == 1 else jax.vmap(row_bias, in_axes=vmap_axes(arrays, 0))
    out = batch_bias(drop_unit_axes(bias.floats), drop_unit_axes(bias.integers, 1))
    return out.reshape(B, H, queries, keys)


def as_dense(bias: AttentionBias, queries: int, keys: int) -> AttentionBias:
    """The bias with its values as one dense array."""
    if isinstance(bias.bias_fn, Dense):
        return bias
    return AttentionBias(Dense(), {"bias": dense_bias(bias, queries, keys)})


def dense_if_shared_by_layers(bias: AttentionBias, queries: int, keys: int) -> AttentionBias:
    """A bias that several layers share, as one dense array if ``jaxlm.nn.choices.dense_shared_bias`` is True.

    Otherwise, the bias is returned unchanged.
    """
    return as_dense(bias, queries, keys) if choices.dense_shared_bias(queries, keys) else bias


def drop_unit_axes(tree: Any, num_axes: int = 2) -> Any:
    """Each array without the axes of size 1 among its first ``num_axes`` axes."""
    return jax.tree.map(lambda x: x[tuple(0 if size == 1 else slice(None) for size in x.shape[:num_axes])], tree)


def vmap_axes(tree: Any, axis: int) -> Any:
    """``in_axes`` of a ``jax.vmap`` over ``axis``: None for arrays of size 1 on this axis, 0 for other arrays.

    The entry 0 is also correct for ``axis`` 1: axis 0 of the array has then been removed by :func:`drop_unit_axes` or
    by an outer ``vmap``, so axis 1 has become axis 0.

    Args:
        tree: the arrays before :func:`drop_unit_axes` removes their axes of size 1.
    """
    return jax.tree.map(lambda x: None if x.shape[axis] == 1 else 0, tree)

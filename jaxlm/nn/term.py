"""What position biases and relative encodings add to attention scores, made tile by tile and never as one array.

A term is a form, which is a function of arrays, and these arrays. An implementation of attention calls the form for the
tiles of the scores that it is at, and its gradient for the same tiles, so that a term costs no [H, T, S] array; and it
hands the form no more of the arrays than the tile needs, so that a tile costs no pass over all of them.
Shapes: B batch, T query time, S key time, H heads, R rows of a tile, E columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxlm import sharding


class Tile(NamedTuple):
    """Queries ``row`` .. ``row + rows`` and keys ``column`` .. ``column + columns``; the first may be traced.

    What a form does with its arrays, it does by these methods, where there are some: a kernel has its own.
    """

    row: Any
    rows: int
    column: Any
    columns: int

    def of_queries(self, x_T: jax.Array) -> jax.Array:
        """The rows of the tile, [R, ...]."""
        return lax.dynamic_slice_in_dim(x_T, self.row, self.rows)

    def of_keys(self, x_S: jax.Array) -> jax.Array:
        """The columns of the tile, [E, ...]."""
        return lax.dynamic_slice_in_dim(x_S, self.column, self.columns)

    def places(self) -> tuple[jax.Array, jax.Array]:
        """The numbers of the queries, [R, 1], and of the keys, [1, E]."""
        rows, columns = (jnp.arange(size, dtype=jnp.int32) for size in (self.rows, self.columns))
        return (self.row + rows)[:, None], (self.column + columns)[None, :]

    def queries(self, x_T: jax.Array) -> jax.Array:
        """Integers of the queries as a column, [R, 1]."""
        return self.of_queries(x_T)[:, None]

    def keys(self, x_S: jax.Array) -> jax.Array:
        """Integers of the keys as a row, [1, E]."""
        return self.of_keys(x_S)[None, :]

    def diagonals(self, strip_KP: jax.Array, q_RK: jax.Array | None, scale: float) -> jax.Array:
        """Entry (i, R - i + j) of ``scale * q @ strip`` at (i, j), [R, E] float32: diagonals become columns.

        Without queries, the strip is one row [1, P] that all of them have in common, and is not scaled.
        """
        if q_RK is None:
            return _aligned(jnp.broadcast_to(strip_KP, (self.rows, strip_KP.shape[1])))
        return _aligned(self.product(q_RK, strip_KP, scale))

    def product(self, q_RK: jax.Array, table_KN: jax.Array, scale: float) -> jax.Array:
        """``scale * q @ table`` in float32, [R, N]."""
        return jnp.dot(q_RK, table_KN, preferred_element_type=jnp.float32) * scale

    def shifted(self, x_RN: jax.Array, first_R1: jax.Array) -> jax.Array:
        """Entry (i, first[i] + s) of x for query i of the tile and key s, [R, E]; all of these must be in x."""
        index_RE = first_R1 + self.places()[1]
        return jnp.take_along_axis(x_RN, index_RE, axis=1, mode="clip")


def _aligned(x_RP: jax.Array) -> jax.Array:
    """Entry (i, R - i + j) of x [R, R + E] at (i, j), [R, E]."""
    R, P = x_RP.shape
    if sharding.platform() == "cpu":  # whose gradient of the other form takes three times as long
        flat, width = x_RP.reshape(R * P), P - R
        return jax.vmap(lambda i: lax.dynamic_slice(flat, (i * (P - 1) + R,), (width,)))(jnp.arange(R))
    # Reading rows of P as rows of P - 1 shifts each against the one before (Dai et al. 2019, appendix B). From R on and
    # not from R - 1, where whole vectors begin.
    return x_RP.reshape(R * P)[R:].reshape(R, P - 1)[:, : P - R]


class Form(Protocol):
    """How arrays become scores. Hashable, for compiled code is kept by it."""

    def windows(self, tile: Tile) -> Mapping[str, tuple[Any, int, int]]:
        """First place, size and axis of what a tile needs of an array; those that are not named it needs whole."""

    def __call__(self, parts: Mapping[str, jax.Array], integers: Any, tile: Tile) -> jax.Array:
        """What is added to the scaled scores of the tile, [R, E] float32."""


@runtime_checkable
class Extendable(Form, Protocol):
    """A form that kernels of accelerators can work out: it picks no entries one by one."""

    def extended(self, floats: Mapping[str, jax.Array], queries: int, keys: int) -> tuple[Form, dict[str, jax.Array]]:
        """The same with so many more queries and keys at the end, whatever it gives for them."""


@struct.dataclass
class Term:
    """What is added to the scaled scores.

    Attributes:
        form: see there. It meets the arrays of one row of the batch and one head, without these axes.
        floats: arrays [1 or B, 1 or H, ...] by name, which have gradients.
        integers: None, or arrays by name: ``query`` [1 or B, T] and ``key`` [1 or B, S].
    """

    form: Form = struct.field(pytree_node=False)
    floats: dict[str, Any]
    integers: Any = None


def parts(form: Form, floats: Mapping[str, jax.Array], tile: Tile) -> dict[str, jax.Array]:
    """What the tile needs of the arrays of one row and head."""
    windows = form.windows(tile)
    return {name: lax.dynamic_slice_in_dim(x, *windows[name]) if name in windows else x for name, x in floats.items()}


def add_parts(
    form: Form, total: Mapping[str, jax.Array], added: Mapping[str, jax.Array], tile: Tile
) -> dict[str, jax.Array]:
    """``total`` with ``added`` in the places of :func:`parts`: how gradients add up."""
    windows = form.windows(tile)

    def sum_of(name: str) -> jax.Array:
        if name not in windows:
            return total[name] + added[name]
        start, size, axis = windows[name]
        sums = lax.dynamic_slice_in_dim(total[name], start, size, axis) + added[name]
        return lax.dynamic_update_slice_in_dim(total[name], sums, start, axis)

    return {name: sum_of(name) for name in total}


def check(term: Term, batch: int, heads: int) -> None:
    """Refuse a term of another batch or other heads.

    Raises:
        ValueError: leading axes that are neither 1 nor those of the queries.
    """
    for x in jax.tree.leaves(term.floats):
        if x.ndim < 2 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(f"an array {x.shape} of a term must be [1 or {batch}, 1 or {heads}, ...]")
    for x in jax.tree.leaves(term.integers):
        if x.ndim < 1 or x.shape[0] not in (1, batch):
            raise ValueError(f"an array {x.shape} of integers of a term must be [1 or {batch}, ...]")


def dense(term: Term, queries: int, keys: int) -> jax.Array:
    """The whole term, [1 or B, 1 or H, T, S] float32: for few queries, and as the reference."""
    tile = Tile(0, queries, 0, keys)
    sizes = [x.shape[:2] for x in jax.tree.leaves(term.floats)]
    B = max(*(b for b, _ in sizes), *(x.shape[0] for x in jax.tree.leaves(term.integers)), 1)
    H = max(h for _, h in sizes)

    # An axis of 1 is taken away and not mapped over: what all heads or rows share is not worked out for each.
    def of_head(floats: Any, integers: Any) -> jax.Array:
        return term.form(parts(term.form, floats, tile), integers, tile)

    of_row = of_head if H == 1 else jax.vmap(of_head, in_axes=(axes_over(term.floats, 1), None))
    both = term.floats, term.integers
    of_batch = of_row if B == 1 else jax.vmap(of_row, in_axes=axes_over(both, 0))
    out = of_batch(without_ones(term.floats), without_ones(term.integers, 1))
    return out.reshape(B, H, queries, keys)


def without_ones(tree: Any, axes: int = 2) -> Any:
    """Arrays without those of their ``axes`` leading axes that are 1."""
    return jax.tree.map(lambda x: x[tuple(0 if size == 1 else slice(None) for size in x.shape[:axes])], tree)


def axes_over(tree: Any, axis: int) -> Any:
    """What ``jax.vmap`` maps over, of arrays as :func:`without_ones` leaves them: axis 0, or None where it was 1."""
    return jax.tree.map(lambda x: None if x.shape[axis] == 1 else 0, tree)

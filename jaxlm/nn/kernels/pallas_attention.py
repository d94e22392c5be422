"""Attention on TPU by whole rows, with terms and orders: a Pallas kernel forward, and one backward.

A block of queries meets all keys at once, in fast memory from the product to the values. Terms are added there, where
XLA would keep every tile of the scores in slow memory, several times over where a relative term turns diagonals into
columns (``pallas_tile``). Only the output is kept. The backward pass works the scores out again and
the sums of their rows with them, for it has whole rows: neither log-sum-exps nor the sums of the output's gradient pass
through memory. What a causal mask hides is computed all the same.
Shapes as in ``jaxlm.nn.attention``, with V the width of values; R queries of a block, X and Y the last axes of a term's
array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn.kernels import blockwise_attention, split
from jaxlm.nn.kernels.blockwise_attention import dot
from jaxlm.nn.kernels.pallas_tile import Block
from jaxlm.nn.mask import Mask
from jaxlm.nn.term import Extendable, Form, Term, Tile

LARGEST_BLOCK = 512
"""Queries of a block at most."""
SCORES = 512 * 1536
"""Entries of a strip, R by R + S, for which there is room: several arrays of that size live at once."""
LONGEST = 4096
"""Keys for which there is room beside them."""
FAST_MEMORY = 32 * 2**20
"""Bytes of fast memory that a kernel may take."""
_OLDER = ("TPU v2", "TPU v3", "TPU v4")


def refusal(queries: int, keys: int, terms: tuple[Term, ...], array: Any, key: Any) -> str | None:
    """Why the kernel cannot do this, or None when it can."""
    if array is not None:
        return "takes no dense bias"
    if key is not None:
        return "has no dropout: set the rate to 0"
    for term in terms:
        if not isinstance(term.form, Extendable):
            return f"does not know the term {type(term.form).__name__.strip('_')}, which picks entries one by one"
    if sharding.device_kind().startswith(_OLDER):
        return "needs a TPU from v5 on: older ones do not rotate each row by an amount of its own"
    if keys > LONGEST:
        return f"has room for {LONGEST} keys, and these are {keys}"
    return split.refusal()


@dataclasses.dataclass(frozen=True)
class _Static(blockwise_attention.Rule):
    """What is known while tracing; from key number ``keys`` on there is only what fills vectors."""

    keys: int
    interpret: bool


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    terms: tuple[Term, ...],
    interpret: bool = False,
) -> jax.Array:
    """See ``jaxlm.nn.attention.attention``. ``interpret``: run the kernel's program on whatever device there is."""
    B, _, H, _ = q_BTHK.shape
    grouped = k_BSGK.shape[2] != H

    def own(form: Form, name: str, x: jax.Array) -> jax.Array:
        """Blocks are of one head each, and what queries have is of one row each. Gradients add up over what follows
        each other on the grid: over the queries' heads of a group, or over rows that share an array."""
        rows = B if grouped or _by_queries(form, name) else x.shape[0]
        return jnp.broadcast_to(x, (rows, H, *x.shape[2:]))

    forms = tuple(term.form for term in terms)
    integers = jax.tree.map(jnp.asarray, (mask.arrays, tuple(term.integers for term in terms)))
    static = _Static(mask.causal, mask.window, scale, forms, keys=k_BSGK.shape[1], interpret=interpret)
    floats = _by_form(static, own, tuple(term.floats for term in terms))
    return split.over_devices(functools.partial(_rows, static), (q_BTHK, k_BSGK, v_BSGK), floats, integers)


def _rows(static: _Static, qkv: Any, added: Any, integers: Any) -> jax.Array:
    """Attention of the rows and heads of one device, [B, T, H, V]."""
    T = qkv[0].shape[1]
    more_queries, more_keys = -T % LANES, -static.keys % LANES

    def heads_first(x_BTHK: jax.Array, more: int) -> jax.Array:
        # Named as they are read by the kernel: what remat keeps is then neither projected nor transposed again.
        longer = jnp.pad(x_BTHK, ((0, 0), (0, more), (0, 0), (0, 0)))
        return checkpoint_name(jnp.swapaxes(longer, 1, 2), blockwise_attention.SAVED)

    def column(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT, ((0, 0), (0, more_queries)))[:, :, None]

    def row(x_BS: jax.Array) -> jax.Array:
        return jnp.pad(x_BS, ((0, 0), (0, more_keys)))[:, None, :]

    q, k, v = map(heads_first, qkv, (more_queries, more_keys, more_keys))
    longer = [
        cast(Extendable, form).extended(own, more_queries, more_keys)
        for form, own in zip(static.forms, added, strict=True)
    ]
    static = dataclasses.replace(static, forms=tuple(form for form, _ in longer))
    of_mask, of_terms = integers
    of_mask = tuple(None if x is None else turn(x) for x, turn in zip(of_mask, (column, row, column, row), strict=True))
    turns = {"query": column, "key": row}
    of_terms = tuple(own and {name: turns[name](x) for name, x in own.items()} for own in of_terms)
    out_BHTV = _attention(static, (q, k, v, tuple(own for _, own in longer)), (of_mask, of_terms))
    return jnp.swapaxes(out_BHTV, 1, 2)[:, :T]


def _block(queries: int, keys: int) -> int:
    """Queries of a block: the largest that divides them, for which there is room; multiples of :data:`LANES`."""
    sizes = range(LANES, min(queries, LARGEST_BLOCK) + 1, LANES)
    return max(size for size in sizes if queries % size == 0 and size * (size + keys) <= SCORES)


def _by_queries(form: Form, name: str) -> bool:
    """Whether an array of a term has a row for each query."""
    window = form.windows(Tile(0, LANES, 0, LANES)).get(name)
    return window is not None and window[2] == 0


# ------------------------------------------------------------------------------------------------ the kernels


def _windows(form: Form, tile: Tile) -> dict[str, Any]:
    """What a tile needs of the arrays that blocks do not cut already, as indices (``form.windows``). They begin where
    vectors do: blocks, and what was added, are whole ones."""
    from jax.experimental import pallas as pl

    return {
        name: (slice(None), pl.ds(pl.multiple_of(start, LANES), size))
        for name, (start, size, axis) in form.windows(tile).items()
        if axis != 0
    }


def _read(static: _Static, R: int, references: Any) -> tuple[Any, Any, Any, Block]:
    """q, k, v; what the tile needs of the terms' arrays; all integers; and which tile it is."""
    from jax.experimental import pallas as pl

    qkv, added, integers = references
    tile = Block(pl.program_id(3) * R, R, 0, qkv[1].shape[0])
    of_tile = _by_form(static, lambda form, name, x: x[_windows(form, tile).get(name, ...)], added)
    read = functools.partial(jax.tree.map, lambda x: x[...])
    return read(qkv), of_tile, read(integers), tile


def _weights(static: _Static, qkv: Any, of_tile: Any, integers: Any, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Exponentials of a block's scores [R, S], and one over the sums of their rows [R, 1] (0 where nothing is seen)."""
    scores = blockwise_attention.scores(static, qkv[0], qkv[1], of_tile, integers, tile)
    if static.keys < tile.columns:
        scores = jnp.where(tile.places()[1] < static.keys, scores, -jnp.inf)
    top_R1 = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top_R1), top_R1, 0.0))
    total_R1 = jnp.sum(weights, axis=1, keepdims=True)
    return weights, jnp.where(total_R1 > 0.0, 1.0 / total_R1, 0.0)


def _forward_kernel(static: _Static, R: int, references: Any, out: Any) -> None:
    qkv, *rest = _read(static, R, references)
    weights, share_R1 = _weights(static, qkv, *rest)
    mixed_RV = dot(weights.astype(qkv[2].dtype), qkv[2], 1, 0)
    out[...] = (mixed_RV * share_R1).astype(out.dtype)


def _backward_kernel(
    static: _Static, R: int, shared: Any, references: Any, dout: Any, dqkv: Any, dadded: Any, *sums: Any
) -> None:
    """``shared``: which arrays of the terms are one for all rows of the batch. ``sums``: of dk and dv, keys last."""
    from jax.experimental import pallas as pl

    qkv, of_tile, integers, tile = _read(static, R, references)
    weights, share_R1 = _weights(static, qkv, of_tile, integers, tile)
    probabilities, dout_RV = weights * share_R1, dout[...]
    dprobabilities = dot(dout_RV, qkv[2], 1, 1)
    mean_R1 = jnp.sum(probabilities * dprobabilities, axis=1, keepdims=True)
    dscores = probabilities * (dprobabilities - mean_R1)

    _, row, head, block = map(pl.program_id, range(4))
    _, _, heads, blocks = map(pl.num_programs, range(4))

    def add(total: Any, new: jax.Array, index: Any, first: Any) -> None:
        @pl.when(first)
        def begin() -> None:
            total[...] = jnp.zeros(total.shape, total.dtype)

        total[index] += new.astype(total.dtype)

    q, k, v = qkv
    dq_RK, *of_keys = blockwise_attention.products(static, q, k, v, dout_RV, probabilities, dscores)
    dqkv[0][...] = dq_RK.astype(dqkv[0].dtype)
    for total, new in zip(sums, of_keys, strict=True):
        add(total, new, ..., (head == 0) & (block == 0))

    @pl.when((head == heads - 1) & (block == blocks - 1))
    def end() -> None:
        for out, total in zip(dqkv[1:], sums, strict=True):
            out[...] = total[...].astype(out.dtype)

    for i, form in enumerate(static.forms):
        for name, new in blockwise_attention.pull(form, of_tile[i], integers[1][i], tile, dscores).items():
            out = dadded[i][name]
            if _by_queries(form, name):
                out[...] = new.astype(out.dtype)
            else:
                first = (row == 0) & (block == 0) if shared[i][name] else block == 0
                add(out, new, _windows(form, tile).get(name, ...), first)


# ------------------------------------------------------------------------------------------------ their calls


class _Layout(NamedTuple):
    """How arrays are cut over a grid: heads of keys, rows of the batch, heads of queries of each, blocks of queries."""

    R: int
    grid: tuple[int, int, int, int]
    inputs: Any
    """Blocks of q, k and v; of the terms' arrays; of the integers."""
    out: Any
    """Blocks of the output."""


def _layout(static: _Static, floats: Any, integers: Any) -> _Layout:
    from jax.experimental import pallas as pl

    (B, H, T, K), (G, S, V) = floats[0].shape, floats[2].shape[1:]
    R = _block(T, S)

    group = H // G

    def by_queries(width: int) -> Any:
        return pl.BlockSpec((None, None, R, width), lambda g, b, h, t: (b, g * group + h, t, 0))

    def by_keys(width: int) -> Any:
        return pl.BlockSpec((None, None, S, width), lambda g, b, h, t: (b, g, 0, 0))

    def of_term(form: Form, name: str, x: jax.Array) -> Any:
        if _by_queries(form, name):
            return by_queries(x.shape[3])
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda g, b, h, t: (0 if shared else b, g * group + h, 0, 0))

    def of_integers(x: jax.Array) -> Any:
        shared, column = x.shape[0] == 1, x.shape[2] == 1
        shape = (None, R, 1) if column else (None, 1, S)
        return pl.BlockSpec(shape, lambda g, b, h, t: (0 if shared else b, t if column else 0, 0))

    added = _by_form(static, of_term, floats[3])
    inputs = (by_queries(K), by_keys(K), by_keys(V)), added, jax.tree.map(of_integers, integers)
    return _Layout(R, (G, B, group, T // R), inputs, by_queries(V))


def _by_form(
    static: _Static, function: Callable[[Form, str, jax.Array], Any], added: Any
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {name: function(form, name, x) for name, x in own.items()}
        for form, own in zip(static.forms, added, strict=True)
    )


def _call(static: _Static, layout: _Layout, kernel: Callable[..., None], name: str, **arguments: Any) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    order = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=FAST_MEMORY
    )
    return pl.pallas_call(
        kernel, grid=layout.grid, interpret=static.interpret, name=name, compiler_params=order, **arguments
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, floats: Any, integers: Any) -> jax.Array:
    """``floats``: q [B, H, T, K], k [B, G, S, K], v [B, G, S, V], and for each term its arrays [1 or B, H, X, Y]."""
    return _forward(static, floats, integers)[0]


def _forward(static: _Static, floats: Any, integers: Any) -> tuple[jax.Array, Any]:
    layout = _layout(static, floats, integers)
    q, k, v, added = floats
    run = _call(
        static, layout, functools.partial(_forward_kernel, static, layout.R), "attention_forward",
        in_specs=(layout.inputs,), out_specs=layout.out,
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype),
    )  # fmt: skip
    out_BHTV = run(((q, k, v), added, integers))
    return checkpoint_name(out_BHTV, blockwise_attention.SAVED), (floats, integers)


def _backward(static: _Static, saved: Any, dout_BHTV: jax.Array) -> tuple[Any, ...]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    floats, integers = saved
    layout = _layout(static, floats, integers)
    q, *kv, added = floats
    S, widths = kv[0].shape[2], [x.shape[3] for x in kv]

    def sums(form: Form, name: str, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if _by_queries(form, name) else jnp.float32)

    def keys_last(x_BGSK: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x_BGSK.shape[:2], x_BGSK.shape[3], x_BGSK.shape[2]), x_BGSK.dtype)

    shared = jax.tree.map(lambda x: x.shape[0] == 1, added)
    by_keys = [pl.BlockSpec((None, None, width, S), lambda g, b, h, t: (b, g, 0, 0)) for width in widths]
    of_qkv, of_added, _ = layout.inputs
    run = _call(
        static, layout, functools.partial(_backward_kernel, static, layout.R, shared), "attention_backward",
        in_specs=(layout.inputs, layout.out), out_specs=((of_qkv[0], *by_keys), of_added),
        out_shape=((jax.ShapeDtypeStruct(q.shape, q.dtype), *map(keys_last, kv)), _by_form(static, sums, added)),
        scratch_shapes=[pltpu.VMEM((width, S), jnp.float32) for width in widths],
    )  # fmt: skip
    (dq, dk, dv), dadded = run(((q, *kv), added, integers), dout_BHTV)
    dadded = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), dadded, added)
    return (dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), dadded), None


_attention.defvjp(_forward, _backward)

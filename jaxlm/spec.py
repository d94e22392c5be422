"""Specs: what every array of a model is, before any array exists.  READ THIS FIRST.

A family describes its parameters (and what it carries between calls) as a nested dict of :class:`ArraySpec`.
Everything that other libraries discover by tracing is derived here from that one tree: initial values, abstract
shapes, shardings (``jaxlm.sharding``), weight-decay masks, parameter counts, checkpoint targets, and the
operations on a named axis (``batch``) that beam search and document resets need.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
"""A pytree (nested dicts) of arrays or of specs."""

# --------------------------------------------------------------------------------------------- initializers
# Frozen dataclasses and not closures: a spec is hashable and compares by value.


@dataclasses.dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0 and standard deviation ``stddev``."""

    stddev: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.stddev, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform on [-bound, bound)."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every entry equal to ``value``; needs no random key."""

    value: float = 0.0

    def __call__(self, key: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Identity:
    """A matrix of ones on the diagonal and zeros elsewhere."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rows, columns = shape
        return jnp.eye(rows, columns, dtype=dtype)


Initializer = Normal | Uniform | Constant | Identity
ZEROS = Constant(0.0)
ONES = Constant(1.0)

LAYERS = "layers"
"""The axis that :func:`stack` adds, and the key under which a stack stands."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array: its shape, the logical name of each axis (None: nameless), how it starts, its dtype.

    ``decay`` says whether weight decay applies to it: True for weights, False for biases, norm scales and state.

    Example:
        >>> ArraySpec((768, 3072), ("embed", "mlp"), Normal(0.02)).size
        2359296
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = ZEROS
    dtype: Any = jnp.float32
    decay: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} has {len(self.shape)} axes but {len(self.axes)} names {self.axes}")
        named = [axis for axis in self.axes if axis is not None]
        if len(set(named)) != len(named):
            raise ValueError(f"axis names must be distinct, got {self.axes}")
        if any(size <= 0 for size in self.shape):
            raise ValueError(f"sizes must be positive, got shape {self.shape} for axes {self.axes}")

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, on however many devices."""
        return self.size * self.dtype.itemsize


# ------------------------------------------------------------------------------------------- names and keys


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its keys joined by '/', as in ``layers/attention/qkv/weight``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """``{path name: leaf}`` in tree order. Nodes that hold nothing disappear."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fold_name(key: jax.Array | None, name: str) -> jax.Array | None:
    """A key of its own for ``name``: adding a name never changes what the others draw. None stays None."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


# ------------------------------------------------------------------------------------- what specs give


def stack(count: int, specs: Tree) -> Tree:
    """The specs of ``count`` equal layers held in one array each: a leading ``layers`` axis.

    In a family's parameters, and in what it carries, a stack stands under a key ``layers`` (see :func:`unstack`).
    """
    return jax.tree.map(
        lambda spec: dataclasses.replace(spec, shape=(count, *spec.shape), axes=(LAYERS, *spec.axes)), specs
    )


def unstack(tree: Tree) -> Tree:
    """``tree`` with the stack under each key ``layers`` as a tuple of trees, one a layer; ``apply`` takes both.

    A loop over a stack copies each layer out of it, and its gradients back into one, at every step
    (``jaxlm.models.common.layers_apart``). Taken apart before the steps, each layer is copied once. ``tree`` may be
    parameters, or whatever holds such: an optimizer's moments, a whole ``TrainState``; what a model carries between
    calls; or their specs. A tree already taken apart is given back.
    """

    def one(x: Any, layer: int) -> Any:
        if isinstance(x, ArraySpec):
            return dataclasses.replace(x, shape=x.shape[1:], axes=x.axes[1:])
        return x[layer]

    def apart(stack: Tree) -> tuple[Tree, ...]:
        layers = jax.tree.leaves(stack)[0].shape[0]
        return tuple(jax.tree.map(functools.partial(one, layer=layer), stack) for layer in range(layers))

    return _at_layers(lambda child: child if isinstance(child, tuple) else apart(child), tree)


def restack(tree: Tree) -> Tree:
    """What :func:`unstack` took apart, as it was."""

    def together(layers: tuple[Tree, ...]) -> Tree:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    return _at_layers(lambda child: together(child) if isinstance(child, tuple) else child, tree)


def for_each_layer(tree: Tree, like: Tree) -> Tree:
    """``tree``, which has an entry for each leaf of stacked parameters, in the layout of the parameters ``like``: where
    they have layers apart, each layer has the entries of the stack."""
    if not isinstance(tree, dict) or not isinstance(like, dict):
        return tree
    return {
        name: (child,) * len(like[name])
        if name == LAYERS and isinstance(like[name], tuple)
        else for_each_layer(child, like[name])
        for name, child in tree.items()
    }


def _is_apart(tree: Tree) -> bool:
    """Whether some stack in ``tree`` was taken apart."""
    if not isinstance(tree, dict):
        return False
    return any(isinstance(child, tuple) if name == LAYERS else _is_apart(child) for name, child in tree.items())


def _at_layers(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """``tree`` with what stands under each key ``layers`` changed."""

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: change(child) if name == LAYERS else walk(child) for name, child in node.items()}

    return jax.tree.map(walk, tree, is_leaf=lambda node: isinstance(node, dict))


def init(specs: Tree, key: jax.Array | None = None) -> Tree:
    """Arrays for ``specs``. Each leaf draws from ``key`` folded with its path, and each layer with its index.

    So the values of a leaf depend neither on its neighbours, nor on the number of layers, nor (under jit with
    ``out_shardings``) on the number of devices.

    Raises:
        ValueError: a leaf starts random and ``key`` is None.
    """

    def one(path: tuple[Any, ...], spec: ArraySpec) -> jax.Array:
        if isinstance(spec.init, Constant):
            return spec.init(None, spec.shape, spec.dtype)
        if key is None:
            raise ValueError(f"{path_name(path)!r} starts from {spec.init}: pass a key, e.g. jax.random.key(0)")
        leaf_key = fold_name(key, path_name(path))
        assert leaf_key is not None
        if spec.axes[0] == LAYERS:
            keys = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(jnp.arange(spec.shape[0]))
            return jax.vmap(lambda k: spec.init(k, spec.shape[1:], spec.dtype))(keys)
        return spec.init(leaf_key, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(one, specs)


def abstract(specs: Tree) -> Tree:
    """The same tree as ``jax.ShapeDtypeStruct``: what ``jax.eval_shape(init)`` would give, without tracing."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def decay_mask(specs: Tree) -> Tree:
    """Tree of bools for ``optax.add_decayed_weights(mask=...)``."""
    return jax.tree.map(lambda spec: spec.decay, specs)


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(spec.size for spec in jax.tree.leaves(specs))


# --------------------------------------------------------------------------------------- comparing trees


def _describe(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return f"{dtype}{list(shape)}" if shape is not None else repr(type(leaf).__name__)


def diff(expected: Tree, actual: Tree, *, dtypes: bool = True) -> list[str]:
    """One line per leaf that is missing, extra, or of another shape (or dtype). Empty: the trees agree.

    Both trees may hold arrays, ``ShapeDtypeStruct`` or :class:`ArraySpec`.
    """
    want, have = flatten(expected), flatten(actual)
    lines = [f"missing: {name} {_describe(want[name])}" for name in want if name not in have]
    lines += [f"extra: {name} {_describe(have[name])}" for name in have if name not in want]
    for name in want:
        if name not in have:
            continue
        same = tuple(want[name].shape) == tuple(have[name].shape)
        if not same or (dtypes and want[name].dtype != have[name].dtype):
            lines.append(f"differs: {name} expected {_describe(want[name])}, got {_describe(have[name])}")
    return lines


def require_same(expected: Tree, actual: Tree, what: str, *, dtypes: bool = True, most: int = 20) -> None:
    """Raise ``ValueError`` with a readable list when ``actual`` is not shaped as ``expected``.

    Args:
        what: what is being compared, for the first line, e.g. ``"parameters of gpt"``.
        most: how many lines to print before the rest is counted.
    """
    lines = diff(expected, actual, dtypes=dtypes)
    if lines:
        shown = "\n  ".join(lines[:most])
        rest = f"\n  ... and {len(lines) - most} more" if len(lines) > most else ""
        raise ValueError(f"{what} do not match ({len(lines)} differences):\n  {shown}{rest}")


# ------------------------------------------------------------------------------- operations on a named axis


def map_axis(specs: Tree, axis: str, function: Callable[..., jax.Array], *trees: Tree) -> Tree:
    """``function(leaf of each tree, dimension)`` for each spec, ``dimension`` being where its spec names ``axis``.

    Where the first tree has its layers apart (:func:`unstack`), all are taken as apart, the specs included.

    Raises:
        ValueError: a leaf has no such axis.
    """

    def one(path: tuple[Any, ...], spec: ArraySpec, *leaves: jax.Array) -> jax.Array:
        if axis not in spec.axes:
            raise ValueError(f"{path_name(path)!r} has axes {spec.axes}, none is {axis!r}")
        return function(*leaves, spec.axes.index(axis))

    if trees and _is_apart(trees[0]):
        specs, trees = unstack(specs), tuple(map(unstack, trees))
    return jax.tree_util.tree_map_with_path(one, specs, *trees)


def take(specs: Tree, tree: Tree, indices: jax.Array, axis: str = "batch") -> Tree:
    """Gather along a named axis of every leaf: how beams are reordered, whatever the model carries."""
    return map_axis(specs, axis, lambda leaf, at: jnp.take(leaf, indices, axis=at), tree)


def reset(specs: Tree, tree: Tree, rows: jax.Array, axis: str = "batch") -> Tree:
    """Put the rows where ``rows`` (bool, one per entry of ``axis``) is True back to their initial value."""

    def one(leaf: jax.Array, initial: jax.Array, at: int) -> jax.Array:
        shape = [1] * leaf.ndim
        shape[at] = rows.shape[0]
        return jnp.where(rows.reshape(shape), initial, leaf)

    return map_axis(specs, axis, one, tree, init(specs))

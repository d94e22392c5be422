"""Specs: descriptions of all arrays of a model, created before any array exists. Read this module first.

Each model family (a module such as ``jaxlm.models.gpt``) describes its parameters, and the state that it carries
between calls, as a tree of :class:`ArraySpec`. Other libraries trace the model to get the shapes. In jaxlm, the tree of
specs determines initial values, abstract shapes, shardings (``jaxlm.sharding``), weight-decay masks, parameter counts
and checkpoint targets. It also names the axes of each array: for example, beam search and state resets need the axis
``batch``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Tree = Any
"""A pytree of arrays or of specs: nested dicts, in which the layers may be a tuple."""

Array = jax.Array | np.ndarray
"""An array on a device or on the host."""

Params = dict[str, Any]
"""Parameters of a model or of a layer: nested dicts of arrays. The layers are a tuple with one dict per layer, or one
dict whose arrays have a leading layer axis."""

LayerTrees = tuple[dict[str, Any], ...] | dict[str, Any]
"""Parameters or states of all layers (:func:`layers`): a tuple with one tree per layer, or one dict whose arrays have a
leading layer axis."""

State = dict[str, Any]
"""A model state between two calls: a tree of arrays with the structure of ``Model.state_specs``."""

# --------------------------------------------------------------------------------------------- initializers
# Initializers are frozen dataclasses instead of closures, so that a spec is hashable and compares by value.


@dataclasses.dataclass(frozen=True)
class Normal:
    """A Gaussian with mean 0 and standard deviation ``stddev``."""

    stddev: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.stddev, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A uniform distribution on [-bound, bound)."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array whose entries all equal ``value``. It needs no random key."""

    value: float = 0.0

    def __call__(self, key: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity matrix; a matrix that is not square has ones on its main diagonal and zeros elsewhere."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        rows, columns = shape
        return jnp.eye(rows, columns, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LogOfUniform:
    """The logarithm of a number that is uniform on [low, high), as for ``A_log`` of Mamba-2 (Dao and Gu 2024)."""

    low: float
    high: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, self.low, self.high))


@dataclasses.dataclass(frozen=True)
class InverseSoftplus:
    """The inverse softplus of ``max(y, minimum)``, where log(y) is uniform on [log(low), log(high)).

    The published code of Mamba (Gu and Dao 2023) initializes the bias of its time steps ``dt`` in this way.
    """

    low: float
    high: float
    minimum: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        logs = jax.random.uniform(key, shape, dtype, math.log(self.low), math.log(self.high))
        y = jnp.maximum(jnp.exp(logs), self.minimum)
        return y + jnp.log(-jnp.expm1(-y))


Initializer = Callable[[Any, tuple[int, ...], Any], jax.Array]
"""A function ``(key, shape, dtype)`` that returns an array.

Use an instance of a frozen dataclass and not a closure, so that specs can be compared and hashed.
"""
ZEROS = Constant(0.0)
ONES = Constant(1.0)

LAYERS = "layers"
"""The dict key of the layers of a model, and the name of the axis that :func:`stack` adds."""

EXPERT = "expert"
"""The name of the axis over the experts of a layer. As on the axis ``layers``, each index has its own weight matrix."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array: its shape, the logical name of each axis (None: no name), its initializer and its dtype.

    ``decay`` says whether weight decay applies to the array: True for weights; False for biases, norm scales and state.

    Raises:
        ValueError: the shape and the axes have different lengths, two axes have the same name, or a size is below 1.

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
    def is_stacked(self) -> bool:
        """Whether the first axis is the axis ``layers`` (:func:`stack`)."""
        return self.axes[:1] == (LAYERS,)

    @property
    def nbytes(self) -> int:
        """Bytes of the complete (unsharded) array."""
        return self.size * self.dtype.itemsize


# ------------------------------------------------------------------------------------------- names and keys

_LAYER_NUMBER = re.compile(rf"(?:^|/){LAYERS}/(\d+)/")


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its keys joined by '/', for example ``layers/attention/qkv/weight``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """A dict from path names (:func:`path_name`) to leaves, in the order of ``jax.tree.leaves``."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def split_layer(name: str) -> tuple[str, int | None]:
    """A path name without its layer number, and the number: ``layers/3/mlp/up`` gives ``("layers/mlp/up", 3)``.

    A name without a layer number is returned unchanged, with None.
    """
    match = _LAYER_NUMBER.search(name)
    return (name, None) if match is None else (name[: match.start(1)] + name[match.end() :], int(match[1]))


def fold_in_name(key: jax.Array | None, name: str) -> jax.Array | None:
    """A random key for ``name``, derived from ``key``; None if ``key`` is None.

    The result depends only on ``key`` and ``name``. So the random numbers of one name do not depend on other names.
    """
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


THREEFRY = "threefry2x32"
"""The name of JAX's default implementation of random keys."""


def typed_key(key: jax.Array) -> jax.Array:
    """The typed key (``jax.random.key``) of a raw uint32 key (``jax.random.PRNGKey``). A typed key is unchanged."""
    return key if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def threefry_keys(keys: jax.Array) -> jax.Array:
    """Threefry keys, each drawn from one of ``keys`` (one key, or [B]). Threefry keys are returned unchanged.

    Use this function before draws under ``vmap``. Under ``vmap``, the other key implementations of JAX (rbg) draw the
    numbers of all rows from one key, so a row depends on the other rows.
    """
    if jax.random.key_impl(keys) == THREEFRY:
        return keys

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=THREEFRY)

    return draw(keys) if keys.ndim == 0 else jax.lax.map(draw, keys)


# ------------------------------------------------------------------------------- layers, arrays, shapes, masks


def layers(specs: Iterable[Tree], *, stacked: bool) -> Tree:
    """Specs of all layers of a model, for the key ``layers`` of its parameters or of its state.

    There are two layouts (``jaxlm.models.common.run_layers``):

    - stacked: one tree, whose arrays have a leading ``layers`` axis. ``lax.scan`` runs the layers.
    - per-layer: a tuple with one tree per layer. A Python loop runs the layers.

    Parameters, shardings, optimizer states and checkpoints have the layout of the specs.

    Args:
        specs: the specs of each layer: ``[block] * num_layers`` if all layers are equal.
        stacked: whether the layout is stacked. Families pass the config field ``scan_layers``.

    Raises:
        ValueError: ``stacked`` is True and the layers are not equal.
    """
    specs = tuple(specs)
    if not stacked:
        return specs
    for number, layer in enumerate(specs):
        if layer != specs[0]:
            raise ValueError(
                f"layer {number} differs from layer 0: stacked layers must be equal (set scan_layers to False)"
            )
    return stack(len(specs), specs[0])


def stack(count: int, specs: Tree) -> Tree:
    """Specs of ``count`` equal layers, stacked: each array gets a leading ``layers`` axis of size ``count``."""
    return jax.tree.map(
        lambda spec: dataclasses.replace(spec, shape=(count, *spec.shape), axes=(LAYERS, *spec.axes)), specs
    )


def unstack(tree: Tree) -> Tree:
    """``tree`` in the per-layer layout: the value of each key ``layers`` becomes a tuple with one tree per layer.

    Use it to read or write files (checkpoints, adapters) whose layout differs from that of the model, and in tools that
    inspect single layers.

    Args:
        tree: parameters, or a tree that contains trees of the same structure (optimizer moments, ``TrainState``);
            arrays or specs. A tree that is already per-layer is returned unchanged.
    """

    def select_layer(x: Any, layer: int) -> Any:
        if isinstance(x, ArraySpec):
            return dataclasses.replace(x, shape=x.shape[1:], axes=x.axes[1:])
        return x[layer]

    def split_layers(stack: Tree) -> tuple[Tree, ...]:
        leaves = jax.tree.leaves(stack)
        count = leaves[0].shape[0] if leaves else 0  # an optimizer state may have only optax.MaskedNode here
        return tuple(jax.tree.map(functools.partial(select_layer, layer=layer), stack) for layer in range(count))

    return map_layers(lambda child: child if isinstance(child, tuple) else split_layers(child), tree)


def restack(tree: Tree) -> Tree:
    """``tree`` in the stacked layout: the inverse of :func:`unstack`.

    Layers whose trees have different structures (as in ``griffin``) or shapes have no stacked layout. They stay
    per-layer.
    """

    def stack_leaves(*leaves: Any) -> Any:
        if isinstance(leaves[0], ArraySpec):
            return stack(len(leaves), leaves[0])
        return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)

    def stack_layers(layers: tuple[Tree, ...]) -> Tree:
        structures = {(jax.tree.structure(layer), tuple(x.shape for x in jax.tree.leaves(layer))) for layer in layers}
        if len(structures) != 1:
            return layers
        return jax.tree.map(stack_leaves, *layers)

    return map_layers(lambda child: stack_layers(child) if isinstance(child, tuple) else child, tree)


def map_layers(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """``tree`` with ``change`` applied to the value of each key ``layers``."""

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: change(child) if name == LAYERS else map_layers(change, child) for name, child in node.items()}

    return jax.tree.map(walk, tree, is_leaf=lambda node: isinstance(node, dict))


def num_layers(layers: LayerTrees) -> int:
    """The number of layers, from one tree per layer or from stacked layers."""
    return len(layers) if isinstance(layers, tuple) else int(jax.tree.leaves(layers)[0].shape[0])


def check_state_layers(params: LayerTrees, state: LayerTrees) -> None:
    """Raise ``ValueError`` if the layers of a state and of parameters have different layouts or different numbers."""
    per_layer = isinstance(params, tuple)
    if isinstance(state, tuple) != per_layer:
        layout_names = {True: "one tree per layer (scan_layers=False)", False: "stacked layers (scan_layers=True)"}
        raise ValueError(
            f"the parameters have {layout_names[per_layer]}, but the state has {layout_names[not per_layer]}: "
            "create both with the same config"
        )
    if num_layers(params) != num_layers(state):
        raise ValueError(
            f"the parameters have {num_layers(params)} layers, but the state has {num_layers(state)}: create them with "
            "the same config"
        )


def init(specs: Tree, key: jax.Array | None = None) -> Tree:
    """Arrays with the initial values of ``specs``.

    The key of a leaf is ``key``, folded with the path name of the leaf (without its layer number). If the leaf is in a
    layer, the key is also folded with the index of the layer. So the values of a leaf do not depend on other leaves, on
    the number of layers, or on the layout (stacked or per-layer). Under jit with ``out_shardings``, the values do not
    depend on the number of devices.

    Args:
        key: a key of any implementation. If it is not a threefry key, a threefry key that is drawn from it is used.

    Raises:
        ValueError: ``key`` is None and a leaf has an initializer other than ``Constant``.
    """

    named_specs, treedef = jax.tree_util.tree_flatten_with_path(specs)
    random_specs = {path_name(path): spec for path, spec in named_specs if not isinstance(spec.init, Constant)}
    if random_specs and key is None:
        name, spec = next(iter(random_specs.items()))
        raise ValueError(f"{name!r} has the initializer {spec.init}, which needs a key: pass e.g. jax.random.key(0)")
    drawn = {} if not random_specs or key is None else _draw(random_specs, threefry_keys(typed_key(key)))
    leaves = [
        spec.init(None, spec.shape, spec.dtype) if isinstance(spec.init, Constant) else drawn[path_name(path)]
        for path, spec in named_specs
    ]
    return jax.tree.unflatten(treedef, leaves)


MAX_GROUPED_ENTRIES = 2**20
"""Maximum number of entries (per layer) of an array that :func:`init` draws together with other arrays.

Up to this size, arrays of equal shape, axes, dtype and initializer are drawn in one vmap. The compiled program is then
several times smaller than with one operation per array. Each larger array is drawn in its own operation, because this
needs less memory.
"""


def _draw(specs: dict[str, ArraySpec], key: jax.Array) -> dict[str, jax.Array]:
    """The initial values ``{path name: array}`` of ``{path name: spec}``; no initializer is a ``Constant``."""
    groups: dict[Any, list[str]] = {}
    for name, spec in specs.items():
        shape, axes = spec.shape[spec.is_stacked :], spec.axes[spec.is_stacked :]
        ungrouped_name = name if math.prod(shape) > MAX_GROUPED_ENTRIES else None
        groups.setdefault((spec.init, shape, axes, spec.dtype, ungrouped_name), []).append(name)
    leaf_keys = _leaf_keys({name: specs[name] for names in groups.values() for name in names}, key)
    drawn, start = {}, 0
    for (initializer, shape, _, dtype, _), names in groups.items():
        counts = [specs[name].shape[0] if specs[name].is_stacked else 1 for name in names]
        keys = leaf_keys[start : start + sum(counts)]
        values = jax.vmap(functools.partial(initializer, shape=shape, dtype=dtype))(keys)
        for name, value in zip(names, jnp.split(values, np.cumsum(counts)[:-1]), strict=True):
            drawn[name] = value if specs[name].is_stacked else value[0]
        start += sum(counts)
    return drawn


def _leaf_keys(specs: dict[str, ArraySpec], key: jax.Array) -> jax.Array:
    """One array with the random keys of all leaves, in the order of ``specs``.

    A stacked leaf has one key per layer. Any other leaf has one key.
    """
    hashes: list[int] = []
    layer_numbers: list[int | None] = []
    for path, spec in specs.items():
        name, number = split_layer(path)
        layers = range(spec.shape[0]) if spec.is_stacked else (number,)
        layer_numbers += layers
        hashes += [zlib.crc32(name.encode())] * len(layers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(hashes, np.uint32))
    layer_keys = jax.vmap(jax.random.fold_in)(keys, np.array([number or 0 for number in layer_numbers], np.uint32))
    return jnp.where(np.array([number is None for number in layer_numbers]), keys, layer_keys)


def abstract(specs: Tree) -> Tree:
    """The shapes and dtypes of the arrays of ``specs``, as a tree of ``jax.ShapeDtypeStruct``.

    The result equals ``jax.eval_shape(partial(init, specs), key)``, but nothing is traced.
    """
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def decay_mask(specs: Tree) -> Tree:
    """A tree of bools: True if weight decay applies to the leaf. Use it as ``optax.add_decayed_weights(mask=...)``."""
    return jax.tree.map(lambda spec: spec.decay, specs)


def count(specs: Tree) -> int:
    """Number of parameters: the sum of the sizes of all arrays."""
    return sum(spec.size for spec in jax.tree.leaves(specs))


# --------------------------------------------------------------------------------------- comparing trees


def _describe(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return f"{dtype}{list(shape)}" if shape is not None else repr(type(leaf).__name__)


def differences(expected: Tree, actual: Tree, *, dtypes: bool = True) -> list[str]:
    """A list with one line for each leaf of ``actual`` that is missing, extra, or of another shape or dtype.

    The list is empty if the trees agree. Leaves may be arrays, ``ShapeDtypeStruct`` or :class:`ArraySpec`.
    ``dtypes=False`` compares only paths and shapes.
    """
    want, have = flatten(expected), flatten(actual)
    lines = [f"missing: {name} {_describe(want[name])}" for name in want if name not in have]
    lines += [f"extra: {name} {_describe(have[name])}" for name in have if name not in want]
    for name in want:
        if name not in have:
            continue
        shape = getattr(have[name], "shape", None)  # a Python number has no shape
        same_shape = shape is not None and tuple(shape) == tuple(want[name].shape)
        if not same_shape or (dtypes and want[name].dtype != have[name].dtype):
            lines.append(f"differs: {name} expected {_describe(want[name])}, got {_describe(have[name])}")
    return lines


def require_same(expected: Tree, actual: Tree, what: str, *, dtypes: bool = True, max_shown: int = 20) -> None:
    """Check that ``actual`` has the leaves, shapes and (unless ``dtypes`` is False) dtypes of ``expected``.

    Args:
        what: name of the compared trees in the error message, for example ``"parameters of gpt"``.
        max_shown: maximum number of differences that the error message lists. It ends with the number of the remaining
            differences.

    Raises:
        ValueError: the trees differ. The message lists the differences (:func:`differences`).
    """
    lines = differences(expected, actual, dtypes=dtypes)
    if lines:
        shown = "\n  ".join(lines[:max_shown])
        rest = f"\n  ... and {len(lines) - max_shown} more" if len(lines) > max_shown else ""
        raise ValueError(f"{what} do not match ({len(lines)} differences):\n  {shown}{rest}")


# ------------------------------------------------------------------------------- operations on a named axis


def require_arrays(**arrays: Any) -> None:
    """Raise ``TypeError`` unless each value is a JAX array (also a traced one), a NumPy array or None.

    The names of the arguments are the names in the message.
    """
    for name, x in arrays.items():
        if x is not None and not isinstance(x, Array):
            raise TypeError(f"{name} must be an array, got a {type(x).__name__}: pass jnp.asarray({name})")


def map_axis(specs: Tree, axis: str, function: Callable[..., Any], *trees: Tree, optional: bool = False) -> Tree:
    """A tree of ``function(*leaves, dimension)``, where ``leaves`` are the corresponding leaves of ``trees``.

    ``dimension`` is the index of ``axis`` in the spec of the leaf.

    Args:
        optional: whether a leaf of the first tree is returned unchanged if its spec has no such axis.

    Raises:
        ValueError: a leaf has no such axis, and ``optional`` is False.
    """

    def map_leaf(path: tuple[Any, ...], spec: ArraySpec, *leaves: Any) -> Any:
        if axis not in spec.axes and optional:
            return leaves[0]
        if axis not in spec.axes:
            raise ValueError(f"{path_name(path)!r} has axes {spec.axes}: none of them is {axis!r}")
        return function(*leaves, spec.axes.index(axis))

    return jax.tree_util.tree_map_with_path(map_leaf, specs, *trees)


def take_rows_clipped(specs: Tree, tree: Tree, indices: jax.Array) -> Tree:
    """``tree`` with each leaf gathered at ``indices`` [rows] of the axis ``batch``.

    Beam search uses this function to reorder a model state. Indices out of range are clipped without an error.
    """
    return map_axis(specs, "batch", lambda leaf, dim: jnp.take(leaf, indices, axis=dim, mode="clip"), tree)


def reset(specs: Tree, tree: Tree, rows: jax.Array) -> Tree:
    """``tree`` with the initial values of ``specs`` in all rows of the axis ``batch`` whose entry in ``rows`` is True.

    Args:
        rows: bool [size of the axis ``batch``].

    Raises:
        ValueError: a leaf has no axis ``batch``, or has an initializer other than ``Constant``.
    """

    def reset_leaf(leaf: jax.Array, initial: jax.Array, dim: int) -> jax.Array:
        shape = [1] * leaf.ndim
        shape[dim] = rows.shape[0]
        return jnp.where(rows.reshape(shape), initial, leaf)

    return map_axis(specs, "batch", reset_leaf, tree, init(specs))

"""Adaptations: train only a part of a model's parameters (``Freeze``), or low-rank factors of them (``LoRA``).

An adaptation splits the parameters of a model into a trained and a frozen tree, and merges the two into ordinary
parameters again. The merge is a pure function, so a loss is differentiated with respect to the trained tree alone, and
any Optax optimizer works on it:

    >>> model = get_model("gpt2-tiny")                                                   # doctest: +SKIP
    >>> lora = LoRA(rank=4)                                                              # doctest: +SKIP
    >>> trained, frozen = lora.split(model.specs, params, jax.random.key(0))             # doctest: +SKIP
    >>> gradient = jax.grad(lambda trained: loss(model, lora.merge(trained, frozen)))    # doctest: +SKIP
    >>> save_pretrained("directory", model, lora.merge(trained, frozen))                 # doctest: +SKIP

Both layer layouts work (``spec.layers``): all trees have the layout of the model's specs. A path contains no layer
number, and selects the weight in every layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.spec import LAYERS, ZEROS, ArraySpec, Initializer, Uniform

LORA_A, LORA_B = "lora_a", "lora_b"
"""Keys of the two factors that :class:`LoRA` puts at the path of a weight."""


@runtime_checkable
class Adaptation(Protocol):
    """Splits parameters into a trained and a frozen tree. Implementations are frozen dataclasses: hashable, static."""

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree: for the optimizer, shardings and checkpoints."""
        ...

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        ...

    def split(self, model_specs: spec.Tree, params: spec.Tree, key: jax.Array) -> tuple[spec.Tree, spec.Tree]:
        """The trained and the frozen tree. ``key`` initializes parameters that ``params`` does not have."""
        ...

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model. The function is pure and differentiable in ``trained``."""
        ...


# ------------------------------------------------------------------------------------------------- matrices


def matrix_rows(name: str, leaf: ArraySpec) -> int | None:
    """Number of leading axes (without ``layers``) that form the rows of a weight's matrix; None: it is not a matrix.

    Matrices are leaves with two or more axes whose last key is ``weight`` or begins with ``weight_``, ``direction``
    (weight normalisation), a token table or head, or a factor of :class:`LoRA`. Biases and scales are not matrices.
    The rows of a weight are its inputs: one axis, or two for ``[heads, kv, embed]`` and for the kernel of a convolution
    ``[width, in, out]``. The rows of a table or head ``[vocab, embed]`` are the vocabulary.

    Example:
        >>> matrix_rows("attention/output/weight", ArraySpec((4, 8, 32), ("heads", "kv", "embed")))
        2
        >>> matrix_rows("attention/query/bias", ArraySpec((4, 8), ("heads", "kv")))
    """
    axes = leaf.axes[1:] if leaf.axes[:1] == (LAYERS,) else leaf.axes
    last = name.rsplit("/", 1)[-1]
    if len(axes) < 2:
        return None
    if last == LORA_A:
        return len(axes) - 1
    if last == LORA_B or is_table(name, leaf):
        return 1
    if last == "weight" or last.startswith("weight_") or last == "direction":
        is_kernel = axes[0] is None and len(axes) > 2
        return 2 if is_kernel or axes[:2] == ("heads", "kv") else 1
    return None


def is_table(name: str, leaf: ArraySpec) -> bool:
    """Whether a leaf is an embedding table or an output head. The first axis of both is the vocabulary."""
    last = name.rsplit("/", 1)[-1]
    return last.endswith("embedding") or last in ("head", "cluster_weight") or leaf.axes[:1] == ("vocab",)


# ------------------------------------------------------------------------------------------------- freezing


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Trains all parameters except those whose path matches a pattern and those in the first layers of each stack.

    Example:
        >>> Freeze(("embedding",), first_layers=4)     # token tables, position tables, their norm, and four layers
        Freeze(patterns=('embedding',), first_layers=4)

    The trained tree holds the remaining leaves at their paths; its stacks do not contain the first layers. The frozen
    tree is ``{"matched": leaves that match, "first_layers": the first layers}``; an empty entry is left out.
    """

    patterns: tuple[str, ...] = ()
    """Regular expressions that are searched anywhere (``re.search``) in a path such as
    ``layers/attention/query/weight``; ``^`` and ``$`` anchor them. A path contains no layer number."""
    first_layers: int = 0
    """Number of layers to freeze at the start (next to the input) of each stack (``layers``)."""

    def __post_init__(self) -> None:
        _check_patterns("patterns", self.patterns)
        if self.first_layers < 0:
            raise ValueError(f"first_layers={self.first_layers} must not be negative")
        if not self.patterns and not self.first_layers:
            raise ValueError("Freeze() freezes nothing: give patterns or first_layers, or train without an adaptation")

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree.

        Raises:
            ValueError: a pattern matches nothing, a stack has fewer layers than ``first_layers``, or no parameter is
                left to train.
        """
        return self._trained(model_specs, self._matched(model_specs))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        return self._frozen(model_specs, self._matched(model_specs))

    def split(
        self, model_specs: spec.Tree, params: spec.Tree, key: jax.Array | None = None
    ) -> tuple[spec.Tree, spec.Tree]:
        """The trained and the frozen part of ``params``. ``key`` is not used."""
        matched = self._matched(model_specs)
        return self._trained(params, matched), self._frozen(params, matched)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model."""
        params = _union(trained, frozen.get("matched", {}))
        return _join_layers(frozen["first_layers"], params) if "first_layers" in frozen else params

    def _matched(self, model_specs: spec.Tree) -> frozenset[str]:
        """Paths that match a pattern. Checks the patterns and ``first_layers``."""
        names = list(_leaves(model_specs))
        matched = _matching("patterns", self.patterns, names)
        stacks = {name[: name.index(f"{LAYERS}/")] for name in names if _in_stack(name)}
        if self.first_layers and not stacks:
            raise ValueError(
                f"first_layers={self.first_layers}: the model has no stack of layers; freeze by pattern, for example "
                "'layer_0/'"
            )
        if not _leaves(self._trained(model_specs, matched)):
            raise ValueError(f"{self} freezes every parameter: nothing is left to train")
        return matched

    def _trained(self, tree: spec.Tree, matched: frozenset[str]) -> spec.Tree:
        return self._trained_layers(_filter(tree, lambda name: name not in matched))

    def _frozen(self, tree: spec.Tree, matched: frozenset[str]) -> spec.Tree:
        frozen = {"matched": self._trained_layers(_filter(tree, lambda name: name in matched))}
        if self.first_layers:
            stacks = _filter(tree, _in_stack)
            frozen["first_layers"] = _slice_layers(stacks, 0, self.first_layers)
        return {name: part for name, part in frozen.items() if part}

    def _trained_layers(self, tree: spec.Tree) -> spec.Tree:
        return _slice_layers(tree, self.first_layers, None) if self.first_layers else tree


# ----------------------------------------------------------------------------------------------------- LoRA


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Trains a low-rank change of some weights (Hu et al. 2021): ``W + (alpha / rank) * A @ B``, with W frozen.

    W may have any number of axes. :func:`matrix_rows` says how it is read as a matrix [in, out]. A [in..., rank] and
    B [rank, out...] keep the axes of W, and also the axis ``layers`` if W is stacked. A fused projection (GPT-2's
    ``qkv``) is one matrix, as in PEFT. A is initialized uniformly on ``+-1 / sqrt(in)`` and B with zeros (PEFT's
    default), so that the merged parameters start equal to the base. For a table or head [vocab, embed], whose rows are
    the vocabulary, A is initialized with zeros and B randomly.

    The trained tree has ``{"lora_a": A, "lora_b": B}`` at the path of each weight. The frozen tree has all base
    parameters except those in ``train``. The merged weights are computed in each step, so the gradients of the full
    weights need memory for a short time. LoRA saves memory for the optimizer's state, and its checkpoints are small.
    The input of the factors has no dropout.
    """

    rank: int
    """Columns of A and rows of B."""
    alpha: float | None = None
    """Scale of ``A @ B``, before the division by ``rank``. None: equal to ``rank``."""
    targets: tuple[str, ...] = (r"attention/(query|value|qkv)/weight$",)
    """Regular expressions that are searched anywhere (``re.search``) in the path of a weight. Biases and other leaves
    that are not matrices are ignored. The default is that of the paper: queries and values."""
    train: tuple[str, ...] = ()
    """Regular expressions for parameters that are trained in full, such as ``"^classifier/"`` for a new head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ValueError(f"alpha={self.alpha} must be a positive number, or None")
        _check_patterns("targets", self.targets)
        _check_patterns("train", self.train)
        if not self.targets:
            raise ValueError("targets=() adapts nothing: name weights, for example targets=('attention/',)")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree.

        Raises:
            ValueError: a pattern matches nothing, or a weight matches both ``targets`` and ``train``.
        """
        in_full = self._trained_in_full(model_specs)
        return _union(self._factor_specs(model_specs), _filter(model_specs, lambda name: name in in_full))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        return self.frozen(model_specs, model_specs)

    def split(self, model_specs: spec.Tree, params: spec.Tree, key: jax.Array) -> tuple[spec.Tree, spec.Tree]:
        """The trained tree, with new factors drawn from ``key``, and the frozen tree.

        The values of the factors of a weight depend neither on the layer layout nor on the other targets.
        """
        in_full = self._trained_in_full(model_specs)
        factors = spec.init(self._factor_specs(model_specs), key)
        trained = _union(factors, _filter(params, lambda name: name in in_full))
        return trained, self.frozen(model_specs, params)

    def frozen(self, model_specs: spec.Tree, params: spec.Tree) -> spec.Tree:
        """The frozen tree of ``params``. :meth:`merge` needs it together with a saved trained tree."""
        in_full = self._trained_in_full(model_specs)
        return _filter(params, lambda name: name not in in_full)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model; each weight has the dtype that it has in ``frozen``."""
        return _union(trained, frozen, self._adapted)

    def target_paths(self, model_specs: spec.Tree) -> dict[str, ArraySpec]:
        """``{path: spec}`` of the weights that get low-rank factors.

        Raises:
            ValueError: a pattern matches no weight.
        """
        weights = {name: leaf for name, leaf in _leaves(model_specs).items() if matrix_rows(name, leaf) is not None}
        return {name: weights[name] for name in sorted(_matching("targets", self.targets, weights))}

    def _trained_in_full(self, model_specs: spec.Tree) -> frozenset[str]:
        in_full = _matching("train", self.train, _leaves(model_specs))
        both = sorted(in_full & set(self.target_paths(model_specs)))
        if both:
            raise ValueError(f"{', '.join(both)} match targets={self.targets} and train={self.train}: choose one")
        return in_full

    def _factor_specs(self, model_specs: spec.Tree) -> spec.Tree:
        targets = self.target_paths(model_specs)
        return _map_leaves(self._factors, _filter(model_specs, lambda name: name in targets))

    def _factors(self, name: str, leaf: ArraySpec) -> dict[str, ArraySpec]:
        rows = matrix_rows(name, leaf)
        assert rows is not None
        stack = 1 if leaf.axes[0] == LAYERS else 0
        shape, axes = leaf.shape, leaf.axes
        row_axes, column_axes = slice(stack, stack + rows), slice(stack + rows, None)
        a_init: Initializer = Uniform(math.prod(shape[row_axes]) ** -0.5)
        b_init: Initializer = ZEROS
        # The rows are the vocabulary: the output of a head, or the one-hot input of a table. So A starts at zero.
        if is_table(name, leaf):
            a_init, b_init = ZEROS, Uniform(math.prod(shape[column_axes]) ** -0.5)
        a_shape, a_axes = (*shape[:stack], *shape[row_axes], self.rank), (*axes[:stack], *axes[row_axes], None)
        b_shape, b_axes = (*shape[:stack], self.rank, *shape[column_axes]), (*axes[:stack], None, *axes[column_axes])
        return {
            LORA_A: ArraySpec(a_shape, a_axes, a_init, decay=True),
            LORA_B: ArraySpec(b_shape, b_axes, b_init, decay=True),
        }

    def _adapted(self, factors: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
        a, b = factors[LORA_A], factors[LORA_B]

        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)

        is_stacked = a.ndim + b.ndim - 2 > weight.ndim
        change = jax.vmap(product)(a, b) if is_stacked else product(a, b)
        return (weight + self.scale * change).astype(weight.dtype)


# ------------------------------------------------------------------------- trees: nested dicts, and tuples of layers


def _check_patterns(field: str, patterns: Any) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{field}={patterns!r} must be a tuple of regular expressions, such as ('embedding',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _matching(field: str, patterns: tuple[str, ...], names: Iterable[str]) -> frozenset[str]:
    """The names that match at least one of the patterns."""
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if re.search(pattern, name)}
        if not matches:
            raise ValueError(f"{field}: {pattern!r} matches none of the paths {', '.join(names)}")
        matched |= matches
    return frozenset(matched)


def _leaves(tree: spec.Tree, prefix: str = "") -> dict[str, Any]:
    """``{path: leaf}``. Paths have no layer numbers, so a per-layer tree gives the leaves of its last layer."""
    if isinstance(tree, tuple):
        return {name: leaf for layer in tree for name, leaf in _leaves(layer, prefix).items()}
    if isinstance(tree, dict):
        parts = [_leaves(child, f"{prefix}/{name}" if prefix else name) for name, child in tree.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: tree}


def _map_leaves(function: Callable[[str, Any], Any], tree: spec.Tree, prefix: str = "") -> spec.Tree:
    """The tree of ``function(path, leaf)``, for paths without layer numbers."""
    if isinstance(tree, tuple):
        return tuple(_map_leaves(function, layer, prefix) for layer in tree)
    if isinstance(tree, dict):
        return {
            name: _map_leaves(function, child, f"{prefix}/{name}" if prefix else name) for name, child in tree.items()
        }
    return function(prefix, tree)


def _in_stack(name: str) -> bool:
    return LAYERS in name.split("/")


def _filter(tree: spec.Tree, keep: Callable[[str], bool], prefix: str = "") -> spec.Tree:
    """The tree of the leaves for whose path ``keep`` is True. Dicts without such leaves are left out; may be ``{}``."""
    if isinstance(tree, tuple):
        layers = tuple(_filter(layer, keep, prefix) for layer in tree)
        return layers if any(layers) else {}
    kept = {}
    for name, child in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(child, dict | tuple):
            part = _filter(child, keep, path)
            if part:
                kept[name] = part
        elif keep(path):
            kept[name] = child
    return kept


def _slice_layers(tree: spec.Tree, start: int, stop: int | None) -> spec.Tree:
    """``tree`` with only the layers [start, stop) of each stack. Stacks that become empty are left out."""
    kept = {}
    for name, child in tree.items():
        if name != LAYERS:
            kept[name] = _slice_layers(child, start, stop) if isinstance(child, dict) else child
            continue
        count = len(child) if isinstance(child, tuple) else jax.tree.leaves(child)[0].shape[0]
        needed = start if stop is None else stop
        if count < needed:
            raise ValueError(f"first_layers={needed}, but a stack of the model has {count} layers")
        if count > start:
            kept[name] = _slice_stack(child, start, stop)
    return {name: child for name, child in kept.items() if not isinstance(child, dict) or child}


def _slice_stack(stack: spec.Tree, start: int, stop: int | None) -> spec.Tree:
    """The layers [start, stop) of one stack of arrays or specs, in either layout."""
    if isinstance(stack, tuple):
        return stack[start:stop]

    def slice_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, ArraySpec):
            return leaf[start:stop]
        count = len(range(leaf.shape[0])[start:stop])
        return dataclasses.replace(leaf, shape=(count, *leaf.shape[1:]))

    return jax.tree.map(slice_leaf, stack)


def _join_layers(first: spec.Tree, rest: spec.Tree) -> spec.Tree:
    """``rest`` with the layers of ``first`` inserted before the layers of ``rest``."""

    def joined(first: spec.Tree, rest: spec.Tree) -> spec.Tree:
        if isinstance(first, tuple):
            return first + rest
        return jax.tree.map(lambda *layers: jnp.concatenate(layers), first, rest)

    tree = dict(rest)
    for name, child in first.items():
        if name not in rest:
            tree[name] = child
        else:
            tree[name] = joined(child, rest[name]) if name == LAYERS else _join_layers(child, rest[name])
    return tree


def _union(left: spec.Tree, right: spec.Tree, combine: Callable[[Any, Any], Any] | None = None) -> spec.Tree:
    """The union of both trees. If one tree has a leaf where the other has an entry, ``combine`` computes the result.

    Raises:
        ValueError: both trees have an entry and ``combine`` is None.
    """
    if isinstance(left, tuple) and isinstance(right, tuple):
        return tuple(_union(*layers, combine) for layers in zip(left, right, strict=True))
    if not (isinstance(left, dict) and isinstance(right, dict)):
        if combine is None:
            raise ValueError("the trained and the frozen tree contain the same parameter: split the parameters again")
        return combine(left, right)
    tree = {**left, **right}
    return tree | {name: _union(left[name], right[name], combine) for name in left.keys() & right.keys()}

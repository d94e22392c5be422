"""Which part of a model's parameters is trained: all but some of them (``Freeze``), or low-rank factors (``LoRA``).

An adaptation splits the parameters of a model into a trained and a frozen tree, and merges the two into ordinary
parameters again. The merge is a pure function, so a loss is differentiated with respect to the trained tree alone, and
any Optax optimizer works on it:

    >>> model = get_model("gpt2-tiny")                                                   # doctest: +SKIP
    >>> lora = LoRA(rank=4)                                                              # doctest: +SKIP
    >>> trained, frozen = lora.split(model.specs, params, jax.random.key(0))             # doctest: +SKIP
    >>> gradient = jax.grad(lambda trained: loss(model, lora.merge(trained, frozen)))    # doctest: +SKIP
    >>> save_pretrained("directory", model, lora.merge(trained, frozen))                 # doctest: +SKIP

Both layer layouts work: ``params`` may be stacked or per-layer (``spec.unstack``), and so may the trained and the
frozen tree. All functions that take ``model_specs`` expect the stacked specs of ``Model.specs``.
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
        """The trained and the frozen tree. ``key`` draws what is new in the trained tree."""
        ...

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model: pure, and differentiable in ``trained``."""
        ...


# ------------------------------------------------------------------------------------------------- matrices


def matrix_rows(name: str, leaf: ArraySpec) -> int | None:
    """Number of leading axes (``layers`` left out) that are the rows of a weight's matrix; None: it is not a matrix.

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
    """Whether a leaf is an embedding table or a head of the vocabulary: its first axis counts entries."""
    last = name.rsplit("/", 1)[-1]
    return last.endswith("embedding") or last in ("head", "cluster_weight") or leaf.axes[:1] == ("vocab",)


# ------------------------------------------------------------------------------------------------- freezing


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Trains everything but some parameters: those whose path matches a pattern, and the first layers of each stack.

    Example:
        >>> Freeze(("embedding",), first_layers=4)     # token tables, position tables, their norm, and four layers
        Freeze(patterns=('embedding',), first_layers=4)

    The trained tree holds the remaining leaves at their paths; its stacks lack the first layers. The frozen tree is
    ``{"matched": leaves that match, "first_layers": the first layers}``, either absent when empty.
    """

    patterns: tuple[str, ...] = ()
    """Regular expressions, found anywhere in a path (``re.search``) such as ``layers/attention/query/weight``; ``^``
    and ``$`` anchor them. The number of a layer is not part of a path."""
    first_layers: int = 0
    """The first layers of each stack (``layers``) to freeze, the ones next to the input."""

    def __post_init__(self) -> None:
        _check_patterns("patterns", self.patterns)
        if self.first_layers < 0:
            raise ValueError(f"first_layers={self.first_layers} must not be negative")
        if not self.patterns and not self.first_layers:
            raise ValueError("Freeze() freezes nothing: give patterns or first_layers, or train without an adaptation")

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree.

        Raises:
            ValueError: a pattern matches nothing, a stack has fewer layers than ``first_layers``, or nothing is left.
        """
        return self._trained(model_specs, self._matched(model_specs))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        return self._frozen(model_specs, self._matched(model_specs))

    def split(
        self, model_specs: spec.Tree, params: spec.Tree, key: jax.Array | None = None
    ) -> tuple[spec.Tree, spec.Tree]:
        """The trained and the frozen part of ``params``. Needs no ``key``."""
        matched = self._matched(model_specs)
        return self._trained(params, matched), self._frozen(params, matched)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model."""
        params = _union(trained, frozen.get("matched", {}))
        return _join_layers(frozen["first_layers"], params) if "first_layers" in frozen else params

    def _matched(self, model_specs: spec.Tree) -> frozenset[str]:
        """Paths that match a pattern, after the checks."""
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
        return self._above(_filter(tree, lambda name: name not in matched))

    def _frozen(self, tree: spec.Tree, matched: frozenset[str]) -> spec.Tree:
        frozen = {"matched": self._above(_filter(tree, lambda name: name in matched))}
        if self.first_layers:
            stacks = _filter(tree, _in_stack)
            frozen["first_layers"] = _slice_layers(stacks, 0, self.first_layers)
        return {name: part for name, part in frozen.items() if part}

    def _above(self, tree: spec.Tree) -> spec.Tree:
        return _slice_layers(tree, self.first_layers, None) if self.first_layers else tree


# ----------------------------------------------------------------------------------------------------- LoRA


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Trains a low-rank change of some weights (Hu et al. 2021): ``W + (alpha / rank) * A @ B``, with W frozen.

    W may have any number of axes. It is read as the matrix [in, out] of :func:`matrix_rows`; A [in..., rank] and
    B [rank, out...] keep the axes of W, and the axis ``layers`` where W is stacked. A fused projection (GPT-2's
    ``qkv``) is one matrix, as in PEFT. A starts uniform on ``+-1 / sqrt(in)`` and B at zero (PEFT's default), so that
    the merged parameters start equal to the base. For a table or head [vocab, embed], whose rows are the vocabulary,
    A starts at zero and B random.

    The trained tree has ``{"lora_a": A, "lora_b": B}`` at the path of each weight; the frozen tree has all base
    parameters but those in ``train``. Merged weights are computed in each step, so memory for gradients of the whole
    weights is needed for a moment; what LoRA saves is the optimizer's state and the size of checkpoints. There is no
    dropout on the input of the factors.
    """

    rank: int
    """Columns of A and rows of B."""
    alpha: float | None = None
    """Scale of the change, divided by ``rank``. None: equal to ``rank``."""
    targets: tuple[str, ...] = (r"attention/(query|value|qkv)/weight$",)
    """Regular expressions, found anywhere in the path of a weight (``re.search``). Paths of biases and other leaves
    that are not matrices are ignored. The default is that of the paper: queries and values."""
    train: tuple[str, ...] = ()
    """Regular expressions of parameters that are trained in full, such as ``"^classifier/"`` for a new head."""

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
            ValueError: a pattern matches nothing, or a weight is in ``targets`` and in ``train``.
        """
        whole = self._trained_whole(model_specs)
        return _union(self._factor_specs(model_specs), _filter(model_specs, lambda name: name in whole))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        return self.frozen(model_specs, model_specs)

    def split(self, model_specs: spec.Tree, params: spec.Tree, key: jax.Array) -> tuple[spec.Tree, spec.Tree]:
        """The trained tree, with new factors drawn from ``key``, and the frozen one.

        The factors depend neither on the layout of ``params`` nor on the other targets.
        """
        whole = self._trained_whole(model_specs)
        factors = spec.init(self._factor_specs(model_specs), key)
        if not same_structure(params, model_specs):
            factors = spec.unstack(factors)
        trained = _union(factors, _filter(params, lambda name: name in whole))
        return trained, self.frozen(model_specs, params)

    def frozen(self, model_specs: spec.Tree, params: spec.Tree) -> spec.Tree:
        """The frozen tree of ``params``: what a trained tree that was saved needs beside it."""
        whole = self._trained_whole(model_specs)
        return _filter(params, lambda name: name not in whole)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model, each weight in the dtype that it has in ``frozen``."""
        return _union(trained, frozen, self._adapted)

    def target_paths(self, model_specs: spec.Tree) -> dict[str, ArraySpec]:
        """``{path: spec}`` of the weights that get factors.

        Raises:
            ValueError: a pattern matches no weight.
        """
        weights = {name: leaf for name, leaf in _leaves(model_specs).items() if matrix_rows(name, leaf) is not None}
        return {name: weights[name] for name in sorted(_matching("targets", self.targets, weights))}

    def _trained_whole(self, model_specs: spec.Tree) -> frozenset[str]:
        whole = _matching("train", self.train, _leaves(model_specs))
        both = sorted(whole & set(self.target_paths(model_specs)))
        if both:
            raise ValueError(f"{', '.join(both)} match targets={self.targets} and train={self.train}: choose one")
        return whole

    def _factor_specs(self, model_specs: spec.Tree) -> spec.Tree:
        tree: dict[str, Any] = {}
        for name, leaf in self.target_paths(model_specs).items():
            node = tree
            for part in name.split("/"):
                node = node.setdefault(part, {})
            node.update(self._factors(name, leaf))
        return tree

    def _factors(self, name: str, leaf: ArraySpec) -> dict[str, ArraySpec]:
        rows = matrix_rows(name, leaf)
        assert rows is not None
        stack = 1 if leaf.axes[0] == LAYERS else 0
        shape, axes = leaf.shape, leaf.axes
        left, right = slice(stack, stack + rows), slice(stack + rows, None)
        a_init: Initializer = Uniform(math.prod(shape[left]) ** -0.5)
        b_init: Initializer = ZEROS
        if is_table(name, leaf):  # the vocabulary is the output of a head, and one-hot as the input of a table
            a_init, b_init = ZEROS, Uniform(math.prod(shape[right]) ** -0.5)
        a_shape, a_axes = (*shape[:stack], *shape[left], self.rank), (*axes[:stack], *axes[left], None)
        b_shape, b_axes = (*shape[:stack], self.rank, *shape[right]), (*axes[:stack], None, *axes[right])
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


def same_structure(one: spec.Tree, two: spec.Tree) -> bool:
    """Whether two trees have the same containers and keys; stacked and per-layer trees do not."""
    first: Any = jax.tree.structure(one)
    return bool(first == jax.tree.structure(two))


def _check_patterns(field: str, patterns: Any) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{field}={patterns!r} must be a tuple of regular expressions, such as ('embedding',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _matching(field: str, patterns: tuple[str, ...], names: Iterable[str]) -> frozenset[str]:
    """The names in which some pattern is found."""
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if re.search(pattern, name)}
        if not matches:
            raise ValueError(f"{field}: {pattern!r} matches none of the paths {', '.join(names)}")
        found |= matches
    return frozenset(found)


def _leaves(tree: spec.Tree, prefix: str = "") -> dict[str, Any]:
    """``{path: leaf}`` without numbers of layers; for per-layer trees, of the last layer."""
    if isinstance(tree, tuple):
        return {name: leaf for layer in tree for name, leaf in _leaves(layer, prefix).items()}
    if isinstance(tree, dict):
        parts = [_leaves(child, f"{prefix}/{name}" if prefix else name) for name, child in tree.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: tree}


def _in_stack(name: str) -> bool:
    return LAYERS in name.split("/")


def _filter(tree: spec.Tree, keep: Callable[[str], bool], prefix: str = "") -> spec.Tree:
    """The leaves whose path is kept; ``{}`` where none is, without empty dicts inside."""
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
    """``tree`` with only the layers [start, stop) of each stack; stacks of which none is left are absent."""
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
            kept[name] = _cut(child, start, stop)
    return {name: child for name, child in kept.items() if not isinstance(child, dict) or child}


def _cut(stack: spec.Tree, start: int, stop: int | None) -> spec.Tree:
    """The layers [start, stop) of one stack of arrays or specs, in either layout."""
    if isinstance(stack, tuple):
        return stack[start:stop]

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, ArraySpec):
            return leaf[start:stop]
        count = len(range(leaf.shape[0])[start:stop])
        return dataclasses.replace(leaf, shape=(count, *leaf.shape[1:]))

    return jax.tree.map(cut, stack)


def _join_layers(first: spec.Tree, rest: spec.Tree) -> spec.Tree:
    """``rest`` with the layers of ``first`` before its own."""

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


def _union(one: spec.Tree, two: spec.Tree, combine: Callable[[Any, Any], Any] | None = None) -> spec.Tree:
    """The leaves of both trees. Where one has a leaf and the other anything, ``combine`` makes the result."""
    if isinstance(one, tuple) and isinstance(two, tuple):
        return tuple(_union(*layers, combine) for layers in zip(one, two, strict=True))
    if not (isinstance(one, dict) and isinstance(two, dict)):
        if combine is None:
            raise ValueError("the trained and the frozen tree hold the same parameter: split them again")
        return combine(one, two)
    tree = {**one, **two}
    return tree | {name: _union(one[name], two[name], combine) for name in one.keys() & two.keys()}

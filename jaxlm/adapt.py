"""Adaptations: train only a part of a model's parameters (``Freeze``), or low-rank changes of weights (``LoRA``).

An adaptation splits the parameters of a model into a trained and a frozen tree, and merges both trees into parameters
of the model again. The merge is a pure function, so a loss can be differentiated with respect to the trained tree
alone. Any Optax optimizer can update the trained tree.

    >>> model = get_model("gpt2-tiny")                                                   # doctest: +SKIP
    >>> lora = LoRA(rank=4)                                                              # doctest: +SKIP
    >>> trained, frozen = lora.split(model.specs, params, jax.random.key(0))             # doctest: +SKIP
    >>> gradient = jax.grad(lambda tree: loss(model, lora.merge(tree, frozen)))(trained) # doctest: +SKIP
    >>> save_pretrained("directory", model, lora.merge(trained, frozen))                 # doctest: +SKIP

Regular expressions select parameters by their paths. A path consists of the keys of a parameter, joined by ``/``, such
as ``layers/attention/query/weight``. Layers may be stacked, or a tuple with one tree per layer (``spec.layers``). In
both layouts, a path contains no number after ``layers``, so it denotes the weight of every layer. In families whose
layers have the keys ``layer_0``, ``layer_1``, ..., the paths contain these keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.config import check_min
from jaxlm.spec import EXPERT, LAYERS, ZEROS, ArraySpec, Initializer, Params, Uniform

LORA_A, LORA_B = "lora_a", "lora_b"
"""Keys of the two factors A and B, which the trained tree of :class:`LoRA` has at the path of an adapted weight."""


@runtime_checkable
class Adaptation(Protocol):
    """The protocol of adaptations, which split parameters into a trained and a frozen tree.

    Implementations are hashable frozen dataclasses.
    """

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree, for the optimizer, the shardings and the checkpoints."""

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""

    def split(self, model_specs: spec.Tree, params: Params, key: jax.Array) -> tuple[spec.Tree, spec.Tree]:
        """The trained and the frozen tree. ``key`` initializes parameters that ``params`` does not contain."""

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model. The function is pure and differentiable in ``trained``."""

    def overwrite(self, trained: spec.Tree, frozen: spec.Tree, values: spec.Tree) -> tuple[spec.Tree, spec.Tree]:
        """Both trees with new values of some parameters, such as the running statistics of batch normalization.

        Args:
            values: new values at the paths of their parameters, in the layer layout of the model.

        Raises:
            ValueError: a value has another shape or structure than its parameter.
        """


# ------------------------------------------------------------------------------------------------- matrices


def num_row_axes(path: str, leaf: ArraySpec) -> int | None:
    """Number of leading axes (after the stack axes) that form the rows of a matrix; None if the leaf is not a matrix.

    A leaf with two or more axes after the stack axes is a matrix if the last key of its path is ``weight``, begins with
    ``weight_``, or is ``direction`` (weight normalization). Embedding tables and output heads (:func:`is_table`) and
    the factors of :class:`LoRA` are matrices too. Biases and scales are not matrices.

    The rows of a weight are its inputs: one axis, or two axes for ``[heads, kv, embed]`` and for the kernel of a
    convolution ``[width, in, out]``. The rows of a table or head are its first axis. The rows of ``lora_a`` are all
    axes except the last. The rows of ``lora_b`` are its first axis.

    Example:
        >>> num_row_axes("attention/output/weight", ArraySpec((4, 8, 32), ("heads", "kv", "embed")))
        2
        >>> num_row_axes("attention/query/bias", ArraySpec((4, 8), ("heads", "kv")))
    """
    axes = leaf.axes[num_stack_axes(leaf) :]
    last_key = path.rsplit("/", 1)[-1]
    if len(axes) < 2:
        return None
    if last_key == LORA_A:
        return len(axes) - 1
    if last_key == LORA_B or is_table(path, leaf):
        return 1
    if last_key == "weight" or last_key.startswith("weight_") or last_key == "direction":
        is_kernel = axes[0] is None and len(axes) > 2 and axes[1] not in (None, "heads")
        return 2 if is_kernel or axes[:2] == ("heads", "kv") else 1
    return None


def num_stack_axes(leaf: ArraySpec) -> int:
    """Number of leading stack axes: ``layers``, ``expert``, and the axis ``heads`` of a block-diagonal matrix.

    Each index of a stack axis has its own matrix. The axes of a block-diagonal matrix are ``heads`` (the blocks), an
    unnamed input axis, and one or more output axes.
    """
    num_axes = int(leaf.is_stacked)
    if leaf.axes[num_axes : num_axes + 1] == (EXPERT,):
        num_axes += 1
    is_block_diagonal = len(leaf.axes) - num_axes > 2 and leaf.axes[num_axes : num_axes + 2] == ("heads", None)
    return num_axes + 1 if is_block_diagonal else num_axes


def is_table(path: str, leaf: ArraySpec) -> bool:
    """Whether a leaf is an embedding table or an output head (first axis: vocabulary, positions or token types).

    The result is also True for the bias [vocab] of an output head.
    """
    last_key = path.rsplit("/", 1)[-1]
    return last_key.endswith("embedding") or last_key in ("head", "cluster_weight") or leaf.axes[:1] == ("vocab",)


# ------------------------------------------------------------------------------------------------- freezing

MATCHED_KEY = "matched"
"""Key of the frozen tree of :class:`Freeze`. Its value has the parameters that match a pattern, without the first
layers of each stack."""


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Freezes the first layers of each stack, and the parameters whose path matches a pattern; trains all others.

    Example:
        >>> Freeze(("embedding",), first_layers=4)     # paths with "embedding", and the first four layers
        Freeze(patterns=('embedding',), first_layers=4)

    The trained tree has the remaining leaves at their paths; its stacks do not contain the first layers. The frozen
    tree is ``{"first_layers": first layers of each stack, "matched": other leaves that match a pattern}``, without
    empty entries. A ``Trainer`` updates the running statistics of batch normalization even if they are frozen, because
    the loss returns their new values (:meth:`Adaptation.overwrite`).

    Raises:
        TypeError: ``patterns`` is not a tuple of strings.
        ValueError: a pattern is not a regular expression, ``first_layers`` is negative, or neither field is set.
    """

    patterns: tuple[str, ...] = ()
    """Regular expressions that are searched anywhere (``re.search``) in a path such as
    ``layers/attention/query/weight``; ``^`` and ``$`` anchor them. A path contains no number after ``layers``."""
    first_layers: int = 0
    """Number of layers to freeze at the start (next to the input) of each stack (``layers``)."""

    def __post_init__(self) -> None:
        _check_patterns("patterns", self.patterns)
        check_min(0, first_layers=self.first_layers)
        if not self.patterns and not self.first_layers:
            raise ValueError("Freeze() freezes nothing: give patterns or first_layers, or train without an adaptation")

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree.

        Raises:
            ValueError: a pattern matches no path; ``first_layers`` is above 0 and the model has no stack; a stack has
                fewer than ``first_layers`` layers; or no parameter is left to train.
        """
        return self._select_trained(model_specs, self._matched_paths(model_specs))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree. The errors are the same as in :meth:`specs`."""
        return self._select_frozen(model_specs, self._matched_paths(model_specs))

    def split(
        self, model_specs: spec.Tree, params: Params, key: jax.Array | None = None
    ) -> tuple[spec.Tree, spec.Tree]:
        """The trained and the frozen tree of ``params``. ``key`` is not used. The errors are as in :meth:`specs`."""
        matched = self._matched_paths(model_specs)
        return self._select_trained(params, matched), self._select_frozen(params, matched)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model."""
        params = _union(trained, frozen.get(MATCHED_KEY, {}))
        return _join_layers(frozen["first_layers"], params) if "first_layers" in frozen else params

    def overwrite(self, trained: spec.Tree, frozen: spec.Tree, values: spec.Tree) -> tuple[spec.Tree, spec.Tree]:
        """Both trees with new values of some parameters; see :meth:`Adaptation.overwrite`."""
        new_trained = self._without_first_layers(values)
        new_frozen = self._select_frozen(values, frozenset(_leaves(values)))
        return overwrite(trained, new_trained), overwrite(frozen, new_frozen)

    def _matched_paths(self, model_specs: spec.Tree) -> frozenset[str]:
        """The paths that match a pattern, after a check of the patterns and ``first_layers``."""
        paths = list(_leaves(model_specs))
        matched = _matching_paths("patterns", self.patterns, paths)
        if self.first_layers and not any(map(_in_stack, paths)):
            raise ValueError(
                f"first_layers={self.first_layers}: the model has no stack of layers; freeze by pattern, for example "
                "'layer_0/'"
            )
        if not _leaves(self._select_trained(model_specs, matched)):
            raise ValueError(f"{self} freezes every parameter: nothing is left to train")
        return matched

    def _select_trained(self, tree: spec.Tree, matched: frozenset[str]) -> spec.Tree:
        return self._without_first_layers(_filter(tree, lambda path: path not in matched))

    def _select_frozen(self, tree: spec.Tree, matched: frozenset[str]) -> spec.Tree:
        frozen = {MATCHED_KEY: self._without_first_layers(_filter(tree, lambda path: path in matched))}
        if self.first_layers:
            stacks = _filter(tree, _in_stack)
            frozen["first_layers"] = _slice_layers(stacks, 0, self.first_layers)
        return {name: subtree for name, subtree in frozen.items() if subtree}

    def _without_first_layers(self, tree: spec.Tree) -> spec.Tree:
        return _slice_layers(tree, self.first_layers, None) if self.first_layers else tree


# ----------------------------------------------------------------------------------------------------- LoRA


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Trains low-rank changes of some weights (Hu et al. 2021): ``W + (alpha / rank) * A @ B``, where W is frozen.

    W may have any number of axes. :func:`num_row_axes` defines which of them are the rows of the matrix [in, out].
    A [in..., rank] has the row axes of W, and B [rank, out...] has the other axes. Both factors also have the stack
    axes of W (:func:`num_stack_axes`). A fused projection (GPT-2's ``qkv``) is one matrix, as in PEFT. A is initialized
    uniformly between ``-1 / sqrt(in)`` and ``1 / sqrt(in)``, and B with zeros (PEFT's default). So the merged
    parameters are initially equal to the parameters before the split. For a table or head [vocab, embed], whose rows
    are the vocabulary, A is initialized with zeros, and B uniformly between ``-1 / sqrt(embed)`` and
    ``1 / sqrt(embed)``.

    The trained tree has ``{"lora_a": A, "lora_b": B}`` at the path of each adapted weight, and the parameters that
    match ``full_training_patterns`` at their paths. The frozen tree has all other parameters, including each W. Each
    training step computes the merged weights and the gradients of the merged weights. Each of the two temporarily needs
    as much memory as the adapted weights. Without fully trained parameters, the optimizer state and the trained tree
    are small. A checkpoint of ``train`` also contains the frozen parameters, so that a run can be resumed without other
    files. No dropout is applied to the input of the factors.

    Raises:
        TypeError: ``targets`` or ``full_training_patterns`` is not a tuple of strings.
        ValueError: ``rank`` is below 1, ``alpha`` is not positive and finite, ``targets`` is empty, or a pattern is not
            a regular expression.
    """

    rank: int
    """Number of columns of A and of rows of B."""
    alpha: float | None = None
    """Numerator of the scale ``alpha / rank``, by which ``A @ B`` is multiplied. None: equal to ``rank``."""
    targets: tuple[str, ...] = (r"attention/(query|value|qkv)/weight$",)
    """Regular expressions that are searched anywhere (``re.search``) in the path of a weight. Biases and other leaves
    that are not matrices are ignored. By default, the query and value projections are adapted, as in the paper; in a
    fused projection ``qkv``, the key projection is adapted too."""
    full_training_patterns: tuple[str, ...] = ()
    """Regular expressions for parameters that are trained in full, such as ``"^classifier/"`` for a new head."""

    def __post_init__(self) -> None:
        check_min(1, rank=self.rank)
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ValueError(f"alpha={self.alpha} must be a positive number, or None")
        _check_patterns("targets", self.targets)
        _check_patterns("full_training_patterns", self.full_training_patterns)
        if not self.targets:
            raise ValueError("targets=() adapts nothing: name weights, for example targets=('attention/',)")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the trained tree.

        Raises:
            ValueError: a pattern in ``targets`` matches no matrix, a pattern in ``full_training_patterns`` matches no
                parameter, or a weight matches patterns of both.
        """
        fully_trained = self._fully_trained_paths(model_specs)
        return _union(self._factor_specs(model_specs), _filter(model_specs, lambda path: path in fully_trained))

    def frozen_specs(self, model_specs: spec.Tree) -> spec.Tree:
        """Specs of the frozen tree."""
        return self.frozen(model_specs, model_specs)

    def split(self, model_specs: spec.Tree, params: Params, key: jax.Array) -> tuple[spec.Tree, spec.Tree]:
        """The trained tree, with new factors drawn from ``key``, and the frozen tree.

        The values of the factors of a weight depend neither on the layer layout nor on the other targets.
        """
        fully_trained = self._fully_trained_paths(model_specs)
        factors = spec.init(self._factor_specs(model_specs), key)
        trained = _union(factors, _filter(params, lambda path: path in fully_trained))
        return trained, self.frozen(model_specs, params)

    def frozen(self, model_specs: spec.Tree, params: Params) -> spec.Tree:
        """The frozen tree of ``params``. :meth:`merge` needs it together with a saved trained tree."""
        fully_trained = self._fully_trained_paths(model_specs)
        return _filter(params, lambda path: path not in fully_trained)

    def merge(self, trained: spec.Tree, frozen: spec.Tree) -> spec.Tree:
        """Parameters of the model; each adapted weight has the dtype that it has in ``frozen``.

        Raises:
            ValueError: ``frozen`` contains a parameter that is trained in full.
        """
        return _union(trained, frozen, self._adapted_weight)

    def overwrite(self, trained: spec.Tree, frozen: spec.Tree, values: spec.Tree) -> tuple[spec.Tree, spec.Tree]:
        """Both trees with new values of some parameters; see :meth:`Adaptation.overwrite`."""
        return overwrite(trained, values), overwrite(frozen, values)

    def target_paths(self, model_specs: spec.Tree) -> dict[str, ArraySpec]:
        """``{path: spec}`` of the weights that get low-rank factors.

        Raises:
            ValueError: a pattern in ``targets`` matches no matrix.
        """
        weights = {path: leaf for path, leaf in _leaves(model_specs).items() if num_row_axes(path, leaf) is not None}
        return {path: weights[path] for path in sorted(_matching_paths("targets", self.targets, weights))}

    def _fully_trained_paths(self, model_specs: spec.Tree) -> frozenset[str]:
        fully_trained = _matching_paths("full_training_patterns", self.full_training_patterns, _leaves(model_specs))
        in_both = sorted(fully_trained & set(self.target_paths(model_specs)))
        if in_both:
            raise ValueError(
                f"{', '.join(in_both)} match targets={self.targets} and full_training_patterns="
                f"{self.full_training_patterns}: choose one"
            )
        return fully_trained

    def _factor_specs(self, model_specs: spec.Tree) -> spec.Tree:
        targets = self.target_paths(model_specs)

        def factor_specs(keys: Any, leaf: ArraySpec) -> dict[str, ArraySpec]:
            path, shape, axes = spec.path_name(keys), leaf.shape, leaf.axes
            rows = num_row_axes(path, leaf)
            assert rows is not None
            first_row = num_stack_axes(leaf)
            first_column = first_row + rows
            a_init: Initializer = Uniform(math.prod(shape[first_row:first_column]) ** -0.5)
            b_init: Initializer = ZEROS
            # For a table or head, A starts at zero and B is random, as for the embeddings of PEFT.
            if is_table(path, leaf):
                a_init, b_init = ZEROS, Uniform(math.prod(shape[first_column:]) ** -0.5)
            b_shape = (*shape[:first_row], self.rank, *shape[first_column:])
            b_axes = (*axes[:first_row], None, *axes[first_column:])
            return {
                LORA_A: ArraySpec((*shape[:first_column], self.rank), (*axes[:first_column], None), a_init, decay=True),
                LORA_B: ArraySpec(b_shape, b_axes, b_init, decay=True),
            }

        weights = _filter(model_specs, lambda path: path in targets)
        return jax.tree_util.tree_map_with_path(factor_specs, weights)

    def _adapted_weight(self, factors: Any, weight: jax.Array) -> jax.Array:
        if not isinstance(factors, dict):  # a parameter that is trained in full
            raise ValueError(
                "the trained and the frozen tree contain the same parameter: merge the trained tree with "
                "lora.frozen(model.specs, params) instead of params"
            )
        a, b = factors[LORA_A], factors[LORA_B]
        product: Callable[..., jax.Array] = functools.partial(
            jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST
        )
        # Each factor has the stack axes and one axis of size ``rank``, so this difference is the number of stack axes.
        for _ in range(a.ndim + b.ndim - 2 - weight.ndim):
            product = jax.vmap(product)
        return (weight + self.scale * product(a, b)).astype(weight.dtype)


# ------------------------------------------------------------------------- trees: nested dicts, and tuples of layers


def overwrite(tree: spec.Tree, values: spec.Tree, path: str = "") -> spec.Tree:
    """``tree`` with the values of ``values`` at the paths that both have.

    Raises:
        ValueError: a value has another shape or structure than the entry of ``tree`` at the same path.
    """
    if isinstance(tree, tuple) and isinstance(values, tuple) and len(tree) == len(values):
        return tuple(overwrite(*layers, path) for layers in zip(tree, values, strict=True))
    if isinstance(tree, dict) and isinstance(values, dict):
        new = {
            name: overwrite(tree[name], values[name], f"{path}/{name}" if path else name)
            for name in tree.keys() & values.keys()
        }
        return {**tree, **new}
    if isinstance(tree, dict | tuple) or isinstance(values, dict | tuple):
        raise ValueError(f"the new value of {path} has another structure than the parameter")
    if jnp.shape(values) != jnp.shape(tree):
        raise ValueError(
            f"the new value of {path} has the shape {jnp.shape(values)}: it must have the shape {jnp.shape(tree)}"
        )
    return values


def _check_patterns(field: str, patterns: Any) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{field}={patterns!r} must be a tuple of regular expressions, such as ('embedding',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _matching_paths(field: str, patterns: tuple[str, ...], paths: Iterable[str]) -> frozenset[str]:
    """The ``paths`` that match at least one of the patterns. ``field`` names the patterns in errors."""
    paths = list(paths)
    matched: set[str] = set()
    for pattern in patterns:
        matches = {path for path in paths if re.search(pattern, path)}
        if not matches:
            raise ValueError(f"{field}: {pattern!r} matches none of the paths {', '.join(paths)}")
        matched |= matches
    return frozenset(matched)


def _leaves(tree: spec.Tree) -> dict[str, Any]:
    """``{path: leaf}``. Paths have no layer numbers.

    If several layers have a leaf at the same path, only the leaf of the last layer is returned.
    """
    return {spec.split_layer(name)[0]: leaf for name, leaf in spec.flatten(tree).items()}


def _in_stack(path: str) -> bool:
    return LAYERS in path.split("/")


def _filter(tree: spec.Tree, keep: Callable[[str], bool], prefix: str = "") -> spec.Tree:
    """``tree`` with only the leaves whose path satisfies ``keep``. Empty dicts are removed."""
    if isinstance(tree, tuple):
        layers = tuple(_filter(layer, keep, prefix) for layer in tree)
        return layers if any(layers) else {}
    filtered = {}
    for name, child in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(child, dict | tuple):
            subtree = _filter(child, keep, path)
            if subtree:
                filtered[name] = subtree
        elif keep(path):
            filtered[name] = child
    return filtered


def _slice_layers(tree: spec.Tree, start: int, stop: int | None) -> spec.Tree:
    """``tree`` with only the layers [start, stop) of each stack. Stacks that become empty are left out."""

    def slice_leaf(leaf: Any) -> Any:
        if isinstance(leaf, ArraySpec):
            return dataclasses.replace(leaf, shape=(len(range(leaf.shape[0])[start:stop]), *leaf.shape[1:]))
        return leaf[start:stop]

    def slice_stack(stack: spec.Tree) -> spec.Tree:
        count = spec.num_layers(stack)
        needed = start if stop is None else stop
        if count < needed:
            raise ValueError(f"first_layers={needed}, but a stack of the model has {count} layers")
        if isinstance(stack, tuple):
            return stack[start:stop]
        return jax.tree.map(slice_leaf, stack) if count > start else {}

    return _filter(spec.map_layers(slice_stack, tree), lambda path: True)  # removes empty stacks


def _join_layers(first: spec.Tree, rest: spec.Tree) -> spec.Tree:
    """``rest`` with the layers of ``first`` inserted before the layers of ``rest``."""
    tree = dict(rest)
    for name, child in first.items():
        if name not in rest:
            tree[name] = child
        elif name != LAYERS:
            tree[name] = _join_layers(child, rest[name])
        elif isinstance(child, tuple):
            tree[name] = child + rest[name]
        else:
            tree[name] = jax.tree.map(lambda *layers: jnp.concatenate(layers), child, rest[name])
    return tree


def _union(left: spec.Tree, right: spec.Tree, combine: Callable[[Any, Any], Any] | None = None) -> spec.Tree:
    """The union of both trees.

    If both trees have an entry at a path, and at least one of the two is a leaf, the result has ``combine(left entry,
    right entry)`` at this path.

    Raises:
        ValueError: both trees have such an entry and ``combine`` is None.
    """
    if isinstance(left, tuple) and isinstance(right, tuple):
        return tuple(_union(*layers, combine) for layers in zip(left, right, strict=True))
    if not (isinstance(left, dict) and isinstance(right, dict)):
        if combine is None:
            raise ValueError("the trained and the frozen tree contain the same parameter: split the parameters again")
        return combine(left, right)
    tree = {**left, **right}
    return tree | {name: _union(left[name], right[name], combine) for name in left.keys() & right.keys()}

"""Optimizers and learning-rate schedules, from Optax. ``jaxlm.training.recipes`` has those of the papers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm import spec
from jaxlm.adapt import is_table, matrix_rows, same_structure
from jaxlm.config import check_finite
from jaxlm.models.heads import HEADS
from jaxlm.sharding import Sharding
from jaxlm.spec import LAYERS, ArraySpec
from jaxlm.training.nt_asgd import averaging

OptimizerName = Literal["adamw", "adafactor", "muon", "sgd", "nt_asgd", "adadelta"]
Schedule = Literal["cosine", "linear", "constant", "inverse_square_root"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with warm-up, decay of the learning rate, weight decay and clipping. Default: AdamW with cosine."""

    name: OptimizerName = "adamw"
    """adamw: Loshchilov & Hutter 2019. adafactor: Shazeer & Stern 2018, updates scaled by the size of the parameters,
    no momentum. muon: Jordan 2024 for the matrices inside the model, AdamW for the rest. sgd: with momentum beta1.
    nt_asgd: sgd that keeps the mean of the parameters (Merity et al. 2017). adadelta: Zeiler 2012."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    hold_steps: int = 0
    """Steps at the peak after the warm-up, before the learning rate falls."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak (cosine and linear)."""
    beta1: float = 0.9
    """Decay of the mean of gradients (adamw; muon outside its matrices); the momentum of sgd and nt_asgd."""
    beta2: float = 0.99
    """Decay of the mean of squared gradients (adamw; muon outside its matrices); rho of adadelta."""
    nesterov: bool = False
    """Nesterov momentum (sgd and nt_asgd)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment (adamw; muon outside its matrices; adadelta)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on weights and embeddings (not on biases and norm scales)."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below it: a head has 1, the top layer ``layer_decay``,
    embeddings the smallest. None: all parameters have the same learning rate."""

    def __post_init__(self) -> None:
        for name, words in (("name", OptimizerName), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose from {', '.join(get_args(words))}")
        check_finite(self)
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction={self.final_fraction} must be in [0, 1]")
        if self.warmup_steps < 0 or self.weight_decay < 0.0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and weight_decay={self.weight_decay} must not be negative"
            )
        if self.hold_steps < 0:
            raise ValueError(f"hold_steps={self.hold_steps} must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0.0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or None for no clipping")
        if self.nesterov and self.name not in ("sgd", "nt_asgd"):
            raise ValueError(f"nesterov=True is for sgd and nt_asgd, and name={self.name!r} has no such momentum")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1], or None")


# ------------------------------------------------------------------------------------------------ schedules


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The schedule: a function of the number of updates made so far.

    ``inverse_square_root`` (Vaswani et al. 2017, section 5.3) is ``peak * sqrt(k / n)`` after the first ``k`` steps of
    warm-up and hold. It does not depend on ``steps``, and the hold may be longer than the training.

    Raises:
        ValueError: the warm-up (with cosine or linear, warm-up and hold together) is as long as the training, or
            ``inverse_square_root`` has neither.
    """
    peak, last, begin = config.learning_rate, config.learning_rate * config.final_fraction, config.warmup_steps
    if begin >= steps:
        raise ValueError(f"warmup_steps={begin} must be fewer than the {steps} steps of the training")
    fall_at = begin + config.hold_steps
    falls = config.schedule in ("cosine", "linear")
    if falls and fall_at >= steps:
        raise ValueError(
            f"warmup_steps={begin} and hold_steps={config.hold_steps} must be fewer than the {steps} steps of the "
            "training"
        )
    if config.schedule == "inverse_square_root" and fall_at == 0:
        raise ValueError("schedule='inverse_square_root' falls with the length of warm-up and hold: set warmup_steps")
    fall = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - fall_at, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, last, steps - fall_at),
        "constant": lambda: optax.constant_schedule(peak),
        "inverse_square_root": lambda: lambda after: peak * jnp.sqrt(fall_at / (fall_at + jnp.maximum(after, 0))),
    }[config.schedule]()
    # From 1/n and not from 0: the first update should move the weights.
    rise = optax.linear_schedule(peak / (begin + 1), peak, begin)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [begin, fall_at])


# ----------------------------------------------------------------------------------------------- optimizers


class Entrywise(optax.GradientTransformationExtraArgs):
    """A transformation whose updates do not depend on the layer layout, so that layers may be unstacked in training.

    For stacked parameters it computes what it computes for per-layer ones, and ``spec.unstack`` of its state is the
    state for ``spec.unstack`` of the parameters. All optimizers of :func:`make_optimizer` are such. Plain
    ``optax.adafactor``, ``optax.lamb`` and ``optax.contrib.muon`` are not: they read whole arrays.
    """

    __slots__ = ()


def make_optimizer(config: OptimizerConfig, specs: spec.Tree, steps: int) -> Entrywise:
    """Clipping, the optimizer, weight decay where ``specs`` say so, and the schedule over ``steps`` updates.

    Args:
        specs: stacked specs of the trained parameters: ``model.specs``, or ``adaptation.specs(model.specs)``.
        steps: updates of the whole training.

    With ``nt_asgd`` the state holds the mean of the parameters: see ``jaxlm.training.nt_asgd`` for its start.

    Raises:
        ValueError: a schedule that does not fit ``steps``, or ``layer_decay`` for a model without layers.
    """
    clip = [] if config.clip_norm is None else [_clip_by_global_norm(config.clip_norm)]
    decays = spec.decay_mask(specs)
    by_layer = [] if config.layer_decay is None else [_scale_by_tree(layer_rates(specs, config.layer_decay))]
    chain = optax.chain(
        *clip,
        _core(config, specs),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: spec.for_each_layer(decays, params)),
        *by_layer,
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        *([averaging()] if config.name == "nt_asgd" else []),
    )
    return Entrywise(chain.init, chain.update)


def optimizer_sharding(optimizer: optax.GradientTransformation, specs: spec.Tree, sharding: Sharding) -> Any:
    """The sharding of each array of an optimizer's state, for parameters with these specs (in their layer layout).

    An array whose path holds the path of a parameter, and which has its shape, is split as that parameter; all others
    (counters, the row and column statistics of Adafactor) are on every device. It works for any Optax optimizer, also
    for masked and partitioned ones, whose state ``optax.tree.map_params`` cannot match with the parameters.
    """
    params, placed = spec.flatten(specs), spec.flatten(sharding.tree(specs))

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        parts = spec.path_name(path).split("/")
        for begin in range(len(parts)):
            for end in range(len(parts), begin, -1):
                name = "/".join(parts[begin:end])
                if name in params and params[name].shape == leaf.shape:
                    return placed[name]
        return sharding.replicated()

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(optimizer.init, spec.abstract(specs)))


def _core(config: OptimizerConfig, specs: spec.Tree) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "adamw":
        return adam
    if config.name == "adadelta":
        return optax.scale_by_adadelta(config.beta2, config.epsilon)
    if config.name == "adafactor":
        return _for_each_matrix(lambda name, leaf: _ADAFACTOR, specs, flat=True)
    if config.name == "muon":
        return _for_each_matrix(lambda name, leaf: _muon(name, leaf) or adam, specs, flat=False)
    return optax.trace(config.beta1, config.nesterov) if config.beta1 > 0.0 else optax.identity()


_ADAFACTOR = optax.chain(
    # The constants of the paper, section 9 (decay of the second moment 1 - t^-0.8, clipping at 1, scales of at least
    # 1e-3), which T5 uses as well.
    optax.scale_by_factored_rms(decay_rate=0.8),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(1e-3),
)


# ----------------------------------------------------------------------------------------------------- Muon

MUON_RMS = 0.2
"""Size of Muon's updates (root mean square): that of AdamW's, so that learning rate and weight decay of AdamW carry
over (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2)."""


def muon_dimension_numbers(specs: spec.Tree) -> spec.Tree:
    """The tree of ``optax.contrib.MuonDimensionNumbers`` for parameters with these specs; None: not a Muon parameter.

    Muon gets every matrix inside the model (Jordan 2024): weights with two or more axes, and not embeddings, heads,
    biases and scales. The axes of a matrix are those of ``jaxlm.adapt.matrix_rows``. The axis ``layers`` and
    the nameless ones among the outputs (queries, keys and values of a fused projection; gates of a recurrence) count
    independent matrices. It fits ``optax.contrib.muon(..., muon_weight_dimension_numbers=...)`` too.

    Example:
        >>> specs = {"weight": ArraySpec((2, 32, 3, 4, 8), ("layers", "embed", None, "heads", "kv"))}
        >>> muon_dimension_numbers(specs)["weight"]
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(3, 4))
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _dimension_numbers(spec.path_name(path), leaf), specs)


def _dimension_numbers(name: str, leaf: ArraySpec) -> MuonDimensionNumbers | None:
    rows = matrix_rows(name, leaf)
    is_head = name.split("/")[0] in (*HEADS.values(), "next_sentence")
    if rows is None or is_head or is_table(name, leaf):
        return None
    begin = 1 if leaf.axes[0] == LAYERS else 0
    outputs = tuple(range(begin + rows, len(leaf.axes)))
    named = tuple(axis for axis in outputs if leaf.axes[axis] is not None)
    return MuonDimensionNumbers(tuple(range(begin, begin + rows)), named or outputs)


def _muon(name: str, leaf: ArraySpec) -> optax.GradientTransformation | None:
    """Muon for one weight, without the axis ``layers``; None where it is not a Muon parameter."""
    numbers = _dimension_numbers(name, leaf)
    if numbers is None:
        return None
    longest = max(math.prod(leaf.shape[axis] for axis in axes) for axes in numbers)
    return optax.chain(
        scale_by_muon(weight_dimension_numbers=numbers),
        optax.scale(MUON_RMS * math.sqrt(longest)),  # an orthogonal matrix has the root mean square 1 / sqrt(longest)
    )


def _for_each_matrix(
    choose: Callable[[str, ArraySpec], optax.GradientTransformation], specs: spec.Tree, *, flat: bool
) -> optax.GradientTransformation:
    """Applies ``choose(path, spec of one layer)`` to every leaf, and to every layer of a stacked leaf, by itself.

    The state is a tree like the parameters, with the state of one leaf at its path. ``flat``: a leaf is handed over as
    its matrix [rows, columns], or as a vector if it is not a matrix.
    """
    stacked_names = {name for name, leaf in spec.flatten(specs).items() if leaf.axes[:1] == (LAYERS,)}
    per_layer = {}
    for name, leaf in spec.flatten(specs).items():
        if name in stacked_names:
            leaf = dataclasses.replace(leaf, shape=leaf.shape[1:], axes=leaf.axes[1:])
        per_layer[name] = leaf
    chosen = {name: choose(name, leaf) for name, leaf in per_layer.items()}

    def shaped(name: str, x: Any) -> Any:
        rows = matrix_rows(name, per_layer[name])
        if not flat:
            return x
        return x.reshape(-1) if rows is None else x.reshape(math.prod(x.shape[:rows]), -1)

    def each(function: Callable[..., Any], like: spec.Tree, *trees: spec.Tree) -> list[Any]:
        """``function(path, leaf of each tree)``, mapped over the layers of a stacked leaf, in the order of ``like``."""
        leaves = jax.tree_util.tree_leaves_with_path(like)
        structure: Any = jax.tree.structure(like)
        others = [structure.flatten_up_to(tree) for tree in trees]
        results = []
        for (path, leaf), *rest in zip(leaves, *others, strict=True):
            name = _without_layer_number(spec.path_name(path))
            one = lambda *arguments, name=name: function(name, *arguments)  # noqa: E731
            is_stacked = name in stacked_names and leaf.ndim == len(per_layer[name].shape) + 1
            results.append((jax.vmap(one) if is_stacked else one)(leaf, *rest))
        return results

    def init(params: Any) -> Any:
        states = each(lambda name, param: chosen[name].init(shaped(name, param)), params)
        return jax.tree.unflatten(jax.tree.structure(params), states)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(name: str, update: Any, state: Any, param: Any) -> Any:
            new, state = chosen[name].update(shaped(name, update), state, shaped(name, param))
            return new.reshape(update.shape), state

        results = each(one, updates, state, params)
        structure = jax.tree.structure(updates)
        return tuple(jax.tree.unflatten(structure, part) for part in zip(*results, strict=True))

    return optax.GradientTransformation(init, update)


def _without_layer_number(name: str) -> str:
    return re.sub(rf"(^|/){LAYERS}/\d+/", rf"\1{LAYERS}/", name)


# --------------------------------------------------------------------------------- learning rates by layer


def layer_rates(specs: spec.Tree, decay: float) -> spec.Tree:
    """The factor of each leaf's learning rate: a float, or for a stacked leaf an array [layers, 1, ...].

    As in the code of BEiT (Bao et al. 2021): layer i of L, counted from 0, has ``decay ** (L - i)``, embeddings
    ``decay ** (L + 1)``, everything else (heads, poolers, final norms) 1. An encoder and a decoder are counted each by
    itself. Layers are those of a stack (``layers``) and numbered ones (``layer_0``); embeddings are paths outside of
    layers that contain ``embedding`` or ``relative_bias``. ELECTRA's code has one factor more below the head; XLNet's
    gives the top layer 1, and embeddings too.

    Raises:
        ValueError: the model has no layers.
    """
    names = spec.flatten(specs)
    numbered = {name: match for name in names if (match := re.search(r"(^|.*/)layer_(\d+)/", name))}
    counts = {name: leaf.shape[0] for name, leaf in names.items() if leaf.axes[:1] == (LAYERS,)}
    for name, match in numbered.items():
        same = [int(other[2]) for other in numbered.values() if other[1] == match[1]]
        counts[name] = max(same) + 1
    if not counts:
        raise ValueError(f"layer_decay={decay}: the model has neither a stack of layers nor numbered ones (layer_0)")
    deepest = max(counts.values())

    def rate(path: tuple[Any, ...], leaf: ArraySpec) -> Any:
        name = spec.path_name(path)
        if name in numbered:
            return decay ** (counts[name] - int(numbered[name][2]))
        if name in counts:
            powers = jnp.asarray(decay, jnp.float32) ** jnp.arange(counts[name], 0, -1)
            return powers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        return decay ** (deepest + 1) if re.search("embedding|relative_bias", name) else 1.0

    return jax.tree_util.tree_map_with_path(rate, specs)


def _scale_by_tree(factors: spec.Tree) -> optax.GradientTransformation:
    """Multiplies updates, stacked or per-layer, by the factors of :func:`layer_rates`."""

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        layout = factors if same_structure(updates, factors) else spec.unstack(factors)
        return jax.tree.map(lambda u, factor: u * factor, updates, layout), state

    return optax.GradientTransformation(optax.init_empty_state, scale)


# ------------------------------------------------------------------------------------------------- clipping


def _clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """``optax.clip_by_global_norm`` as one product with a scalar (Pascanu et al. 2013, algorithm 1).

    Optax divides each entry, and XLA writes the quotient to memory before Adam reads it: a pass over all gradients.
    When the caller passes ``gradient_norm``, as our step does, the gradients are not read again for the norm either.
    """

    def clip(
        updates: optax.Updates, state: Any, params: Any = None, *, gradient_norm: Any = None, **others: Any
    ) -> tuple[optax.Updates, Any]:
        del params, others
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        factor = jnp.minimum(1.0, largest / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)

"""Optimizers and learning-rate schedules, built from Optax. ``jaxlm.training.recipes`` has published settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm import spec
from jaxlm.adapt import LORA_A, LORA_B, is_table, num_row_axes, num_stack_axes
from jaxlm.config import check_choices, check_finite, check_min
from jaxlm.models.heads import LABEL_HEADS
from jaxlm.sharding import Sharding
from jaxlm.spec import LAYERS, ArraySpec, Params
from jaxlm.training.nt_asgd import averaging

OptimizerName = Literal["adamw", "adafactor", "muon", "sgd", "nt_asgd", "adadelta"]
Schedule = Literal["cosine", "linear", "constant", "inverse_square_root"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with learning-rate schedule, weight decay and gradient clipping.

    The default is AdamW with a cosine schedule."""

    name: OptimizerName = "adamw"
    """adamw: Loshchilov & Hutter 2019. adafactor: Shazeer & Stern 2018, without momentum; updates are scaled by the RMS
    of the parameters. muon: Jordan 2024 for the hidden matrices, with Nesterov momentum 0.95; AdamW for all other
    parameters. sgd: SGD with momentum beta1. nt_asgd: sgd that also computes the mean of the parameters (Merity et al.
    2017). adadelta: Zeiler 2012."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Decay of the learning rate after the warm-up and hold steps."""
    warmup_steps: int | float = 100
    """Number of steps over which the learning rate increases linearly to its peak. A number below 1 is a fraction of
    all training steps. The result is rounded to whole steps."""
    hold_steps: int = 0
    """Number of steps at the peak learning rate, between warm-up and decay."""
    final_fraction: float = 0.1
    """Learning rate after the last step, as a fraction of the peak (only with the schedules cosine and linear)."""
    beta1: float = 0.9
    """adamw, and AdamW in muon: decay of the first moment. sgd and nt_asgd: momentum. In muon, the momentum of hidden
    matrices is always 0.95."""
    beta2: float = 0.99
    """adamw, and AdamW in muon: decay of the second moment. adadelta: decay rho of both second moments."""
    nesterov: bool = False
    """Nesterov momentum (sgd and nt_asgd)."""
    epsilon: float = 1e-8
    """adamw, and AdamW in muon: added to the square root of the second moment. adadelta: added to both second moments
    (of the gradients and of the updates) before their square roots."""
    weight_decay: float = 0.1
    """Decoupled weight decay of weights and embeddings. Biases and norm scales have no weight decay."""
    clip_norm: float | None = 1.0
    """Maximum global norm of the gradient. None: the gradient is not clipped."""
    layer_decay: float | None = None
    """Ratio of the learning rate of a layer to the learning rate of the layer above it. With L layers, heads have the
    factor 1, the top layer has layer_decay, and embeddings have layer_decay to the power L + 1. None: all parameters
    have the same learning rate."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_finite(self)
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction={self.final_fraction} must be in [0, 1]")
        check_min(0, warmup_steps=self.warmup_steps, hold_steps=self.hold_steps, weight_decay=self.weight_decay)
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be a whole number of steps, or below 1 for a fraction of the "
                "training"
            )
        if self.clip_norm is not None and self.clip_norm <= 0.0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or None for no clipping")
        if self.nesterov and self.name not in ("sgd", "nt_asgd"):
            raise ValueError(f"nesterov=True is only for sgd and nt_asgd, not for name={self.name!r}: leave it out")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1], or None")


# ------------------------------------------------------------------------------------------------ schedules


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning-rate schedule: a function from n, the number of previous updates, to the next learning rate.

    The first k updates are the warm-up and hold steps. From n = k on, ``cosine`` and ``linear`` decrease from the peak
    to ``final_fraction * peak`` at n = ``steps``, and ``inverse_square_root`` (Vaswani et al. 2017, section 5.3) is
    ``peak * sqrt(k / n)``. The decay of ``inverse_square_root`` has no end, so its ``hold_steps`` may be larger than
    ``steps``.

    Args:
        steps: number of updates of the whole training.

    Raises:
        ValueError: the warm-up (for cosine and linear, also warm-up plus hold steps) is not shorter than the training,
            or ``inverse_square_root`` has neither warm-up nor hold steps.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_steps * steps if config.warmup_steps < 1 else config.warmup_steps)
    setting = f"warmup_steps={config.warmup_steps}"
    if config.warmup_steps < 1:
        setting += f" ({warmup} steps)"
    if warmup >= steps:
        raise ValueError(f"{setting} must be fewer than the {steps} steps of the training")
    decay_start = warmup + config.hold_steps
    if config.schedule in ("cosine", "linear") and decay_start >= steps:
        raise ValueError(
            f"{setting} plus hold_steps={config.hold_steps} must be fewer than the {steps} steps of the training"
        )
    if config.schedule == "inverse_square_root" and decay_start == 0:
        raise ValueError(f"schedule='inverse_square_root' needs at least one warm-up or hold step, and has {setting}")
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - decay_start, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, steps - decay_start),
        "constant": lambda: optax.constant_schedule(peak),
        "inverse_square_root": lambda: lambda n: peak * jnp.sqrt(decay_start / (decay_start + jnp.maximum(n, 0))),
    }[config.schedule]()
    # The warm-up starts at peak / (warmup + 1) instead of 0, so that the first update changes the weights.
    increase = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([increase, optax.constant_schedule(peak), decay], [warmup, decay_start])


# ----------------------------------------------------------------------------------------------- optimizers


def make_optimizer(
    config: OptimizerConfig, specs: spec.Tree, steps: int, *, rates: spec.Tree | None = None
) -> optax.GradientTransformationExtraArgs:
    """The Optax chain of clipping, optimizer, weight decay and learning-rate schedule.

    The updates do not depend on the layer layout (``spec.layers``): every layer has its own statistics, even if layers
    are stacked. Weight decay applies to the parameters whose spec has ``decay=True``. With ``nt_asgd``, the state
    contains the mean of the parameters; ``jaxlm.training.nt_asgd`` describes when averaging starts.

    Args:
        specs: specs of the trained parameters: ``model.specs``, or ``adaptation.specs(model.specs)``.
        steps: number of updates of the whole training.
        rates: a factor of the learning rate for each parameter (``jaxlm.training.mup``). These factors do not change
            the weight decay. None: the factor is 1 for all parameters.

    Raises:
        ValueError: the warm-up is too long for ``steps``, ``inverse_square_root`` has neither warm-up nor hold steps,
            ``layer_decay`` is set for a model without layers, or ``rates`` are given and ``name`` is not adamw.
    """
    if rates is not None and config.name != "adamw":
        raise ValueError(f"rates need name='adamw', got name={config.name!r}: change the optimizer or leave rates out")
    stateless = [optax.add_decayed_weights(config.weight_decay, mask=spec.decay_mask(specs))]
    if rates is not None:
        stateless.insert(0, _scale_by_tree(rates))
    if config.layer_decay is not None:
        stateless.append(_scale_by_tree(layer_learning_rate_factors(specs, config.layer_decay)))
    # The names of the arrays in a checkpoint contain the positions in this chain. So every setting has the same
    # positions, and a resumed run may change clip_norm and layer_decay.
    return optax.chain(
        optax.identity() if config.clip_norm is None else _clip_by_global_norm(config.clip_norm),
        _scale_by_optimizer(config, specs),
        optax.chain(*stateless),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        *([averaging()] if config.name == "nt_asgd" else []),
    )


def optimizer_sharding(optimizer: optax.GradientTransformation, specs: spec.Tree, sharding: Sharding) -> Any:
    """The sharding of each array of an optimizer state, for parameters with these specs.

    An array has the sharding of a parameter if its path contains the path of the parameter and both have the same
    shape. All other arrays (counters, the row and column statistics of Adafactor) are replicated. This rule works for
    all Optax optimizers. ``optax.tree.map_params`` does not: it cannot match the states of masked and partitioned
    optimizers with the parameters.
    """
    params, shardings = spec.flatten(specs), spec.flatten(sharding.tree(specs))

    def leaf_sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        parts = spec.path_name(path).split("/")
        for begin, end in itertools.combinations(range(len(parts) + 1), 2):
            name = "/".join(parts[begin:end])
            if name in params and params[name].shape == leaf.shape:
                return shardings[name]
        return sharding.replicated()

    return jax.tree_util.tree_map_with_path(leaf_sharding, jax.eval_shape(optimizer.init, spec.abstract(specs)))


def _scale_by_optimizer(config: OptimizerConfig, specs: spec.Tree) -> optax.GradientTransformation:
    """The update rule of ``config.name``, without clipping, weight decay and learning rate."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "adamw":
        return adam
    if config.name == "adadelta":
        return optax.scale_by_adadelta(config.beta2, config.epsilon)
    if config.name == "adafactor":
        return _for_each_matrix(lambda name, leaf: _ADAFACTOR, specs, flatten=True)
    if config.name == "muon":
        return _for_each_matrix(lambda name, leaf: _muon(name, leaf) or adam, specs, flatten=False)
    return optax.trace(config.beta1, config.nesterov) if config.beta1 > 0.0 else optax.identity()


_ADAFACTOR = optax.chain(
    # The constants of Shazeer & Stern 2018, section 9: decay 1 - t^-0.8 of the second moment, update clipping at RMS 1,
    # parameter scale of at least 1e-3. T5 uses the same constants.
    optax.scale_by_factored_rms(decay_rate=0.8),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(1e-3),
)


# ----------------------------------------------------------------------------------------------------- Muon

MUON_RMS = 0.2
"""Root mean square of Muon's updates. AdamW's updates have about the same root mean square, so AdamW's learning rate
and weight decay can be reused (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2)."""


def muon_dimension_numbers(specs: spec.Tree) -> spec.Tree:
    """A tree of ``optax.contrib.MuonDimensionNumbers``, with None for the parameters that Muon does not update.

    Muon updates every hidden matrix (Jordan 2024). Hidden matrices are the weights with two or more axes (stack
    axes do not count). Embeddings, heads, biases, scales, and the LoRA factors of embeddings and heads are not hidden
    matrices.

    ``jaxlm.adapt.num_row_axes`` defines which axes are the rows of a matrix. The other axes are the output axes. Each
    index of a stack axis (``jaxlm.adapt.num_stack_axes``) has its own matrix. If an output axis has a name, each index
    of an unnamed output axis also has its own matrix. Examples of such unnamed axes are the queries, keys and values of
    a fused projection, and the gates of a recurrence.

    The tree is also valid for ``optax.contrib.muon(..., muon_weight_dimension_numbers=...)``.

    Example:
        >>> specs = {"weight": ArraySpec((2, 32, 3, 4, 8), ("layers", "embed", None, "heads", "kv"))}
        >>> muon_dimension_numbers(specs)["weight"]
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(3, 4))
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _dimension_numbers(spec.path_name(path), leaf), specs)


def _dimension_numbers(name: str, leaf: ArraySpec) -> MuonDimensionNumbers | None:
    row_axes = num_row_axes(name, leaf)
    weight = name.removesuffix(f"/{LORA_A}").removesuffix(f"/{LORA_B}")  # both factors are treated like their weight
    is_head = name.split("/")[0] in ("head", *LABEL_HEADS.values(), "next_sentence")
    if row_axes is None or is_head or is_table(weight, leaf):
        return None
    first = num_stack_axes(leaf)  # the first axis of the matrix
    output_axes = tuple(range(first + row_axes, len(leaf.axes)))
    named_output_axes = tuple(axis for axis in output_axes if leaf.axes[axis] is not None)
    return MuonDimensionNumbers(tuple(range(first, first + row_axes)), named_output_axes or output_axes)


def _muon(name: str, leaf: ArraySpec) -> optax.GradientTransformation | None:
    """Muon for one weight without stack axes; None if Muon does not update this parameter."""
    numbers = _dimension_numbers(name, leaf)
    if numbers is None:
        return None
    longer_side = max(math.prod(leaf.shape[axis] for axis in axes) for axes in numbers)
    return optax.chain(
        scale_by_muon(weight_dimension_numbers=numbers),
        optax.scale(MUON_RMS * math.sqrt(longer_side)),  # an orthogonal matrix has the RMS 1 / sqrt(longer side)
    )


def _for_each_matrix(
    choose: Callable[[str, ArraySpec], optax.GradientTransformation], specs: spec.Tree, *, flatten: bool
) -> optax.GradientTransformation:
    """A transformation that updates each leaf with its own transformation ``choose(path, spec)``.

    Each index of the stack axes (layer, expert, block of a block-diagonal matrix) is updated separately. The state is a
    tree with the structure of the parameters. Its leaves are the states of the transformations.

    Args:
        choose: a function that returns the transformation of a leaf. Its arguments are the path of the leaf without the
            layer number, and the spec of the leaf without the stack axes.
        flatten: whether to reshape matrices to [rows, columns] and all other leaves to vectors for the update.
    """
    leaves = {spec.split_layer(path)[0]: leaf for path, leaf in spec.flatten(specs).items()}
    matrix_specs = {}
    for name, leaf in leaves.items():
        first = num_stack_axes(leaf)
        matrix_specs[name] = dataclasses.replace(leaf, shape=leaf.shape[first:], axes=leaf.axes[first:])
    transforms = {name: choose(name, leaf) for name, leaf in matrix_specs.items()}

    def reshape(name: str, x: Any) -> Any:
        row_axes = num_row_axes(name, matrix_specs[name])
        if not flatten:
            return x
        return x.reshape(-1) if row_axes is None else x.reshape(math.prod(x.shape[:row_axes]), -1)

    def map_matrices(function: Callable[..., Any], tree: spec.Tree, *other_trees: spec.Tree) -> list[Any]:
        """A list of ``function(path, *leaves)`` for each path of ``tree``, with vmap over the stack axes.

        ``leaves`` are the leaf of ``tree`` at the path and the subtrees of ``other_trees`` at the path."""
        leaves_with_path = jax.tree_util.tree_leaves_with_path(tree)
        structure: Any = jax.tree.structure(tree)
        subtrees = [structure.flatten_up_to(other) for other in other_trees]
        results = []
        for (path, leaf), *rest in zip(leaves_with_path, *subtrees, strict=True):
            name, _ = spec.split_layer(spec.path_name(path))
            apply = functools.partial(function, name)
            for _ in range(num_stack_axes(leaves[name])):
                apply = jax.vmap(apply)
            results.append(apply(leaf, *rest))
        return results

    def init(params: Params) -> Any:
        states = map_matrices(lambda name, param: transforms[name].init(reshape(name, param)), params)
        return jax.tree.unflatten(jax.tree.structure(params), states)

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        def update_leaf(name: str, update: Any, state: Any, param: Any) -> Any:
            new_update, state = transforms[name].update(reshape(name, update), state, reshape(name, param))
            return new_update.reshape(update.shape), state

        results = map_matrices(update_leaf, updates, state, params)
        structure = jax.tree.structure(updates)
        return tuple(jax.tree.unflatten(structure, leaves) for leaves in zip(*results, strict=True))

    return optax.GradientTransformation(init, update)


# --------------------------------------------------------------------------------- learning rates by layer


def layer_learning_rate_factors(specs: spec.Tree, decay: float) -> spec.Tree:
    """The learning-rate factor of each leaf: a float, or an array [layers, 1, ...] for a stacked leaf.

    With L layers, layer i (from 0) has ``decay ** (L - i)``, embeddings have ``decay ** (L + 1)``, and all other
    parameters (heads, poolers, final norms) have 1. Layers are stacked (``layers``) or numbered (``layers/0``,
    ``layer_0``). A parameter outside of the layers is an embedding if its path contains ``embedding`` or
    ``relative_bias``. The layers of an encoder and of a decoder are counted separately. For embeddings, L is the larger
    of the two numbers.

    This is the rule of BEiT's code (Bao et al. 2021), with one difference: in BEiT's code, a relative bias that all
    layers share has the factor 1. Other implementations have other rules: in ELECTRA's code, everything below the head
    has one more factor ``decay``; in XLNet's code, the top layer and the embeddings have the factor 1.

    Only the layers in ``specs`` are counted. If the first layers of a stack are frozen (``Freeze(first_layers=...)``),
    the other layers have the same factors as in the complete model, because the factors are counted from the top layer.
    Embeddings then have a larger factor than in the complete model, because L is the number of trained layers.

    Raises:
        ValueError: the model has no layers.
    """
    leaves = spec.flatten(specs)
    numbered = {name: match for name in leaves if (match := re.search(rf"(^|.*/)(?:layer_|{LAYERS}/)(\d+)/", name))}
    counts = {name: leaf.shape[0] for name, leaf in leaves.items() if leaf.is_stacked}
    for name, match in numbered.items():
        numbers = [int(other[2]) for other in numbered.values() if other[1] == match[1]]
        counts[name] = max(numbers) + 1
    if not counts:
        raise ValueError(
            f"layer_decay={decay}: the model has neither stacked layers (layers) nor numbered layers (layer_0): leave "
            "layer_decay out"
        )
    num_layers = max(counts.values())

    def rate(path: tuple[Any, ...], leaf: ArraySpec) -> Any:
        name = spec.path_name(path)
        if name in numbered:
            return decay ** (counts[name] - int(numbered[name][2]))
        if name in counts:
            powers = jnp.asarray(decay, jnp.float32) ** jnp.arange(counts[name], 0, -1)
            return powers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        return decay ** (num_layers + 1) if re.search("embedding|relative_bias", name) else 1.0

    return jax.tree_util.tree_map_with_path(rate, specs)


def _scale_by_tree(factors: spec.Tree) -> optax.GradientTransformation:
    """A transformation that multiplies the update of each parameter by its factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, factors))


# ------------------------------------------------------------------------------------------------- clipping


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm (Pascanu et al. 2013, algorithm 1): all entries are multiplied by one scalar.

    ``optax.clip_by_global_norm`` divides each entry by the norm. XLA then writes the quotients to memory before Adam
    reads them, which costs an extra pass over all gradients.

    The caller may pass a tree ``gradient`` and its norm ``gradient_norm`` to ``update``, as ``Trainer.step`` does. If
    ``updates`` is the same object as ``gradient``, no transformation has changed it. Then the norm is not computed
    again.
    """

    def clip(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        *,
        gradient: Any = None,
        gradient_norm: Any = None,
        **unused: Any,
    ) -> tuple[optax.Updates, Any]:
        norm = gradient_norm
        if norm is None or updates is not gradient:
            # in float32, because the squares of float16 numbers could overflow
            norm = optax.tree.norm(jax.tree.map(lambda u: u.astype(jnp.promote_types(u.dtype, jnp.float32)), updates))
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)

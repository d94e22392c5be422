"""Maximal update parametrization (muP): one learning rate for all widths (Yang et al. 2022, "Tensor Programs V").

With muP, the magnitude of activations and of their updates does not depend on the width of a model. So the best
learning rate of a narrow base model is close to the best learning rate of a wide model, if depth, batch size and
number of steps are the same. :func:`mup` compares the specs of both models. An axis "differs" if its size is not the
same in both models. The leading axes of a matrix are its inputs, and the other axes are its outputs
(``jaxlm.adapt.num_row_axes``). In an output head [vocab, embed], the leading axis is the output. The table shows the
rules for AdamW. "base" is the value of the base model. r is the number of inputs of a matrix in the model, divided by
the number of inputs in the base model.

    matrix                                 standard deviation of the initial values    learning rate
    only outputs differ (token table)      base                                        base
    inputs and outputs differ (hidden)     base / sqrt(r)                              base / r
    only inputs differ (output head)       base / r                                    base / r

These are the rules of table 3 of the paper. Vectors (biases, norm scales) have the initial values and the learning rate
of the base model, except the vectors in ``OUTPUT_VECTORS``. Some families multiply the token vectors by a number that
depends on the width (``Model.embedding_multiplier``). The initial values and the learning rate of their token table are
divided by the ratio of this number in the model to this number in the base model. Adam's ``epsilon`` must be small
compared with the gradients, which become smaller as the width increases.

    base = get_model("llama", num_layers=4, embed_dim=128, num_heads=4, mlp_dim=384, vocab_size=V)
    model = base.with_fields(embed_dim=1024, num_heads=32, mlp_dim=3072)
    scaled = mup(model, base)
    trainer = Trainer(model, make_optimizer(config, model.specs, steps, rates=scaled.rates), causal.loss)
    state = trainer.init(key, scaled.init(key))
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.adapt import is_table, num_row_axes, num_stack_axes
from jaxlm.models import Model
from jaxlm.spec import ArraySpec, Initializer, Params

OUTPUT_VECTORS = ("score",)
"""The last keys of the paths of output vectors, i.e. vectors v in a dot product ``v · h``, as in additive attention.
They are treated as matrices with one output."""

EQUAL_SIZE_AXES = ("layers", "expert", "kv", "vocab", "positions")
"""Names of the axes that must have the same size in both models."""

EQUAL_FIELDS = (
    "vocab_size", "vocab_multiple", "head_dim", "state_size", "window", "conv_width", "experts_per_token",
    "num_buckets", "max_distance", "memory_length", "reuse_length", "clamp_length",
)  # fmt: skip
"""Integer config fields that must be equal in both models. Other fields may differ if their values are integers, tuples
or None, because they may be widths. ``dtype``, ``remat`` and fields whose name ends with ``implementation`` may differ
too. All fields with other values (booleans, floats, strings) must be equal."""


@dataclasses.dataclass(frozen=True)
class ScaledInit:
    """An initializer that returns the values of the initializer ``init``, multiplied by ``factor``."""

    init: Initializer
    factor: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return self.init(key, shape, dtype) * self.factor


@dataclasses.dataclass(frozen=True)
class MuP:
    """The initializers and the learning-rate factors of a model.

    Attributes:
        specs: the specs of the model, with the initializers of muP.
        rates: the learning-rate factor of each parameter, for :func:`jaxlm.training.optimizer.make_optimizer`.
    """

    specs: spec.Tree
    rates: spec.Tree

    def init(self, key: jax.Array) -> Params:
        """New parameters with the initial values of muP."""
        return spec.init(self.specs, key)


def mup(model: Model, base: Model) -> MuP:
    """Initializers and learning-rate factors with which the best learning rate of ``base`` also suits ``model``.

    ``base`` may be narrower or wider. Only widths may differ. A wider model has more attention heads of the same size.

    Raises:
        ValueError: the models differ in more than their widths, or the model has a property that muP does not support:
            a language model without an output head, an output head that is the token table, projected token vectors,
            or attention scores other than ``score="concat"``. The other scores of attention RNNs are dot products of
            vectors whose size depends on the width.

    Example:
        >>> from jaxlm import get_model
        >>> base = get_model("llama-tiny")
        >>> model = base.with_fields(embed_dim=4 * base.config.embed_dim, num_heads=4 * base.config.num_heads)
        >>> mup(model, base).rates["head"]
        0.25
    """
    if model.family != base.family:
        raise ValueError(f"the model is a {model.family} and the base model a {base.family}: use the same family")
    _check_fields(model.config, base.config)
    leaves, base_leaves = spec.flatten(model.specs), spec.flatten(base.specs)
    if different := sorted(leaves.keys() ^ base_leaves.keys()):
        owner = "model" if different[0] in leaves else "base model"
        raise ValueError(f"only widths may differ, but only the {owner} has the parameter {different[0]}")
    _check_family(model, leaves)
    table_ratio = model.embedding_multiplier / base.embedding_multiplier
    specs, rates = {}, {}
    for name, leaf in leaves.items():
        factor, rates[name] = _factors(name, leaf, base_leaves[name], table_ratio)
        init = base_leaves[name].init
        specs[name] = dataclasses.replace(leaf, init=init if factor == 1.0 else ScaledInit(init, factor))
    structure: Any = jax.tree.structure(model.specs)
    return MuP(structure.unflatten(specs.values()), structure.unflatten(rates.values()))


def _check_fields(config: Any, base: Any) -> None:
    """Raise ``ValueError`` if a config field that must be equal in both models differs."""
    for field in dataclasses.fields(config):
        value, base_value = getattr(config, field.name), getattr(base, field.name)
        may_differ = field.name in ("dtype", "remat") or field.name.endswith("implementation")
        is_size = {type(value), type(base_value)} <= {int, tuple, type(None)}
        is_width = is_size and field.name not in EQUAL_FIELDS
        if value != base_value and not (may_differ or is_width):
            raise ValueError(
                f"{field.name}={value!r} in the model and {base_value!r} in the base model: only widths may differ"
            )


def _check_family(model: Model, leaves: dict[str, ArraySpec]) -> None:
    """Raise ``ValueError`` if muP does not support the model."""
    if model.task in ("causal", "masked", "permutation", "seq2seq"):
        tied = getattr(model.config, "tie_embeddings", None)
        if tied or not any(_is_head(name, leaf) for name, leaf in leaves.items()):
            fix = ": set tie_embeddings=False" if tied else ": this family has no such head"
            raise ValueError(f"muP needs an output head that is not the token table{fix} ({model.family})")
    projections = [name for name in leaves if name.endswith("projection")]
    if projections:
        raise ValueError(
            f"muP does not support projected token vectors ({projections[0]}): give all token tables the model's width"
        )
    if getattr(model.config, "score", "concat") != "concat":
        raise ValueError(f"muP does not support score={model.config.score!r}: set score='concat'")


def _factors(name: str, leaf: ArraySpec, base: ArraySpec, table_ratio: float) -> tuple[float, float]:
    """The factors of the initial values and of the learning rate of a parameter.

    Args:
        table_ratio: the multiplier of the token vectors in the model, divided by the multiplier in the base model.
    """
    for axis, size, base_size in zip(leaf.axes, leaf.shape, base.shape, strict=True):
        if axis in EQUAL_SIZE_AXES and size != base_size:
            raise ValueError(
                f"{name}: the axis {axis!r} has size {size} in the model and {base_size} in the base model: only "
                "widths may differ"
            )
    if name.rsplit("/", 1)[-1] in OUTPUT_VECTORS:
        input_ratio = math.prod(leaf.shape) / math.prod(base.shape)
        return 1 / input_ratio, 1 / input_ratio
    row_axes = num_row_axes(name, leaf)
    if row_axes is None:
        return 1.0, 1.0
    first = num_stack_axes(leaf)  # the first axis of the matrix
    ratios = [size / base_size for size, base_size in zip(leaf.shape, base.shape, strict=True)][first:]
    input_ratio, output_ratio = math.prod(ratios[:row_axes]), math.prod(ratios[row_axes:])
    if _is_head(name, leaf):
        input_ratio, output_ratio = output_ratio, input_ratio  # a head is [vocab, embed]: its inputs are the columns
    elif leaf.axes[first] == "vocab":
        return 1 / table_ratio, 1 / table_ratio
    return (input_ratio**-0.5 if output_ratio != 1.0 else 1 / input_ratio), 1 / input_ratio


def _is_head(name: str, leaf: ArraySpec) -> bool:
    """Whether a parameter is the matrix of an output head over the vocabulary or over clusters of the vocabulary."""
    is_named_head = name.split("/")[0] == "head" or name.rsplit("/", 1)[-1] == "cluster_weight"
    return is_named_head and len(leaf.shape) > 1 and is_table(name, leaf)

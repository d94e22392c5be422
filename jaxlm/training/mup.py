"""Maximal update parametrization (muP): one learning rate for all widths (Yang et al. 2022, "Tensor Programs V").

With muP, activations and their updates keep their size when a model becomes wider. So a learning rate that was found
with a narrow base model can be used for a wide model. :func:`mup` compares the specs of both models. The axes whose
sizes differ are the axes that grow with the width, and the axis names say which of them are inputs of a matrix. For a
matrix whose inputs grow by the factor r, and the optimizer AdamW:

    matrix                       standard deviation of the initial values    learning rate
    inputs do not grow           that of the base model                      rate of the base model
    inputs and outputs grow      base / sqrt(r)                              base / r
    only inputs grow (heads)     base / r                                    base / r

This is table 3 of the paper. Vectors (biases, norm scales) have the values of the base model.

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

from jaxlm import spec
from jaxlm.adapt import is_table, matrix_rows, num_stack_axes
from jaxlm.models import Model
from jaxlm.spec import LAYERS, ArraySpec, Initializer, Params

OUTPUT_VECTORS = ("score",)
"""Last keys of vectors that are multiplied with a hidden vector to give one number: matrices with one output."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The values of another initializer, multiplied by ``factor``."""

    init: Initializer
    factor: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self.init(key, shape, dtype) * self.factor


@dataclasses.dataclass(frozen=True)
class MuP:
    """Initial values and learning rates of a model.

    Attributes:
        specs: the specs of the model, with the initializers of muP.
        rates: the factor of the learning rate of each parameter, for :func:`jaxlm.training.optimizer.make_optimizer`.
    """

    specs: spec.Tree
    rates: spec.Tree

    def init(self, key: jax.Array) -> Params:
        """Newly initialised parameters."""
        return spec.init(self.specs, key)


def mup(model: Model, base: Model) -> MuP:
    """The initial values and learning rates with which ``model`` trains like the narrower (or wider) ``base``.

    Both models have the same family, layers, vocabulary and size of attention heads. A wider model has more heads.

    Raises:
        ValueError: the models differ in more than their widths, the size of the heads differs, or the token table is
            also the output head (``tie_embeddings=True``), which muP does not support.

    Example:
        >>> from jaxlm import get_model
        >>> base = get_model("llama-tiny")
        >>> model = base.with_fields(embed_dim=4 * base.config.embed_dim, num_heads=4 * base.config.num_heads)
        >>> mup(model, base).rates["head"]
        0.25
    """
    if getattr(model.config, "tie_embeddings", False):
        raise ValueError(
            f"muP needs an output head of its own, but {model.family} has tie_embeddings=True: set tie_embeddings=False"
        )
    leaves, base_leaves = spec.flatten(model.specs), spec.flatten(base.specs)
    if model.family != base.family:
        raise ValueError(f"the model is a {model.family} and the base model a {base.family}: use the same family")
    if different := sorted(leaves.keys() ^ base_leaves.keys()):
        raise ValueError(
            f"the base model may differ only in its widths, but only one of the models has the parameter {different[0]}"
        )
    table_ratio = model.embedding_multiplier / base.embedding_multiplier
    factors = {name: _factors(name, leaf, base_leaves[name], table_ratio) for name, leaf in leaves.items()}
    inits = {
        name: base_leaves[name].init if factor == 1.0 else Scaled(base_leaves[name].init, factor)
        for name, (factor, _) in factors.items()
    }

    def scaled(path: tuple[Any, ...], leaf: ArraySpec) -> ArraySpec:
        return dataclasses.replace(leaf, init=inits[spec.path_name(path)])

    return MuP(
        jax.tree_util.tree_map_with_path(scaled, model.specs),
        jax.tree_util.tree_map_with_path(lambda path, leaf: factors[spec.path_name(path)][1], model.specs),
    )


def _factors(name: str, leaf: ArraySpec, base: ArraySpec, table_ratio: float) -> tuple[float, float]:
    """The factors of the initial values and of the learning rate of a parameter.

    Args:
        table_ratio: the factor of the token vectors in the model, divided by that in the base model. The token table
            gets the inverse factors, so that the token vectors keep their size.
    """
    for axis, size, base_size in zip(leaf.axes, leaf.shape, base.shape, strict=True):
        if axis in (LAYERS, "kv", "vocab") and size != base_size:
            raise ValueError(
                f"{name}: the axis {axis!r} has size {size} in the model and {base_size} in the base model: both "
                "need the same number of layers, head size and vocabulary"
            )
    if name.rsplit("/", 1)[-1] in OUTPUT_VECTORS:
        inputs = math.prod(leaf.shape) / math.prod(base.shape)
        return 1 / inputs, 1 / inputs
    rows = matrix_rows(name, leaf)
    if rows is None:
        return 1.0, 1.0
    ratios = [size / base_size for size, base_size in zip(leaf.shape, base.shape, strict=True)][num_stack_axes(leaf) :]
    inputs, outputs = math.prod(ratios[:rows]), math.prod(ratios[rows:])
    if is_table(name, leaf):
        if not _is_head(name):
            return 1 / table_ratio, 1 / table_ratio
        inputs, outputs = outputs, inputs  # a head is [vocab, embed]: its inputs are the columns
    return (inputs**-0.5 if outputs != 1.0 else 1 / inputs), 1 / inputs


def _is_head(name: str) -> bool:
    """Whether a table is an output head."""
    return name.split("/")[0] == "head" or name.rsplit("/", 1)[-1] == "cluster_weight"

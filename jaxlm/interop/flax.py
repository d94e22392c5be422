"""A model as a Flax module, ``linen`` or ``nnx``, for code that needs a Flax module.

The parameters of the module have the tree structure of ``model.init``; nnx wraps each leaf in ``nnx.Param``. A call of
the module takes the arguments of ``model.apply`` without ``params`` and ``key``, and returns the same result. These
statements convert parameters from jaxlm to Flax (left) and from Flax to jaxlm (right):

    linen   variables = {"params": params}                       params = variables["params"]
    nnx     module = as_nnx(model, params=params)                params = module.parameters()
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen, nnx
from flax.core import unfreeze

from jaxlm import spec
from jaxlm.models import Model
from jaxlm.spec import Params


class LinenModel(linen.Module):
    """A model as a ``flax.linen.Module``; see :func:`as_linen`."""

    model: Model

    def setup(self) -> None:
        self.tree = {
            name: self.param(name, functools.partial(_init_entry, name, specs))
            for name, specs in self.model.specs.items()
        }

    def __call__(self, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.model.apply(unfreeze(self.tree), tokens, key=key, **inputs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.model.logits(unfreeze(self.tree), hidden)

    def pool(self, hidden: jax.Array, **inputs: Any) -> jax.Array:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.model.pool(unfreeze(self.tree), hidden, key=key, **inputs)


def _init_entry(name: str, specs: spec.Tree, key: jax.Array) -> spec.Tree:
    """The initial parameters of one top-level entry of the parameter tree."""
    return spec.init({name: specs}, key)[name]


def as_linen(model: Model) -> LinenModel:
    """The model as a ``flax.linen.Module`` with the methods ``__call__``, ``logits`` and ``pool``.

    ``init`` samples from the same distributions as ``model.init``. The values differ, because linen derives other keys
    from the given key. Dropout is active if the argument ``rngs`` of ``apply`` has a key "dropout".

    Example:
        >>> module = as_linen(model)
        >>> hidden, state = module.apply({"params": params}, tokens, rngs={"dropout": key})
        >>> logits = module.apply({"params": params}, hidden, method="logits")
    """
    return LinenModel(model)


class NNXModel(nnx.Module):
    """A model as a ``flax.nnx.Module``; see :func:`as_nnx`."""

    def __init__(self, model: Model, params: Params) -> None:
        self.model = model
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def parameters(self) -> spec.Tree:
        """The parameters as a tree of arrays with the structure of ``model.init``."""
        return jax.tree.map(lambda param: param[...], self.params, is_leaf=lambda node: isinstance(node, nnx.Param))

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None, **inputs: Any) -> tuple[jax.Array, Any]:
        return self.model.apply(self.parameters(), tokens, key=None if rngs is None else rngs.dropout(), **inputs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.model.logits(self.parameters(), hidden)

    def pool(self, hidden: jax.Array, *, rngs: nnx.Rngs | None = None, **inputs: Any) -> jax.Array:
        return self.model.pool(self.parameters(), hidden, key=None if rngs is None else rngs.dropout(), **inputs)


def as_nnx(model: Model, rngs: nnx.Rngs | None = None, *, params: spec.Tree | None = None) -> NNXModel:
    """The model as a ``flax.nnx.Module`` with the methods ``__call__``, ``logits``, ``pool`` and ``parameters``.

    Dropout is active if a call gets ``rngs``.

    Args:
        rngs: random keys for new parameters. The new parameters are ``model.init(rngs.params())``.
        params: existing parameters of the model. Pass exactly one of ``rngs`` and ``params``.

    Raises:
        ValueError: both ``rngs`` and ``params`` are given, or neither is given; or the names or shapes of ``params`` do
            not match the model.

    Example:
        >>> module = as_nnx(model, nnx.Rngs(0))
        >>> hidden, state = module(tokens, rngs=nnx.Rngs(dropout=1))
        >>> logits = module.logits(hidden)
    """
    if (rngs is None) == (params is None):
        raise ValueError("pass exactly one of rngs (for new parameters) and params (existing parameters)")
    if rngs is not None:
        return NNXModel(model, model.init(rngs.params()))
    assert params is not None
    spec.require_same(model.specs, params, f"parameters of {model.family}", dtypes=False)
    return NNXModel(model, params)

"""A model as a module of flax, for code that is written for one: ``linen`` or ``nnx``.

Both hold the parameters of ``model.init``, nested the same way and never wrapped, so that a tree goes in and out as it
is; calling them gives what ``model.apply`` gives. State stays an argument, as in the functional form.

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


class LinenModel(linen.Module):
    """See :func:`as_linen`."""

    model: Model

    def setup(self) -> None:
        self.tree = {
            name: self.param(name, functools.partial(_initial, name, specs)) for name, specs in self.model.specs.items()
        }

    def __call__(self, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.model.apply(unfreeze(self.tree), tokens, key=key, **inputs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.model.logits(unfreeze(self.tree), hidden)

    def summary(self, hidden: jax.Array, **inputs: Any) -> jax.Array:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.model.summary(unfreeze(self.tree), hidden, key=key, **inputs)


def _initial(name: str, specs: spec.Tree, key: jax.Array) -> spec.Tree:
    return spec.init({name: specs}, key)[name]


def as_linen(model: Model) -> LinenModel:
    """The model as a ``flax.linen.Module`` with the methods ``__call__``, ``logits`` and ``summary``.

    ``init`` draws from the same distributions as ``model.init``, with the keys that linen makes: not the same values.
    Dropout acts where ``apply`` is given a key for "dropout".

    Example:
        >>> module = as_linen(model)
        >>> hidden, state = module.apply({"params": params}, tokens, rngs={"dropout": key})
        >>> logits = module.apply({"params": params}, hidden, method="logits")
    """
    return LinenModel(model)


class NNXModel(nnx.Module):
    """See :func:`as_nnx`."""

    def __init__(self, model: Model, params: spec.Tree) -> None:
        self.model = model
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def parameters(self) -> spec.Tree:
        """The parameters as ``model.init`` nests them: bare arrays in plain dicts."""
        return jax.tree.map(lambda param: param[...], self.params, is_leaf=lambda node: isinstance(node, nnx.Param))

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None, **inputs: Any) -> tuple[jax.Array, Any]:
        return self.model.apply(self.parameters(), tokens, key=None if rngs is None else rngs.dropout(), **inputs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.model.logits(self.parameters(), hidden)

    def summary(self, hidden: jax.Array, *, rngs: nnx.Rngs | None = None, **inputs: Any) -> jax.Array:
        return self.model.summary(self.parameters(), hidden, key=None if rngs is None else rngs.dropout(), **inputs)


def as_nnx(model: Model, rngs: nnx.Rngs | None = None, *, params: spec.Tree | None = None) -> NNXModel:
    """The model as a ``flax.nnx.Module`` with the methods ``__call__``, ``logits``, ``summary`` and ``parameters``.

    Dropout acts where a call is given ``rngs``.

    Args:
        rngs: fresh parameters are those of ``model.init(rngs.params())``.
        params: take these instead.

    Raises:
        ValueError: both or neither of them, or parameters that are not those of the model.

    Example:
        >>> module = as_nnx(model, nnx.Rngs(0))
        >>> hidden, state = module(tokens, rngs=nnx.Rngs(dropout=1))
        >>> logits = module.logits(hidden)
    """
    if (rngs is None) == (params is None):
        raise ValueError("as_nnx takes rngs, to draw fresh parameters, or params: exactly one of them")
    if rngs is not None:
        return NNXModel(model, model.init(rngs.params()))
    spec.require_same(model.specs, params, f"parameters of {model.family}", dtypes=False)
    return NNXModel(model, params)

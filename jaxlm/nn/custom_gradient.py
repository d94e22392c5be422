"""Functions with a custom gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


class custom_vjp:
    """``jax.custom_vjp`` for functions that also run in ``jax.shard_map``.

    In ``shard_map``, JAX tracks for each array over which mesh axes it varies. The gradient of weights that vary over
    fewer axes than the inputs must be summed over the other axes, and JAX expects this sum from the backward rule of
    ``jax.custom_vjp``. Here, all arguments are first cast to vary over the same axes, outside of the rule. The gradient
    of this cast is the sum.

    Args:
        nondiff_argnums: as in ``jax.custom_vjp``.
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        self._function = jax.custom_vjp(function, nondiff_argnums=tuple(nondiff_argnums))
        self._nondiff_argnums = frozenset(nondiff_argnums)
        self.defvjp = self._function.defvjp
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        numbers = [number for number in range(len(arguments)) if number not in self._nondiff_argnums]
        cast = dict(zip(numbers, _vary_equally([arguments[number] for number in numbers]), strict=True))
        return self._function(*(cast.get(number, argument) for number, argument in enumerate(arguments)))


def _vary_equally(tree: Any) -> Any:
    """The arrays of ``tree``, each cast to vary over all mesh axes over which one of them varies."""
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(tree)))

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies; none outside ``shard_map``."""
    return jax.typeof(x).manual_axis_type.varying

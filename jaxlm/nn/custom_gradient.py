"""Functions with a custom gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxlm import sharding


class custom_vjp:
    """``jax.custom_vjp`` for functions that also run in ``jax.shard_map`` and on a mesh with Explicit axes.

    In ``shard_map``, JAX tracks over which mesh axes each array varies. If weights vary over fewer axes than the
    inputs, their gradient must be summed over the axes over which only the inputs vary. JAX expects this sum from the
    backward rule of ``jax.custom_vjp``. This class casts all arguments to vary over the same axes before it calls the
    function. The gradient of this cast is the sum, so the backward rule need not compute it.

    With Explicit axes, a matmul that sums over a sharded axis needs the sharding of its result (``out_sharding``). The
    backward rule does not know these shardings. So it runs with Auto axes, for which the compiler chooses the
    shardings. Then each gradient gets the sharding of its argument.

    Args:
        function: the function; it is called with positional arguments only.
        nondiff_argnums: as in ``jax.custom_vjp``.
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        self._nondiff_argnums = tuple(nondiff_argnums)
        self._function = jax.custom_vjp(function, nondiff_argnums=self._nondiff_argnums)
        self.__doc__ = function.__doc__

    @classmethod
    def from_rules(
        cls,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        nondiff_argnums: Sequence[int] = (),
        without_gradient: Callable[..., Any] | None = None,
    ) -> custom_vjp:
        """The function with these forward and backward rules. Its value is the first result of ``forward``.

        Args:
            without_gradient: replaces ``forward`` if the function is not differentiated. Only the first result is used.
        """
        compute = forward if without_gradient is None else without_gradient
        function = cls(functools.wraps(forward)(lambda *arguments: compute(*arguments)[0]), nondiff_argnums)
        function.defvjp(forward, backward)
        return function

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """As in ``jax.custom_vjp``."""
        self._function.defvjp(forward, backward)
        self._forward, self._backward = forward, backward

    def __call__(self, *arguments: Any) -> Any:
        diff_argnums = [argnum for argnum in range(len(arguments)) if argnum not in self._nondiff_argnums]
        varying = vary_equally([arguments[argnum] for argnum in diff_argnums])
        cast = dict(zip(diff_argnums, varying, strict=True))
        function = self._function
        if any(map(sharding.has_explicit_axes, jax.tree.leaves(varying))):
            function = jax.custom_vjp(function.fun, nondiff_argnums=self._nondiff_argnums)
            function.defvjp(self._forward, _with_auto_axes(self._backward, varying))
        return function(*(cast.get(argnum, argument) for argnum, argument in enumerate(arguments)))


def _with_auto_axes(backward: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """The backward rule, run with Auto axes. ``arguments`` are the differentiable arguments of the function."""
    shardings = tuple(jax.tree.map(lambda x: jax.typeof(x).sharding, argument) for argument in arguments)

    def backward_with_auto_axes(*rule_arguments: Any) -> Any:
        *nondiff, saved, cotangent = rule_arguments

        def gradients(saved: Any, cotangent: Any) -> Any:
            # ``auto_axes`` needs a gradient with the same tree as its shardings. So a gradient of None becomes this
            # tree with None at each leaf.
            return tuple(
                jax.tree.map(lambda _: None, tree) if gradient is None else gradient
                for gradient, tree in zip(backward(*nondiff, saved, cotangent), shardings, strict=True)
            )

        return jax.sharding.auto_axes(gradients, out_sharding=shardings)(saved, cotangent)

    return backward_with_auto_axes


def sum_dtype(x: jax.Array) -> np.dtype:
    """The dtype of sums of products with entries of ``x``: float64 if ``x`` is float64, otherwise float32."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def vary_equally(tree: Any) -> Any:
    """The arrays of ``tree``, each cast to vary over all mesh axes over which any of these arrays varies."""
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(tree)))

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies; none outside ``shard_map``."""
    return jax.typeof(x).manual_axis_type.varying

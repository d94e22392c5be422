"""Activation functions by name (so that a config can contain the name), and a soft cap."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Activation = Literal["gelu", "gelu_tanh", "relu"]
"""``gelu`` is the exact GELU (erf); ``gelu_tanh`` is the approximation that GPT-2 uses."""


@jax.custom_jvp
def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@_exact_gelu.defjvp
def _exact_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``gelu(x)`` and its tangent. The derivative is the normal distribution function plus ``x`` times the density.

    This rule exists because JAX 0.12 cannot differentiate erf in a ``jax.shard_map`` with default arguments.
    """
    (x,), (dx,) = primals, tangents
    distribution = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return _exact_gelu(x), dx * (distribution + x * density)


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _exact_gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
assert set(_FUNCTIONS) == set(get_args(Activation))


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function called ``name``. The backward pass recomputes its intermediate values
    (``jax.checkpoint``).

    Raises:
        ValueError: an unknown name; the message lists the known names.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"no activation is called {name!r}: choose from {', '.join(sorted(_FUNCTIONS))}")
    return jax.checkpoint(_FUNCTIONS[name], prevent_cse=False)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(x / cap)``, or ``x`` if ``cap`` is None.

    The result is between -cap and cap, and close to ``x`` if ``|x|`` is much smaller than ``cap``.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)

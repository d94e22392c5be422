"""Gated MLPs (Shazeer 2020): SwiGLU ``(silu(x @ gate) * (x @ up)) @ down``, and GeGLU with GELU instead of SiLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import Initializer, Params


def swiglu_specs(width: int, hidden: int, init: Initializer, down_init: Initializer | None = None) -> dict[str, Any]:
    """The specs of ``gate`` and ``up``, [width, hidden], and ``down``, [hidden, width].

    Args:
        init: the initializer of ``gate`` and ``up``.
        down_init: the initializer of ``down``; None: ``init``.
    """
    return {
        "gate": linear_specs((width, hidden), ("embed", "mlp"), init, bias=False),
        "up": linear_specs((width, hidden), ("embed", "mlp"), init, bias=False),
        "down": linear_specs((hidden, width), ("mlp", "embed"), init if down_init is None else down_init, bias=False),
    }


def swiglu(params: Params, x_BTD: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu) -> jax.Array:
    """The output of the gated MLP, [B, T, D]. ``activation`` is applied to ``x @ gate``."""
    gate, up = (constrain(linear(params[name], x_BTD), ("batch", "seq", "mlp")) for name in ("gate", "up"))
    return linear(params["down"], activation(gate) * up)

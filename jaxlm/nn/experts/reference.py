"""The definition of a mixture of experts: every expert processes every token.

Shapes: B batch, T time, D model width, E experts, N selected experts of a token, F hidden width of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.nn.experts.router import Routing
from jaxlm.sharding import constrain


def reference(weights: dict[str, jax.Array], x_BTD: jax.Array, routing: Routing) -> jax.Array:
    """``sum over experts e of weight[e] * down[e](silu(gate[e](x)) * up[e](x))``, [B, T, D].

    The weight of an expert that a token did not select is 0.
    """
    num_experts = weights["gate"].shape[0]
    is_selected_BTNE = jax.nn.one_hot(routing.experts, num_experts, dtype=x_BTD.dtype)
    weight_BTE = jnp.einsum("BTNE,BTN->BTE", is_selected_BTNE, routing.weights.astype(x_BTD.dtype))
    gate_BTEF = jnp.einsum("BTD,EDF->BTEF", x_BTD, weights["gate"])
    up_BTEF = jnp.einsum("BTD,EDF->BTEF", x_BTD, weights["up"])
    hidden_BTEF = constrain(jax.nn.silu(gate_BTEF) * up_BTEF, ("expert_batch", "seq", "expert", "mlp"))
    return jnp.einsum("BTEF,EFD->BTD", hidden_BTEF * weight_BTE[..., None], weights["down"])

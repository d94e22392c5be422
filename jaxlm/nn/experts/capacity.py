"""Mixture of experts with a capacity (Lepikhin et al. 2021, Fedus et al. 2022): experts have a fixed number of slots.

Because the number of slots is fixed, the arrays that devices exchange have static shapes. If a mesh axis splits both
the batch and the experts, one all-to-all moves tokens to the devices of their experts, and another all-to-all moves the
outputs back. An assignment is a pair of a token and one of its selected experts.

Shapes: B batch, T time, D model width, E experts, N selected experts of a token, F hidden width of an expert, C slots
of an expert in a row, A = T * N assignments of a row, P = E * C slots of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn.experts.dropless import CHECKPOINT_NAME
from jaxlm.nn.experts.router import Routing
from jaxlm.nn.experts.rows import permute_rows
from jaxlm.sharding import constrain


def with_capacity(
    weights: dict[str, jax.Array], x_BTD: jax.Array, routing: Routing, keep_BT: jax.Array | None, factor: float
) -> jax.Array:
    """For each token, the weighted sum of the outputs of the experts that accepted it, [B, T, D].

    In each row, an expert accepts at most ``factor * (real tokens of the row) * N / E`` tokens, rounded up. Earlier
    tokens have priority, so the result for a token does not depend on the values of later tokens. It depends on the
    number of later tokens, because the limit depends on it. An expert that did not accept a token adds 0 to the token's
    output. If no expert accepts a token, the output of the token is 0, and only the residual connection passes the
    token to the next layer. Padding tokens get no slot, and their output is not defined.

    Args:
        keep_BT: False at padding. None: no padding.
        factor: the capacity factor of the formula above.
    """
    (B, T, D), N, E = x_BTD.shape, routing.experts.shape[2], weights["gate"].shape[0]
    num_tokens = np.arange(T + 1)
    limits = np.ceil(np.round(factor * num_tokens * N / E, 9))  # without round, 1.1 * 100 / 2 would give 56
    limit_by_num_tokens = np.clip(limits, np.minimum(num_tokens, 1), T).astype(np.int32)  # round may give 0
    C = int(limit_by_num_tokens[T])
    A, P = T * N, E * C
    # The slot of a token depends on all earlier tokens of its row. So all tokens of a row must be on the same device.
    x_BTD = constrain(x_BTD, ("batch", None, "activation_embed"))
    keep_BT = jnp.ones_like(routing.experts[:, :, 0], bool) if keep_BT is None else keep_BT
    limit_B = jnp.asarray(limit_by_num_tokens)[jnp.sum(keep_BT, axis=1)]
    is_expert_BAE = jax.nn.one_hot(routing.experts, E, dtype=jnp.int32).reshape(B, A, E)
    is_expert_BAE = jnp.where(jnp.repeat(keep_BT, N, axis=1)[..., None], is_expert_BAE, 0)
    rank_BA = jnp.sum(jnp.cumsum(is_expert_BAE, axis=1) * is_expert_BAE, axis=2) - 1  # -1 at padding
    is_accepted_BA = (rank_BA >= 0) & (rank_BA < limit_B[:, None])
    slot_BA = jnp.where(is_accepted_BA, routing.experts.reshape(B, A) * C + rank_BA, P)

    def assignment_of_each_slot(slot_A: jax.Array) -> jax.Array:
        return jnp.full(P, A, jnp.int32).at[slot_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")

    assignment_BP = jax.vmap(assignment_of_each_slot)(slot_BA)
    x_BAD = jnp.broadcast_to(x_BTD[:, :, None], (B, T, N, D)).reshape(B, A, D)
    x_BECD = jax.vmap(permute_rows)(x_BAD, assignment_BP, slot_BA).reshape(B, E, C, D)
    y_BECD = _run_experts(weights, x_BECD)
    y_BAD = jax.vmap(permute_rows)(y_BECD.reshape(B, P, D), slot_BA, assignment_BP)
    return jnp.einsum("BTND,BTN->BTD", y_BAD.reshape(B, T, N, D), routing.weights.astype(x_BTD.dtype))


def _run_experts(weights: dict[str, jax.Array], x_BECD: jax.Array) -> jax.Array:
    """The outputs of the experts, [B, E, C, D]: expert e processes its slots ``x[:, e]``.

    The arrays are resharded before and after the experts. If one mesh axis splits both the batch and the experts, each
    resharding is an all-to-all.
    """
    x_BECD = constrain(x_BECD, ("batch", None, None, "activation_embed"))
    x_BECD = constrain(x_BECD, ("expert_batch", "expert", None, "activation_embed"))

    def matmul(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return checkpoint_name(jnp.einsum(equation, x, w), CHECKPOINT_NAME)

    gate, up = (matmul("BECD,EDF->BECF", x_BECD, weights[name]) for name in ("gate", "up"))
    hidden_BECF = constrain(jax.nn.silu(gate) * up, ("expert_batch", "expert", None, "mlp"))
    y_BECD = matmul("BECF,EFD->BECD", hidden_BECF, weights["down"])
    y_BECD = constrain(y_BECD, ("expert_batch", "expert", None, "activation_embed"))
    return constrain(y_BECD, ("batch", None, None, "activation_embed"))

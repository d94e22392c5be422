"""Mixture of experts in which each expert processes all tokens that selected it, without a limit (Gale et al. 2023).

The assignments of tokens to experts are sorted by expert. Then each of the projections gate, up and down is one grouped
matmul for all experts.

Shapes: B batch, T time, D model width, E experts, N selected experts of a token, F hidden width of an expert,
A = B * T * N assignments, M blocks, S rows of a block, P slots (rows of all blocks). In a grouped matmul, C is the
input width and D the output width.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp, sum_dtype
from jaxlm.nn.experts.router import Routing
from jaxlm.nn.experts.rows import Groups, group_by_expert, permute_rows
from jaxlm.sharding import map_shards

GroupedMatmul = Literal["ragged_dot", "blocks"]
CHECKPOINT_NAME = "experts"
"""Checkpoint name of the outputs of the experts' matmuls; a rematerialization policy can save them by this name."""


def dropless(
    weights: dict[str, jax.Array],
    x_BTD: jax.Array,
    routing: Routing,
    keep_BT: jax.Array | None,
    grouped_matmul: GroupedMatmul,
) -> jax.Array:
    """The weighted sum of the selected experts' outputs for each token, [B, T, D]; not defined at padding.

    On a mesh, each device sorts its own tokens. If mesh axes split the experts or their hidden width, the devices along
    these axes get the same tokens. Each of these devices applies its part of the experts, and the results are summed.
    """
    num_experts = weights["gate"].shape[0]
    experts_BTN = routing.experts
    if keep_BT is not None:
        experts_BTN = jnp.where(keep_BT[..., None], experts_BTN, num_experts)
    token_axes = ("expert_batch", "seq", None)
    run = map_shards(
        functools.partial(_run_experts, grouped_matmul=grouped_matmul),
        in_axes=(
            token_axes, token_axes, token_axes, ("expert",), ("expert", None, "mlp"), ("expert", None, "mlp"),
            ("expert", "mlp", None),
        ),
        out_axes=token_axes,
        sum_over=("expert", "mlp"),
    )  # fmt: skip
    indices_E = jnp.arange(num_experts, dtype=jnp.int32)
    weights_BTN = routing.weights.astype(x_BTD.dtype)
    return run(x_BTD, weights_BTN, experts_BTN, indices_E, weights["gate"], weights["up"], weights["down"])


def _run_experts(
    x_BTD: jax.Array,
    weights_BTN: jax.Array,
    experts_BTN: jax.Array,
    indices_E: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    grouped_matmul: GroupedMatmul,
) -> jax.Array:
    """The output of the experts with the consecutive indices ``indices_E``; other experts add 0."""
    (B, T, D), N, E = x_BTD.shape, experts_BTN.shape[2], indices_E.shape[0]
    # The first B * T assignments are those of the first selected experts. In arrays [B * T, N, D], a TPU would pad the
    # axis N to the size of its tiles, 8 or 16.
    expert_A = jnp.moveaxis(experts_BTN, 2, 0).reshape(-1) - indices_E[0]
    S = choices.expert_block_rows(expert_A.shape[0], E) if grouped_matmul == "blocks" else 1
    groups = group_by_expert(expert_A, E, S)
    matmul = functools.partial(_MATMULS[grouped_matmul], groups=groups)
    x_AD = jnp.broadcast_to(x_BTD.reshape(1, B * T, D), (N, B * T, D)).reshape(-1, D)
    x_PD = permute_rows(x_AD, groups.assignments, groups.slots)
    hidden_PF = jax.nn.silu(matmul(x_PD, gate_EDF)) * matmul(x_PD, up_EDF)
    y_AD = permute_rows(matmul(hidden_PF, down_EFD), groups.slots, groups.assignments)
    return jnp.einsum("NBTD,BTN->BTD", y_AD.reshape(N, B, T, D), weights_BTN)


def _ragged_dot(x_PC: jax.Array, w_ECD: jax.Array, groups: Groups) -> jax.Array:
    """The grouped matmul with ``lax.ragged_dot``, or one matmul for a single expert.

    libtpu (JAX 0.10) cannot compile the gradient of ``lax.ragged_dot`` with one group in a training step. The rows of
    ``x`` without an assignment are 0, so a matmul of all rows gives the same result.
    """
    if w_ECD.shape[0] == 1:
        return checkpoint_name(x_PC @ w_ECD[0], CHECKPOINT_NAME)
    return checkpoint_name(lax.ragged_dot(x_PC, w_ECD, groups.sizes), CHECKPOINT_NAME)


def _blocks(x_PC: jax.Array, w_ECD: jax.Array, groups: Groups) -> jax.Array:
    """The grouped matmul as a loop over blocks of rows that have the same expert."""
    num_blocks = groups.block_experts.shape[0]
    y = _block_matmul(
        x_PC.reshape(num_blocks, x_PC.shape[0] // max(1, num_blocks), x_PC.shape[1]), w_ECD, groups.block_experts
    )
    return checkpoint_name(y.reshape(-1, y.shape[2]), CHECKPOINT_NAME)


_MATMULS = {"ragged_dot": _ragged_dot, "blocks": _blocks}


def _block_matmul_forward(x_MSC: jax.Array, w_ECD: jax.Array, expert_M: jax.Array) -> tuple[jax.Array, Any]:
    """``x[m] @ w[expert[m]]`` for each of M blocks, and the arrays for the backward pass."""
    return lax.map(lambda block: block[0] @ w_ECD[block[1]], (x_MSC, expert_M)), (x_MSC, w_ECD, expert_M)


def _block_matmul_backward(saved: Any, dy_MSD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """The gradients of ``x`` and ``w``.

    The gradient of ``w`` is summed in place, block by block, in float32 or float64.
    """
    x_MSC, w_ECD, expert_M = saved
    dtype = sum_dtype(w_ECD)

    def step(dw_ECD: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        x_SC, dy_SD, expert = block
        dw_CD = jnp.matmul(x_SC.T, dy_SD, preferred_element_type=dtype)
        dw_ECD = lax.dynamic_update_index_in_dim(dw_ECD, dw_ECD[expert] + dw_CD, expert, 0)
        return dw_ECD, dy_SD @ w_ECD[expert].T

    dw_ECD, dx_MSC = lax.scan(step, jnp.zeros_like(w_ECD, dtype), (x_MSC, dy_MSD, expert_M))
    return dx_MSC, dw_ECD.astype(w_ECD.dtype), None


_block_matmul = custom_vjp.from_rules(_block_matmul_forward, _block_matmul_backward)

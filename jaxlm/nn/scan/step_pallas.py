"""A Pallas kernel for TPUs: one step of a recurrence whose state is a matrix for each head, as in decoding.

    S_t = decay * S_{t-1} + k (scale * v).T + b (a @ S_{t-1}).T          output: q @ S_t

XLA computes a step with several operations, and some of them read the state again. The kernel reads and writes the
state once. A grid step computes all heads of a row. The kernel gets the state of each head transposed, [V, K]. The
reason is that a TPU pads the last axis of an array to a multiple of 128, and K is a multiple of 128 more often than V
(Mamba-2: K is 128 and V is 64).

Shapes: B batch, H heads, G groups of heads, K width of queries and keys, V width of values, E = 1 or K decays per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.scan.head_blocks import groups_are_sharded, shards_divide_heads

VMEM_LIMIT_BYTES = 32 * 2**20
"""Bytes of VMEM that the kernel may use."""


def supports(query_BTGK: jax.Array, value_BTHV: jax.Array) -> bool:
    """Whether the kernel is used for these queries and values: one step on a TPU, with a state that fits into VMEM."""
    (B, T, G, K), (H, V), shards = query_BTGK.shape, value_BTHV.shape[2:], sharding.num_shards(("heads",))
    if not B or T > 1 or not shards_divide_heads(G, H):
        return False
    # The last axis of the state is padded to a multiple of 128. The old and the new state have two buffers each. One
    # more state size is left for all other arrays.
    state_bytes = 4 * H // shards * V * (K + -K % 128)
    return 5 * state_bytes <= VMEM_LIMIT_BYTES and all(choices.step_kernel(x.dtype) for x in (query_BTGK, value_BTHV))


def run(
    step: Callable[..., Any], inputs: Sequence[jax.Array], state_BHKV: jax.Array, reset_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The output of one step, [B, 1, H, V] in the dtype of the values, and the new state, [B, H, K, V] float32.

    Args:
        step: ``step(state, mask, *inputs of the step)`` computes the same results with XLA, as in ``scan_steps``. It
            replaces the kernel in derivatives and under ``vmap`` (``lazy_pallas.with_reference``).
        inputs: queries and keys [B, 1, G, K], values [B, 1, H, V], log decays [B, 1, H, E]; optionally scales
            [B, 1, H, 1]; and optionally a and b, [B, 1, H, K] each. Without scales, all scales are 1.
        state_BHKV: the state before the step, float32.
        reset_BT: True where the state is set to zeros before the step; None: nowhere.
    """
    arrays = tuple(x[:, 0] for x in inputs)
    is_reset_B = jnp.zeros(len(state_BHKV), jnp.int32) if reset_BT is None else reset_BT[:, 0].astype(jnp.int32)
    head_axes, row_axes = ("batch", "heads", None), ("batch", None, None)
    key_axes = head_axes if groups_are_sharded(arrays[0].shape[1], state_BHKV.shape[1]) else row_axes
    axes = [("batch",), key_axes, key_axes, *[head_axes] * (len(arrays) - 2), (*head_axes, None)]

    def kernel(*arrays: jax.Array) -> Any:
        return sharding.map_shards(_device_step, axes, [head_axes, (*head_axes, None)])(*arrays)

    def reference(is_reset_B: jax.Array, *arrays: jax.Array) -> Any:
        *inputs, state_BHKV = arrays
        new_BHKV, out_BHV = step(state_BHKV, (is_reset_B > 0, None), *inputs)
        return out_BHV, new_BHKV

    out_BHV, new_BHKV = lazy_pallas.with_reference(kernel, reference)(is_reset_B, *arrays, state_BHKV)
    return out_BHV[:, None], new_BHKV


def _device_step(is_reset_B: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output of the rows and heads of one device, [B, H, V], and their new state.

    Args:
        arrays: the inputs of the step without the axis of time, and the state.
    """
    *inputs, state_BHKV = arrays
    state_BHVK = jnp.swapaxes(state_BHKV, 2, 3)

    def row_block(x: jax.Array | jax.ShapeDtypeStruct) -> Any:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, is_reset: (b, *[0] * (len(x.shape) - 1)))

    outputs = lazy_pallas.shapes(inputs[2], state_BHVK)

    def kernel(is_reset: Any, *references: Any) -> None:
        _kernel(is_reset, references[:-3], *references[-3:])

    out_BHV, new_BHVK = pl.pallas_call(
        kernel, name="recurrence_step", interpret=lazy_pallas.INTERPRET, out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(len(state_BHVK),), in_specs=[row_block(x) for x in (*inputs, state_BHVK)],
            out_specs=tuple(row_block(x) for x in outputs),
        ),
        input_output_aliases={len(inputs) + 1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT_BYTES),
    )(is_reset_B, *inputs, state_BHVK)  # fmt: skip
    return out_BHV, jnp.swapaxes(new_BHVK, 2, 3)


def _kernel(is_reset: Any, inputs: Sequence[Any], state: Any, out: Any, new_state: Any) -> None:
    """Compute the step of one row.

    Args:
        is_reset: [B], whether the state of the row is set to zeros before the step.
        inputs: the queries and keys [G, K], the values [H, V], the log decays [H, E], and optionally the scales
            [H, 1] and a and b [H, K] (:func:`run`).
        state, new_state: [H, V, K].
        out: [H, V].
    """
    q_GK, k_GK, v_HV, log_HE, *optional = (x[...].astype(jnp.float32) for x in inputs)
    v_VH = v_HV.T
    a_HK, b_HK = optional[-2:] if len(optional) > 1 else (None, None)
    scale_H1 = optional[0] if len(optional) % 2 else None
    H, decay_HE, keeps_state = state.shape[0], jnp.exp(log_HE), is_reset[pl.program_id(0)] == 0
    out_VH, head_VH = jnp.zeros_like(v_VH), lax.broadcasted_iota(jnp.int32, v_VH.shape, 1)
    for head in range(H):
        head_slice, group = slice(head, head + 1), head * len(q_GK) // H
        group_slice = slice(group, group + 1)
        old_VK = jnp.where(keeps_state, state[head], 0.0)
        v_V1 = v_VH[:, head_slice] if scale_H1 is None else v_VH[:, head_slice] * scale_H1[head_slice]
        new_VK = decay_HE[head_slice] * old_VK + v_V1 * k_GK[group_slice]
        if a_HK is not None and b_HK is not None:
            new_VK += jnp.sum(old_VK * a_HK[head_slice], axis=1, keepdims=True) * b_HK[head_slice]
        new_state[head] = new_VK
        out_V1 = jnp.sum(new_VK * q_GK[group_slice], axis=1, keepdims=True)
        out_VH = jnp.where(head_VH == head, out_V1, out_VH)
    out[...] = out_VH.T.astype(out.dtype)

"""Loops over steps, and over chunks of steps, for the scans whose state is a matrix.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, X any width, C
chunks, L steps of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm import sharding
from jaxlm.nn.custom_gradient import vary_equally
from jaxlm.nn.time_chunks import join_time, split_time


def prepare(
    inputs: Sequence[jax.Array],
    state_BHKV: jax.Array | None,
    reset_BT: jax.Array | None,
    keep_BT: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """The inputs with zeros at padding, the float32 state before the first step, and the resets.

    The returned ``reset_BT`` is False at padding. Batch and heads may be sharded. The time axis is not sharded, because
    the steps are sequential.

    Args:
        inputs: queries and keys [B, T, G, K], values [B, T, H, V], and other arrays [B, T, H, X], in this order.
        state_BHKV: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step; None: nowhere.
        keep_BT: False at padding; None: no padding.
    """
    H = inputs[2].shape[2]
    arrays = [sharding.constrain(x, ("batch", None, "heads" if x.shape[2] == H else None, None)) for x in inputs]
    if keep_BT is not None:
        arrays = [jnp.where(keep_BT[:, :, None, None], x, 0) for x in arrays]
        reset_BT = None if reset_BT is None else reset_BT & keep_BT
    if state_BHKV is None:
        key_BHK, value_BHV = per_head(arrays[1][:, 0], H), arrays[2][:, 0]
        state_BHKV = jnp.zeros_like(key_BHK[..., None] * value_BHV[:, :, None], jnp.float32)
    # In ``jax.shard_map``, the first state must vary over the same mesh axes as the later states.
    return vary_equally((arrays, state_BHKV.astype(jnp.float32), reset_BT))


def per_head(x_BG: jax.Array, heads: int) -> jax.Array:
    """``x`` with each group repeated for the heads of the group, [B, H, ...]. The heads of a group are consecutive."""
    return x_BG if x_BG.shape[1] == heads else jnp.repeat(x_BG, heads // x_BG.shape[1], axis=1)


def scan_steps(step: Callable[..., Any], inputs: Sequence[jax.Array], state: Any, reset_BT: jax.Array | None) -> Any:
    """The outputs [B, T, H, V] and the last state of a loop over steps.

    Args:
        step: ``step(state, mask, *inputs of the step)`` returns the state after the step and the output [B, H, V].
            ``mask`` is the argument ``masks`` of :func:`jaxlm.nn.segments.reset_state` for the step.
        inputs: arrays [B, T, ...].
        state: an array or a tree of arrays.
        reset_BT: True where the state is set to zeros before the step; None: nowhere.
    """
    masks = None if reset_BT is None else (reset_BT, None)
    steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (masks, *inputs))
    last, out_TBHV = lax.scan(lambda state, step_inputs: step(state, *step_inputs), state, steps)
    return jnp.swapaxes(out_TBHV, 0, 1), last


def scan_chunks(
    run_chunk: Callable[..., Any],
    inputs: Sequence[jax.Array],
    state_BHKV: jax.Array,
    reset_BT: jax.Array | None,
    chunk: int,
    step: Callable[..., Any] | None = None,
) -> Any:
    """The outputs [B, T, H, V] and the last state of a loop over chunks.

    The forward pass saves only the inputs and the state before each chunk. The backward pass recomputes each chunk and
    differentiates it by autodiff.

    Args:
        run_chunk: ``run_chunk(state, *inputs of the chunk)`` returns the state after the chunk and the outputs of its
            steps, [B, H, L, V]. :func:`split_into_chunks` defines the inputs of a chunk. A column v of the state is
            the part with index v on the last axis. Column v of the two results must not depend on the other columns of
            the state.
        inputs: arrays [B, T, H, X] or [B, T, G, X]. The decay of a step with a reset must be 0.
        reset_BT: True where the state is set to zeros before the step; None: nowhere. If it is given, ``run_chunk``
            gets a state without non-finite entries (:func:`_run_with_resets`).
        chunk: see :func:`split_into_chunks`.
        step: the argument ``step`` of :func:`scan_steps`, or None. If it is given and the call is not differentiated,
            ``scan_steps`` computes the result, without chunks.
    """

    def run(inputs: Sequence[jax.Array], state_BHKV: jax.Array, reset_BT: jax.Array | None) -> Any:
        function, chunks = run_chunk, split_into_chunks(inputs, chunk)
        if reset_BT is not None:
            (reset_CB1L1,) = split_into_chunks((reset_BT[:, :, None, None],), chunk)
            function = functools.partial(_run_with_resets, run_chunk)
            chunks = (jnp.cumsum(reset_CB1L1, axis=3) > 0, *chunks)
        recomputed = jax.checkpoint(function, prevent_cse=False)
        last_BHKV, out_CBHLV = lax.scan(lambda state, inputs: recomputed(state, *inputs), state_BHKV, chunks)
        return join_time(jnp.swapaxes(out_CBHLV, 2, 3), inputs[0].shape[1]), last_BHKV

    if step is None:
        return run(inputs, state_BHKV, reset_BT)
    forward = jax.custom_jvp(functools.partial(scan_steps, step))
    forward.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return forward(tuple(inputs), state_BHKV, reset_BT)


def _run_with_resets(
    run_chunk: Callable[..., Any], state_BHKV: jax.Array, after_reset_B1L1: jax.Array, *inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The results of ``run_chunk`` for a chunk that may have resets, from a state that may have non-finite entries.

    ``run_chunk`` multiplies the state by a decay of 0 at a reset, and 0 * NaN is NaN. So each column of the state (the
    entries with one index on the last axis) that has a non-finite entry is replaced by zeros. In this column, the
    outputs before the first reset are then set to NaN. The state after the chunk is set to NaN if the chunk has no
    reset.

    Args:
        after_reset_B1L1: True at the first reset of the chunk and at all later steps.
    """
    # 0 * x is 0 if x is finite, otherwise NaN. If the state is constant and there is only one chunk, XLA folds this sum
    # quickly. Folding ``all(isfinite(state))`` takes seconds.
    is_finite_BH1V = jnp.isfinite(jnp.sum(0.0 * state_BHKV, axis=2, keepdims=True))
    new_BHKV, out_BHLV = run_chunk(jnp.where(is_finite_BH1V, state_BHKV, 0.0), *inputs)
    out_BHLV = jnp.where(is_finite_BH1V | after_reset_B1L1, out_BHLV, jnp.nan)
    return jnp.where(is_finite_BH1V | after_reset_B1L1[:, :, -1:], new_BHKV, jnp.nan), out_BHLV


def split_into_chunks(inputs: Sequence[jax.Array], chunk: int) -> tuple[jax.Array, ...]:
    """Each input [B, T, H, X] in chunks, [C, B, H, L, X].

    The last chunk is padded with zeros. So a step whose inputs are zeros must not change the state.

    Args:
        chunk: the maximum of L, a power of two. If the smallest power of two that is at least T is less than ``chunk``,
            L is this power. Otherwise, L is ``chunk``.
    """
    T = inputs[0].shape[1]
    L = min(chunk, 1 << (T - 1).bit_length())
    return tuple(jnp.swapaxes(split_time(x, L), 2, 3) for x in inputs)


def product_in(dtype: DTypeLike) -> Callable[..., jax.Array]:
    """A function like ``jnp.einsum`` that casts its inputs to ``dtype`` and returns float32.

    If ``dtype`` is float16, the inputs are cast to float32, because products of queries and keys can overflow in
    float16.
    """
    dtype = jnp.float32 if dtype == jnp.float16 else dtype

    def product(subscripts: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *(x.astype(dtype) for x in factors), preferred_element_type=jnp.float32)

    return product

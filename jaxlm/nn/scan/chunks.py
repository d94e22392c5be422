"""Loops over steps, and over chunks of steps, for the scans whose state is a matrix.

Shapes: B batch, T time, H heads, G groups of heads, K width of queries and keys, V width of values, X any width, C
chunks, L steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm import sharding
from jaxlm.nn.custom_gradient import vary_equally


def prepare(
    inputs: Sequence[jax.Array], state_BHKV: jax.Array | None, keep_BT: jax.Array | None
) -> tuple[list[jax.Array], jax.Array]:
    """The inputs with zeros at padding, and the state before the first step, float32.

    Batch and heads may be sharded. The time axis is not sharded, because the steps are sequential.

    Args:
        inputs: queries and keys [B, T, G, K], values [B, T, H, V], and other arrays [B, T, H, X], in this order.
        state_BHKV: the state before the first step; None: zeros.
        keep_BT: False at padding; None: no padding.
    """
    H = inputs[2].shape[2]
    arrays = [sharding.constrain(x, ("batch", None, "heads" if x.shape[2] == H else None, None)) for x in inputs]
    if keep_BT is not None:
        arrays = [jnp.where(keep_BT[:, :, None, None], x, 0) for x in arrays]
    if state_BHKV is None:
        key_BHK, value_BHV = per_head(arrays[1][:, 0], H), arrays[2][:, 0]
        state_BHKV = jnp.zeros_like(key_BHK[..., None] * value_BHV[:, :, None], jnp.float32)
    # In ``jax.shard_map``, the first state must vary over the same mesh axes as the later states.
    return vary_equally((arrays, state_BHKV.astype(jnp.float32)))


def per_head(x_BG: jax.Array, heads: int) -> jax.Array:
    """``x`` with each group repeated for the heads of the group, [B, H, ...]. The heads of a group are consecutive."""
    return x_BG if x_BG.shape[1] == heads else jnp.repeat(x_BG, heads // x_BG.shape[1], axis=1)


def scan_steps(step: Callable[..., Any], inputs: Sequence[jax.Array], state_BHKV: jax.Array) -> Any:
    """The outputs [B, T, H, V] and the last state of a loop over steps.

    Args:
        step: ``step(state, *inputs of the step)`` returns the state after the step and the output [B, H, V].
        inputs: arrays [B, T, ...].
    """
    steps = [jnp.swapaxes(x, 0, 1) for x in inputs]
    last_BHKV, out_TBHV = lax.scan(lambda state, inputs: step(state, *inputs), state_BHKV, steps)
    return jnp.swapaxes(out_TBHV, 0, 1), last_BHKV


def scan_chunks(
    run_chunk: Callable[..., Any],
    inputs: Sequence[jax.Array],
    state_BHKV: jax.Array,
    chunk: int,
    step: Callable[..., Any] | None = None,
) -> Any:
    """The outputs [B, T, H, V] and the last state of a loop over chunks.

    The forward pass saves only the inputs and the state before each chunk. The backward pass recomputes each chunk and
    differentiates it by autodiff.

    Args:
        run_chunk: ``run_chunk(state, *inputs of the chunk)`` returns the state after the chunk and the outputs of its
            steps, [B, H, L, V]. :func:`split_into_chunks` defines the inputs of a chunk.
        inputs: arrays [B, T, H, X].
        chunk: see :func:`split_into_chunks`.
        step: None, or the function of :func:`scan_steps`. If ``step`` is given and the call is not differentiated, the
            result is computed by ``scan_steps``, without chunks.
    """

    def run(inputs: Sequence[jax.Array], state_BHKV: jax.Array) -> Any:
        recomputed, chunks = jax.checkpoint(run_chunk, prevent_cse=False), split_into_chunks(inputs, chunk)
        last_BHKV, out_CBHLV = lax.scan(lambda state, inputs: recomputed(state, *inputs), state_BHKV, chunks)
        return join_chunks(out_CBHLV, inputs[0].shape[1]), last_BHKV

    if step is None:
        return run(inputs, state_BHKV)
    forward = jax.custom_jvp(lambda inputs, state_BHKV: scan_steps(step, inputs, state_BHKV))
    forward.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return forward(tuple(inputs), state_BHKV)


def split_into_chunks(inputs: Sequence[jax.Array], chunk: int) -> tuple[jax.Array, ...]:
    """Each input [B, T, H, X] in chunks, [C, B, H, L, X].

    The last chunk is padded with zeros. So a step whose inputs are zeros must not change the state.

    Args:
        chunk: L, a power of two. If ``chunk`` is more than T, L is the smallest power of two that is at least T.
    """
    T = inputs[0].shape[1]
    L = min(chunk, 1 << (T - 1).bit_length())

    def split(x_BTHX: jax.Array) -> jax.Array:
        B, _, H, X = x_BTHX.shape
        x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, -T % L), (0, 0), (0, 0)))
        return x_BTHX.reshape(B, -(-T // L), L, H, X).transpose(1, 0, 3, 2, 4)

    return tuple(map(split, inputs))


def join_chunks(x_CBHLX: jax.Array, T: int) -> jax.Array:
    """The first T steps of the chunks, [B, T, H, X]. It is the inverse of :func:`split_into_chunks`."""
    C, B, H, L, X = x_CBHLX.shape
    return x_CBHLX.transpose(1, 0, 3, 2, 4).reshape(B, C * L, H, X)[:, :T]


def product_in(dtype: DTypeLike) -> Callable[..., jax.Array]:
    """A function like ``jnp.einsum`` that casts its inputs to ``dtype`` and returns float32."""

    def product(subscripts: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *(x.astype(dtype) for x in factors), preferred_element_type=jnp.float32)

    return product

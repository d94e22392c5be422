"""Cross entropy and argmax of logits, computed for one chunk of time steps at a time.

The logits of only one chunk exist at a time. If TPU kernels compute the loss, no logits are stored.

Shapes: B batch, T time, D model width, V vocabulary, C number of time steps of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.embedding import Unembedding, argmax, as_logits
from jaxlm.nn.loss.cross_entropy import (
    Head,
    check_shapes,
    choose_kernels,
    logits_shape,
    loss_and_gradients,
    scale_gradients,
    weighted_loss,
)
from jaxlm.nn.time_chunks import join_time, split_time
from jaxlm.spec import Params, require_arrays


def chunked_cross_entropy(
    head: Head,
    params: Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    label_smoothing: float = 0.0,
    max_chunk_logits: int | None = None,
) -> jax.Array:
    """``sum(weights * cross_entropy(head(params, hidden), targets, label_smoothing))``, in chunks of time.

    The time axis is split into chunks of at most ``max_chunk_logits`` logits (default:
    ``jaxlm.nn.choices.max_logits``). If one time step has more logits than this maximum, a chunk is one time step. If
    TPU kernels compute the loss, there is one chunk, and its logits are not stored. Under differentiation, the forward
    pass also computes the gradients of each chunk, and the backward pass only multiplies them by the cotangent of the
    loss. The function is differentiable in ``hidden`` and ``params``. The gradient of ``weights`` is always zeros.
    Positions with weight 0 are ignored; weights may be negative. ``head`` must not read other differentiated arrays
    (``Head``).

    Returns:
        A float32 scalar, in nats.

    Raises:
        ValueError: the targets or weights are not [B, T].
    """
    check_shapes(hidden_BTD, targets_BT, weights_BT)
    if hidden_BTD.size == 0:
        return jnp.zeros((), jnp.float32)  # an empty sum
    if max_chunk_logits is None:
        max_chunk_logits = choices.max_logits()
    leaves, treedef = jax.tree.flatten(params)
    used_indices = _used_leaf_indices(head, params, hidden_BTD)

    def head_from_used_leaves(used_leaves: list[jax.Array], hidden: jax.Array) -> jax.Array | Unembedding:
        # Only the leaves that the head reads are arguments. For other leaves, the loop would carry gradients of zeros.
        all_leaves: list[Any] = [None] * len(leaves)
        for index, leaf in zip(used_indices, used_leaves, strict=True):
            all_leaves[index] = leaf
        return head(jax.tree.unflatten(treedef, all_leaves), hidden)

    used_leaves = [leaves[index] for index in used_indices]
    weights_BT = weights_BT.astype(jnp.float32)
    return _chunked_loss(
        head_from_used_leaves, max_chunk_logits, label_smoothing, used_leaves, hidden_BTD, targets_BT, weights_BT
    )


def chunked_argmax(head: Head, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """The id with the largest logit at each position, [B, T] int32, computed in chunks of time.

    Among equal logits, the lowest id is chosen. The time axis is split as in :func:`chunked_cross_entropy`. Not
    differentiable.
    """
    require_arrays(hidden_BTD=hidden_BTD)
    B, T, _ = hidden_BTD.shape
    if hidden_BTD.size == 0:
        return jnp.zeros((B, T), jnp.int32)
    C = chunk_length(head, choices.max_logits(), params, hidden_BTD)
    argmax_by_chunk = jax.lax.map(lambda hidden: argmax(as_logits(head(params, hidden))), split_time(hidden_BTD, C))
    return join_time(argmax_by_chunk, T)


def _used_leaf_indices(head: Head, params: Params, hidden: jax.Array) -> list[int]:
    """The indices of the leaves of ``params`` that ``head`` reads, according to the jaxpr of ``head``."""
    jaxpr = jax.make_jaxpr(head)(params, hidden).jaxpr
    used_var_ids = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    return [index for index, var in enumerate(jaxpr.invars[:-1]) if id(var) in used_var_ids]


def chunk_length(head: Head, max_chunk_logits: int, params: Params, hidden_BTD: jax.Array) -> int:
    """C, the number of time steps of a chunk, at least 1.

    If C is more than 1, a chunk [B, C, V] has at most ``max_chunk_logits`` logits.
    """
    B, T, _ = hidden_BTD.shape
    V = logits_shape(head, params, hidden_BTD)[-1]
    return choices.loss_chunk(T, max(1, max_chunk_logits // (B * V)))


@functools.partial(custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_loss(
    head: Head,
    max_chunk_logits: int,
    label_smoothing: float,
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    def loss_in_chunks(params: Params, *arrays: jax.Array) -> jax.Array:
        def add_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
            return total + weighted_loss(head, label_smoothing, params, *chunk), None

        C = chunk_length(head, max_chunk_logits, params, arrays[0])
        # In ``shard_map``, the first carry must vary over the same mesh axes as the later carries. ``zeros_like`` gives
        # it the axes of the weights.
        zero = jnp.zeros_like(arrays[-1], jnp.float32, ())
        return jax.lax.scan(add_chunk, zero, tuple(split_time(x, C) for x in arrays))[0]

    run = choose_kernels(weighted_loss, loss_in_chunks, head, label_smoothing, params, hidden)
    return run(params, hidden, targets, weights)


def _forward(
    head: Head,
    max_chunk_logits: int,
    label_smoothing: float,
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    def loss_and_gradients_in_chunks(params: Params, *arrays: jax.Array) -> Any:
        def add_chunk(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
            loss, dparams, dhidden = loss_and_gradients(head, label_smoothing, params, *chunk)
            sums = (loss, jax.tree.map(lambda gradient: gradient.astype(jnp.float32), dparams))
            return sums if carry is None else jax.tree.map(jnp.add, carry, sums), dhidden

        T = arrays[0].shape[1]
        C = chunk_length(head, max_chunk_logits, params, arrays[0])
        chunks = tuple(split_time(x, C) for x in arrays)
        # The first chunk is computed before the loop. Its loss and gradients are the first carry, instead of zeros.
        carry, dhidden = add_chunk(None, jax.tree.map(lambda x: x[0], chunks))
        dhidden = dhidden[None]
        if T > C:
            carry, later_dhidden = jax.lax.scan(add_chunk, carry, jax.tree.map(lambda x: x[1:], chunks))
            dhidden = jnp.concatenate([dhidden, later_dhidden])
        total, dparams = carry
        dparams = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), dparams, params)
        return total, dparams, join_time(dhidden, T)

    run = choose_kernels(loss_and_gradients, loss_and_gradients_in_chunks, head, label_smoothing, params, hidden)
    total, *gradients = run(params, hidden, targets, weights)
    return total, tuple(gradients)


def _backward(
    head: Head, max_chunk_logits: int, label_smoothing: float, gradients: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    dparams, dhidden = scale_gradients(gradients, cotangent)
    return dparams, dhidden, None, None


_chunked_loss.defvjp(_forward, _backward)

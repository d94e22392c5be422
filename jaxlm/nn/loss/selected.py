"""Cross entropy at the positions with nonzero weight, for objectives that predict only some of the tokens.

Shapes: B batch, T time, D model width, V vocabulary, N = B * T positions, R positions of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.loss.chunked import chunked_cross_entropy
from jaxlm.nn.loss.cross_entropy import (
    Head,
    check_shapes,
    choose_kernels,
    logits_shape,
    loss_and_gradients,
    scale_gradients,
    weighted_loss,
)
from jaxlm.spec import Params


def selected_cross_entropy(
    head: Head, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """``sum(weights * cross_entropy(head(params, hidden), targets))``, with logits only where the weight is not 0.

    The positions are sorted: positions with nonzero weight come first. A loop then computes the loss of one block of
    positions at a time, until it has read all positions with nonzero weight. So the number of blocks depends on the
    weights, and JAX cannot differentiate the loop in reverse mode. The function has a custom gradient for ``hidden``
    and ``params``. The gradient of ``weights`` is always zeros. ``head`` must not read other differentiated arrays
    (``Head``). Second derivatives need forward mode over reverse mode (``jax.jvp`` of ``jax.grad``).

    JAX cannot sort an array axis that is sharded over an Explicit mesh axis. On a mesh with Explicit axes, this
    function calls ``chunked_cross_entropy`` instead, which computes the logits of all positions.

    Returns:
        A float32 scalar, in nats.

    Raises:
        ValueError: the targets or weights are not [B, T].
    """
    check_shapes(hidden_BTD, targets_BT, weights_BT)
    if hidden_BTD.size == 0:
        return jnp.zeros((), jnp.float32)
    if sharding.has_explicit_axes(hidden_BTD):
        return chunked_cross_entropy(head, params, hidden_BTD, targets_BT, weights_BT)
    return _selected(head, params, hidden_BTD, targets_BT, weights_BT.astype(jnp.float32))


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _selected(head: Head, params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    def add_block(total: jax.Array, _: Any, block: Any) -> jax.Array:
        reference = functools.partial(weighted_loss, head, 0.0)
        return total + choose_kernels(weighted_loss, reference, head, 0.0, params, block[0])(params, *block)

    return _fold_weighted_blocks(
        head, params, (hidden, targets, weights), add_block, jnp.zeros_like(weights, shape=())
    )[0]


def _fold_weighted_blocks(
    head: Head, params: Params, position_arrays: Any, body: Callable[[Any, Any, Any], Any], init: Any
) -> tuple[Any, jax.Array]:
    """The result of a loop over the blocks of R positions that contain the positions with nonzero weight.

    The positions are sorted: nonzero weights first. Each iteration computes ``carry = body(carry, first, block)``.
    ``first`` is the index of the first position of the block in the sorted order. A block is a tuple of hidden states,
    targets and weights, [S, R / S, ...] each. S is the number of shards of the batch axis.

    Args:
        position_arrays: hidden states, targets and weights, [B, T, ...] each.
        init: the first carry.

    Returns:
        The last carry, and the sorted order: the indices [N] of the positions in the flattened batch.
    """
    hidden, targets, weights = (jnp.asarray(x).reshape(-1, *x.shape[2:]) for x in position_arrays)
    N, R, shards = len(targets), _block_rows(head, params, position_arrays[0]), sharding.num_shards(("batch",))
    is_weighted = weights != 0
    order = jnp.argsort(~is_weighted, stable=True)
    # If R does not divide N, the last block is padded with copies of position 0. Their weight is 0.
    padded_order = jnp.pad(order, (0, -N % R))
    sorted_weights = jnp.pad(weights[order], (0, -N % R))

    def block(i: Any) -> Any:
        positions = jax.lax.dynamic_slice_in_dim(padded_order, i * R, R)
        block_weights = jax.lax.dynamic_slice_in_dim(sorted_weights, i * R, R)
        flat_arrays = hidden[positions], targets[positions], block_weights
        arrays = (x.reshape(shards, R // shards, *x.shape[1:]) for x in flat_arrays)
        return tuple(sharding.constrain(x, ("batch", *[None] * (x.ndim - 1))) for x in arrays)

    num_blocks = -(-jnp.sum(is_weighted) // R)
    return jax.lax.fori_loop(0, num_blocks, lambda i, carry: body(carry, i * R, block(i)), init), order


def _block_rows(head: Head, params: Params, hidden_BTD: jax.Array) -> int:
    """R, the number of positions of a block."""
    B, T, V = logits_shape(head, params, hidden_BTD)
    return choices.loss_block_rows(B * T, V)


def _selected_forward(head: Head, params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def add_block(carry: Any, first: Any, block: Any) -> Any:
        total, dparams, dhidden = carry
        reference = functools.partial(loss_and_gradients, head, 0.0)
        run = choose_kernels(loss_and_gradients, reference, head, 0.0, params, block[0])
        loss, block_dparams, block_dhidden = run(params, *block)
        dparams = jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), dparams, block_dparams)
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, block_dhidden.reshape(-1, D), first, 0)
        return total + loss, dparams, dhidden

    N, D, R = targets.size, hidden.shape[-1], _block_rows(head, params, hidden)
    init = (
        # In ``shard_map``, the first carry must vary over the same mesh axes as the later carries. ``zeros_like``
        # gives it the axes of its argument.
        jnp.zeros_like(weights, shape=()),
        jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params),
        jnp.zeros_like(hidden, shape=(N + -N % R, D)),  # the last block may end after the last position
    )
    arrays = (hidden, targets, weights)
    (total, dparams, sorted_ND), order = _fold_weighted_blocks(head, params, arrays, add_block, init)
    dparams = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), dparams, params)
    dhidden = jnp.zeros_like(hidden, shape=(N, D)).at[order].set(sorted_ND[:N])
    return total, (dparams, dhidden.reshape(hidden.shape))


def _selected_backward(head: Head, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    dparams, dhidden = scale_gradients(gradients, cotangent)
    return dparams, dhidden, None, None


_selected.defvjp(_selected_forward, _selected_backward)

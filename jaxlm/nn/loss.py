"""Cross entropy over a vocabulary, for all positions at once or in chunks.

Shapes: B batch, T time, D model width, V vocabulary, C time steps of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import host, sharding
from jaxlm.devices import LANES

Head = Callable[[Any, jax.Array], jax.Array]
"""``head(params, hidden [B, C, D]) -> logits [B, C, V]``: the ``logits`` of a family with its config filled in."""

CHUNK_LOGITS = {"cpu": 2**24}
"""Number of logits that exist at a time on a CPU device: 64 MiB in float32. With fewer logits the matmuls have too few
rows; with more, allocating new memory is slow. The number is doubled if the process keeps its freed memory
(``host.keep_freed_memory``)."""
CHUNK_LOGITS_ACCELERATOR = 2**27
"""The same number on accelerators, 512 MiB. Each chunk reads and writes the gradient of the whole head, so many chunks
are slow: with 2**24 logits, the 98 chunks of a GPT-2 step took as long as the rest of the step (docs/labbook.md)."""


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """``-log softmax(logits)[target]`` in nats, [B, T] float32. A target outside the vocabulary gives NaN.

    With ``label_smoothing`` e, the target distribution is 1 - e on the target plus e times the uniform distribution
    over the vocabulary, without padding rows (Szegedy et al. 2016, section 7).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return lse_BT - _expected_logit(logits_BTV, targets_BT, label_smoothing)


def _expected_logit(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float) -> jax.Array:
    """The expected logit under the (smoothed) target distribution, [B, T]."""
    target_logit_BT = _target_logits(logits_BTV, targets_BT)
    if label_smoothing == 0.0:
        return target_logit_BT
    in_vocabulary_BTV = logits_BTV > jnp.finfo(jnp.float32).min  # not a padding row; see nn.embedding.unembed
    mean_BT = jnp.sum(jnp.where(in_vocabulary_BTV, logits_BTV, 0.0), axis=-1) / jnp.sum(in_vocabulary_BTV, axis=-1)
    return (1.0 - label_smoothing) * target_logit_BT + label_smoothing * mean_BT


def _target_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # "fill" gives NaN for an id outside the vocabulary. Negative ids are mapped outside, so that they do not count from
    # the end.
    targets_BT = jnp.where(targets_BT < 0, logits_BTV.shape[-1], targets_BT)
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]


def chunked_cross_entropy(
    head: Head,
    params: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    label_smoothing: float = 0.0,
    chunk_logits: int | None = None,
) -> jax.Array:
    """``sum(weights * cross_entropy(head(params, hidden), targets, label_smoothing))`` without an array [B, T, V].

    The time axis is split into chunks, so that at most ``chunk_logits`` logits exist at once (None: the number in
    :data:`CHUNK_LOGITS` on each device). The forward pass also computes the gradient of each chunk. This is possible
    because the loss is a sum: its gradient is known except for a factor, the cotangent. So nothing is recomputed.
    Differentiable in ``hidden`` and in the leaves of ``params`` that ``head`` reads; not in ``weights``.

    Returns:
        A float32 scalar, in nats.
    """
    if hidden_BTD.size == 0:
        return jnp.zeros(())  # the sum over no target
    if chunk_logits is None:
        chunk_logits = _max_live_logits()
    leaves, tree = jax.tree.flatten(params)
    used = _leaves_read(head, params, hidden_BTD)

    def head_of_used(used_leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
        # Leaves that the head does not read are left out. Otherwise the loop would carry their zero gradients.
        all_leaves: list[Any] = [None] * len(leaves)
        for index, leaf in zip(used, used_leaves, strict=True):
            all_leaves[index] = leaf
        return head(jax.tree.unflatten(tree, all_leaves), hidden)

    used_leaves = [leaves[index] for index in used]
    weights_BT = weights_BT.astype(jnp.float32)
    return _chunked(head_of_used, chunk_logits, label_smoothing, used_leaves, hidden_BTD, targets_BT, weights_BT)


def chunked_argmax(head: Head, params: Any, hidden_BTD: jax.Array, *, chunk_logits: int | None = None) -> jax.Array:
    """The id with the largest logit at each position, [B, T] int32, without an array [B, T, V].

    Among equal logits, the lowest id is chosen. The time axis is split as in :func:`chunked_cross_entropy`. Not
    differentiable.
    """
    B, T, _ = hidden_BTD.shape
    if hidden_BTD.size == 0:
        return jnp.zeros((B, T), jnp.int32)
    C = _chunk_length(head, _max_live_logits() if chunk_logits is None else chunk_logits, params, hidden_BTD)
    best = jax.lax.map(lambda hidden: jnp.argmax(head(params, hidden), axis=-1), _split_time(hidden_BTD, C))
    return jnp.moveaxis(best, 0, 1).reshape(B, -1)[:, :T].astype(jnp.int32)


def _max_live_logits() -> int:
    """The number of logits that may exist at a time, on all devices together."""
    active = sharding.active()
    num_shards = 1 if active is None else active.pieces(("batch", None, "vocab"))
    platform = sharding.platform()
    keeps_memory = platform == "cpu" and host.keeps_freed_memory()
    return CHUNK_LOGITS.get(platform, CHUNK_LOGITS_ACCELERATOR) * num_shards * (2 if keeps_memory else 1)


def _leaves_read(head: Head, params: Any, hidden: jax.Array) -> list[int]:
    """The indices of the leaves of ``params`` that ``head`` uses, found in its jaxpr."""
    jaxpr = jax.make_jaxpr(head)(params, hidden).jaxpr
    used = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    return [index for index, var in enumerate(jaxpr.invars[:-1]) if id(var) in used]


def _split_time(x: jax.Array, C: int) -> jax.Array:
    """``x`` [B, T, ...] in chunks of time, [chunks, B, C, ...]; T is padded with zeros to chunks * C."""
    B, T = x.shape[:2]
    chunks = -(-T // C)
    x = jnp.pad(x, ((0, 0), (0, chunks * C - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, chunks, C, *x.shape[2:]), 1, 0)


def _chunk_length(head: Head, chunk_logits: int, params: Any, hidden_BTD: jax.Array) -> int:
    """C, the number of steps per chunk, so that a chunk has at most ``chunk_logits`` logits.

    It is T if one chunk is enough. Otherwise, all chunks have about the same length on a CPU; on an accelerator the
    length is a multiple of ``LANES`` or, below that, a power of two.
    """
    B, T, _ = hidden_BTD.shape
    V = jax.eval_shape(head, params, hidden_BTD).shape[-1]
    longest = max(1, chunk_logits // (B * V))
    if longest >= T:
        return T
    if sharding.platform() == "cpu":
        return -(-T // -(-T // longest))
    # By the TPU compiler's estimate, chunks of 147 steps take a sixth more time than chunks of 128.
    return longest - longest % min(LANES, 2 ** (longest.bit_length() - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    head: Head,
    chunk_logits: int,
    label_smoothing: float,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    def add_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden, targets, weights = chunk
        losses = cross_entropy(head(params, hidden), targets, label_smoothing)
        return total + jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), None

    C = _chunk_length(head, chunk_logits, params, hidden)
    return jax.lax.scan(add_chunk, jnp.zeros(()), tuple(_split_time(x, C) for x in (hidden, targets, weights)))[0]


def _forward(
    head: Head,
    chunk_logits: int,
    label_smoothing: float,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    def add_chunk(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        loss, dparams, dhidden = _chunk_loss_and_gradients(head, label_smoothing, params, *chunk)
        sums = (loss, dparams)
        return sums if carry is None else jax.tree.map(jnp.add, carry, sums), dhidden

    C = _chunk_length(head, chunk_logits, params, hidden)
    chunks = tuple(_split_time(x, C) for x in (hidden, targets, weights))
    # The first chunk is computed before the loop, so that its sums initialize the carry instead of zeros.
    carry, dhidden = add_chunk(None, jax.tree.map(lambda x: x[0], chunks))
    dhidden = dhidden[None]
    if hidden.shape[1] > C:
        carry, others = jax.lax.scan(add_chunk, carry, jax.tree.map(lambda x: x[1:], chunks))
        dhidden = jnp.concatenate([dhidden, others])
    total, dparams = carry
    B, T, D = hidden.shape
    return total, (dparams, jnp.moveaxis(dhidden, 0, 1).reshape(B, -1, D)[:, :T])


def _chunk_loss_and_gradients(
    head: Head, label_smoothing: float, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """The loss of a chunk, and its gradients with respect to the parameters and the hidden states."""
    logits, head_vjp = jax.vjp(head, params, hidden)
    loss, dlogits = _loss_and_gradient(logits, targets, weights, label_smoothing)
    return loss, *head_vjp(dlogits.astype(logits.dtype))


def _loss_and_gradient(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    losses = (top + jnp.log(total))[..., 0] - _expected_logit(logits, targets, label_smoothing)
    # A position with weight 0 is ignored, even if its target is invalid or its hidden state is not finite.
    is_weighted = weights > 0
    loss = jnp.sum(jnp.where(is_weighted, losses * weights, 0.0))
    is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
    if label_smoothing == 0.0:
        expected = jnp.where(is_target, weights[..., None], 0.0)
    else:
        in_vocabulary = logits > jnp.finfo(jnp.float32).min
        uniform = label_smoothing / jnp.sum(in_vocabulary, axis=-1, keepdims=True)
        smoothed = jnp.where(is_target, 1.0 - label_smoothing + uniform, jnp.where(in_vocabulary, uniform, 0.0))
        expected = weights[..., None] * smoothed
    gradient = exp * (weights[..., None] / total) - expected
    return loss, jnp.where(is_weighted[..., None], gradient, 0.0)


def _backward(
    head: Head, chunk_logits: int, label_smoothing: float, gradients: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    dparams, dhidden = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dparams, dhidden, None, None


_chunked.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------ few positions with nonzero weight

MIN_BLOCKS = 16
"""The size of a block is chosen so that there are at least this many blocks if all weights are nonzero. The last block
is padded, and the smaller the blocks are, the less work the padding takes."""
MIN_BLOCK_ROWS = {"cpu": 32}
"""Minimum number of rows of a block, by platform. Matmuls with fewer rows are slow."""
MIN_BLOCK_ROWS_ACCELERATOR = LANES


def selected_cross_entropy(
    head: Head, params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """:func:`chunked_cross_entropy` for inputs with many zero weights: positions of weight 0 cost almost nothing.

    Positions with nonzero weight are moved to the front, and a loop computes the loss of one block of them at a time.
    The number of blocks is computed at run time. Differentiable in ``hidden`` and in ``params``; the head must read all
    leaves of ``params``.

    Returns:
        A float32 scalar, in nats.
    """
    if hidden_BTD.size == 0:
        return jnp.zeros(())
    return _selected(head, params, hidden_BTD, targets_BT, weights_BT.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(head: Head, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    def add_block(total: jax.Array, _: Any, block: Any) -> jax.Array:
        hidden, targets, weights = block
        return total + jnp.sum(jnp.where(weights > 0, cross_entropy(head(params, hidden), targets) * weights, 0.0))

    return _fold_weighted_blocks(head, params, (hidden, targets, weights), add_block, 0.0)[0]


def _fold_weighted_blocks(
    head: Head, params: Any, position_arrays: Any, body: Callable[[Any, Any, Any], Any], init: Any
) -> tuple[Any, jax.Array]:
    """Run a loop over blocks of R positions with nonzero weight.

    Each iteration computes ``carry = body(carry, index of the block's first position, block)``. The arrays of a block
    are [B', R / B', ...], where B' is the number of devices over which the batch is split.

    Args:
        position_arrays: hidden states, targets and weights, [B, T, ...] each.
        init: the first carry.

    Returns:
        The last carry, and the order of the positions in the loop: indices [B * T], those of nonzero weight first.
    """
    hidden, targets, weights = (jnp.asarray(x).reshape(-1, *x.shape[2:]) for x in position_arrays)
    N = len(targets)
    V = jax.eval_shape(head, params, hidden[None]).shape[-1]
    active = sharding.active()
    shards = 1 if active is None else active.pieces(("batch",))
    min_rows = MIN_BLOCK_ROWS.get(sharding.platform(), MIN_BLOCK_ROWS_ACCELERATOR) * shards
    R = max(min(-(-N // (MIN_BLOCKS * min_rows)) * min_rows, _max_live_logits() // V, N) // shards, 1) * shards
    is_weighted = weights > 0
    order = jnp.argsort(~is_weighted, stable=True)
    # The last block is filled up with copies of position 0 that have weight 0.
    padded_order = jnp.pad(order, (0, -N % R))
    sorted_weights = jnp.pad(weights[order], (0, -N % R))

    def block(i: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(padded_order, i * R, R)
        block_weights = jax.lax.dynamic_slice_in_dim(sorted_weights, i * R, R)
        arrays = (x.reshape(shards, R // shards, *x.shape[1:]) for x in (hidden[rows], targets[rows], block_weights))
        return tuple(sharding.constrain(x, ("batch", *[None] * (x.ndim - 1))) for x in arrays)

    blocks = -(-jnp.sum(is_weighted) // R)
    return jax.lax.fori_loop(0, blocks, lambda i, carry: body(carry, i * R, block(i)), init), order


def _selected_forward(head: Head, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def add_block(carry: Any, first: Any, block: Any) -> Any:
        total, dparams, dhidden = carry
        loss, block_dparams, block_dhidden = _chunk_loss_and_gradients(head, 0.0, params, *block)
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, block_dhidden.reshape(-1, D), first, 0)
        return total + loss, jax.tree.map(jnp.add, dparams, block_dparams), dhidden

    N, D = targets.size, hidden.shape[-1]
    # 2 N rows, because the last block may extend beyond row N.
    init = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros((2 * N, D), hidden.dtype)
    arrays = (hidden, targets, weights)
    (total, dparams, sorted_ND), order = _fold_weighted_blocks(head, params, arrays, add_block, init)
    dhidden = jnp.zeros((N, D), hidden.dtype).at[order].set(sorted_ND[:N])
    return total, (dparams, dhidden.reshape(hidden.shape))


def _selected_backward(head: Head, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    dparams, dhidden = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dparams, dhidden, None, None


_selected.defvjp(_selected_forward, _selected_backward)

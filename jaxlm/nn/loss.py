"""Cross entropy over a vocabulary, plain and in chunks.

Shapes: B batch, T time, D model, V vocabulary; C time steps of a chunk.
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
"""``head(params, hidden [B, C, D]) -> logits [B, C, V]``: a family's ``logits`` with its config filled in."""

CHUNK_LOGITS = {"cpu": 2**24}
"""Logits that exist at a time on each device: 64 MiB in float32. On a CPU fewer make matmuls thin, more make fresh
memory slow; twice as many where the process keeps its memory (``host.keep_freed_memory``)."""
CHUNK_LOGITS_ELSEWHERE = 2**27
"""The same on accelerators, 512 MiB: each chunk reads and writes the gradient of the whole head, so that 98 chunks of a
GPT-2 step took as long as everything else (docs/labbook.md)."""


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """``-log softmax(logits)[target]`` in nats, [B, T] float32. A target outside the vocabulary gives NaN.

    With ``label_smoothing`` e, the cross entropy to a distribution that has 1 - e on the target and e spread evenly
    over the vocabulary, padding left out (Szegedy et al. 2016, section 7).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return lse_BT - _expected(logits_BTV, targets_BT, label_smoothing)


def _expected(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float) -> jax.Array:
    """The mean logit under the distribution of the (smoothed) targets, [B, T]."""
    picked_BT = _pick(logits_BTV, targets_BT)
    if label_smoothing == 0.0:
        return picked_BT
    real_BTV = logits_BTV > jnp.finfo(jnp.float32).min  # rows of padding: see nn.embedding.unembed
    mean_BT = jnp.sum(jnp.where(real_BTV, logits_BTV, 0.0), axis=-1) / jnp.sum(real_BTV, axis=-1)
    return (1.0 - label_smoothing) * picked_BT + label_smoothing * mean_BT


def _pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # "fill": an id outside the vocabulary is not clamped to a neighbour; nor may a negative one count from the end.
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
    """``sum(weights * cross_entropy(head(params, hidden), targets, label_smoothing))`` without holding [B, T, V].

    The time axis is cut so that at most ``chunk_logits`` logits exist at once (None: on each device as many as
    :data:`CHUNK_LOGITS` says). The gradient of each chunk is taken in the same pass as its loss (the loss is a sum, so
    its gradient is known up to the factor that arrives later); nothing is recomputed. Differentiable in ``params`` (the
    leaves that ``head`` reads) and ``hidden``; not in ``weights``.

    Returns:
        A float32 scalar.
    """
    if chunk_logits is None:
        chunk_logits = _logits_at_once()
    leaves, tree = jax.tree.flatten(params)
    used = _leaves_read(head, params, hidden_BTD)

    def head_of_used(used_leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
        # Leaves that the head does not read are left out, lest their zero gradients be carried through the loop.
        full: list[Any] = [None] * len(leaves)
        for at, leaf in zip(used, used_leaves, strict=True):
            full[at] = leaf
        return head(jax.tree.unflatten(tree, full), hidden)

    used_leaves = [leaves[at] for at in used]
    weights_BT = weights_BT.astype(jnp.float32)
    return _chunked(head_of_used, chunk_logits, label_smoothing, used_leaves, hidden_BTD, targets_BT, weights_BT)


def chunked_argmax(head: Head, params: Any, hidden_BTD: jax.Array, *, chunk_logits: int | None = None) -> jax.Array:
    """The id with the largest logit at each position, [B, T] int32, without holding [B, T, V].

    Of equal logits, the lowest id. The time axis is cut as in :func:`chunked_cross_entropy`. Not differentiable.
    """
    C = _chunk_length(head, _logits_at_once() if chunk_logits is None else chunk_logits, params, hidden_BTD)
    B, T, _ = hidden_BTD.shape
    best = jax.lax.map(lambda hidden: jnp.argmax(head(params, hidden), axis=-1), _cut(hidden_BTD, C))
    return jnp.moveaxis(best, 0, 1).reshape(B, -1)[:, :T].astype(jnp.int32)


def _logits_at_once() -> int:
    """Logits that may exist at a time, on all devices together."""
    active = sharding.active()
    pieces = 1 if active is None else active.pieces(("batch", None, "vocab"))
    platform = sharding.platform()
    kept = platform == "cpu" and host.keeps_freed_memory()
    return CHUNK_LOGITS.get(platform, CHUNK_LOGITS_ELSEWHERE) * pieces * (2 if kept else 1)


def _leaves_read(head: Head, params: Any, hidden: jax.Array) -> list[int]:
    """Which leaves of ``params`` take part in ``head``: those that its trace mentions."""
    jaxpr = jax.make_jaxpr(head)(params, hidden).jaxpr
    mentioned = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    return [at for at, var in enumerate(jaxpr.invars[:-1]) if id(var) in mentioned]


def _cut(x: jax.Array, C: int) -> jax.Array:
    """[B, T, ...] to [chunks, B, C, ...], T padded with zeros to chunks * C."""
    B, T = x.shape[:2]
    chunks = -(-T // C)
    x = jnp.pad(x, ((0, 0), (0, chunks * C - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, chunks, C, *x.shape[2:]), 1, 0)


def _chunk_length(head: Head, chunk_logits: int, params: Any, hidden_BTD: jax.Array) -> int:
    """C, as ``chunk_logits`` allows: all T, or on an accelerator whole vectors or a power of two, else equal parts."""
    B, T, _ = hidden_BTD.shape
    V = jax.eval_shape(head, params, hidden_BTD).shape[-1]
    longest = max(1, chunk_logits // (B * V))
    if longest >= T:
        return T
    if sharding.platform() == "cpu":
        return -(-T // -(-T // longest))
    # By its compiler's estimate, a TPU takes a sixth longer in chunks of 147 than in chunks of 128.
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
    def one(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden, targets, weights = chunk
        losses = cross_entropy(head(params, hidden), targets, label_smoothing)
        return total + jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), None

    C = _chunk_length(head, chunk_logits, params, hidden)
    return jax.lax.scan(one, jnp.zeros(()), tuple(_cut(x, C) for x in (hidden, targets, weights)))[0]


def _forward(
    head: Head,
    chunk_logits: int,
    label_smoothing: float,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    def one(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        loss, dparams, dhidden = _of_chunk(head, label_smoothing, params, *chunk)
        sums = (loss, dparams)
        return sums if carry is None else jax.tree.map(jnp.add, carry, sums), dhidden

    C = _chunk_length(head, chunk_logits, params, hidden)
    cut = tuple(_cut(x, C) for x in (hidden, targets, weights))
    # The first chunk stands before the loop: there are no zeros to write and to add to.
    carry, dhidden = one(None, jax.tree.map(lambda x: x[0], cut))
    dhidden = dhidden[None]
    if hidden.shape[1] > C:
        carry, others = jax.lax.scan(one, carry, jax.tree.map(lambda x: x[1:], cut))
        dhidden = jnp.concatenate([dhidden, others])
    total, dparams = carry
    B, T, D = hidden.shape
    return total, (dparams, jnp.moveaxis(dhidden, 0, 1).reshape(B, -1, D)[:, :T])


def _of_chunk(
    head: Head, label_smoothing: float, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """The loss of a chunk and its gradients, of the parameters and of the hidden states."""
    logits, pull = jax.vjp(head, params, hidden)
    loss, dlogits = _loss_and_gradient(logits, targets, weights, label_smoothing)
    return loss, *pull(dlogits.astype(logits.dtype))


def _loss_and_gradient(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    losses = (top + jnp.log(total))[..., 0] - _expected(logits, targets, label_smoothing)
    # A weight of 0 takes a place out altogether: its target may be anything and its hidden state not finite.
    counted = weights > 0
    loss = jnp.sum(jnp.where(counted, losses * weights, 0.0))
    is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
    if label_smoothing == 0.0:
        expected = jnp.where(is_target, weights[..., None], 0.0)
    else:
        real = logits > jnp.finfo(jnp.float32).min
        share = label_smoothing / jnp.sum(real, axis=-1, keepdims=True)
        expected = weights[..., None] * jnp.where(is_target, 1.0 - label_smoothing + share, jnp.where(real, share, 0.0))
    gradient = exp * (weights[..., None] / total) - expected
    return loss, jnp.where(counted[..., None], gradient, 0.0)


def _backward(
    head: Head, chunk_logits: int, label_smoothing: float, gradients: Any, cotangent: jax.Array
) -> tuple[Any, ...]:
    dparams, dhidden = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dparams, dhidden, None, None


_chunked.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------- where few places count

PIECES = 16
"""Into so many blocks all places are cut at least, where only some count: a part of a block may be empty."""
ROWS = {"cpu": 32}
"""Rows of a block at least: fewer make its matmuls thin."""
ROWS_ELSEWHERE = LANES


def selected_cross_entropy(
    head: Head, params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """:func:`chunked_cross_entropy` where many weights are 0: places of weight 0 cost nothing.

    The places that count are put together, and a loop goes over as many blocks of them as there are: how many need not
    be known while tracing. Differentiable in ``params``, of which the head must read all leaves, and ``hidden``.

    Returns:
        A float32 scalar.
    """
    return _selected(head, params, hidden_BTD, targets_BT, weights_BT.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(head: Head, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    def one(block: Any) -> jax.Array:
        hidden, targets, weights = block
        return jnp.sum(jnp.where(weights > 0, cross_entropy(head(params, hidden), targets) * weights, 0.0))

    return _over_counted(head, params, (hidden, targets, weights), lambda total, i, block: total + one(block), 0.0)[0]


def _over_counted(
    head: Head, params: Any, of_places: Any, visit: Callable[[Any, Any, Any], Any], start: Any
) -> tuple[Any, jax.Array]:
    """``carry = visit(carry, first place, block)`` for blocks [B', R / B', ...] of the places that count, which the
    B' devices of the batch share, and the order in which these places come, before all others: [B T]."""
    hidden, targets, weights = (jnp.asarray(x).reshape(-1, *x.shape[2:]) for x in of_places)
    N = len(targets)
    V = jax.eval_shape(head, params, hidden[None]).shape[-1]
    active = sharding.active()
    pieces = 1 if active is None else active.pieces(("batch",))
    least = ROWS.get(sharding.platform(), ROWS_ELSEWHERE) * pieces
    R = max(min(-(-N // (PIECES * least)) * least, _logits_at_once() // V, N) // pieces, 1) * pieces
    counted = weights > 0
    order = jnp.argsort(~counted, stable=True)
    # Beyond the last place there are copies of weight 0.
    padded = jnp.pad(order, (0, -N % R))
    sorted_weights = jnp.pad(weights[order], (0, -N % R))

    def block(i: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(padded, i * R, R)
        own = jax.lax.dynamic_slice_in_dim(sorted_weights, i * R, R)
        cut = (x.reshape(pieces, R // pieces, *x.shape[1:]) for x in (hidden[rows], targets[rows], own))
        return tuple(sharding.constrain(x, ("batch", *[None] * (x.ndim - 1))) for x in cut)

    blocks = -(-jnp.sum(counted) // R)
    return jax.lax.fori_loop(0, blocks, lambda i, carry: visit(carry, i * R, block(i)), start), order


def _selected_forward(head: Head, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def visit(carry: Any, first: Any, block: Any) -> Any:
        total, dparams, dhidden = carry
        loss, own, rows = _of_chunk(head, 0.0, params, *block)
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, rows.reshape(-1, D), first, 0)
        return total + loss, jax.tree.map(jnp.add, dparams, own), dhidden

    N, D = targets.size, hidden.shape[-1]
    # Twice the room, for a last block that reaches beyond the end.
    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros((2 * N, D), hidden.dtype)
    (total, dparams, sorted_ND), order = _over_counted(head, params, (hidden, targets, weights), visit, start)
    dhidden = jnp.zeros((N, D), hidden.dtype).at[order].set(sorted_ND[:N])
    return total, (dparams, dhidden.reshape(hidden.shape))


def _selected_backward(head: Head, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    dparams, dhidden = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dparams, dhidden, None, None


_selected.defvjp(_selected_forward, _selected_backward)

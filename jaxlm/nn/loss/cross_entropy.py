"""Cross entropy over a vocabulary: the definition, and the loss of a chunk of positions with its gradients.

Shapes: B batch, T time, D model width, V vocabulary, C number of time steps of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.custom_gradient import sum_dtype
from jaxlm.nn.embedding import Unembedding, as_logits, widen_ids
from jaxlm.nn.loss import pallas
from jaxlm.spec import Params, require_arrays

Head = Callable[[Any, jax.Array], "jax.Array | Unembedding"]
"""The output layer of a model: ``head(params, hidden [B, C, D])`` is logits [B, C, V] or an ``Unembedding``.

The losses have custom gradients. So all differentiated arrays must be in ``params`` or ``hidden``. JAX raises
``UnexpectedTracerError`` for a differentiated array that ``head`` reads from an enclosing scope."""


def check_shapes(hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> None:
    """Raise ``ValueError`` if the targets or weights do not have the shape [B, T] of the hidden states.

    An argument that is not an array raises ``TypeError``.
    """
    require_arrays(hidden=hidden_BTD, targets=targets_BT, weights=weights_BT)
    for name, x in (("targets", targets_BT), ("weights", weights_BT)):
        if x.shape != hidden_BTD.shape[:2]:
            raise ValueError(
                f"{name} {list(x.shape)} must have the same batch and time as the hidden states "
                f"{list(hidden_BTD.shape)}"
            )


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """The cross entropy ``-log softmax(logits)[target]`` in nats, [B, T] float32.

    With ``label_smoothing`` e, the target distribution is ``(1 - e) * one_hot(target) + e * uniform`` (Szegedy et al.
    2016, section 7). Padding rows of the vocabulary (``jaxlm.nn.embedding.unembed``) have probability 0 in ``uniform``.
    The result is NaN for a target that is negative, at least V, or the id of a padding row.
    """
    require_arrays(logits_BTV=logits_BTV, targets_BT=targets_BT)
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return lse_BT - _expected_logit(logits_BTV, targets_BT, label_smoothing)


def _expected_logit(logits_BTV: jax.Array, targets_BT: jax.Array, label_smoothing: float) -> jax.Array:
    """The expected logit under the (smoothed) target distribution, [B, T]."""
    target_logit_BT = _target_logits(logits_BTV, targets_BT)
    if label_smoothing == 0.0:
        return target_logit_BT
    # ``jaxlm.nn.embedding.unembed`` gives padding rows of the vocabulary the lowest float32 number as their logit.
    in_vocabulary_BTV = logits_BTV > jnp.finfo(jnp.float32).min
    vocab_size_BT = jnp.sum(in_vocabulary_BTV, axis=-1, dtype=jnp.float32)
    mean_BT = jnp.sum(jnp.where(in_vocabulary_BTV, logits_BTV, 0.0), axis=-1) / vocab_size_BT
    return (1.0 - label_smoothing) * target_logit_BT + label_smoothing * mean_BT


def _target_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # "fill" gives NaN for the ids V, V + 1, ... Negative ids are replaced by V, because JAX would count them from the
    # end.
    targets_BT = widen_ids(targets_BT)
    targets_BT = jnp.where(targets_BT < 0, logits_BTV.shape[-1], targets_BT)
    logit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    # The logit of a padding row of the vocabulary is the lowest float32 number (``jaxlm.nn.embedding.unembed``).
    return jnp.where(logit_BT == jnp.finfo(jnp.float32).min, jnp.nan, logit_BT)


def choose_kernels(
    function: Callable[..., Any], reference: Callable[..., Any], head: Head, label_smoothing: float, params: Params,
    hidden: jax.Array,
) -> Callable[..., Any]:  # fmt: skip
    """``function(head, label_smoothing, ..., kernels=True)`` if TPU kernels compute the loss, otherwise ``reference``.

    If the result uses kernels, it calls ``reference`` under ``vmap`` and in derivatives
    (``lazy_pallas.with_reference``).

    Args:
        function: :func:`weighted_loss` or :func:`loss_and_gradients`.
        reference: a function of (params, hidden, targets, weights) with the same result, without kernels.
    """
    output = jax.eval_shape(head, params, hidden)
    is_supported = isinstance(output, Unembedding) and label_smoothing == 0.0
    if not is_supported or not choices.loss_kernels(output.table, output.hidden):
        return reference
    return lazy_pallas.with_reference(functools.partial(function, head, label_smoothing, kernels=True), reference)


def weighted_loss(
    head: Head, label_smoothing: float, params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *,
    kernels: bool = False,
) -> jax.Array:  # fmt: skip
    """The weighted sum of the cross entropies of a chunk. Positions with weight 0 are ignored."""
    output: Any = head(params, hidden)
    if kernels:
        losses = pallas.token_losses(output, targets)
    else:
        losses = cross_entropy(as_logits(output), targets, label_smoothing)
    return _weighted_sum(losses, weights)


def _weighted_sum(losses: jax.Array, weights: jax.Array) -> jax.Array:
    # At a position with weight 0, the target may be outside the vocabulary. The loss there is then NaN and is ignored.
    return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0))


def logits_shape(head: Head, params: Params, hidden: jax.Array) -> tuple[int, ...]:
    """The shape [B, T, V] of the logits of a head. Nothing is computed."""
    return jax.eval_shape(lambda *arguments: as_logits(head(*arguments)), params, hidden).shape


def loss_and_gradients(
    head: Head, label_smoothing: float, params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *,
    kernels: bool = False,
) -> tuple[jax.Array, Any, jax.Array]:  # fmt: skip
    """The weighted sum of the cross entropies of a chunk, and its gradients with respect to ``params`` and ``hidden``.

    The hidden states are [B, C, D]; the targets and weights are [B, C]. Positions with weight 0 are ignored.

    Args:
        kernels: whether TPU kernels compute the loss; then ``head`` returns an ``Unembedding``.
    """
    # A hidden state at a position of weight 0 may be NaN or infinite. It is replaced by zeros. Otherwise, the gradient
    # of ``params`` would be NaN, because it contains the product of this hidden state and a gradient of 0.
    hidden = jnp.where(weights[..., None] != 0, hidden, jnp.zeros_like(hidden))
    output: Any
    output, head_vjp = jax.vjp(head, params, hidden)
    if kernels:
        losses, doutput = pallas.losses_and_gradients(output, targets, weights)
        loss = _weighted_sum(losses, weights)
    else:
        logits, logits_vjp = jax.vjp(as_logits, output)
        loss, dlogits = _loss_and_gradient(logits, targets, weights, label_smoothing)
        (doutput,) = logits_vjp(dlogits.astype(logits.dtype))
    return loss, *head_vjp(doutput)


def _loss_and_gradient(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    max_logit = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - max_logit)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    losses = (max_logit + jnp.log(total))[..., 0] - _expected_logit(logits, targets, label_smoothing)
    loss = _weighted_sum(losses, weights)
    is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
    if label_smoothing == 0.0:
        weighted_targets = jnp.where(is_target, weights[..., None], 0.0)
    else:
        in_vocabulary = logits > jnp.finfo(jnp.float32).min
        uniform = label_smoothing / jnp.sum(in_vocabulary, axis=-1, keepdims=True, dtype=jnp.float32)
        smoothed = jnp.where(is_target, 1.0 - label_smoothing + uniform, jnp.where(in_vocabulary, uniform, 0.0))
        weighted_targets = weights[..., None] * smoothed
    gradient = exp * (weights[..., None] / total) - weighted_targets
    return loss, jnp.where(weights[..., None] != 0, gradient, 0.0)


def scale_gradients(gradients: Any, cotangent: jax.Array) -> Any:
    """The product of the gradients of a loss and the cotangent of the loss. Each gradient keeps its dtype."""

    def scale(gradient: jax.Array) -> jax.Array:
        dtype = sum_dtype(gradient)
        return (gradient.astype(dtype) * cotangent.astype(dtype)).astype(gradient.dtype)

    return jax.tree.map(scale, gradients)

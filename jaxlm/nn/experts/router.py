"""The router of a mixture of experts (Shazeer et al. 2017), and its auxiliary losses.

Shapes: B batch, T time, D model width, E experts, N selected experts of a token, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.spec import Params


class Routing(NamedTuple):
    """The selected experts of each token, their weights, and the outputs of the router.

    Attributes:
        experts: [B, T, N] int32, the experts with the highest probabilities, in descending order of probability.
        weights: [B, T, N] float32, the weight of each selected expert in the output.
        logits: [B, T, E] float32, the logits of the router.
        probabilities: [B, T, E] float32, the softmax of the logits.
    """

    experts: jax.Array
    weights: jax.Array
    logits: jax.Array
    probabilities: jax.Array


def route(params: Params, x_BTD: jax.Array, num_selected: int, *, renormalize: bool) -> Routing:
    """The :class:`Routing` of each token to the ``num_selected`` experts with the highest probabilities.

    The computation is in float32.

    Args:
        params: ``weight`` [D, E].
        renormalize: True: the weights of a token are divided by their sum (Mixtral). False: the weights are the
            probabilities.
    """
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), params["weight"].astype(jnp.float32))
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    weights_BTN, experts_BTN = jax.lax.top_k(probabilities_BTE, num_selected)
    if renormalize:
        weights_BTN = weights_BTN / jnp.sum(weights_BTN, axis=-1, keepdims=True)
    return Routing(experts_BTN, weights_BTN, logits_BTE, probabilities_BTE)


class RouterStatistics(NamedTuple):
    """Sums over the tokens of a layer, without padding, in float32. The sums of L layers are stacked.

    Attributes:
        tokens: [] or [L], the number of tokens.
        selections: [E] or [L, E], the number of tokens that selected each expert.
        probabilities: [E] or [L, E], the sum of the router's probabilities.
        squared_logsumexp: [] or [L], the sum of ``logsumexp(logits) ** 2``.
    """

    tokens: jax.Array
    selections: jax.Array
    probabilities: jax.Array
    squared_logsumexp: jax.Array


def router_statistics(routing: Routing, keep_BT: jax.Array | None) -> RouterStatistics:
    """The statistics of one layer over the tokens where ``keep_BT`` is True; None: over all tokens."""
    num_experts = routing.logits.shape[-1]
    keep_BT = jnp.ones_like(routing.logits[:, :, 0], bool) if keep_BT is None else keep_BT
    is_selected_BTE = jnp.sum(jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.float32), axis=2)

    def sum_over_tokens(x: jax.Array) -> jax.Array:
        keep = keep_BT.reshape(*keep_BT.shape, *[1] * (x.ndim - 2))
        return jnp.sum(jnp.where(keep, x, 0.0), axis=(0, 1))

    return RouterStatistics(
        tokens=jnp.sum(keep_BT, dtype=jnp.float32),
        selections=sum_over_tokens(is_selected_BTE),
        probabilities=sum_over_tokens(routing.probabilities),
        squared_logsumexp=sum_over_tokens(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))),
    )


def load_balance_loss(statistics: RouterStatistics) -> jax.Array:
    """``E * sum over experts of (fraction of tokens that selected the expert) * (mean probability of the expert)``.

    This is eq. 4 of Fedus et al. 2022 (Switch Transformer) without its coefficient. With N selected experts per token,
    the fractions sum to N, and the loss of a uniform router is N. As in Hugging Face transformers, the fractions and
    the means are over the tokens of all layers together. Without tokens, the loss is 0. The fractions have no gradient.
    """
    selections, probabilities, tokens = (
        jnp.sum(x.reshape(-1, *x.shape[x.ndim - num_axes :]), axis=0)
        for x, num_axes in ((statistics.selections, 1), (statistics.probabilities, 1), (statistics.tokens, 0))
    )
    num_experts = selections.shape[0]
    return num_experts * jnp.sum(selections * probabilities) / jnp.square(jnp.maximum(tokens, 1.0))


def router_z_loss(statistics: RouterStatistics) -> jax.Array:
    """The mean of ``logsumexp(logits) ** 2`` over tokens and layers (Zoph et al. 2022, eq. 5); 0 without tokens.

    This loss keeps the logits of the router small.
    """
    return jnp.sum(statistics.squared_logsumexp) / jnp.maximum(jnp.sum(statistics.tokens), 1.0)

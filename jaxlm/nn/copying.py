"""Copying of source tokens: pointer-generator networks (See et al. 2017, eq. 8 and 9).

The next token is generated with probability sigmoid(w_s s + w_x x + w_c c + b). Here, s is the state of the decoder, x
the embedding of its input token, and c the context (the weighted mean of the source states). Otherwise, the token is
copied from a source position, and the probability of a position is its attention weight.

Shapes: B batch, T target time, S source time, H width of s, E width of x, C width of c, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.embedding import widen_ids
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.spec import ArraySpec, Constant, Initializer, Params


def copy_gate_specs(state: int, embedding: int, context: int, init: Initializer) -> dict[str, Any]:
    """Specs of the parameters of :func:`copy_gate`.

    ``state``, ``embedding`` and ``context`` are the widths H, E and C of its inputs.
    """
    widths = {"state": state, "embedding": embedding, "context": context}
    weights = {name: linear_specs((width, 1), ("embed", None), init, bias=False) for name, width in widths.items()}
    # The initial bias favors generation, because untrained attention rarely copies the correct token.
    return {**weights, "bias": ArraySpec((1,), (None,), Constant(1.0))}


def copy_gate(params: Params, state_BTH: jax.Array, embedding_BTE: jax.Array, context_BTC: jax.Array) -> jax.Array:
    """The logit of the probability that a token is generated instead of copied, [B, T, 1]."""
    inputs = {"state": state_BTH, "embedding": embedding_BTE, "context": context_BTC}
    bias_BT1 = params["bias"].astype(state_BTH.dtype)[None, None, :]
    return sum((linear(params[name], x) for name, x in inputs.items()), bias_BT1)


def copied_tokens(weights_BTS: jax.Array, source_BS: jax.Array, vocab_size: int) -> jax.Array:
    """The copy distribution: for each token id, the sum of the attention weights of the source positions with this id.

    The result is [B, T, V] float32 (See et al. 2017, eq. 9). Source ids outside the vocabulary are ignored.

    Example:
        >>> copied_tokens(jnp.array([[[0.5, 0.25, 0.25]]]), jnp.array([[2, 0, 2]]), 4).tolist()
        [[[0.25, 0.0, 0.75, 0.0]]]
    """
    source_BS = widen_ids(source_BS)
    in_vocabulary_BS = (source_BS >= 0) & (source_BS < vocab_size)
    weights_BTS = jnp.where(in_vocabulary_BS[:, None, :], weights_BTS.astype(jnp.float32), 0.0)
    ids_BS = jnp.where(in_vocabulary_BS, source_BS, 0)

    def sum_weights_by_id(weights_TS: jax.Array, ids_S: jax.Array) -> jax.Array:
        # Each index adds a column [T]. On a CPU, this is six times as fast as a scatter with an index for each (t, s).
        return jnp.zeros((weights_TS.shape[0], vocab_size), jnp.float32).at[:, ids_S].add(weights_TS)

    return jax.vmap(sum_weights_by_id)(weights_BTS, ids_BS)


def mix_copied(logits_BTV: jax.Array, gate_BT1: jax.Array, copied_BTV: jax.Array) -> jax.Array:
    """Log-probabilities ``log(p softmax(logits) + (1 - p) copied)`` with p = sigmoid(gate), [B, T, V] float32.

    See et al. 2017, eq. 9. The sum is computed from logarithms (``logaddexp``), so the result is finite even for an
    unlikely token that is not in the source.

    Args:
        logits_BTV: the logits of generated tokens.
        gate_BT1: from :func:`copy_gate`.
        copied_BTV: the copy distribution, from :func:`copied_tokens`.
    """
    gate_BT1, copied_BTV = gate_BT1.astype(jnp.float32), copied_BTV.astype(jnp.float32)
    generated_BTV = jax.nn.log_sigmoid(gate_BT1) + jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    is_copied_BTV = copied_BTV > 0
    # The inner ``where`` avoids log(0), whose infinite gradient times 0 would be NaN.
    log_copied_BTV = jax.nn.log_sigmoid(-gate_BT1) + jnp.log(jnp.where(is_copied_BTV, copied_BTV, 1.0))
    return jnp.where(is_copied_BTV, jnp.logaddexp(generated_BTV, log_copied_BTV), generated_BTV)

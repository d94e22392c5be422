"""Attention of recurrent models, one query at a time: Bahdanau et al. 2015 (additive) and Luong et al. 2015.

Where an attention layer asks for all places at once (``jaxlm.nn.attention``), a decoder that feeds on what it found
asks step by step. So the part of the score that does not depend on the query, ``alignment_keys``, is made once, before
the loop. The form of a score follows from its parameters:

    dot      q . h                               (Luong; no parameters)
    general  q . W h                             (Luong)
    concat   v . tanh(W q + U h)                 (Bahdanau, "additive"; Luong writes [W U] as one matrix)

Shapes: B batch, S source time, Q query width, C source width, A width of a concat score, R hops.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.nn.linear import linear, linear_specs
from jaxlm.spec import ArraySpec, Initializer

Score = Literal["dot", "general", "concat"]


def alignment_specs(
    score: Score, query: int, source: int, width: int, init: Initializer, *, local: bool = False
) -> dict[str, Any]:
    """Parameters of a score between queries [Q] and sources [C]; ``width`` is A. ``local`` adds those of a window.

    Raises:
        ValueError: an unknown score, or a dot product of vectors that are not equally wide.
    """
    if score not in get_args(Score):
        raise ValueError(f"score={score!r} is unknown: choose from {', '.join(map(repr, get_args(Score)))}")
    if score == "dot" and query != source:
        raise ValueError(f"score='dot' needs queries as wide as the source, got {query} and {source}: take 'general'")
    specs: dict[str, Any] = {}
    if score == "general":
        specs["key"] = linear_specs((source, query), ("embed", "mlp"), init, bias=False)
    if score == "concat":
        specs["query"] = linear_specs((query, width), ("embed", "mlp"), init, bias=False)
        specs["key"] = linear_specs((source, width), ("embed", "mlp"), init, bias=False)
        specs["score"] = ArraySpec((width,), ("mlp",), init, decay=True)
    if local:
        specs["place"] = {
            "hidden": linear_specs((query, query), ("embed", "mlp"), init, bias=False),
            "score": ArraySpec((query,), ("mlp",), init, decay=True),
        }
    return specs


def alignment_keys(params: dict[str, Any], source_BSC: jax.Array) -> jax.Array:
    """The source's part of the score, for all queries: [B, S, A] (concat), [B, S, Q] (general) or the source (dot)."""
    return linear(params["key"], source_BSC) if "key" in params else source_BSC


def align(
    params: dict[str, Any],
    query_BQ: jax.Array,
    keys_BSA: jax.Array,
    keep_BS: jax.Array | None = None,
    *,
    window: int | None = None,
) -> jax.Array:
    """How much the query attends to each place of the source, [B, S] float32. Rows sum to 1, or 0 if all is masked.

    Args:
        params: as ``alignment_specs``.
        query_BQ: the decoder's state, in the compute dtype.
        keys_BSA: from ``alignment_keys``.
        keep_BS: False where a place must not be seen (padding, other documents). None: all are seen.
        window: D of local-p attention (Luong et al. 2015, eq. 9 and 10): only places within D of a place p that the
            query picks, weighed by a Gaussian with standard deviation D / 2 (rows then no longer sum to 1).
    """
    if "score" in params:
        scores_BS = additive_scores(linear(params["query"], query_BQ), keys_BSA, params["score"])
    else:
        scores_BS = jnp.einsum("BQ,BSQ->BS", query_BQ, keys_BSA, preferred_element_type=jnp.float32)
    if window is None:
        return masked_softmax(scores_BS, keep_BS)
    if keep_BS is None:
        keep_BS = jnp.ones(scores_BS.shape, bool)
    place = params["place"]
    squashed_BQ = jnp.tanh(linear(place["hidden"], query_BQ))
    picked_B = jax.nn.sigmoid(linear({"weight": place["score"][:, None]}, squashed_BQ)[:, 0].astype(jnp.float32))
    picked_B = picked_B * jnp.sum(keep_BS, axis=1)
    distance_BS = jnp.cumsum(keep_BS, axis=1) - 1 - picked_B[:, None]  # places count from 0 within the document
    weights_BS = masked_softmax(scores_BS, keep_BS & (jnp.abs(distance_BS) <= window))
    return weights_BS * jnp.exp(-2.0 * jnp.square(distance_BS / window))


@jax.checkpoint
def additive_scores(query_BA: jax.Array, keys_BSA: jax.Array, score_A: jax.Array) -> jax.Array:
    """``v . tanh(query + keys)``, [B, S] float32, of queries that are projected already.

    The backward pass makes the tanh again: of a loop over queries it would else keep [queries, B, S, A].
    """
    squashed_BSA = jnp.tanh(query_BA[:, None, :] + keys_BSA)
    return jnp.einsum("BSA,A->BS", squashed_BSA, score_A.astype(keys_BSA.dtype), preferred_element_type=jnp.float32)


def context(weights_BS: jax.Array, source_BSC: jax.Array) -> jax.Array:
    """What the query found: the weighted sum of the source, [B, C] in its dtype."""
    return jnp.einsum("BS,BSC->BC", weights_BS.astype(source_BSC.dtype), source_BSC)


def copied_tokens(weights_BTS: jax.Array, source_BS: jax.Array, vocab_size: int) -> jax.Array:
    """Attention weights added up by source token: how much of the attention is on each token id, [B, T, V] float32.

    This is the copy distribution of See et al. 2017 (eq. 9). An id outside the vocabulary adds nothing.

    Example:
        >>> copied_tokens(jnp.array([[[0.5, 0.25, 0.25]]]), jnp.array([[2, 0, 2]]), 4).tolist()
        [[[0.25, 0.0, 0.75, 0.0]]]
    """
    inside_BS = (source_BS >= 0) & (source_BS < vocab_size)
    weights_BTS = jnp.where(inside_BS[:, None, :], weights_BTS.astype(jnp.float32), 0.0)
    ids_BS = jnp.where(inside_BS, source_BS, 0)

    def one_row(weights_TS: jax.Array, ids_S: jax.Array) -> jax.Array:
        # Six times as fast on a CPU as a scatter with an index for each (t, s).
        return jnp.zeros((weights_TS.shape[0], vocab_size)).at[:, ids_S].add(weights_TS)

    return jax.vmap(one_row)(weights_BTS, ids_BS)


def mix_copied(logits_BTV: jax.Array, gate_BT1: jax.Array, copied_BTV: jax.Array) -> jax.Array:
    """Log-probabilities ``log(p softmax(logits) + (1 - p) copied)`` with p = sigmoid(gate), [B, T, V] float32.

    See et al. 2017, eq. 9. Finite where a token is neither likely nor in the source: the sum is taken of logarithms.
    """
    gate_BT1, copied_BTV = gate_BT1.astype(jnp.float32), copied_BTV.astype(jnp.float32)
    generated_BTV = jax.nn.log_sigmoid(gate_BT1) + jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    some_BTV = copied_BTV > 0
    # Two selections: the gradient of log at 0 would be infinite, and infinity times 0 is NaN.
    log_copied_BTV = jax.nn.log_sigmoid(-gate_BT1) + jnp.log(jnp.where(some_BTV, copied_BTV, 1.0))
    return jnp.where(some_BTV, jnp.logaddexp(generated_BTV, log_copied_BTV), generated_BTV)


def pooling_specs(source: int, width: int, hops: int, init: Initializer) -> dict[str, Any]:
    """Parameters of ``pooling_weights``."""
    return {
        "key": linear_specs((source, width), ("embed", "mlp"), init),
        "score": linear_specs((width, hops), ("mlp", None), init, bias=False),
    }


def pooling_weights(params: dict[str, Any], source_BSC: jax.Array, keep_BS: jax.Array | None = None) -> jax.Array:
    """Attention without a query, ``softmax(w . tanh(W h + b))`` over the source, [B, R, S] float32.

    One hop is the word attention of Yang et al. 2016 (eq. 5 and 6), several that of Lin et al. 2017 (eq. 6).
    """
    scores_BSR = linear(params["score"], jnp.tanh(linear(params["key"], source_BSC)))
    keep_B1S = None if keep_BS is None else keep_BS[:, None, :]
    return masked_softmax(jnp.swapaxes(scores_BSR, 1, 2), keep_B1S)


def masked_softmax(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Softmax over the last axis in float32; exactly 0 where not kept, and everywhere if nothing is.

    Example:
        >>> masked_softmax(jnp.array([[1.0, 1.0, 9.0]]), jnp.array([[True, True, False]])).tolist()
        [[0.5, 0.5, 0.0]]
    """
    scores = scores.astype(jnp.float32)
    if keep is None:
        return jax.nn.softmax(scores, axis=-1)
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(keep, jax.nn.softmax(jnp.where(keep, scores, lowest), axis=-1), 0.0)

"""Attention of recurrent decoders, for one query at a time: Bahdanau et al. 2015 (additive) and Luong et al. 2015.

:func:`pooling_weights` is attention without a query, for classifiers.

``jaxlm.nn.attention`` computes the outputs of all queries at once. A recurrent decoder cannot do this, because each
query depends on the context vector of the previous step. So the part of the score that does not depend on the query
(:func:`alignment_keys`) is computed once, before the loop over steps. The names of the parameters determine the score
function (q query, h source vector):

    dot      q . h                               (Luong; no parameters)
    general  q . W h                             (Luong)
    concat   v . tanh(W q + U h)                 (Bahdanau, "additive"; Luong writes [W U] as one matrix)

Shapes: B batch, S source time, Q query width, C source width, A hidden width of the concat score, R hops (rows of
weights in :func:`pooling_weights`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.nn.linear import linear, linear_specs
from jaxlm.spec import ArraySpec, Initializer, Params

Score = Literal["dot", "general", "concat"]


def alignment_specs(
    score: Score, query: int, source: int, width: int, init: Initializer, *, local: bool = False
) -> dict[str, Any]:
    """Specs of the parameters of a score function between queries [Q] and source vectors [C].

    Args:
        query, source: the widths Q and C.
        width: A, for the concat score.
        local: add the parameters of local-p attention (argument ``window`` of :func:`align`).

    Raises:
        ValueError: an unknown score, or a dot product of vectors with different widths.
    """
    if score not in get_args(Score):
        raise ValueError(f"score={score!r} is unknown: choose from {', '.join(map(repr, get_args(Score)))}")
    if score == "dot" and query != source:
        raise ValueError(f"score='dot' needs queries as wide as the source, got {query} and {source}: use 'general'")
    specs: dict[str, Any] = {}
    if score == "general":
        specs["key"] = linear_specs((source, query), ("embed", "mlp"), init, bias=False)
    if score == "concat":
        specs["query"] = linear_specs((query, width), ("embed", "mlp"), init, bias=False)
        specs["key"] = linear_specs((source, width), ("embed", "mlp"), init, bias=False)
        specs["score"] = ArraySpec((width,), ("mlp",), init, decay=True)
    if local:  # the parameters of the predicted position p
        specs["place"] = {
            "hidden": linear_specs((query, query), ("embed", "mlp"), init, bias=False),
            "score": ArraySpec((query,), ("mlp",), init, decay=True),
        }
    return specs


def alignment_keys(params: Params, source_BSC: jax.Array) -> jax.Array:
    """The part of the score that does not depend on the query.

    The shape is [B, S, A] (concat), [B, S, Q] (general) or that of the source (dot).
    """
    return linear(params["key"], source_BSC) if "key" in params else source_BSC


def align(
    params: Params,
    query_BQ: jax.Array,
    keys_BSA: jax.Array,
    keep_BS: jax.Array | None = None,
    *,
    window: int | None = None,
) -> jax.Array:
    """The attention weights of the query over the source positions, [B, S] float32.

    Without ``window``, each row sums to 1, or to 0 if all positions are masked.

    Args:
        params: parameters with the specs of :func:`alignment_specs`.
        query_BQ: the decoder's state, in the compute dtype.
        keys_BSA: from :func:`alignment_keys`.
        keep_BS: False where a position is masked (padding, other documents). None: no position is masked.
        window: D of local-p attention (Luong et al. 2015, eq. 9 and 10), which needs parameters with the specs of
            ``local=True``. The query predicts p, a position (not rounded) among the source positions that are not
            masked. Only positions within D of p get a nonzero weight. After the softmax, the weights are multiplied
            by a Gaussian around p with standard deviation D / 2, so the weights of a row no longer sum to 1. None: no
            local attention.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for no local attention")
    if "score" in params:
        scores_BS = additive_scores(linear(params["query"], query_BQ), keys_BSA, params["score"])
    else:
        scores_BS = jnp.einsum("BQ,BSQ->BS", query_BQ, keys_BSA, preferred_element_type=jnp.float32)
    if window is None:
        return masked_softmax(scores_BS, keep_BS)
    if keep_BS is None:
        keep_BS = jnp.ones(scores_BS.shape, bool)
    center_params = params["place"]
    hidden_BQ = jnp.tanh(linear(center_params["hidden"], query_BQ))
    center_B = jax.nn.sigmoid(linear({"weight": center_params["score"][:, None]}, hidden_BQ)[:, 0].astype(jnp.float32))
    center_B = center_B * jnp.sum(keep_BS, axis=1, dtype=jnp.float32)
    position_BS = jnp.cumsum(keep_BS, axis=1, dtype=jnp.float32) - 1.0  # kept positions are numbered from 0
    distance_BS = position_BS - center_B[:, None]
    weights_BS = masked_softmax(scores_BS, keep_BS & (jnp.abs(distance_BS) <= window))
    return weights_BS * jnp.exp(-2.0 * jnp.square(distance_BS / window))


@jax.checkpoint
def additive_scores(query_BA: jax.Array, keys_BSA: jax.Array, score_A: jax.Array) -> jax.Array:
    """``v . tanh(query + keys)`` for queries that are already projected, [B, S] float32.

    The backward pass recomputes the tanh. Otherwise, a loop over queries would save an array [queries, B, S, A].
    """
    hidden_BSA = jnp.tanh(query_BA[:, None, :] + keys_BSA)
    return jnp.einsum("BSA,A->BS", hidden_BSA, score_A.astype(keys_BSA.dtype), preferred_element_type=jnp.float32)


def context(weights_BS: jax.Array, source_BSC: jax.Array) -> jax.Array:
    """The context vector: the weighted sum of the source, [B, C] in the dtype of the source."""
    return jnp.einsum("BS,BSC->BC", weights_BS.astype(source_BSC.dtype), source_BSC)


def pooling_specs(source: int, width: int, hops: int, init: Initializer) -> dict[str, Any]:
    """Specs of the parameters of :func:`pooling_weights`. ``source`` is C, ``width`` is A and ``hops`` is R."""
    return {
        "key": linear_specs((source, width), ("embed", "mlp"), init),
        "score": linear_specs((width, hops), ("mlp", None), init, bias=False),
    }


def pooling_weights(params: Params, source_BSC: jax.Array, keep_BS: jax.Array | None = None) -> jax.Array:
    """Attention weights without a query, ``softmax(w . tanh(W h + b))`` over the source, [B, R, S] float32.

    One hop gives the word attention of Yang et al. 2016 (eq. 5 and 6). Several hops give the attention of Lin et al.
    2017 (eq. 6), which has no bias b. For ``keep_BS``, see :func:`align`.
    """
    scores_BSR = linear(params["score"], jnp.tanh(linear(params["key"], source_BSC)))
    keep_B1S = None if keep_BS is None else keep_BS[:, None, :]
    return masked_softmax(jnp.swapaxes(scores_BSR, 1, 2), keep_B1S)


def masked_softmax(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Softmax over the last axis, in float32. Masked entries (``keep`` False) are 0, also if all entries are masked.

    Example:
        >>> masked_softmax(jnp.array([[1.0, 1.0, 9.0]]), jnp.array([[True, True, False]])).tolist()
        [[0.5, 0.5, 0.0]]
    """
    return jax.nn.softmax(scores.astype(jnp.float32), where=keep)

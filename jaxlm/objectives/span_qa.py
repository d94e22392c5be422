"""Extractive question answering (Devlin et al. 2019, section 4.2): an answer is a span of a text.

A row is one document that contains a question and a text. The model predicts two distributions over the real tokens of
the row: one for the first token of the answer, and one for its last token. Padding has probability 0, so the loss does
not depend on the amount of padding. In ``transformers``, padding tokens are also candidates, so the two losses are
equal only without padding. If a question has no answer, the target of both distributions is the position of ``[CLS]``
(section 4.3).

Shapes: B batch, T time, L maximum number of tokens of an answer, N = T * L candidate answers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_min
from jaxlm.models import Model, common
from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives.batch import Batch, hidden_states
from jaxlm.spec import Params, State


def batch(
    tokens: np.ndarray,
    spans: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """A batch of tokens [B, T] with the positions of the first and the last token of each answer, [B, 2].

    If an answer is truncated (its last position is T or more), its row has weight 0. In ``transformers``, the loss
    still includes the first token if only the end of the answer is truncated.

    Args:
        inputs: further keyword arguments of ``apply``, such as ``token_types``.

    Raises:
        ValueError: the shapes do not match; tokens or spans are not integers; rows have no tokens; a row has several
            documents; an answer ends before it begins, or begins before position 0; or the first or last token of an
            answer is padding.
        TypeError: ``tokens`` or ``segment_ids`` are not arrays.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    (B, T), spans = tokens.shape, np.asarray(spans)
    if T < 1:
        raise ValueError(f"tokens {list(tokens.shape)} must have at least one token per row")
    if spans.shape != (B, 2) or spans.dtype.kind not in "iu":
        raise ValueError(f"spans must be integers of shape [{B}, 2], got {spans.dtype}{list(spans.shape)}")
    is_invalid = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0])
    is_complete = spans[:, 1] < T
    targets = np.where(is_complete[:, None], spans, 0).astype(np.int32)
    if segment_ids is not None:
        if segment_ids.max(initial=0) > 1:
            raise ValueError(f"segment_ids up to {segment_ids.max()}: a row must be one document, segment 1")
        is_invalid |= is_complete & np.any(np.take_along_axis(segment_ids, targets, axis=1) <= 0, axis=1)
    if is_invalid.any():
        row = int(np.flatnonzero(is_invalid)[0])
        raise ValueError(
            f"span {spans[row].tolist()} of row {row} must be (first, last) with 0 <= first <= last, among its real "
            "tokens"
        )
    return Batch(tokens, targets, is_complete.astype(np.float32), segment_ids, dict(inputs or {}))


def loss(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None
) -> tuple[jax.Array, jax.Array, Any]:
    """The weighted sum of the rows' losses in nats, the sum of the weights, and the new model state.

    The loss of a row is the mean of the negative log-likelihoods of the first and the last token.

    Raises:
        ValueError: the model has no head for spans.
    """
    hidden, state = hidden_states(model, params, batch, key, state)
    logits_BT2 = model.logits(params, hidden)
    _check_logits(logits_BT2)
    scores_B2T = jnp.swapaxes(logits_BT2, 1, 2)
    if batch.segment_ids is not None:  # as in ``unembed``, the lowest float32 gives probability 0 in a softmax
        scores_B2T = jnp.where(batch.segment_ids[:, None] > 0, scores_B2T, jnp.finfo(jnp.float32).min)
    losses_B = jnp.mean(cross_entropy(scores_B2T, batch.targets), axis=1)
    total = jnp.sum(jnp.where(batch.weights != 0, losses_B * batch.weights, 0.0))
    return total, jnp.sum(batch.weights), state


def best_spans(
    logits_BT2: jax.Array, segment_ids_BT: jax.Array | None = None, *, max_length: int = 30
) -> tuple[jax.Array, jax.Array]:
    """The positions of the first and last token of each row's best answer, [B, 2] int32, and its score, [B].

    The score of a span is the logit of its first token plus the logit of its last token. Candidates are all spans of at
    most ``max_length`` tokens. To decide whether there is an answer, compare the score with the sum of the two logits
    of ``[CLS]``. In a row without candidates, both positions are 0, and the score is minus infinity.

    Args:
        logits_BT2: the logits of the first token and of the last token of the answer.
        segment_ids_BT: an answer may begin and end only at positions with an id above 0. Set the ids of the question to
            0. None: an answer may begin and end at any position.

    Raises:
        ValueError: the logits do not have shape [B, T, 2], or ``max_length`` is below 1.
    """
    _check_logits(logits_BT2)
    check_min(1, max_length=max_length)
    T = logits_BT2.shape[1]
    L = min(max_length, T)
    if segment_ids_BT is not None:
        logits_BT2 = jnp.where(segment_ids_BT[:, :, None] > 0, logits_BT2, -jnp.inf)
    starts_BT, ends_BT = logits_BT2[:, :, 0], logits_BT2[:, :, 1]
    last_TL = jnp.arange(T)[:, None] + jnp.arange(L)[None, :]
    ends_BTL = jnp.pad(ends_BT, ((0, 0), (0, L - 1)), constant_values=-jnp.inf)[:, last_TL]
    scores_BN = (starts_BT[:, :, None] + ends_BTL).reshape(-1, T * L)
    best_B = jnp.argmax(scores_BN, axis=1)
    first_B = best_B // L
    return jnp.stack([first_B, first_B + best_B % L], axis=1).astype(jnp.int32), jnp.max(scores_BN, axis=1)


def _check_logits(logits_BT2: jax.Array) -> None:
    if logits_BT2.ndim != 3 or logits_BT2.shape[-1] != 2:
        raise ValueError(f"logits {list(logits_BT2.shape)} must be [batch, time, 2]: use a model with task='span_qa'")

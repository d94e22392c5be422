"""Extractive question answering (Devlin et al. 2019, section 4.2): where in the text an answer begins and ends.

A row is one document, question and text. Its two distributions, of the first and of the last token of the answer, are
over its real tokens. ``transformers`` has padding among the candidates as well: where nothing is padded the two losses
are equal, where something is, ours does not depend on how much. A question without an answer points at ``[CLS]``, twice
(section 4.3).
Shapes: B batch, T time, L tokens of the longest answer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import Model, common
from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives.batch import Batch, hidden_states


def batch(
    tokens: np.ndarray,
    spans: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """Tokens [B, T] and the places of the first and the last token of each answer, [B, 2].

    A row whose answer was cut off (it ends at T or later) does not count. ``transformers`` still counts its start where
    only the end is cut off.

    Args:
        inputs: further arrays for ``apply``, as ``token_types``.

    Raises:
        ValueError: shapes that do not agree, several documents in a row, or an answer that ends before it begins,
            begins before the text or lies in the padding.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    (B, T), spans = tokens.shape, np.asarray(spans)
    if spans.shape != (B, 2) or spans.dtype.kind not in "iu":
        raise ValueError(f"spans must be integers of shape [{B}, 2], got {spans.dtype}{list(spans.shape)}")
    wrong = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0])
    inside = spans[:, 1] < T
    targets = np.where(inside[:, None], spans, 0).astype(np.int32)
    if segment_ids is not None:
        if segment_ids.max(initial=0) > 1:
            raise ValueError(f"segment_ids up to {segment_ids.max()}: a row must be one document, segment 1")
        wrong |= inside & np.any(np.take_along_axis(segment_ids, targets, axis=1) == 0, axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"span {spans[row].tolist()} of row {row} must be (first, last) with 0 <= first <= last, among its real "
            "tokens"
        )
    return Batch(tokens, targets, inside.astype(np.float32), segment_ids, dict(inputs or {}))


def loss(
    model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None, state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """The mean of the negative log-likelihoods in nats of start and end, summed over rows; the weight that it sums
    over, and what the model carries on.

    Raises:
        ValueError: the model has no head for spans.
    """
    hidden, state = hidden_states(model, params, batch, key, state)
    logits_BT2 = model.logits(params, hidden)
    _check(logits_BT2)
    scores_B2T = jnp.swapaxes(logits_BT2, 1, 2)
    if batch.segment_ids is not None:  # as ``unembed`` does: the lowest float32 takes no part in a softmax
        scores_B2T = jnp.where(batch.segment_ids[:, None] > 0, scores_B2T, jnp.finfo(jnp.float32).min)
    losses_B = jnp.mean(cross_entropy(scores_B2T, batch.targets), axis=1)
    total = jnp.sum(jnp.where(batch.weights > 0, losses_B * batch.weights, 0.0))
    return total, jnp.sum(batch.weights), state


def best_spans(
    logits_BT2: jax.Array, segment_ids_BT: jax.Array | None = None, *, max_length: int = 30
) -> tuple[jax.Array, jax.Array]:
    """The likeliest answer of each row: places of its first and last token [B, 2] int32; the sum of their logits [B].

    Of all first <= last with at most ``max_length`` tokens. Against the sum of the logits of ``[CLS]``, the score says
    whether there is an answer at all.

    Args:
        segment_ids_BT: only places above 0 are candidates: make it 0 for the question, too.

    Raises:
        ValueError: logits that are not those of spans, or a length below 1.
    """
    _check(logits_BT2)
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1")
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


def _check(logits_BT2: jax.Array) -> None:
    if logits_BT2.ndim != 3 or logits_BT2.shape[-1] != 2:
        raise ValueError(
            f"logits {list(logits_BT2.shape)} are not those of spans, [batch, time, 2]: take task 'span_qa'"
        )

"""Scoring: log-likelihoods and perplexities of texts under a model.

Shapes: B batch, T time, C time steps of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import processes
from jaxlm.data.tokens import check_tokens
from jaxlm.decoding.batches import length_batches
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.finite import check_finite, rename_rows_in_errors, rows_finite
from jaxlm.decoding.prompts import check_ids, source_vocab_size
from jaxlm.models import Model
from jaxlm.nn.embedding import argmax, widen_ids
from jaxlm.nn.loss import cross_entropy
from jaxlm.nn.loss.chunked import chunk_length
from jaxlm.nn.time_chunks import join_time, split_time
from jaxlm.spec import Array, Params

CHUNK_LOGITS = 2**22
"""Maximum number of logits in memory at a time (16 MiB), unless one time step of the batch has more."""


class TokenScores(NamedTuple):
    """The scores of tokens given the tokens before them.

    Padding is not predicted. In :func:`token_scores`, the first token of a document and a token directly after padding
    are not predicted either.

    Attributes:
        log_probs: [B, T] float32, log-probability of each token in nats; 0 for tokens that are not predicted.
        greedy: [B, T] bool, whether greedy decoding would select the token: the most likely token, or of several
            equally likely tokens the one with the lowest id. True for tokens that are not predicted.
    """

    log_probs: jax.Array
    greedy: jax.Array


def log_likelihood(model: Model, params: Params, tokens: Array, segment_ids: Array | None = None) -> jax.Array:
    """``log p(tokens[:, t + 1] | tokens[:, :t + 1])`` in nats, [B, T - 1] float32.

    The value is 0 if ``tokens[:, t + 1]`` is padding, begins another document, or follows padding (so put padding
    before or after a document, not inside it). Logits are computed in chunks of time steps. A chunk has at most
    ``CHUNK_LOGITS`` logits, but at least one time step.

    If logits are not finite, the function raises an error. For this check it waits until the result is computed. Inside
    ``jit`` or another transformation it cannot raise this error.

    Args:
        tokens: [B, T] integer ids.
        segment_ids: [B, T] int32, 0 for padding and 1, 2, ... for documents. The tokens of a document do not attend to
            other documents. None: each row is one document without padding.

    Raises:
        TypeError: ``tokens`` or ``segment_ids`` is not an array.
        ValueError: the model does not predict each token from the tokens before it; there are no rows or fewer than 2
            columns; an id is outside the vocabulary; a shape is wrong; or a document has more tokens than the model has
            positions. (The model does not read the last column, so the last column needs no position.)
        NotFiniteError: logits are not finite. The message names the rows, and the parameters that are not finite or
            another possible cause.

    Example:
        >>> log_likelihood(model, params, tokens).sum(axis=1)   # one value per row   # doctest: +SKIP
    """
    return token_scores(model, params, tokens, segment_ids).log_probs


def token_scores(model: Model, params: Params, tokens: Array, segment_ids: Array | None = None) -> TokenScores:
    """The scores [B, T - 1] of ``tokens[:, t + 1]`` given ``tokens[:, :t + 1]``.

    The arguments and errors are the same as in :func:`log_likelihood`, which returns only the ``log_probs``.
    """
    _check_predicts_next_token(model)
    check_ids(model, tokens, segment_ids, "tokens")
    if tokens.shape[1] < 2:
        raise ValueError("tokens have only 1 column: the first token is not predicted, so at least 2 are needed")
    limit, is_traced = model.max_positions, isinstance(segment_ids, jax.core.Tracer)
    if segment_ids is not None and not is_traced and limit is not None and segment_ids.shape[1] - 1 > limit:
        _check_document_lengths(processes.gather_to_host(segment_ids)[:, :-1], limit)
    return _checked_scores(model, params, tokens, None, {"segment_ids": segment_ids})


def _check_document_lengths(segment_ids_BT: np.ndarray, limit: int) -> None:
    """Raise ``ValueError`` if a document has more than ``limit`` tokens."""
    for row, segments in enumerate(segment_ids_BT):
        real = segments[segments > 0]
        starts = np.flatnonzero(np.diff(real, prepend=0, append=0))  # the last entry is the end of the last document
        longest = np.diff(starts).max(initial=0)
        if longest > limit:
            raise ValueError(
                f"row {row} has a document of {longest} tokens, not counting the last column, but max_positions={limit}"
                ": score it in windows, with jaxlm.decoding.perplexity"
            )


def _check_predicts_next_token(model: Model) -> None:
    remedy = "use target_log_likelihood" if model.reads_source else "use a model with task='causal' or 'permutation'"
    require_task(model, ("causal", "permutation"), "it does not predict each token from the tokens before it", remedy)


def target_log_likelihood(
    model: Model,
    params: Params,
    source: Array,
    targets: Array,
    *,
    start_id: int,
    source_segment_ids: Array | None = None,
    segment_ids: Array | None = None,
) -> jax.Array:
    """``log p(targets[:, t] | source, targets[:, :t])`` of an encoder-decoder in nats, [B, T] float32; 0 at padding.

    Args:
        source: [B, S] integer ids.
        targets: [B, T] integer ids, including the end token.
        start_id: the token that the decoder reads before the first target.
        source_segment_ids, segment_ids: segment ids of the source [B, S] and of the targets [B, T]: 1 for tokens, 0
            for padding at the end.

    Raises:
        TypeError: the model is not an encoder-decoder, or the ids or segment ids are not an array.
        ValueError: the model has no head; an id (or ``start_id``) is outside the vocabulary; an array is empty; or a
            shape or dtype is wrong.
        NotFiniteError: as in :func:`log_likelihood`.
    """
    return target_token_scores(
        model, params, source, targets, start_id=start_id, source_segment_ids=source_segment_ids,
        segment_ids=segment_ids,
    ).log_probs  # fmt: skip


def target_token_scores(
    model: Model,
    params: Params,
    source: Array,
    targets: Array,
    *,
    start_id: int,
    source_segment_ids: Array | None = None,
    segment_ids: Array | None = None,
) -> TokenScores:
    """The scores [B, T] of ``targets[:, t]`` given ``source`` and ``targets[:, :t]``, for an encoder-decoder.

    The arguments and errors are the same as in :func:`target_log_likelihood`, which returns only the ``log_probs``.
    """
    if not model.reads_source:
        raise TypeError(f"family {model.family!r} reads no source: call log_likelihood")
    check_ids(model, source, source_segment_ids, "sources", vocab_size=source_vocab_size(model))
    check_ids(model, targets, segment_ids, "targets")
    targets = widen_ids(targets)  # in a small dtype, ``start_id`` could wrap to a valid id
    decoder_BT = jnp.concatenate([jnp.full_like(targets[:, :1], start_id), targets[:, :-1]], axis=1)
    check_ids(model, decoder_BT[:, :1], None, "start ids")
    inputs = {"source": source, "source_segment_ids": source_segment_ids, "segment_ids": segment_ids}
    return _checked_scores(model, params, decoder_BT, targets, inputs)


def _checked_scores(model: Model, params: Params, *arrays: Any) -> TokenScores:
    """The scores of :func:`_token_scores`, after a check that the logits are finite."""
    scores, finite_B = _token_scores(model, params, *arrays)
    check_finite(model, params, finite_B)
    return scores


@jax.jit(static_argnames="model")
def _token_scores(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    targets_BT: jax.Array | None,
    inputs: dict[str, jax.Array | None],
) -> tuple[TokenScores, jax.Array]:
    """The scores [B, T] of the targets, and whether the logits of each row are finite, bool [B].

    Args:
        tokens_BT: the tokens that the model reads.
        targets_BT: the tokens that are scored. None: the targets are ``tokens_BT[:, 1:]``, and the model reads
            ``tokens_BT[:, :-1]``. Then T is one less than in ``tokens_BT``, and the first token of each document is
            not predicted.
        inputs: the other inputs of ``model.apply``. Targets with segment id 0 are not predicted.
    """
    segment_ids_BT = inputs["segment_ids"]
    is_predicted_BT = None if segment_ids_BT is None else segment_ids_BT > 0
    if targets_BT is None:
        tokens_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        if segment_ids_BT is not None:
            inputs = {"segment_ids": segment_ids_BT[:, :-1]}
            is_predicted_BT = (segment_ids_BT[:, :-1] == segment_ids_BT[:, 1:]) & (segment_ids_BT[:, 1:] > 0)
    hidden_BTD, _ = model.apply(params, tokens_BT, **inputs)

    def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_BCD, targets_BC = chunk
        logits_BCV = model.logits(params, hidden_BCD)
        return -cross_entropy(logits_BCV, targets_BC), argmax(logits_BCV) == targets_BC, rows_finite(logits_BCV)

    C = chunk_length(model.logits, CHUNK_LOGITS, params, hidden_BTD)
    scores = jax.lax.map(score_chunk, (split_time(hidden_BTD, C), split_time(targets_BT, C)))
    log_probs_BT, greedy_BT, finite_BT = (join_time(chunks, targets_BT.shape[1]) for chunks in scores)
    if is_predicted_BT is not None:
        log_probs_BT = jnp.where(is_predicted_BT, log_probs_BT, 0.0)
        greedy_BT, finite_BT = greedy_BT | ~is_predicted_BT, finite_BT | ~is_predicted_BT
    return TokenScores(log_probs_BT, greedy_BT), jnp.all(finite_BT, axis=1)


def perplexity_of(nats_per_token: float) -> float:
    """``exp(nats_per_token)``; infinity if the result exceeds the largest float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text under a model.

    Attributes:
        nats_per_token: mean negative log-likelihood of the predicted tokens, in nats.
        tokens: number of predicted tokens.
    """

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``. A uniform distribution over this many tokens has the same ``nats_per_token``."""
        return perplexity_of(self.nats_per_token)


def perplexity(
    model: Model, params: Params, ids: np.ndarray, *, window: int, stride: int, batch_size: int = 8
) -> Perplexity:
    """The perplexity of a long text, scored in overlapping windows of ``window`` tokens.

    A window begins every ``stride`` tokens. The last window may begin earlier, so that it ends with the text. Each
    window scores only the tokens that no earlier window has scored. So every token except the first is scored once.
    After the first window, each token is predicted from at least ``window - stride`` tokens. A smaller stride gives
    more context and usually a lower perplexity, at a higher cost. If the text is not longer than ``window``, there is
    one window.

    Args:
        ids: [tokens] integer ids.
        window: number of tokens in a window, at least 2. The first token of a window is not predicted, and the model
            does not read the last token. So the model needs ``window - 1`` positions.
        stride: distance between window starts, from 1 to ``window - 1``.
        batch_size: number of windows that are scored together.

    Raises:
        ValueError: the model does not predict each token from the tokens before it; ``ids`` is not a 1-D array of at
            least 2 integers; an id is outside the vocabulary; the model has fewer positions than a window needs; a
            number is outside its range; or the text needs several windows, but the model needs the whole text
            (``Model.needs_whole_text``).
        NotFiniteError: as in :func:`log_likelihood`. The message has the indices of windows instead of rows.
    """
    _check_predicts_next_token(model)
    ids = np.asarray(ids)
    check_tokens(ids, model.config.vocab_size, min_length=2, name="ids")
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: the first token of a window is not predicted")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be from 1 to window - 1 = {window - 1}, so that every token is scored")
    if model.needs_whole_text and ids.size > window:
        raise ValueError(
            f"{ids.size} tokens need several windows of window={window} tokens, but {model.family} must read a text "
            f"from its first token: set window={ids.size}, which needs max_positions of at least {ids.size - 1}, or "
            "score shorter texts"
        )
    window = min(window, ids.size)
    starts = np.append(np.arange(0, ids.size - window, stride), ids.size - window)
    ends = starts + window
    num_new = np.diff(ends, prepend=1)  # number of tokens at the end of each window that no earlier window has scored

    nats_of_windows = [0.0] * starts.size
    for rows in length_batches([window] * starts.size, batch_size):
        windows = ids[starts[rows][:, None] + np.arange(window)].astype(np.int32)
        with rename_rows_in_errors("window", rows):
            log_probs = np.asarray(log_likelihood(model, params, windows), np.float64)
        for row, log_probs_T in zip(rows, log_probs, strict=True):
            nats_of_windows[row] = -float(log_probs_T[window - 1 - num_new[row] :].sum())
    return Perplexity(nats_per_token=sum(nats_of_windows) / (ids.size - 1), tokens=ids.size - 1)

"""Extractive question answering: training windows, and answers of a trained model (task "span_qa").

A long context is split into overlapping windows, each with the whole question (Devlin et al. 2019, section 4.2). If a
window does not contain the answer, its target is "no answer": the first and the last token are the classifier token,
``[CLS]`` for BERT and ``<cls>`` for XLNet (the first token, if the tokenizer has no classifier token).

Shapes: N questions, W windows, B batch rows, T time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.buckets import Bucketed, Encoded, Rows
from jaxlm.data.encodings import SPECIAL, Encoding
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.batches import pad_rows
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.finite import check_finite, named_rows, rows_finite
from jaxlm.decoding.text import check_vocabulary
from jaxlm.metrics import Score, _questions, _word_f1, exact_match, token_f1
from jaxlm.models import Model
from jaxlm.objectives import span_qa
from jaxlm.objectives.batch import Batch
from jaxlm.sharding import Sharding, active
from jaxlm.tasks.predict import BATCH_SIZE, _batches, _max_positions

MAX_LENGTH = 384
"""Default maximum number of tokens of a window, as in BERT's experiments."""


# ------------------------------------------------------------------------------------------------- training


def features(
    model: Model,
    tokenizer: Tokenizer,
    examples: Iterable[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    stride: int | None = None,
) -> list[Encoded]:
    """The training windows of ``examples``, for :class:`jaxlm.data.buckets.Bucketed` and :func:`to_batch`.

    Each window has ``tokens`` [T], ``token_types`` [T] if the model reads them, and the positions ``first`` and
    ``last`` of the answer's tokens. If there are several answers, the target is the most frequent one.

    Args:
        examples: examples with ``id``, ``question``, ``context``, ``answers`` and ``starts``, as
            :func:`jaxlm.data.squad.read_squad` returns them.
        max_length: maximum number of tokens of a window. None: 384, or the model's positions if these are fewer.
        stride: number of context tokens that two consecutive windows share. None: a third of ``max_length``.

    Raises:
        ValueError: the model has another head, a window is longer than its positions, an example cannot be encoded, or
            no window has the whole answer. The message has the id of the example.
    """
    _check_model(model)
    max_length, stride = _window_size(model, max_length, stride)
    reads_types = model.reads_token_types
    found: list[Encoded] = []
    for example in examples:
        what = f"question {example['id']!r}"
        windows = _windows(model, tokenizer, example["question"], example["context"], max_length, stride, what)
        for window, (first, last) in zip(windows, _targets(tokenizer, windows, example, what), strict=True):
            row: dict[str, Any] = {"tokens": window.ids}
            if reads_types:
                _check_token_types(model, window)
                row["token_types"] = window.token_types
            found.append({**row, "first": first, "last": last})
    return found


def to_batch(rows: Rows) -> Batch:
    """The batch of ``jaxlm.objectives.span_qa`` for rows of :func:`features`. Rows without an example have weight 0."""
    tokens = rows.fields["tokens"]
    spans = np.stack([rows.fields["first"], rows.fields["last"]], axis=1)
    spans = np.where(rows.indices[:, None] < 0, tokens.shape[1], spans)  # a span after the end has no weight
    segment_ids = rows.segment_ids("tokens")
    segment_ids[rows.indices < 0, 0] = 1  # one real token in an empty row keeps its loss finite
    inputs = {name: rows.fields[name] for name in ("token_types",) if name in rows.fields}
    return span_qa.batch(tokens, spans, segment_ids, inputs=inputs)


def batches(
    windows: Sequence[Encoded], batch_size: int, num_buckets: int = 4, *, max_length: int | None = None
) -> list[Batch]:
    """The batches of an evaluation: every window of :func:`features` once, in order of length.

    Args:
        max_length: maximum length of a batch: ``max_length`` of :func:`features`, or the positions of the model. None:
            no limit, and lengths are rounded up to a multiple of 8.

    Raises:
        ValueError: a window is longer than ``max_length``.
    """
    source = Bucketed(windows, batch_size, num_buckets, shuffle=False, max_length=max_length)
    return [to_batch(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


def _targets(
    tokenizer: Tokenizer, windows: Sequence[Encoding], example: Mapping[str, Any], what: str
) -> list[tuple[int, int]]:
    """The positions of the first and last token of the answer in each window, or those of "no answer"."""
    no_answer = [_no_answer_position(tokenizer, window) for window in windows]
    if not example["answers"]:
        return [(position, position) for position in no_answer]
    answers = zip(example["answers"], example["starts"], strict=True)
    (text, start), _ = Counter(answers).most_common(1)[0]
    # Most vocabularies have no tokens for white space.
    first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    overlaps = [_overlapping(window, first, last) for window in windows]
    if not any(positions.size for positions in overlaps):
        raise ValueError(f"{what}: the answer {text!r} has no tokens")
    begin = min(window.offsets[tokens[0], 0] for window, tokens in zip(windows, overlaps, strict=True) if tokens.size)
    end = max(window.offsets[tokens[-1], 1] for window, tokens in zip(windows, overlaps, strict=True) if tokens.size)
    targets = []
    for window, tokens, position in zip(windows, overlaps, no_answer, strict=True):
        has_answer = tokens.size and window.offsets[tokens[0], 0] == begin and window.offsets[tokens[-1], 1] == end
        targets.append((int(tokens[0]), int(tokens[-1])) if has_answer else (position, position))
    if targets == [(position, position) for position in no_answer]:
        raise ValueError(f"{what}: no window has the whole answer {text!r}: use a larger stride")
    return targets


def _overlapping(window: Encoding, first: int, last: int) -> np.ndarray:
    """The positions of the context tokens that overlap ``context[first:last]``."""
    starts, ends = window.offsets.T
    return np.flatnonzero((window.sequence == 1) & (ends > first) & (starts < last))


# -------------------------------------------------------------------------------------------------- answers


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        text: ``context[start:end]``; empty if the model gives no answer.
        score: the logit of the answer minus the logit of "no answer". The logit of a span is the sum of the logits of
            its first and last token. With several windows, the logit of the answer is the maximum over windows, and the
            logit of "no answer" is the minimum. If ``text`` is empty, it is the score of the best span.
        start, end: the position of the answer in the context, in characters.
    """

    text: str
    score: float
    start: int
    end: int


def answer(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_answer_tokens: int = 30,
    max_length: int | None = None,
    stride: int | None = None,
    no_answer_threshold: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """The answer to each question: the best span of its context, for every family with task "span_qa".

    Args:
        contexts: the context of each question, of any length.
        max_answer_tokens: maximum number of tokens of an answer.
        max_length: maximum number of tokens of a window. None: 384, or the model's positions if these are fewer.
        stride: number of context tokens that two consecutive windows share. None: a third of ``max_length``.
        no_answer_threshold: the model gives an answer only if its score is above the threshold (Devlin et al. 2019,
            section 4.3). :func:`best_no_answer_threshold` computes it. None: the model always gives an answer.
        batch_size: number of windows in a batch.

    Raises:
        TypeError: ``questions`` or ``contexts`` is a single string.
        ValueError: the model has another head; there are no questions, or the numbers of questions and contexts differ;
            a question or context is empty; or a window is longer than the model's positions.
        NotFiniteError: logits are not finite. The message names the questions and the parameters that are not finite.

    Example:
        >>> answer(model, params, tokenizer, ["Who has it?"], ["Mary took the ball."])[0].text   # doctest: +SKIP
        'Mary'
    """
    _check_model(model)
    _check_pairs(questions, contexts)
    if max_answer_tokens < 1:
        raise ValueError(f"max_answer_tokens={max_answer_tokens} must be at least 1")
    max_length, stride = _window_size(model, max_length, stride)
    windows: list[Encoding] = []
    owners: list[int] = []
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        new = _windows(model, tokenizer, question, context, max_length, stride, f"question {number}")
        windows += new
        owners += [number] * len(new)
    with named_rows("question", owners):
        spans, scores, no_answer = _score(model, params, tokenizer, windows, max_answer_tokens, batch_size)
    best = np.full(len(questions), -1)
    lowest = np.full(len(questions), np.inf)
    for index, number in enumerate(owners):
        lowest[number] = min(lowest[number], no_answer[index])
        if best[number] < 0 or scores[index] > scores[best[number]]:
            best[number] = index
    return [
        _answer(windows[index], spans[index], float(scores[index] - no_answer_logit), context, no_answer_threshold)
        for index, no_answer_logit, context in zip(best.tolist(), lowest.tolist(), contexts, strict=True)
    ]


def scores(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[Score]:
    """The exact match and the F1 of the answers, as in the official evaluation script of SQuAD.

    Args:
        references: the accepted answers of each question; empty for a question without an answer.
    """
    texts = [found.text for found in answers]
    return [exact_match(texts, references), token_f1(texts, references)]


def samples(examples: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> list[dict[str, str]]:
    """The rows for ``jaxlm.training.report.write_samples``: question, accepted answers, answer, score and context."""
    return [
        {
            "source": example["question"], "reference": " | ".join(dict.fromkeys(example["answers"])),
            "output": found.text, "score": f"{found.score:.2f}", "context": example["context"],
        }
        for example, found in zip(examples, answers, strict=True)
    ]  # fmt: skip


def best_no_answer_threshold(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> float:
    """The ``no_answer_threshold`` with the largest F1. The candidates are the scores of ``answers``.

    Use a validation set, not the test set.

    Args:
        answers: the result of ``answer(..., no_answer_threshold=None)``.
        references: the accepted answers of each question; empty for a question without an answer.

    Raises:
        ValueError: there are no answers, or the numbers of answers and references differ.
    """
    answered, unanswered = (
        np.array(
            [max(_word_f1(text, accepted) for accepted in answers) for text, answers in _questions(texts, references)]
        )
        for texts in ([found.text for found in answers], [""] * len(answers))
    )
    scores = np.array([found.score for found in answers])
    order = np.argsort(scores, kind="stable")
    # totals[k] is the total F1 if the k questions with the lowest scores get no answer.
    totals = answered.sum() + np.concatenate([[0.0], np.cumsum((unanswered - answered)[order])])
    # No threshold separates equal scores.
    possible = np.concatenate([[True], scores[order][1:] > scores[order][:-1], [True]])
    num_unanswered = int(np.argmax(np.where(possible, totals, -np.inf)))
    return float(scores[order][num_unanswered - 1]) if num_unanswered else float(np.nextafter(scores.min(), -np.inf))


def _answer(window: Encoding, span: np.ndarray, score: float, context: str, threshold: float | None) -> Answer:
    """The answer with this span of a window, or no answer if its score is not above the threshold."""
    if threshold is not None and not score > threshold:
        return Answer("", score, 0, 0)
    start, end = int(window.offsets[span[0], 0]), int(window.offsets[span[1], 1])
    return Answer(context[start:end], score, start, end)


def _score(
    model: Model, params: Any, tokenizer: Tokenizer, windows: Sequence[Encoding], max_answer_tokens: int,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The best span of each window [W, 2], its logit [W], and the logit of "no answer" [W]."""
    spans = np.zeros((len(windows), 2), np.int32)
    scores, no_answer = np.zeros((2, len(windows)), np.float32)
    for batch in _batches(model, windows, batch_size):
        chosen = [windows[number] for number in batch.numbers]
        in_context, _ = pad_rows([(window.sequence == 1).astype(np.int32) for window in chosen], batch.tokens.shape[1])
        positions = np.array([_no_answer_position(tokenizer, window) for window in chosen], np.int32)
        *found, finite_B = _best_spans(
            model, params, batch.tokens, batch.segment_ids, in_context, positions, batch.inputs,
            max_answer_tokens=max_answer_tokens, sharding=active(),
        )  # fmt: skip
        with named_rows("window", batch.numbers):
            check_finite(model, params, finite_B)
        spans[batch.numbers], scores[batch.numbers], no_answer[batch.numbers] = (np.asarray(array) for array in found)
    return spans, scores, no_answer


@functools.partial(jax.jit, static_argnames=("model", "max_answer_tokens", "sharding"))
def _best_spans(
    model: Model,
    params: Any,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    in_context_BT: jax.Array,
    no_answer_B: jax.Array,
    inputs: dict[str, jax.Array],
    *,
    max_answer_tokens: int,
    sharding: Sharding | None,  # part of the jit cache key: `constrain` reads it during tracing
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The best span of each row [B, 2], its logit [B], the logit of "no answer" [B], and whether the logits are finite.

    The last array, bool [B], ignores the logits of padding.
    """
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT, **inputs)
    logits_BT2 = model.logits(params, hidden_BTD).astype(jnp.float32)
    spans_B2, scores_B = span_qa.best_spans(logits_BT2, in_context_BT, max_length=max_answer_tokens)
    no_answer_B2 = jnp.take_along_axis(logits_BT2, no_answer_B[:, None, None], axis=1)[:, 0]
    finite_B = jnp.all(rows_finite(logits_BT2) | (segment_ids_BT == 0), axis=1)
    return spans_B2, scores_B, no_answer_B2.sum(axis=1), finite_B


# -------------------------------------------------------------------------------------------------- windows


def _windows(
    model: Model, tokenizer: Tokenizer, question: str, context: str, max_length: int, stride: int, what: str
) -> list[Encoding]:
    """The windows of a context, after a check that the model can read them."""
    try:
        windows = tokenizer.encode_windows(question, context, max_length=max_length, stride=stride)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    for window in windows:
        check_vocabulary(window.ids, model.config.vocab_size, what)
    return windows


def _check_token_types(model: Model, window: Encoding) -> None:
    """Raise ``ValueError`` if the model has no embedding for a token type of the window."""
    num_types, largest = getattr(model.config, "num_token_types", None), window.token_types.max()
    if num_types is not None and largest >= num_types:
        raise ValueError(
            f"the tokenizer gives token type {largest}, but {model.family} has num_token_types={num_types}"
        )


def _no_answer_position(tokenizer: Tokenizer, window: Encoding) -> int:
    """The position of the classifier token, or 0 if the tokenizer has no classifier token."""
    cls = tokenizer.special_ids.cls
    found = np.flatnonzero((window.ids == cls) & (window.sequence == SPECIAL))
    return int(found[0]) if found.size else 0


def _window_size(model: Model, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """The maximum length and the stride of windows, with defaults and after a check."""
    limit = _max_positions(model)
    if max_length is None:
        max_length = MAX_LENGTH if limit is None else min(MAX_LENGTH, limit)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length} must be at most {limit}, the model's max_positions")
    stride = max_length // 3 if stride is None else stride
    if not 0 <= stride < max_length:
        raise ValueError(f"stride={stride} must be at least 0 and less than max_length={max_length}")
    return max_length, stride


def _check_model(model: Model) -> None:
    require_task(
        model, ("span_qa",), "it finds no answers",
        "fine-tune it with load_pretrained(directory, task='span_qa'), or load a model for question answering",
    )  # fmt: skip


def _check_pairs(questions: Sequence[str], contexts: Sequence[str]) -> None:
    for name, values in (("questions", questions), ("contexts", contexts)):
        if isinstance(values, str):
            raise TypeError(f"{name} are a sequence of strings, got one string: pass [{values[:20]!r}]")
    if len(questions) != len(contexts) or not questions:
        raise ValueError(
            f"each question needs one context: got {len(questions)} questions and {len(contexts)} contexts"
        )

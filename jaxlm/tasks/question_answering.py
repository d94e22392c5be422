"""Extractive question answering: training windows, and answers of a trained model (task "span_qa").

A long context is split into overlapping windows. Each window also has the whole question (Devlin et al. 2019, section
4.2). If a window does not contain the whole answer, its target is "no answer". This is the span that has only the
classifier token (``[CLS]`` for BERT, ``<cls>`` for XLNet). If the tokenizer has no classifier token, it is the span
that has only the first token of the window.

Shapes: W windows, B batch rows, T time, D model width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_min, check_same_number
from jaxlm.data.buckets import BucketBatch, Bucketed, Encoded
from jaxlm.data.encodings import SPECIAL_TOKEN, Encoding
from jaxlm.data.examples import Examples
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import check_tokens
from jaxlm.decoding.batches import pad_rows
from jaxlm.decoding.finite import check_finite, rename_rows_in_errors, rows_finite
from jaxlm.metrics import Score, exact_match, predictions_and_answers, token_f1, word_f1
from jaxlm.models import Model
from jaxlm.objectives import span_qa
from jaxlm.objectives.batch import Batch
from jaxlm.spec import Params
from jaxlm.tasks.attention_maps import write_attention_maps
from jaxlm.tasks.predict import BATCH_SIZE, check_texts, check_token_types, input_batches, require_head
from jaxlm.training.report import write_samples

MAX_LENGTH = 384
"""Default maximum number of tokens of a window, as in Devlin et al. (2019)."""

MAP_TOKENS = 60
"""Maximum number of tokens, including special tokens, in the attention map of a question and its context."""


# ------------------------------------------------------------------------------------------------- training


def training_windows(
    model: Model,
    tokenizer: Tokenizer,
    examples: Iterable[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    stride: int | None = None,
) -> list[Encoded]:
    """The training windows of ``examples``, for :class:`jaxlm.data.buckets.Bucketed` and :func:`to_batch`.

    Each window has ``tokens`` [T], ``token_types`` [T] (if the model reads them), and the positions ``first`` and
    ``last`` of the answer's first and last token. If an example has several answers, the target is the most frequent
    answer. Of equally frequent answers, it is the first. If an example has no answer, all its windows have the target
    "no answer".

    Args:
        examples: examples with ``id``, ``question``, ``context``, ``answers`` and ``starts``, as returned by
            :func:`jaxlm.data.squad.read_squad`.
        max_length: maximum number of tokens of a window. None: 384, or the model's positions if these are fewer.
        stride: number of context tokens that two consecutive windows share. None: a third of ``max_length``.

    Raises:
        ValueError: The model is not for task "span_qa". ``max_length`` is below 1 or exceeds the model's positions.
            ``stride`` is negative or not below ``max_length``. The model has no embedding for a token type. For the
            following errors, the message has the example's id: the question, the context or the answer has no tokens,
            an id is outside the vocabulary, the example has answers but no ``starts``, the context does not have the
            answer at its start position, no window has the whole answer, or ``max_length`` is too small. It is too
            small if the texts need several windows, and the question and the special tokens leave at most ``stride``
            tokens of a window for the context.
    """
    _check_model(model)
    max_length, stride = _window_size(model, max_length, stride)
    reads_types = model.reads_token_types
    encoded: list[Encoded] = []
    for example in examples:
        what = f"question {example['id']!r}"
        windows = _windows(model, tokenizer, example["question"], example["context"], max_length, stride, what)
        for window, (first, last) in zip(windows, _targets(tokenizer, windows, example, what), strict=True):
            row: dict[str, Any] = {"tokens": window.ids}
            if reads_types:
                check_token_types(model, window.token_types)
                row["token_types"] = window.token_types
            encoded.append({**row, "first": first, "last": last})
    return encoded


def check_questions(model: Model, tokenizer: Tokenizer, examples: Examples, **window_size: int | None) -> None:
    """Raise ``ValueError`` if the model cannot read a question, for example because the question is too long.

    Args:
        examples: as for :func:`training_windows`, but the answers are not used.
        window_size: ``max_length`` and ``stride``, as for :func:`training_windows`.
    """
    try:  # without the answers: a test needs no targets, so an answer may have no tokens or be in no window
        training_windows(model, tokenizer, ({**example, "answers": []} for example in examples), **window_size)
    except ValueError as error:
        raise ValueError(f"{examples.name}: {error}") from error


def to_batch(rows: BucketBatch) -> Batch:
    """The batch of ``jaxlm.objectives.span_qa`` for a batch of :func:`training_windows`.

    Rows without a window have weight 0.
    """
    tokens = rows.fields["tokens"]
    spans = np.stack([rows.fields["first"], rows.fields["last"]], axis=1)
    spans = np.where(rows.indices[:, None] < 0, tokens.shape[1], spans)  # a span outside the row gets weight 0
    inputs = {name: rows.fields[name] for name in ("token_types",) if name in rows.fields}
    return span_qa.batch(tokens, spans, rows.segment_ids("tokens"), inputs=inputs)


def batches(
    windows: Sequence[Encoded], batch_size: int, num_buckets: int = 4, *, max_length: int | None = None
) -> list[Batch]:
    """The batches for an evaluation, in the order of the bucket lengths. Every window occurs once.

    Args:
        windows: the result of :func:`training_windows`.
        max_length: maximum number of tokens of a row, for example ``max_length`` of :func:`training_windows` or
            the model's ``max_positions``. None: no limit. The length of a batch is rounded up to a multiple of 8, but
            not above ``max_length``.

    Raises:
        ValueError: there are no windows, or a window is longer than ``max_length``.
    """
    source = Bucketed(windows, batch_size, num_buckets, shuffle=False, max_length=max_length)
    return [to_batch(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


def _targets(
    tokenizer: Tokenizer, windows: Sequence[Encoding], example: Mapping[str, Any], what: str
) -> list[tuple[int, int]]:
    """The positions of the answer's first and last token in each window, or the positions of "no answer"."""
    no_answer = [_no_answer_position(tokenizer, window) for window in windows]
    if not example["answers"]:
        return [(position, position) for position in no_answer]
    if "starts" not in example:
        raise ValueError(f"{what} has no field 'starts': convert SQuAD's format with jaxlm.data.squad.squad_example")
    if len(example["starts"]) != len(example["answers"]):
        raise ValueError(
            f"{what} has {len(example['answers'])} 'answers' and {len(example['starts'])} 'starts': give one start per "
            "answer"
        )
    answers = zip(example["answers"], example["starts"], strict=True)
    (text, start), _ = Counter(answers).most_common(1)[0]
    if not example["context"].startswith(text, start):
        raise ValueError(
            f"{what}: the answer {text!r} is not at character {start} of the context: correct its start, or remove "
            "this example"
        )
    # Most vocabularies have no tokens for white space, so leave out white space around the answer.
    stripped_start, stripped_end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    overlaps = [_overlapping(window, stripped_start, stripped_end) for window in windows]
    offsets = np.concatenate([window.offsets[tokens] for window, tokens in zip(windows, overlaps, strict=True)])
    if not offsets.size:
        raise ValueError(
            f"{what}: the answer {text!r} has no tokens: remove this example, or use a tokenizer that has tokens for it"
        )
    begin, end = offsets[:, 0].min(), offsets[:, 1].max()
    targets = []
    for window, tokens, position in zip(windows, overlaps, no_answer, strict=True):
        has_answer = tokens.size and window.offsets[tokens[0], 0] == begin and window.offsets[tokens[-1], 1] == end
        targets.append((int(tokens[0]), int(tokens[-1])) if has_answer else (position, position))
    if targets == [(position, position) for position in no_answer]:
        raise ValueError(f"{what}: no window has the whole answer {text!r}: use a larger stride or max_length")
    return targets


def _overlapping(window: Encoding, start: int, end: int) -> np.ndarray:
    """The positions of the context tokens that overlap ``context[start:end]``."""
    starts, ends = window.offsets.T
    return np.flatnonzero((window.sequence_ids == 1) & (ends > start) & (starts < end))


# -------------------------------------------------------------------------------------------------- answers


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        text: ``context[start:end]``. Empty if ``score`` is not above the ``no_answer_threshold`` of :func:`answer`.
        score: the logit of the best span minus the logit of "no answer". The logit of a span is the start logit of its
            first token plus the end logit of its last token. For several windows, the logit of the best span is the
            maximum over windows, and the logit of "no answer" is the minimum over windows. An empty answer also has
            the score of the best span.
        start, end: character positions of the answer in the context. Both are 0 for an empty answer.
    """

    text: str
    score: float
    start: int
    end: int


def answer(
    model: Model,
    params: Params,
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
    """The answer to each question: the span of its context with the largest logit, or an empty answer.

    Args:
        model: a model with task "span_qa".
        contexts: the context of each question, of any length.
        max_answer_tokens: maximum number of tokens of an answer.
        max_length: maximum number of tokens of a window. None: 384, or the model's positions if these are fewer.
        stride: number of context tokens that two consecutive windows share. None: a third of ``max_length``.
        no_answer_threshold: an answer is returned only if its score is above the threshold (Devlin et al. 2019, section
            4.3). :func:`best_no_answer_threshold` computes a threshold. None: an answer is always returned.
        batch_size: number of windows in a batch.

    Raises:
        TypeError: ``questions`` or ``contexts`` is a single string, or has an element that is not a string.
        ValueError: The model is not for task "span_qa". There are no questions, or the numbers of questions and
            contexts differ. A question or context has no tokens, or ids or token types that the model does not have.
            ``max_length`` is below 1, exceeds the model's positions, or is too small for a question (as in
            :func:`training_windows`). ``stride`` is negative or not below ``max_length``. ``max_answer_tokens`` or
            ``batch_size`` is below 1.
        NotFiniteError: logits are not finite. The message names the questions with such logits, and the parameters
            that are not finite or another possible cause.

    Example:
        >>> answer(model, params, tokenizer, ["Who has it?"], ["Mary took the ball."])[0].text   # doctest: +SKIP
        'Mary'
    """
    _check_model(model)
    check_texts(questions, "question")
    check_texts(contexts, "context")
    check_same_number(question=questions, context=contexts)
    check_min(1, max_answer_tokens=max_answer_tokens)
    max_length, stride = _window_size(model, max_length, stride)
    windows: list[Encoding] = []
    starts = [0]  # the index of the first window of each question, and the number of all windows
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        windows += _windows(model, tokenizer, question, context, max_length, stride, f"question {number}")
        starts.append(len(windows))
    with rename_rows_in_errors("question", np.repeat(np.arange(len(questions)), np.diff(starts))):
        spans, span_logits, no_answer = _score(model, params, tokenizer, windows, max_answer_tokens, batch_size)
    answers = []
    for context, start, stop in zip(contexts, starts[:-1], starts[1:], strict=True):
        best = start + int(span_logits[start:stop].argmax())
        score = float(span_logits[best] - no_answer[start:stop].min())
        if no_answer_threshold is not None and not score > no_answer_threshold:
            answers.append(Answer("", score, 0, 0))
        else:
            first, last = (int(windows[best].offsets[token, side]) for side, token in enumerate(spans[best]))
            answers.append(Answer(context[first:last], score, first, last))
    return answers


def scores(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[Score]:
    """The exact match and the F1 of the answers, both in [0, 100], as in the official evaluation script of SQuAD.

    Args:
        references: the accepted answers to each question, empty for a question without an answer.
    """
    texts = [item.text for item in answers]
    return [exact_match(texts, references), token_f1(texts, references)]


def write_test(
    run: Path, model: Model, params: Params, tokenizer: Tokenizer, examples: Examples, answers: Sequence[Answer]
) -> None:
    """Write ``samples.jsonl`` of a run with the first 40 questions, and the attention maps of the first four questions.

    A map has the question and the beginning of its context, at most :data:`MAP_TOKENS` tokens, in the order in which
    the model reads them. A question that leaves no token for the context has no map. For families without attention,
    no map is written.

    Args:
        run: the directory of the run.
        examples: as for :func:`training_windows`; the model can read them (:func:`check_questions`).
        answers: the answer to each question.
    """
    rows = [
        {
            "source": example["question"], "reference": " | ".join(dict.fromkeys(example["answers"])),
            "output": item.text, "score": f"{item.score:.2f}", "context": example["context"],
        }
        for example, item in zip(examples[:40], answers[:40], strict=True)
    ]  # fmt: skip
    write_samples(run, rows)
    length = MAP_TOKENS if model.max_positions is None else min(MAP_TOKENS, model.max_positions)
    map_inputs: list[tuple[str, str, Encoding]] = []
    for example in examples[:4]:
        texts = example["question"], example["context"]
        with contextlib.suppress(ValueError):  # the question leaves no token for the context
            map_inputs.append((*texts, tokenizer.encode_windows(*texts, max_length=length, stride=0)[0]))
    questions, contexts, windows = zip(*map_inputs, strict=True) if map_inputs else ((), (), ())
    write_attention_maps(run, model, params, tokenizer, questions, pairs=contexts, encodings=windows)


def best_no_answer_threshold(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> float:
    """The ``no_answer_threshold`` that gives the largest F1.

    The candidates are the ``score`` of each answer, and a number below all scores. With this number, every question
    gets an answer. Use the questions of a validation set, not of the test set.

    Args:
        answers: the result of ``answer(..., no_answer_threshold=None)``.
        references: the accepted answers to each question, empty for a question without an answer.

    Raises:
        ValueError: there are no answers, or the numbers of answers and references differ.
    """
    answered_f1, unanswered_f1 = (
        np.array(
            [
                max(word_f1(text, accepted) for accepted in accepted_answers)
                for text, accepted_answers in predictions_and_answers(texts, references)
            ]
        )
        for texts in ([item.text for item in answers], [""] * len(answers))
    )
    scores = np.array([item.score for item in answers])
    order = np.argsort(scores, kind="stable")
    # totals[k] is the sum of F1 if the k questions with the lowest scores get no answer.
    totals = answered_f1.sum() + np.concatenate([[0.0], np.cumsum((unanswered_f1 - answered_f1)[order])])
    # A threshold cannot separate questions with equal scores.
    is_separable = np.concatenate([[True], scores[order][1:] > scores[order][:-1], [True]])
    num_unanswered = int(np.argmax(np.where(is_separable, totals, -np.inf)))
    return float(scores[order][num_unanswered - 1]) if num_unanswered else float(np.nextafter(scores.min(), -np.inf))


def _score(
    model: Model, params: Params, tokenizer: Tokenizer, windows: Sequence[Encoding], max_answer_tokens: int,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The best span of each window [W, 2], its logit [W], and the logit of "no answer" [W]."""
    spans = np.zeros((len(windows), 2), np.int32)
    span_logits, no_answer = np.zeros((2, len(windows)), np.float32)
    ids, types = [window.ids for window in windows], [window.token_types for window in windows]
    for batch in input_batches(model, ids, types, batch_size):
        chosen = [windows[number] for number in batch.numbers]
        in_context, _ = pad_rows(
            [(window.sequence_ids == 1).astype(np.int32) for window in chosen], batch.tokens.shape[1]
        )
        positions = np.array([_no_answer_position(tokenizer, window) for window in chosen], np.int32)
        *results, finite_B = _best_spans(
            model, params, batch.tokens, batch.segment_ids, in_context, positions, batch.inputs,
            max_answer_tokens=max_answer_tokens,
        )  # fmt: skip
        with rename_rows_in_errors("window", batch.numbers):
            check_finite(model, params, finite_B)
        for array, result in zip((spans, span_logits, no_answer), results, strict=True):
            array[batch.numbers] = np.asarray(result)
    return spans, span_logits, no_answer


@jax.jit(static_argnames=("model", "max_answer_tokens"))
def _best_spans(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    in_context_BT: jax.Array,
    no_answer_B: jax.Array,
    inputs: dict[str, jax.Array],
    *,
    max_answer_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The best span of each row [B, 2], its logit [B], the logit of "no answer" [B], and a flag [B] for finite logits.

    The flag is True if all logits of the row's tokens are finite. It ignores the logits of padding.

    Args:
        in_context_BT: 1 for tokens of the context, 0 for all others. A span begins and ends in the context.
        no_answer_B: the position of the classifier token (:func:`_no_answer_position`).
    """
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT, **inputs)
    logits_BT2 = model.logits(params, hidden_BTD).astype(jnp.float32)
    spans_B2, span_logits_B = span_qa.best_spans(logits_BT2, in_context_BT, max_length=max_answer_tokens)
    no_answer_B2 = jnp.take_along_axis(logits_BT2, no_answer_B[:, None, None], axis=1)[:, 0]
    finite_B = jnp.all(rows_finite(logits_BT2) | (segment_ids_BT <= 0), axis=1)
    return spans_B2, span_logits_B, no_answer_B2.sum(axis=1), finite_B


# -------------------------------------------------------------------------------------------------- windows


def _windows(
    model: Model, tokenizer: Tokenizer, question: str, context: str, max_length: int, stride: int, what: str
) -> list[Encoding]:
    """The windows of a question and its context (``encode_windows``).

    Args:
        what: the name of the question in messages.

    Raises:
        ValueError: as in ``encode_windows``, or an id is not in the vocabulary.
    """
    try:
        windows = tokenizer.encode_windows(question, context, max_length=max_length, stride=stride)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    for window in windows:
        check_tokens(window.ids, model.config.vocab_size, name=what)
    return windows


def _no_answer_position(tokenizer: Tokenizer, window: Encoding) -> int:
    """The position of the classifier token in a window, or 0 if the tokenizer has no classifier token."""
    cls = tokenizer.special_ids.cls
    return int(np.argmax((window.ids == cls) & (window.sequence_ids == SPECIAL_TOKEN)))


def _window_size(model: Model, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """``max_length`` and ``stride``, with defaults instead of None. Raises ``ValueError`` for invalid values."""
    limit = model.max_positions
    if max_length is None:
        max_length = MAX_LENGTH if limit is None else min(MAX_LENGTH, limit)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length} must be at most {limit}, the model's max_positions")
    check_min(1, max_length=max_length)
    stride = max_length // 3 if stride is None else stride
    if not 0 <= stride < max_length:
        raise ValueError(f"stride={stride} must be at least 0 and less than max_length={max_length}")
    return max_length, stride


def _check_model(model: Model) -> None:
    require_head(model, "span_qa", "it does not answer questions", "a model for question answering")

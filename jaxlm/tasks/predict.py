"""Predictions of a finished model for texts: labels of texts, labels of words, and likelihoods.

Texts are sorted by length, cut into batches and padded to a few bucket lengths, so that few shapes are compiled.
Shapes: N texts, B rows of a batch, T time, S source time, L labels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.encodings import SPECIAL, Encoding
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.batches import bucket_length, length_batches, pad_rows
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.finite import check_finite, named_rows, rows_finite
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.decoding.score import target_token_scores, token_scores
from jaxlm.decoding.text import check_vocabulary
from jaxlm.models import Model
from jaxlm.sharding import Sharding, active

BATCH_SIZE = 32


# --------------------------------------------------------------------------------------------- labels of texts


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """The label of each text.

    Attributes:
        probabilities: [N, L] float32.
        names: the name of each label, or None where the model does not know them.
    """

    probabilities: np.ndarray
    names: tuple[str, ...] | None = None

    @property
    def ids(self) -> np.ndarray:
        """Number of the most probable label of each text, [N]."""
        return np.argmax(self.probabilities, axis=1)

    @property
    def labels(self) -> list[str] | list[int]:
        """The most probable label of each text: its name, or its number where it has none."""
        ids = self.ids.tolist()
        return ids if self.names is None else [self.names[i] for i in ids]


def classify(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> Predictions:
    """The probabilities of the labels of each text, by any family with task "classification".

    Args:
        pairs: the second text of each pair, for models of pairs.
        batch_size: texts that are computed together.

    Raises:
        TypeError: ``texts`` or ``pairs`` is a single string.
        ValueError: a model with another head, or with a single output, which is a score and no label; a text that is
            empty or longer than the model's positions.
        NotFiniteError: logits are not finite; a ValueError that names the texts, and the parameters that are not
            finite.

    Example:
        >>> classify(model, params, tokenizer, ["a fine film", "what a bore"]).labels   # doctest: +SKIP
        ['positive', 'negative']
    """
    require_task(
        model, ("classification",), "it classifies nothing",
        "fine-tune it with load_pretrained(directory, task='classification'), or load a classifier",
    )  # fmt: skip
    if model.config.num_labels == 1:
        raise ValueError("the model has num_labels=1: its output is a score of a regression and not a label")
    encodings = _encode(model, tokenizer, texts, pairs)
    probabilities = np.zeros((len(encodings), model.config.num_labels), np.float32)
    for batch in _batches(model, encodings, batch_size):
        probabilities[batch.numbers] = _checked_probabilities(model, params, batch, pool=True)[:, 0]
    return Predictions(probabilities, model.labels)


# --------------------------------------------------------------------------------------------- labels of words


@dataclasses.dataclass(frozen=True)
class TokenLabel:
    """The label of a piece of text.

    Attributes:
        start, end: characters ``text[start:end]``.
        label: name of the label, or its number where the model does not know names.
        probability: of the label.
    """

    start: int
    end: int
    label: str | int
    probability: float


def tag(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    unit: Literal["word", "token"] = "word",
    batch_size: int = BATCH_SIZE,
) -> list[list[TokenLabel]]:
    """The labels of the words of each text, by any family with task "tagging".

    A word is a run of characters that are not white space. Its label is that of its first token (Devlin et al. 2019,
    section 5.3).

    Args:
        unit: "token" gives the label of every token instead: of every character, for a character tokenizer.
        batch_size: texts that are computed together.

    Raises:
        TypeError: ``texts`` is a single string.
        ValueError: a model with another head; a text that is empty or longer than the model's positions; an unknown
            unit.
        NotFiniteError: as :func:`classify`.
    """
    require_task(
        model, ("tagging",), "it labels no words",
        "fine-tune it with load_pretrained(directory, task='tagging'), or load a token classifier",
    )  # fmt: skip
    if unit not in ("word", "token"):
        raise ValueError(f"unit={unit!r} is unknown: choose from 'word', 'token'")
    encodings, names = _encode(model, tokenizer, texts, None), model.labels
    labels: list[list[TokenLabel]] = [[] for _ in encodings]
    for batch in _batches(model, encodings, batch_size):
        found = _checked_probabilities(model, params, batch, pool=False)
        for number, probabilities_TL in zip(batch.numbers, found, strict=True):
            encoding, text = encodings[number], texts[number]
            labels[number] = [
                _token_label(probabilities_TL[position], start, end, names)
                for position, start, end in _units(encoding, text, unit)
            ]
    return labels


def _units(encoding: Encoding, text: str, unit: str) -> Iterator[tuple[int, int, int]]:
    """Position of the first token of each word (or of each token), and the characters of the word."""
    real = np.flatnonzero(encoding.sequence != SPECIAL)
    starts, ends = encoding.offsets[real].T
    if unit == "token":
        yield from zip(real.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return
    for word in re.finditer(r"\S+", text):
        # The first token that has a character of the word: it may begin with the space before the word.
        first = np.flatnonzero((ends > word.start()) & (starts < word.end()))
        if first.size:
            yield int(real[first[0]]), word.start(), word.end()


def _token_label(probabilities_L: np.ndarray, start: int, end: int, names: tuple[str, ...] | None) -> TokenLabel:
    best = int(np.argmax(probabilities_L))
    return TokenLabel(start, end, best if names is None else names[best], float(probabilities_L[best]))


# ------------------------------------------------------------------------------------------------- likelihoods


@dataclasses.dataclass(frozen=True, eq=False)
class TextScores:
    """How probable each text is.

    Attributes:
        token_log_likelihoods: of each text, the log-likelihood of each predicted token in nats, float32.
        token_greedy: of each text, whether each predicted token is the most likely one, bool.
    """

    token_log_likelihoods: list[np.ndarray]
    token_greedy: list[np.ndarray]

    @property
    def log_likelihoods(self) -> np.ndarray:
        """Log-likelihood of each text in nats, [N] float64."""
        return np.array([scores.sum(dtype=np.float64) for scores in self.token_log_likelihoods], np.float64)

    @property
    def greedy(self) -> np.ndarray:
        """Whether all predicted tokens of each text are the most likely ones, so that greedy decoding gives it, [N]."""
        return np.array([bool(greedy.all()) for greedy in self.token_greedy], bool)

    @property
    def num_tokens(self) -> np.ndarray:
        """Number of predicted tokens of each text, [N]."""
        return np.array([scores.size for scores in self.token_log_likelihoods])

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of the predicted tokens of all texts."""
        return float(-self.log_likelihoods.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return math.exp(self.nats_per_token)


def score_texts(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> TextScores:
    """The log-likelihood of each text, or of each target given its source for an encoder-decoder.

    Texts of causal families are encoded without special tokens, and the first token is only a condition. Targets are
    encoded by ``tokenizer.encode_inputs``, and the end token is predicted, too.

    Args:
        sources: the source of each text, for an encoder-decoder.
        batch_size: texts that are computed together.

    Raises:
        TypeError: ``texts`` or ``sources`` is a single string.
        ValueError: a model with another head; sources missing, or given to a model that reads none; a text that is too
            short, or longer than the model's positions (:func:`jaxlm.decoding.perplexity` scores long texts).
        NotFiniteError: as :func:`classify`.
    """
    _require_scores(model)
    if not model.reads_source:
        if sources is not None:
            raise ValueError(f"{model.family} reads no source: leave sources out")
        return _score_causal(model, params, tokenizer, texts, batch_size)
    if sources is None or len(sources) != len(texts):
        got = "none" if sources is None else str(len(sources))
        raise ValueError(f"{model.family} scores targets given sources: {len(texts)} texts need as many, got {got}")
    return _score_targets(model, params, tokenizer, texts, sources, batch_size)


def _require_scores(model: Model) -> None:
    require_task(
        model, ("causal", "permutation", "seq2seq"), "it scores no text",
        "load a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)",
    )  # fmt: skip


def _score_causal(model: Model, params: Any, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> TextScores:
    _check_texts(texts)
    rows = [tokenizer.encode(text) for text in texts]
    for number, ids in enumerate(rows):
        if ids.size < 2:
            raise ValueError(
                f"text {number} is {texts[number]!r}, {ids.size} tokens: the first token is a condition, so at least 2 "
                "are needed"
            )
    return score_ids(model, params, [ids[:1] for ids in rows], [ids[1:] for ids in rows], batch_size=batch_size)


def _score_targets(
    model: Model, params: Any, tokenizer: Tokenizer, texts: Sequence[str], sources: Sequence[str], batch_size: int
) -> TextScores:
    _check_texts(texts)
    start_id, end_id = decoder_start_id(model, tokenizer), tokenizer.end_id
    encoded = _encode(model, tokenizer, sources, None)
    rows = []
    for number, encoding in enumerate(tokenizer.encode_inputs_batch(texts)):
        ids = encoding.ids
        if end_id is not None and (ids.size == 0 or ids[-1] != end_id):
            ids = np.append(ids, np.int32(end_id))
        if ids.size == 0:
            raise ValueError(f"text {number} is {texts[number]!r}, which has no tokens")
        rows.append(ids)
    return score_ids(
        model, params, [encoding.ids for encoding in encoded], rows, start_id=start_id, batch_size=batch_size
    )


def score_ids(
    model: Model,
    params: Any,
    contexts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    start_id: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> TextScores:
    """The scores of each continuation given its context, both as ids [tokens].

    A causal model reads the context and then the continuation; an encoder-decoder reads the context as its source. Only
    the tokens of the continuation are predicted.

    Args:
        start_id: the token that the decoder of an encoder-decoder reads first, see
            :func:`jaxlm.decoding.decoder_start_id`; needed for these, and only for these.
        batch_size: continuations that are computed together.

    Raises:
        ValueError: a model with another head; another number of contexts than of continuations; no ids, ids outside the
            vocabulary, or more than the model's positions.
        NotFiniteError: as :func:`classify`.
    """
    _require_scores(model)
    if len(contexts) != len(continuations):
        raise ValueError(f"each continuation needs a context: got {len(contexts)} for {len(continuations)}")
    if model.reads_source != (start_id is not None):
        needed = "needs a start_id: see decoder_start_id" if model.reads_source else "reads no source: leave it out"
        raise ValueError(f"start_id={start_id}, but {model.family} {needed}")
    limit = _max_positions(model)
    for number, (context, ids) in enumerate(zip(contexts, continuations, strict=True)):
        if context.size == 0 or ids.size == 0:
            raise ValueError(f"text {number} has {context.size} tokens of context and {ids.size} to score: give both")
        check_vocabulary(context, source_vocab_size(model), f"the context of text {number}")
        check_vocabulary(ids, model.config.vocab_size, f"text {number}")
        if start_id is not None:
            _check_length(context.size, limit, f"the context of text {number}")
            _check_length(ids.size, limit, f"text {number}")
        elif limit is not None and context.size + ids.size - 1 > limit:
            raise ValueError(
                f"text {number} has {context.size + ids.size} tokens, but max_positions={limit}: score it in windows, "
                "with jaxlm.decoding.perplexity"
            )
    pairs = list(zip(contexts, continuations, strict=True))
    log_probs, greedy = ([np.zeros(0)] * len(pairs) for _ in range(2))
    for numbers in length_batches([context.size + ids.size for context, ids in pairs], batch_size):
        batch = [pairs[number] for number in numbers]
        if start_id is None:
            length = 1 + bucket_length(max(context.size + ids.size for context, ids in batch) - 1, limit)
            tokens_BT, segment_ids_BT = pad_rows([np.concatenate(pair) for pair in batch], length)
            with named_rows("text", numbers):
                scores = token_scores(model, params, tokens_BT, segment_ids_BT)  # the last token is not read
        else:
            # One length for sources and targets: a bucket for each pair of lengths would be many shapes.
            length = bucket_length(max(max(context.size, ids.size) for context, ids in batch), limit)
            source_BS, source_segment_ids_BS = pad_rows([context for context, _ in batch], length)
            targets_BT, segment_ids_BT = pad_rows([ids for _, ids in batch], length)
            with named_rows("text", numbers):
                scores = target_token_scores(
                    model, params, source_BS, targets_BT, start_id=start_id, source_segment_ids=source_segment_ids_BS,
                    segment_ids=segment_ids_BT,
                )  # fmt: skip
        log_probs_BT, greedy_BT = np.asarray(scores.log_probs), np.asarray(scores.greedy)
        for row, number in enumerate(numbers):
            context, ids = pairs[number]
            first = 0 if start_id is not None else context.size - 1
            log_probs[number] = log_probs_BT[row, first : first + ids.size]
            greedy[number] = greedy_BT[row, first : first + ids.size]
    return TextScores(log_probs, greedy)


# -------------------------------------------------------------------------------------- inputs and batches of them


@dataclasses.dataclass(frozen=True, eq=False)
class _InputBatch:
    """Encoded texts of one batch: their numbers [B], arrays [B, T], and further inputs of ``apply``."""

    numbers: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    inputs: dict[str, np.ndarray]


def _encode(model: Model, tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
    """Encoded texts or pairs; raises ValueError for those that the model cannot read."""
    _check_texts(texts)
    encodings = tokenizer.encode_inputs_batch(texts, pairs)
    for number, encoding in enumerate(encodings):
        what = f"text {number}"
        if np.all(encoding.sequence == SPECIAL):
            raise ValueError(f"{what} is {texts[number]!r}, which has no tokens: pass at least one character")
        check_vocabulary(encoding.ids, source_vocab_size(model), what)
        _check_length(encoding.ids.size, _max_positions(model), what)
    return encodings


def _batches(model: Model, encodings: Sequence[Encoding], batch_size: int) -> Iterator[_InputBatch]:
    """Batches of few shapes, padded on the right."""
    num_types = getattr(model.config, "num_token_types", None)
    for numbers in length_batches([encoding.ids.size for encoding in encodings], batch_size):
        chosen = [encodings[number] for number in numbers]
        length = bucket_length(max(encoding.ids.size for encoding in chosen), _max_positions(model))
        tokens, segment_ids = pad_rows([encoding.ids for encoding in chosen], length)
        inputs = {}
        if model.reads_token_types:
            types, _ = pad_rows([encoding.token_types for encoding in chosen], length)
            if num_types is not None and types.max() >= num_types:
                raise ValueError(
                    f"the tokenizer gives token type {types.max()}, but {model.family} has num_token_types={num_types}"
                )
            inputs["token_types"] = types
        yield _InputBatch(numbers, tokens, segment_ids, inputs)


def _checked_probabilities(model: Model, params: Any, batch: _InputBatch, *, pool: bool) -> np.ndarray:
    """Probabilities of labels, [B, T, L] float32; with ``pool``, of whole rows, [B, 1, L].

    Raises:
        NotFiniteError: logits of a real token (or of a row) are not finite.
    """
    probabilities, finite_B = _label_probabilities(
        model, params, batch.tokens, batch.segment_ids, batch.inputs, pool=pool, sharding=active()
    )
    with named_rows("text", batch.numbers):
        check_finite(model, params, finite_B)
    return np.asarray(probabilities)


@functools.partial(jax.jit, static_argnames=("model", "pool", "sharding"))
def _label_probabilities(
    model: Model,
    params: Any,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    inputs: dict[str, jax.Array],
    *,
    pool: bool,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> tuple[jax.Array, jax.Array]:
    """Probabilities of labels, and whether the logits of each row are finite, bool [B]."""
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT, **inputs)
    if pool:
        hidden_BTD = model.summary(params, hidden_BTD, segment_ids=segment_ids_BT)
    logits_BTL = model.logits(params, hidden_BTD).astype(jnp.float32)
    finite_BT = rows_finite(logits_BTL)
    if not pool:
        finite_BT |= segment_ids_BT == 0
    return jax.nn.softmax(logits_BTL, axis=-1), jnp.all(finite_BT, axis=1)


def _max_positions(model: Model) -> int | None:
    return getattr(model.config, "max_positions", None)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"texts are a sequence of strings, got one string: pass [{texts!r}]")
    if not texts:
        raise ValueError("there are no texts: pass at least one")


def _check_length(size: int, limit: int | None, what: str) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{what} has {size} tokens, but max_positions={limit}: shorten it")

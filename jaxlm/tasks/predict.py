"""Predictions of a trained model for texts: labels of texts, labels of words, and log-likelihoods.

Texts are sorted by length, split into batches and padded to bucket lengths, so that XLA compiles only a few shapes.
Shapes: N texts, B batch rows, T time, S source time, L labels, D model width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_same_number, check_value
from jaxlm.data.encodings import SPECIAL_TOKEN, Encoding
from jaxlm.data.tokenizers import Tokenizer, check_strings
from jaxlm.data.tokens import check_tokens
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.batches import bucket_length, length_batches, pad_rows
from jaxlm.decoding.describe import require_next_token_head, require_task
from jaxlm.decoding.finite import check_finite, rename_rows_in_errors, rows_finite
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.decoding.score import TokenScores, perplexity_of, target_token_scores, token_scores
from jaxlm.models import Model
from jaxlm.spec import Params

BATCH_SIZE = 32
"""Default number of rows in a batch."""


# --------------------------------------------------------------------------------------------- labels of texts


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """The predicted labels of texts.

    Attributes:
        probabilities: [N, L] float32, the probability of each label. The probabilities of a text sum to 1. Exception:
            if the files of the model have ``problem_type="multi_label_classification"``, the labels are independent.
        names: the label names. None: the model has no label names.
    """

    probabilities: np.ndarray
    names: tuple[str, ...] | None = None

    @property
    def ids(self) -> np.ndarray:
        """The id of the most probable label of each text, int [N]."""
        return np.argmax(self.probabilities, axis=1)

    @property
    def labels(self) -> list[str] | list[int]:
        """The most probable label of each text: its name, or its id if the model has no label names."""
        ids = self.ids.tolist()
        return ids if self.names is None else [self.names[i] for i in ids]


def classify(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> Predictions:
    """The label probabilities of each text, for a model with task "classification".

    Args:
        pairs: for a task of text pairs, the second text of each pair.
        batch_size: number of texts in a batch.

    Raises:
        TypeError: ``texts`` or ``pairs`` is a single string, or has an element that is not a string.
        ValueError: The model is not a classifier. Its outputs are regression scores: its files have
            ``problem_type="regression"``, or it has a single output without
            ``problem_type="multi_label_classification"``. There are no texts, or the numbers of texts and pairs differ.
            A text (or both texts of a pair) has no tokens, not counting special tokens. A text or pair has more tokens
            than the model has positions, or ids or token types that the model does not have. ``batch_size`` is below 1.
        NotFiniteError: logits are not finite. The message names the texts, and the parameters that are not finite or
            another possible cause.

    Example:
        >>> classify(model, params, tokenizer, ["a fine film", "what a bore"]).labels   # doctest: +SKIP
        ['positive', 'negative']
    """
    require_classifier(model)
    encodings = _encode(model, tokenizer, texts, pairs)
    ids, types = [encoding.ids for encoding in encodings], [encoding.token_types for encoding in encodings]
    return Predictions(label_probabilities(model, params, ids, types, batch_size), model.labels)


# --------------------------------------------------------------------------------------------- labels of words


@dataclasses.dataclass(frozen=True)
class TokenLabel:
    """The label of a word or token.

    Attributes:
        start, end: character positions. The word or token is ``text[start:end]``.
        label: the name of the label, or its id if the model has no label names.
        probability: the probability of the label.
    """

    start: int
    end: int
    label: str | int
    probability: float


def label_words(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    unit: Literal["word", "token"] = "word",
    batch_size: int = BATCH_SIZE,
) -> list[list[TokenLabel]]:
    """The labels of the words of each text, for a model with task "token_classification".

    Words are separated by white space. The label of a word is the label of its first token (Devlin et al. 2019, section
    5.3). A word without tokens gets no label.

    Args:
        unit: "word": one label per word. "token": one label per token, for example per character with a character
            tokenizer. Special tokens get no label.
        batch_size: number of texts in a batch.

    Raises:
        TypeError: ``texts`` is a single string, or has an element that is not a string.
        ValueError: the model is not a token classifier, the unit is unknown, there are no texts, or a text is invalid
            as in :func:`classify`.
        NotFiniteError: as in :func:`classify`.
    """
    require_head(model, "token_classification", "it does not label words", "a token classifier")
    check_value(Literal["word", "token"], unit, "unit")
    encodings, names = _encode(model, tokenizer, texts, None), model.labels
    labels: list[list[TokenLabel]] = [[] for _ in encodings]
    ids, types = [encoding.ids for encoding in encodings], [encoding.token_types for encoding in encodings]
    for batch in input_batches(model, ids, types, batch_size):
        probabilities_BTL = _checked_probabilities(model, params, batch)
        for number, probabilities_TL in zip(batch.numbers, probabilities_BTL, strict=True):
            encoding, text = encodings[number], texts[number]
            for position, start, end in _units(encoding, text, unit):
                best = int(np.argmax(probabilities_TL[position]))
                name = best if names is None else names[best]
                labels[number].append(TokenLabel(start, end, name, float(probabilities_TL[position, best])))
    return labels


def _units(encoding: Encoding, text: str, unit: str) -> Iterator[tuple[int, int, int]]:
    """Yield (position of the first token, start, end) for each word ``text[start:end]`` that has a token.

    With unit "token", yield (position of the token, start, end) for each token that is not a special token.
    """
    text_positions = np.flatnonzero(encoding.sequence_ids != SPECIAL_TOKEN)
    starts, ends = encoding.offsets[text_positions].T
    if unit == "token":
        yield from zip(text_positions.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return
    for word in re.finditer(r"\S+", text):
        # The first token of a word can start at the space before the word, so test for overlap.
        overlapping = np.flatnonzero((ends > word.start()) & (starts < word.end()))
        if overlapping.size:
            yield int(text_positions[overlapping[0]]), word.start(), word.end()


# ------------------------------------------------------------------------------------------------- likelihoods


@dataclasses.dataclass(frozen=True, eq=False)
class TextScores:
    """The log-likelihoods of texts.

    Attributes:
        token_log_likelihoods: for each text, the log-likelihood of each predicted token in nats, float32 [tokens].
        token_greedy: for each text, whether each predicted token is the most probable token, bool [tokens].
    """

    token_log_likelihoods: list[np.ndarray]
    token_greedy: list[np.ndarray]

    @property
    def log_likelihoods(self) -> np.ndarray:
        """The log-likelihood of each text in nats, [N] float64."""
        return np.array([scores.sum(dtype=np.float64) for scores in self.token_log_likelihoods], np.float64)

    @property
    def greedy(self) -> np.ndarray:
        """Whether greedy decoding generates all predicted tokens of each text, bool [N]."""
        return np.array([bool(greedy.all()) for greedy in self.token_greedy], bool)

    @property
    def num_tokens(self) -> np.ndarray:
        """The number of predicted tokens of each text, [N]."""
        return np.array([scores.size for scores in self.token_log_likelihoods])

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-likelihood per predicted token over all texts, in nats."""
        return float(-self.log_likelihoods.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return perplexity_of(self.nats_per_token)


def score_texts(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> TextScores:
    """The log-likelihood of each text. An encoder-decoder scores each text as the target of a source.

    For an encoder-decoder, texts are encoded with ``tokenizer.encode_inputs``. If the tokenizer has an end token, each
    text ends with the end token, which is predicted too. For other families, texts are encoded without special tokens,
    and the first token is not predicted. If a text has more tokens than a model of these families has positions, use
    :func:`jaxlm.decoding.perplexity`.

    Args:
        sources: for an encoder-decoder, the source of each text.
        batch_size: number of texts in a batch.

    Raises:
        TypeError: ``texts`` or ``sources`` is a single string, or has an element that is not a string.
        ValueError: The model does not predict next tokens. There are no texts. ``batch_size`` is below 1. A text or
            source has an id outside the vocabulary, or more tokens than the model has positions. For an
            encoder-decoder: there is not one source for each text, a source has no tokens, a text has no tokens and the
            tokenizer has no end token, or there is no start token (:func:`jaxlm.decoding.decoder_start_id`). For other
            families: sources are given, or a text has fewer than 2 tokens.
        NotFiniteError: as in :func:`classify`.
    """
    require_next_token_head(model, "it does not score texts")
    check_texts(texts)
    if not model.reads_source:
        if sources is not None:
            raise ValueError(f"{model.family} reads no source: do not pass sources")
        rows = [tokenizer.encode(text) for text in texts]
        for number, ids in enumerate(rows):
            if ids.size < 2:
                raise ValueError(
                    f"text {number} is {texts[number]!r}, {ids.size} tokens: the first token is not predicted, so a "
                    "text needs at least 2 tokens"
                )
        return score_ids(model, params, [ids[:1] for ids in rows], [ids[1:] for ids in rows], batch_size=batch_size)
    if sources is not None:
        check_texts(sources, "source")
    if sources is None or len(sources) != len(texts):
        count = "none" if sources is None else str(len(sources))
        raise ValueError(f"{model.family} needs one source for each text: got {count} for {len(texts)} texts")
    start_id, end_id = decoder_start_id(model, tokenizer), tokenizer.end_id
    contexts = [encoding.ids for encoding in _encode(model, tokenizer, sources, None, "source")]
    rows = [encoding.ids for encoding in tokenizer.encode_inputs_batch(texts)]
    if end_id is not None:
        rows = [ids if ids[-1:].tolist() == [end_id] else np.append(ids, np.int32(end_id)) for ids in rows]
    return score_ids(model, params, contexts, rows, start_id=start_id, batch_size=batch_size)


def score_ids(
    model: Model,
    params: Params,
    contexts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    start_id: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> TextScores:
    """The log-likelihood of each continuation given its context. Both are arrays of ids [tokens].

    An encoder-decoder reads the context as its source and the continuation as its target. Other models read the context
    and then the continuation. Only the tokens of the continuation are predicted.

    Args:
        start_id: the first token that the decoder of an encoder-decoder reads (see
            :func:`jaxlm.decoding.decoder_start_id`). It is required for an encoder-decoder and invalid for other
            families.
        batch_size: number of continuations in a batch.

    Raises:
        ValueError: The model does not predict next tokens. There are no continuations, or the numbers of contexts and
            continuations differ. ``batch_size`` is below 1. ``start_id`` is missing for an encoder-decoder, or given
            for another family. A context or continuation is not a 1-D array of integers, or has no ids, an id outside
            the vocabulary, or more ids than the model has positions. A model that is not an encoder-decoder needs a
            position for each id of the context and of the continuation together, but not for the last id, because it
            does not read the last id.
        NotFiniteError: as in :func:`classify`.
    """
    require_next_token_head(model, "it does not score texts")
    check_same_number(continuation=continuations, context=contexts)
    if not len(continuations):
        raise ValueError("there are no continuations: pass at least one")
    if model.reads_source != (start_id is not None):
        problem = "needs a start_id: see decoder_start_id" if model.reads_source else "reads no source: pass None"
        raise ValueError(f"start_id={start_id}, but {model.family} {problem}")
    limit = model.max_positions
    for number, (context, ids) in enumerate(zip(contexts, continuations, strict=True)):
        check_tokens(context, source_vocab_size(model), name=f"the context of text {number}")
        check_tokens(ids, model.config.vocab_size, name=f"text {number}")
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
        with rename_rows_in_errors("text", numbers):
            scores = _score_batch(model, params, [pairs[number] for number in numbers], start_id)
        log_probs_BT, greedy_BT = np.asarray(scores.log_probs), np.asarray(scores.greedy)
        for row, number in enumerate(numbers):
            context, ids = pairs[number]
            first = 0 if start_id is not None else context.size - 1
            log_probs[number] = log_probs_BT[row, first : first + ids.size]
            greedy[number] = greedy_BT[row, first : first + ids.size]
    return TextScores(log_probs, greedy)


def _score_batch(
    model: Model, params: Params, pairs: Sequence[tuple[np.ndarray, np.ndarray]], start_id: int | None
) -> TokenScores:
    """The scores of a batch of pairs (context, continuation), with one row per pair.

    If ``start_id`` is None, the scores of ``context[1:]`` are before the scores of the continuation.
    """
    if start_id is None:
        rows = [np.concatenate(pair) for pair in pairs]
        # The model does not read the last token, so only the other tokens are padded to a bucket length.
        length = 1 + bucket_length(max(row.size for row in rows) - 1, model.max_positions)
        return token_scores(model, params, *pad_rows(rows, length))
    # Sources and targets have one padded length. With two lengths, XLA would compile each pair of bucket lengths.
    length = bucket_length(max(ids.size for pair in pairs for ids in pair), model.max_positions)
    source_BS, source_segment_ids_BS = pad_rows([context for context, _ in pairs], length)
    targets_BT, segment_ids_BT = pad_rows([continuation for _, continuation in pairs], length)
    return target_token_scores(
        model, params, source_BS, targets_BT, start_id=start_id, source_segment_ids=source_segment_ids_BS,
        segment_ids=segment_ids_BT,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ inputs and batches


@dataclasses.dataclass(frozen=True, eq=False)
class InputBatch:
    """The encoded texts of one batch.

    Attributes:
        numbers: [B], the index of the text of each row. The last batch may have its last text in several rows.
        tokens, segment_ids: [B, T] int32.
        inputs: further keyword arguments of ``apply``: empty, or ``token_types`` [B, T].
    """

    numbers: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    inputs: dict[str, np.ndarray]


def _encode(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, name: str = "text"
) -> list[Encoding]:
    """The encodings of texts or text pairs. Raises ``ValueError`` if the model cannot read an encoding.

    Args:
        name: the name of a text in messages.
    """
    check_texts(texts, name)
    encodings = tokenizer.encode_inputs_batch(texts, pairs)
    for number, encoding in enumerate(encodings):
        what = f"{name} {number}"
        if not encoding.has_text:
            raise ValueError(
                f"{what} is {texts[number]!r}, which has no tokens: pass a text that is not only white space"
            )
        check_encoding(model, encoding, what)
    return encodings


def check_encoding(model: Model, encoding: Encoding, what: str) -> None:
    """Raise ``ValueError`` if the model (for an encoder-decoder, its encoder) cannot read an encoding.

    Args:
        what: the name of the text in messages.
    """
    check_tokens(encoding.ids, source_vocab_size(model), name=what)
    _check_length(encoding.ids.size, model.max_positions, what)


def input_batches(
    model: Model, ids: Sequence[np.ndarray], token_types: Sequence[np.ndarray], batch_size: int
) -> Iterator[InputBatch]:
    """Yield batches of texts, padded on the right to bucket lengths.

    Args:
        ids: the token ids of each text, [T].
        token_types: the token types of each text, [T]. An empty sequence means that all token types are 0. This
            argument is ignored if the model does not read token types.

    Raises:
        ValueError: the model has no embedding for a token type, a text has more tokens than the model has positions,
            all texts of a batch have no tokens, or ``batch_size`` is below 1.
    """
    for numbers in length_batches([row.size for row in ids], batch_size):
        length = bucket_length(max(ids[number].size for number in numbers), model.max_positions)
        tokens, segment_ids = pad_rows([ids[number] for number in numbers], length)
        types = [token_types[number] for number in numbers] if token_types else []
        yield InputBatch(numbers, tokens, segment_ids, token_type_inputs(model, types, length))


def token_type_inputs(model: Model, token_types: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """``{"token_types": array}`` for ``apply``, with the token types padded to [B, ``length``].

    The result is empty if ``token_types`` is empty or the model does not read token types.

    Raises:
        ValueError: the model has no embedding for a token type.
    """
    if not (model.reads_token_types and token_types):
        return {}
    rows, _ = pad_rows(token_types, length)
    check_token_types(model, rows)
    return {"token_types": rows}


def check_token_types(model: Model, token_types: np.ndarray) -> None:
    """Raise ``ValueError`` if the model has no embedding for a token type."""
    num_types, largest = getattr(model.config, "num_token_types", None), token_types.max()
    if num_types is not None and largest >= num_types:
        raise ValueError(
            f"the tokenizer returns token type {largest}, but {model.family} has num_token_types={num_types}"
        )


def _labels_are_independent(model: Model) -> bool:
    """Whether the labels of a classifier are independent, so that each has the probability ``sigmoid(logit)``.

    False: the probabilities of all labels are the softmax of the logits.

    Raises:
        ValueError: the outputs of the model are regression scores.
    """
    problem = model.problem_type
    independent = problem == "multi_label_classification"
    if problem == "regression" or (model.config.num_labels == 1 and not independent):
        raise ValueError(
            f"the model has num_labels={model.config.num_labels} and problem_type={problem!r}: its outputs are "
            "regression scores, not labels: compute them with model.logits(params, model.pool(params, hidden))"
        )
    return independent


def require_classifier(model: Model) -> None:
    """Raise ``ValueError`` if the head of the model does not classify texts."""
    require_head(model, "classification", "it does not classify texts", "a classifier")


def require_head(model: Model, task: str, problem: str, kind: str) -> None:
    """Raise ``ValueError`` if the model does not have the head of ``task``.

    Args:
        problem: a clause about the missing ability, for the message.
        kind: the kind of model to load instead, with an article.
    """
    remedy = f"fine-tune it with load_pretrained(directory, task={task!r}), or load {kind}"
    require_task(model, (task,), problem, remedy)


def label_probabilities(
    model: Model,
    params: Params,
    ids: Sequence[np.ndarray],
    token_types: Sequence[np.ndarray],
    batch_size: int,
    *,
    what: str = "text",
) -> np.ndarray:
    """The label probabilities of each text, [N, L] float32, for a model with task "classification".

    Args:
        ids, token_types: as for :func:`input_batches`.
        what: the name of a text in messages.

    Raises:
        ValueError: the outputs of the model are regression scores, or as in :func:`input_batches`.
        NotFiniteError: the logits of a text are not finite.
    """
    independent = _labels_are_independent(model)
    probabilities = np.zeros((len(ids), model.config.num_labels), np.float32)
    for batch in input_batches(model, ids, token_types, batch_size):
        rows = _checked_probabilities(model, params, batch, independent=independent, what=what)
        probabilities[batch.numbers] = rows[:, 0]
    return probabilities


def _checked_probabilities(
    model: Model, params: Params, batch: InputBatch, *, independent: bool = False, what: str = "text"
) -> np.ndarray:
    """The label probabilities of each row, [B, 1, L] float32, or for a token classifier of each token, [B, T, L].

    Args:
        independent: True: the probability of each label is the sigmoid of its logit. False: the probabilities are the
            softmax of the logits.

    Raises:
        NotFiniteError: the logits of a row are not finite. For a token classifier, the logits of padding are ignored.
    """
    probabilities, finite_B = _label_probabilities(
        model, params, batch.tokens, batch.segment_ids, batch.inputs, independent=independent
    )
    with rename_rows_in_errors(what, batch.numbers):
        check_finite(model, params, finite_B)
    return np.asarray(probabilities)


@jax.jit(static_argnames=("model", "independent"))
def _label_probabilities(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    inputs: dict[str, jax.Array],
    *,
    independent: bool,
) -> tuple[jax.Array, jax.Array]:
    """The probabilities of :func:`_checked_probabilities`, and whether the logits of each row are finite, bool [B]."""
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT, **inputs)
    has_pooled_output = model.task == "classification"
    if has_pooled_output:
        hidden_BTD = model.pool(params, hidden_BTD, segment_ids=segment_ids_BT)
    logits_BTL = model.logits(params, hidden_BTD).astype(jnp.float32)
    finite_BT = rows_finite(logits_BTL)
    if not has_pooled_output:
        finite_BT |= segment_ids_BT <= 0
    probabilities_BTL = jax.nn.sigmoid(logits_BTL) if independent else jax.nn.softmax(logits_BTL, axis=-1)
    return probabilities_BTL, jnp.all(finite_BT, axis=1)


def check_texts(texts: Sequence[str], name: str = "text") -> None:
    """Check that ``texts`` is a sequence of at least one string.

    Args:
        name: the name of a text in messages.

    Raises:
        TypeError: ``texts`` is a single string, or an element is not a string.
        ValueError: there are no texts.
    """
    check_strings(f"{name}s", texts)
    if not len(texts):
        raise ValueError(f"there are no {name}s: pass at least one {name}")


def _check_length(size: int, limit: int | None, what: str) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{what} has {size} tokens, but max_positions={limit}: shorten it")

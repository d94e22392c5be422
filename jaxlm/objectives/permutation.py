"""Permutation language modeling (Yang et al. 2019): some tokens of a row are predicted in a random order.

    row        [text | A <sep> B <sep> <cls>], token types 0 | 0 0 1 1 2
    targets    spans of 1 to 5 tokens in each of the two parts, by default one token in six, never <sep> or <cls>
    order      the rank of a token in the random order of its part. Context tokens are all tokens that are not in a
               span, except <sep> and <cls>. They have the lowest order of their part.

A row has two parts. The first part has ``reuse_length`` tokens of a text. The second part has two texts A and B with
special tokens. A continues the first part, and B continues A. If the batch has other rows of the same direction
(``right_to_left``), B is with probability 0.5 a text from one of these rows instead.

The code follows ``data_utils.py`` of Yang et al., because the paper gives few details. A token attends to tokens of the
same or a lower order, and is predicted from tokens of a lower order. Every token of the second part has a higher order
than all tokens of the first part. So the first part does not depend on the second part, and the model can store the
first part in its memory. The next window of a text begins ``reuse_length`` tokens later, so its first part continues
the first part in the memory. If B does not continue A, the authors take B from anywhere in the text; this module takes
B from another row of the batch. All functions except ``loss`` run on the host. They draw random numbers only from the
argument ``rng``.

Shapes: B batch, N tokens of a window, T tokens of a row (N + 3) or of a part of a row.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxlm.config import check_int32, check_min
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.spec import require_arrays

loss = token_loss

CLS_ID, SEP_ID = 3, 4
"""Ids of special tokens in the published vocabulary."""
FIRST_TYPE, SECOND_TYPE, CLS_TYPE = 0, 1, 2
"""Token types: of the first part of a row and of ``A <sep>``, of ``B <sep>``, and of ``<cls>``."""
CONTEXT_ORDER = -1
"""The order of context tokens in the first part. All tokens of a part attend to its context tokens. In the second part,
``reuse_length + 1`` is added to all orders."""


@dataclasses.dataclass(frozen=True)
class PermutationConfig:
    """The settings of :func:`batch`. The defaults are those of the published model."""

    reuse_length: int = 256
    """Number of tokens in the first part of a row."""
    permutation_length: int = 256
    """Number of tokens that are permuted together. It must divide the lengths of both parts."""
    num_predict: int = 85
    """Number of targets per row. Each part has half of them; if the number is odd, the first part has one more. A
    ``<sep>`` or ``<cls>`` in a span is not predicted. For each of them, the row has a target of weight 0 instead."""
    alpha: int = 6
    """A span of n tokens has a context of at least ``n * alpha // beta`` other tokens (fewer at the end of a part). If
    the spans together have fewer tokens than the part has targets, single tokens at random positions are added."""
    beta: int = 1
    """See ``alpha``."""
    max_span_length: int = 5
    """Maximum number of tokens in a predicted span."""
    cls_id: int = CLS_ID
    """The id of ``<cls>``."""
    sep_id: int = SEP_ID
    """The id of ``<sep>``."""

    def __post_init__(self) -> None:
        for name in ("reuse_length", "permutation_length", "num_predict", "alpha", "beta", "max_span_length"):
            check_min(1, **{name: getattr(self, name)})

    def check_window(self, length: int) -> None:
        """Raise ``ValueError`` if a window of ``length`` tokens cannot be split into two parts.

        The second part must have at least 5 tokens, and ``permutation_length`` must divide the lengths of both parts.
        """
        first, second = self.reuse_length, length + 3 - self.reuse_length
        if second < 5:
            raise ValueError(
                f"a window of {length} tokens is too short for the texts A and B after reuse_length="
                f"{self.reuse_length}: use at least {self.reuse_length + 2} tokens"
            )
        if first % self.permutation_length or second % self.permutation_length:
            raise ValueError(
                f"permutation_length={self.permutation_length} must divide the lengths of both parts, {first} and "
                f"{second}"
            )


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    config: PermutationConfig = PermutationConfig(),
    *,
    word_starts: np.ndarray | None = None,
    sentences: np.ndarray | None = None,
    right_to_left: np.ndarray | None = None,
    reset: np.ndarray | None = None,
) -> Batch:
    """A batch of rows [B, N + 3] from windows [B, N] of texts.

    Each row has ``num_predict`` targets. Some of them may have weight 0 (:class:`PermutationConfig`).

    Args:
        rng: random generator. The rows draw from it one after the other.
        word_starts: [B, N] bool, True for the first token of each word in reading order. In a reversed row, this token
            is in the last column of the word. Predicted spans begin at these tokens. None: spans begin at any token.
        sentences: [B, N] integers that change at the start of each sentence. A ends where a sentence ends. If no
            sentence ends between the first part and the last token of the window, or if ``sentences`` is None, A ends
            at a random position.
        right_to_left: [B] bool, True for rows with reversed tokens. Reverse a text before you split it into windows,
            because windows that are reversed one by one do not continue each other. None: no row is reversed.
        reset: as in ``Batch``.

    Raises:
        ValueError: the windows are not integers in the range of int32; the shapes do not match;
            :meth:`PermutationConfig.check_window` rejects N; a part has fewer tokens than targets; or
            ``beta`` is not in [1, ``alpha``].
        TypeError: an argument is not an array.
    """
    _check_arrays(tokens, word_starts, sentences, right_to_left)
    require_arrays(reset=reset)
    B, N = tokens.shape
    config.check_window(N)
    reuse_length, num_predict, sep_id, cls_id = config.reuse_length, config.num_predict, config.sep_id, config.cls_id
    starts = np.ones((B, N), bool) if word_starts is None else word_starts
    is_reversed = np.zeros(B, bool) if right_to_left is None else right_to_left
    rows: list[tuple[np.ndarray, ...]] = []
    for row in range(B):
        other_rows = np.flatnonzero((is_reversed == is_reversed[row]) & (np.arange(B) != row))
        a, b = _choose_texts(N, row, reuse_length, other_rows, None if sentences is None else sentences[row], rng)
        text, types = join_texts(tokens[a], tokens[b], cls_id=cls_id, sep_id=sep_id)
        text = np.concatenate([tokens[row, :reuse_length], text])
        types = np.concatenate([np.full(reuse_length, FIRST_TYPE, np.int32), types])
        row_word_starts = np.concatenate([starts[row, :reuse_length], starts[a], [True], starts[b], [True, True]])
        is_special = (text == sep_id) | (text == cls_id)
        parts = (
            (slice(0, reuse_length), num_predict - num_predict // 2),
            (slice(reuse_length, N + 3), num_predict // 2),
        )
        direction = -1 if is_reversed[row] else 1
        predicted, order = _predicted_and_order(row_word_starts, is_special, parts, direction, config, rng)

        positions, weights = np.zeros(num_predict, np.int32), np.zeros(num_predict, np.float32)
        predicted_positions = np.flatnonzero(predicted)
        positions[: len(predicted_positions)], weights[: len(predicted_positions)] = predicted_positions, 1.0
        rows.append((text, types, order, positions, text[positions], weights))
    text, types, order, positions, target_ids, weights = (np.stack(column) for column in zip(*rows, strict=True))
    inputs = {"token_types": types, "order": order, "targets": positions}
    if right_to_left is not None:
        inputs["right_to_left"] = right_to_left
    return Batch(text, target_ids, weights, inputs=inputs, reset=reset)


def _check_arrays(
    tokens: np.ndarray, word_starts: np.ndarray | None, sentences: np.ndarray | None, right_to_left: np.ndarray | None
) -> None:
    require_arrays(tokens=tokens, word_starts=word_starts, sentences=sentences, right_to_left=right_to_left)
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"windows must be [batch, time] with at least one row, got {list(tokens.shape)}")
    check_int32(tokens, "the array of windows")
    B, N = tokens.shape
    for name, x, shape in (
        ("word_starts", word_starts, (B, N)), ("sentences", sentences, (B, N)), ("right_to_left", right_to_left, (B,)),
    ):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {list(x.shape)} must be {list(shape)} for windows {list(tokens.shape)}")


def _choose_texts(
    N: int, row: int, start: int, other_rows: np.ndarray, sentences: np.ndarray | None, rng: np.random.Generator
) -> tuple[tuple[int, slice], tuple[int, slice]]:
    """The locations of A and B: for each text, the index of its row and its slice of this row.

    A begins at ``start`` and ends at the end of a sentence, or at a random position if no sentence ends after
    ``start``. B is the text after A. But if ``other_rows`` has rows, B is with probability 0.5 a text from one of these
    rows. This text has the length of the text after A.
    """
    boundaries = np.arange(start + 1, N)
    if sentences is not None and np.any(sentences[start + 1 :] != sentences[start:-1]):
        boundaries = boundaries[sentences[start + 1 :] != sentences[start:-1]]
    middle = int(rng.choice(boundaries))
    a, b = (row, slice(start, middle)), (row, slice(middle, N))
    if len(other_rows) and rng.random() < 0.5:
        begin = int(rng.integers(middle + 1))
        b = (int(rng.choice(other_rows)), slice(begin, begin + N - middle))
    return a, b


def _predicted_and_order(
    word_starts: np.ndarray,
    is_special: np.ndarray,
    parts: tuple[tuple[slice, int], ...],
    direction: int,
    config: PermutationConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The mask of predicted tokens of a row, [T] bool, and the order (rank) of each token, [T] int32.

    Args:
        parts: the slice of each part and the number of its targets.
        direction: -1 for a reversed row, otherwise 1. Spans are drawn in reading order, also in a reversed row.
    """
    predicted, order = np.zeros(is_special.shape, bool), np.zeros(is_special.shape, np.int32)
    offset = 0
    for part, num_targets in parts:
        in_span = span_mask(
            word_starts[part][::direction], num_targets, rng,
            alpha=config.alpha, beta=config.beta, max_span_length=config.max_span_length,
        )[::direction]  # fmt: skip
        order[part] = offset + order_of_part(in_span | is_special[part], config.permutation_length, rng)
        predicted[part] = in_span & ~is_special[part]
        # Context tokens of the next part have the order offset - 1. The + 1 makes this order higher than all orders of
        # this part.
        offset += part.stop - part.start + 1
    return predicted, order


def span_mask(
    word_starts: np.ndarray,
    num_targets: int,
    rng: np.random.Generator,
    *,
    alpha: int = 6,
    beta: int = 1,
    max_span_length: int = 5,
) -> np.ndarray:
    """A mask of exactly ``num_targets`` tokens, [T] bool.

    The mask has spans of n tokens, each in a context of at least ``n * alpha // beta`` other tokens (fewer at the end).
    n is drawn from 1 to ``max_span_length`` with probability proportional to 1 / n, and is reduced if fewer than n
    targets are missing. A span begins at the start of a word. As in the code of Yang et al., n counts tokens instead of
    words. After the last span, single tokens at random positions are added until the mask has ``num_targets`` tokens.

    Args:
        word_starts: [T] bool, True for tokens at which a span may begin.

    Raises:
        ValueError: ``num_targets`` is above T, or ``beta`` is not in [1, ``alpha``].
    """
    T = len(word_starts)
    if num_targets > T:
        raise ValueError(f"num_predict needs {num_targets} targets in a part of {T} tokens: lower num_predict")
    if not 1 <= beta <= alpha:
        raise ValueError(f"beta={beta} must be between 1 and alpha={alpha}")
    mask = np.zeros(T, bool)
    sizes = np.arange(1, max_span_length + 1)
    probabilities = (1.0 / sizes) / np.sum(1.0 / sizes)
    position, missing = 0, num_targets
    while position < T and missing > 0:
        size = min(int(rng.choice(sizes, p=probabilities)), missing)
        context_size = size * alpha // beta
        left_context = int(rng.integers(context_size))
        next_starts = np.flatnonzero(word_starts[position + left_context :])
        if len(next_starts) == 0:
            break
        begin = position + left_context + int(next_starts[0])
        end = begin + size
        if end >= T:
            break
        mask[begin:end] = True
        missing -= size
        position = end + context_size - left_context
    while missing > 0:
        index = int(rng.integers(T))
        missing -= not mask[index]
        mask[index] = True
    return mask


def order_of_part(has_rank: np.ndarray, block_length: int, rng: np.random.Generator) -> np.ndarray:
    """The order (rank) of each token of a part, [T] int32; ``CONTEXT_ORDER`` for tokens that are False in ``has_rank``.

    Each block of ``block_length`` consecutive tokens is permuted. All blocks have the same permutation.
    """
    index = np.arange(len(has_rank), dtype=np.int32).reshape(-1, block_length)[:, rng.permutation(block_length)]
    return np.where(has_rank, index.ravel(), CONTEXT_ORDER).astype(np.int32)


def join_texts(
    first: np.ndarray, second: np.ndarray | None = None, *, cls_id: int = CLS_ID, sep_id: int = SEP_ID
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens ``A <sep> B <sep> <cls>`` (without ``second``: ``A <sep> <cls>``) and their token types, both int32.

    The second part of a row and the inputs of the fine-tuning tasks of Yang et al. have this form.

    Example:
        >>> tokens, types = join_texts(np.array([20, 21]), np.array([30]))
        >>> tokens.tolist(), types.tolist()
        ([20, 21, 4, 30, 4, 3], [0, 0, 0, 1, 1, 2])
    """
    texts = [text for text in (first, second) if text is not None]
    tokens = [np.append(text, sep_id) for text in texts]
    types = [np.full(len(text) + 1, kind) for text, kind in zip(texts, (FIRST_TYPE, SECOND_TYPE), strict=False)]
    return np.concatenate([*tokens, [cls_id]]).astype(np.int32), np.concatenate([*types, [CLS_TYPE]]).astype(np.int32)

"""Permutation language modelling (Yang et al. 2019): tokens at some places, predicted in a random order.

    row        [a stretch of the stream | A <sep> B <sep> <cls>], token types 0 | 0 0 1 1 2
    predicted  spans of 1 to 5 tokens in each of the two parts, about one token in six; separators never
    order      -1 for what is not predicted, so that all see it; else a place in a random permutation

Follows the authors' ``data_utils.py``, which the paper only sketches. A token sees orders up to its own and is
predicted from lower ones; the second part comes after all of the first, so that the first can go into the memory as it
is: the next window of a stream begins ``reuse_length`` tokens later. The authors draw a random B from anywhere in the
stream; here it comes from another row of the batch. All of this runs on the host, and depends on the tokens and the
random generator alone. Shapes: B batch, N tokens of a window, T tokens of a row or a part of one.
"""

from __future__ import annotations

import numpy as np

from jaxlm.objectives.batch import Batch, token_loss

loss = token_loss

PAD_ID, CLS_ID, SEP_ID = 5, 3, 4
"""Special tokens of the published vocabulary."""
FIRST, SECOND, CLS, PAD = 0, 1, 2, 4
"""Token types: a sentence with the separator after it, the other one, ``<cls>``, padding."""
UNORDERED = -1
"""The order of what everything sees."""


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    word_starts: np.ndarray | None = None,
    sentences: np.ndarray | None = None,
    right_to_left: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    reuse_length: int = 256,
    permutation_length: int = 256,
    num_predict: int = 85,
    alpha: int = 6,
    beta: int = 1,
    longest_span: int = 5,
    cls_id: int = CLS_ID,
    sep_id: int = SEP_ID,
) -> Batch:
    """Windows [B, N] of a text as rows [B, N + 3] of which ``num_predict`` tokens are predicted.

    Args:
        rng: drawn from row by row.
        word_starts: [B, N] bool, tokens that begin a word: predicted spans begin at one. Default: every token.
        sentences: [B, N] integers that change where a sentence begins: A ends there. Default: A ends anywhere.
        right_to_left: [B] bool, rows whose tokens are reversed, as from :func:`both_directions`.
        reset: of ``Batch``.
        reuse_length: tokens of the first part.
        permutation_length: tokens that are permuted among themselves; must divide both parts.
        num_predict: predicted tokens of a row, half of them in each part. Where a span covers a separator there are
            fewer, and a place of weight 0 fills up.
        alpha, beta: ``beta`` of every ``alpha`` tokens are predicted, until there are enough.
        longest_span: tokens of the longest predicted span.

    Raises:
        ValueError: shapes that do not agree, parts that are too short, or not a multiple of ``permutation_length``.
    """
    if tokens.ndim != 2:
        raise ValueError(f"windows must be [batch, time], got {list(tokens.shape)}")
    B, N = tokens.shape
    for name, x, shape in (
        ("word_starts", word_starts, (B, N)), ("sentences", sentences, (B, N)), ("right_to_left", right_to_left, (B,)),
    ):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {list(x.shape)} must be {list(shape)} for windows {list(tokens.shape)}")
    parts = (reuse_length, N + 3 - reuse_length)
    if min(parts) < 1 or parts[1] < 5:
        raise ValueError(f"a window of {N} tokens leaves no two sentences after reuse_length={reuse_length}")
    if any(part % permutation_length for part in parts):
        raise ValueError(
            f"permutation_length={permutation_length} must divide both parts of a row, {parts[0]} and {parts[1]} tokens"
        )
    goals = (num_predict - num_predict // 2, num_predict // 2)
    starts = np.ones((B, N), bool) if word_starts is None else word_starts
    flipped = np.zeros(B, bool) if right_to_left is None else right_to_left
    rows: list[tuple[np.ndarray, ...]] = []
    for row in range(B):
        others = np.flatnonzero((flipped == flipped[row]) & (np.arange(B) != row))
        a, b = _sentences(N, row, reuse_length, others, None if sentences is None else sentences[row], rng)
        text, types = pair(tokens[a], tokens[b], cls_id=cls_id, sep_id=sep_id)
        text = np.concatenate([tokens[row, :reuse_length], text])
        types = np.concatenate([np.full(reuse_length, FIRST, np.int32), types])
        begins = np.concatenate([starts[row, :reuse_length], starts[a], [True], starts[b], [True, True]])
        functional = (text == sep_id) | (text == cls_id)

        predicted, order, offset = np.zeros(N + 3, bool), np.zeros(N + 3, np.int32), 0
        for part, goal in zip((slice(0, reuse_length), slice(reuse_length, N + 3)), goals, strict=True):
            direction = -1 if flipped[row] else 1
            mask = span_mask(begins[part][::direction], goal, rng, alpha=alpha, beta=beta, longest=longest_span)
            mask = mask[::direction]
            order[part] = offset + local_order(mask | functional[part], permutation_length, rng)
            predicted[part] = mask & ~functional[part]
            offset += part.stop - part.start + 1  # also what is not predicted comes after all of the part before
        targets, weights = np.zeros(num_predict, np.int32), np.zeros(num_predict, np.float32)
        places = np.flatnonzero(predicted)
        targets[: len(places)], weights[: len(places)] = places, 1.0
        rows.append((text, types, order, targets, text[targets], weights))
    text, types, order, targets, answers, weights = (np.stack(column) for column in zip(*rows, strict=True))
    inputs = {"token_types": types, "order": order, "targets": targets}
    if right_to_left is not None:
        inputs["right_to_left"] = right_to_left
    return Batch(text, answers, weights, inputs=inputs, reset=reset)


def both_directions(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row of a text [B, N] and then each reversed: [2 B, N], and which rows are reversed, [2 B] bool.

    Give it whole streams when a memory is carried from window to window: a reversed row goes through its text from the
    end.
    """
    return np.concatenate([tokens, tokens[:, ::-1]]), np.repeat([False, True], len(tokens))


def pair(
    first: np.ndarray, second: np.ndarray | None = None, *, cls_id: int = CLS_ID, sep_id: int = SEP_ID
) -> tuple[np.ndarray, np.ndarray]:
    """``A <sep> B <sep> <cls>`` (or ``A <sep> <cls>``) and its token types: the layout of all of XLNet's tasks.

    Example:
        >>> tokens, types = pair(np.array([20, 21]), np.array([30]))
        >>> tokens.tolist(), types.tolist()
        ([20, 21, 4, 30, 4, 3], [0, 0, 0, 1, 1, 2])
    """
    texts = [text for text in (first, second) if text is not None]
    tokens = [np.append(text, sep_id) for text in texts]
    types = [np.full(len(text) + 1, kind) for text, kind in zip(texts, (FIRST, SECOND), strict=False)]
    return np.concatenate([*tokens, [cls_id]]).astype(np.int32), np.concatenate([*types, [CLS]]).astype(np.int32)


def pad_left(
    tokens: np.ndarray, token_types: np.ndarray, length: int, *, pad_id: int = PAD_ID
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row of ``length`` that ends with the tokens: tokens, token types and segment ids, [length] each.

    Raises:
        ValueError: more tokens than that.
    """
    pads = length - len(tokens)
    if pads < 0:
        raise ValueError(f"{len(tokens)} tokens do not fit a row of {length}: shorten the text")
    columns = ((tokens, pad_id), (token_types, PAD), (np.ones_like(token_types), 0))
    padded = [np.pad(column, (pads, 0), constant_values=value) for column, value in columns]
    return padded[0], padded[1], padded[2]


def _sentences(
    N: int, row: int, start: int, others: np.ndarray, sentences: np.ndarray | None, rng: np.random.Generator
) -> tuple[tuple[int, slice], tuple[int, slice]]:
    """Where A and B are: A begins at ``start``; B is what follows, or half of the time from one of the other rows."""
    borders = np.arange(start + 1, N)
    if sentences is not None and np.any(sentences[start + 1 :] != sentences[start:-1]):
        borders = borders[sentences[start + 1 :] != sentences[start:-1]]
    middle = int(rng.choice(borders))
    a, b = (row, slice(start, middle)), (row, slice(middle, N))
    if len(others) and rng.random() < 0.5:
        begin = int(rng.integers(middle + 1))
        b = (int(rng.choice(others)), slice(begin, begin + N - middle))
    return a, b


def span_mask(
    word_starts: np.ndarray, goal: int, rng: np.random.Generator, *, alpha: int = 6, beta: int = 1, longest: int = 5
) -> np.ndarray:
    """Exactly ``goal`` of the tokens, [T] bool: spans of n tokens, each somewhere in ``n * alpha / beta`` of its own.

    A span has n of 1 to ``longest`` tokens with probability proportional to 1 / n and begins at the start of a word. As
    in the authors' code, n counts tokens and not words; single tokens anywhere make up what is missing at the end.

    Raises:
        ValueError: more than there are, or ``alpha`` below ``beta``.
    """
    T = len(word_starts)
    if goal > T:
        raise ValueError(f"num_predict asks for {goal} of the {T} tokens of a part: lower it")
    if not 1 <= beta <= alpha:
        raise ValueError(f"beta={beta} of every alpha={alpha} tokens must be between 1 and all of them")
    mask = np.zeros(T, bool)
    sizes = np.arange(1, longest + 1)
    chances = (1.0 / sizes) / np.sum(1.0 / sizes)
    at, missing = 0, goal
    while at < T and missing > 0:
        size = min(int(rng.choice(sizes, p=chances)), missing)
        room = size * alpha // beta
        before = int(rng.integers(room))
        begins = np.flatnonzero(word_starts[at + before :])
        if len(begins) == 0:
            break
        begin = at + before + int(begins[0])
        end = begin + size
        if end >= T:
            break
        mask[begin:end] = True
        missing -= size
        at = end + room - before
    while missing > 0:
        place = int(rng.integers(T))
        missing -= not mask[place]
        mask[place] = True
    return mask


def local_order(ordered: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """The factorization order, [T] int32: -1 where not ``ordered``, else its place in a permutation of each ``length``
    tokens (the same permutation in every stretch)."""
    index = np.arange(len(ordered), dtype=np.int32).reshape(-1, length)[:, rng.permutation(length)]
    return np.where(ordered, index.ravel(), UNORDERED).astype(np.int32)

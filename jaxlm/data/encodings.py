"""Encodings of texts and pairs of texts, and functions that truncate them or split them into windows.

A tokenizer makes the full encoding. :func:`truncate` and :func:`split_windows` select tokens from it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

SPECIAL_TOKEN = -1
"""The entry of :attr:`Encoding.sequence_ids` for a special token of the template."""


class Encoding(NamedTuple):
    """The tokens of a text or a pair of texts, with the special tokens of the tokenizer's template.

    The template of a tokenizer is the rule that adds special tokens, such as ``[CLS] text [SEP]`` for BERT.

    Attributes:
        ids: int32 [T].
        token_types: int32 [T], the token types of the template; for BERT, 0 in the first text and 1 in the second.
            Without a template, they equal ``sequence_ids``.
        offsets: int32 [T, 2]. Token ``t`` covers the characters ``offsets[t, 0]`` to ``offsets[t, 1]`` (exclusive) of
            its text. The offsets of special tokens of the template are (0, 0).
        sequence_ids: int32 [T], the number of the text of each token: 0 for the first text, 1 for the second, -1 for a
            special token of the template.
    """

    ids: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray
    sequence_ids: np.ndarray

    @property
    def has_text(self) -> bool:
        """Whether there is a token of a text. False: there are no tokens, or only special tokens of the template."""
        return bool(np.any(self.sequence_ids != SPECIAL_TOKEN))


def concatenate_texts(parts: list[tuple[np.ndarray, np.ndarray]]) -> Encoding:
    """The encoding of concatenated texts, without special tokens.

    Args:
        parts: the ids [tokens] and the offsets [tokens, 2] of each text.
    """
    numbers = [np.full(len(ids), number, np.int32) for number, (ids, _) in enumerate(parts)]
    sequence_ids = np.concatenate(numbers)
    return Encoding(
        ids=np.concatenate([ids for ids, _ in parts]).astype(np.int32),
        token_types=sequence_ids,
        offsets=np.concatenate([offsets.reshape(-1, 2) for _, offsets in parts]).astype(np.int32),
        sequence_ids=sequence_ids.copy(),
    )


def truncate(encoding: Encoding, max_length: int, side: Literal["right", "left"] = "right") -> Encoding:
    """The encoding, truncated to at most ``max_length`` tokens.

    Tokens are removed from the longer text until both texts have equal length, and then from both. Special tokens are
    never removed.

    Args:
        side: "right": tokens are removed from the end of a text. "left": from its start.

    Raises:
        ValueError: ``max_length`` is too small for the special tokens and one token of each text.
    """
    if len(encoding.ids) <= max_length:
        return encoding
    first, second = (int(np.sum(encoding.sequence_ids == number)) for number in (0, 1))
    budget = max_length - (len(encoding.ids) - first - second)
    if budget < (first > 0) + (second > 0):
        raise ValueError(
            f"max_length={max_length} is too short: {max_length - budget} special tokens leave room for "
            f"{max(budget, 0)} tokens of {'two texts' if first and second else 'the text'}"
        )
    shorter = min(first, second, budget // 2)
    lengths = (shorter, budget - shorter) if first <= second else (budget - shorter, shorter)
    starts = (0, 0) if side == "right" else (first - lengths[0], second - lengths[1])
    return _select_tokens(encoding, {number: (starts[number], starts[number] + lengths[number]) for number in (0, 1)})


def split_windows(encoding: Encoding, max_length: int, stride: int) -> list[Encoding]:
    """Encodings of at most ``max_length`` tokens, each with the whole first text and a window of the second text.

    Each encoding also has all special tokens. Two consecutive windows share ``stride`` tokens of the second text. The
    last window ends at the end of the second text. If the encoding has at most ``max_length`` tokens, it is the only
    result.

    Raises:
        ValueError: ``stride`` is negative; or the encoding has more than ``max_length`` tokens, and ``max_length``
            leaves at most ``stride`` tokens for the second text.
    """
    if stride < 0:
        raise ValueError(f"stride={stride} must be at least 0: it is the number of tokens that two windows share")
    context_length = int(np.sum(encoding.sequence_ids == 1))
    budget = max_length - (len(encoding.ids) - context_length)
    if len(encoding.ids) <= max_length:
        return [encoding]
    if budget <= stride:
        raise ValueError(
            f"max_length={max_length} leaves {max(budget, 0)} tokens for the context beside "
            f"{len(encoding.ids) - context_length} tokens of the question and special tokens, but it must leave more "
            f"than stride={stride}: use a larger max_length, a smaller stride or a shorter question"
        )
    question_length = int(np.sum(encoding.sequence_ids == 0))
    return [
        _select_tokens(encoding, {0: (0, question_length), 1: (start, min(start + budget, context_length))})
        for start in range(0, context_length - stride, budget - stride)
    ]


def swap_sequence_ids(encoding: Encoding) -> Encoding:
    """The encoding with the numbers 0 and 1 of the two texts exchanged in ``sequence_ids``."""
    sequence_ids = np.where(encoding.sequence_ids == SPECIAL_TOKEN, SPECIAL_TOKEN, 1 - encoding.sequence_ids)
    return encoding._replace(sequence_ids=sequence_ids.astype(np.int32))


def _select_tokens(encoding: Encoding, ranges: dict[int, tuple[int, int]]) -> Encoding:
    """The encoding of the special tokens, and of the tokens in the given range of each text.

    Args:
        ranges: text number -> (start, stop), token positions in the text.
    """
    keep = encoding.sequence_ids == SPECIAL_TOKEN
    for number, (start, stop) in ranges.items():
        keep[np.flatnonzero(encoding.sequence_ids == number)[start:stop]] = True
    return Encoding(*(field[keep] for field in encoding))

"""Encoded texts and pairs: ids with token types, character offsets and text numbers; truncation and windows.

Only numpy: a tokenizer makes one whole encoding, and the functions here select positions from it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPECIAL = -1
"""The entry of :attr:`Encoding.sequence` for a token that the template adds."""


class Encoding(NamedTuple):
    """A text, or a pair of texts, with the special tokens of the tokenizer's template.

    Attributes:
        ids: int32 [T].
        token_types: int32 [T], what the template gives: for BERT 0 in the first part and 1 in the second.
        offsets: int32 [T, 2]. Token ``t`` comes from characters ``offsets[t, 0]`` to ``offsets[t, 1]`` (exclusive) of
            its text; (0, 0) for special tokens.
        sequence: int32 [T], the text of each token: 0 the first, 1 the second, -1 a special token of the template.
    """

    ids: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray
    sequence: np.ndarray


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> Encoding:
    """The encoding of texts without a template: ``parts`` has the ids and the offsets of each text."""
    numbers = [np.full(len(ids), number, np.int32) for number, (ids, _) in enumerate(parts)]
    sequence = np.concatenate(numbers)
    return Encoding(
        ids=np.concatenate([ids for ids, _ in parts]).astype(np.int32),
        token_types=sequence,
        offsets=np.concatenate([offsets.reshape(-1, 2) for _, offsets in parts]).astype(np.int32),
        sequence=sequence.copy(),
    )


def truncated(encoding: Encoding, max_length: int) -> Encoding:
    """The encoding with at most ``max_length`` tokens: the longer text loses tokens at its end until both are equal.

    Special tokens always stay.

    Raises:
        ValueError: ``max_length`` leaves no room for one token of each text.
    """
    if len(encoding.ids) <= max_length:
        return encoding
    first, second = (int(np.sum(encoding.sequence == number)) for number in (0, 1))
    room = max_length - (len(encoding.ids) - first - second)
    if room < (first > 0) + (second > 0):
        raise ValueError(
            f"max_length={max_length} is too short: {max_length - room} special tokens leave room for {max(room, 0)} "
            f"tokens of {'two texts' if first and second else 'the text'}"
        )
    if min(first, second) <= room // 2:
        first, second = min(first, room - min(second, room // 2)), min(second, room - min(first, room // 2))
    else:
        first, second = (room // 2, room - room // 2) if first <= second else (room - room // 2, room // 2)
    return _selected(encoding, {0: (0, first), 1: (0, second)})


def windows(encoding: Encoding, max_length: int, stride: int) -> list[Encoding]:
    """Encodings of at most ``max_length`` tokens: the first text whole, and windows of the second text.

    Two neighbours share ``stride`` tokens of the second text; the last window ends where the text ends.

    Raises:
        ValueError: ``max_length`` leaves at most ``stride`` tokens for the second text; a negative stride.
    """
    if stride < 0:
        raise ValueError(f"stride={stride} must be at least 0: it is the number of tokens that two windows share")
    context = int(np.sum(encoding.sequence == 1))
    room = max_length - (len(encoding.ids) - context)
    if len(encoding.ids) <= max_length:
        return [encoding]
    if room <= stride:
        raise ValueError(
            f"max_length={max_length} leaves {max(room, 0)} tokens for the context beside "
            f"{len(encoding.ids) - context} tokens of the question and special tokens, but it must leave more than "
            f"stride={stride}: choose a longer max_length, a smaller stride or a shorter question"
        )
    question = int(np.sum(encoding.sequence == 0))
    starts = range(0, context - stride, room - stride)
    return [_selected(encoding, {0: (0, question), 1: (start, min(start + room, context))}) for start in starts]


def swapped(encoding: Encoding) -> Encoding:
    """The same encoding with the two texts numbered the other way round."""
    sequence = np.where(encoding.sequence == SPECIAL, SPECIAL, 1 - encoding.sequence)
    return encoding._replace(sequence=sequence.astype(np.int32))


def _selected(encoding: Encoding, ranges: dict[int, tuple[int, int]]) -> Encoding:
    """The special tokens, and of each text the tokens in its range (counted within the text)."""
    keep = encoding.sequence == SPECIAL
    for number, (start, stop) in ranges.items():
        keep[np.flatnonzero(encoding.sequence == number)[start:stop]] = True
    return Encoding(*(field[keep] for field in encoding))

"""Encoded texts and pairs: ids, token types, character offsets and text numbers; truncation and windows.

A tokenizer makes the full encoding, and the functions of this module select positions from it. They use only numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPECIAL = -1
"""The entry of :attr:`Encoding.sequence` for a special token of the template."""


class Encoding(NamedTuple):
    """A text, or a pair of texts, with the special tokens of the tokenizer's template.

    Attributes:
        ids: int32 [T].
        token_types: int32 [T], the token types of the template; for BERT, 0 in the first text and 1 in the second.
        offsets: int32 [T, 2]. Token ``t`` has the characters ``offsets[t, 0]`` to ``offsets[t, 1]`` (exclusive) of its
            text; (0, 0) for special tokens.
        sequence: int32 [T], the text of each token: 0 for the first text, 1 for the second, -1 for a special token of
            the template.
    """

    ids: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray
    sequence: np.ndarray


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> Encoding:
    """The encoding of concatenated texts without a template.

    Args:
        parts: the ids [tokens] and the offsets [tokens, 2] of each text.
    """
    numbers = [np.full(len(ids), number, np.int32) for number, (ids, _) in enumerate(parts)]
    sequence = np.concatenate(numbers)
    return Encoding(
        ids=np.concatenate([ids for ids, _ in parts]).astype(np.int32),
        token_types=sequence,
        offsets=np.concatenate([offsets.reshape(-1, 2) for _, offsets in parts]).astype(np.int32),
        sequence=sequence.copy(),
    )


def truncated(encoding: Encoding, max_length: int) -> Encoding:
    """The encoding with at most ``max_length`` tokens.

    Tokens are removed at the end of the longer text until both texts have equal length, and then from both. Special
    tokens are never removed.

    Raises:
        ValueError: ``max_length`` is too small for one token of each text.
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
    """Encodings of at most ``max_length`` tokens, each with the whole first text and a window of the second text.

    Two consecutive windows share ``stride`` tokens of the second text. The last window ends at the end of the text.

    Raises:
        ValueError: ``max_length`` leaves at most ``stride`` tokens for the second text, or ``stride`` is negative.
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
            f"stride={stride}: use a larger max_length, a smaller stride or a shorter question"
        )
    question = int(np.sum(encoding.sequence == 0))
    starts = range(0, context - stride, room - stride)
    return [_selected(encoding, {0: (0, question), 1: (start, min(start + room, context))}) for start in starts]


def swapped(encoding: Encoding) -> Encoding:
    """The encoding with the numbers of the two texts exchanged."""
    sequence = np.where(encoding.sequence == SPECIAL, SPECIAL, 1 - encoding.sequence)
    return encoding._replace(sequence=sequence.astype(np.int32))


def _selected(encoding: Encoding, ranges: dict[int, tuple[int, int]]) -> Encoding:
    """The encoding of the special tokens, and of the tokens in the given range of each text.

    Args:
        ranges: text number -> (start, stop), positions within the tokens of the text.
    """
    keep = encoding.sequence == SPECIAL
    for number, (start, stop) in ranges.items():
        keep[np.flatnonzero(encoding.sequence == number)[start:stop]] = True
    return Encoding(*(field[keep] for field in encoding))

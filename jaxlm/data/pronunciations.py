"""Pronunciation dictionaries in the format of CMUdict: words and their phonemes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.data.text_files import read_lines

Pronunciations = Mapping[str, Sequence[tuple[str, ...]]]
"""Word -> its pronunciations (one or more, all different). A pronunciation is a tuple of phonemes."""


def read_pronunciations(
    path: str | Path, *, stress: bool = False, encoding: str = "utf-8"
) -> dict[str, list[tuple[str, ...]]]:
    """Word -> its different pronunciations, in the order of a file in the format of CMUdict.

    A line has a word and its phonemes, separated by spaces: ``data D EY1 T AH0``. The lines of further pronunciations
    have a number after the word: ``data(2) D AE1 T AH0``. The rest of a line after a space and ``#`` is a comment.
    Empty lines and lines that begin with ``;;;`` or with ``#`` and a space are skipped.

    Args:
        path: a text file, which may be compressed (``.gz``).
        stress: True keeps the digits that mark the stress of vowels. False removes the digits. If pronunciations of a
            word are then equal, only the first is kept.
        encoding: the encoding of the file. CMU's file ``cmudict-0.7b`` needs ``latin-1``.

    Raises:
        FileNotFoundError: the file does not exist.
        LookupError: the encoding is unknown.
        ValueError: the file is not text in this encoding, a ``.gz`` file is damaged or too large, the file has no
            words, or a word has no phonemes. In the last case, the message has the line number.
    """
    words: dict[str, list[tuple[str, ...]]] = {}
    for number, line in read_lines(path, encoding):
        name, *phonemes = re.split(r"\s#", line, maxsplit=1)[0].split() or [""]
        if name in ("", "#") or name.startswith(";;;"):  # skip empty lines and comments; a word may begin with #
            continue
        if not phonemes:
            raise ValueError(f"{path}, line {number}: the word {name!r} has no phonemes")
        pronunciation = tuple(phonemes if stress else (phoneme.rstrip("0123456789") for phoneme in phonemes))
        known = words.setdefault(re.sub(r"\(\d+\)$", "", name), [])
        if pronunciation not in known:
            known.append(pronunciation)
    if not words:
        raise ValueError(f"{path} has no words: each line must have a word and its phonemes")
    return words


def split_pronunciations(words: Pronunciations) -> tuple[Pronunciations, Pronunciations, Pronunciations]:
    """The training, validation and test words: 85, 5 and 10 %.

    Of each 20 consecutive words, words 18 and 19 are test words, and word 20 is a validation word. The tool g2p-seq2seq
    of CMU Sphinx makes the same split (``create_data_files`` in its ``g2p_problem.py``).
    """
    parts: tuple[dict[str, Sequence[tuple[str, ...]]], ...] = ({}, {}, {})
    for number, (word, pronunciations) in enumerate(words.items()):
        part = {19: 1, 18: 2, 17: 2}.get(number % 20, 0)
        parts[part][word] = pronunciations
    training, validation, test = parts
    return training, validation, test

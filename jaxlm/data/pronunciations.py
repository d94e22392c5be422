"""Pronunciation dictionaries in the format of CMUdict: words and their phonemes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.data.text_files import text_chunks

Pronunciations = Mapping[str, Sequence[tuple[str, ...]]]
"""Words in the order of the file, each with one or more different pronunciations, which are tuples of phonemes."""


def read_pronunciations(
    path: str | Path, *, stress: bool = False, encoding: str = "utf-8"
) -> dict[str, list[tuple[str, ...]]]:
    """The pronunciations of each word in a file in the format of CMUdict.

    A line has a word and its phonemes, separated by spaces: ``data D EY1 T AH0``. The lines of further pronunciations
    have a number after the word: ``data(2) D AE1 T AH0``. The rest of a line after a space and ``#`` is a comment.
    Empty lines and lines that begin with ``;;;`` or with ``#`` and a space are skipped.

    Args:
        path: a text file, which may be compressed (``.gz``).
        stress: True keeps the digits that mark the stress of vowels. False removes the digits. Of equal pronunciations
            of a word, only the first is kept.
        encoding: the encoding of the file. CMU's file ``cmudict-0.7b`` needs ``latin-1``.

    Raises:
        FileNotFoundError: the file does not exist.
        LookupError: the encoding is unknown.
        ValueError: the file is not text in this encoding, a ``.gz`` file is damaged or too large, the file has no
            words, or a word has no phonemes. For such a word, the message has the line number.
    """
    words: dict[str, list[tuple[str, ...]]] = {}
    for number, line in enumerate("".join(text_chunks(path, encoding)).split("\n"), 1):
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


def split_words(words: Pronunciations) -> tuple[Pronunciations, Pronunciations, Pronunciations]:
    """The training, validation and test words: 85, 5 and 10 %.

    Of each 20 words in the order of the dictionary, words 18 and 19 are test words, and word 20 is a validation word.
    This is the split of the tool g2p-seq2seq of CMU Sphinx.
    """
    parts: tuple[dict[str, Sequence[tuple[str, ...]]], ...] = ({}, {}, {})
    for number, (word, pronunciations) in enumerate(words.items()):
        part = {19: 1, 18: 2, 17: 2}.get(number % 20, 0)
        parts[part][word] = pronunciations
    training, validation, test = parts
    return training, validation, test

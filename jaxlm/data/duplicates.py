"""Groups of similar texts, so that near-duplicates do not come into different parts of a data set.

Texts are similar when their sets of word trigrams overlap: Jaccard similarity (Broder 1997), estimated with MinHash
signatures; candidates are texts that agree in a band of their signatures (Leskovec et al., Mining of Massive Datasets,
chapter 3).
"""

from __future__ import annotations

import collections
import re
import zlib
from collections.abc import Hashable, Sequence

import numpy as np

HASHES = 64
"""Hash functions of a signature: the standard error of an estimated similarity of 0.5 is 0.06."""
BAND = 4
"""Hash values of a band: two texts of similarity 0.5 agree in one of the 16 bands with probability 0.64, of 0.7 with
0.99."""
_PRIME = 2**31 - 1


def group_similar(
    texts: Sequence[str], keys: Sequence[Hashable] | None = None, *, similarity: float = 0.5
) -> list[int]:
    """The number of the group of each text; similar texts, and texts with the same key, are in one group.

    A group is a connected component: two of its texts need not be similar themselves. The number of a group is the
    index of its first text. The result depends on nothing but the arguments.

    Args:
        keys: one for each text, such as the name of the package that it is from; None: only the texts decide.
        similarity: Jaccard similarity of word trigrams from which on two texts are near-duplicates.

    Raises:
        ValueError: another number of keys than of texts, or a similarity that is not in (0, 1].

    Example:
        >>> group_similar(["a b c d", "x y z", "a b c d", "u v w"], keys=["p", "q", "r", "q"])
        [0, 1, 0, 1]
    """
    if keys is not None and len(keys) != len(texts):
        raise ValueError(f"{len(keys)} keys for {len(texts)} texts: each text needs one")
    if not 0.0 < similarity <= 1.0:
        raise ValueError(f"similarity={similarity} must be above 0 and at most 1")
    parents = list(range(len(texts)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(one: int, other: int) -> None:
        first, last = sorted((root(one), root(other)))
        parents[last] = first

    first_with: dict[Hashable, int] = {}
    for index, key in enumerate(keys or ()):
        join(first_with.setdefault(key, index), index)
    signatures = _signatures(texts)
    for start in range(0, HASHES, BAND):
        buckets: dict[bytes, list[int]] = collections.defaultdict(list)
        for index, band in enumerate(np.ascontiguousarray(signatures[:, start : start + BAND])):
            # A bucket keeps one text of each group of near-duplicates: the others are compared with that one.
            bucket = buckets[band.tobytes()]
            like = next((one for one in bucket if np.mean(signatures[one] == signatures[index]) >= similarity), None)
            if like is None:
                bucket.append(index)
            else:
                join(like, index)
    return [root(index) for index in range(len(texts))]


def trigrams(text: str) -> set[str]:
    """The word trigrams of a text in lower case, without punctuation; a shorter text is one item."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures, [texts, HASHES] int64: the smallest value of each hash function over the trigrams."""
    rng = np.random.default_rng(0)
    factors, shifts = rng.integers(1, _PRIME, HASHES), rng.integers(0, _PRIME, HASHES)
    items, starts = [], [0]
    for text in texts:
        items += [zlib.crc32(gram.encode()) % _PRIME for gram in trigrams(text)]
        starts.append(len(items))
    values = np.asarray(items, np.int64)
    signatures = np.empty((len(texts), HASHES), np.int64)
    for column, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        if len(texts):
            signatures[:, column] = np.minimum.reduceat((values * factor + shift) % _PRIME, starts[:-1])
    return signatures

"""Groups of similar texts. With these groups, a split of a data set can keep near-duplicates in one part.

The similarity of two texts is the Jaccard similarity of their sets of word trigrams (Broder 1997), estimated with
MinHash signatures. Two texts are compared only if their signatures agree in at least one band of ``BAND_SIZE``
consecutive hash values (locality-sensitive hashing: Leskovec et al., Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import collections
import re
import zlib
from collections.abc import Hashable, Sequence

import numpy as np

from jaxlm.config import check_same_number

NUM_HASHES = 64
"""Number of hash functions per signature. The standard error of an estimated similarity of 0.5 is 0.06."""
BAND_SIZE = 4
"""Number of hash values in a band. The probability that two texts agree in at least one of the 16 bands is 0.64 for a
similarity of 0.5, and 0.99 for a similarity of 0.7."""
_PRIME = 2**31 - 1


def group_similar(
    texts: Sequence[str], keys: Sequence[Hashable] | np.ndarray | None = None, *, similarity: float = 0.5
) -> list[int]:
    """The group number of each text. Similar texts, and texts with the same key, are in one group.

    The groups are the connected components of a graph. An edge joins two texts that have the same key or that were
    found to be similar. So two texts of a group may be dissimilar. A similar pair is not found if its signatures agree
    in no band. The number of a group is the index of its first text. The function is deterministic.

    Args:
        keys: one key for each text, for example the name of its package. None: only the texts are compared.
        similarity: two texts are similar if the estimated Jaccard similarity of their word trigrams is at least this
            number. The similarity is estimated only for pairs whose signatures agree in a band. These are 12 % of the
            pairs with similarity 0.3, 64 % of those with 0.5, and 99 % of those with 0.7. So a value below 0.5 finds
            few additional pairs.

    Raises:
        ValueError: the numbers of keys and texts differ, or the similarity is not in (0, 1].

    Example:
        >>> group_similar(["a b c d", "x y z", "a b c d", "u v w"], keys=["p", "q", "r", "q"])
        [0, 1, 0, 1]
    """
    if keys is not None:
        check_same_number(text=texts, key=keys)
    if not 0.0 < similarity <= 1.0:
        raise ValueError(f"similarity={similarity} must be above 0 and at most 1")
    parents = list(range(len(texts)))

    def find_root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def merge(index: int, other: int) -> None:
        smaller, larger = sorted((find_root(index), find_root(other)))
        parents[larger] = smaller

    first_index: dict[Hashable, int] = {}
    for index, key in enumerate(() if keys is None else keys):
        merge(first_index.setdefault(key, index), index)
    signatures = _signatures(texts)
    for start in range(0, NUM_HASHES, BAND_SIZE):
        buckets: dict[bytes, list[int]] = collections.defaultdict(list)
        for index, band in enumerate(np.ascontiguousarray(signatures[:, start : start + BAND_SIZE])):
            # To save comparisons, a text that is similar to a text of the bucket is not added to the bucket.
            bucket = buckets[band.tobytes()]
            match = next((i for i in bucket if np.mean(signatures[i] == signatures[index]) >= similarity), None)
            if match is None:
                bucket.append(index)
            else:
                merge(match, index)
    return [find_root(index) for index in range(len(texts))]


def group_phrases(texts: Sequence[str]) -> list[int]:
    """The group number of each text. A sentence and the texts that are phrases of it are in one group.

    A phrase of a text is a sequence of its consecutive words; words are separated by white space. A text that is a
    phrase of several longer texts is only in the group of the longest of these texts (of the first, if several are
    equally long). A short phrase in the groups of all these texts would merge the groups of unrelated sentences. The
    number of a group is the index of its longest text.

    Example:
        >>> group_phrases(["a fine film", "what a bore", "fine film", "bore", "what a bore"])
        [0, 1, 0, 1, 1]
    """
    words = [text.split() for text in texts]
    spaced = [f" {' '.join(parts)} " for parts in words]
    groups = list(range(len(texts)))
    sentences_with: dict[str, list[int]] = collections.defaultdict(list)  # one to three words -> sentences
    for index in sorted(groups, key=lambda index: -len(words[index])):
        size = min(3, len(words[index]))
        candidates = min((sentences_with.get(gram, []) for gram in _word_ngrams(words[index], size)), key=len)
        groups[index] = next((sentence for sentence in candidates if spaced[index] in spaced[sentence]), index)
        if groups[index] == index:
            for gram in {gram for size in (1, 2, 3) for gram in _word_ngrams(words[index], size)}:
                sentences_with[gram].append(index)
    return groups


def _word_ngrams(words: Sequence[str], size: int) -> list[str]:
    """The sequences of ``size`` consecutive words, joined by spaces. Fewer words than ``size`` give one sequence."""
    return [" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))]


def trigrams(text: str) -> set[str]:
    """The word trigrams of a text, in lower case and without punctuation.

    A text with one or two words gives one string with all its words. A text without words gives the text itself.
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        return {text}
    return set(_word_ngrams(words, 3))


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """The MinHash signatures, [texts, NUM_HASHES] int64: the minimum of each hash function over the text's trigrams."""
    rng = np.random.default_rng(0)
    factors, shifts = rng.integers(1, _PRIME, NUM_HASHES), rng.integers(0, _PRIME, NUM_HASHES)
    items, starts = [], [0]
    for text in texts:
        items += [zlib.crc32(gram.encode(errors="surrogatepass")) % _PRIME for gram in trigrams(text)]
        starts.append(len(items))
    values = np.asarray(items, np.int64)
    signatures = np.empty((len(texts), NUM_HASHES), np.int64)
    for column, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        if len(texts):
            signatures[:, column] = np.minimum.reduceat((values * factor + shift) % _PRIME, starts[:-1])
    return signatures

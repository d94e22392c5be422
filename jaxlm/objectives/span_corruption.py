"""Span corruption (Raffel et al. 2020, section 3.1.4): spans are removed from a text, and the target contains them.

A sentinel token replaces each removed span:

    text    Thank you for inviting me to your party last week
    source  Thank you <s0> me to your party <s1> <end>
    target  <s0> for inviting <s1> last week <end>

As in the published code, the random masks of :func:`removal_mask` keep the beginning of a text and remove its end. If a
mask for :func:`corrupt` keeps the end, the target ends with one more sentinel, as in the figure of the paper. For given
settings, the numbers of removed tokens and spans depend only on the length of the text. So texts of equal length have
sources of equal length and targets of equal length, without padding. The loss is the same as in ``seq2seq``. All
functions except ``loss`` run on the host. They draw random numbers only from the argument ``rng``.

Shapes: B batch, N tokens of a text.
"""

from __future__ import annotations

import numpy as np

from jaxlm.config import check_int32, check_min
from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.spec import require_arrays

loss = token_loss

DENSITY = 0.15
"""Fraction of the tokens that are removed."""
MEAN_SPAN = 3.0
"""Mean number of tokens of a removed span."""


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    first_sentinel: int,
    end_id: int = 1,
    start_id: int = 0,
    density: float = DENSITY,
    mean_span: float = MEAN_SPAN,
    num_sentinels: int = 100,
) -> Batch:
    """A batch for an encoder-decoder from texts [B, N]. Each text gets its own random mask.

    :func:`text_length` gives N for a maximum length of the source.

    Args:
        rng: random generator. The rows draw from it one after the other.
        first_sentinel: id of the first sentinel, such as 32099 in T5's vocabulary. The ids of later sentinels descend.
        end_id: id of the last token of sources and targets.
        start_id: id of the first input of the decoder.
        density: fraction of the tokens that are removed.
        mean_span: mean number of tokens of a removed span.
        num_sentinels: number of sentinels in the vocabulary.

    Raises:
        TypeError: the texts are not an array of integers.
        ValueError: there are no texts, an argument is out of range, or a text is too short, needs more than
            ``num_sentinels`` sentinels, or contains a sentinel.
    """
    require_arrays(tokens=tokens)
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"texts must be [batch, time] with at least one row, got {list(tokens.shape)}")
    pairs = [
        corrupt(
            row, removal_mask(len(row), rng, density=density, mean_span=mean_span),
            first_sentinel=first_sentinel, end_id=end_id, num_sentinels=num_sentinels,
        )
        for row in tokens
    ]  # fmt: skip
    source, targets = (np.stack(rows) for rows in zip(*pairs, strict=True))
    return seq2seq.batch(source, targets, start_id=start_id)


def removal_mask(
    length: int, rng: np.random.Generator, *, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> np.ndarray:
    """A random mask of a text of ``length`` tokens, [N] bool, True for tokens to remove.

    The mask begins with a kept token and ends with a removed token. ``length``, ``density`` and ``mean_span`` determine
    the numbers of removed tokens and spans. All such masks with these numbers are equally likely.

    Raises:
        ValueError: ``length`` is below 2, ``density`` is not between 0 and 1, or ``mean_span`` is below 1.
    """
    num_removed, num_spans = _removed_counts(length, density, mean_span)
    removed = _random_partition(num_removed, num_spans, rng)
    kept = _random_partition(length - num_removed, num_spans, rng)
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, np.stack([kept, removed], axis=1).ravel())


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, *, first_sentinel: int, end_id: int, num_sentinels: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """The source and target of a text [N], both int32.

    In the source, a sentinel replaces each run of removed tokens. In the target, a sentinel replaces each run of kept
    tokens. Both end with ``end_id``.

    Args:
        mask: [N] bool, True for tokens to remove.
        first_sentinel, end_id, num_sentinels: as in :func:`batch`.

    Raises:
        TypeError: the text is not an array of integers, or the mask is not an array.
        ValueError: the text is empty or has ids outside int32; the mask is not boolean, does not have the shape of the
            text or removes the first token; there are too few sentinels; sentinels have negative ids; or the text
            contains a sentinel.
    """
    require_arrays(tokens=tokens, mask=mask)
    if tokens.dtype.kind in "iu":
        check_int32(tokens, "the text")
    tokens = tokens.astype(np.int32, casting="same_kind")  # sentinels may not fit into a smaller dtype
    if not tokens.size:
        raise ValueError("a text without tokens cannot be corrupted: remove it")
    if mask.dtype != bool:
        raise ValueError(f"mask has dtype {mask.dtype}: pass a boolean array, such as mask > 0")
    if mask.shape != tokens.shape or mask[0]:
        raise ValueError("a mask must have the shape of its text and begin with a token that is kept")
    num_used = max(_run_starts(mask).sum(), _run_starts(~mask).sum())
    if num_used > num_sentinels:
        raise ValueError(
            f"{num_used} spans need {num_used} sentinels, but num_sentinels={num_sentinels}: use a shorter text or "
            "longer spans"
        )
    last_sentinel = first_sentinel - num_sentinels + 1
    if last_sentinel < 0:
        raise ValueError(f"{num_sentinels} sentinels with descending ids from {first_sentinel} need negative ids")
    if np.any((tokens >= last_sentinel) & (tokens <= first_sentinel)):
        raise ValueError(f"the text contains sentinels, ids {last_sentinel} to {first_sentinel}: remove them")

    def replace_runs(masked: np.ndarray) -> np.ndarray:
        is_start = _run_starts(masked)
        with_sentinels = np.where(is_start, first_sentinel + 1 - np.cumsum(is_start), tokens)
        return np.append(with_sentinels[~masked | is_start], end_id).astype(tokens.dtype)

    return replace_runs(mask), replace_runs(~mask)


def text_length(source_length: int, *, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """The length of the longest text whose source has at most ``source_length`` tokens, and the length of its target.

    Source and target include their end tokens.

    Raises:
        ValueError: ``source_length`` is too short, ``density`` is not between 0 and 1, or ``mean_span`` is below 1.

    Example:
        >>> text_length(512)
        (568, 114)
    """

    def source_and_target_length(length: int) -> tuple[int, int]:
        num_removed, num_spans = _removed_counts(length, density, mean_span)
        return length - num_removed + num_spans + 1, num_removed + num_spans + 1

    length = 2
    if source_and_target_length(length)[0] > source_length:
        raise ValueError(f"source_length={source_length} is too short for a corrupted text: make it at least 3")
    while source_and_target_length(length + 1)[0] <= source_length:
        length += 1
    return length, source_and_target_length(length)[1]


def _removed_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """The numbers of removed tokens and removed spans. Both are at least 1, with at least one kept token per span."""
    if not 0.0 < density < 1.0:
        raise ValueError(f"density={density} must be between 0 and 1")
    check_min(1, mean_span=mean_span)
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be corrupted: it must have at least 2")
    num_removed = min(max(round(length * density), 1), length - 1)
    return num_removed, min(max(round(num_removed / mean_span), 1), length - num_removed)


def _random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A random sequence of ``parts`` positive integers with sum ``total``. All such sequences are equally likely."""
    is_start = np.arange(total - 1) < parts - 1
    rng.shuffle(is_start)
    return np.diff(np.flatnonzero(np.concatenate([[True], is_start, [True]])))


def _run_starts(mask: np.ndarray) -> np.ndarray:
    """A mask that is True at the first entry of each run of True in ``mask``."""
    return mask & ~np.concatenate([[False], mask[:-1]])

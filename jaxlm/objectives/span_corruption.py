"""Span corruption (Raffel et al. 2020, section 3.1.4): spans of a text give way to sentinels; the target is the spans.

    text    Thank you for inviting me to your party last week
    source  Thank you <s0> me to your party <s1> <end>
    target  <s0> for inviting <s1> last week <end>

As in the published code, a text begins with a span that stays and ends with one that goes; with a mask of one's own
that ends otherwise, one more sentinel ends the target, as in the figure of the paper. How many tokens and spans go
depends on the length alone, so rows of one length stay of one length and nothing is padded. The loss is that of
``seq2seq``. All of this runs on the host, and depends on the texts and the random generator alone.
Shapes: B batch, N tokens of a text.
"""

from __future__ import annotations

import numpy as np

from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, token_loss

loss = token_loss

DENSITY = 0.15
"""Share of the tokens that go."""
MEAN_SPAN = 3.0
"""Tokens of a span, on average."""


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    first_sentinel: int,
    end_id: int = 1,
    start_id: int = 0,
    density: float = DENSITY,
    mean_span: float = MEAN_SPAN,
    sentinels: int = 100,
) -> Batch:
    """Texts [B, N], each corrupted by itself, for an encoder-decoder; :func:`text_length` says which N to choose.

    Args:
        rng: drawn from row by row.
        first_sentinel: the sentinel of the first span, such as 32099 in T5's vocabulary; later ones count down.
        start_id: what the decoder reads first.
        sentinels: how many there are.

    Raises:
        ValueError: numbers out of range, texts that are too short, need more sentinels or hold one.
    """
    if tokens.ndim != 2:
        raise ValueError(f"texts must be [batch, time], got {list(tokens.shape)}")
    pairs = [
        corrupt(
            row, noise_mask(len(row), rng, density=density, mean_span=mean_span),
            first_sentinel=first_sentinel, end_id=end_id, sentinels=sentinels,
        )
        for row in tokens
    ]  # fmt: skip
    source, targets = (np.stack(rows) for rows in zip(*pairs, strict=True))
    return seq2seq.batch(source, targets, start_id=start_id)


def noise_mask(
    length: int, rng: np.random.Generator, *, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> np.ndarray:
    """Which tokens go, [N] bools: all masks with these numbers of tokens and spans are equally likely."""
    noise, spans = _counts(length, density, mean_span)
    going = _partition(noise, spans, rng)
    staying = _partition(length - noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, np.stack([staying, going], axis=1).ravel())


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, *, first_sentinel: int, end_id: int, sentinels: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of one text [N]: a run of ``mask`` is a sentinel in the source, the runs between in the target.

    Raises:
        ValueError: a mask that begins with a token that goes, too few sentinels, or a text that holds one.
    """
    if mask.shape != tokens.shape or mask[0]:
        raise ValueError("a mask must have the shape of its text and begin with a token that stays")
    used = max(_runs(mask).sum(), _runs(~mask).sum())
    if used > sentinels:
        raise ValueError(
            f"{used} spans need as many sentinels, there are {sentinels}: shorten the text or make spans longer"
        )
    last_sentinel = first_sentinel - sentinels + 1
    if last_sentinel < 0:
        raise ValueError(f"{sentinels} sentinels counting down from {first_sentinel} leave the vocabulary")
    if np.any((tokens >= last_sentinel) & (tokens <= first_sentinel)):
        raise ValueError(f"the text holds sentinels, ids {last_sentinel} to {first_sentinel}: they must be free")

    def replaced(masked: np.ndarray) -> np.ndarray:
        first = _runs(masked)
        marked = np.where(first, first_sentinel + 1 - np.cumsum(first), tokens)
        return np.append(marked[~masked | first], end_id).astype(tokens.dtype)

    return replaced(mask), replaced(~mask)


def text_length(source_length: int, *, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """The longest text whose source has at most so many tokens, and the length of its target, end tokens included.

    Example:
        >>> text_length(512)
        (568, 114)
    """

    def lengths(length: int) -> tuple[int, int]:
        noise, spans = _counts(length, density, mean_span)
        return length - noise + spans + 1, noise + spans + 1

    length = 2
    if lengths(length)[0] > source_length:
        raise ValueError(f"source_length={source_length} is too short for a corrupted text: make it at least 3")
    while lengths(length + 1)[0] <= source_length:
        length += 1
    return length, lengths(length)[1]


def _counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens go, and in how many spans: at least one of each, with at least one token staying before each."""
    if not 0.0 < density < 1.0:
        raise ValueError(f"density={density} must be between 0 and 1")
    if mean_span < 1.0:
        raise ValueError(f"mean_span={mean_span} must be at least 1")
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be corrupted: it must have at least 2")
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """``total`` as a sum of ``parts`` positive numbers in order, every way equally likely."""
    begins = np.arange(total - 1) < parts - 1
    rng.shuffle(begins)
    return np.diff(np.flatnonzero(np.concatenate([[True], begins, [True]])))


def _runs(mask: np.ndarray) -> np.ndarray:
    """True where a run of True begins."""
    return mask & ~np.concatenate([[False], mask[:-1]])

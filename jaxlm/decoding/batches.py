"""Batches of few shapes: rows are sorted by length, cut into batches, and padded to bucket lengths.

Shapes: B rows of a batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

SMALLEST_BUCKET = 16
"""Bucket lengths are multiples of it."""


def bucket_length(length: int, limit: int | None = None) -> int:
    """The shortest bucket length that is at least ``length``, but at most ``limit``.

    Buckets are 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, ...: two from one power of two to the next, so at most a
    third of a row of more than 32 is padding.

    Raises:
        ValueError: ``length`` is below 1 or above ``limit``.

    Example:
        >>> [bucket_length(n) for n in (1, 17, 65, 130)], bucket_length(65, limit=70)
        ([16, 32, 96, 192], 70)
    """
    if length < 1 or (limit is not None and length > limit):
        raise ValueError(f"length={length} must be at least 1" + (f" and at most {limit}" if limit is not None else ""))
    step = max(SMALLEST_BUCKET, 2 ** max((length - 1).bit_length() - 2, 0))
    bucket = -(-length // step) * step
    return bucket if limit is None else min(bucket, limit)


def length_batches(lengths: Sequence[int], batch_size: int | None) -> Iterator[np.ndarray]:
    """Row numbers [B] of each batch, the longest rows first.

    Every batch has ``batch_size`` rows (or as many as there are): the last one repeats its last row.

    Args:
        lengths: of each row.
        batch_size: rows of a batch; None puts all rows into one.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    size = len(lengths) if batch_size is None else min(batch_size, len(lengths))
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for first in range(0, len(order), max(size, 1)):
        yield order[np.minimum(np.arange(first, first + size), len(order) - 1)]


def pad_rows(rows: Sequence[np.ndarray], length: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded with id 0 to ``length``, [B, T] int32, and their segment ids (1, padding 0)."""
    tokens, segment_ids = np.zeros((2, len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        columns = slice(length - ids.size, length) if left else slice(ids.size)
        tokens[row, columns], segment_ids[row, columns] = ids, 1
    return tokens, segment_ids

"""Batches with few distinct shapes. Rows are sorted by length, split into batches, and padded to bucket lengths.

A bucket length is a length from a fixed list (:func:`bucket_length`). Shapes: B batch rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.config import check_min

SMALLEST_BUCKET = 16
"""The smallest bucket length. All bucket lengths are multiples of this number."""


def bucket_length(length: int, limit: int | None = None) -> int:
    """The smallest bucket length that is at least ``length``; ``limit`` if this bucket length exceeds ``limit``.

    The bucket lengths are 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, ... From 32 on, there are two bucket lengths per
    power of two. So if ``length`` is more than 32, at most one third of the padded row is padding.

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
    """Yield the row numbers [B] of each batch. The longest rows are in the first batch.

    All batches have the same number of rows B: ``batch_size``, or the number of all rows if this is smaller. The last
    batch repeats its last row until it has B rows.

    Args:
        lengths: the length of each row.
        batch_size: number of rows in a batch. None: one batch has all rows.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    check_min(1, batch_size=batch_size)
    size = len(lengths) if batch_size is None else min(batch_size, len(lengths))
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for first in range(0, len(order), max(size, 1)):
        yield order[np.minimum(np.arange(first, first + size), len(order) - 1)]


def pad_rows(rows: Sequence[np.ndarray], length: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded with id 0 to ``length``, and their segment ids (1 for tokens, 0 for padding); both [B, T] int32.

    Args:
        rows: the token ids of each row, at most ``length`` ids per row.
        left: pad on the left instead of on the right.
    """
    tokens, segment_ids = np.zeros((2, len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        columns = slice(length - ids.size, length) if left else slice(ids.size)
        tokens[row, columns], segment_ids[row, columns] = ids, 1
    return tokens, segment_ids

"""Tests of length buckets, batches of similar length, and padding."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.decoding.batches import bucket_length, length_batches, pad_rows


def test_buckets_are_few_and_need_little_padding() -> None:
    lengths = np.arange(1, 2049)
    buckets = np.array([bucket_length(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert (buckets % 16 == 0).all()
    assert (np.diff(buckets) >= 0).all()
    assert len(np.unique(buckets)) == 14
    assert (buckets[32:] < 1.5 * lengths[32:]).all()
    assert all(bucket_length(int(bucket)) == bucket for bucket in np.unique(buckets)), "a bucket is its own bucket"


def test_the_limit_is_the_last_bucket() -> None:
    assert [bucket_length(n, 70) for n in (1, 64, 65, 70)] == [16, 64, 70, 70]
    with pytest.raises(ValueError, match="length=71 must be at least 1 and at most 70"):
        bucket_length(71, 70)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        bucket_length(0)


def test_batches_contain_every_row_once_sorted_by_length() -> None:
    lengths = [3, 9, 1, 4, 9, 2, 7]
    batches = [batch.tolist() for batch in length_batches(lengths, 3)]
    assert batches == [[1, 4, 6], [3, 0, 5], [2, 2, 2]], "the last batch repeats its row"
    assert [batch.tolist() for batch in length_batches(lengths, None)] == [[1, 4, 6, 3, 0, 5, 2]]
    assert [batch.tolist() for batch in length_batches(lengths[:2], 3)] == [[1, 0]], "no more rows than there are"
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        list(length_batches(lengths, 0))


def test_rows_are_padded_on_either_side() -> None:
    rows = [np.array([5, 6]), np.array([7])]
    tokens, segment_ids = pad_rows(rows, 3)
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 0], [1, 0, 0]]
    tokens, segment_ids = pad_rows(rows, 3, left=True)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 7]]
    assert segment_ids.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert tokens.dtype == segment_ids.dtype == np.int32

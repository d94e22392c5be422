"""The time axis in chunks: splitting and joining, also for a batch without rows."""

import numpy as np
import pytest

from jaxlm.nn.time_chunks import join_time, split_time


@pytest.mark.parametrize("rows", [0, 2])
def test_joining_is_the_inverse_of_splitting(rows):
    x = np.arange(rows * 5 * 3, dtype=np.float32).reshape(rows, 5, 3)
    chunks = split_time(x, 2)
    assert chunks.shape == (3, rows, 2, 3)
    assert not np.any(chunks[2, :, 1])
    assert np.array_equal(join_time(chunks, 5), x)

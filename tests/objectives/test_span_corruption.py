"""Span corruption of T5: noise masks, and the sources and targets of texts."""

import numpy as np
import pytest

from jaxlm.objectives import span_corruption
from jaxlm.objectives.span_corruption import corrupt, removal_mask, text_length


def published_noise_mask(length, rng, density, mean_span):
    """Return the mask of T5's ``random_spans_noise_mask`` (t5/data/preprocessors.py), with the same steps."""
    num_noise_tokens = min(max(int(np.round(length * density)), 1), length - 1)
    num_noise_spans = max(int(np.round(num_noise_tokens / mean_span)), 1)
    num_nonnoise_tokens = length - num_noise_tokens

    def random_segmentation(num_items, num_segments):
        mask_indices = np.arange(num_items - 1) < (num_segments - 1)
        rng.shuffle(mask_indices)
        segment_id = np.cumsum(np.pad(mask_indices, [[1, 0]]))
        return np.unique(segment_id, return_counts=True)[1]

    noise_span_lengths = random_segmentation(num_noise_tokens, num_noise_spans)
    nonnoise_span_lengths = random_segmentation(num_nonnoise_tokens, num_noise_spans)
    interleaved = np.reshape(np.stack([nonnoise_span_lengths, noise_span_lengths], axis=1), [num_noise_spans * 2])
    span_start_indicator = np.zeros(length, np.int64)
    span_start_indicator[np.cumsum(interleaved)[:-1]] = 1
    return np.cumsum(span_start_indicator) % 2 == 1


@pytest.mark.parametrize(
    ("length", "density", "mean_span"),
    [(2, 0.15, 3.0), (3, 0.5, 3.0), (20, 0.15, 3.0), (568, 0.15, 3.0), (90, 0.5, 1.0), (101, 0.3, 7.5)],
)
def test_noise_mask_equals_the_published_algorithm(length, density, mean_span):
    for seed in range(5):
        mask = removal_mask(length, np.random.default_rng(seed), density=density, mean_span=mean_span)
        assert mask.dtype == bool
        expected = published_noise_mask(length, np.random.default_rng(seed), density, mean_span)
        np.testing.assert_array_equal(mask, expected)


def test_the_number_of_spans_is_limited_by_the_tokens_without_noise():
    """9 of 10 tokens are noise. Spans of length 1 would need 9 other tokens, one before each span, but there is only 1.

    So there is one span. The published algorithm fails in this case.
    """
    mask = removal_mask(10, np.random.default_rng(0), density=0.9, mean_span=1.0)
    assert mask.tolist() == [False] + [True] * 9


def test_all_noise_masks_are_equally_likely():
    """6 tokens have 3 noise tokens in 2 spans. There are 2 ways to split the noise and 2 ways to split the rest."""
    rng = np.random.default_rng(0)
    samples = [tuple(removal_mask(6, rng, density=0.5, mean_span=1.5)) for _ in range(2000)]
    masks, counts = np.unique(samples, axis=0, return_counts=True)
    assert len(masks) == 4
    assert np.all(np.abs(counts - 500) < 100)  # five standard deviations


def test_source_and_target_of_a_text():
    text = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 1], bool)
    source, target = corrupt(text, mask, first_sentinel=99, end_id=1, num_sentinels=3)
    assert source.tolist() == [11, 12, 99, 15, 16, 17, 18, 98, 1]
    assert target.tolist() == [99, 13, 14, 98, 19, 20, 1]
    mask[9] = False  # the last token is not noise, so another sentinel ends the target
    source, target = corrupt(text, mask, first_sentinel=99, end_id=1, num_sentinels=3)
    assert source.tolist() == [11, 12, 99, 15, 16, 17, 18, 98, 20, 1]
    assert target.tolist() == [99, 13, 14, 98, 19, 97, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64])
def test_sentinels_and_start_id_do_not_have_the_dtype_of_the_text(dtype):
    text = np.arange(10, 30, dtype=dtype)[None]
    batch = span_corruption.batch(text, np.random.default_rng(0), first_sentinel=250_099, start_id=250_100)
    assert batch.targets[0, 0] == batch.inputs["source"].max() == 250_099
    assert batch.tokens[0, :2].tolist() == [250_100, 250_099]
    assert batch.tokens.dtype == batch.targets.dtype == batch.inputs["source"].dtype == np.int32


def test_source_and_target_can_be_merged_into_the_text():
    rng = np.random.default_rng(3)
    texts = rng.integers(2, 150, (6, 130))
    batch = span_corruption.batch(texts, rng, first_sentinel=299, end_id=1, start_id=0)
    for text, source, target, decoder_input in zip(
        texts, batch.inputs["source"], batch.targets, batch.tokens, strict=True
    ):
        spans = dict(_spans(target))
        sentinels = [token for token in source if token >= 200]
        assert sentinels == list(range(299, 299 - len(sentinels), -1)) == list(spans)
        restored = [
            restored_token for token in source[:-1] for restored_token in (spans[token] if token >= 200 else [token])
        ]
        assert restored == text.tolist()
        assert source[-1] == target[-1] == 1
        assert decoder_input.tolist() == [0, *target[:-1]]
    assert batch.weights.sum() == batch.targets.size


def _spans(target):
    """Return pairs (sentinel, tokens of its span) of a target. The EOS token at the end is not included."""
    boundaries = [*np.flatnonzero(target >= 200), len(target) - 1]
    return [(target[a], target[a + 1 : b].tolist()) for a, b in zip(boundaries, boundaries[1:], strict=False)]


def test_text_length_returns_the_lengths_of_t5():
    assert text_length(512) == (568, 114)  # the values of T5's pretraining
    for source_length, density, mean_span in ((3, 0.15, 3.0), (100, 0.15, 3.0), (64, 0.5, 3.0), (77, 0.3, 1.0)):
        length, targets = text_length(source_length, density=density, mean_span=mean_span)
        batch = span_corruption.batch(
            np.full((2, length), 7), np.random.default_rng(0), first_sentinel=999, density=density, mean_span=mean_span
        )
        assert batch.targets.shape == (2, targets)
        assert batch.inputs["source"].shape[1] <= source_length
        longer = span_corruption.batch(
            np.full((1, length + 1), 7), np.random.default_rng(0), first_sentinel=999,
            density=density, mean_span=mean_span,
        )  # fmt: skip
        assert longer.inputs["source"].shape[1] > source_length


def test_a_batch_depends_only_on_texts_and_generator():
    texts = np.random.default_rng(0).integers(2, 150, (3, 60)).astype(np.int32)
    batch, same_seed, other_seed = (
        span_corruption.batch(texts, np.random.default_rng(seed), first_sentinel=299) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(batch.targets, same_seed.targets)
    np.testing.assert_array_equal(batch.inputs["source"], same_seed.inputs["source"])
    assert not np.array_equal(batch.targets, other_seed.targets)
    assert batch.tokens.dtype == batch.targets.dtype == batch.inputs["source"].dtype == np.int32


def test_invalid_input_raises_errors():
    rng, text = np.random.default_rng(0), np.arange(10, 50)
    with pytest.raises(ValueError, match=r"density=1.0 must be between 0 and 1"):
        removal_mask(10, rng, density=1.0)
    with pytest.raises(ValueError, match=r"mean_span=0.5 must be at least 1"):
        removal_mask(10, rng, mean_span=0.5)
    with pytest.raises(ValueError, match="a text of 1 tokens cannot be corrupted"):
        removal_mask(1, rng)
    with pytest.raises(ValueError, match="20 spans need 20 sentinels, but num_sentinels=5"):
        corrupt(text, np.arange(40) % 2 == 1, first_sentinel=99, end_id=1, num_sentinels=5)
    with pytest.raises(ValueError, match="100 sentinels with descending ids from 60 need negative ids"):
        corrupt(text, np.arange(40) == 5, first_sentinel=60, end_id=1)
    with pytest.raises(ValueError, match="the text contains sentinels, ids 45 to 60"):
        corrupt(text, np.arange(40) == 5, first_sentinel=60, end_id=1, num_sentinels=16)
    with pytest.raises(ValueError, match="begin with a token that is kept"):
        corrupt(text, np.arange(40) == 0, first_sentinel=99, end_id=1)
    with pytest.raises(ValueError, match="mask has dtype int64: pass a boolean array"):
        corrupt(text, (np.arange(40) == 5).astype(np.int64), first_sentinel=99, end_id=1)
    with pytest.raises(ValueError, match="source_length=2 is too short"):
        text_length(2)
    with pytest.raises(ValueError, match="a text without tokens cannot be corrupted"):
        corrupt(text[:0], np.zeros(0, bool), first_sentinel=99, end_id=1)
    with pytest.raises(ValueError, match="the text has values outside int32"):
        corrupt(text.astype(np.int64) + 2**40, np.arange(40) == 5, first_sentinel=199, end_id=1)
    with pytest.raises(TypeError, match="Cannot cast"):
        corrupt(text.astype(float), np.arange(40) == 5, first_sentinel=199, end_id=1)
    for shape in ((40,), (0, 40)):
        with pytest.raises(ValueError, match=rf"texts must be \[batch, time\] with .* row, got \{list(shape)}"):
            span_corruption.batch(np.ones(shape, int), rng, first_sentinel=99)

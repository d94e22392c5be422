"""The masked-token objective: selected tokens, their replacements, whole-word masking and the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import masked
from tests.objectives.stub import VOCAB, MeanModel, check_loss_and_gradient, random_tokens

V, CLS, SEP, MASK = 50, 1, 2, 3


def random_rows(rows=400, length=50, seed=0):
    """Return random tokens and segment ids. Rows are [CLS] ids [SEP], and every third row has padding at the end."""
    tokens = np.random.default_rng(seed).integers(5, V, (rows, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    segments = np.ones((rows, length), np.int32)
    segments[::3, -7:] = 0
    return tokens, segments


def masked_batch(tokens, rng, *, segment_ids=None, word_ids=None, inputs=None, **config):
    """``masked.batch`` with the fields of its config as keyword arguments."""
    config = masked.MaskingConfig(**config)
    return masked.batch(tokens, rng, config, segment_ids=segment_ids, word_ids=word_ids, inputs=inputs)


def masked_text(seed=0, **options):
    tokens, segments = random_rows()
    rng = np.random.default_rng(seed)
    batch = masked_batch(
        tokens, rng, mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments, **options
    )
    return tokens, segments, batch


def replacement_fractions(tokens, batch):
    """Return the fractions of selected tokens that became the mask, became another id, and did not change."""
    selected = batch.weights > 0
    inputs, original = batch.tokens[selected], tokens[selected]
    return np.array(
        [np.mean(inputs == MASK), np.mean((inputs != MASK) & (inputs != original)), np.mean(inputs == original)]
    )


def random_word_ids(rows, length, seed=1):
    """Return ids of words with random lengths."""
    is_word_start = np.random.default_rng(seed).random((rows, length)) < 0.5
    return np.cumsum(is_word_start, axis=1)


def test_15_percent_are_selected_and_become_mask_random_or_unchanged():
    tokens, segments, batch = masked_text()
    candidates = (segments > 0) & ~np.isin(tokens, [CLS, SEP])
    n = candidates.sum()
    rate = batch.weights.sum() / n
    assert abs(rate - 0.15) < 4 * np.sqrt(0.15 * 0.85 / n)
    # A random id is the mask, or the token itself, with probability 1 / V each.
    expected = np.array([0.8 + 0.1 / V, 0.1 * (V - 2) / V, 0.1 + 0.1 / V])
    assert np.abs(replacement_fractions(tokens, batch) - expected).max() < 4 * np.sqrt(0.16 / (0.15 * n))
    replaced = batch.tokens[(batch.weights > 0) & (batch.tokens != MASK) & (batch.tokens != tokens)]
    assert (replaced.min(), replaced.max()) == (0, V - 1)  # random ids are from the entire vocabulary


def test_tokens_that_are_not_selected_or_special_do_not_change():
    tokens, segments, batch = masked_text(rate=0.9)
    assert batch.tokens.dtype == np.int32
    assert batch.weights.dtype == np.float32
    assert np.array_equal(batch.targets, tokens)
    assert np.array_equal(batch.tokens[batch.weights == 0], tokens[batch.weights == 0])
    assert not batch.weights[np.isin(tokens, [CLS, SEP]) | (segments == 0)].any()
    assert batch.segment_ids is segments


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_the_dtype_of_the_tokens_does_not_change_the_batch(dtype):
    tokens = random_rows(rows=4)[0]
    config = {"mask_id": 40_000, "vocab_size": 50_000}
    batches = [masked_batch(rows, np.random.default_rng(0), **config) for rows in (tokens, tokens.astype(dtype))]
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(getattr(batches[1], name), getattr(batches[0], name), strict=True)
    assert (batches[1].tokens == 40_000).any()


def test_mask_tokens_of_the_text_are_not_predicted():
    batch = masked_batch(np.full((2, 40), MASK), np.random.default_rng(0), mask_id=MASK, vocab_size=V, rate=1.0)
    assert not batch.weights.any()


def test_the_selection_depends_on_the_generator():
    batch, same_seed, other_seed = (masked_text(seed)[2] for seed in ([7, 0], [7, 0], [7, 1]))
    assert np.array_equal(batch.tokens, same_seed.tokens)
    assert np.array_equal(batch.weights, same_seed.weights)
    overlap = np.mean((batch.weights > 0) & (other_seed.weights > 0)) / np.mean(batch.weights > 0)
    assert abs(overlap - 0.15) < 0.03  # the selections are independent


def test_replacement_fractions_can_be_0_or_1():
    tokens, _, batch = masked_text(mask_fraction=1.0, random_fraction=0.0)
    assert np.array_equal(replacement_fractions(tokens, batch), [1, 0, 0])
    tokens, _, batch = masked_text(mask_fraction=0.0, random_fraction=0.0)
    assert np.array_equal(replacement_fractions(tokens, batch), [0, 0, 1])


def test_complete_words_of_any_length_are_selected():
    tokens, segments = random_rows()
    words = random_word_ids(*tokens.shape)
    _, _, batch = masked_text(word_ids=words)
    selected, lengths = [], []
    for row in range(len(tokens)):  # iterate over the words of the row
        begin = 0
        while begin < tokens.shape[1]:
            if segments[row, begin] == 0 or tokens[row, begin] in (CLS, SEP):
                assert batch.weights[row, begin] == 0
                begin += 1
                continue
            end = begin + 1
            while (
                end < tokens.shape[1]
                and words[row, end] == words[row, begin]
                and segments[row, end] > 0
                and tokens[row, end] not in (CLS, SEP)
            ):
                end += 1
            assert len(set(batch.weights[row, begin:end])) == 1
            selected.append(batch.weights[row, begin])
            lengths.append(end - begin)
            begin = end
    selected, lengths = np.array(selected), np.array(lengths)
    for subset in (lengths == 1, lengths == 2, lengths > 2):
        assert abs(selected[subset].mean() - 0.15) < 4 * np.sqrt(0.1275 / subset.sum())
    # Each token of a word is replaced independently.
    assert np.abs(replacement_fractions(tokens, batch) - [0.8, 0.1, 0.1]).max() < 0.03


def test_words_end_at_special_tokens_and_documents():
    tokens = np.array([[7, 7, CLS, 7, 7, 7, 7, 7]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    weights = [
        masked_batch(
            tokens, np.random.default_rng(seed), mask_id=MASK, vocab_size=V, special_ids=[CLS], segment_ids=segments,
            word_ids=np.zeros_like(tokens), rate=0.5,
        ).weights[0]
        for seed in range(40)
    ]  # fmt: skip
    patterns = {tuple(row.astype(int).tolist()) for row in weights}
    assert patterns == {(a, a, 0, b, c, c, 0, 0) for a in (0, 1) for b in (0, 1) for c in (0, 1)}


def test_loss_is_the_cross_entropy_of_selected_tokens():
    model = MeanModel(VOCAB)
    tokens = random_tokens(2, 9)
    types = {"token_types": np.tile((np.arange(9) > 4).astype(np.int32), (2, 1))}
    batch = masked_batch(tokens, np.random.default_rng(3), mask_id=MASK, vocab_size=VOCAB, inputs=types, rate=0.4)
    assert 0 < batch.weights.sum() < batch.weights.size

    def reference(params):
        logits = model.logits(params, model.apply(params, batch.tokens, **types)[0])
        return jnp.sum(cross_entropy(logits, tokens) * batch.weights)

    assert (
        check_loss_and_gradient(lambda p: masked.loss(model, p, batch), reference, model.init()) == batch.weights.sum()
    )


def test_num_predict_selects_a_fixed_number_of_distinct_positions():
    tokens, segments, batch = masked_text(num_predict=7)
    assert batch.targets.shape == batch.weights.shape == batch.target_positions.shape == (len(tokens), 7)
    assert batch.weights.all()
    assert np.array_equal(batch.targets, np.take_along_axis(tokens, batch.target_positions, axis=1))
    assert np.all(np.diff(batch.target_positions, axis=1) > 0)
    is_candidate = (segments > 0) & ~np.isin(tokens, [CLS, SEP])
    assert np.take_along_axis(is_candidate, batch.target_positions, axis=1).all()
    not_selected = np.ones(tokens.shape, bool)
    np.put_along_axis(not_selected, batch.target_positions, False, axis=1)
    assert np.array_equal(batch.tokens[not_selected], tokens[not_selected])
    inputs = np.take_along_axis(batch.tokens, batch.target_positions, axis=1)
    assert abs(np.mean(inputs == MASK) - 0.802) < 0.04
    # Every position is selected equally often: 7 of 48 positions in rows without padding.
    frequency = (
        np.bincount(batch.target_positions[segments[:, -1] > 0].ravel(), minlength=50)[1:-1]
        / (segments[:, -1] > 0).sum()
    )
    assert abs(frequency.mean() - 7 / 48) < 1e-9
    assert np.abs(frequency - 7 / 48).max() < 5 * np.sqrt(7 / 48 / 266)


def test_num_predict_selects_complete_words_and_pads_with_weight_0():
    tokens = np.array([[CLS, 7, 7, 7, 8, 9, 9, SEP]])
    words = np.array([[0, 1, 1, 1, 2, 3, 3, 4]])
    options = {"mask_id": MASK, "vocab_size": V, "special_ids": (CLS, SEP), "word_ids": words}
    selections = set()
    for seed in range(40):
        batch = masked_batch(tokens, np.random.default_rng(seed), num_predict=2, **options)
        selections.add(tuple(batch.target_positions[0, batch.weights[0] > 0].tolist()))
        assert batch.weights.shape == (1, 2)
    # Only words of 1 or 2 tokens fit. After the word at position 4, there is no second word of 1 token.
    assert selections == {(4,), (5, 6)}
    all_selected = masked_batch(tokens, np.random.default_rng(0), num_predict=8, **options)
    assert all_selected.target_positions[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert all_selected.weights[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_loss_at_target_positions_equals_the_loss_with_weights_at_all_positions():
    model = MeanModel(VOCAB)
    tokens = random_tokens(3, 9)
    batch = masked_batch(tokens, np.random.default_rng(3), mask_id=2, vocab_size=VOCAB, num_predict=4)
    weights = np.zeros(tokens.shape, np.float32)
    np.put_along_axis(weights, batch.target_positions, batch.weights, axis=1)
    all_positions = batch.replace(targets=tokens, weights=weights, target_positions=None)
    total = check_loss_and_gradient(
        lambda p: masked.loss(model, p, batch), lambda p: masked.loss(model, p, all_positions)[0], model.init()
    )
    assert total == batch.weights.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_id": V}, "mask_id: id 50 is outside the vocabulary of 50 ids"),
        ({"special_ids": (0, -1)}, "special_ids: id -1 is outside"),
        ({"vocab_size": 20}, "tokens: id .* is outside the vocabulary of 20 ids"),
        ({"segment_ids": np.ones((2, 7), np.int32)}, r"segment_ids \[2, 7\] must have the shape of tokens \[2, 8\]"),
        ({"word_ids": np.ones((2, 7), np.int32)}, r"word_ids \[2, 7\] must have the shape of tokens \[2, 8\]"),
        ({"rate": 0.0}, r"rate=0.0 must be in \(0, 1\]"),
        ({"num_predict": 0}, "num_predict=0 must be from 1 to the 8 tokens of a row"),
        ({"num_predict": 9}, "num_predict=9 must be from 1 to the 8 tokens of a row"),
        ({"num_predict": 3, "rate": 0.2}, "num_predict=3 and rate=0.2 exclude each other"),
        ({"mask_fraction": 0.95}, "mask_fraction=0.95 and random_fraction=0.1 must be at least 0, and their sum"),
        ({"random_fraction": -0.1}, "mask_fraction=0.8 and random_fraction=-0.1 must be at least 0"),
    ],
)
def test_invalid_input_raises_errors(change, message):
    options = {"mask_id": MASK, "vocab_size": V, **change}
    with pytest.raises(ValueError, match=message):
        masked_batch(np.full((2, 8), 30), np.random.default_rng(0), **options)


def test_rows_may_be_empty():
    batch = masked_batch(np.zeros((2, 0), np.int32), np.random.default_rng(0), mask_id=MASK, vocab_size=V)
    assert batch.tokens.shape == batch.weights.shape == (2, 0)


def test_tokens_must_be_rows_of_integers():
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[batch, time\]"):
        masked_batch(np.ones((2, 8)), np.random.default_rng(0), mask_id=MASK, vocab_size=V)


class _FakeTokenizer:
    """A fake tokenizer with the attributes that the collator of ``transformers`` needs."""

    mask_token, mask_token_id, is_fast = "[MASK]", MASK, True
    __len__ = lambda self: V  # noqa: E731
    convert_tokens_to_ids = lambda self, token: MASK  # noqa: E731


@pytest.mark.live
def test_statistics_equal_those_of_transformers():
    from transformers import DataCollatorForLanguageModeling

    tokens, segments = random_rows(rows=1500)
    special = np.isin(tokens, [CLS, SEP]) | (segments == 0)
    collator = DataCollatorForLanguageModeling(_FakeTokenizer(), mlm_probability=0.15, return_tensors="np", seed=1)
    collator.create_rng()
    hf_tokens, labels = collator.numpy_mask_tokens(tokens.copy(), special_tokens_mask=special.astype(int))
    batch = masked_batch(
        tokens, np.random.default_rng(2), mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments
    )
    assert np.array_equal(np.unique(labels[special]), [-100])
    assert abs(np.mean(labels != -100) - batch.weights.mean()) < 0.005
    hf_fractions = replacement_fractions(tokens, batch.replace(tokens=hf_tokens, weights=labels != -100))
    assert np.abs(hf_fractions - replacement_fractions(tokens, batch)).max() < 0.02


@pytest.mark.live
def test_whole_word_selection_agrees_with_transformers():
    from transformers import DataCollatorForLanguageModeling

    tokens, segments = random_rows()
    special = np.isin(tokens, [CLS, SEP]) | (segments == 0)
    words = random_word_ids(*tokens.shape)
    batch = masked_batch(
        tokens, np.random.default_rng(0), mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments,
        word_ids=words,
    )  # fmt: skip
    hf_word_ids = np.where(special, -1, words + 1)
    for row in hf_word_ids:  # transformers needs different ids for different words
        assert (np.diff(row[row >= 0]) >= 0).all()
    # Transformers selects all tokens of a word if one is selected. This changes nothing here.
    hf_mask = DataCollatorForLanguageModeling._whole_word_mask(hf_word_ids, batch.weights > 0)
    assert np.array_equal(hf_mask, batch.weights > 0)

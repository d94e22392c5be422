import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import masked
from tests.objectives.stub import VOCAB, Bag, compare, random_tokens

V, CLS, SEP, MASK = 50, 1, 2, 3


def text(rows=400, length=50, seed=0):
    """Ids 5.. between [CLS] and [SEP], with padding behind some rows."""
    tokens = np.random.default_rng(seed).integers(5, V, (rows, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    segments = np.ones((rows, length), np.int32)
    segments[::3, -7:] = 0
    return tokens, segments


def masked_text(seed=0, **options):
    tokens, segments = text()
    rng = np.random.default_rng(seed)
    batch = masked.batch(
        tokens, rng, mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments, **options
    )
    return tokens, segments, batch


def fates(tokens, batch):
    """Of the chosen tokens, the shares that are read as mask, as another id and as they are."""
    chosen = batch.weights > 0
    read, real = batch.tokens[chosen], tokens[chosen]
    return np.array([np.mean(read == MASK), np.mean((read != MASK) & (read != real)), np.mean(read == real)])


def words_of(rows, length, seed=1):
    """Word ids: words of 1 to 4 tokens."""
    begins = np.random.default_rng(seed).random((rows, length)) < 0.5
    return np.cumsum(begins, axis=1)


def test_fifteen_per_cent_are_chosen_and_become_mask_random_or_themselves():
    tokens, segments, batch = masked_text()
    candidates = (segments > 0) & ~np.isin(tokens, [CLS, SEP])
    n = candidates.sum()
    rate = batch.weights.sum() / n
    assert abs(rate - 0.15) < 4 * np.sqrt(0.15 * 0.85 / n)
    # A random id is the mask, or the token itself, once in V.
    expected = np.array([0.8 + 0.1 / V, 0.1 * (V - 2) / V, 0.1 + 0.1 / V])
    assert np.abs(fates(tokens, batch) - expected).max() < 4 * np.sqrt(0.16 / (0.15 * n))
    replaced = batch.tokens[(batch.weights > 0) & (batch.tokens != MASK) & (batch.tokens != tokens)]
    assert (replaced.min(), replaced.max()) == (0, V - 1)  # from the whole vocabulary


def test_what_is_not_chosen_and_what_is_special_stays():
    tokens, segments, batch = masked_text(rate=0.9)
    assert batch.tokens.dtype == np.int32
    assert batch.weights.dtype == np.float32
    assert np.array_equal(batch.targets, tokens)
    assert np.array_equal(batch.tokens[batch.weights == 0], tokens[batch.weights == 0])
    assert not batch.weights[np.isin(tokens, [CLS, SEP]) | (segments == 0)].any()
    assert batch.segment_ids is segments


def test_a_mask_in_the_text_is_not_predicted():
    batch = masked.batch(np.full((2, 40), MASK), np.random.default_rng(0), mask_id=MASK, vocab_size=V, rate=1.0)
    assert not batch.weights.any()


def test_the_generator_decides_so_that_epochs_may_differ():
    first, again, other = (masked_text(seed)[2] for seed in ([7, 0], [7, 0], [7, 1]))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.weights, again.weights)
    both = np.mean((first.weights > 0) & (other.weights > 0)) / np.mean(first.weights > 0)
    assert abs(both - 0.15) < 0.03  # independent: what was chosen once is chosen again as any other


def test_shares_can_be_all_or_nothing():
    tokens, _, batch = masked_text(masked=1.0, random=0.0)
    assert np.array_equal(fates(tokens, batch), [1, 0, 0])
    tokens, _, batch = masked_text(masked=0.0, random=0.0)
    assert np.array_equal(fates(tokens, batch), [0, 0, 1])


def test_words_are_chosen_whole_whatever_their_length():
    tokens, segments = text()
    words = words_of(*tokens.shape)
    _, _, batch = masked_text(word_ids=words)
    chosen, lengths = [], []
    for row in range(len(tokens)):  # literally: walk along the row, word by word
        at = 0
        while at < tokens.shape[1]:
            if segments[row, at] == 0 or tokens[row, at] in (CLS, SEP):
                assert batch.weights[row, at] == 0
                at += 1
                continue
            end = at + 1
            while (
                end < tokens.shape[1]
                and words[row, end] == words[row, at]
                and segments[row, end] > 0
                and tokens[row, end] not in (CLS, SEP)
            ):
                end += 1
            assert len(set(batch.weights[row, at:end])) == 1
            chosen.append(batch.weights[row, at])
            lengths.append(end - at)
            at = end
    chosen, lengths = np.array(chosen), np.array(lengths)
    for some in (lengths == 1, lengths == 2, lengths > 2):
        assert abs(chosen[some].mean() - 0.15) < 4 * np.sqrt(0.1275 / some.sum())
    # The parts of one word are replaced one by one.
    assert np.abs(fates(tokens, batch) - [0.8, 0.1, 0.1]).max() < 0.03


def test_words_end_at_special_tokens_and_documents():
    tokens = np.array([[7, 7, CLS, 7, 7, 7, 7, 7]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    weights = [
        masked.batch(
            tokens, np.random.default_rng(seed), mask_id=MASK, vocab_size=V, special_ids=[CLS], segment_ids=segments,
            word_ids=np.zeros_like(tokens), rate=0.5,
        ).weights[0]
        for seed in range(40)
    ]  # fmt: skip
    patterns = {tuple(row.astype(int).tolist()) for row in weights}
    assert patterns == {(a, a, 0, b, c, c, 0, 0) for a in (0, 1) for b in (0, 1) for c in (0, 1)}


def test_loss_counts_the_chosen_places_and_its_gradient_is_theirs():
    model = Bag(VOCAB)
    tokens = random_tokens(2, 9)
    types = {"token_types": np.tile((np.arange(9) > 4).astype(np.int32), (2, 1))}
    batch = masked.batch(tokens, np.random.default_rng(3), mask_id=MASK, vocab_size=VOCAB, inputs=types, rate=0.4)
    assert 0 < batch.weights.sum() < batch.weights.size

    def literal(params):
        logits = model.logits(params, model.apply(params, batch.tokens, **types)[0])
        return jnp.sum(cross_entropy(logits, tokens) * batch.weights)

    assert compare(lambda p: masked.loss(model, p, batch), literal, model.init()) == batch.weights.sum()


def test_a_fixed_number_is_predicted_at_places_of_its_own():
    tokens, segments, batch = masked_text(num_predict=7)
    assert batch.targets.shape == batch.weights.shape == batch.target_positions.shape == (len(tokens), 7)
    assert batch.weights.all()
    assert np.array_equal(batch.targets, np.take_along_axis(tokens, batch.target_positions, axis=1))
    assert np.all(np.diff(batch.target_positions, axis=1) > 0)
    ordinary = (segments > 0) & ~np.isin(tokens, [CLS, SEP])
    assert np.take_along_axis(ordinary, batch.target_positions, axis=1).all()
    unchosen = np.ones(tokens.shape, bool)
    np.put_along_axis(unchosen, batch.target_positions, False, axis=1)
    assert np.array_equal(batch.tokens[unchosen], tokens[unchosen])
    read = np.take_along_axis(batch.tokens, batch.target_positions, axis=1)
    assert abs(np.mean(read == MASK) - 0.802) < 0.04
    # Every place of a row is chosen equally often: 7 of 48 without padding.
    often = (
        np.bincount(batch.target_positions[segments[:, -1] > 0].ravel(), minlength=50)[1:-1]
        / (segments[:, -1] > 0).sum()
    )
    assert abs(often.mean() - 7 / 48) < 1e-9
    assert np.abs(often - 7 / 48).max() < 5 * np.sqrt(7 / 48 / 266)


def test_a_fixed_number_keeps_words_whole_and_fills_up_with_weight_0():
    tokens = np.array([[CLS, 7, 7, 7, 8, 9, 9, SEP]])
    words = np.array([[0, 1, 1, 1, 2, 3, 3, 4]])
    options = {"mask_id": MASK, "vocab_size": V, "special_ids": (CLS, SEP), "word_ids": words}
    found = set()
    for seed in range(40):
        batch = masked.batch(tokens, np.random.default_rng(seed), num_predict=2, **options)
        found.add(tuple(batch.target_positions[0, batch.weights[0] > 0].tolist()))
        assert batch.weights.shape == (1, 2)
    assert found == {(4,), (5, 6)}  # the word of three does not fit; 4 leaves room for one more, but no word of one
    everything = masked.batch(tokens, np.random.default_rng(0), num_predict=8, **options)
    assert everything.target_positions[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert everything.weights[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_loss_at_places_is_that_of_all_places_with_the_same_weights():
    model = Bag(VOCAB)
    tokens = random_tokens(3, 9)
    batch = masked.batch(tokens, np.random.default_rng(3), mask_id=2, vocab_size=VOCAB, num_predict=4)
    weights = np.zeros(tokens.shape, np.float32)
    np.put_along_axis(weights, batch.target_positions, batch.weights, axis=1)
    everywhere = batch.replace(targets=tokens, weights=weights, target_positions=None)
    total = compare(
        lambda p: masked.loss(model, p, batch), lambda p: masked.loss(model, p, everywhere)[0], model.init()
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
        ({"masked": 0.95}, "masked=0.95 and random=0.1 must be at least 0, and their sum at most 1"),
        ({"random": -0.1}, "masked=0.8 and random=-0.1 must be at least 0"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"mask_id": MASK, "vocab_size": V, **change}
    with pytest.raises(ValueError, match=message):
        masked.batch(np.full((2, 8), 30), np.random.default_rng(0), **options)


def test_tokens_must_be_rows_of_integers():
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[batch, time\]"):
        masked.batch(np.ones((2, 8)), np.random.default_rng(0), mask_id=MASK, vocab_size=V)


class _Tokenizer:
    """As much of a tokenizer as the collator of ``transformers`` asks for."""

    mask_token, mask_token_id, is_fast = "[MASK]", MASK, True
    __len__ = lambda self: V  # noqa: E731
    convert_tokens_to_ids = lambda self, token: MASK  # noqa: E731


@pytest.mark.live
def test_statistics_are_those_of_transformers():
    from transformers import DataCollatorForLanguageModeling

    tokens, segments = text(rows=1500)
    special = np.isin(tokens, [CLS, SEP]) | (segments == 0)
    collator = DataCollatorForLanguageModeling(_Tokenizer(), mlm_probability=0.15, return_tensors="np", seed=1)
    collator.create_rng()
    theirs, labels = collator.numpy_mask_tokens(tokens.copy(), special_tokens_mask=special.astype(int))
    ours = masked.batch(
        tokens, np.random.default_rng(2), mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments
    )
    assert np.array_equal(np.unique(labels[special]), [-100])
    assert abs(np.mean(labels != -100) - ours.weights.mean()) < 0.005
    their_fates = fates(tokens, ours.replace(tokens=theirs, weights=labels != -100))
    assert np.abs(their_fates - fates(tokens, ours)).max() < 0.02


@pytest.mark.live
def test_words_are_chosen_as_transformers_chooses_them():
    from transformers import DataCollatorForLanguageModeling

    tokens, segments = text()
    special = np.isin(tokens, [CLS, SEP]) | (segments == 0)
    words = words_of(*tokens.shape)
    ours = masked.batch(
        tokens, np.random.default_rng(0), mask_id=MASK, vocab_size=V, special_ids=(CLS, SEP), segment_ids=segments,
        word_ids=words,
    )  # fmt: skip
    numbers = np.where(special, -1, words + 1)
    for row in numbers:  # their ids are distinct for what a special token divides
        assert (np.diff(row[row >= 0]) >= 0).all()
    # If any token of a word is ours, all are: their function changes nothing.
    spread = DataCollatorForLanguageModeling._whole_word_mask(numbers, ours.weights > 0)
    assert np.array_equal(spread, ours.weights > 0)

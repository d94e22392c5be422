"""Synthetic tasks: each target is computed again, by another method, from the tokens of the batch."""

import itertools

import numpy as np
import pytest

from jaxlm.tasks import synthetic


def rng(seed=0):
    return np.random.default_rng(seed)


def test_recall_asks_for_the_value_after_the_first_occurrence_of_each_key():
    batch = synthetic.recall(rng(), 50, 32, 6, vocab_size=100)
    assert batch.tokens.shape == (50, 32)
    for tokens, targets, positions in zip(batch.tokens, batch.targets, batch.target_positions, strict=True):
        pairs = dict(zip(tokens[0:12:2], tokens[1:12:2], strict=True))
        assert len(pairs) == 6 == len(set(positions))
        assert [pairs[tokens[p]] for p in positions] == list(targets)
        assert all(1 <= key < 50 <= value < 100 for key, value in pairs.items())
        assert min(positions) >= 12
        assert set(positions % 2) == {0}


def test_gaps_of_recall_follow_the_power_law():
    batch = synthetic.recall(rng(), 4000, 32, 1, vocab_size=64)
    gaps = (batch.target_positions[:, 0] - 2) // 2
    expected = np.arange(1, 16) ** -0.99
    counts = np.bincount(gaps, minlength=15)
    chi_square = np.sum((counts - 4000 * expected / expected.sum()) ** 2 / (4000 * expected / expected.sum()))
    assert chi_square < 36.1  # 99.9 % quantile of 14 degrees of freedom
    uniform = synthetic.recall(rng(), 4000, 32, 1, vocab_size=64, power=1.0)
    assert np.ptp(np.bincount((uniform.target_positions[:, 0] - 2) // 2)) < 120


def modular_value(symbols):
    return eval("".join("01234+-*"[symbol] for symbol in symbols)) % 5


ANSWERS = {
    "even_pairs": lambda x: [int(x[0] != x[-1])],  # the number of neighbours that differ is even if both ends are equal
    "modular_arithmetic": lambda x: [modular_value(x)],
    "parity": lambda x: [x.tolist().count(1) % 2],
    "cycle_navigation": lambda x: [(x.tolist().count(2) - x.tolist().count(0)) % 5],
    "reverse_string": lambda x: list(reversed(x)),
    "bucket_sort": lambda x: sorted(x),
}


@pytest.mark.parametrize("name", sorted(synthetic.FORMAL_LANGUAGES))
@pytest.mark.parametrize("length", [1, 2, 9])
def test_answers_of_formal_languages(name, length):
    """Targets, their positions and their weights follow from the symbols of each row."""
    language = synthetic.FORMAL_LANGUAGES[name]
    batch = synthetic.formal_language(name, rng(), 40, length, padded_length=12)
    real = (batch.segment_ids > 0).sum(axis=1)
    for tokens, count, targets, positions, weights in zip(
        batch.tokens, real, batch.targets, batch.target_positions, batch.weights, strict=True
    ):
        expected = ANSWERS[name](tokens[: count - int(weights.sum())])
        assert list(targets[weights > 0]) == expected
        assert list(positions[weights > 0]) == list(range(count - len(expected), count))
        assert set(tokens[positions[weights > 0]]) == {language.num_symbols}
        assert max(expected) < language.num_answers
    other = synthetic.formal_language(name, rng(), 40, 12, padded_length=12)
    assert other.tokens.shape == batch.tokens.shape
    assert other.targets.shape == batch.targets.shape


@pytest.mark.parametrize(("group", "order"), [("S5", 120), ("A5", 60), ("Z60", 60), ("Z2", 2)])
def test_multiplication_tables_are_groups(group, order):
    table = synthetic.multiplication_table(group)
    assert table.shape == (order, order)
    everything = np.arange(order)
    assert np.array_equal(table[0], everything)
    assert np.array_equal(table[:, 0], everything)
    assert all(sorted(row) == list(everything) for row in (*table, *table.T))
    a, b, c = rng().integers(0, order, (3, 500))
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert np.array_equal(table, table.T) == (group in ("Z60", "Z2"))


def test_products_of_word_problems():
    """Each target is the product of the group elements up to its position."""
    batch = synthetic.word_problem("S5", rng(), 5, 8)
    permutations = list(itertools.permutations(range(5)))
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        things = list(range(5))
        for token, target in zip(tokens, targets, strict=True):
            things = [permutations[token][thing] for thing in things]
            assert permutations[target] == tuple(things)
    parity = synthetic.word_problem("Z2", rng(), 5, 8)
    assert np.array_equal(parity.targets, np.cumsum(parity.tokens, axis=1) % 2)


def test_word_problems_with_some_elements():
    """``elements`` limits the tokens, for example to the transpositions of S5."""
    assert np.array_equal(np.bincount(synthetic.moved_points("S5")), [1, 0, 10, 20, 45, 44])
    assert np.array_equal(np.bincount(synthetic.moved_points("A5")), [1, 0, 0, 20, 15, 24])
    swaps = np.flatnonzero(synthetic.moved_points("S5") == 2)
    tokens = synthetic.word_problem("S5", rng(), 50, 8, elements=swaps).tokens
    assert set(tokens.ravel()) == set(swaps)
    table = synthetic.multiplication_table("S5")
    assert all(table[swap, swap] == 0 for swap in swaps)  # a transposition is its own inverse


def test_copying_and_induction():
    """Copying asks for the first half of a row, induction for the token after the first marker."""
    batch = synthetic.copying(rng(), 6, 10, vocab_size=9)
    assert batch.tokens.shape == (6, 20)
    assert set(batch.tokens[:, 10]) == {8}
    assert np.array_equal(batch.targets, batch.tokens[:, :10])
    assert np.array_equal(batch.tokens[:, 11:], batch.targets[:, :-1])
    batch = synthetic.induction(rng(), 200, 7)
    for tokens, target in zip(batch.tokens, batch.targets, strict=True):
        first, last = np.flatnonzero(tokens == 15)
        assert last == 6
        assert tokens[first + 1] == target[0]
    assert set(np.argmax(batch.tokens == 15, axis=1)) == set(range(5))


def test_needle_asks_for_the_number_after_the_marker():
    text = rng(3).integers(0, 20, 100).astype(np.int8)  # the marker exceeds int8 if vocab_size is above 117
    batch = synthetic.needle(rng(), 300, 12, text, vocab_size=20)
    assert batch.tokens.shape == (300, 12)
    assert batch.target_positions[0].tolist() == [8, 9, 10, 11]
    for tokens, number in zip(batch.tokens, batch.targets, strict=True):
        first, last = np.flatnonzero(tokens == 30)
        assert last == 8
        assert np.array_equal(tokens[first + 1 : first + 5], number)
        assert np.array_equal(tokens[9:], number[:3])
        # The other tokens are a window of the text.
        window = np.where(tokens < 20, tokens, -1)
        assert any(all(w in (-1, t) for w, t in zip(window, text[s : s + 12], strict=True)) for s in range(88))
    assert set(np.argmax(batch.tokens == 30, axis=1)) == set(range(4))
    assert set(batch.targets.ravel()) == set(range(20, 30))


def test_equal_seeds_give_equal_batches():
    first, second, other = (synthetic.recall(rng(seed), 3, 16, 2, vocab_size=64).tokens for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.recall(rng(), 1, 15, 2), r"length=15 must be even and at least 4 \* pairs=8"),
        (lambda: synthetic.recall(rng(), 1, 16, 5), r"length=16 must be even and at least 4 \* pairs=20"),
        (lambda: synthetic.recall(rng(), 1, 64, 4, vocab_size=64), "vocab_size=64 must exceed length=64"),
        (lambda: synthetic.formal_language("anbn", rng(), 1, 3, 4), "name='anbn' is unknown: choose from even_pairs"),
        (lambda: synthetic.formal_language("parity", rng(), 1, 5, 4), "length=5 must be at least 1 and at most"),
        (lambda: synthetic.word_problem("S6", rng(), 1, 4), "group='S6' is unknown: choose from S5"),
        (lambda: synthetic.word_problem("Z2", rng(), 1, 4, elements=[2]), r"elements=\[2\] must be ids from 0 to 1"),
        (lambda: synthetic.word_problem("Z2", rng(), 1, 4, elements=[]), r"elements=\[\] must be ids from 0 to 1"),
        (lambda: synthetic.word_problem("Z2", rng(), 1, 0), "length=0 must be at least 1"),
        (lambda: synthetic.copying(rng(), 1, 0), "length=0 must be at least 1"),
        (lambda: synthetic.copying(rng(), 1, 4, vocab_size=1), "vocab_size=1 must be at least 2"),
        (lambda: synthetic.induction(rng(), 1, 4, vocab_size=1), "vocab_size=1 must be at least 2"),
        (lambda: synthetic.moved_points("Z60"), "group='Z60' is not a group of permutations: choose from S5, A5"),
        (lambda: synthetic.induction(rng(), 1, 2), "length=2 must be at least 3"),
        (lambda: synthetic.needle(rng(), 1, 8, np.zeros(50), vocab_size=2), "length=8 must be at least 9"),
        (lambda: synthetic.needle(rng(), 1, 9, np.zeros(9), vocab_size=2), "the text has 9 tokens: it must be longer"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.nn.attention.mask import Mask, keep
from jaxlm.objectives import permutation
from tests.helpers import add_noise, relative_error, tiny_model
from tests.objectives.permutation_oracle import CLS, SEP, dense_masks, join_parts, local_perm, sample_mask

SMALL = {"reuse_length": 12, "permutation_length": 6, "num_predict": 8}


def windows(rows=4, length=33, seed=0):  # 12 of the first part, 24 - 3 of the second
    return np.random.default_rng(seed).integers(10, 90, (rows, length)).astype(np.int32)


def parts_of(batch, row, reuse=12):
    """(tokens, which are predicted) of each part of a row."""
    tokens = batch.tokens[row]
    predicted = np.zeros(len(tokens), bool)
    predicted[batch.inputs["targets"][row][batch.weights[row] > 0]] = True
    return (tokens[:reuse], predicted[:reuse]), (tokens[reuse:], predicted[reuse:])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reverse", [False, True])
def test_spans_are_those_of_the_authors_code(seed, reverse):
    """Drawn for draw: also where its inner loop counts tokens while it means words."""
    rng = np.random.default_rng(seed)
    length, goal, starts = int(rng.integers(8, 90)), int(rng.integers(1, 9)), None
    starts = rng.random(length) < (1.0 if seed % 3 == 0 else 0.6)
    alpha, beta = ((6, 1), (5, 2), (2, 2))[seed % 3]
    want = sample_mask(starts, goal, np.random.default_rng(seed), alpha, beta, reverse=reverse)
    step = -1 if reverse else 1
    got = permutation.span_mask(starts[::step], goal, np.random.default_rng(seed), alpha=alpha, beta=beta)[::step]
    assert np.array_equal(got, want)
    assert got.sum() == goal


def test_about_one_token_in_alpha_is_predicted_and_short_spans_prevail():
    rng = np.random.default_rng(0)
    # So many that the goal is out of reach of a pass over the tokens would be spread anywhere: ask for fewer.
    masks = np.stack([permutation.span_mask(np.ones(600, bool), 60, rng, alpha=6) for _ in range(200)])
    reached = np.array([np.flatnonzero(mask).max() for mask in masks])
    assert 60 / np.mean(reached) == pytest.approx(1 / 7, rel=0.1)  # a span has its 6 times as much room beside itself
    begins = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert masks.sum() / begins.sum() == pytest.approx(5 / (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5), rel=0.1)


@pytest.mark.parametrize("seed", range(6))
def test_orders_say_what_the_authors_dense_masks_say(seed):
    """Both streams: [T, T] masks of one row, from the literal algorithm on each part and their concatenation."""
    batch = permutation.batch(windows(), np.random.default_rng(seed), **SMALL)
    for row in range(4):
        orders, parts = batch.inputs["order"][row], []
        for start, (tokens, predicted) in zip((0, 12), parts_of(batch, row), strict=True):
            order = orders[start : start + len(tokens)] - (13 if start else 0)
            functional = (tokens == SEP) | (tokens == CLS)
            assert np.array_equal(order >= 0, predicted | functional)
            # The algorithm takes its random permutation from the row: any that agrees where it is looked at.
            shuffle = np.array([order[k::6].max() % 6 if order[k::6].max() >= 0 else -1 for k in range(6)])
            shuffle[shuffle < 0] = np.setdiff1d(np.arange(6), shuffle)
            parts.append(local_perm(tokens, np.append(tokens[1:], 0), predicted, 6, shuffle))
        perm_mask, answers, target_mask = join_parts(*parts)
        content, query = dense_masks(perm_mask)
        order_1T = orders[None]
        ours = Mask(causal=True, query_order=order_1T, key_order=order_1T)
        assert np.array_equal(np.asarray(keep(ours, 36, 36))[0], content == 0)
        ours = Mask(causal=True, query_order=order_1T - 1, key_order=order_1T)
        predicted = target_mask == 1
        assert np.array_equal(np.asarray(keep(ours, 36, 36))[0][predicted], (query == 0)[predicted])
        real = batch.weights[row] > 0
        assert np.array_equal(batch.inputs["targets"][row][real], np.flatnonzero(predicted))
        assert np.array_equal(batch.targets[row][real], answers[predicted])


def test_every_stretch_is_permuted_alike_and_only_within_itself():
    order = permutation.local_order(np.ones(12, bool), 4, np.random.default_rng(3))
    assert np.array_equal(order // 4, np.repeat([0, 1, 2], 4))
    assert np.array_equal(order[4:8] - 4, order[:4])
    ordered = np.array([True, False, True, True])
    assert permutation.local_order(ordered, 4, np.random.default_rng(3)).tolist() == [
        place if kept else -1 for place, kept in zip(order[:4].tolist(), ordered, strict=True)
    ]


def test_rows_are_laid_out_as_in_pretraining():
    tokens = windows()
    sentences = np.cumsum(np.arange(33) % 5 == 0)[None].repeat(4, axis=0)
    follows = []
    for seed in range(20):
        batch = permutation.batch(tokens, np.random.default_rng(seed), sentences=sentences, **SMALL)
        assert batch.tokens.shape == (4, 36)
        assert batch.tokens.dtype == np.int32
        assert batch.targets.shape == batch.weights.shape == batch.inputs["targets"].shape == (4, 8)
        for row in range(4):
            text, types = batch.tokens[row], batch.inputs["token_types"][row]
            first, second = np.flatnonzero(text == SEP)
            assert text[-2:].tolist() == [SEP, CLS]
            assert second == 34
            assert np.array_equal(types, np.repeat([0, 1, 2], [first + 1, 34 - first, 1]))
            assert np.array_equal(text[:first], tokens[row, :first])
            assert first % 5 == 0  # A ends where a sentence does
            b = text[first + 1 : 34]
            follows.append(np.array_equal(b, tokens[row, first:]))
            assert follows[-1] or any(
                np.array_equal(b, tokens[other, at : at + len(b)])
                for other in range(4) if other != row
                for at in range(34 - len(b))
            )  # fmt: skip
    assert 0.35 < np.mean(follows) < 0.65
    alone = permutation.batch(tokens[:1], np.random.default_rng(0), **SMALL)
    assert np.array_equal(np.sort(np.delete(alone.tokens[0], np.flatnonzero(alone.tokens[0] < 5))), np.sort(tokens[0]))


def test_separators_are_never_predicted_and_their_places_do_not_count():
    missing = 0
    for seed in range(20):
        batch = permutation.batch(windows(), np.random.default_rng(seed), **{**SMALL, "num_predict": 24})
        for row in range(4):
            real = batch.weights[row] > 0
            assert not np.isin(batch.targets[row][real], (SEP, CLS)).any()
            assert np.array_equal(np.diff(batch.inputs["targets"][row][real]) > 0, np.ones(real.sum() - 1, bool))
            assert set(np.unique(batch.weights[row])) <= {0.0, 1.0}
            missing += 24 - real.sum()
    assert missing > 0


def test_spans_begin_at_words_also_from_the_right():
    tokens, right_to_left = permutation.both_directions(windows(2))
    assert tokens.shape == (4, 33)
    assert right_to_left.tolist() == [False, False, True, True]
    assert np.array_equal(tokens[2:], tokens[:2, ::-1])
    # Words of three tokens; in a reversed row a word's last token comes first, and begins no span.
    starts = np.arange(33) % 3 == 0
    starts = np.stack([starts, starts, starts[::-1], starts[::-1]])
    first_of_words = set(tokens[starts].tolist()) - set(tokens[~starts].tolist())
    others = set(tokens[~starts].tolist()) - set(tokens[starts].tolist())
    assert len(first_of_words) > 5
    assert len(others) > 5
    hits = misses = 0
    for seed in range(20):
        batch = permutation.batch(
            tokens, np.random.default_rng(seed), word_starts=starts, right_to_left=right_to_left,
            **{**SMALL, "num_predict": 2}, alpha=2,
        )  # fmt: skip
        assert batch.inputs["right_to_left"] is right_to_left
        predicted = batch.targets[batch.weights > 0].tolist()  # one token in each part
        hits += sum(token in first_of_words for token in predicted)
        misses += sum(token in others for token in predicted)
    assert hits > 50
    assert misses == 0


def test_a_window_depends_on_the_generator_alone():
    one, same, other = (permutation.batch(windows(), np.random.default_rng(seed), **SMALL) for seed in (1, 1, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(one.inputs["order"], other.inputs["order"])


def test_padding_on_the_left():
    tokens, types = permutation.pair(np.array([20, 21]), np.array([30]))
    assert permutation.pair(np.array([20]))[0].tolist() == [20, SEP, CLS]
    assert permutation.pair(np.array([20]))[1].tolist() == [0, 0, 2]
    padded = permutation.pad_left(tokens, types, 8)
    assert [x.tolist() for x in padded] == [
        [5, 5, 20, 21, 4, 30, 4, 3], [4, 4, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="6 tokens do not fit a row of 5"):
        permutation.pad_left(tokens, types, 5)


def test_bad_numbers_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"windows must be \[batch, time\], got \[5\]"):
        permutation.batch(np.zeros(5, np.int32), rng)
    with pytest.raises(ValueError, match="reuse_length=256"):
        permutation.batch(windows(), rng)
    with pytest.raises(ValueError, match="permutation_length=7 must divide the lengths of both parts, 12 and 24"):
        permutation.batch(windows(), rng, **{**SMALL, "permutation_length": 7})
    with pytest.raises(ValueError, match="num_predict needs 15 targets in a part of 12 tokens"):
        permutation.batch(windows(), rng, **{**SMALL, "num_predict": 30})
    with pytest.raises(ValueError, match="beta=7 must be between 1 and alpha=6"):
        permutation.batch(windows(), rng, **SMALL, beta=7)
    with pytest.raises(ValueError, match=r"right_to_left \[3\] must be \[4\]"):
        permutation.batch(windows(), rng, right_to_left=np.zeros(3, bool), **SMALL)


def test_the_loss_is_that_of_the_predicted_places():
    model = tiny_model("xlnet")
    params = add_noise(model.init(jax.random.key(0)))
    tokens, right_to_left = permutation.both_directions(windows(2))
    batch = permutation.batch(tokens, np.random.default_rng(0), right_to_left=right_to_left, **SMALL)
    total, weight, state = jax.jit(lambda p, b: permutation.loss(model, p, b))(params, batch)
    assert state is None
    assert float(weight) == batch.weights.sum()
    hidden, _ = model.apply(params, batch.tokens, **batch.inputs)
    chances = jax.nn.log_softmax(model.logits(params, hidden))
    losses = -np.take_along_axis(np.asarray(chances), batch.targets[..., None], axis=-1)[..., 0]
    assert relative_error(total, (losses * batch.weights).sum()) < 1e-5
    # What is predicted is not seen: other tokens there change nothing for the first in order, which no other sees.
    order = np.take_along_axis(batch.inputs["order"], batch.inputs["targets"], axis=1)
    last = np.argmax(np.where(batch.weights > 0, order, -1), axis=1)
    changed = batch.tokens.copy()
    for row, place in enumerate(last):
        changed[row, batch.inputs["targets"][row, place]] = 7
    other, _ = model.apply(params, changed, **batch.inputs)
    seen_by_separators_only = np.arange(4), last
    assert relative_error(other[seen_by_separators_only], hidden[seen_by_separators_only]) < 1e-6
    assert dataclasses.replace(batch, tokens=changed).tokens is changed

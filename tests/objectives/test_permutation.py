"""XLNet's permutation objective, compared with the authors' algorithm."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.nn.attention.mask import Mask, keep
from jaxlm.objectives import permutation
from jaxlm.objectives.permutation import PermutationConfig
from jaxlm.testing.helpers import add_noise, apply, initial_params, relative_error, tiny_model
from tests.objectives.permutation_oracle import CLS, SEP, dense_masks, join_parts, local_perm, sample_mask

SMALL = {"reuse_length": 12, "permutation_length": 6, "num_predict": 8}


def windows(rows=4, length=33, seed=0):  # 12 tokens for the first part and 21 for the second, which adds 3 separators
    return np.random.default_rng(seed).integers(10, 90, (rows, length)).astype(np.int32)


def both_directions(tokens):
    return np.concatenate([tokens, tokens[:, ::-1]]), np.repeat([False, True], len(tokens))


def parts_of(batch, row, reuse=12):
    """Return (tokens, mask of predicted tokens) for each of the two parts of a row."""
    tokens = batch.tokens[row]
    predicted = np.zeros(len(tokens), bool)
    predicted[batch.inputs["targets"][row][batch.weights[row] > 0]] = True
    return (tokens[:reuse], predicted[:reuse]), (tokens[reuse:], predicted[reuse:])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reverse", [False, True])
def test_span_mask_equals_the_authors_code(seed, reverse):
    """The masks are equal for each seed. jaxlm also counts tokens instead of words, as the authors' inner loop does."""
    rng = np.random.default_rng(seed)
    length, goal, starts = int(rng.integers(8, 90)), int(rng.integers(1, 9)), None
    starts = rng.random(length) < (1.0 if seed % 3 == 0 else 0.6)
    alpha, beta = ((6, 1), (5, 2), (2, 2))[seed % 3]
    expected = sample_mask(starts, goal, np.random.default_rng(seed), alpha, beta, reverse=reverse)
    step = -1 if reverse else 1
    actual = permutation.span_mask(starts[::step], goal, np.random.default_rng(seed), alpha=alpha, beta=beta)[::step]
    assert np.array_equal(actual, expected)
    assert actual.sum() == goal


def test_one_in_alpha_tokens_is_predicted_and_span_lengths_have_probability_1_over_n():
    rng = np.random.default_rng(0)
    # 60 targets are few enough for one pass over the tokens. With more, the rest would be at random positions.
    masks = np.stack([permutation.span_mask(np.ones(600, bool), 60, rng, alpha=6) for _ in range(200)])
    last_targets = np.array([np.flatnonzero(mask).max() for mask in masks])
    assert 60 / np.mean(last_targets) == pytest.approx(1 / 7, rel=0.1)  # each span has a context of 6 times its length
    span_starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert masks.sum() / span_starts.sum() == pytest.approx(5 / (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5), rel=0.1)


@pytest.mark.parametrize("seed", range(6))
def test_orders_give_the_authors_dense_masks(seed):
    """Compare the [T, T] masks of both streams with the authors' algorithm, which joins the masks of both parts."""
    batch = permutation.batch(windows(), np.random.default_rng(seed), PermutationConfig(**SMALL))
    for row in range(4):
        orders, expected_parts = batch.inputs["order"][row], []
        for start, (tokens, predicted) in zip((0, 12), parts_of(batch, row), strict=True):
            order = orders[start : start + len(tokens)] - (13 if start else 0)
            is_special = (tokens == SEP) | (tokens == CLS)
            assert np.array_equal(order >= 0, predicted | is_special)
            # Recover the random permutation from the order of the row. The other entries can be arbitrary.
            shuffle = np.array([order[k::6].max() % 6 if order[k::6].max() >= 0 else -1 for k in range(6)])
            shuffle[shuffle < 0] = np.setdiff1d(np.arange(6), shuffle)
            expected_parts.append(local_perm(tokens, np.append(tokens[1:], 0), predicted, 6, shuffle))
        perm_mask, expected_targets, target_mask = join_parts(*expected_parts)
        content_mask, query_mask = dense_masks(perm_mask)
        order_1T = orders[None]
        mask = Mask(causal=True, query_order=order_1T, key_order=order_1T)
        assert np.array_equal(np.asarray(keep(mask, 36, 36))[0], content_mask == 0)
        mask = Mask(causal=True, query_order=order_1T - 1, key_order=order_1T)
        predicted = target_mask == 1
        assert np.array_equal(np.asarray(keep(mask, 36, 36))[0][predicted], (query_mask == 0)[predicted])
        is_target = batch.weights[row] > 0
        assert np.array_equal(batch.inputs["targets"][row][is_target], np.flatnonzero(predicted))
        assert np.array_equal(batch.targets[row][is_target], expected_targets[predicted])


def test_all_blocks_have_the_same_permutation():
    order = permutation.order_of_part(np.ones(12, bool), 4, np.random.default_rng(3))
    assert np.array_equal(order // 4, np.repeat([0, 1, 2], 4))
    assert np.array_equal(order[4:8] - 4, order[:4])
    ordered = np.array([True, False, True, True])
    assert permutation.order_of_part(ordered, 4, np.random.default_rng(3)).tolist() == [
        value if is_ordered else -1 for value, is_ordered in zip(order[:4].tolist(), ordered, strict=True)
    ]


def test_rows_have_the_format_of_pretraining():
    tokens = windows()
    sentences = np.cumsum(np.arange(33) % 5 == 0)[None].repeat(4, axis=0)
    b_follows_a = []
    for seed in range(20):
        batch = permutation.batch(tokens, np.random.default_rng(seed), PermutationConfig(**SMALL), sentences=sentences)
        assert batch.tokens.shape == (4, 36)
        assert batch.tokens.dtype == np.int32
        assert batch.targets.shape == batch.weights.shape == batch.inputs["targets"].shape == (4, 8)
        for row in range(4):
            text, types = batch.tokens[row], batch.inputs["token_types"][row]
            first_separator, second_separator = np.flatnonzero(text == SEP)
            assert text[-2:].tolist() == [SEP, CLS]
            assert second_separator == 34
            assert np.array_equal(types, np.repeat([0, 1, 2], [first_separator + 1, 34 - first_separator, 1]))
            assert np.array_equal(text[:first_separator], tokens[row, :first_separator])
            assert first_separator % 5 == 0  # text A ends at the end of a sentence
            text_b = text[first_separator + 1 : 34]
            b_follows_a.append(np.array_equal(text_b, tokens[row, first_separator:]))
            assert b_follows_a[-1] or any(
                np.array_equal(text_b, tokens[other, start : start + len(text_b)])
                for other in range(4) if other != row
                for start in range(34 - len(text_b))
            )  # fmt: skip
    assert 0.35 < np.mean(b_follows_a) < 0.65
    single_row = permutation.batch(tokens[:1], np.random.default_rng(0), PermutationConfig(**SMALL))
    assert np.array_equal(
        np.sort(np.delete(single_row.tokens[0], np.flatnonzero(single_row.tokens[0] < 5))), np.sort(tokens[0])
    )


def test_separators_are_never_predicted_and_have_weight_0():
    num_padding = 0
    for seed in range(20):
        batch = permutation.batch(
            windows(), np.random.default_rng(seed), PermutationConfig(**{**SMALL, "num_predict": 24})
        )
        for row in range(4):
            is_target = batch.weights[row] > 0
            assert not np.isin(batch.targets[row][is_target], (SEP, CLS)).any()
            assert np.array_equal(
                np.diff(batch.inputs["targets"][row][is_target]) > 0, np.ones(is_target.sum() - 1, bool)
            )
            assert set(np.unique(batch.weights[row])) <= {0.0, 1.0}
            num_padding += 24 - is_target.sum()
    assert num_padding > 0


def test_spans_begin_at_word_starts_in_both_directions():
    tokens, right_to_left = both_directions(windows(2))
    # Words have three tokens. In a reversed row, the last token of a word comes first, but no span begins there.
    starts = np.arange(33) % 3 == 0
    starts = np.stack([starts, starts, starts[::-1], starts[::-1]])
    first_of_words = set(tokens[starts].tolist()) - set(tokens[~starts].tolist())
    not_first = set(tokens[~starts].tolist()) - set(tokens[starts].tolist())
    assert len(first_of_words) > 5
    assert len(not_first) > 5
    hits = misses = 0
    for seed in range(20):
        batch = permutation.batch(
            tokens, np.random.default_rng(seed), PermutationConfig(**{**SMALL, "num_predict": 2}, alpha=2),
            word_starts=starts, right_to_left=right_to_left,
        )  # fmt: skip
        assert batch.inputs["right_to_left"] is right_to_left
        predicted = batch.targets[batch.weights > 0].tolist()  # one token in each part
        hits += sum(token in first_of_words for token in predicted)
        misses += sum(token in not_first for token in predicted)
    assert hits > 50
    assert misses == 0


def test_a_batch_depends_only_on_the_generator():
    batch, same_seed, other_seed = (
        permutation.batch(windows(), np.random.default_rng(seed), PermutationConfig(**SMALL)) for seed in (1, 1, 2)
    )
    for expected, actual in zip(jax.tree.leaves(batch), jax.tree.leaves(same_seed), strict=True):
        assert np.array_equal(expected, actual)
    assert not np.array_equal(batch.inputs["order"], other_seed.inputs["order"])


def test_pairs_have_separators_and_token_types():
    tokens, types = permutation.join_texts(np.array([20, 21]), np.array([30]))
    assert (tokens.tolist(), types.tolist()) == ([20, 21, SEP, 30, SEP, CLS], [0, 0, 0, 1, 1, 2])
    assert permutation.join_texts(np.array([20]))[0].tolist() == [20, SEP, CLS]
    assert permutation.join_texts(np.array([20]))[1].tolist() == [0, 0, 2]


def test_invalid_numbers_raise_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"windows must be \[batch, time\] with at least one row, got \[5\]"):
        permutation.batch(np.zeros(5, np.int32), rng)
    with pytest.raises(ValueError, match=r"with at least one row, got \[0, 36\]"):
        permutation.batch(np.zeros((0, 36), np.int32), rng, PermutationConfig(**SMALL))
    with pytest.raises(ValueError, match="the array of windows has dtype float64, but batches hold int32"):
        permutation.batch(windows().astype(float), rng, PermutationConfig(**SMALL))
    with pytest.raises(ValueError, match="the array of windows has values outside int32"):
        permutation.batch(windows().astype(np.int64) + 2**40, rng, PermutationConfig(**SMALL))
    with pytest.raises(ValueError, match="reuse_length=256"):
        permutation.batch(windows(), rng)
    for name in ("reuse_length", "permutation_length", "num_predict", "max_span_length"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            PermutationConfig(**{name: 0})
    with pytest.raises(ValueError, match="permutation_length=7 must divide the lengths of both parts, 12 and 24"):
        permutation.batch(windows(), rng, PermutationConfig(**{**SMALL, "permutation_length": 7}))
    with pytest.raises(ValueError, match="num_predict needs 15 targets in a part of 12 tokens"):
        permutation.batch(windows(), rng, PermutationConfig(**{**SMALL, "num_predict": 30}))
    with pytest.raises(ValueError, match="beta=7 must be between 1 and alpha=6"):
        permutation.batch(windows(), rng, PermutationConfig(**SMALL, beta=7))
    with pytest.raises(ValueError, match=r"right_to_left \[3\] must be \[4\]"):
        permutation.batch(windows(), rng, PermutationConfig(**SMALL), right_to_left=np.zeros(3, bool))


def test_the_loss_is_the_cross_entropy_of_the_targets():
    model = tiny_model("xlnet")
    params = add_noise(initial_params(model))
    tokens, right_to_left = both_directions(windows(2))
    batch = permutation.batch(tokens, np.random.default_rng(0), PermutationConfig(**SMALL), right_to_left=right_to_left)
    total, weight, state = jax.jit(lambda p, b: permutation.loss(model, p, b))(params, batch)
    assert state is None
    assert float(weight) == batch.weights.sum()
    hidden, _ = apply(model, params, batch.tokens, **batch.inputs)
    log_probs = jax.nn.log_softmax(model.logits(params, hidden))
    losses = -np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
    assert relative_error(total, (losses * batch.weights).sum()) < 1e-5
    # A query cannot attend to its own target. Change the last target in the order, which no other target attends to.
    order = np.take_along_axis(batch.inputs["order"], batch.inputs["targets"], axis=1)
    last = np.argmax(np.where(batch.weights > 0, order, -1), axis=1)
    changed = batch.tokens.copy()
    for row, index in enumerate(last):
        changed[row, batch.inputs["targets"][row, index]] = 7
    changed_hidden, _ = apply(model, params, changed, **batch.inputs)
    last_targets = np.arange(4), last
    assert relative_error(changed_hidden[last_targets], hidden[last_targets]) < 1e-6
    assert dataclasses.replace(batch, tokens=changed).tokens is changed

"""Sampling: against plain forward passes, against filters written in numpy, and against itself in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import sharding
from jaxlm.decoding import GREEDY, Sampling, advance, filter_logits, generate, log_likelihood, prefill, sample

Pair = tuple[Any, Any]
Pad = Callable[[list[list[int]], str], tuple[np.ndarray, np.ndarray]]

# One shape of prompts, one count and one way to draw wherever nothing else is needed, so that compiles are shared.
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [3, 20, 4], [30, 2]]
NEW = 8
FREE = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


def draw(pair: Pair, prompts: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Any:
    return generate(*pair, *prompts, max_new_tokens=NEW, sampling=FREE, key=jax.random.key(seed))


@pytest.mark.parametrize("sides", ["llll", "rrrr", "rlrl"])
def test_greedy_equals_a_loop_of_forward_passes_on_each_prompt_alone(
    pair: Pair, sides: str, pad: Pad, next_log_probs: Callable[..., np.ndarray]
) -> None:
    out = generate(*pair, *pad(PROMPTS, sides), max_new_tokens=NEW)
    rows, log_probs = [list(prompt) for prompt in PROMPTS], [[], [], [], []]
    for _ in range(NEW):
        for row, kept, after in zip(rows, log_probs, next_log_probs(*pair, rows), strict=True):
            last = after[len(row) - 1]
            row.append(int(last.argmax()))
            kept.append(last.max())
    expected = [row[-NEW:] for row in rows]
    assert len({token for row in expected for token in row}) > NEW, "this model repeats itself too much to show much"
    assert out.tokens.tolist() == expected
    np.testing.assert_allclose(out.log_probs, log_probs, atol=1e-4)
    assert out.lengths.tolist() == [NEW] * 4


def test_padding_changes_no_draw(pair: Pair, pad: Pad) -> None:
    np.testing.assert_array_equal(draw(pair, pad(PROMPTS, "llll")).tokens, draw(pair, pad(PROMPTS, "rrrr")).tokens)


def test_other_rows_change_no_draw(gpt: Pair, pad: Pad) -> None:
    one, two = draw(gpt, pad(PROMPTS, "llll")), draw(gpt, pad([PROMPTS[0], [99, 98, 97], *PROMPTS[2:]], "llll"))
    np.testing.assert_array_equal(one.tokens[::2], two.tokens[::2])
    assert one.tokens[1].tolist() != two.tokens[1].tolist()
    same = draw(gpt, pad([PROMPTS[0]] * 4, "llll")).tokens
    assert len({tuple(row) for row in same.tolist()}) == 4, "rows with one prompt must draw apart"


def test_log_probs_are_those_of_scoring(pair: Pair, pad: Pad) -> None:
    tokens, segment_ids = pad(PROMPTS, "llll")
    out = draw(pair, (tokens, segment_ids))
    tokens = np.concatenate([tokens, out.tokens], axis=1)
    scored = log_likelihood(*pair, tokens, np.pad(segment_ids, ((0, 0), (0, NEW)), constant_values=1))
    np.testing.assert_allclose(scored[:, -NEW:], out.log_probs, atol=1e-4)


# ------------------------------------------------------------------------------------------------- filters


def oracle(sampling: Sampling, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Probabilities of one row, by the definitions of the filters and one token at a time."""
    logits = logits.astype(np.float64).copy()
    for token in np.flatnonzero(seen):
        logits[token] *= sampling.repetition_penalty if logits[token] <= 0 else 1 / sampling.repetition_penalty
    logits /= sampling.temperature
    kept = set(range(len(logits)))

    def probabilities() -> dict[int, float]:
        weights = {token: np.exp(logits[token] - logits.max()) for token in kept}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    if sampling.top_k is not None:
        kept = set(sorted(kept, key=lambda token: -logits[token])[: sampling.top_k])
    if sampling.top_p is not None:
        mass, nucleus, p = 0.0, set(), probabilities()
        for token in sorted(kept, key=lambda token: -logits[token]):
            if mass < sampling.top_p:
                nucleus.add(token)
            mass += p[token]
        kept = nucleus
    if sampling.min_p is not None:
        p = probabilities()
        kept = {token for token in kept if p[token] >= sampling.min_p * max(p.values())}
    p = probabilities()
    return np.array([p.get(token, 0.0) for token in range(len(logits))])


@pytest.mark.parametrize(
    ("sampling", "filters"),
    [
        (Sampling(), False),
        (Sampling(temperature=0.6), False),
        (Sampling(repetition_penalty=1.7), False),
        (Sampling(repetition_penalty=0.5), False),
        (Sampling(top_k=1), True),
        (Sampling(top_k=7), True),
        (Sampling(top_p=0.3), True),
        (Sampling(top_p=0.9), True),
        (Sampling(min_p=0.2), True),
        (Sampling(temperature=1.4, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.2), True),
    ],
)
def test_filters_against_their_definitions(sampling: Sampling, filters: bool) -> None:
    rng = np.random.default_rng(0)
    logits, seen = 2 * rng.normal(size=(6, 23)).astype(np.float32), rng.random((6, 23)) < 0.4
    out = filter_logits(sampling, jnp.asarray(logits), jnp.asarray(seen))
    expected = np.stack([oracle(sampling, *row) for row in zip(logits, seen, strict=True)])
    np.testing.assert_array_equal(np.isfinite(out), expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(out, axis=-1), expected, atol=1e-6)
    assert np.any(expected == 0) == filters
    assert not np.allclose(expected, jax.nn.softmax(logits, axis=-1)) or sampling == Sampling()


def test_equally_likely_tokens_are_kept_together() -> None:
    logits = jnp.log(jnp.array([[0.2, 0.4, 0.2, 0.2]]))
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.5)):
        assert np.isfinite(filter_logits(sampling, logits)).all()
    assert np.isfinite(filter_logits(Sampling(top_k=1), logits)).tolist() == [[False, True, False, False]]
    assert np.isfinite(filter_logits(Sampling(top_p=1e-6), logits)).tolist() == [[False, True, False, False]]


def test_draws_follow_the_filtered_distribution(gpt: Pair, next_log_probs: Callable[..., np.ndarray]) -> None:
    sampling, count, prompt = Sampling(temperature=0.8, top_k=6), 4000, [[5, 6, 7]]
    out = generate(*gpt, np.tile(prompt, (count, 1)), max_new_tokens=1, sampling=sampling, key=jax.random.key(0))
    log_probs = next_log_probs(*gpt, prompt * 4)[0, 2]
    expected = count * oracle(sampling, log_probs, np.zeros(128, bool))
    observed = np.bincount(np.asarray(out.tokens[:, 0]), minlength=128)
    allowed = expected > 0
    assert observed[~allowed].sum() == 0
    chi_square = np.sum((observed[allowed] - expected[allowed]) ** 2 / expected[allowed])
    assert chi_square < 20.5, "the chance of more is 0.001 with 5 degrees of freedom"
    # What is reported is the model's own probability, not that of the filtered distribution.
    np.testing.assert_allclose(out.log_probs[:, 0], log_probs[np.asarray(out.tokens[:, 0])], atol=1e-4)


def test_repetition_penalty_sees_prompt_and_output_but_no_padding(gpt: Pair, pad: Pad) -> None:
    tokens, segment_ids = pad(PROMPTS, "llll")
    penalty = Sampling(0.0, repetition_penalty=1e6)
    free = generate(*gpt, tokens, segment_ids, max_new_tokens=NEW)
    out = generate(*gpt, tokens, segment_ids, max_new_tokens=NEW, sampling=penalty)
    for prompt, before, after in zip(PROMPTS, free.tokens.tolist(), out.tokens.tolist(), strict=True):
        assert len({*prompt, *before}) < len(prompt) + NEW, "without the penalty there must be something to penalise"
        assert len({*prompt, *after}) == len(prompt) + NEW
    # Ids that stand in padding are not seen.
    other = np.where(segment_ids > 0, tokens, out.tokens[:, :1])
    again = generate(*gpt, other, segment_ids, max_new_tokens=NEW, sampling=penalty)
    np.testing.assert_array_equal(again.tokens, out.tokens)


# -------------------------------------------------------------------------------------------------- ends


def test_a_row_ends_at_its_end_token(pair: Pair, pad: Pad) -> None:
    prompts = pad(PROMPTS, "llll")
    free = np.asarray(generate(*pair, *prompts, max_new_tokens=NEW).tokens)
    end_id = int(free[0, 3])
    out = generate(*pair, *prompts, max_new_tokens=NEW, end_id=end_id)
    for row in range(len(PROMPTS)):
        at = np.flatnonzero(free[row] == end_id)
        length = NEW if at.size == 0 else at[0] + 1
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == free[row, :length].tolist() + [end_id] * (NEW - length)
        assert np.all(np.asarray(out.log_probs)[row, length:] == 0)
    assert 1 < out.lengths[0] < NEW
    assert out.lengths.max() == NEW


def test_the_loop_stops_when_all_rows_ended(gpt: Pair, pad: Pad) -> None:
    prompts = pad([PROMPTS[0]] * 4, "llll")
    free = generate(*gpt, *prompts, max_new_tokens=NEW).tokens[0].tolist()
    end_id = free[3]
    progress = advance(*gpt, prefill(*gpt, *prompts, max_new_tokens=NEW, end_id=end_id), NEW)
    assert int(progress.step) == free.index(end_id) + 1 < NEW
    assert progress.ended.all()


def test_only_allowed_ids_are_generated() -> None:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=100, vocab_multiple=64, num_layers=1)
    params = jax.jit(model.init)(jax.random.key(0))
    options = {"max_new_tokens": 2, "sampling": Sampling(3.0), "key": jax.random.key(0)}
    everything = generate(model, params, np.full((400, 2), 99), **options).tokens
    assert 90 < int(everything.max()) < 100, "the padded rows of the table are no ids"
    few = generate(model, params, np.full((400, 2), 99), allowed_ids=7, **options).tokens
    assert int(few.max()) == 6


# ------------------------------------------------------------------------------------ one loop, one compile


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("sampling", [GREEDY, FREE])
def test_chunks_are_bit_identical_to_one_piece(gpt: Pair, pad: Pad, sampling: Sampling, chunk: int) -> None:
    prompts, options = pad(PROMPTS, "lrlr"), {"max_new_tokens": NEW, "sampling": sampling, "key": jax.random.key(2)}
    whole = generate(*gpt, *prompts, **options)
    progress = prefill(*gpt, *prompts, **options)
    steps = [int(progress.step)]
    while steps[-1] < NEW:
        progress = advance(*gpt, progress, chunk)
        steps.append(int(progress.step))
    assert steps == [*range(1, NEW, chunk), NEW]
    for name in ("tokens", "lengths", "log_probs"):
        np.testing.assert_array_equal(getattr(progress, name), getattr(whole, name))


def test_advance_donates_its_progress_and_nothing_else(gpt: Pair, pad: Pad) -> None:
    model, params = gpt
    key = jax.random.key(0)
    progress = prefill(model, params, *pad(PROMPTS, "llll"), max_new_tokens=NEW, sampling=FREE, key=key)
    advance(model, params, progress, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(progress.state))
    assert not any(leaf.is_deleted() for leaf in [key, *jax.tree.leaves(params)])


def test_one_compile() -> None:
    model = jaxlm.get_model("gpt2-tiny", num_layers=1)
    functions = (sample._generate, sample._prefill, sample._advance)
    init = jax.jit(model.init)
    before = [function._cache_size() for function in functions]
    for seed in range(3):
        key = jax.random.key(seed)
        params = init(key)
        prompts = np.random.default_rng(seed).integers(0, 128, (2, 5))
        out = generate(model, params, prompts, max_new_tokens=4, sampling=Sampling(), key=key)
        progress = prefill(model, params, prompts, max_new_tokens=4, sampling=Sampling(), key=key)
        for steps in (1, 2):
            progress = advance(model, params, progress, steps)
        np.testing.assert_array_equal(progress.tokens, out.tokens)
    assert [f._cache_size() - old for f, old in zip(functions, before, strict=True)] == [1, 1, 1]


def test_inside_jit_it_is_one_loop(gpt: Pair, pad: Pad) -> None:
    prompts = tuple(map(jnp.asarray, pad(PROMPTS, "llll")))
    inside = jax.jit(lambda params, prompts: generate(gpt[0], params, *prompts, max_new_tokens=NEW))
    outside = generate(*gpt, *prompts, max_new_tokens=NEW)
    np.testing.assert_array_equal(inside(gpt[1], prompts).tokens, outside.tokens)


def test_sharded_parameters_generate_the_same(gpt: Pair, pad: Pad) -> None:
    model, params = gpt
    prompts = pad(PROMPTS, "llll")
    plain = generate(model, params, *prompts, max_new_tokens=NEW)
    split = sharding.Sharding(sharding.make_mesh("data=2,tensor=4"))
    with split.scope():
        placed = jax.device_put(params, split.tree(model.specs))
        out = generate(model, placed, *prompts, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.log_probs, plain.log_probs, atol=1e-4)


def test_a_long_cache_is_read_over_devices_as_on_one() -> None:
    model = jaxlm.get_model("gpt2-tiny", max_positions=320)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, 128, (8, 300)).astype(np.int32)
    plain = generate(model, params, prompts, max_new_tokens=8)
    split = sharding.Sharding(sharding.make_mesh("data=2,tensor=4"))
    with split.scope():
        out = generate(model, jax.device_put(params, split.tree(model.specs)), prompts, max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.log_probs, plain.log_probs, atol=1e-4)


def test_a_trace_serves_one_sharding_only(gpt: Pair) -> None:
    def trace() -> str:
        return str(jax.make_jaxpr(lambda params, x: generate(gpt[0], params, x, max_new_tokens=2))(gpt[1], prompts))

    prompts = jnp.ones((2, 3), jnp.int32)
    assert "sharding_constraint" not in trace()
    with sharding.Sharding(sharding.make_mesh("data=2,tensor=4")).scope():
        assert "sharding_constraint" in trace()
    assert "sharding_constraint" not in trace()


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be finite and at least 0"),
        ({"temperature": float("nan")}, r"temperature=nan"),
        ({"top_k": 0}, r"top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p=1.5 must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be positive"),
    ],
)
def test_bad_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


OK = {"prompts": np.array([[5, 6], [7, 8]]), "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": np.array([5, 6])}, r"prompts must be integers of shape \[batch, time\], got int64\[2\]"),
        ({"prompts": np.array([[0.5]])}, r"prompts must be integers .* got float64\[1, 1\]"),
        ({"prompts": np.zeros((2, 0), int)}, r"prompts \[2, 0\] are empty"),
        ({"prompts": np.array([[5, 128]])}, r"prompts have id 128 in row 0 at position 1, outside .* 128 ids"),
        ({"prompts": np.array([[5, 6], [-1, 6]])}, r"id -1 in row 1 at position 0"),
        ({"segment_ids": np.ones((2, 3), int)}, r"segment_ids \[2, 3\] must have the shape of prompts \[2, 2\]"),
        ({"segment_ids": np.array([[1, 1], [0, 0]])}, r"row 1 of the prompts is all padding"),
        (
            {"segment_ids": np.array([[1, 2], [1, 1]])},
            r"segment_ids of row 0 are \[1, 2\]: a prompt must be one run of 1",
        ),
        (
            {"prompts": np.ones((1, 3), int), "segment_ids": np.array([[1, 0, 1]])},
            r"segment_ids of row 0 are \[1, 0, 1\]: a prompt must be one run",
        ),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 64}, r"65 tokens exceeds max_positions=64"),
        ({"end_id": 128}, r"end_id=128 can never be generated: ids are 0 to 127"),
        ({"end_id": 9, "allowed_ids": 9}, r"end_id=9 can never be generated: ids are 0 to 8"),
        ({"allowed_ids": 129}, r"allowed_ids=129 must be between 1 and vocab_size=128"),
        ({"sampling": Sampling()}, r"temperature=1.0 draws at random: pass a key"),
        ({"sampling": Sampling(0.0, top_k=129)}, r"top_k=129 exceeds the 128 ids"),
    ],
)
def test_bad_input_before_any_compile(gpt: Pair, arguments: dict[str, Any], message: str) -> None:
    model, params = gpt
    before = sample._generate._cache_size()
    for function in (generate, prefill):
        with pytest.raises(ValueError, match=message):
            function(model, params, **{**OK, **arguments})
    assert sample._generate._cache_size() == before


def test_the_longest_output_that_fits(gpt: Pair) -> None:
    out = generate(*gpt, np.array([[5, 6]]), max_new_tokens=63)
    assert np.isfinite(out.log_probs).all()


def test_lists_are_no_arrays(gpt: Pair) -> None:
    with pytest.raises(TypeError, match=r"prompts must be an array of integers \[batch, time\], got a list"):
        generate(*gpt, [[5, 6]], max_new_tokens=2)  # type: ignore[arg-type]


def test_a_penalty_needs_to_know_what_was_seen() -> None:
    with pytest.raises(ValueError, match=r"repetition_penalty=2.0 needs seen_BV"):
        filter_logits(Sampling(repetition_penalty=2.0), jnp.zeros((1, 4)))


def test_sampling_is_hashable_and_compares_by_value() -> None:
    assert hash(Sampling(top_k=3)) == hash(dataclasses.replace(Sampling(), top_k=3))

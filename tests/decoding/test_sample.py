"""Tests of sampling: against forward passes, against filters in NumPy, and in chunks against one call."""

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
from jaxlm.data import ByteTokenizer
from jaxlm.decoding import (
    GREEDY,
    BeamConfig,
    Sampling,
    SpeculativeModels,
    advance,
    beam_search,
    filter_logits,
    generate,
    generate_text,
    log_likelihood,
    prefill,
    sample,
    speculative_generate,
)
from jaxlm.decoding.prompts import as_end_ids, check_sharding
from jaxlm.testing.helpers import initial_params, tiny_model

Pair = tuple[Any, Any]
Pad = Callable[[list[list[int]], str], tuple[np.ndarray, np.ndarray]]

# The tests use these values if possible, so that they share compiled functions.
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [3, 20, 4], [30, 2]]
NUM_NEW = 8
SAMPLING = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


def generate_samples(pair: Pair, prompts: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Any:
    return generate(*pair, *prompts, max_new_tokens=NUM_NEW, sampling=SAMPLING, key=jax.random.key(seed))


@pytest.mark.parametrize("sides", ["llll", "rrrr", "rlrl"])
def test_greedy_equals_a_loop_of_forward_passes_on_each_prompt(
    pair: Pair, sides: str, pad: Pad, next_log_probs: Callable[..., np.ndarray]
) -> None:
    out = generate(*pair, *pad(PROMPTS, sides), max_new_tokens=NUM_NEW)
    rows, log_probs = [list(prompt) for prompt in PROMPTS], [[], [], [], []]
    for _ in range(NUM_NEW):
        for row, row_log_probs, next_log_probs_row in zip(rows, log_probs, next_log_probs(*pair, rows), strict=True):
            last = next_log_probs_row[len(row) - 1]
            row.append(int(last.argmax()))
            row_log_probs.append(last.max())
    expected = [row[-NUM_NEW:] for row in rows]
    assert len({token for row in expected for token in row}) > NUM_NEW, (
        "this model repeats itself too much to show much"
    )
    assert out.tokens.tolist() == expected
    np.testing.assert_allclose(out.log_probs, log_probs, atol=1e-4)
    assert out.lengths.tolist() == [NUM_NEW] * 4


def test_padding_does_not_change_samples(pair: Pair, pad: Pad) -> None:
    np.testing.assert_array_equal(
        generate_samples(pair, pad(PROMPTS, "llll")).tokens, generate_samples(pair, pad(PROMPTS, "rrrr")).tokens
    )


def test_other_rows_do_not_change_samples(gpt: Pair, pad: Pad) -> None:
    first, second = (
        generate_samples(gpt, pad(PROMPTS, "llll")),
        generate_samples(gpt, pad([PROMPTS[0], [99, 98, 97], *PROMPTS[2:]], "llll")),
    )
    np.testing.assert_array_equal(first.tokens[::2], second.tokens[::2])
    assert first.tokens[1].tolist() != second.tokens[1].tolist()
    equal_prompts = generate_samples(gpt, pad([PROMPTS[0]] * 4, "llll")).tokens
    assert len({tuple(row) for row in equal_prompts.tolist()}) == 4, "rows with one prompt must draw apart"


@pytest.mark.thorough
def test_rbg_keys_of_other_rows_do_not_change_samples(gpt: Pair, pad: Pad) -> None:
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    options = {"max_new_tokens": NUM_NEW, "sampling": SAMPLING}
    first, second = (
        generate(*gpt, *pad(PROMPTS, "llll"), key=keys[rows], **options)
        for rows in np.array([[0, 1, 2, 3], [4, 1, 2, 3]])
    )
    np.testing.assert_array_equal(first.tokens[1:], second.tokens[1:])
    assert first.tokens[0].tolist() != second.tokens[0].tolist()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_the_draws_of_a_row_depend_only_on_its_number(impl: str) -> None:
    key = jax.random.key(3, impl=impl)
    first, second = (
        jax.vmap(jax.random.bits)(sample.fold_in_rows(key, np.array(rows))) for rows in ([0, 1, 2], [5, 1])
    )
    assert first[1] == second[1]
    assert len({*first.tolist(), *second.tolist()}) == 4
    if impl == "threefry2x32":
        assert first[1] == jax.random.bits(jax.random.fold_in(key, 1)), "the keys of the default are unchanged"


def test_log_probs_equal_those_of_log_likelihood(pair: Pair, pad: Pad) -> None:
    tokens, segment_ids = pad(PROMPTS, "llll")
    out = generate_samples(pair, (tokens, segment_ids))
    tokens = np.concatenate([tokens, out.tokens], axis=1)
    scored = log_likelihood(*pair, tokens, np.pad(segment_ids, ((0, 0), (0, NUM_NEW)), constant_values=1))
    np.testing.assert_allclose(scored[:, -NUM_NEW:], out.log_probs, atol=1e-4)


# ------------------------------------------------------------------------------------------------- filters


def numpy_probabilities(sampling: Sampling, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Probabilities of one row, computed token by token from the definitions of the filters."""
    logits = logits.astype(np.float64).copy()
    for token in np.flatnonzero(seen):
        logits[token] *= sampling.repetition_penalty if logits[token] <= 0 else 1 / sampling.repetition_penalty
    logits /= sampling.temperature
    allowed = set(range(len(logits)))

    def probabilities() -> dict[int, float]:
        weights = {token: np.exp(logits[token] - logits.max()) for token in allowed}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    if sampling.top_k is not None:
        allowed = set(sorted(allowed, key=lambda token: -logits[token])[: sampling.top_k])
    if sampling.top_p is not None:
        mass, nucleus, p = 0.0, set(), probabilities()
        for token in sorted(allowed, key=lambda token: -logits[token]):
            if mass < sampling.top_p:
                nucleus.add(token)
            mass += p[token]
        allowed = nucleus
    if sampling.min_p is not None:
        p = probabilities()
        allowed = {token for token in allowed if p[token] >= sampling.min_p * max(p.values())}
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
    expected = np.stack([numpy_probabilities(sampling, *row) for row in zip(logits, seen, strict=True)])
    np.testing.assert_array_equal(np.isfinite(out), expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(out, axis=-1), expected, atol=1e-6)
    assert np.any(expected == 0) == filters
    assert not np.allclose(expected, jax.nn.softmax(logits, axis=-1)) or sampling == Sampling()


def test_the_smallest_temperature_keeps_the_logits_finite() -> None:
    out = filter_logits(Sampling(1e-30), jnp.asarray([[-3e4, 3e4, 2.0]]))
    assert np.isfinite(out).all()
    assert np.argmax(out) == 1


@pytest.mark.thorough
def test_equally_likely_tokens_are_kept_together() -> None:
    logits = jnp.log(jnp.asarray([[0.2, 0.4, 0.2, 0.2]]))
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.5)):
        assert np.isfinite(filter_logits(sampling, logits)).all()
    assert np.isfinite(filter_logits(Sampling(top_k=1), logits)).tolist() == [[False, True, False, False]]
    assert np.isfinite(filter_logits(Sampling(top_p=1e-6), logits)).tolist() == [[False, True, False, False]]


@pytest.mark.thorough
def test_draws_follow_the_filtered_distribution(gpt: Pair, next_log_probs: Callable[..., np.ndarray]) -> None:
    sampling, count, prompt = Sampling(temperature=0.8, top_k=6), 4000, [[5, 6, 7]]
    out = generate(*gpt, np.tile(prompt, (count, 1)), max_new_tokens=1, sampling=sampling, key=jax.random.key(0))
    log_probs = next_log_probs(*gpt, prompt * 4)[0, 2]
    expected = count * numpy_probabilities(sampling, log_probs, np.zeros(128, bool))
    observed = np.bincount(np.asarray(out.tokens[:, 0]), minlength=128)
    allowed = expected > 0
    assert observed[~allowed].sum() == 0
    chi_square = np.sum((observed[allowed] - expected[allowed]) ** 2 / expected[allowed])
    assert chi_square < 20.5, "the chance of more is 0.001 with 5 degrees of freedom"
    # ``log_probs`` are those of the model, not those of the filtered distribution.
    np.testing.assert_allclose(out.log_probs[:, 0], log_probs[np.asarray(out.tokens[:, 0])], atol=1e-4)


@pytest.mark.thorough
def test_repetition_penalty_counts_prompt_and_output_but_not_padding(gpt: Pair, pad: Pad) -> None:
    tokens, segment_ids = pad(PROMPTS, "llll")
    penalty = Sampling(0.0, repetition_penalty=1e6)
    without_penalty = generate(*gpt, tokens, segment_ids, max_new_tokens=NUM_NEW)
    out = generate(*gpt, tokens, segment_ids, max_new_tokens=NUM_NEW, sampling=penalty)
    for prompt, before, after in zip(PROMPTS, without_penalty.tokens.tolist(), out.tokens.tolist(), strict=True):
        assert len({*prompt, *before}) < len(prompt) + NUM_NEW, (
            "without the penalty there must be something to penalise"
        )
        assert len({*prompt, *after}) == len(prompt) + NUM_NEW
    # Ids in padding do not count.
    changed_padding = np.where(segment_ids > 0, tokens, out.tokens[:, :1])
    same = generate(*gpt, changed_padding, segment_ids, max_new_tokens=NUM_NEW, sampling=penalty)
    np.testing.assert_array_equal(same.tokens, out.tokens)


# -------------------------------------------------------------------------------------------------- ends


def test_a_row_that_has_ended_does_not_change_its_seen_ids(gpt: Pair, pad: Pad) -> None:
    prompts = pad(PROMPTS, "llll")
    options = {"max_new_tokens": NUM_NEW, "sampling": Sampling(0.0, repetition_penalty=1.5)}
    end_id = int(generate(*gpt, *prompts, **options).tokens[0, 0])
    progress = sample.prefill(*gpt, *prompts, **options, end_id=end_id)
    progress = sample.advance(*gpt, progress, NUM_NEW)
    lengths = progress.lengths.tolist()
    assert lengths[0] == 1
    assert max(lengths) > 2, "another row must continue after the end of the first row"
    for prompt, tokens, length, seen in zip(PROMPTS, progress.tokens, lengths, progress.seen, strict=True):
        assert set(np.flatnonzero(seen).tolist()) == {*prompt, *tokens[:length].tolist()}


@pytest.mark.thorough
def test_a_row_ends_at_its_end_token(pair: Pair, pad: Pad) -> None:
    prompts = pad(PROMPTS, "llll")
    without_end = np.asarray(generate(*pair, *prompts, max_new_tokens=NUM_NEW).tokens)
    end_id = int(without_end[0, 3])
    out = generate(*pair, *prompts, max_new_tokens=NUM_NEW, end_id=end_id)
    for row in range(len(PROMPTS)):
        indices = np.flatnonzero(without_end[row] == end_id)
        length = NUM_NEW if indices.size == 0 else indices[0] + 1
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == without_end[row, :length].tolist() + [end_id] * (NUM_NEW - length)
        assert np.all(np.asarray(out.log_probs)[row, length:] == 0)
    assert 1 < out.lengths[0] < NUM_NEW
    assert out.lengths.max() == NUM_NEW


@pytest.mark.thorough
def test_the_loop_stops_when_all_rows_ended(gpt: Pair, pad: Pad) -> None:
    prompts = pad([PROMPTS[0]] * 4, "llll")
    without_end = generate(*gpt, *prompts, max_new_tokens=NUM_NEW).tokens[0].tolist()
    end_id = without_end[3]
    progress = advance(*gpt, prefill(*gpt, *prompts, max_new_tokens=NUM_NEW, end_id=end_id), NUM_NEW)
    assert int(progress.step) == without_end.index(end_id) + 1 < NUM_NEW
    assert progress.ended.all()


@pytest.mark.thorough
def test_only_allowed_ids_are_generated() -> None:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=100, vocab_multiple=64, num_layers=1)
    params = initial_params(model)
    options = {"max_new_tokens": 2, "sampling": Sampling(3.0), "key": jax.random.key(0)}
    everything = generate(model, params, np.full((400, 2), 99), **options).tokens
    assert 90 < int(everything.max()) < 100, "the padded rows of the table are no ids"
    few = generate(model, params, np.full((400, 2), 99), num_allowed_ids=7, **options).tokens
    assert int(few.max()) == 6


# ------------------------------------------------------------------------------------ one loop, one compile


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_chunks_are_bit_identical_to_one_call(gpt: Pair, pad: Pad, sampling: Sampling, chunk: int) -> None:
    prompts, options = pad(PROMPTS, "lrlr"), {"max_new_tokens": NUM_NEW, "sampling": sampling, "key": jax.random.key(2)}
    want = generate(*gpt, *prompts, **options)
    progress = prefill(*gpt, *prompts, **options)
    steps = [int(progress.step)]
    while steps[-1] < NUM_NEW:
        progress = advance(*gpt, progress, chunk)
        steps.append(int(progress.step))
    assert steps == [*range(1, NUM_NEW, chunk), NUM_NEW]
    for name in ("tokens", "lengths", "log_probs"):
        np.testing.assert_array_equal(getattr(progress, name), getattr(want, name))


def test_advance_donates_its_progress_and_nothing_else(gpt: Pair, pad: Pad) -> None:
    model, params = gpt
    key = jax.random.key(0)
    progress = prefill(model, params, *pad(PROMPTS, "llll"), max_new_tokens=NUM_NEW, sampling=SAMPLING, key=key)
    advance(model, params, progress, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(progress.state))
    assert not any(leaf.is_deleted() for leaf in [key, *jax.tree.leaves(params)])


@pytest.mark.thorough
def test_each_function_compiles_once() -> None:
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


@pytest.mark.thorough
def test_generate_can_be_called_inside_jit(gpt: Pair, pad: Pad) -> None:
    prompts = tuple(map(jnp.asarray, pad(PROMPTS, "llll")))
    inside = jax.jit(lambda params, prompts: generate(gpt[0], params, *prompts, max_new_tokens=NUM_NEW))
    outside = generate(*gpt, *prompts, max_new_tokens=NUM_NEW)
    np.testing.assert_array_equal(inside(gpt[1], prompts).tokens, outside.tokens)


@pytest.mark.thorough
def test_generate_in_shard_map_gives_the_same_tokens() -> None:
    model = tiny_model("gru-tiny")
    params, prompts = initial_params(model), np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    rows = jax.sharding.PartitionSpec("data")
    inside = jax.shard_map(
        lambda params, prompts: generate(model, params, prompts, max_new_tokens=4).tokens,
        mesh=sharding.make_mesh("data=2", devices=jax.devices()[:2]),
        in_specs=(jax.sharding.PartitionSpec(), rows), out_specs=rows,
    )  # fmt: skip
    np.testing.assert_array_equal(
        jax.jit(inside)(params, prompts), generate(model, params, prompts, max_new_tokens=4).tokens
    )


def test_sharded_parameters_generate_the_same(gpt: Pair, pad: Pad) -> None:
    model, params = gpt
    prompts = pad(PROMPTS, "llll")
    want = generate(model, params, *prompts, max_new_tokens=NUM_NEW)
    mesh_sharding = sharding.Sharding(sharding.make_mesh("data=2,tensor=4"))
    with mesh_sharding.scope():
        sharded_params = jax.device_put(params, mesh_sharding.tree(model.specs))
        out = generate(model, sharded_params, *prompts, max_new_tokens=NUM_NEW)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_allclose(out.log_probs, want.log_probs, atol=1e-4)


@pytest.mark.thorough
def test_a_long_cache_on_several_devices_gives_the_same_tokens() -> None:
    model = jaxlm.get_model("gpt2-tiny", max_positions=320)
    params = initial_params(model)
    prompts = np.random.default_rng(0).integers(0, 128, (8, 300)).astype(np.int32)
    want = generate(model, params, prompts, max_new_tokens=8)
    mesh_sharding = sharding.Sharding(sharding.make_mesh("data=2,tensor=4"))
    with mesh_sharding.scope():
        out = generate(model, jax.device_put(params, mesh_sharding.tree(model.specs)), prompts, max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_allclose(out.log_probs, want.log_probs, atol=1e-4)


@pytest.mark.thorough
def test_a_trace_is_not_reused_for_another_sharding(gpt: Pair) -> None:
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
        ({"temperature": 1e-38}, r"temperature=1e-38 is too small, .* use 0 \(greedy\), or at least 1e-30"),
        ({"top_k": 0}, r"top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p=1.5 must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be from 1e-30 to 1e\+30"),
        ({"repetition_penalty": 2e30}, r"repetition_penalty=2e\+30 must be from 1e-30 to 1e\+30"),
        ({"top_k": True}, "top_k=True must be a whole number or None"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number or None"),
        ({"temperature": "0.5"}, "temperature='0.5' must be a finite number"),
    ],
)
def test_errors_name_bad_sampling_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


VALID_ARGUMENTS = {"prompts": np.array([[5, 6], [7, 8]]), "max_new_tokens": 4}


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
            r"segment_ids of row 0 are \[1, 2\]: a prompt must be consecutive 1s",
        ),
        (
            {"prompts": np.ones((1, 3), int), "segment_ids": np.array([[1, 0, 1]])},
            r"segment_ids of row 0 are \[1, 0, 1\]: a prompt must be consecutive 1s",
        ),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 64}, r"65 tokens exceeds max_positions=64"),
        ({"end_id": 128}, r"end_id=128 can never be generated: ids are 0 to 127"),
        ({"end_id": 9, "num_allowed_ids": 9}, r"end_id=9 can never be generated: ids are 0 to 8"),
        ({"num_allowed_ids": 129}, r"num_allowed_ids=129 must be between 1 and vocab_size=128"),
        ({"sampling": Sampling()}, r"temperature=1.0 draws at random: pass a key"),
        ({"sampling": Sampling(0.0, top_k=129)}, r"top_k=129 exceeds the 128 ids"),
        ({"max_new_tokens": 23.0}, "max_new_tokens=23.0 must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"num_allowed_ids": 4.0}, "num_allowed_ids=4.0 must be a whole number or None"),
        ({"end_id": True}, "end_id=True must be a whole number"),
        ({"end_id": [1, 2.5]}, "end_id=2.5 must be a whole number"),
        ({"end_id": [2, True]}, "end_id=True must be a whole number"),
        ({"sampling": Sampling(), "key": 0}, r"key must be one JAX key, or one typed key per prompt .* got 0"),
        ({"sampling": Sampling(), "key": np.zeros((2, 2), np.uint32)}, r"key must be one JAX key, .* uint32\[2, 2\]"),
    ],
)
def test_bad_input_raises_before_compilation(gpt: Pair, arguments: dict[str, Any], message: str) -> None:
    model, params = gpt
    before = sample._generate._cache_size()
    for function in (generate, prefill):
        with pytest.raises(ValueError, match=message):
            function(model, params, **{**VALID_ARGUMENTS, **arguments})
    assert sample._generate._cache_size() == before


@pytest.mark.parametrize("end_id", [4, np.int64(4), jnp.int32(4), [4, 4], np.array([4]), (jnp.int32(4),)])
def test_end_ids_can_be_arrays(end_id: Any) -> None:
    assert as_end_ids(end_id) == (4,)
    assert Sampling(top_k=np.int64(4)) == Sampling(top_k=4)  # type: ignore[arg-type]


@pytest.mark.thorough
def test_a_mesh_that_splits_the_sequence_raises_before_compilation(gpt: Pair) -> None:
    def beams(model: Any, params: Any, **arguments: Any) -> Any:
        return beam_search(model, params, **arguments, beams=BeamConfig(2))

    def speculative(model: Any, params: Any, **arguments: Any) -> Any:
        return speculative_generate(SpeculativeModels(model, params, model, params), **arguments)

    mesh = sharding.make_mesh("data=2,sequence=4")
    message = (
        r"decoding reads one token per call, .* the rule seq=\('sequence',\) splits it over sequence=4 of the mesh "
        "data=2,sequence=4: use a mesh without this axis, or rules without 'seq'"
    )
    progress = prefill(*gpt, **VALID_ARGUMENTS)
    with sharding.Sharding(mesh).scope():
        for function in (generate, prefill, beams, speculative):
            with pytest.raises(ValueError, match=message):
                function(*gpt, **VALID_ARGUMENTS)
        with pytest.raises(ValueError, match=message):
            advance(*gpt, progress, 1)
        with pytest.raises(ValueError, match=message):  # before the model reads the source
            generate_text(tiny_model("t5", vocab_size=264, decoder_start_id=0), {}, ByteTokenizer(), ["a"])
    check_sharding(sharding.Sharding(mesh, sharding.Rules.of(batch=("data", "sequence"))))


def test_errors_name_bad_seen_ids(gpt: Pair) -> None:
    def run(sampling: Sampling, rows: int) -> None:
        settings = sample.check_and_make_settings(gpt[0], prompts, None, 2, sampling, None, None, None, None)
        sample.prefill_with_settings(*gpt, prompts, None, settings, seen=np.zeros((rows, settings.num_ids), bool))

    prompts = VALID_ARGUMENTS["prompts"]
    with pytest.raises(ValueError, match=r"seen needs a repetition penalty: set Sampling\(repetition_penalty=...\)"):
        run(GREEDY, 2)
    with pytest.raises(ValueError, match=r"seen \[1, 128\] must have the shape \[prompts, ids\] = \[2, 128\]"):
        run(Sampling(0.0, repetition_penalty=2.0), 1)


@pytest.mark.thorough
def test_the_longest_output_that_fits(gpt: Pair) -> None:
    """A prompt of 2 tokens and 63 new ones fit into 64 positions, because the last token is not read."""
    out = generate(*gpt, np.array([[5, 6]]), max_new_tokens=63)
    assert np.isfinite(out.log_probs).all()


def test_a_classifier_generates_no_tokens() -> None:
    model = jaxlm.get_model("gpt2-tiny", task="token_classification", num_labels=3)
    with pytest.raises(ValueError, match="this is a GPT with a head that labels tokens: it generates no tokens"):
        generate(model, {}, np.array([[5, 6]]), max_new_tokens=2)


def test_error_for_prompts_that_are_lists(gpt: Pair) -> None:
    with pytest.raises(TypeError, match=r"prompts must be an array, got a list: pass jnp.asarray\(prompts\)"):
        generate(*gpt, [[5, 6]], max_new_tokens=2)  # type: ignore[arg-type]


def test_a_repetition_penalty_requires_seen_tokens() -> None:
    with pytest.raises(ValueError, match=r"repetition_penalty=2.0 needs seen_BV"):
        filter_logits(Sampling(repetition_penalty=2.0), jnp.zeros((1, 4)))


def test_sampling_is_hashable_and_compares_by_value() -> None:
    assert hash(Sampling(top_k=3)) == hash(dataclasses.replace(Sampling(), top_k=3))


def test_the_repetition_penalty_accepts_prompts_of_a_small_dtype():
    model = tiny_model("gpt2-tiny")
    generated = [
        generate(
            model, initial_params(model), np.array([[1, 2]], dtype), max_new_tokens=2,
            sampling=Sampling(temperature=0.0, repetition_penalty=2.0),
        ).tokens
        for dtype in (np.int8, np.int32)
    ]  # fmt: skip
    np.testing.assert_array_equal(*generated)

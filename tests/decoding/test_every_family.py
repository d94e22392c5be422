"""Tests of decoding with every family: beam search against brute force, and greedy search against forward passes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.decoding import BeamConfig, beam_search, generate
from jaxlm.testing.helpers import (
    TINY,
    add_noise,
    decode_state,
    decodes,
    initial_params,
    random_tokens,
    relative_error,
    source_inputs,
    tiny_model,
    variant_params,
)

IDS, NUM_NEW = 4, 3
PROMPTS, SEGMENTS = np.array([[9, 10, 11], [0, 12, 13]], np.int32), np.array([[1, 1, 1], [0, 1, 1]], np.int32)

every_decoder = pytest.mark.parametrize("name", variant_params(name for name in TINY if decodes(tiny_model(name))))


@functools.cache
def model_and_params(name: str) -> tuple[Any, Any]:
    model = tiny_model(name)
    return model, add_noise(initial_params(model))


CONTINUATIONS = np.array(list(itertools.product(range(IDS), repeat=NUM_NEW)), np.int32)
"""All texts of NUM_NEW tokens."""


@functools.partial(jax.jit, static_argnums=0)
def next_log_probs(model: Any, params: Any, tokens: Any, inputs: Any) -> Any:
    """[B, T, IDS] log-probabilities over the ids that may be generated, by a forward pass without any state."""
    hidden, _ = model.apply(params, tokens, **inputs)
    return jax.nn.log_softmax(model.logits(params, hidden)[..., :IDS], axis=-1)


def log_probs_after(model: Any, params: Any, row: int, continuations: np.ndarray) -> np.ndarray:
    """[N, NUM_NEW, IDS] log-probabilities at each token of ``continuations`` [N, NUM_NEW] of the prompt of ``row``.

    The prompt has no padding. The texts of both rows have the same shape, so that the forward pass is compiled once:
    the shorter texts are padded at the end, which does not change earlier positions of a causal model.
    """
    prompt = PROMPTS[row][SEGMENTS[row] == 1]
    texts = np.zeros((len(continuations), PROMPTS.shape[1] + NUM_NEW - 1), np.int32)
    texts[:, : len(prompt)] = prompt
    texts[:, len(prompt) : len(prompt) + NUM_NEW - 1] = continuations[:, :-1]
    source = {key: np.repeat(x[row : row + 1], len(texts), axis=0) for key, x in source_inputs(model, 2).items()}
    return np.asarray(next_log_probs(model, params, texts, source))[:, len(prompt) - 1 :][:, :NUM_NEW]


def initial_state(model: Any, params: Any) -> Any:
    """The initial state with the encoded sources of both rows; None for a model without a source."""
    if not model.reads_source:
        return None
    return decode_state(model, params, source_inputs(model, 2)["source"], PROMPTS.shape[1] + NUM_NEW)


@pytest.mark.plain_cases(1)
@every_decoder
def test_wide_beam_search_equals_brute_force(name: str) -> None:
    model, params = model_and_params(name)
    beams = IDS ** (NUM_NEW - 1)
    out = beam_search(
        model,
        params,
        PROMPTS,
        SEGMENTS,
        max_new_tokens=NUM_NEW,
        num_allowed_ids=IDS,
        state=initial_state(model, params),
        beams=BeamConfig(num_beams=beams, length_penalty=0.0),
    )
    for row in range(2):
        log_probs = log_probs_after(model, params, row, CONTINUATIONS)
        totals = np.take_along_axis(log_probs, CONTINUATIONS[..., None], axis=-1)[..., 0].sum(axis=1)
        best = np.argsort(-totals, kind="stable")[:beams]
        np.testing.assert_allclose(out.scores[row], totals[best], rtol=1e-4, atol=1e-5)
        assert out.tokens[row, 0].tolist() == CONTINUATIONS[best[0]].tolist()
        assert {*map(tuple, out.tokens[row].tolist())} == {*map(tuple, CONTINUATIONS[best].tolist())}


@pytest.mark.plain_cases(1)
@every_decoder
def test_greedy_search_takes_the_most_likely_token_of_a_full_forward_pass(name: str) -> None:
    model, params = model_and_params(name)
    out = generate(
        model, params, PROMPTS, SEGMENTS, max_new_tokens=NUM_NEW, num_allowed_ids=IDS,
        state=initial_state(model, params),
    )  # fmt: skip
    for row in range(2):
        same_texts = np.tile(np.asarray(out.tokens[row]), (len(CONTINUATIONS), 1))  # same shape as above
        log_probs = log_probs_after(model, params, row, same_texts)[0]
        assert out.tokens[row].tolist() == np.argmax(log_probs, axis=-1).tolist()
        assert relative_error(out.log_probs[row], np.max(log_probs, axis=-1)) < 1e-4


def test_errors_for_a_missing_source_and_a_wrong_state() -> None:
    model, params = model_and_params("t5-tiny")
    with pytest.raises(
        ValueError, match=r"t5 reads a source: .* state=model.init_decode_state\(params, source, length\)"
    ):
        generate(model, params, PROMPTS, max_new_tokens=NUM_NEW)
    three_row_state = decode_state(model, params, random_tokens(model, 3, 5), 9)
    with pytest.raises(ValueError, match=r"layers/0/key of the state is \[3, 9, 64\], but the prompts have 2 rows"):
        generate(model, params, PROMPTS, max_new_tokens=NUM_NEW, state=three_row_state)
    flat_state = jax.tree.map(lambda leaf: leaf.reshape(-1), three_row_state)
    with pytest.raises(ValueError, match=r"layers/0/key of the state is \[1728\], but must have 3 axes"):
        generate(model, params, PROMPTS, max_new_tokens=NUM_NEW, state=flat_state)
    gpt, gpt_params = model_and_params("gpt2-tiny")
    with pytest.raises(ValueError, match="this is not a state of the model"):
        generate(gpt, gpt_params, PROMPTS, max_new_tokens=NUM_NEW, state=three_row_state)
    for length, slots in ((0, NUM_NEW), (2, 6)):  # a new state, and a state after two tokens of each row
        state = {**gpt.init_state(2, slots), "length": np.full(2, length, np.int32)}
        message = rf"{slots - length} free cache slots, .* need 5: make a state with a length of at least {length + 5}"
        with pytest.raises(ValueError, match=message):
            generate(gpt, gpt_params, PROMPTS, max_new_tokens=NUM_NEW, state=state)
    with pytest.raises(ValueError, match="the state has 4 free cache slots, but the prompts and the new tokens need 5"):
        generate(model, params, PROMPTS, max_new_tokens=NUM_NEW, state=model.init_state(2, 4))
    with pytest.raises(TypeError, match="family 'gpt' has no encoder"):
        gpt.init_decode_state(gpt_params, PROMPTS, 9)

"""Every family decodes through the same functions: whatever it carries is reordered, scored and streamed alike."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding import beam_search, generate
from tests.helpers import TINY, decodes, forms, lively, random_tokens, relative_error, source_of, tiny_model

IDS, NEW = 4, 3
PROMPTS, SEGMENTS = np.array([[9, 10, 11], [0, 12, 13]], np.int32), np.array([[1, 1, 1], [0, 1, 1]], np.int32)

every_decoder = pytest.mark.parametrize("name", forms(name for name in TINY if decodes(tiny_model(name))))


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    model = tiny_model(name)
    return model, lively(jax.jit(model.init)(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def next_log_probs(model: Any, params: Any, tokens: Any, inputs: Any) -> Any:
    """[B, T, IDS] log-probabilities over the ids that may be generated, by a forward pass without any state."""
    hidden, _ = model.apply(params, tokens, **inputs)
    return jax.nn.log_softmax(model.logits(params, hidden)[..., :IDS], axis=-1)


def own_source(model: Any, row: int, copies: int) -> dict[str, np.ndarray]:
    return {key: np.repeat(x[row : row + 1], copies, axis=0) for key, x in source_of(model, 2).items()}


def start(model: Any, params: Any) -> Any:
    """The state that has read the sources of both rows, or None."""
    if not model.reads_source:
        return None
    return model.init_decode_state(params, source_of(model, 2)["source"], PROMPTS.shape[1] + NEW)


@every_decoder
def test_beams_find_what_brute_force_finds(name: str) -> None:
    model, params = pair(name)
    beams = IDS ** (NEW - 1)
    out = beam_search(
        model, params, PROMPTS, SEGMENTS,
        max_new_tokens=NEW, beams=beams, length_penalty=0.0, allowed_ids=IDS, state=start(model, params),
    )  # fmt: skip
    continuations = np.array(list(itertools.product(range(IDS), repeat=NEW)), np.int32)
    for row in range(2):
        prompt = PROMPTS[row][SEGMENTS[row] == 1]
        texts = np.concatenate([np.tile(prompt, (len(continuations), 1)), continuations], axis=1)
        after = next_log_probs(model, params, texts[:, :-1], own_source(model, row, len(texts)))
        picked = np.take_along_axis(np.asarray(after)[:, len(prompt) - 1 :], continuations[..., None], axis=-1)
        totals = picked[..., 0].sum(axis=1)
        best = np.argsort(-totals, kind="stable")[:beams]
        np.testing.assert_allclose(out.scores[row], totals[best], rtol=1e-4, atol=1e-5)
        assert out.tokens[row, 0].tolist() == continuations[best[0]].tolist()
        assert {*map(tuple, out.tokens[row].tolist())} == {*map(tuple, continuations[best].tolist())}


@every_decoder
def test_greedy_takes_the_likeliest_token_of_a_full_forward_pass(name: str) -> None:
    model, params = pair(name)
    out = generate(
        model, params, PROMPTS, SEGMENTS, max_new_tokens=NEW, allowed_ids=IDS, state=start(model, params)
    )  # fmt: skip
    for row in range(2):
        text = [*PROMPTS[row][SEGMENTS[row] == 1], *np.asarray(out.tokens[row])]
        prompt = len(text) - NEW
        after = next_log_probs(model, params, np.array([text[:-1]], np.int32), own_source(model, row, 1))
        assert out.tokens[row].tolist() == jnp.argmax(after[0, prompt - 1 :], axis=-1).tolist()
        assert relative_error(out.log_probs[row], jnp.max(after[0, prompt - 1 :], axis=-1)) < 1e-4


def test_a_source_must_be_read_first_and_a_state_must_fit() -> None:
    model, params = pair("t5-tiny")
    with pytest.raises(
        ValueError, match=r"t5 reads a source: .* state=model.init_decode_state\(params, source, length\)"
    ):
        generate(model, params, PROMPTS, max_new_tokens=NEW)
    three = model.init_decode_state(params, random_tokens(model, 3, 5), 9)
    with pytest.raises(ValueError, match=r"layers/0/key of the state is \[3, 9, 64\], but the prompts have 2 rows"):
        generate(model, params, PROMPTS, max_new_tokens=NEW, state=three)
    gpt, gpt_params = pair("gpt2-tiny")
    with pytest.raises(ValueError, match="this is not a state of the model"):
        generate(gpt, gpt_params, PROMPTS, max_new_tokens=NEW, state=three)
    with pytest.raises(TypeError, match="family 'gpt' has no encoder"):
        gpt.init_decode_state(gpt_params, PROMPTS, 9)

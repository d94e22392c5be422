"""Tests of beam search against all continuations of a tiny vocabulary, and against a search without early stopping."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.decoding import BeamConfig, beam_search, generate
from jaxlm.testing.helpers import apply

Pair = tuple[Any, Any]
Pad = Callable[[list[list[int]], str], tuple[np.ndarray, np.ndarray]]
Forward = Callable[..., np.ndarray]

PROMPTS = [[1, 2, 3], [4], [0, 3]]
NUM_NEW = 4


def all_hypotheses(pair: Pair, forward: Forward, prompt: list[int], end_id: int | None, penalty: float) -> Any:
    """``(score, tokens)`` of all continuations of a prompt, best first."""
    V = pair[0].config.vocab_size
    continuations = list(itertools.product(range(V), repeat=NUM_NEW))
    log_probs = forward(*pair, [prompt + list(tokens) for tokens in continuations])
    scores = {}
    for tokens, after in zip(continuations, log_probs, strict=True):
        length = tokens.index(end_id) + 1 if end_id in tokens else NUM_NEW
        total = sum(after[len(prompt) - 1 + i, tokens[i]] for i in range(length))
        scores[tokens[:length]] = total / length**penalty
    return sorted(((score, tokens) for tokens, score in scores.items()), reverse=True)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("end_id", [None, 2])
def test_wide_beam_search_equals_brute_force(
    tiny_pair: Pair, end_id: int | None, pad: Pad, next_log_probs: Forward
) -> None:
    V = tiny_pair[0].config.vocab_size
    beams = V ** (NUM_NEW - 1)  # the number of live hypotheses before the last step, so none is dropped
    prompts = pad(PROMPTS, "lrr")
    for penalty in (0.0, 0.6, 1.0, 2.0, -1.0):
        config = BeamConfig(num_beams=beams, length_penalty=penalty)
        out = beam_search(*tiny_pair, *prompts, max_new_tokens=NUM_NEW, end_id=end_id, beams=config)
        out = jax.device_get(out)
        for row, prompt in enumerate(PROMPTS):
            expected = all_hypotheses(tiny_pair, next_log_probs, prompt, end_id, penalty)
            np.testing.assert_allclose(out.scores[row], [score for score, _ in expected[:beams]], rtol=1e-4, atol=1e-5)
            for k, (score, tokens) in enumerate(expected[:20]):
                score_gaps = [abs(score - expected[k + step][0]) for step in (-1, 1) if k + step >= 0]
                if min(score_gaps) > 1e-4:  # hypotheses with equal scores can have any order
                    padded_tokens = [*tokens, *[end_id] * (NUM_NEW - len(tokens))]
                    assert out.tokens[row, k].tolist() == padded_tokens
                    assert out.lengths[row, k] == len(tokens)
    assert len({len(tokens) for _, tokens in expected[:20]}) == (1 if end_id is None else 4)


def reference_search(
    pair: Pair, forward: Forward, prompt: list[int], new: int, beams: int, end_id: int, penalty: float
) -> list[tuple[float, list[int]]]:
    """Beam search with Python lists and full forward passes. It does not stop early."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, new + 1):
        rows = [prompt + tokens for _, tokens in live]
        log_probs = forward(*pair, rows + rows[:1] * (beams - len(rows)))
        candidates = [
            (total + after[len(row) - 1, token], [*tokens, token])
            for (total, tokens), row, after in zip(live, rows, log_probs, strict=False)
            for token in range(pair[0].config.vocab_size)
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        ends = [length == new or tokens[-1] == end_id for _, tokens in candidates]
        finished += [
            (total / length**penalty, tokens)
            for (total, tokens), end in list(zip(candidates, ends, strict=True))[:beams]
            if end
        ]
        live = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:beams]
        if not live:
            break
    return sorted(finished, key=lambda hypothesis: -hypothesis[0])[:beams]


def test_narrow_beams_with_early_stop_equal_the_reference_search(
    tiny_pair: Pair, pad: Pad, next_log_probs: Forward
) -> None:
    for penalty in (0.0, 0.6, 1.0, 2.0, -1.0):
        out = beam_search(
            *tiny_pair,
            *pad(PROMPTS, "rll"),
            max_new_tokens=10,
            end_id=2,
            beams=BeamConfig(num_beams=3, length_penalty=penalty),
        )
        for row, prompt in enumerate(PROMPTS):
            expected = reference_search(tiny_pair, next_log_probs, prompt, 10, 3, 2, penalty)
            assert [
                tokens[:length] for tokens, length in zip(out.tokens[row].tolist(), out.lengths[row], strict=True)
            ] == [tokens for _, tokens in expected]
            np.testing.assert_allclose(out.scores[row], [score for score, _ in expected], rtol=1e-4)


CALLS: list[int] = []


@dataclasses.dataclass(frozen=True)
class CountedModel:
    """A model that counts its executions (not its traces)."""

    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def apply(self, params: Any, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda: CALLS.append(1))
        return self.model.apply(params, tokens, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_the_loop_stops_when_nothing_can_improve(tiny_pair: Pair, next_log_probs: Forward) -> None:
    model, params = tiny_pair
    end_id = int(next_log_probs(model, params, [[4]])[0, 0].argmax())
    runs = {}
    for penalty in (0.0, 20.0):
        out = beam_search(
            CountedModel(model),
            params,
            np.array([[4]]),
            max_new_tokens=16,
            end_id=end_id,
            beams=BeamConfig(num_beams=1, length_penalty=penalty),
        )
        jax.block_until_ready(out)
        jax.effects_barrier()
        runs[penalty] = len(CALLS)
        CALLS.clear()
    # The end id is the most likely first token. Without a penalty, no longer hypothesis can have a larger sum. With a
    # large penalty, the longest output is the best, so the search must run to the last token.
    assert runs == {0.0: 1, 20.0: 16}


@pytest.mark.plain_cases(1)
def test_one_beam_without_an_end_is_greedy(pair: Pair, pad: Pad) -> None:
    prompts = pad([[5, 6, 7, 8], [11], [3, 20]], "lrl")
    out = beam_search(*pair, *prompts, max_new_tokens=6, beams=BeamConfig(num_beams=1))
    greedy = generate(*pair, *prompts, max_new_tokens=6)
    np.testing.assert_array_equal(out.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(out.scores[:, 0], greedy.log_probs.mean(axis=1), rtol=1e-4)


@pytest.mark.plain_cases(1)
def test_a_growing_cache_does_not_change_results(pair: Pair, pad: Pad, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = pad([[5, 6, 7, 8], [11], [3, 20]], "lrl")
    results = []
    for smallest in (2, 100):
        monkeypatch.setattr("jaxlm.decoding.beam.MIN_CACHE_SLOTS", smallest)
        results.append(
            beam_search(
                *pair, *prompts, max_new_tokens=14, end_id=2, beams=BeamConfig(num_beams=3, early_stopping="never")
            )
        )
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)
    np.testing.assert_allclose(results[0].scores, results[1].scores, rtol=1e-5)


@pytest.mark.thorough
def test_a_given_state_keeps_its_tokens(gpt: Pair) -> None:
    model, params = gpt
    text = np.array([[5, 6, 7, 8], [11, 3, 20, 4]], np.int32)
    _, state = apply(model, params, text[:, :2], state=model.init_state(2, 48))
    want = beam_search(model, params, text, max_new_tokens=30, beams=BeamConfig(num_beams=2))
    got = beam_search(model, params, text[:, 2:], max_new_tokens=30, state=state, beams=BeamConfig(num_beams=2))
    np.testing.assert_array_equal(want.tokens, got.tokens)


def test_fewer_hypotheses_than_beams(tiny_pair: Pair) -> None:
    """The unused beams have length 0 and a score of -inf."""
    out = beam_search(
        *tiny_pair, np.array([[1]]), max_new_tokens=1, num_allowed_ids=3, end_id=2, beams=BeamConfig(num_beams=7)
    )
    assert out.lengths.tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    assert sorted(out.tokens[0, :3, 0].tolist()) == [0, 1, 2]
    assert np.isfinite(out.scores[0]).tolist() == [True] * 3 + [False] * 4
    np.testing.assert_allclose(np.exp(out.scores[0]).sum(), 1.0, rtol=1e-5)


def test_a_state_without_a_batch_axis_is_an_error(tiny_pair: Pair) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithoutBatchAxis(CountedModel):
        def state_specs(self, batch: int, length: int) -> Any:
            specs = self.model.state_specs(batch, length)
            return jax.tree.map(lambda leaf: dataclasses.replace(leaf, axes=(None,) * len(leaf.axes)), specs)

        def init_state(self, batch: int, length: int) -> Any:
            return spec.init(self.model.state_specs(batch, length))

    with pytest.raises(ValueError, match=r"has axes .* none of them is 'batch'"):
        beam_search(
            WithoutBatchAxis(tiny_pair[0]),
            tiny_pair[1],
            np.array([[1]]),
            max_new_tokens=2,
            beams=BeamConfig(num_beams=2),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 64}, r"65 tokens exceeds max_positions=64"),
        ({"end_id": -1}, r"end_id=-1 can never be generated"),
        ({"segment_ids": np.zeros((1, 2), int)}, r"row 0 of the prompts is all padding"),
    ],
)
def test_errors_name_bad_input(gpt: Pair, arguments: dict[str, Any], message: str) -> None:
    given = {"prompts": np.array([[5, 6]]), "max_new_tokens": 4, "beams": BeamConfig(2), **arguments}
    with pytest.raises(ValueError, match=message):
        beam_search(*gpt, **given)


@pytest.mark.parametrize("limits", [3.7, np.array([2.9])])
def test_maximum_lengths_must_be_integers(gpt: Pair, limits: Any) -> None:
    with pytest.raises(TypeError, match=r"max_new_tokens=.* must be an integer, or one integer for each prompt"):
        beam_search(*gpt, np.array([[5, 6]]), max_new_tokens=limits, beams=BeamConfig(2))


def test_no_prompts_with_a_maximum_length_for_each_are_an_error(gpt: Pair) -> None:
    with pytest.raises(ValueError, match=r"prompts \[0, 3\] are empty: give at least one row"):
        beam_search(*gpt, np.ones((0, 3), np.int32), max_new_tokens=np.zeros(0, np.int32), beams=BeamConfig(2))


def test_a_list_of_prompts_with_a_maximum_length_for_each_is_rejected(gpt: Pair) -> None:
    with pytest.raises(TypeError, match="prompts"):
        beam_search(*gpt, [[5, 6]], max_new_tokens=np.array([2]), beams=BeamConfig(2))  # type: ignore[arg-type]


def test_a_number_of_beams_gives_the_fix(gpt: Pair) -> None:
    with pytest.raises(TypeError, match=r"beams=4 must be a BeamConfig: pass BeamConfig\(num_beams=4\)"):
        beam_search(*gpt, np.array([[5, 6]]), max_new_tokens=2, beams=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty=inf must be a finite number"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon' must be true or false or 'never'"),
        ({"num_beams": 2.0}, "num_beams=2.0 must be a whole number"),
    ],
)
def test_invalid_settings_give_the_reason(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamConfig(**arguments)

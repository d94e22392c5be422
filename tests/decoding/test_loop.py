"""Tests of the decoding loop of families whose memory has a decoding layout."""

import numpy as np
import pytest

from jaxlm import get_model
from jaxlm.decoding import BeamConfig, beam_search, generate, loop
from jaxlm.testing.helpers import initial_params, random_tokens


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["transformer-xl-tiny", "xlnet-tiny"])
def test_conversions_of_the_memory_between_tokens_do_not_change_the_results(monkeypatch, name):
    results = []
    for max_added, dropout in ((256, 0.1), (3, 0.2)):  # decoding has no dropout; another rate causes a compilation
        monkeypatch.setattr(loop, "MAX_ADDED_TOKENS", max_added)
        model = get_model(name, dropout=dropout)
        params, prompts = initial_params(model), random_tokens(model, 2, 4)
        segments = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], np.int32)
        greedy = generate(model, params, prompts, segments, max_new_tokens=10)
        beams = beam_search(model, params, prompts, segments, max_new_tokens=10, beams=BeamConfig(2))
        results.append((greedy.tokens, beams.tokens, greedy.log_probs, beams.scores))
    tokens, beam_tokens, *scores = results[0]
    assert np.array_equal(results[1][0], tokens)
    assert np.array_equal(results[1][1], beam_tokens)
    np.testing.assert_allclose(results[1][2], scores[0], atol=1e-5)
    np.testing.assert_allclose(results[1][3], scores[1], atol=1e-5)

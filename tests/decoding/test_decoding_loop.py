"""Tests of the decoding loop of families whose memory has a decoding layout."""

import numpy as np
import pytest

from jaxlm import get_model
from jaxlm.decoding import BeamConfig, beam_search, generate, loop
from jaxlm.nn import choices
from jaxlm.testing.helpers import initial_params, random_tokens


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["transformer-xl-tiny", "xlnet-tiny"])
def test_conversions_of_the_memory_between_tokens_do_not_change_the_results(monkeypatch, name):
    results = []
    # 0: the usual layout. 128: no conversion between tokens. 3: a conversion after every 3 tokens. Decoding has no
    # dropout, but another rate makes another model, so that ``jit`` compiles again.
    for max_added, dropout in ((0, 0.1), (128, 0.2), (3, 0.3)):
        monkeypatch.setattr(loop, "MAX_ADDED_TOKENS", max_added)
        monkeypatch.setattr(choices, "memory_decoding_layout", lambda use=max_added > 0: use)
        # The memory has 13 slots, and 13 + 3 is a multiple of 16. Otherwise, more slots would be added.
        assert loop._num_added_slots(13, 10) == {0: 3, 3: 3, 128: 19}[max_added]
        model = get_model(name, dropout=dropout)
        params, prompts = initial_params(model), random_tokens(model, 2, 4)
        segments = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], np.int32)
        greedy = generate(model, params, prompts, segments, max_new_tokens=10)
        beams = beam_search(model, params, prompts, segments, max_new_tokens=10, beams=BeamConfig(2))
        results.append((greedy.tokens, beams.tokens, greedy.log_probs, beams.scores))
    for tokens, beam_tokens, log_probs, beam_scores in results[1:]:
        assert np.array_equal(tokens, results[0][0])
        assert np.array_equal(beam_tokens, results[0][1])
        np.testing.assert_allclose(log_probs, results[0][2], atol=1e-5)
        np.testing.assert_allclose(beam_scores, results[0][3], atol=1e-5)

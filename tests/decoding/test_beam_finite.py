"""Tests that beam search raises if logits are not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import ByteTokenizer
from jaxlm.decoding import BeamConfig, GenerationConfig, NotFiniteError, beam_search, generate_text
from jaxlm.testing.helpers import initial_params, tiny_model
from tests.decoding.conftest import Recurrent, context_sensitive_params

MODEL = Recurrent()
PROMPTS = np.array([[5, 6, 7], [11, 9, 3], [3, 20, 4]], np.int32)
OPTIONS = {"max_new_tokens": 6, "beams": BeamConfig(3), "num_allowed_ids": 9}


def test_error_names_the_row_and_the_parameter() -> None:
    params = context_sensitive_params(MODEL)
    out = beam_search(MODEL, params, PROMPTS, **OPTIONS)
    assert out.finite.all()
    bad = {**params, "table": params["table"].at[9].set(jnp.nan)}
    with pytest.raises(NotFiniteError, match=r"row 1 are not finite: 1 parameter is not finite: table \(16 of 512"):
        beam_search(MODEL, bad, PROMPTS, **OPTIONS)
    flags = jax.jit(lambda params: beam_search(MODEL, params, PROMPTS, **OPTIONS).finite)(bad)
    assert flags.tolist() == [True, False, True]


def test_a_late_nan_is_detected_after_other_hypotheses_finished() -> None:
    params = context_sensitive_params(MODEL)
    out = beam_search(MODEL, params, PROMPTS[:1], **OPTIONS)
    bad = {**params, "table": params["table"].at[int(out.tokens[0, 0, 2])].set(jnp.nan)}
    with pytest.raises(NotFiniteError):
        beam_search(MODEL, bad, PROMPTS[:1], **OPTIONS, end_id=int(out.tokens[0, 1, 1]))


def test_error_names_the_source() -> None:
    model = tiny_model("t5-tiny", vocab_size=264)
    params = initial_params(model)
    bad = {**params, "token_embedding": params["token_embedding"].at[ord("*"), 0].set(jnp.inf)}
    with pytest.raises(NotFiniteError, match=r"the logits of source \d.* token_embedding \(1 of"):
        generate_text(model, bad, ByteTokenizer(), ["abc", "a*"], GenerationConfig(4, num_beams=2))

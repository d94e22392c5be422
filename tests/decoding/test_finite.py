"""Tests that generation and scoring raise if logits are not finite, and that the error names rows and parameters."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import ByteTokenizer
from jaxlm.decoding import (
    GenerationConfig,
    NotFiniteError,
    Sampling,
    advance,
    finite,
    generate,
    generate_text,
    log_likelihood,
    perplexity,
    prefill,
    stream_text,
    target_log_likelihood,
)
from jaxlm.decoding.finite import _describe_values, check_finite, rename_rows_in_errors, rows_finite
from jaxlm.testing.helpers import initial_params, tiny_model
from tests.decoding.conftest import Recurrent, RecurrentConfig, context_sensitive_params

MODEL = Recurrent()
PROMPTS = np.array([[5, 6, 7], [11, 9, 3], [3, 20, 4]], np.int32)
NUM_NEW = 6


def with_values(params: Any, name: str, at: Any, value: float) -> Any:
    """The parameters with ``params[name][at]`` set to ``value``."""
    return {**params, name: params[name].at[at].set(value)}


@pytest.fixture(scope="module")
def params() -> Any:
    return context_sensitive_params(MODEL)


def test_rows_finite_detects_every_value_that_is_not_finite() -> None:
    lowest = float(np.finfo(np.float32).min)  # the logit of vocabulary padding
    rows = jnp.asarray([[0.0, lowest], [0.0, np.nan], [np.inf, 0.0], [0.0, -np.inf]])
    assert rows_finite(rows).tolist() == [True, False, False, False]


def test_error_names_rows_and_parameters(params: Any) -> None:
    assert generate(MODEL, params, PROMPTS, max_new_tokens=NUM_NEW).finite.tolist() == [True] * 3
    bad = with_values(params, "table", 9, np.nan)
    message = r"the logits of row 1 are not finite: 1 parameter is not finite: table \(16 of 512 values\)\. Load the"
    for sampling, key in ((Sampling(temperature=0.0), None), (Sampling(0.9, top_k=5, top_p=0.9), jax.random.key(0))):
        options = {
            "max_new_tokens": NUM_NEW,
            "sampling": sampling,
            "key": key,
            "num_allowed_ids": 9,
        }  # id 9 occurs only in the prompt of row 1
        with pytest.raises(NotFiniteError, match=message) as caught:
            generate(MODEL, bad, PROMPTS, **options)
        assert caught.value.rows == [1]
        with pytest.raises(ValueError, match=message):
            prefill(MODEL, bad, PROMPTS, **options)
    bad = with_values(with_values(params, "head", (4, 2), np.inf), "recurrent", (slice(3), 1), -np.inf)
    with pytest.raises(
        NotFiniteError, match=r"row 0, 1, 2 .*: 2 parameters .*: head \(1 of 512 values\), recurrent \(3 "
    ):
        generate(MODEL, bad, PROMPTS, max_new_tokens=NUM_NEW)


def test_logits_of_a_row_count_until_it_ends(params: Any) -> None:
    tokens = np.asarray(generate(MODEL, params, PROMPTS, max_new_tokens=NUM_NEW).tokens)
    token = int(next(t for t in tokens[0, 1:-1] if t not in tokens[1:] and t not in PROMPTS and t != tokens[0, 0]))
    bad = with_values(params, "table", token, np.nan)  # the model reads this token after generating it
    with pytest.raises(NotFiniteError, match="row 0 are"):
        generate(MODEL, bad, PROMPTS, max_new_tokens=NUM_NEW)
    progress = prefill(MODEL, bad, PROMPTS, max_new_tokens=NUM_NEW)
    with pytest.raises(NotFiniteError, match="row 0 are"):
        advance(MODEL, bad, progress, NUM_NEW)
    out = generate(MODEL, bad, PROMPTS, max_new_tokens=NUM_NEW, end_id=token)
    assert out.finite.tolist() == [True] * 3, "the token ends the row and is never read"
    np.testing.assert_array_equal(out.tokens[1:], tokens[1:])


def test_error_names_other_causes(params: Any) -> None:
    large = {**params, "head": 3e38 / jnp.abs(params["head"]).max() * params["head"]}
    with pytest.raises(
        NotFiniteError, match=r"all parameters are finite, so probably an activation overflows.*3e\+38 in head: check"
    ):
        generate(MODEL, large, PROMPTS, max_new_tokens=NUM_NEW)
    state = {"h": jnp.zeros((16, 3)).at[:, 2].set(jnp.nan)}
    with pytest.raises(
        NotFiniteError, match=r"row 2 .* finite, but 1 state array is not finite: h \(16 of 48 .*Make a new"
    ):
        generate(MODEL, params, PROMPTS, max_new_tokens=NUM_NEW, state=state)
    jitted_prefill = jax.jit(lambda state: prefill(MODEL, params, PROMPTS, max_new_tokens=NUM_NEW, state=state))
    message = (
        r"row 2 .* 1 state array is not finite: h \(.*Either the initial state was not finite \(make a new state\)"
    )
    with pytest.raises(NotFiniteError, match=message):
        advance(MODEL, params, jitted_prefill(state), NUM_NEW)
    state = {"h": state["h"], "count": jnp.zeros(16, jnp.int32)}
    assert _describe_values({"count": state["count"]}) == ([], ""), "an array of integers is always finite"
    assert _describe_values(state)[0] == ["h (16 of 48 values)"]


def test_error_shortens_long_lists_and_names_low_precision() -> None:
    model = tiny_model("gpt2-tiny", dtype="bfloat16")
    good = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, jax.random.key(0)))
    flags = jnp.zeros((5,), bool)
    with pytest.raises(
        NotFiniteError, match=r"row 0, 1, 2 and 2 more .* compute in float32 instead of dtype='bfloat16'"
    ):
        check_finite(model, good, flags)
    bad = jax.tree.map(lambda x: x + jnp.nan, good)
    count = len(jax.tree.leaves(good))
    with pytest.raises(NotFiniteError, match=rf"{count} parameters .*layers/\w+.*, and {count - 3} more\. Load"):
        check_finite(model, bad, flags)
    with (
        pytest.raises(NotFiniteError, match="the logits of text 4, 7 are"),
        rename_rows_in_errors("text", [7, 7, 7, 4, 4]),
    ):
        check_finite(model, bad, flags)


def test_errors_can_be_pickled() -> None:
    """A process pool pickles the error of a worker."""
    error = pickle.loads(pickle.dumps(NotFiniteError("prompt", [3, 5], "a cause")))
    assert (type(error), error.what, error.rows, error.cause) == (NotFiniteError, "prompt", [3, 5], "a cause")
    assert str(error) == "the logits of prompt 3, 5 are not finite: a cause"


def test_parameters_are_searched_only_after_an_error(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_describe_values", None)
    generate(MODEL, params, PROMPTS, max_new_tokens=NUM_NEW)
    log_likelihood(MODEL, params, PROMPTS)


def test_inside_jit_only_the_flags_report_rows_that_are_not_finite(params: Any) -> None:
    @jax.jit
    def run(params: Any, prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = generate(MODEL, params, prompts, max_new_tokens=NUM_NEW)
        return out.finite, log_likelihood(MODEL, params, prompts)

    flags, scores = run(with_values(params, "table", 9, jnp.nan), PROMPTS)
    assert flags.tolist() == [True, False, True]
    assert np.isfinite(scores).all(axis=1).tolist() == [True, False, True]


def test_errors_of_scores(params: Any) -> None:
    """``log_likelihood`` and ``perplexity`` name the rows or windows, and the parameters, that are not finite."""
    bad = with_values(params, "table", 9, np.nan)
    with pytest.raises(NotFiniteError, match=r"row 1 .*table \(16 of 512 values\)"):
        log_likelihood(MODEL, bad, PROMPTS)
    segments = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], np.int32)  # the 9 is padding
    assert np.isfinite(log_likelihood(MODEL, bad, PROMPTS, segments)).all()
    bad_head = with_values(params, "head", (9, 0), -np.inf)  # no target is 9, so the scores of the targets are finite
    with pytest.raises(NotFiniteError, match=r"head \(1 of 512 values\)"):
        log_likelihood(MODEL, bad_head, PROMPTS[[0, 2]])
    ids = np.array([5, 6, 7, 8, 10, 11, 9, 12, 13], np.int32)
    with pytest.raises(NotFiniteError, match="the logits of window 2, 3 are not finite"):
        perplexity(MODEL, bad, ids, window=4, stride=2, batch_size=2)


def test_errors_of_target_scores() -> None:
    """``target_log_likelihood`` names the parameter that is not finite."""
    model = tiny_model("t5-tiny")
    params = initial_params(model)
    bad = {**params, "token_embedding": params["token_embedding"].at[9].set(jnp.nan)}
    with pytest.raises(NotFiniteError, match=r"token_embedding \(\d+ of \d+ values\)"):
        target_log_likelihood(model, bad, PROMPTS, PROMPTS, start_id=0)
    with pytest.raises(ValueError, match="start ids have id 261 in row 0"):  # 261 would wrap to 5 in uint8
        target_log_likelihood(model, bad, PROMPTS, PROMPTS.astype(np.uint8), start_id=261)


@pytest.fixture(scope="module")
def byte_model() -> tuple[Any, Any]:
    """A model of bytes. The embedding of "z" is not finite."""
    model = Recurrent(RecurrentConfig(vocab_size=257))
    return model, with_values(context_sensitive_params(model), "table", ord("z"), np.nan)


def test_error_names_the_texts(byte_model: tuple[Any, Any]) -> None:
    tokenizer = ByteTokenizer()

    def run(texts: list[str], function: Callable[..., Any] = generate_text, **fields: Any) -> Any:
        return function(*byte_model, tokenizer, texts, GenerationConfig(3, **fields))

    texts = ["ab", "abcdef", "zz", "abc", "zabcd"]
    for fields in ({"batch_size": 2}, {"batch_size": 1, "stop": ("#",)}):
        with pytest.raises(NotFiniteError, match=r"the logits of prompt \d are not finite: .*table") as caught:
            run(texts, **fields)
        assert caught.value.rows == [4], "the longest batch comes first"
    with pytest.raises(NotFiniteError, match="prompt 2, 4 are"):
        run(texts, batch_size=None)
    with pytest.raises(NotFiniteError, match="prompt 0 are"):
        run("za", stream_text)  # type: ignore[arg-type]

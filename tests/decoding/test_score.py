"""Tests of scores: against log-softmax, packed against separate documents, and windows against single contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jaxlm
from jaxlm import spec
from jaxlm.decoding import log_likelihood, perplexity, score

Pair = tuple[Any, Any]
RNG = np.random.default_rng(0)


def target_log_probs(log_probs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probs[:, : tokens.shape[1] - 1], tokens[:, 1:, None], axis=-1)[..., 0]


def test_scores_equal_log_softmax(pair: Pair, next_log_probs: Callable[..., np.ndarray]) -> None:
    tokens = RNG.integers(0, 32, (3, 17))
    expected = target_log_probs(next_log_probs(*pair, tokens), tokens)
    out = log_likelihood(*pair, tokens)
    assert out.shape == (3, 16)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_packed_documents_are_scored_like_separate_documents(
    gpt: Pair, next_log_probs: Callable[..., np.ndarray]
) -> None:
    tokens = RNG.integers(0, 128, (1, 12))
    segment_ids = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    out = np.asarray(log_likelihood(*gpt, tokens, segment_ids))[0]
    separate = [tokens[:, 2:6], tokens[:, 6:10]]
    first, second = (target_log_probs(next_log_probs(*gpt, document), document)[0] for document in separate)
    np.testing.assert_allclose(out[2:5], first, atol=1e-4)
    np.testing.assert_allclose(out[6:9], second, atol=1e-4)
    assert out[[0, 1, 5, 9, 10]].tolist() == [0.0] * 5, "padding, and the first token of a document"


def float32_sizes(jaxpr: Any) -> Iterator[int]:
    """Yield the size of each float32 array of a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars if var.aval.dtype == jnp.float32)
        for inner in jaxprs_in_params(equation.params):
            yield from float32_sizes(inner)


def test_logits_are_computed_in_chunks(gpt: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = gpt
    tokens = jnp.asarray(RNG.integers(0, 128, (2, 20)))
    expected = log_likelihood(model, params, tokens[:, :14])
    score._token_scores.clear_cache()
    monkeypatch.setattr(score, "CHUNK_LOGITS", 2 * 5 * 128)  # chunks of 5, 5 and 3 steps, and 2 steps of padding
    np.testing.assert_allclose(log_likelihood(model, params, tokens[:, :14]), expected, atol=1e-5)
    # In this narrow model, all other activations are smaller than the logits.
    narrow = jaxlm.get_model("gpt2-tiny", embed_dim=4, num_heads=1, mlp_dim=4, max_positions=20)
    jaxpr = jax.make_jaxpr(lambda p, t: log_likelihood(narrow, p, t))(spec.abstract(narrow.specs), tokens)
    assert max(float32_sizes(jaxpr.jaxpr)) == 2 * 5 * 128
    score._token_scores.clear_cache()


def test_one_window_gives_the_mean_of_all_scores(pair: Pair) -> None:
    ids = RNG.integers(0, 32, 20)
    out = perplexity(*pair, ids, window=50, stride=10)
    expected = -np.asarray(log_likelihood(*pair, ids[None]), np.float64).mean()
    assert out.tokens == 19
    np.testing.assert_allclose(out.nats_per_token, expected, rtol=1e-5)
    np.testing.assert_allclose(out.perplexity, np.exp(expected), rtol=1e-5)
    assert type(out.nats_per_token) is float


@pytest.mark.parametrize(("count", "window", "stride"), [(50, 12, 4), (45, 12, 11), (37, 12, 1), (13, 12, 5)])
def test_each_token_counts_once_in_the_first_window_that_contains_it(
    gpt: Pair, next_log_probs: Callable[..., np.ndarray], count: int, window: int, stride: int
) -> None:
    ids = RNG.integers(0, 128, count)
    rows, ends = [], []
    for token in range(1, count):
        start = 0
        while start + window <= token:
            start = min(start + stride, count - window)
        rows.append(ids[start:token])
        ends.append(ids[token])
    log_probs = next_log_probs(*gpt, rows)
    expected = [
        -row_log_probs[len(row) - 1, end] for row, end, row_log_probs in zip(rows, ends, log_probs, strict=True)
    ]
    for batch_size in (1, 4):
        out = perplexity(*gpt, ids, window=window, stride=stride, batch_size=batch_size)
        assert out.tokens == count - 1
        np.testing.assert_allclose(out.nats_per_token, np.mean(expected), rtol=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_size(gpt: Pair) -> None:
    model, params = gpt
    out = perplexity(model, jax.tree.map(jnp.zeros_like, params), np.arange(40, dtype=np.uint16), window=12, stride=6)
    np.testing.assert_allclose(out.perplexity, 128, rtol=1e-5)


def test_only_models_that_predict_the_next_token_have_scores() -> None:
    for name, fields, message in (
        ("bert-tiny", {}, "a BERT with a masked-token head: it does not predict each token from the tokens before it"),
        ("gpt2-tiny", {"task": "token_classification"}, "a GPT with a head that labels tokens: it does not predict"),
        ("resnet-tiny", {}, "a ResNet with a classification head: it does not predict"),
        ("t5-tiny", {}, "it does not predict .*; use target_log_likelihood"),
    ):
        model = jaxlm.get_model(name, **fields)
        with pytest.raises(ValueError, match=message):
            log_likelihood(model, {}, np.array([[5, 6]]))
        with pytest.raises(ValueError, match=message):
            perplexity(model, {}, np.array([5, 6, 7]), window=3, stride=1)


@pytest.mark.parametrize(
    ("tokens", "segment_ids", "message"),
    [
        (np.array([[5]]), None, r"tokens have only 1 column"),
        (np.array([5, 6]), None, r"tokens must be integers of shape \[batch, time\], got int64\[2\]"),
        (np.array([[5, 128]]), None, r"tokens have id 128 in row 0 at position 1"),
        (np.array([[5, 6]]), np.array([[1]]), r"segment_ids \[1, 1\] must have the shape of tokens \[1, 2\]"),
        (np.ones((1, 66), int), None, r"65 tokens exceed max_positions=64"),
        (np.ones((2, 67), int), np.repeat([[2], [1]], 67, axis=1) * (np.arange(67) > 0), r"row 0 .* of 65 tokens.*=64"),
    ],
)
def test_errors_name_bad_tokens(gpt: Pair, tokens: Any, segment_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(*gpt, tokens, segment_ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": np.array([5])}, "ids: 1 tokens, at least 2 needed"),
        ({"ids": np.array([[5, 6]])}, r"ids: expected a 1-D array of integer ids, got int64\[1, 2\]"),
        ({"ids": np.array([0.5, 0.5])}, r"got float64\[2\]"),
        ({"stride": 8}, r"stride=8 must be from 1 to window - 1 = 7"),
        ({"stride": 0}, r"stride=0 must be from 1 to"),
        ({"window": 1, "stride": 1}, r"window=1 must be at least 2"),
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"ids": np.full(9, 500)}, r"ids: id 500 at position 0"),
        ({"ids": np.array([5, 2**32 + 5])}, r"ids: id 4294967301 at position 1"),  # 5 as int32
        ({"ids": np.ones(99, int), "window": 90}, r"89 tokens exceed max_positions=64"),
    ],
)
def test_errors_name_bad_windows(gpt: Pair, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(*gpt, **{"ids": np.arange(20), "window": 8, "stride": 4, **arguments})


def test_a_perplexity_above_the_largest_float_is_infinite() -> None:
    assert score.perplexity_of(0.0) == 1.0
    assert score.perplexity_of(1000.0) == np.inf

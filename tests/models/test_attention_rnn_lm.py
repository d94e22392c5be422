"""Tests of LSTMs with self-attention in addition to tests/oracles/attention_rnn_lm.py and the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import attention_rnn_lm
from jaxlm.testing.helpers import add_noise, apply, initial_params, random_tokens, relative_error, tiny_model

LM, CLASSIFIER = "attention-rnn-lm-tiny", "attention-rnn-classifier-tiny"
TOLERANCE = 2e-5


@functools.cache
def small(name, **overrides):
    model = tiny_model(name, **{"num_layers": 1, "embed_dim": 8, "hidden_dim": 12, **overrides})
    return model, add_noise(initial_params(model))


def hidden_in_chunks(model, params, tokens, state, size, segment_ids=None):
    outputs = []
    for start in range(0, tokens.shape[1], size):
        inputs = {} if segment_ids is None else {"segment_ids": segment_ids[:, start : start + size]}
        hidden, state = apply(model, params, tokens[:, start : start + size], **{"state": state, **inputs})
        outputs.append(hidden)
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_memory_of_the_window_is_enough(parts):
    """Calls shorter and longer than the window, with padded and packed rows and a memory of three slots."""
    model, params = small(LM, window=3, parts=parts)
    tokens = random_tokens(model, 2, 12)
    segments = np.array([[1] * 5 + [0] + [1] * 3 + [2] * 3, [0, 0] + [1] * 8 + [0, 0]], np.int32)
    want, _ = apply(model, params, tokens, segment_ids=segments)
    state = model.init_state(2, 100)
    assert state["memory"]["hidden"].shape == (2, 3, 2 * 12 // parts)
    for size in (1, 2, 5):
        got = hidden_in_chunks(model, params, tokens, state, size, segments)
        assert relative_error(got[segments > 0], want[segments > 0]) < TOLERANCE


def test_a_memory_without_window_keeps_the_last_tokens():
    model, params = small(LM)
    tokens = random_tokens(model, 2, 9)
    want, _ = apply(model, params, tokens)
    assert relative_error(hidden_in_chunks(model, params, tokens, model.init_state(2, 9), 3), want) < TOLERANCE
    short_memory_hidden = hidden_in_chunks(model, params, tokens, model.init_state(2, 4), 1)
    assert relative_error(short_memory_hidden[:, :5], want[:, :5]) < TOLERANCE
    assert relative_error(short_memory_hidden[:, 5:], want[:, 5:]) > 1e-4
    window, _ = small(LM, window=4)
    assert relative_error(short_memory_hidden, apply(window, params, tokens)[0]) < TOLERANCE


def test_tokens_attend_only_to_the_window():
    model, params = small(LM, window=2)
    # Without recurrence, only attention depends on earlier tokens.
    layer_without_recurrence = {
        **params["layer_0"],
        "weight_hidden": jnp.zeros_like(params["layer_0"]["weight_hidden"]),
    }
    layer_without_recurrence["bias"] = layer_without_recurrence["bias"].at[1].set(-100.0)  # closes the forget gates
    tokens = np.arange(8, dtype=np.int32)[None]

    def hidden(table):
        return model.apply({**params, "layer_0": layer_without_recurrence, "token_embedding": table}, tokens)[0][0]

    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(params["token_embedding"])))
    influence_TS = jacobian[:, :, :8].max(axis=(1, 3)) > 1e-20
    distance = np.arange(8)[:, None] - np.arange(8)[None]
    np.testing.assert_array_equal(influence_TS, (distance >= 0) & (distance <= 2))


def test_hops_have_weights_only_on_real_tokens():
    model, params = small(CLASSIFIER, hops=3)
    tokens = random_tokens(model, 2, 6)
    segments = np.array([[1] * 6, [0] + [1] * 3 + [0] * 2], np.int32)
    hidden, _ = apply(model, params, tokens, segment_ids=segments)
    weights = attention_rnn_lm.attention_weights(model.config, params, hidden, segments)
    assert weights.shape == (2, 3, 6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert np.all(np.asarray(weights)[1][:, segments[1] == 0] == 0.0)
    pooled = model.pool(params, hidden, segment_ids=segments)
    assert relative_error(pooled, np.einsum("brt,btd->brd", weights, hidden).reshape(2, 1, -1)) < 1e-5


def test_redundancy_of_disjoint_hops_is_zero():
    disjoint = jnp.eye(4)[None, :2]
    uniform = jnp.full((1, 2, 4), 0.25)  # every entry of A A^T is 1/4
    np.testing.assert_allclose(attention_rnn_lm.redundancy(disjoint), [0.0])
    np.testing.assert_allclose(attention_rnn_lm.redundancy(uniform), [2 * 0.75**2 + 2 * 0.25**2])


def test_errors_name_bad_input():
    with pytest.raises(ValueError, match="parts=4 is unknown"):
        attention_rnn_lm.Config(parts=4)
    with pytest.raises(ValueError, match="parts=3 does not divide hidden_dim=10"):
        attention_rnn_lm.Config(parts=3, hidden_dim=10)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        attention_rnn_lm.Config(window=0)
    model, params = small(CLASSIFIER)
    with pytest.raises(TypeError, match="only task='causal' carries a state"):
        model.state_specs(1, 4)
    with pytest.raises(ValueError, match="carries no state: leave state=None"):
        model.apply(params, np.zeros((1, 2), np.int32), state={})
    model, params = small(LM)
    with pytest.raises(ValueError, match="task='causal' has no pooling attention"):
        model.pool(params, np.zeros((1, 2, 12), np.float32))

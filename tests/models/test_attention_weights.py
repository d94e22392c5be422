"""``Model.attention_weights``: the attention weights of every layer."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.testing.helpers import apply, decode_state, initial_params

SELF_ATTENTION_IS_CAUSAL = {
    "gpt2-tiny": True, "llama-tiny": True, "bert-tiny": False, "roberta-tiny": False, "transformer-xl-tiny": True,
    "xlnet-tiny": None,
}  # fmt: skip
"""Models with self-attention, and whether it is causal (None: not checked)."""


def tokens_of(model, batch, length, seed=0):
    return np.random.default_rng(seed).integers(5, model.config.vocab_size, (batch, length))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", SELF_ATTENTION_IS_CAUSAL)
def test_weights_sum_to_one_and_are_zero_where_masked(name):
    model = jaxlm.get_model(name)
    params = initial_params(model)
    tokens = tokens_of(model, 2, 7)
    segments = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3])
    weights = model.attention_weights(params, tokens, segment_ids=segments)
    assert list(weights) == ["self"]
    streams = 2 if model.family == "xlnet" else 1
    assert len(weights["self"]) == streams * model.config.num_layers
    for layer in weights["self"][::streams]:  # in the query stream of XLNet, some queries have no keys
        weights_BHTS = np.asarray(layer)
        T, S = weights_BHTS.shape[2:]
        assert weights_BHTS.shape == (2, model.config.num_heads, 7, S)
        np.testing.assert_allclose(weights_BHTS[0].sum(-1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(weights_BHTS[1, :, :4].sum(-1), 1.0, rtol=1e-5)
        assert not weights_BHTS[1, :, :4, S - 3 :].any()
        if SELF_ATTENTION_IS_CAUSAL[name]:
            assert not weights_BHTS[0][:, np.triu(np.ones((T, T), bool), 1)].any()


def test_an_encoder_decoder_has_three_kinds_of_weights():
    model = jaxlm.get_model("t5-tiny")
    params = initial_params(model)
    weights = model.attention_weights(params, tokens_of(model, 2, 5), source=tokens_of(model, 2, 8, 1))
    shapes = {kind: {layer.shape[2:] for layer in layers} for kind, layers in weights.items()}
    assert shapes == {"encoder": {(8, 8)}, "decoder": {(5, 5)}, "cross": {(5, 8)}}
    for layer in weights["cross"]:
        np.testing.assert_allclose(layer.sum(-1), 1.0, rtol=1e-5)


def test_rows_that_read_the_same_source_have_their_own_cross_weights():
    model = jaxlm.get_model("t5-tiny")
    params, tokens, source = initial_params(model), tokens_of(model, 2, 3), tokens_of(model, 1, 4, 1)
    states = [decode_state(model, params, np.repeat(source, rows, axis=0), 8) for rows in (1, 2)]
    states[0] = {**states[1], "source": states[0]["source"]}
    shared, separate = (model.attention_weights(params, tokens, state=state) for state in states)
    for got, want in zip(shared["cross"], separate["cross"], strict=True):
        assert got.shape == (2, model.config.num_heads, 3, 4)
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["attention-rnn-tiny", "attention-rnn-luong-tiny"])
def test_an_rnn_with_attention_has_one_array_of_weights(name):
    model = jaxlm.get_model(name)
    params = initial_params(model)
    source = tokens_of(model, 2, 8, 1)
    segments = jnp.asarray([[1] * 8, [1] * 6 + [0] * 2])
    weights = model.attention_weights(params, tokens_of(model, 2, 5), source=source, source_segment_ids=segments)
    assert {kind: [layer.shape for layer in layers] for kind, layers in weights.items()} == {"cross": [(2, 1, 5, 8)]}
    np.testing.assert_allclose(weights["cross"][0].sum(-1), 1.0, rtol=1e-5)
    assert not weights["cross"][0][1, 0, :, 6:].any()


def test_attention_pooling_has_weights_of_each_hop():
    model = jaxlm.get_model("attention-rnn-classifier-tiny")
    params = initial_params(model)
    weights = model.attention_weights(params, tokens_of(model, 2, 6), segment_ids=jnp.ones((2, 6), jnp.int32))
    assert {kind: [layer.shape for layer in layers] for kind, layers in weights.items()} == {"pool": [(2, 2, 1, 6)]}
    np.testing.assert_allclose(weights["pool"][0].sum(-1), 1.0, rtol=1e-5)


def test_a_family_without_attention_raises():
    model = jaxlm.get_model("gru-tiny")
    with pytest.raises(TypeError, match="family 'gru' has no attention weights"):
        model.attention_weights(initial_params(model), tokens_of(model, 1, 4))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_raises(shape):
    model = jaxlm.get_model("gpt2-tiny")
    with pytest.raises(ValueError, match=rf"tokens \[{shape[0]}, {shape[1]}\] are empty: give at least one row"):
        model.attention_weights(initial_params(model), np.zeros(shape, np.int32))


def test_recording_does_not_change_later_calls():
    model = jaxlm.get_model("gpt2-tiny")
    params, tokens = initial_params(model), tokens_of(model, 1, 6)
    before, _ = apply(model, params, tokens)
    model.attention_weights(params, tokens)
    after, _ = apply(model, params, tokens)
    np.testing.assert_array_equal(before, after)


@pytest.mark.thorough
def test_weights_with_a_state():
    """The keys include the tokens or slots of the state."""
    model = jaxlm.get_model("transformer-xl-tiny", embed_dim=256, num_heads=4, memory_length=160)
    params, tokens = initial_params(model), tokens_of(model, 1, 160)
    _, state = apply(model, params, tokens, state=model.init_state(1, 160))
    (weights, *_) = model.attention_weights(params, tokens[:, :1], state=state)["self"]
    assert weights.shape == (1, 4, 1, 161)
    stacked = jaxlm.get_model("gpt2-tiny", scan_layers=True)
    params, tokens = initial_params(stacked), tokens_of(stacked, 1, 3)
    weights = stacked.attention_weights(params, tokens, state=stacked.init_state(1, 8))["self"]
    assert [layer.shape[2:] for layer in weights] == [(3, 8)] * stacked.config.num_layers


@pytest.mark.parametrize("name", ["alexnet-tiny", "resnet-tiny", "xlnet-tiny"])
def test_a_model_without_a_classifier_has_no_pooled_output(name):
    model = jaxlm.get_model(name, task="none")
    params = initial_params(model)
    hidden, _ = apply(model, params, tokens_of(model, 1, 16))
    with pytest.raises(ValueError, match="task='none' has no pooled output: set task='classification'"):
        model.pool(params, hidden)

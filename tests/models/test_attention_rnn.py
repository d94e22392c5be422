"""Tests of recurrent encoder-decoders in addition to tests/oracles/attention_rnn.py and the contract."""

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import spec
from jaxlm.decoding import BeamConfig, beam_search
from jaxlm.models import attention_rnn, get_model
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    decode_state,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)

VARIANTS = ("attention-rnn-tiny", "attention-rnn-luong-tiny")
COPY = "attention-rnn-copy-tiny"
TOLERANCE = 2e-5
every_variant = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def small(name, **overrides):
    model = tiny_model(name, embed_dim=8, hidden_dim=10, output_dim=6, **overrides)
    return model, add_noise(initial_params(model))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, **inputs):
    return model.logits(params, model.apply(params, tokens, **inputs)[0])


def test_published_sizes():
    K, m, n, maxout = 30000, 620, 1000, 500
    gru = 3 * (m * n + n * n + n)
    decoder = gru + 3 * 2 * n * n + (n * n + n) + (n * n + 2 * n * n + n)  # C; W_s; W_a, U_a, v_a
    output = 2 * maxout * (n + m + 2 * n + 1) + K * (maxout + 1)
    assert get_model("bahdanau-2015").num_parameters == 2 * K * m + 2 * gru + decoder + output
    V, lstm = 50000, 4 * (2 * n * n + n)
    expected = 2 * V * n + 2 * 4 * lstm + 4 * n * n + (2 * n * n + n) + V * (n + 1)  # input feeding; W_c; the head
    assert get_model("luong-2015").num_parameters == expected


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "overrides"),
    [(VARIANTS[0], {}), (VARIANTS[1], {"score": "dot", "window": 2}), (COPY, {}), (VARIANTS[1], {"copy": True})],
)
def test_beam_search_finds_all_continuations(name, overrides):
    """With as many beams as hypotheses, the result has the probabilities of all continuations, best first."""
    V, num_new = 4, 3
    model, params = small(name, vocab_size=V, **overrides)
    params = jax.tree.map(lambda x, weight: 2.5 * x if weight else x, params, spec.decay_mask(model.specs))
    source = np.array([[1, 2, 3, 0, 1], [0, 3, 1, 2, 2]], np.int32)
    segments = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int32)
    prompts = np.array([[1], [2]], np.int32)
    out = beam_search(
        model,
        params,
        prompts,
        max_new_tokens=num_new,
        state=decode_state(model, params, source, 1, segments),
        beams=BeamConfig(num_beams=V ** (num_new - 1), length_penalty=0.0),
    )
    continuations = np.array(list(itertools.product(range(V), repeat=num_new)), np.int32)
    for row in range(2):
        decoder_input = np.concatenate(
            [np.repeat(prompts[row : row + 1], V**num_new, axis=0), continuations[:, :-1]], axis=1
        )
        inputs = {"source": np.repeat(source[row : row + 1], V**num_new, axis=0)}
        inputs["source_segment_ids"] = np.repeat(segments[row : row + 1], V**num_new, axis=0)
        logits = np.asarray(logits_of(model, params, decoder_input, **inputs))
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        scores = np.take_along_axis(log_probs, continuations[:, :, None], axis=2).sum((1, 2))
        order = np.argsort(-scores)[: V ** (num_new - 1)]
        np.testing.assert_allclose(out.scores[row], scores[order], rtol=1e-4)
        has_distinct_score = np.diff(scores[order], append=-np.inf) < -1e-3
        has_distinct_score &= np.diff(scores[order], prepend=np.inf) < -1e-3
        assert has_distinct_score.sum() > 5
        np.testing.assert_array_equal(out.tokens[row][has_distinct_score], continuations[order][has_distinct_score])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*VARIANTS, COPY])
def test_packed_rows_decode_in_several_calls(name):
    """Each document uses its own source, for two ways to split the row into calls."""
    model, params = small(name)
    tokens, source = random_tokens(model, 2, 14), random_tokens(model, 2, 11, seed=1)
    segments = np.array([[1] * 4 + [2] * 7 + [3] * 3, [0, 0] + [1] * 5 + [0] + [3] * 5 + [0]], np.int32)
    source_segments = np.array([[1] * 5 + [2] * 2 + [3] * 4, [0] + [1] * 3 + [3] * 6 + [0]], np.int32)
    inputs = {"source": source, "source_segment_ids": source_segments, "segment_ids": segments}
    want = np.asarray(apply(model, params, tokens, **inputs)[0])
    for cuts in ((4, 5, 8), (1, 2, 3, 9, 13)):
        state, outputs = decode_state(model, params, source, 1, source_segments), []
        for start, stop in zip((0, *cuts), (*cuts, 14), strict=True):
            chunk = slice(start, stop)
            hidden, state = apply(model, params, tokens[:, chunk], state=state, segment_ids=segments[:, chunk])
            outputs.append(hidden)
        got = np.concatenate(outputs, axis=1)
        assert relative_error(got[segments > 0], want[segments > 0]) < TOLERANCE


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", [*VARIANTS, COPY])
def test_a_document_without_source_has_no_context(name):
    model, params = small(name)
    tokens = random_tokens(model, 1, 6)
    segments = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    sources = [random_tokens(model, 1, 5, seed=seed) for seed in (1, 2)]
    first, second = (
        np.asarray(apply(model, params, tokens, source=source, segment_ids=segments)[0]) for source in sources
    )
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first[:, 3:], second[:, 3:])
    assert relative_error(first[:, :3], second[:, :3]) > 1e-3
    no_source = {"source": sources[0], "source_segment_ids": np.zeros((1, 5), np.int32)}  # only padding
    assert relative_error(apply(model, params, tokens[:, 3:], **no_source)[0], first[:, 3:]) < TOLERANCE


def test_the_encoder_of_luong_equals_flax():
    model, params = small(VARIANTS[1])
    source = random_tokens(model, 2, 9)
    x = np.asarray(params["token_embedding"])[source]
    for name in ("layer_0", "layer_1"):
        layer_params = jax.device_get(params["encoder"][name])
        weights = {}
        for index, gate in enumerate("ifgo"):
            weights[f"i{gate}"] = {"kernel": layer_params["weight_input"][:, index]}
            weights[f"h{gate}"] = {
                "kernel": layer_params["weight_hidden"][:, index],
                "bias": layer_params["bias"][index],
            }
        layer = flax.linen.RNN(flax.linen.OptimizedLSTMCell(10))
        x = jax.jit(layer.apply)({"params": {"cell": weights}}, x)
    assert relative_error(jax.jit(model.encode)(params, source), x) < TOLERANCE


@every_variant
def test_separate_source_and_target_vocabularies(name):
    model, params = small(name, vocab_size=9, source_vocab_size=30)
    tokens, source = random_tokens(model, 2, 4), np.array([[29, 3], [1, 28]], np.int32)
    hidden, _ = apply(model, params, tokens, source=source)
    assert np.isfinite(np.asarray(hidden)).all()
    hidden, _ = apply(model, params, tokens, source=source + np.array([[1], [0]], np.int32))
    assert np.isnan(np.asarray(hidden[0])).all()
    assert np.isfinite(np.asarray(hidden[1])).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 2}, "attention='bahdanau' needs num_layers=1, got 2"),
        ({"score": "dot"}, "attention='bahdanau' needs score='concat', got 'dot'"),
        ({"window": 3}, "attention='bahdanau' needs window=None, got 3"),
        ({"attention": "luong", "window": 0}, "window=0 must be at least 1"),
        ({"attention": "vaswani"}, "attention='vaswani' is unknown"),
        ({"source_vocab_size": 0}, "source_vocab_size=0 must be at least 1"),
        ({"copy": True}, "copy=True needs source_vocab_size=None, got 30000"),
        (
            {"copy": True, "source_vocab_size": None, "attention": "luong", "window": 3},
            "copy=True needs window=None, got 3",
        ),
        ({"copy": True, "source_vocab_size": None, "task": "none"}, "copy=True needs task='seq2seq', got 'none'"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        attention_rnn.Config(**fields)


@every_variant
def test_errors_name_bad_input(name):
    model, params = small(name)
    tokens, source = np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32)
    state = decode_state(model, params, source, 3)
    for inputs, message in (
        ({}, "source .to train. or state .to decode, from init_decode_state., got neither"),
        ({"source": source, "state": state}, "got both"),
        ({"state": state, "source_segment_ids": source}, "pass them to init_decode_state as segment_ids"),
        ({"source": source[:1]}, r"source \[1, 4\] and tokens \[2, 3\] must have the same number of rows"),
        (
            {"source": source, "source_segment_ids": tokens},
            r"source_segment_ids \[2, 3\] must have the shape of source",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(params, tokens, **inputs)
    headless, params = small(name, task="none")
    assert "head" not in params
    with pytest.raises(ValueError, match="a model with task='none' has no head"):
        headless.logits(params, np.zeros((1, 1, 6), np.float32))


# ------------------------------------------------------------------------------------------------------- copying


def with_gate(params, logit):
    """Parameters that generate with probability sigmoid(logit) in every state."""
    copy = jax.tree.map(np.zeros_like, jax.device_get(params["copy"]))
    return {**params, "copy": {**copy, "bias": np.full(1, logit, np.float32)}}


def test_copy_probabilities_are_attention_weights_of_source_tokens():
    model, params = small(COPY, vocab_size=20)
    source, tokens = np.array([[3, 5, 3, 7], [11, 2, 2, 2]], np.int32), random_tokens(model, 2, 6)
    hidden, _ = apply(model, with_gate(params, 40.0), tokens, source=source)
    copied = np.asarray(hidden)[..., -20:]
    np.testing.assert_allclose(copied.sum(-1), 1.0, rtol=1e-6)
    for row, ids in enumerate(source):
        assert set(np.flatnonzero(copied[row, 0])) == set(ids)
    # If two positions have the same token, its probability is the sum of their weights.
    changed_source = np.array([[3, 5, 3, 7], [11, 2, 2, 2]], np.int32)
    changed_source[0, 2] = 5
    changed, _ = apply(model, params, tokens, source=changed_source)
    assert relative_error(np.asarray(changed)[0, :, -20:], copied[0]) > 1e-2
    generating = with_gate(params, -40.0)
    probabilities = jax.jit(jax.nn.softmax)(logits_of(model, generating, tokens, source=source))
    np.testing.assert_allclose(probabilities, copied, atol=1e-6)


def test_generation_without_copying_equals_the_plain_model():
    copying, params = small(COPY)
    plain, _ = small(VARIANTS[0])
    tokens, source = random_tokens(plain, 2, 6), random_tokens(plain, 2, 5, seed=1)
    params_without_copy = {name: tree for name, tree in params.items() if name != "copy"}
    assert spec.differences(plain.specs, params_without_copy) == []
    want = jax.jit(jax.nn.log_softmax)(logits_of(plain, params_without_copy, tokens, source=source))
    got = logits_of(copying, with_gate(params, 40.0), tokens, source=source)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.thorough
def test_the_mixture_is_normalized_with_finite_gradients_at_probability_zero():
    model, params = small(COPY, vocab_size=20)
    head = jax.tree.map(lambda x: 1e4 * np.asarray(x), params["head"])  # probabilities that underflow
    params = {**params, "head": head}
    tokens, source = random_tokens(model, 2, 6), random_tokens(model, 2, 5, seed=1)
    log_p = np.asarray(logits_of(model, params, tokens, source=source), np.float64)
    np.testing.assert_allclose(np.log(np.exp(log_p).sum(axis=-1)), 0.0, atol=1e-5)

    def loss(params):
        hidden, _ = apply(model, params, tokens, source=source)
        return model.cross_entropy(params, hidden, np.roll(tokens, -1, axis=1), jnp.ones(tokens.shape))

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert value > 1e3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.thorough
def test_copying_learns_unseen_words():
    """The target is the source, with tokens that do not occur in training, so only copying can predict them."""
    model = tiny_model(COPY, vocab_size=40)
    rng = np.random.default_rng(0)
    params = initial_params(model)

    def loss(params, source):
        decoder_input = jnp.concatenate([jnp.zeros_like(source[:, :1]), source[:, :-1]], axis=1)
        hidden, _ = apply(model, params, decoder_input, source=source)
        return model.cross_entropy(params, hidden, source, jnp.ones(source.shape)) / source.size

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, source):
        value, gradients = jax.value_and_grad(loss)(params, source)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(optimizer.init)(params)
    for _ in range(150):
        params, state, _ = step(params, state, rng.integers(1, 30, (32, 5)).astype(np.int32))
    unseen = rng.integers(30, 40, (32, 5)).astype(np.int32)
    assert float(jax.jit(loss)(params, unseen)) < np.log(40)

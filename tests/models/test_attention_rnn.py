"""Recurrent encoder-decoders: what the oracle (tests/oracles/attention_rnn.py) and the contract do not see."""

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.decoding import beam_search
from jaxlm.models import attention_rnn, get_model
from tests.helpers import lively, random_tokens, relative_error, tiny_model

FORMS = ("attention-rnn-tiny", "attention-rnn-luong-tiny")
TOLERANCE = 2e-5
every_form = pytest.mark.parametrize("name", FORMS)


@functools.cache
def small(name, **overrides):
    model = tiny_model(name, embed_dim=8, hidden_dim=10, output_dim=6, **overrides)
    return model, lively(jax.jit(model.init)(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, inputs):
    return model.apply(params, tokens, **inputs)


@functools.partial(jax.jit, static_argnums=0)
def started(model, params, source, segment_ids=None):
    return model.start(params, source, 1, segment_ids=segment_ids)


def test_published_sizes_are_those_of_the_weights_in_the_papers():
    K, m, n, maxout = 30000, 620, 1000, 500
    gru = 3 * (m * n + n * n + n)
    decoder = gru + 3 * 2 * n * n + (n * n + n) + (n * n + 2 * n * n + n)  # C; W_s; W_a, U_a, v_a
    output = 2 * maxout * (n + m + 2 * n + 1) + K * (maxout + 1)
    assert get_model("bahdanau-2015").num_parameters == 2 * K * m + 2 * gru + decoder + output
    V, lstm = 50000, 4 * (2 * n * n + n)
    expected = 2 * V * n + 2 * 4 * lstm + 4 * n * n + (2 * n * n + n) + V * (n + 1)  # input feeding; W_c; the head
    assert get_model("luong-2015").num_parameters == expected


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(FORMS[0], {}), (FORMS[1], {"score": "dot", "window": 2})],
)
def test_beams_carry_all_that_the_decoder_needs(name, overrides):
    """Beams wide enough for every hypothesis give the probabilities of every continuation, best first."""
    V, new = 4, 3
    model, params = small(name, vocab_size=V, **overrides)
    params = jax.tree.map(lambda x, weight: 2.5 * x if weight else x, params, spec.decay_mask(model.specs))
    source = np.array([[1, 2, 3, 0, 1], [0, 3, 1, 2, 2]], np.int32)
    segments = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int32)
    prompts = np.array([[1], [2]], np.int32)
    out = beam_search(
        model, params, prompts, max_new_tokens=new, beams=V ** (new - 1), length_penalty=0.0,
        state=started(model, params, source, segments),
    )  # fmt: skip
    continuations = np.array(list(itertools.product(range(V), repeat=new)), np.int32)
    for row in range(2):
        read = np.concatenate([np.repeat(prompts[row : row + 1], V**new, axis=0), continuations[:, :-1]], axis=1)
        inputs = {"source": np.repeat(source[row : row + 1], V**new, axis=0)}
        inputs["source_segment_ids"] = np.repeat(segments[row : row + 1], V**new, axis=0)
        log_probs = jax.nn.log_softmax(model.logits(params, hidden_of(model, params, read, inputs)[0]))
        scores = np.take_along_axis(np.asarray(log_probs), continuations[:, :, None], axis=2).sum((1, 2))
        order = np.argsort(-scores)[: V ** (new - 1)]
        np.testing.assert_allclose(out.scores[row], scores[order], rtol=1e-4)
        clear = np.diff(scores[order], append=-np.inf) < -1e-3
        clear &= np.diff(scores[order], prepend=np.inf) < -1e-3
        assert clear.sum() > 5
        np.testing.assert_array_equal(out.tokens[row][clear], continuations[order][clear])


@every_form
def test_a_state_decodes_packed_rows_in_pieces(name):
    """Each document begins with its own source, wherever the calls are cut."""
    model, params = small(name)
    tokens, source = random_tokens(model, 2, 14), random_tokens(model, 2, 11, seed=1)
    segments = np.array([[1] * 4 + [2] * 7 + [3] * 3, [0, 0] + [1] * 5 + [0] + [3] * 5 + [0]], np.int32)
    source_segments = np.array([[1] * 5 + [2] * 2 + [3] * 4, [0] + [1] * 3 + [3] * 6 + [0]], np.int32)
    inputs = {"source": source, "source_segment_ids": source_segments, "segment_ids": segments}
    want, _ = hidden_of(model, params, tokens, inputs)
    for cuts in ((4, 5, 8), (1, 2, 3, 9, 13)):
        state, pieces = started(model, params, source, source_segments), []
        for a, b in zip((0, *cuts), (*cuts, 14), strict=True):
            hidden, state = hidden_of(
                model, params, tokens[:, a:b], {"state": state, "segment_ids": segments[:, a:b]}
            )  # fmt: skip
            pieces.append(hidden)
        got = jnp.concatenate(pieces, axis=1)
        assert relative_error(got[segments > 0], want[segments > 0]) < TOLERANCE


@every_form
def test_a_document_whose_source_is_missing_finds_nothing(name):
    model, params = small(name)
    tokens = random_tokens(model, 1, 6)
    segments = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    sources = [random_tokens(model, 1, 5, seed=seed) for seed in (1, 2)]
    one, other = (hidden_of(model, params, tokens, {"source": s, "segment_ids": segments})[0] for s in sources)
    assert np.isfinite(np.asarray(one)).all()
    np.testing.assert_array_equal(one[:, 3:], other[:, 3:])
    assert relative_error(one[:, :3], other[:, :3]) > 1e-3


def test_the_encoder_of_luong_is_that_of_flax():
    model, params = small(FORMS[1])
    source = random_tokens(model, 2, 9)
    x = np.asarray(params["token_embedding"])[source]
    for name in ("layer_0", "layer_1"):
        own = params["encoder"][name]
        weights = {}
        for index, gate in enumerate("ifgo"):
            weights[f"i{gate}"] = {"kernel": own["weight_input"][:, index]}
            weights[f"h{gate}"] = {"kernel": own["weight_hidden"][:, index], "bias": own["bias"][index]}
        layer = flax.linen.RNN(flax.linen.OptimizedLSTMCell(10))
        x = layer.apply({"params": {"cell": weights}}, x)
    assert relative_error(model.encode(params, source), x) < TOLERANCE


@every_form
def test_source_and_target_may_have_their_own_ids(name):
    model, params = small(name, vocab_size=9, source_vocab_size=30)
    tokens, source = random_tokens(model, 2, 4), np.array([[29, 3], [1, 28]], np.int32)
    hidden, _ = hidden_of(model, params, tokens, {"source": source})
    assert np.isfinite(np.asarray(hidden)).all()
    hidden, _ = hidden_of(model, params, tokens, {"source": source + np.array([[1], [0]], np.int32)})
    assert np.isnan(np.asarray(hidden[0])).all()
    assert np.isfinite(np.asarray(hidden[1])).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 2}, "attention='bahdanau' has num_layers=1, got 2"),
        ({"score": "dot"}, "attention='bahdanau' has score='concat', got 'dot'"),
        ({"window": 3}, "attention='bahdanau' has window=None, got 3"),
        ({"attention": "luong", "window": 0}, "window=0 must be at least 1"),
        ({"attention": "vaswani"}, "attention='vaswani' is unknown"),
        ({"source_vocab_size": 0}, "source_vocab_size=0 must be at least 1"),
    ],
)
def test_a_config_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        attention_rnn.Config(**fields)


@every_form
def test_bad_input(name):
    model, params = small(name)
    tokens, source = np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32)
    state = model.start(params, source, 3)
    for inputs, message in (
        ({}, "source .to train. or state .to decode, from start., got neither"),
        ({"source": source, "state": state}, "got both"),
        ({"state": state, "source_segment_ids": source}, "source_segment_ids belong to start"),
        ({"source": source[:1]}, r"source \[1, 4\] must have as many rows as tokens \[2, 3\]"),
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

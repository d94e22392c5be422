"""Tests of both the LSTM and the GRU family: dropout rates, documents over several calls, encoders, regularization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import get_model, recurrent
from jaxlm.testing.helpers import add_noise, apply, initial_params, random_tokens, relative_error, tiny_model

TOLERANCE = 2e-6

pytestmark = pytest.mark.parametrize("name", ["lstm", "gru"])


@functools.cache
def noisy_params(model):
    return add_noise(initial_params(model))


def setup(name, batch=2, length=9, **overrides):
    model = tiny_model(name, **overrides)
    shape = {
        field: value for field, value in overrides.items() if "dropout" not in field
    }  # without dropout rates, so that each shape is initialized only once
    return model, noisy_params(tiny_model(name, **shape)), random_tokens(model, batch, length)


def hidden_of(model, params, tokens, **inputs):
    return jax.jit(lambda p, inputs: model.apply(p, tokens, **inputs)[0])(params, inputs)


def outputs_of(model, params, tokens, key):
    """Two arrays: the outputs of the last layer after dropout, and before dropout."""
    return jax.jit(lambda p: model.module.apply_with_outputs(model.config, p, tokens, key=key)[:2])(params)


def test_layer_widths(name):
    """The last layer has the width of the embedding only if the head is tied."""
    gates = {"lstm": 4, "gru": 3}[name]
    shapes = {
        path: spec["weight_input"].shape
        for path, spec in get_model(f"{name}-tiny", num_layers=3).specs.items()
        if path.startswith("layer_")
    }
    assert shapes == {"layer_0": (24, gates, 48), "layer_1": (48, gates, 48), "layer_2": (48, gates, 24)}
    untied = get_model(f"{name}-tiny", tie_embeddings=False).specs
    assert untied["layer_1"]["weight_input"].shape == (48, gates, 48)
    assert untied["head"]["weight"].shape == (128, 48)
    encoder = get_model(f"{name}-encoder-tiny").specs
    assert encoder["layer_1"]["backward"]["weight_input"].shape == (2 * 16, gates, 16)
    assert encoder["classifier"]["weight"].shape == (2 * 16, 2)
    assert "head" not in encoder


def test_embedding_dropout_drops_and_rescales_whole_word_types(name):
    model, params, tokens = setup(name, batch=3, length=20, embedding_dropout=0.5, num_layers=1)
    key = jax.random.key(4)

    def loss(table):
        return jnp.sum(model.apply({**params, "token_embedding": table}, tokens, key=key)[0] ** 2)

    kept = np.abs(jax.jit(jax.grad(loss))(params["token_embedding"])).max(axis=1) > 0
    seen = np.isin(np.arange(128), tokens)
    assert 0.2 < kept[seen].mean() < 0.8
    table = np.where(kept[:, None], np.asarray(params["token_embedding"]) * 2.0, np.float32(0.0))
    without_dropout = hidden_of(model, {**params, "token_embedding": table}, tokens)
    assert relative_error(hidden_of(model, params, tokens, key=key), without_dropout) < TOLERANCE


def test_weight_dropout_has_one_mask_for_all_rows_and_steps(name):
    model, params, _ = setup(name, num_layers=1, weight_dropout=0.5)
    tokens = np.full((2, 9), 3, np.int32)
    key = jax.random.key(1)
    hidden = np.asarray(hidden_of(model, params, tokens, key=key))
    assert relative_error(hidden[0], hidden[1]) == 0.0
    assert relative_error(hidden, hidden_of(model, params, tokens)) > 1e-2

    def loss(weight):
        layer = {**params["layer_0"], "weight_hidden": weight}
        return jnp.sum(model.apply({**params, "layer_0": layer}, tokens, key=key)[0] ** 2)

    weight = np.asarray(params["layer_0"]["weight_hidden"])
    kept = np.asarray(jax.jit(jax.grad(loss))(weight)) != 0
    assert 0.4 < kept.mean() < 0.6
    layer = {**params["layer_0"], "weight_hidden": np.where(kept, weight * 2.0, np.float32(0.0))}
    assert relative_error(hidden, hidden_of(model, {**params, "layer_0": layer}, tokens)) < TOLERANCE


@pytest.mark.parametrize("mask", ["locked", "fresh"])
def test_only_locked_dropout_has_one_mask_for_all_steps(name, mask):
    model, params, tokens = setup(name, output_dropout=0.4, dropout_mask=mask, num_layers=1)
    dropped, raw = map(np.asarray, outputs_of(model, params, tokens, jax.random.key(2)))
    kept = dropped != 0
    assert 0.4 < kept.mean() < 0.8
    assert relative_error(dropped[kept], raw[kept] / 0.6) < 1e-6
    assert np.all(kept == kept[:, :1]) == (mask == "locked")
    assert not np.array_equal(kept[0], kept[1])
    assert relative_error(hidden_of(model, params, tokens, key=jax.random.key(2)), dropped) < TOLERANCE


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("rate", ["input_dropout", "hidden_dropout"])
def test_input_and_hidden_dropout_change_outputs_with_both_masks(name, rate):
    without_dropout = hidden_of(*setup(name))
    for mask in ("locked", "fresh"):
        model, params, tokens = setup(name, **{rate: 0.3}, dropout_mask=mask)
        assert relative_error(hidden_of(model, params, tokens, key=jax.random.key(0)), without_dropout) > 1e-2


def test_documents_start_and_continue_over_calls(name):
    """Two calls of 5 tokens.

    Row 0: call 2 starts a new document. Row 1: document 1 continues after padding, then document 2 starts. Row 2: call
    1 has only padding.
    """
    model, params, tokens = setup(name, batch=3, length=10)
    segments = np.array([[1] * 5 + [2] * 5, [1, 1, 1, 0, 0, 0, 1, 1, 2, 2], [0] * 5 + [1] * 5], np.int32)
    step = jax.jit(lambda t, s, ids: model.apply(params, t, state=s, segment_ids=ids))
    first, state = step(tokens[:, :5], model.init_state(3, 10), segments[:, :5])
    second, state = step(tokens[:, 5:], state, segments[:, 5:])
    hidden = np.concatenate([first, second], axis=1)
    assert np.isfinite(hidden).all()
    assert state["last_segment"].tolist() == [2, 2, 1]
    for row in range(3):
        for document in range(1, segments[row].max() + 1):
            positions = segments[row] == document
            separate = apply(model, params, tokens[row : row + 1, positions])[0]
            assert relative_error(hidden[row : row + 1, positions], separate) < TOLERANCE


def test_the_state_is_float32_and_of_constant_size(name):
    model, params, tokens = setup(name, dtype="bfloat16")
    _, state = jax.jit(lambda t, s: model.apply(params, t, state=s))(tokens, model.init_state(2, 1))
    assert model.state_specs(2, 1) == model.state_specs(2, 1000)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["layer_0"])} == {jnp.dtype("float32")}
    assert set(state["layer_0"]) == ({"hidden", "cell"} if name == "lstm" else {"hidden"})


def test_an_encoder_reads_both_directions_and_has_no_state(name):
    model = get_model(f"{name}-encoder-tiny")
    params, tokens = noisy_params(model), random_tokens(model, 1, 6)
    changed = tokens.copy()
    changed[0, 3] += 1
    change = np.abs(hidden_of(model, params, tokens) - hidden_of(model, params, changed)).max(axis=2)[0]
    assert np.all(change > 0)
    with pytest.raises(TypeError, match="only direction='forward' carries a state"):
        model.state_specs(1, 6)
    with pytest.raises(ValueError, match="carries no state: leave state out"):
        model.apply(params, tokens, state={})
    with pytest.raises(ValueError, match="direction='both' reads the tokens that task='causal' predicts"):
        get_model(name, direction="both")


def test_pool_is_the_maximum_over_real_tokens(name):
    model = get_model(f"{name}-encoder-tiny")
    hidden = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    segments = np.array([[0, 1, 1, 1, 0], [1] * 5, [0] * 5], np.int32)
    got = np.asarray(jax.jit(model.pool)({}, hidden, segment_ids=segments))
    assert got.shape == (3, 1, 32)
    assert np.array_equal(got[0, 0], hidden[0, 1:4].max(axis=0))
    assert np.array_equal(got[1, 0], hidden[1].max(axis=0))
    assert np.array_equal(got[2, 0], np.zeros(32))
    assert np.array_equal(model.pool({}, hidden), hidden.max(axis=1, keepdims=True))


def test_regularization_equals_the_published_formula(name):
    model, params, tokens = setup(name, output_dropout=0.4, num_layers=1)
    dropped, raw = (np.asarray(x, np.float64) for x in outputs_of(model, params, tokens, jax.random.key(2)))
    want = 2.0 * (dropped**2).mean() + 0.5 * ((raw[:, 1:] - raw[:, :-1]) ** 2).mean()
    assert (
        relative_error(recurrent.regularization(dropped, raw, activation_weight=2.0, slowness_weight=0.5), want) < 1e-6
    )
    # Row 0: two documents of 3 and 4 tokens and 2 padding tokens; row 1: padding only.
    segments = np.array([[1] * 3 + [2] * 4 + [0] * 2, [0] * 9], np.int32)
    steps = np.concatenate([np.diff(raw[0, :3], axis=0), np.diff(raw[0, 3:7], axis=0)])
    want = 2.0 * (dropped[0, :7] ** 2).mean() + (steps**2).mean()
    dropped[1] = raw[0, 8] = np.nan  # padding does not count, even if it is NaN
    assert relative_error(recurrent.regularization(dropped, raw, segments), want) < 1e-6
    assert float(recurrent.regularization(dropped, raw, 0 * segments)) == 0.0


@pytest.mark.plain_cases(8)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight_dropout", 1.0, r"weight_dropout=1.0 must be in \[0, 1\)"),
        ("hidden_dim", 0, "hidden_dim=0 must be at least 1"),
        ("direction", "backward", "direction='backward' is unknown: choose from 'forward', 'both'"),
        ("dropout_mask", "none", "dropout_mask='none' is unknown"),
        (
            "task",
            "masked",
            "task='masked' is unknown: choose from 'causal', 'classification'",
        ),
    ],
)
def test_errors_name_bad_fields(name, field, value, message):
    with pytest.raises(ValueError, match=message):
        get_model(name, **{field: value})

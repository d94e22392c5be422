import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.decoding import BeamConfig, beam_search, log_likelihood
from jaxlm.interop import config_json
from jaxlm.interop.huggingface import load_pretrained
from jaxlm.models import get_model, xlnet
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)

GOLDEN = Path(__file__).parent / "goldens" / "xlnet_memory"


@functools.cache
def parameters(model):
    return add_noise(initial_params(model))


def setup(batch=2, length=9, **overrides):
    model = tiny_model("xlnet", **overrides)
    return model, parameters(model), random_tokens(model, batch, length)


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, **inputs):
    return model.apply(params, tokens, **inputs)[0]


@pytest.mark.parametrize(("name", "count"), [("xlnet-base-cased", 116_718_336), ("xlnet-large-cased", 360_268_800)])
def test_published_sizes(name, count):
    model = get_model(name)
    assert spec.count(model.specs) == count + 32_000  # plus the bias of the head
    assert get_model(name, task="none").num_parameters == count


# ------------------------------------------------------------------------------------------- memory, two streams


def check_memory(model, params, golden):
    """Compare consecutive segments with transformers, with a given order and from left to right."""
    segments, batch, _ = golden["tokens"].shape
    step = jax.jit(model.apply)
    permuted = causal = model.init_state(batch, int(golden["slots"]))
    right_to_left = np.arange(batch) >= batch // 2
    for i in range(segments):
        arrays = {name: golden[name][i] for name in ("order", "targets", "token_types")}
        arrays["order"] = arrays["order"].astype(np.int8)  # the order of the memory does not fit into 8 bits
        hidden, permuted = step(params, golden["tokens"][i], state=permuted, right_to_left=right_to_left, **arrays)
        assert relative_error(hidden, golden["permuted"][i]) < 1e-5
        hidden, causal = step(params, golden["tokens"][i], state=causal)
        assert relative_error(hidden, golden["causal"][i]) < 1e-5


def test_memory_over_four_segments_equals_transformers():
    model, params = load_pretrained(GOLDEN)
    assert (model.config.reuse_length, model.config.clamp_length) == (5, 9)
    with np.load(GOLDEN / "reference.npz") as file:
        check_memory(model, params, dict(file))


def test_left_to_right_equals_the_identity_permutation():
    model, params, tokens = setup()
    order = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    permuted = hidden_of(model, params, np.pad(tokens, ((0, 0), (0, 1))), order=order, targets=order[:, 1:])
    assert relative_error(hidden_of(model, params, tokens), permuted) < 1e-5


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("with_types", [False, True])
def test_a_prediction_depends_only_on_tokens_of_lower_order(with_types):
    model, params, _ = setup()
    tokens = np.arange(9, dtype=np.int32)[None]  # distinct, so that each row of the table belongs to one position
    order = np.array([[-1, 4, 2, -1, 7, 0, 5, -1, 3]], np.int32)
    targets = np.array([[4, 5, 8, 2]], np.int32)
    types = {"token_types": np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]], np.int32)} if with_types else {}

    def predicted(table):
        inputs = {"order": order, "targets": targets, **types}
        return model.apply({**params, "token_embedding": table}, tokens, **inputs)[0][0]

    influence = np.abs(np.asarray(jax.jit(jax.jacrev(predicted))(params["token_embedding"]))[:, :, :9]).max((1, 3))
    assert np.array_equal(influence > 0, order < order[0, targets[0]][:, None])


@pytest.mark.thorough
def test_steps_with_token_types_continue_the_prefix():
    model, params, tokens = setup(length=11)
    types = np.random.default_rng(0).integers(0, 3, (2, 11)).astype(np.int32)
    full = hidden_of(model, params, tokens, token_types=types)
    step, state, outputs = jax.jit(model.apply), model.init_state(2, 12), []
    for start, stop in ((0, 4), (4, 9), (9, 10), (10, 11)):
        hidden, state = step(params, tokens[:, start:stop], state=state, token_types=types[:, start:stop])
        outputs.append(hidden)
    assert relative_error(np.concatenate(outputs, axis=1), full) < 1e-5
    assert relative_error(full, hidden_of(model, params, tokens)) > 1e-3
    assert relative_error(hidden_of(model, params, tokens, token_types=types * 5 + 2), full) < 1e-6


def test_reuse_length_limits_the_tokens_added_to_the_memory():
    model, params, tokens = setup(batch=1, length=16, reuse_length=5)
    order = np.arange(8, dtype=np.int32)[None]
    arrays = {"order": order, "targets": order[:, :2]}
    _, state = apply(model, params, tokens[:, :8], state=model.init_state(1, 6), **arrays)
    assert state["segment_ids"].tolist() == [[0, 1, 1, 1, 1, 1]]
    after, _ = apply(model, params, tokens[:, 8:], state=state)
    _, state = apply(model, params, tokens[:, :5], state=model.init_state(1, 6))  # without an order, all are added
    assert state["segment_ids"].sum() == 5
    assert relative_error(apply(model, params, tokens[:, 8:], state=state)[0], after) < 1e-5


def test_no_gradient_flows_into_the_memory():
    model, params, tokens = setup()
    _, state = apply(model, params, tokens, state=model.init_state(2, 9))

    def loss(layers):
        new = apply(model, params, tokens, state={**state, "layers": layers})[1]["layers"]
        return sum(layer["hidden"].sum() for layer in new)

    assert not any(np.asarray(layer["hidden"]).any() for layer in jax.jit(jax.grad(loss))(state["layers"]))


def test_beam_scores_equal_scores_of_whole_texts():
    model, params, tokens = setup(batch=2, length=5)
    beams = beam_search(model, params, tokens, max_new_tokens=4, beams=BeamConfig(num_beams=3, length_penalty=0.0))
    for row in range(2):
        texts = np.concatenate([np.tile(tokens[row], (3, 1)), beams.tokens[row]], axis=1)
        scores = np.asarray(log_likelihood(model, params, texts))[:, -4:].sum(axis=1)
        assert relative_error(beams.scores[row], scores) < 1e-5


# ------------------------------------------------------------------------------------------------ content stream


@pytest.mark.thorough
def test_tokens_attend_to_all_tokens_of_their_document_and_to_no_padding():
    model, params, _ = setup(task="token_classification")
    tokens = np.arange(9, dtype=np.int32)[None]
    segments = np.array([[0, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)

    def hidden(table):
        return model.apply({**params, "token_embedding": table}, tokens, segment_ids=segments)[0][0]

    influence = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(params["token_embedding"]))[:, :, :9]).max((1, 3))
    real = segments[0] > 0
    assert np.array_equal((influence > 0)[real], (segments[0][real, None] == segments))
    packed = np.asarray(hidden_of(model, params, tokens, segment_ids=segments))
    for document in (slice(1, 4), slice(4, 7)):
        assert relative_error(packed[:, document], hidden_of(model, params, tokens[:, document])) < 1e-5


def test_reversed_tokens_with_right_to_left_equal_the_original_order():
    model, params, tokens = setup(task="none")
    left_to_right, right_to_left = np.zeros(2, bool), np.ones(2, bool)
    want = hidden_of(model, params, tokens)
    assert relative_error(hidden_of(model, params, tokens, right_to_left=left_to_right), want) < 1e-5
    reversed_hidden = np.asarray(hidden_of(model, params, tokens[:, ::-1], right_to_left=right_to_left))
    assert relative_error(reversed_hidden[:, ::-1], want) < 1e-5
    assert relative_error(np.asarray(hidden_of(model, params, tokens[:, ::-1]))[:, ::-1], want) > 1e-2


def test_distances_beyond_the_clamp_are_equal():
    def effect_of_exchange(clamp):
        model, params, tokens = setup(batch=1, length=12, task="none", clamp_length=clamp, num_layers=1)
        exchanged = tokens[
            :, [1, 0, *range(2, 12)]
        ]  # the first two tokens are exchanged; both are far from the last token
        changed, want = (np.asarray(hidden_of(model, params, x))[:, -1] for x in (exchanged, tokens))
        return relative_error(changed, want)

    assert effect_of_exchange(5) < 1e-6
    assert effect_of_exchange(None) > 1e-4


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_reads_the_last_real_token(side):
    model, params, tokens = setup(batch=3, length=8, task="classification", num_labels=5)
    lengths = (8, 5, 1)
    padded, segments = np.zeros((3, 8), np.int32), np.zeros((3, 8), np.int32)
    for row, n in enumerate(lengths):
        real = slice(8 - n, 8) if side == "left" else slice(0, n)
        padded[row, real], segments[row, real] = tokens[row, :n], 1

    @jax.jit
    def labels(tokens, segments=None):
        hidden, _ = model.apply(params, tokens, segment_ids=segments)
        return model.logits(params, model.pool(params, hidden, segment_ids=segments))

    batch_labels = np.asarray(labels(padded, segments))
    assert batch_labels.shape == (3, 1, 5)
    for row, n in enumerate(lengths):
        assert relative_error(batch_labels[row : row + 1], labels(tokens[row : row + 1, :n])) < 1e-5


def test_targets_of_a_small_dtype_equal_those_of_int32():
    model, params, _ = setup()
    tokens = random_tokens(model, 1, 130)  # 130 does not fit into int8
    order = np.arange(130, dtype=np.int32)[None]
    compute = jax.jit(lambda targets: model.apply(params, tokens, order=order, targets=targets)[0])
    targets = np.array([[5, 100]])
    assert_trees_equal(compute(targets.astype(np.int8)), compute(targets.astype(np.int32)))


def test_a_rollback_keeps_the_token_types():
    model, params, _ = setup()
    tokens, types = random_tokens(model, 1, 6), np.array([[0, 0, 0, 1, 1, 1]])
    before = model.init_state(1, 12)
    _, after = apply(model, params, tokens, state=before, token_types=types)
    state = jax.jit(model.rollback)(params, before, tokens, after, jnp.asarray([4]), token_types=types)
    _, expected = apply(model, params, tokens[:, :4], state=before, token_types=types[:, :4])
    (hidden, _), (want, _) = (
        apply(model, params, tokens[:, 4:], state=s, token_types=types[:, 4:]) for s in (state, expected)
    )
    assert relative_error(hidden, want) < 1e-5


# ------------------------------------------------------------------------------------------------------ bad input


def test_errors_name_bad_inputs():
    model, params, tokens = setup()
    order = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    with pytest.raises(ValueError, match="order and targets must be given together"):
        model.apply(params, tokens, order=order)
    with pytest.raises(ValueError, match=r"order \[2, 5\] must have the shape of tokens \[2, 9\]"):
        model.apply(params, tokens, order=order[:, :5], targets=order)
    with pytest.raises(ValueError, match=r"targets \[1, 9\] must have shape \[2, positions\]"):
        model.apply(params, tokens, order=order, targets=order[:1])
    with pytest.raises(ValueError, match=r"order must be integers of shape \[batch, time\], got float64\[2, 9\]"):
        model.apply(params, tokens, order=order * 0.5, targets=order)
    with pytest.raises(ValueError, match="targets must be integers, got float64"):
        model.apply(params, tokens, order=order, targets=order * 1.0)
    for count in (1, 3):
        empty = {"order": np.zeros((2, 0), np.int32), "targets": np.zeros((2, count), np.int32)}
        message = rf"tokens \[2, 0\] are empty, but xlnet computes {count} hidden states that do not"
        with pytest.raises(ValueError, match=message):
            model.apply(params, np.zeros((2, 0), np.int32), **empty)
    with pytest.raises(ValueError, match=r"targets \[2, 0\] must have shape .* with at least one position"):
        model.apply(params, tokens, order=order, targets=order[:, :0])
    with pytest.raises(ValueError, match=r"right_to_left \[1\] must have shape \[2\]"):
        model.apply(params, tokens, right_to_left=np.zeros(1, bool))
    token_classifier = dataclasses.replace(model, config=dataclasses.replace(model.config, task="token_classification"))
    with pytest.raises(ValueError, match="task='token_classification' predicts no tokens"):
        token_classifier.apply(params, tokens, order=order, targets=order)
    with pytest.raises(TypeError, match="task='token_classification' reads whole texts and carries no state"):
        token_classifier.state_specs(1, 5)
    with pytest.raises(ValueError, match="task='none' has no"):
        xlnet.logits(dataclasses.replace(model.config, task="none"), params, jnp.zeros((1, 1, 32)))
    for field, value in {
        "embed_dim": 33,
        "num_heads": 5,
        "clamp_length": 0,
        "reuse_length": 0,
        "task": "causal",
    }.items():
        with pytest.raises(ValueError, match=field):
            get_model("xlnet-tiny", **{field: value})


@pytest.mark.parametrize(("fields", "rate"), [({}, 0.1), ({"summary_last_dropout": 0.3}, 0.3)])
def test_the_dropout_of_the_classifier_in_files(fields, rate):
    file = {"architectures": ["XLNetForSequenceClassification"], "model_type": "xlnet", "dropout": 0.2, **fields}
    assert xlnet.pool_dropout(config_json.describe_model(file, Path("config.json"), {}).model.config) == rate


def test_a_target_outside_the_row_gives_nan():
    model, params, tokens = setup()
    order = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    hidden = hidden_of(model, params, tokens, order=order, targets=np.array([[3, 9], [-1, 8]], np.int32))
    assert np.isnan(np.asarray(hidden)).all(axis=-1).tolist() == [[False, True], [True, False]]

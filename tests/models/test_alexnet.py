"""Convolutional networks over characters: sizes, the published input, and the language model with the same features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.models import alexnet, get_model
from jaxlm.nn.convolution import convolution
from jaxlm.nn.convolution.pooling import max_pool
from jaxlm.testing.contract import check_sharded_step
from jaxlm.testing.helpers import add_noise, initial_params, relative_error, tiny_model
from tests.models.helpers import setup


@pytest.mark.parametrize(
    ("variant", "channels", "hidden"), [("alexnet-small", 256, 1024), ("alexnet-large", 1024, 2048)]
)
def test_shapes_of_the_paper(variant, channels, hidden):
    """Tables 1 and 2 of the paper: six convolutions with an output of 34 steps, and hidden layers over all steps."""
    model = get_model(variant)
    sizes = {path: leaf.shape for path, leaf in spec.flatten(model.specs).items()}
    assert [sizes[f"layer_{layer}/weight"][0] for layer in range(6)] == [7, 7, 3, 3, 3, 3]
    assert sizes["layer_0/weight"] == (7, 70, channels)
    assert sizes["fc_1/weight"] == (34 * channels, hidden)
    tokens = jax.ShapeDtypeStruct((3, 500), jnp.int32)
    features, _ = jax.eval_shape(model.apply, spec.abstract(model.specs), tokens)
    assert features.shape == (3, 34, channels)
    assert jax.eval_shape(model.pool, spec.abstract(model.specs), features).shape == (3, 1, hidden)


def test_the_input_is_one_hot_and_not_trained():
    model = get_model("alexnet-small")
    table = spec.init({"token_embedding": model.specs["token_embedding"]}, jax.random.key(0))["token_embedding"]
    np.testing.assert_array_equal(table[:70], np.eye(70))
    assert not np.any(table[70])  # characters outside the alphabet
    assert not model.specs["token_embedding"].decay
    tiny, params, tokens = setup("alexnet-tiny", length=40)
    for embedding, trained in (("one_hot", False), ("learned", True)):
        variant = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, embedding=embedding))
        grads = jax.jit(jax.grad(lambda p: jnp.sum(variant.apply(p, tokens)[0] ** 2)))(params)  # noqa: B023
        assert bool(np.any(grads["token_embedding"])) == trained


def test_texts_are_read_backwards_and_padding_has_no_effect():
    model, params, tokens = setup("alexnet-tiny", length=40)
    forward = dataclasses.replace(model, config=dataclasses.replace(model.config, reverse=False))
    apply = jax.jit(lambda t, i: model.apply(params, t, segment_ids=i)[0])
    ids = np.ones((2, 40), np.int32)
    want = apply(tokens, ids)
    reversed_tokens_hidden = jax.jit(lambda t: forward.apply(params, t)[0])(tokens[:, ::-1])
    np.testing.assert_array_equal(want, reversed_tokens_hidden)
    padded, ids = np.full((2, 60), 3, np.int32), np.zeros((2, 60), np.int32)
    padded[0, 20:], ids[0, 20:] = tokens[0], 1
    positions = np.delete(np.arange(60), slice(30, 50))
    padded[1, positions], ids[1, positions] = tokens[1], 1
    assert relative_error(jax.jit(apply)(padded, ids), want) < 1e-6
    ids[1, 55:] = 2
    hidden = np.asarray(apply(padded, ids))
    assert np.isnan(hidden[1]).all()
    assert np.isfinite(hidden[0]).all()


def test_dropout_of_hidden_layers_needs_a_key():
    model = get_model("alexnet-tiny", dropout=0.5)
    params = add_noise(initial_params(model))
    hidden = jnp.abs(jax.random.normal(jax.random.key(1), (2, 9, 32)))
    pool = jax.jit(lambda key: model.pool(params, hidden, key=key))
    without_key, first, repeated, different = (
        pool(key) for key in (None, *(jax.random.key(seed) for seed in (1, 1, 2)))
    )
    np.testing.assert_array_equal(first, repeated)
    assert np.mean(np.asarray(first) == 0) > np.mean(np.asarray(without_key) == 0) + 0.2
    assert relative_error(first, different) > 1e-2


def test_the_language_model_has_the_features_of_the_strided_stack():
    """The strided stack gives one step for the 18 tokens up to a position. Both models have the same features there."""
    model, params, tokens = setup("alexnet-lm-tiny", length=30)
    params |= {name: {"weight": jnp.eye(32), "bias": jnp.zeros(32)} for name in ("fc_1", "fc_2")}
    hidden = np.asarray(jax.jit(lambda t: model.apply(params, t)[0])(tokens))

    @jax.jit
    def strided(window):
        x = params["token_embedding"][window]
        for layer in range(2):
            x = jax.nn.relu(convolution(params[f"layer_{layer}"], x, padding="valid"))
            x = max_pool(x, 3, padding="valid", stride=3)
        return x

    # 18 tokens: 15 after a kernel of 4, 5 after pooling, 3 after a kernel of 3, 1 after pooling.
    for position in (17, 20, 29):
        want = strided(tokens[:, position - 17 : position + 1])
        assert want.shape == (2, 1, 32)
        assert relative_error(hidden[:, position], want[:, 0]) < 1e-6


def test_the_context_of_the_published_stack_is_122_tokens():
    """6 + 2 + 18 + 6 + 4 * 18 + 18 = 122 tokens before the current one. The size of the state is constant."""
    model = get_model("alexnet-small", task="causal", embedding="learned")
    specs = model.state_specs(2, 5)
    assert specs == model.state_specs(2, 5000)
    state_lengths = {name: leaf.shape[1] for name, leaf in specs.items() if name != "segment_ids"}
    assert state_lengths == {
        "layer_0": 6, "pool_0": 2, "layer_1": 18, "pool_1": 6, "layer_2": 18, "layer_3": 18, "layer_4": 18,
        "layer_5": 18, "pool_5": 18,
    }  # fmt: skip
    assert sum(state_lengths.values()) == 122
    hidden, state = jax.eval_shape(
        lambda p, t, s: model.apply(p, t, state=s),
        *spec.abstract((model.specs,)), jax.ShapeDtypeStruct((2, 7), jnp.int32), spec.abstract(specs),
    )  # fmt: skip
    assert hidden.shape == (2, 7, 1024)
    assert spec.differences(specs, state) == []


@pytest.mark.thorough
def test_the_classifier_runs_on_a_mesh_that_splits_the_sequence():
    """The lengths between the layers (20 and 9) are not divisible by the mesh axis."""
    check_sharded_step("alexnet-tiny", "data=2,sequence=4")


def test_errors_name_bad_input():
    model, params, tokens = setup("alexnet-tiny", length=40)
    with pytest.raises(ValueError, match="80 tokens exceed max_positions=64"):
        model.apply(params, np.concatenate([tokens, tokens], axis=1))
    with pytest.raises(ValueError, match="task='classification' reads whole texts and carries no state"):
        model.apply(params, tokens, state={})
    with pytest.raises(TypeError, match="task='classification' reads whole texts and carries no state"):
        model.state_specs(2, 8)
    with pytest.raises(ValueError, match="max_positions=100 is too short"):
        alexnet.Config(max_positions=100)
    with pytest.raises(ValueError, match=r"kernels=\(3,\) and pools=\(3, 3\) must have the same length"):
        alexnet.Config(kernels=(3,), pools=(3, 3))
    with pytest.raises(ValueError, match="embedding='bytes' is unknown"):
        alexnet.Config(embedding="bytes")
    headless = dataclasses.replace(model, config=dataclasses.replace(model.config, task="none"))
    with pytest.raises(ValueError, match="task='none' has no head for labels"):
        headless.logits(params, jnp.zeros((1, 1, 32)))
    causal = tiny_model("alexnet", task="causal")
    with pytest.raises(ValueError, match="task='causal' has no pooled output: set task='classification'"):
        causal.pool(spec.abstract(causal.specs), jnp.zeros((1, 1, 32)))


def test_a_language_model_has_no_maximum_length():
    assert tiny_model("alexnet", task="causal").max_positions is None
    assert tiny_model("alexnet").max_positions is not None

"""Tests that Flax modules give the outputs and gradients of the functional API, and that they can be trained."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import spec
from jaxlm.interop.flax import as_linen, as_nnx
from jaxlm.nn.loss import cross_entropy
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    tiny_model,
)

SHAPE = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "remat": "none"}
MODEL = tiny_model("gpt2-tiny", **SHAPE)
TOKENS = random_tokens(MODEL, 2, 8)


@functools.cache
def params():
    return add_noise(initial_params(MODEL))


def mean_loss(logits):
    return jnp.mean(cross_entropy(logits[:, :-1], TOKENS[:, 1:]))


@functools.cache
def functional_results():
    """Hidden states, loss and gradient without flax."""

    def loss(params):
        hidden, _ = MODEL.apply(params, TOKENS)
        return mean_loss(MODEL.logits(params, hidden)), hidden

    (value, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params())
    return hidden, value, gradient


def test_linen_has_the_parameter_tree_of_the_model():
    variables = jax.jit(as_linen(MODEL).init)(jax.random.key(0), TOKENS)
    assert variables.keys() == {"params"}
    assert spec.differences(MODEL.specs, variables["params"]) == []
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(params())
    large_leaves = {name: leaf for name, leaf in spec.flatten(variables["params"]).items() if leaf.size > 100}
    assert {name for name in large_leaves if abs(np.std(large_leaves[name]) / 0.02 - 1) < 0.35} >= {
        "token_embedding", "position_embedding", "layers/0/attention/qkv/weight", "layers/0/mlp/up/weight",
    }  # fmt: skip
    np.testing.assert_array_equal(variables["params"]["final_norm"]["scale"], 1.0)


@pytest.mark.thorough
def test_linen_outputs_and_gradients_equal_the_functional_api():
    module, optimizer = as_linen(MODEL), optax.adam(1e-2)

    def loss(variables):
        hidden, state = module.apply(variables, TOKENS)
        assert state is None
        return mean_loss(module.apply(variables, hidden, method="logits")), hidden

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    variables = {"params": params()}
    (value, hidden), gradient = step(variables)
    assert_trees_equal(hidden, functional_results()[0])
    assert_trees_close((value, gradient["params"]), functional_results()[1:], 1e-6)
    moments, losses = optimizer.init(variables), []
    for _ in range(5):
        (value, _), gradient = step(variables)
        updates, moments = optimizer.update(gradient, moments)
        variables = optax.apply_updates(variables, updates)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_nnx_initializes_and_returns_the_parameters_of_the_model():
    module = as_nnx(MODEL, nnx.Rngs(params=3))
    assert_trees_equal(module.parameters(), MODEL.init(nnx.Rngs(params=3).params()))
    assert_trees_equal(as_nnx(MODEL, params=params()).parameters(), params())
    assert jax.tree.structure(module.parameters()) == jax.tree.structure(params())
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert spec.differences(MODEL.specs, state["params"]) == []


def test_nnx_outputs_and_gradients_equal_the_functional_api():
    module = as_nnx(MODEL, params=params())
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    def loss(module):
        hidden, state = module(TOKENS)
        assert state is None
        return mean_loss(module.logits(hidden)), hidden

    gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    (value, hidden), gradient = gradients(module)
    assert_trees_equal(hidden, functional_results()[0])
    _, *expected = functional_results()  # nnx.to_pure_dict returns dicts with integer keys instead of tuples
    actual = value, nnx.to_pure_dict(gradient)["params"]
    assert_trees_close(*([tree[0], spec.flatten(tree[1])] for tree in (actual, expected)), 1e-6)

    @nnx.jit
    def step(module, optimizer):
        (value, _), gradient = nnx.value_and_grad(loss, has_aux=True)(module)
        optimizer.update(module, gradient)
        return value

    losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert spec.differences(MODEL.specs, module.parameters()) == []


def test_dropout_acts_only_with_a_dropout_key():
    model = tiny_model("gpt2-tiny", **SHAPE, embedding_dropout=0.5)
    key = jax.random.key(1)
    linen, module = as_linen(model), as_nnx(model, params=params())
    apply_with_dropout = jax.jit(lambda key: linen.apply({"params": params()}, TOKENS, rngs={"dropout": key})[0])
    first, repeated, different = apply_with_dropout(key), apply_with_dropout(key), apply_with_dropout(jax.random.key(2))
    assert_trees_equal(first, repeated)
    assert not np.allclose(first, different)
    assert not np.allclose(first, functional_results()[0])
    call = nnx.jit(lambda module, rngs: module(TOKENS, rngs=rngs)[0])
    expected = jax.jit(lambda key: model.apply(params(), TOKENS, key=key)[0])(nnx.Rngs(dropout=1).dropout())
    assert_trees_equal(call(module, nnx.Rngs(dropout=1)), expected)


def test_modules_support_state_and_pool():
    model = tiny_model("gpt2-tiny", **SHAPE, task="classification")
    weights = add_noise(initial_params(model))
    linen, module = as_linen(model), as_nnx(model, params=weights)

    @jax.jit
    def functional_outputs(weights, state):
        hidden, state = model.apply(weights, TOKENS, state=state)
        return hidden, state, model.pool(weights, hidden)

    @jax.jit
    def linen_outputs(weights, state):
        hidden, state = linen.apply({"params": weights}, TOKENS, state=state)
        return hidden, state, linen.apply({"params": weights}, hidden, method="pool")

    empty = model.init_state(2, 10)
    want = functional_outputs(weights, empty)
    assert_trees_close(linen_outputs(weights, empty), want, 1e-6)
    hidden, state = nnx.jit(lambda module, state: module(TOKENS, state=state))(module, empty)
    assert_trees_close((hidden, state, module.pool(hidden)), want, 1e-6)


def test_error_names_parameters_of_the_wrong_shape():
    wrong = {**params(), "token_embedding": jnp.zeros((5, 16))}
    with pytest.raises(ValueError, match=r"differs: token_embedding expected float32\[128, 16\], got float32\[5, 16\]"):
        as_nnx(MODEL, params=wrong)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="token_embedding"):
        as_linen(MODEL).apply({"params": wrong}, TOKENS)
    for arguments in ({}, {"rngs": nnx.Rngs(0), "params": params()}):
        with pytest.raises(ValueError, match="pass exactly one of rngs"):
            as_nnx(MODEL, **arguments)

"""The causal objective: targets, weights and loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.experts import load_balance_loss, router_z_loss
from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import causal
from jaxlm.objectives.batch import loss_and_terms, term_names
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)


def test_targets_are_the_next_tokens_within_a_document():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    batch = causal.batch(tokens, np.array([[1, 1, 1, 2, 2, 0]]))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 0]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2]]
    assert causal.batch(tokens).weights.tolist() == [[1, 1, 1, 1, 1]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(loss, model, params, batch):
    return loss(model, params, batch)


def test_loss_is_the_summed_cross_entropy_of_the_logits():
    model = tiny_model("gpt")
    params = add_noise(initial_params(model))
    window = random_tokens(model, 3, 11)
    total, weight, _ = loss_of(causal.loss, model, params, causal.batch(window))

    @jax.jit
    def expected(params):
        logits = model.logits(params, model.apply(params, window[:, :-1])[0])
        return cross_entropy(logits, window[:, 1:]).sum()

    assert relative_error(total, expected(params)) < 1e-6
    assert float(weight) == 30


@pytest.mark.parametrize(
    ("shape", "segments", "message"),
    [
        ((4,), None, r"tokens must be integers of shape \[batch, time\], got int32\[4\]"),
        ((4, 1), None, r"tokens \[4, 1\] must have at least two tokens per row"),
        ((2, 9), (2, 8), r"segment_ids \[2, 8\] must have the shape of tokens \[2, 9\]"),
        ((2, 9), (1, 9), r"segment_ids \[1, 9\] must have the shape of tokens \[2, 9\]"),
    ],
)
def test_invalid_shapes_raise_errors(shape, segments, message):
    with pytest.raises(ValueError, match=message):
        causal.batch(np.zeros(shape, np.int32), None if segments is None else np.ones(segments, np.int32))


def test_ids_outside_int32_raise_errors():
    """JAX would convert them to other ids."""
    with pytest.raises(ValueError, match="tokens has values outside int32: from 0 to 1099511627776"):
        causal.batch(np.array([[0, 2**40]]))
    model = tiny_model("gpt2-tiny")
    with pytest.raises(ValueError, match="tokens has values outside int32"):
        model.apply(initial_params(model), np.array([[0, 2**32 + 5]]))


# -------------------------------------------------------------------------------------------------------- experts

SEGMENTS = np.array([[1] * 6 + [2] * 5, [1] * 8 + [0] * 3])


def mixtral(**fields):
    model = tiny_model("mixtral-tiny", **fields)
    return model, add_noise(initial_params(tiny_model("mixtral-tiny")))


def mean_loss_and_gradients(model, params, loss):
    def mean(params):
        total, weight, _ = loss(model, params, causal.batch(random_tokens(model, 2, 11), SEGMENTS))
        return total / weight

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.thorough
def test_the_mean_loss_is_cross_entropy_plus_the_losses_of_the_routers():
    model, params = mixtral()
    batch = causal.batch(random_tokens(model, 2, 11), SEGMENTS)

    def expected(params):
        hidden, _, statistics = model.apply_with_routing(params, batch.tokens, segment_ids=batch.segment_ids)
        losses = cross_entropy(model.logits(params, hidden), batch.targets)
        router = 0.5 * load_balance_loss(statistics) + 0.25 * router_z_loss(statistics)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights) + router

    got = mean_loss_and_gradients(model, params, causal.loss_with_load_balance(0.5, z_coefficient=0.25))
    assert_trees_close(got, jax.jit(jax.value_and_grad(expected))(params), 1e-5)
    plain = mean_loss_and_gradients(model, params, causal.loss)
    assert got[0] > plain[0] + 0.5
    assert_trees_close(mean_loss_and_gradients(model, params, causal.loss_with_load_balance(0.0)), plain, 1e-6)


@pytest.mark.parametrize("coefficients", [(0.0, 0.0), (0.5, 0.25)])
def test_the_terms_are_the_losses_of_the_routers_without_coefficients(coefficients):
    model, params = mixtral()
    batch = causal.batch(random_tokens(model, 2, 11), SEGMENTS)
    loss = causal.loss_with_load_balance(coefficients[0], z_coefficient=coefficients[1])
    assert term_names(loss) == ("load_balance_loss", "router_z_loss")

    @jax.jit
    def losses_of_routers(params):
        _, _, statistics = model.apply_with_routing(params, batch.tokens, segment_ids=batch.segment_ids)
        return load_balance_loss(statistics), router_z_loss(statistics)

    load_balance, z = jax.device_get(losses_of_routers(params))
    loss_and_terms_of = jax.jit(loss_and_terms, static_argnums=(0, 1))
    total, weight, _, terms = jax.device_get(loss_and_terms_of(loss, model, params, batch))
    assert terms["load_balance_loss"] / weight == pytest.approx(load_balance, rel=1e-5)
    assert terms["router_z_loss"] / weight == pytest.approx(z, rel=1e-5)
    assert float(loss_of(loss, model, params, batch)[0]) == float(total)
    assert term_names(causal.loss) == ()
    assert loss_and_terms_of(causal.loss, model, params, batch)[3] == {}


def test_the_losses_of_a_model_depend_on_whether_it_has_experts():
    dense, (model, params) = tiny_model("llama-tiny"), mixtral()
    assert causal.training_loss(dense) is causal.evaluation_loss(dense) is causal.loss
    batch = causal.batch(random_tokens(model, 2, 11), SEGMENTS)
    for got, want in (
        (causal.training_loss(model), causal.loss_with_load_balance(0.01)), (causal.evaluation_loss(model), causal.loss)
    ):  # fmt: skip
        got_total, want_total = (float(loss_of(loss, model, params, batch)[0]) for loss in (got, want))
        assert got_total == pytest.approx(want_total, rel=1e-6)
        assert term_names(got) == ("load_balance_loss", "router_z_loss")


@pytest.mark.thorough
@pytest.mark.parametrize("fields", [{"scan_layers": True}, {"remat": "full"}, {"remat": "none", "scan_layers": True}])
def test_statistics_do_not_depend_on_the_loop_over_layers(fields):
    loss = causal.loss_with_load_balance(0.5)
    want = mean_loss_and_gradients(*mixtral(), loss)
    model, params = mixtral(**fields)
    got = mean_loss_and_gradients(model, spec.restack(params) if "scan_layers" in fields else params, loss)
    assert_trees_close(spec.restack(got), spec.restack(want), 1e-5)


@pytest.mark.thorough
def test_router_statistics_of_each_layer_with_experts():
    for fields, layers in (({}, 2), ({"scan_layers": True}, 2), ({"dense_layers": (0,)}, 1)):
        model = tiny_model("mixtral-tiny", **fields)
        params, batch = initial_params(model), causal.batch(random_tokens(model, 2, 11), SEGMENTS)
        hidden, state, statistics = jax.jit(model.apply_with_routing)(
            params, batch.tokens, segment_ids=batch.segment_ids, state=model.init_state(2, 10)
        )
        want = jax.jit(model.apply)(params, batch.tokens, segment_ids=batch.segment_ids, state=model.init_state(2, 10))
        assert_trees_close((hidden, state), want, 1e-6)
        assert statistics.tokens.tolist() == [18] * layers
        assert statistics.selections.shape == (layers, 4)
        np.testing.assert_allclose(statistics.selections.sum(axis=1), 2 * 18)
        np.testing.assert_allclose(statistics.probabilities.sum(axis=1), 18, rtol=1e-5)


def test_an_empty_batch_has_empty_statistics():
    model, params = mixtral()
    for shape in ((0, 5), (2, 0)):
        tokens = np.zeros(shape, np.int32)
        hidden, state, statistics = model.apply_with_routing(params, tokens)
        assert_trees_equal((hidden, state), apply(model, params, tokens))
        assert statistics.selections.tolist() == [[0.0] * 4] * 2
        batch = causal.batch(np.zeros((shape[0], shape[1] + 1), np.int32)) if shape[1] else None
        if batch is not None:
            total, weight, _ = causal.loss_with_load_balance(0.5)(model, params, batch)
            assert (total, weight) == (0.0, 0.0)


def test_a_model_without_experts_is_refused():
    for name in ("llama-tiny", "gpt2-tiny", "gated_deltanet-tiny"):
        model = tiny_model(name)
        assert not model.has_experts
        with pytest.raises(TypeError, match=rf"family '{model.family}' has no experts \(num_experts\)"):
            causal.loss_with_load_balance(0.01)(model, spec.abstract(model.specs), causal.batch(np.ones((1, 3), int)))
    for coefficients in ((-0.1, 0.0), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="must be a finite number of at least 0"):
            causal.loss_with_load_balance(coefficients[0], z_coefficient=coefficients[1])

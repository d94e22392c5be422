"""Mixture of experts: all implementations against the definition, padding, capacity, statistics and losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.experts import expert_specs, load_balance_loss, mixture_of_experts, router_z_loss
from jaxlm.nn.experts.router import RouterStatistics
from jaxlm.nn.experts.rows import group_by_expert
from jaxlm.testing.helpers import assert_trees_close, initial_values, relative_error

B, T, D, E, F = 2, 11, 6, 5, 7


@functools.cache
def parameters(shared_hidden=None):
    specs = expert_specs(D, F, E, spec.Normal(0.7), shared_hidden=shared_hidden)
    return initial_values(specs)


def setup(shared_hidden=None):
    x = np.random.default_rng(2).standard_normal((B, T, D)).astype(np.float32)
    return parameters(shared_hidden), x


mixture = jax.jit(
    mixture_of_experts, static_argnames=("num_selected", "renormalize", "implementation", "capacity_factor")
)


def silu(x):
    return x / (1 + np.exp(-x))


def outputs_of_experts(params, x_D):
    """The output of every expert for one token, and its router probabilities, in float64."""
    weights = {name: np.asarray(params[name]["weight"], np.float64) for name in ("router", "gate", "up", "down")}
    x_D = np.asarray(x_D, np.float64)
    exp_E = np.exp(x_D @ weights["router"])
    outputs_ED = [
        (silu(x_D @ weights["gate"][e]) * (x_D @ weights["up"][e])) @ weights["down"][e]
        for e in range(len(weights["gate"]))
    ]
    return np.stack(outputs_ED), exp_E / exp_E.sum()


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "blocks"])
def test_each_token_gets_the_weighted_sum_of_its_experts(implementation, renormalize):
    params, x = setup()
    y, _ = mixture(params, x, num_selected=2, renormalize=renormalize, implementation=implementation)
    y = np.asarray(y)
    for b, t in np.ndindex(B, T):
        outputs_ED, probabilities_E = outputs_of_experts(params, x[b, t])
        best = np.argsort(-probabilities_E)[:2]
        weights = probabilities_E[best] / (probabilities_E[best].sum() if renormalize else 1.0)
        assert relative_error(y[b, t], weights @ outputs_ED[best]) < 1e-5


def value_and_gradients(params, x, keep_BT=None, renormalize=True, **options):
    """A scalar function of the outputs at real tokens and of the statistics: its value and its gradients."""

    def function(params, x):
        y, statistics = mixture_of_experts(
            params, x, num_selected=3, renormalize=renormalize, keep_BT=keep_BT, **options
        )
        y = y if keep_BT is None else jnp.where(keep_BT[..., None], y, 0.0)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + load_balance_loss(statistics) + router_z_loss(statistics)

    return jax.jit(jax.value_and_grad(function, (0, 1)))(params, x)


KEEP = np.ones((B, T), bool)
KEEP[0, :4] = KEEP[1, 8:] = False


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("keep_BT", [None, KEEP], ids=["all", "padded"])
@pytest.mark.parametrize(
    "options", [{"implementation": "ragged_dot"}, {"implementation": "blocks"}, {"capacity_factor": 9.0}]
)
def test_all_implementations_have_equal_values_and_gradients(options, keep_BT, renormalize):
    params, x = setup(shared_hidden=4)
    want = value_and_gradients(params, x, keep_BT, renormalize, implementation="reference")
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want[1]))
    assert_trees_close(value_and_gradients(params, x, keep_BT, renormalize, **options), want, 1e-5)


@pytest.mark.parametrize(
    "options", [{"implementation": "ragged_dot"}, {"implementation": "blocks"}, {"capacity_factor": 1.0}]
)
def test_bfloat16_is_near_float32(options):
    params, x = setup()
    run = functools.partial(mixture, params, num_selected=2, renormalize=False, **options)
    x = x.astype(jnp.bfloat16)  # the router is computed in float32, so both select the same experts
    got, want = run(x)[0], run(x.astype(np.float32))[0]
    assert got.dtype == jnp.bfloat16
    assert relative_error(np.asarray(got, np.float32), want) < 0.03


@pytest.mark.thorough
def test_blocks_sum_the_gradients_of_float64_weights_in_float64():
    """With one expert per token, the weight of the expert is exactly 1, so no rounding of the router has an effect."""

    def gradients(implementation):
        def loss(params):
            options = {"num_selected": 1, "renormalize": True, "implementation": implementation}
            return jnp.sum(jnp.sin(mixture_of_experts(params, x, **options)[0]))

        return jax.jit(jax.grad(loss))(params)

    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda x: np.asarray(x, np.float64), setup())
        got, want = gradients("blocks"), gradients("reference")
    for name in ("gate", "up", "down"):
        assert relative_error(got[name]["weight"], want[name]["weight"]) < 1e-12, name


def test_a_token_that_is_not_a_number_does_not_change_others():
    params, x = setup()
    bad = x.copy()
    bad[0, 3] = np.nan
    for options in (
        {"implementation": "reference"},
        {"implementation": "ragged_dot"},
        {"implementation": "blocks"},
        {"capacity_factor": 9.0},
    ):
        want, got = (np.asarray(mixture(params, x, num_selected=2, renormalize=True, **options)[0]) for x in (x, bad))
        assert np.isnan(got[0, 3]).all()
        others = np.arange(B * T) != 3
        assert relative_error(got.reshape(-1, D)[others], want.reshape(-1, D)[others]) < 1e-6


@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_slots_of_a_block_belong_to_one_expert(block_rows):
    expert_A = np.random.default_rng(0).integers(0, E + 1, 40)  # E: no expert
    expert_A[expert_A == 2] = 3  # an expert without assignments
    groups = jax.device_get(jax.jit(group_by_expert, static_argnums=(1, 2))(expert_A, E, block_rows))
    assert groups.sizes.tolist() == [np.sum(expert_A == e) for e in range(E)]
    filled = groups.assignments < 40
    assert sorted(groups.assignments[filled]) == np.flatnonzero(expert_A < E).tolist()
    assert (groups.slots[groups.assignments[filled]] == np.flatnonzero(filled)).all()
    assert (groups.slots[expert_A == E] == groups.assignments.size).all()
    block_of_slot = np.repeat(groups.block_experts, block_rows)
    assert (block_of_slot[filled] == expert_A[groups.assignments[filled]]).all()


# ------------------------------------------------------------------------------------------------------- capacity


def with_capacity(params, x, factor, keep_BT=None):
    y, _ = mixture(params, x, num_selected=2, renormalize=True, keep_BT=keep_BT, capacity_factor=factor)
    return np.asarray(y)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_an_expert_accepts_the_first_tokens_of_a_row(factor):
    params, x = setup()
    y = with_capacity(params, x, factor, KEEP)
    dropped = 0
    for b in range(B):
        free_E = np.full(E, int(np.ceil(factor * KEEP[b].sum() * 2 / E)))
        for t in np.flatnonzero(KEEP[b]):
            outputs_ED, probabilities_E = outputs_of_experts(params, x[b, t])
            best = np.argsort(-probabilities_E)[:2]
            weights = np.where(free_E[best] > 0, probabilities_E[best] / probabilities_E[best].sum(), 0.0)
            free_E[best] -= 1
            dropped += np.sum(weights == 0.0)
            np.testing.assert_allclose(y[b, t], weights @ outputs_ED[best], atol=1e-5)
    assert dropped > 0
    assert (y[~KEEP] == 0).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_with_dropped_tokens_equal_those_of_the_definition(renormalize):
    """In the definition, each expert computes all tokens. A token has weight 0 for an expert that did not accept it."""
    (params, x), factor = setup(), 0.5
    limit = int(np.ceil(factor * T * 2 / E))

    def definition(params, x):
        probabilities_BTE = jax.nn.softmax(x @ params["router"]["weight"])
        best_BTN, experts_BTN = jax.lax.top_k(probabilities_BTE, 2)
        weights_BTN = best_BTN / jnp.sum(best_BTN, axis=-1, keepdims=True) if renormalize else best_BTN
        is_selected_BTNE = jax.nn.one_hot(experts_BTN, E)
        is_selected_BTE = jnp.sum(is_selected_BTNE, axis=2)
        is_accepted_BTE = (is_selected_BTE == 1.0) & (jnp.cumsum(is_selected_BTE, axis=1) <= limit)
        weights_BTE = jnp.sum(is_selected_BTNE * weights_BTN[..., None], axis=2)
        gate, up = (jnp.einsum("btd,edf->betf", x, params[name]["weight"]) for name in ("gate", "up"))
        y_BETD = jnp.einsum("betf,efd->betd", jax.nn.silu(gate) * up, params["down"]["weight"])
        return jnp.einsum("bte,betd->btd", jnp.where(is_accepted_BTE, weights_BTE, 0.0), y_BETD), is_accepted_BTE

    def run(params, x):
        y, _ = mixture_of_experts(params, x, num_selected=2, renormalize=renormalize, capacity_factor=factor)
        return y

    assert np.sum(definition(params, x)[1]) < B * T * 2  # some tokens are dropped
    got, want = (
        jax.jit(jax.value_and_grad(lambda p, x, f=function: jnp.sum(jnp.sin(f(p, x))), (0, 1)))(params, x)
        for function in (run, lambda p, x: definition(p, x)[0])
    )
    assert_trees_close(got, want, 1e-5)


def test_a_tiny_capacity_is_one_token():
    params, x = setup()
    np.testing.assert_array_equal(with_capacity(params, x, 1e-10), with_capacity(params, x, 1e-3))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_capacity(side):
    params, x = setup()
    want = with_capacity(params, x[:1, :6], 0.5)
    real = slice(T - 6, T) if side == "left" else slice(0, 6)
    padded, keep = np.ones((1, T, D), np.float32), np.zeros((1, T), bool)
    padded[:, real], keep[:, real] = x[:1, :6], True
    got = with_capacity(params, padded, 0.5, keep)
    assert relative_error(got[:, real], want) < 1e-6


# --------------------------------------------------------------------------------------------- statistics, losses


def test_statistics_count_only_real_tokens():
    params, x = setup()
    for options in ({}, {"capacity_factor": 0.5}):  # the statistics describe the router, not the accepted tokens
        _, got = mixture(params, x, num_selected=2, renormalize=True, keep_BT=KEEP, **options)
        logits = x[KEEP] @ np.asarray(params["router"]["weight"])
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        counts = np.bincount(np.argsort(-logits, axis=1)[:, :2].ravel(), minlength=E)
        want = RouterStatistics(
            KEEP.sum(), counts, probabilities.sum(axis=0), (np.log(np.exp(logits).sum(axis=1)) ** 2).sum()
        )
        assert_trees_close(got, want, 1e-5)


def test_losses_pool_the_tokens_of_all_layers():
    statistics = RouterStatistics(
        np.float32([4.0, 4.0]),
        np.float32([[4.0, 4.0], [2.0, 6.0]]),
        np.float32([[3.0, 1.0], [2.0, 2.0]]),
        np.float32([8.0, 16.0]),
    )
    fractions, probabilities = np.array([6 / 8, 10 / 8]), np.array([5 / 8, 3 / 8])
    assert load_balance_loss(statistics) == pytest.approx(2 * np.sum(fractions * probabilities))
    assert router_z_loss(statistics) == pytest.approx(24 / 8)
    one_layer = jax.tree.map(lambda x: x[0], statistics)
    assert load_balance_loss(one_layer) == pytest.approx(2 * (1 * 3 / 4 + 1 * 1 / 4))
    empty = jax.tree.map(np.zeros_like, statistics)
    assert (load_balance_loss(empty), router_z_loss(empty)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_selected": 6}, r"num_selected=6 must be in \[1, 5\]"),
        ({"num_selected": 0}, r"num_selected=0 must be in \[1, 5\]"),
        (
            {"implementation": "fast"},
            "no mixture_of_experts implementation 'fast': choose from reference, ragged_dot",
        ),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"capacity_factor": 1.0, "implementation": "blocks"}, "implementation='blocks' must be None"),
    ],
)
def test_errors_name_bad_arguments(options, message):
    params, x = setup()
    with pytest.raises(ValueError, match=message):
        mixture_of_experts(params, x, **{"num_selected": 2, "renormalize": True, **options})

"""Custom gradients in ``jax.shard_map`` and on a mesh with Explicit axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.nn.attention import attention
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.linear import linear
from jaxlm.nn.loss import chunked_cross_entropy, selected_cross_entropy
from jaxlm.nn.recurrence import lstm, lstm_specs
from jaxlm.nn.scan import gated_delta_rule, linear_attention
from jaxlm.sharding import make_mesh
from jaxlm.testing.helpers import assert_trees_close


def cross_entropy_of(loss):
    def apply(weight, x_BTD):
        weights_BT = (jnp.arange(x_BTD.shape[1])[None] % 3 == 0) * jnp.ones(x_BTD.shape[:2])
        return loss(lambda w, x: x @ w, weight, x_BTD, jnp.zeros(x_BTD.shape[:2], jnp.int32), weights_BT)

    return apply


def self_attention(weight, x_BTD):
    q, k, v = (x[:, :, None] for x in jnp.split(linear({"weight": weight}, x_BTD), 3, axis=-1))
    return jnp.sum(attention(q, k, v, Mask(causal=True), implementation="blockwise") ** 2)


def normal(specs):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), specs)


WEIGHT = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
LOSSES = {
    "linear": (lambda weight, x: jnp.sum(linear({"weight": weight}, x) ** 2), WEIGHT),
    "lstm": (lambda p, x: jnp.sum(lstm(p, x)[0] ** 2), normal(lstm_specs(6, 3))),
    "attention": (self_attention, WEIGHT),
    "chunked_cross_entropy": (cross_entropy_of(chunked_cross_entropy), WEIGHT),
    "selected_cross_entropy": (cross_entropy_of(selected_cross_entropy), WEIGHT),
}
"""Sums over the rows of a batch, by name, and their parameters."""


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_replicated_parameters_is_summed_over_devices(name):
    loss, params = LOSSES[name]
    x_BTD = np.random.default_rng(1).normal(size=(8, 5, 6)).astype(np.float32)
    mapped = jax.shard_map(
        lambda params, x: jax.lax.psum(loss(params, x), "data"), mesh=make_mesh("data=8"),
        in_specs=(P(), P("data")), out_specs=P(),
    )  # fmt: skip
    assert_trees_close(jax.jit(jax.grad(mapped))(params, x_BTD), jax.jit(jax.grad(loss))(params, x_BTD), 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("scan", [linear_attention, gated_delta_rule])
def test_the_gradient_of_a_replicated_state_is_summed_over_devices(scan, implementation):
    x_BTD = np.random.default_rng(1).normal(size=(8, 5, 6)).astype(np.float32)

    def loss(state_KV, x_BTD):
        x_BTHD, ones_BTH = x_BTD[:, :, None], jnp.ones_like(x_BTD[:, :, :1])
        gates = (-ones_BTH,) if scan is linear_attention else (-ones_BTH, 0.1 * ones_BTH)
        state_BHKV = jnp.broadcast_to(state_KV, (len(x_BTD), 1, *state_KV.shape))
        return jnp.sum(scan(x_BTHD, x_BTHD, x_BTHD, *gates, state_BHKV, implementation=implementation)[0] ** 2)

    mapped = jax.shard_map(
        lambda state, x: jax.lax.psum(loss(state, x), "data"), mesh=make_mesh("data=8"), in_specs=(P(), P("data")),
        out_specs=P(),
    )  # fmt: skip
    state_KV = np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32)
    assert_trees_close(jax.jit(jax.grad(mapped))(state_KV, x_BTD), jax.jit(jax.grad(loss))(state_KV, x_BTD), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_on_a_mesh_with_explicit_axes(name):
    """The gradients are those on one device, each with the sharding of its argument."""
    loss, params = LOSSES[name]
    x_BTD = np.random.default_rng(1).normal(size=(8, 5, 6)).astype(np.float32)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    with jax.set_mesh(make_mesh("data=8", axis_type=AxisType.Explicit)):
        dparams, dx_BTD = gradients(*jax.device_put((params, x_BTD), (P(), P("data"))))
    assert dx_BTD.sharding.spec[0] == "data"
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(dparams))
    assert_trees_close((dparams, dx_BTD), gradients(params, x_BTD), 1e-5)

"""Mixture of experts on meshes: the results equal those on one device, and the capacity form moves tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.experts import expert_specs, load_balance_loss, mixture_of_experts
from jaxlm.sharding import Sharding, constrain, make_mesh
from jaxlm.testing.helpers import assert_trees_close, initial_values

B, T, D, E, F = 8, 6, 8, 4, 12
SPECS = expert_specs(D, F, E, spec.Normal(0.5), shared_hidden=4)
KEEP = np.ones((B, T), bool)
KEEP[0, :4] = KEEP[5, 3:] = False
FORMS = {
    "reference": {"implementation": "reference"},
    "ragged_dot": {"implementation": "ragged_dot"},
    "blocks": {"implementation": "blocks"},
    "capacity": {"capacity_factor": 0.75},  # drops tokens
}


def inputs():
    return initial_values(SPECS), jax.random.normal(jax.random.key(1), (B, T, D))


def loss(params, x, form):
    x = constrain(x, ("batch", "seq", "activation_embed"))
    y, statistics = mixture_of_experts(
        params, x, num_selected=2, renormalize=True, keep_BT=jnp.asarray(KEEP), **FORMS[form]
    )
    y = constrain(jnp.where(KEEP[..., None], y, 0.0), ("batch", "seq", "activation_embed"))
    return jnp.sum(jnp.sin(y)) + load_balance_loss(statistics)


def compiled_on(mesh, form):
    """The compiled value and gradients of the loss, and arguments with the shardings of the specs."""
    sharding = Sharding(make_mesh(mesh))

    def run(params, x):
        with sharding.scope():
            return jax.value_and_grad(loss, (0, 1))(params, x, form)

    params, x = inputs()
    arguments = (
        jax.device_put(params, sharding.tree(SPECS)),
        jax.device_put(x, sharding.named_sharding(("batch", None, None))),
    )
    return jax.jit(run).lower(*arguments).compile(), arguments


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", ["data=2,expert=4", "fsdp=2,tensor=2,expert=2", "data=4,sequence=2"])
def test_values_and_gradients_equal_those_on_one_device(form, mesh):
    want = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(*inputs(), form)
    run, arguments = compiled_on(mesh, form)
    assert_trees_close(jax.device_get(run(*arguments)), want, 1e-5)


def test_experts_with_a_capacity_move_tokens_by_all_to_all():
    """Each of the two moves (to the experts and back) is an all-to-all of the slots, and so is its gradient."""
    run, arguments = compiled_on("data=2,expert=4", "capacity")
    slots = 3  # ceil(0.75 * 6 tokens * 2 experts per token / 4 experts)
    shapes = re.findall(r"= \(?f32\[([\d,]+)\][^=]* all-to-all\(", run.as_text())
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
    assert len(sizes) >= 4, run.as_text()
    per_device = (B // 8) * E * slots * D
    assert set(sizes) <= {per_device, per_device // 4}
    assert arguments[0]["gate"]["weight"].sharding.shard_shape((E, D, F)) == (1, D, F)
    gathers = re.findall(r"= f32\[([\d,]+)\][^=]* all-gather\(", run.as_text())
    assert all(np.prod([int(size) for size in shape.split(",")]) < E * D * F for shape in gathers), gathers

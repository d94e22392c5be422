"""Tests of steps whose state has the layouts that the compiler chooses. On a CPU, these are the row-major layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import tiny_model
from jaxlm.training import trainer as trainer_module
from jaxlm.training.layouts import LayoutStep, with_formats
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer


def step(state, batch):
    weights = state["weights"] + jnp.sum(batch)
    return {**state, "weights": weights}, {"mean": jnp.mean(weights)}


def new_state(order=(0, 1, 2)):
    """A state whose weights have a layout with this order of the axes, from the slowest to the fastest."""
    weights = jnp.arange(24.0).reshape(2, 3, 4)
    target = Format(Layout(major_to_minor=order), weights.sharding)
    return {"weights": jax.device_put(weights, target), "key": jax.random.key(0)}


@pytest.mark.parametrize("sharded", [False, True])
def test_state_with_another_layout_is_converted_and_donated(sharded):
    shardings = None
    if sharded:
        mesh = Sharding(make_mesh("data=1", devices=jax.devices()[:1]))
        shardings = {"weights": mesh.replicated(), "key": mesh.replicated()}, mesh.replicated(), mesh.replicated()
    compiled, state = LayoutStep(step, shardings), new_state((2, 0, 1))
    new, results = compiled(state, jnp.ones(5))
    np.testing.assert_array_equal(new["weights"], np.arange(24.0).reshape(2, 3, 4) + 5.0)
    assert results["mean"] == 11.5 + 5.0
    assert state["weights"].is_deleted()
    assert new["weights"].format.layout == compiled.formats["weights"].layout
    old = new["weights"]
    new, _ = compiled(new, jnp.ones(7))  # another shape of the batch
    assert old.is_deleted()
    np.testing.assert_array_equal(new["weights"], np.arange(24.0).reshape(2, 3, 4) + 12.0)


def test_every_shape_of_the_batch_has_the_same_layouts():
    """The second program does not choose: it has the layouts of the first one."""
    compiled = LayoutStep(step)
    state, _ = compiled(new_state(), jnp.ones(5))
    chosen = Format(Layout(major_to_minor=(1, 2, 0)), state["weights"].sharding)
    compiled.formats = {**compiled.formats, "weights": chosen}
    state, _ = compiled(state, jnp.ones(6))
    assert state["weights"].format.layout.major_to_minor == (1, 2, 0)
    np.testing.assert_array_equal(state["weights"], np.arange(24.0).reshape(2, 3, 4) + 11.0)


def test_batches_with_python_scalars_and_states_of_numpy_arrays():
    """As with ``jax.jit``. The batch also has a None."""
    compiled = LayoutStep(lambda state, batch: (state + jnp.sum(batch["x"]) * batch["factor"], {}))
    new, _ = compiled(np.ones((2, 3), np.float32), {"x": np.ones(5, np.float32), "factor": 2.0, "absent": None})
    np.testing.assert_array_equal(new, np.full((2, 3), 11.0))


def test_a_step_runs_on_the_device_of_its_state():
    device = jax.devices()[1]
    compiled = LayoutStep(step)
    state, _ = compiled(jax.device_put(new_state(), device), np.ones(5))
    state, results = compiled(state, jax.device_put(jnp.ones(6), device))
    assert state["weights"].devices() == results["mean"].devices() == {device}


def test_arrays_that_have_the_format_are_not_copied():
    state = new_state()
    formats = {"weights": state["weights"].format, "key": None}
    state = new_state((2, 1, 0))
    moved = with_formats(state, formats)
    assert state["weights"].is_deleted()
    assert moved["key"] is state["key"]
    assert with_formats(moved, formats)["weights"] is moved["weights"]


def test_a_step_on_a_tpu_chooses_layouts(monkeypatch):
    model = tiny_model("gpt2-tiny")
    trainer = trainer_module.Trainer(model, make_optimizer(OptimizerConfig(), model.specs, 1000), causal.loss)
    assert not isinstance(trainer.jit_step(), LayoutStep)
    monkeypatch.setattr(trainer_module, "platform", lambda: "tpu")
    assert isinstance(trainer.jit_step(), LayoutStep)

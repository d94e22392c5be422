"""Tests of the TPU kernel for one step of a recurrence, interpreted on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.scan import generalized_delta_rule, linear_attention, ssd, step_pallas
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close

B, H, K, V = 3, 4, 16, 8


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Calls without ``implementation`` use the kernel, in Pallas's interpreter."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "step_kernel", lambda dtype: True)


def arrays(groups=H, dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(B, 1, groups, K)).astype(dtype) for _ in range(2))
    v, state = rng.normal(size=(B, 1, H, V)).astype(dtype), rng.normal(size=(B, H, K, V)).astype(np.float32)
    return q, k, v, -rng.exponential(size=(B, 1, H, K)).astype(np.float32), state


def linear(q, k, v, log, state, **options):
    return linear_attention(q, k, v, log, state, **options)


def shared(q, k, v, log, state, **options):
    return ssd(v, -log[..., 0], -jnp.arange(1.0, H + 1), k[:, :, :2], q[:, :, :2], state, **options)


def generalized(q, k, v, log, state, **options):
    return generalized_delta_rule(q, k, v, log, (-k, 0.5 * k), state, **options)


FUNCTIONS = {"decays per channel": linear, "shared keys, scales": shared, "generalized": generalized}
MASKS = {"reset_BT": np.array([[True], [False], [True]]), "keep_BT": np.array([[True], [False], [True]])}


def value_and_gradients(function, inputs, **options):
    def loss(inputs):
        out, last = function(*inputs, **options)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(last)), (out, last)

    # A call that is differentiated does not use the kernel.
    return jax.jit(loss)(inputs), jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)


def calls_of_kernel(function, *inputs):
    return str(jax.make_jaxpr(lambda *inputs: function(*inputs))(*inputs)).count("recurrence_step")


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["no masks", "masks"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernel_equals_the_reference(name, masks):
    function, inputs = FUNCTIONS[name], arrays()
    assert calls_of_kernel(function, *inputs) > 0
    want = value_and_gradients(function, inputs, implementation="reference", **masks)
    assert_trees_close(value_and_gradients(function, inputs, **masks), want, 2e-6)


def test_bfloat16():
    inputs = arrays(dtype=jnp.bfloat16)
    want, got = generalized(*inputs, implementation="reference"), generalized(*inputs)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), 4e-3)


def test_vmap_of_the_kernel_is_the_reference():
    inputs = arrays()
    pairs = jax.tree.map(lambda x: np.stack([x, 2 * x]), inputs)
    got = jax.vmap(generalized)(*pairs)
    want = jax.vmap(functools.partial(generalized, implementation="reference"))(*pairs)
    assert_trees_close(got, want, 2e-6)
    assert calls_of_kernel(jax.vmap(generalized), *pairs) == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reset_removes_a_state_that_is_not_finite(name):
    *inputs, state = arrays()
    state = state.copy()
    state[0] = np.nan
    got = FUNCTIONS[name](*inputs, state, reset_BT=np.array([[True], [False], [False]]))
    assert all(np.all(np.isfinite(x)) for x in got)
    assert np.all(np.isnan(FUNCTIONS[name](*inputs, state)[0][0]))


def test_rows_and_heads_on_several_devices():
    inputs = arrays()
    inputs = tuple(np.concatenate([x, x[:1]]) for x in inputs)
    want = generalized(*inputs, implementation="reference")
    with Sharding(make_mesh("data=2,tensor=2", devices=jax.devices()[:4])).scope():
        assert sharding.num_shards(("heads",)) == 2
        got = jax.jit(generalized)(*inputs)
    assert_trees_close(got, want, 2e-6)


def test_only_single_steps_of_states_that_fit_use_the_kernel(monkeypatch):
    q, k, v, log, state = arrays()
    two_steps = (np.concatenate([x, x], axis=1) for x in (q, k, v, log))
    assert calls_of_kernel(linear, *two_steps, state) == 0
    monkeypatch.setattr(step_pallas, "VMEM_LIMIT_BYTES", 2**16)
    assert calls_of_kernel(linear, q, k, v, log, state) == 0

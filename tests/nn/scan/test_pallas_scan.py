"""Tests of the TPU kernel of linear_scan, interpreted on the CPU, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import get_model, sharding
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.scan import linear_scan, pallas
from jaxlm.plan import planning, topology
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close


def arrays(B, T, D, dtype=np.float32):
    rng = np.random.default_rng(0)
    decay = rng.uniform(0.2, 1.0, (B, T, D)).astype(dtype)
    return decay, rng.normal(size=(B, T, D)).astype(dtype), rng.normal(size=(B, D)).astype(np.float32)


def masks(B, T):
    rng = np.random.default_rng(1)
    return {"reset_BT": jnp.asarray(rng.random((B, T)) < 0.2), "keep_BT": jnp.asarray(rng.random((B, T)) < 0.8)}


def value_and_gradients(arguments, **options):
    def loss(*arguments):
        hidden, last = linear_scan(*arguments, **options)
        return jnp.sum(np.random.default_rng(2).normal(size=hidden.shape) * hidden) + jnp.sum(jnp.sin(last)), (
            hidden,
            last,
        )

    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return {"values": values, "gradients": gradients}


@pytest.fixture
def on_tpu(monkeypatch):
    """Run the kernel in Pallas's interpreter, with several blocks of steps and channels."""
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(pallas, "MAX_STEPS", 16)
    monkeypatch.setattr(pallas, "MAX_CHANNELS", 128)


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "D", "masked"),
    [(2, 48, 256, True), (2, 21, 40, True), (1, 1, 3, False)],  # several blocks; padded steps; one step
)
def test_values_and_gradients(B, T, D, masked, reverse, on_tpu):
    """The kernel has the values and gradients of the reference."""
    options = {"reverse": reverse, **(masks(B, T) if masked else {})}
    got = value_and_gradients(arrays(B, T, D), implementation="pallas", **options)
    want = value_and_gradients(arrays(B, T, D), implementation="reference", **options)
    assert_trees_close(got, want, 1e-5)


def test_bfloat16(on_tpu):
    """With bfloat16 inputs, outputs are bfloat16, the state is float32, and errors are small."""
    decay, new, state = arrays(2, 20, 40)
    low = decay.astype(jnp.bfloat16), new.astype(jnp.bfloat16), state
    got = value_and_gradients(low, implementation="pallas")
    want = value_and_gradients((decay, new, state), implementation="reference")
    assert [x.dtype for x in (*got["values"], *got["gradients"][:2])] == [
        jnp.bfloat16,
        jnp.float32,
        *[jnp.bfloat16] * 2,
    ]
    assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), got), want, 3e-2)


def test_each_device_runs_its_own_rows_and_channels(on_tpu):
    arguments, options = arrays(4, 20, 256), {"implementation": "pallas", **masks(4, 20)}
    with Sharding(make_mesh("data=2,tensor=2", devices=jax.devices()[:4])).scope():
        got = value_and_gradients(arguments, **options)
    assert_trees_close(got, value_and_gradients(arguments, **options), 1e-6)


def test_only_a_tpu_uses_the_kernel(monkeypatch):
    with pytest.raises(ValueError, match="'pallas' runs only on tpu, but this computation is compiled for cpu"):
        linear_scan(*arrays(1, 2, 3), implementation="pallas")
    chosen = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(sharding, "platform", lambda platform=platform: platform)
        chosen[platform] = choices.linear_scan(None)
    assert chosen == {"cpu": "sequential", "gpu": "chunked", "tpu": "pallas"}
    assert choices.linear_scan("needs at least one row") == "chunked"


def test_unsupported_arguments_give_the_reason(on_tpu):
    decay, new, _ = arrays(1, 2, 3, np.float16)
    with pytest.raises(ValueError, match="'pallas' supports float32 and bfloat16, not float16: leave"):
        linear_scan(decay, new, implementation="pallas")
    decay, new, _ = arrays(0, 2, 3)
    with pytest.raises(ValueError, match="'pallas' needs at least one row"):
        linear_scan(decay, new, implementation="pallas")


@pytest.mark.live
def test_the_kernel_of_a_training_step_has_a_schedule():
    topology.prepare_environment()
    result = planning.plan(get_model("griffin-tiny", dtype="bfloat16"), "v5e:2x2", "data=4", batch=8, sequence=32)
    assert {kernel.name.partition(".")[0] for kernel in result.kernels} == {"linear_scan", "linear_scan_backward"}
    assert all(kernel.cycles > 50 for kernel in result.kernels)

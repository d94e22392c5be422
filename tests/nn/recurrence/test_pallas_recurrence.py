"""Tests of the TPU kernels of LSTM and GRU layers, interpreted on the CPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices, lazy_pallas, recurrence
from jaxlm.nn.recurrence import pallas
from jaxlm.nn.segments import complete_masks
from jaxlm.plan import planning, topology
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import add_noise, assert_trees_close, initial_values

KINDS = ("lstm", "gru")


@pytest.fixture(autouse=True)
def interpret(monkeypatch, request):
    """Run the kernels in Pallas's interpreter, except in tests of the TPU compiler."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", "live" not in request.keywords)


@functools.cache
def arrays(kind, B=3, T=6, D=5, H=20, dtype="float32"):
    specs = (recurrence.lstm_specs if kind == "lstm" else recurrence.gru_specs)(D, H)
    params = add_noise(add_noise(initial_values(specs)))
    rng = np.random.default_rng(1)
    names = ("hidden", "cell") if kind == "lstm" else ("hidden",)
    state = {name: jnp.asarray(rng.normal(size=(B, H)), jnp.float32) for name in names}
    return params, jnp.asarray(rng.normal(size=(B, T, D)), dtype), state


def masks(B, T):
    rng = np.random.default_rng(4)
    return {"reset_BT": jnp.asarray(rng.random((B, T)) < 0.3), "keep_BT": jnp.asarray(rng.random((B, T)) < 0.7)}


def kernel_layer(kind, params, x_BTD, state, *, reset_BT=None, keep_BT=None, reverse=False):
    """The layer, computed by the interpreted kernel."""
    weights = {name: x.astype(x_BTD.dtype) if name.startswith("weight") else x for name, x in params.items()}
    both = complete_masks(reset_BT, keep_BT, x_BTD.shape[:2])
    both = None if both is None else tuple(mask[:, :, None] for mask in both)
    names = sorted(state, reverse=True)  # hidden, cell
    first = tuple(state[name] for name in names)
    hidden_BTH, last = pallas.layer(kind, weights, x_BTD, first, both, reverse=reverse)
    return hidden_BTH, dict(zip(names, last, strict=True))


def reference_layer(kind, *arguments, **options):
    return getattr(recurrence, kind)(*arguments, **options, implementation="reference")


def value_and_gradients(layer, kind, arguments, **options):
    def loss(*arguments):
        hidden, last = layer(kind, *arguments, **options)
        weights = np.random.default_rng(2).normal(size=hidden.shape)
        total = jnp.sum(weights * hidden) + sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(last))
        return total, (hidden, last)

    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return {"values": values, "gradients": gradients}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, masked, reverse):
    """The kernel has the values and gradients of the reference."""
    arguments = arrays(kind)
    options = {"reverse": reverse, **(masks(3, 6) if masked else {})}
    got = value_and_gradients(kernel_layer, kind, arguments, **options)
    want = value_and_gradients(reference_layer, kind, arguments, **options)
    assert_trees_close(got, want, 1e-5)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("kind", "B", "T"), [("lstm", 1, 1), ("lstm", 48, 4), ("gru", 5, 7), ("gru", 48, 3)])
def test_blocks_of_rows_and_steps(kind, B, T, reverse, monkeypatch):
    """48 rows are three blocks, and the steps are padded to a multiple of four."""
    monkeypatch.setattr(pallas, "MAX_BLOCK_ROWS", 16)
    arguments, options = arrays(kind, B=B, T=T), {"reverse": reverse, **(masks(B, T) if B == 48 else {})}
    got = value_and_gradients(kernel_layer, kind, arguments, **options)
    assert_trees_close(got, value_and_gradients(reference_layer, kind, arguments, **options), 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    """With bfloat16 inputs, outputs are bfloat16, the state is float32, and errors are small."""
    params, x, state = arrays(kind)
    got = value_and_gradients(kernel_layer, kind, (params, x.astype(jnp.bfloat16), state))
    want = value_and_gradients(reference_layer, kind, (params, x, state))
    hidden, last = got["values"]
    assert (hidden.dtype, last["hidden"].dtype) == (jnp.bfloat16, jnp.float32)
    assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), got), want, 3e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_each_device_runs_its_own_rows(kind):
    arguments = arrays(kind, B=8)  # two rows per device
    mesh_sharding = Sharding(make_mesh("data=2,fsdp=2", devices=jax.devices()[:4]))

    def on_mesh(*arguments, **options):
        with mesh_sharding.scope():
            return kernel_layer(*arguments, **options)

    got = value_and_gradients(on_mesh, kind, arguments, **masks(8, 6))
    assert_trees_close(got, value_and_gradients(kernel_layer, kind, arguments, **masks(8, 6)), 1e-6)


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(sharding, "device_kind", lambda: "TPU v5 lite")


def test_the_kernel_needs_a_tpu():
    params, x, _ = arrays("lstm", T=8)
    with pytest.raises(ValueError, match="'pallas' runs only on tpu, but this computation is compiled for cpu"):
        recurrence.lstm(params, x, implementation="pallas")


def test_unsupported_arguments_give_the_reason(on_tpu, monkeypatch):
    params, x, _ = arrays("lstm", T=8)
    with pytest.raises(ValueError, match="'pallas' does not support remat"):
        recurrence.lstm(params, x, implementation="pallas", remat=True)
    before = initial_values(recurrence.gru_specs(5, 4, reset="before"))
    with pytest.raises(ValueError, match="reset gate is applied before the product: leave the implementation out"):
        recurrence.gru(before, x, implementation="pallas")
    with pytest.raises(ValueError, match="supports float32 and bfloat16, not float16"):
        recurrence.lstm(params, x.astype(jnp.float16), implementation="pallas")

    def reason(width=64, dtype=jnp.bfloat16, batch=8, steps=8):
        weights = {"weight_hidden": jax.ShapeDtypeStruct((width, 4, width), jnp.float32)}
        return pallas.unsupported_reason(weights, jax.ShapeDtypeStruct((batch, steps, width), dtype))

    assert reason() is None
    assert reason(batch=320) is None
    assert "at most 256 rows per device, or a multiple of 16, got 300" in reason(batch=300)
    assert "at most 64 rows per device, or a multiple of 16, got 72" in reason(2048, batch=72)
    assert "at most 32 MiB, got 64 MiB" in reason(2048, jnp.float32)
    assert "at least 8 steps, got 1" in reason(steps=1)
    assert "at least one row" in reason(batch=0)
    with jax.default_matmul_precision("high"):
        assert "jax_default_matmul_precision='high'" in reason()
    with Sharding(make_mesh("data=4,tensor=2")).scope():
        assert "does not split the hidden width" in reason()
    monkeypatch.setattr(sharding, "device_kind", lambda: "TPU v4")
    assert "TPU v5 or newer" in reason()


def test_a_layer_on_a_tpu_uses_the_kernel(on_tpu, monkeypatch):
    calls = []

    def layer(kind, weights, *arguments, **options):
        calls.append((kind, weights["weight_hidden"].dtype))
        return kernel(kind, weights, *arguments, **options)

    kernel = pallas.layer
    monkeypatch.setattr(pallas, "layer", layer)
    for kind in KINDS:  # the parameters are float32
        params, x, _ = arrays(kind, T=8)
        jax.eval_shape(getattr(recurrence, kind), params, x.astype(jnp.bfloat16))
    assert calls == [("lstm", jnp.bfloat16), ("gru", jnp.bfloat16)]


def test_a_tpu_uses_the_kernel_if_it_supports_the_arguments(monkeypatch):
    assert choices.recurrence(None, remat=False) == "chunked"
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert choices.recurrence(None, remat=False) == "pallas"
    assert choices.recurrence(None, remat=True) == "chunked"
    assert choices.recurrence("does not split the hidden width", remat=False) == "chunked"


@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_of_a_training_step_have_a_schedule(kind):
    topology.prepare_environment()
    from jaxlm import get_model

    result = planning.plan(get_model(f"{kind}-tiny", dtype="bfloat16"), "v5e:2x2", "data=4", batch=32, sequence=16)
    assert {kernel.name.partition(".")[0] for kernel in result.kernels} == {f"{kind}_forward", f"{kind}_backward"}
    assert all(kernel.cycles > 100 for kernel in result.kernels)

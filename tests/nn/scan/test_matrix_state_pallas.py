"""Tests of the TPU kernels of linear_attention, interpreted on the CPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.scan import linear_attention, matrix_state_pallas, ssd
from jaxlm.plan import topology
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, relative_error

SHAPES = {  # B, T, G, H, K, V
    "shared keys, padded time": (2, 40, 1, 4, 16, 8),
    "own keys": (1, 33, 4, 4, 8, 16),
    "two groups": (1, 20, 2, 8, 128, 32),
    "two blocks of heads": (1, 20, 1, 8, 16, 32),
}


def arrays(B, T, G, H, K, V, dtype=np.float32):
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(B, T, G, K)).astype(dtype) for _ in range(2))
    value, state = rng.normal(size=(B, T, H, V)).astype(dtype), rng.normal(size=(B, H, K, V)).astype(np.float32)
    log_decay = -0.3 * rng.exponential(size=(B, T, H)).astype(np.float32)
    return query * dtype(K**-0.5), key, value, log_decay, state


def masks(B, T):
    rng = np.random.default_rng(1)
    return {"reset_BT": jnp.asarray(rng.random((B, T)) < 0.1), "keep_BT": jnp.asarray(rng.random((B, T)) < 0.8)}


def value_and_gradients(arguments, **options):
    def loss(*arguments):
        out, last = linear_attention(*arguments, **options)
        weights = np.random.default_rng(2).normal(size=out.shape)
        return jnp.sum(weights * out.astype(jnp.float32)) + jnp.sum(jnp.sin(last)), (out, last)

    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arguments)
    return {"values": values, "gradients": gradients}


@pytest.fixture
def on_tpu(monkeypatch):
    """Run the kernels in Pallas's interpreter, with chunks of 16 steps and blocks of at most 4 heads."""
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 16)
    interpreted = functools.partial(matrix_state_pallas.linear_attention, interpret=True)
    monkeypatch.setattr(matrix_state_pallas, "linear_attention", interpreted)
    monkeypatch.setattr(matrix_state_pallas, "MAX_HEADS", 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, masked, on_tpu):
    options = masks(*shape[:2]) if masked else {}
    got = value_and_gradients(arrays(*shape), implementation="pallas", **options)
    want = value_and_gradients(arrays(*shape), implementation="reference", **options)
    assert_trees_close(got, want, 1e-5)


def test_decays_of_almost_zero(on_tpu):
    """The state is forgotten, also by a log decay of -inf, and the gradients are finite."""
    query, key, value, log_decay, state = arrays(*SHAPES["own keys"])
    log_decay[:, 5], log_decay[:, 20] = -np.inf, -500.0
    got = value_and_gradients((query, key, value, log_decay, state), implementation="pallas")
    want = value_and_gradients((query, key, value, log_decay, state), implementation="chunked")
    assert_trees_close(got, want, 2e-5)  # a sum of log decays of 208 has a rounding error of 1e-5


def test_bfloat16(on_tpu):
    """The errors are about the rounding error of bfloat16, 0.004, as for the implementation chunked."""
    arguments = arrays(*SHAPES["shared keys, padded time"], dtype=jnp.bfloat16)
    got, chunked = (value_and_gradients(arguments, implementation=name) for name in ("pallas", "chunked"))
    exact = value_and_gradients([np.asarray(x, np.float32) for x in arguments], implementation="reference")
    for result, other, want in zip(*map(jax.tree.leaves, (got, chunked, exact)), strict=True):
        assert result.dtype == other.dtype
        as_float = np.asarray(result, np.float32)
        assert relative_error(as_float, want) < max(0.02, 2.0 * relative_error(np.asarray(other, np.float32), want))


def test_state_space_model_with_negative_eigenvalues(on_tpu):
    rng = np.random.default_rng(0)
    x, dt = rng.normal(size=(2, 24, 4, 8)), rng.uniform(0.1, 2.0, (2, 24, 4))
    B, C = (rng.normal(size=(2, 24, 1, 16)) for _ in range(2))
    arguments = [np.asarray(y, np.float32) for y in (x, dt, -rng.uniform(0.1, 1.0, 4), B, C)]
    got, want = (
        ssd(*arguments, negative_eigenvalues=True, implementation=name, **masks(2, 24))
        for name in ("pallas", "reference")
    )
    assert_trees_close(got, want, 1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 33, 4, 4, 8, 16),  # own keys
        (1, 20, 1, 8, 16, 32),  # one group
        (1, 20, 2, 8, 128, 64),  # a group for each device
        (1, 20, 4, 8, 128, 128),  # two groups for each device
    ],
)
def test_heads_of_several_devices(shape, on_tpu):
    arguments, options = arrays(*shape), masks(*shape[:2])
    want = value_and_gradients(arguments, implementation="reference", **options)
    with Sharding(make_mesh({"data": 1, "tensor": 2}, devices=jax.devices()[:2])).scope():
        got = value_and_gradients(arguments, implementation="pallas", **options)
    assert_trees_close(got, want, 1e-5)


def test_groups_that_the_devices_cannot_share_are_named(on_tpu):
    query, _, value, _, _ = arrays(1, 20, 2, 8, 128, 64)
    with Sharding(make_mesh({"data": 1, "tensor": 4}, devices=jax.devices()[:4])).scope():
        reason = matrix_state_pallas.unsupported_reason(query, value, 1)
    assert reason == "needs 4 shards to divide the numbers of heads and groups, 8 and 2"


def test_several_chunks_of_the_default_size(on_tpu, monkeypatch):
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 128)
    shape = (1, 300, 1, 2, 8, 64)
    got, want = (
        value_and_gradients(arrays(*shape), implementation=name, **masks(1, 300)) for name in ("pallas", "reference")
    )
    assert_trees_close(got, want, 2e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "per_channel", "message"),
    [
        ((1, 8, 2, 2, 8, 8), np.float16, False, "supports float32 and bfloat16, not float16"),
        ((1, 8, 2, 2, 8, 8), np.float32, True, "supports one decay per head, not one per channel"),
        ((1, 8, 3, 6, 8, 8), np.float32, False, "needs widths of heads for which a block"),
    ],
)
def test_unsupported_arguments_are_named(shape, dtype, per_channel, message, on_tpu):
    query, key, value, log_decay, state = arrays(*shape, dtype=dtype)
    if per_channel:
        log_decay = np.repeat(log_decay[..., None], shape[4], axis=-1)
    with pytest.raises(ValueError, match=f"implementation='pallas' {message}.*: use implementation='chunked'"):
        linear_attention(query, key, value, log_decay, state, implementation="pallas")


def test_the_choice_depends_on_the_platform_and_the_arguments(monkeypatch):
    assert choices.linear_attention(64, None) == "chunked"
    with pytest.raises(ValueError, match="runs only on tpu"):
        linear_attention(*arrays(*SHAPES["own keys"]), implementation="pallas")
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    with pytest.raises(ValueError, match="does not support chunk=32"):
        linear_attention(*arrays(*SHAPES["own keys"]), implementation="pallas", chunk=32)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert choices.linear_attention(64, None) == "pallas"
    assert choices.linear_attention(64, "supports something else") == "chunked"
    assert choices.linear_attention(1, None) == "reference"
    assert [choices.kernel_chunk(steps) for steps in (1, 100, 128, 1000)] == [16, 112, 128, 128]


@pytest.mark.live
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 300, 1, 24, 128, 64), (2, 100, 4, 4, 256, 256), (8, 256, 8, 64, 128, 64)])
def test_the_tpu_compiler_accepts_the_kernels(shape, dtype):
    B, T, G, H, K, V = shape
    topology.prepare()
    device = topology.get_topology("v5e:2x2").devices[0]
    target = Sharding(make_mesh({"data": 1}, devices=[device]))
    shapes = ((B, T, G, K), (B, T, G, K), (B, T, H, V))
    arguments = [jax.ShapeDtypeStruct(size, dtype, sharding=target.replicated()) for size in shapes]
    log_decay = jax.ShapeDtypeStruct((B, T, H), jnp.float32, sharding=target.replicated())

    def loss(*arguments):
        out, last = linear_attention(*arguments)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(last)

    with target.scope():
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments, log_decay).compile().as_text()
    assert text.count("linear_attention_backward") >= 1

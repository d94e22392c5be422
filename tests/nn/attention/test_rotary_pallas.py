"""Tests of the TPU kernel that rotates queries and keys, interpreted on the CPU and compiled for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.attention.rotary import rotary_angles, rotary_width, rotate
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close
from tests.nn.tpu import one_tpu

SHAPES = {  # B, T, H, K, fraction of rotated entries
    "one head per group": (2, 5, 3, 128, 1.0),
    "wide heads": (1, 20, 2, 256, 1.0),
    "two heads per group": (2, 33, 4, 64, 1.0),
    "half of each head": (2, 33, 4, 64, 0.5),
    "a quarter of each head": (2, 9, 2, 128, 0.25),
    "incomplete last block": (1, 600, 2, 64, 1.0),
    "incomplete last group": (2, 20, 3, 64, 1.0),
}


@pytest.fixture
def kernel(monkeypatch):
    """Use the kernel as on a TPU, but in Pallas's interpreter."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "_is_new_tpu", lambda: True)


def arrays(B, T, H, K, fraction, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(0, 3 * T, (B, T)))
    x = jnp.asarray(rng.normal(size=(B, T, H, K)), dtype)
    return x, rotary_angles(positions, rotary_width(K, fraction), 10000.0)


def loss(x, angles):
    out = rotate(x, angles)
    return jnp.sum(1.0 + jnp.sin(out.astype(jnp.float32))), out


def call(x, angles):
    """A pair: the result with the gradients of ``x`` and the angles, and the number of kernel calls with them."""
    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(function)(x, angles), str(jax.make_jaxpr(function)(x, angles)).count("pallas_call")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_has_the_values_and_gradients_of_the_rotation(shape, dtype, request):
    inputs = arrays(*SHAPES[shape], dtype=dtype)
    want, num_kernels = call(*inputs)
    assert num_kernels == 0
    request.getfixturevalue("kernel")
    got, num_kernels = call(*inputs)
    assert num_kernels == 2
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]
    # XLA rounds sums of bfloat16 products at other places.
    tolerance = 1e-6 if dtype == jnp.float32 else 8e-3
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), tolerance)


def test_second_derivatives_and_vmap(request):
    x, angles = arrays(2, 3, 2, 64, 1.0)

    def gradient_norm(x):
        return jnp.sum(jax.grad(lambda x: loss(x, angles)[0])(x) ** 2)

    def run():
        return jax.grad(gradient_norm)(x), jax.vmap(lambda x: rotate(x[None], (angles[0][:1], angles[1][:1])))(x)

    want = run()
    request.getfixturevalue("kernel")
    assert_trees_close(run(), want, 1e-6)


def test_rows_can_share_angles(request):
    x, (cos, sin) = arrays(3, 5, 2, 64, 1.0)
    want, _ = call(x, (cos[:1], sin[:1]))
    request.getfixturevalue("kernel")
    got, num_kernels = call(x, (cos[:1], sin[:1]))
    assert num_kernels == 2
    assert_trees_close(got, want, 1e-6)


def test_entries_that_are_not_rotated_do_not_depend_on_the_others(kernel):
    x, angles = arrays(1, 3, 2, 64, 0.5)
    out = rotate(x.at[..., :32].set(jnp.inf), angles)
    assert np.array_equal(out[..., 32:], x[..., 32:])


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "fsdp=4,sequence=2"])
def test_the_kernel_runs_on_a_mesh(mesh, kernel):
    x, angles = arrays(4, 6, 8, 64, 1.0)
    want, _ = call(x, angles)
    with Sharding(make_mesh(mesh)).scope():
        got, num_kernels = call(x, angles)
    assert num_kernels == 2
    assert_trees_close(got, want, 1e-6)


def test_the_kernel_is_chosen_only_for_supported_arguments_that_the_mesh_splits_evenly(kernel):
    def use(B, T, H, K, dtype=jnp.bfloat16):
        return choices.rotary_kernel(jnp.zeros((B, T, H, K), dtype))

    assert use(3, 2, 2, 64)
    assert use(3, 2, 1, 256)
    assert not use(3, 1, 2, 64)  # one token per row
    assert not use(0, 2, 2, 64)
    assert not use(3, 2, 2, 96)
    assert not use(3, 2, 2, 192)
    assert not use(3, 2, 2, 64, dtype=jnp.float16)
    with Sharding(make_mesh("data=2,tensor=4")).scope():
        assert use(2, 2, 8, 64)
        assert not use(3, 2, 8, 64)
        assert not use(2, 2, 2, 128)


def test_the_kernel_is_not_chosen_on_a_cpu():
    assert not choices.rotary_kernel(jnp.zeros((2, 2, 2, 64)))


@pytest.mark.live
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 1024, 16, 128, 1.0), (8, 1000, 9, 64, 0.5), (1, 9, 64, 256, 1.0)])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_the_tpu_compiler_accepts_the_kernel(chip, shape, dtype):
    target = one_tpu(chip)
    B, T, H, K, fraction = shape
    table = (B, T, rotary_width(K, fraction) // 2)
    x, cos, sin = (
        jax.ShapeDtypeStruct(size, kind, sharding=target.replicated())
        for size, kind in (((B, T, H, K), dtype), (table, jnp.float32), (table, jnp.float32))
    )
    with target.scope():
        text = jax.jit(jax.grad(loss, has_aux=True)).lower(x, (cos, sin)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2

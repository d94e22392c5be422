"""Tests of the TPU kernels for few rows, interpreted on the CPU: norms, and logits of a large table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices, lazy_pallas, unembed_pallas
from jaxlm.nn.embedding import unembed
from jaxlm.nn.norm import layer_norm, rms_norm
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close


@pytest.fixture
def kernels(monkeypatch):
    """Use the kernels as on a TPU, but in Pallas's interpreter, for tables of any size, and with small blocks."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "_is_new_tpu", lambda: True)
    monkeypatch.setattr(choices, "MIN_UNEMBED_KERNEL_BYTES", 0)
    monkeypatch.setattr(unembed_pallas, "MAX_BLOCK_BYTES", 2**15)


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


NORMS = {
    "layer norm": (layer_norm, (3, 1, 40), {"scale": (40,), "bias": (40,)}),
    "rms norm": (rms_norm, (3, 1, 40), {"scale": (40,)}),
    "rms norm, scale minus one": (rms_norm, (3, 1, 40), {"scale_minus_one": (40,)}),
}


def call_norm(name, dtype):
    """A pair: the result with its gradients, and the number of kernel calls without the gradients."""
    norm, shape, params = NORMS[name]
    params = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(params.items(), 1)}
    x = normal(*shape, dtype=dtype) * 3 + 1

    def loss(params, x):
        out = norm(params, x, 1e-5)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(function)(params, x), str(jax.make_jaxpr(loss)(params, x)).count("pallas_call")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_the_norm_kernel_has_the_values_and_gradients_of_the_norm(name, dtype, request):
    want, num_kernels = call_norm(name, dtype)
    assert num_kernels == 0
    request.getfixturevalue("kernels")
    got, num_kernels = call_norm(name, dtype)
    assert num_kernels == 1
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]
    tolerance = 1e-6 if dtype == jnp.float32 else 8e-3
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), tolerance)


def call_unembed(rows, table_rows, vocab_size):
    """A pair as in :func:`call_norm`. With the kernel, the last block of the table is incomplete."""
    table, hidden = normal(table_rows, 24, dtype=jnp.bfloat16), normal(*rows, 24, dtype=jnp.bfloat16, seed=1)

    def loss(table, hidden):
        logits = unembed(table, hidden, vocab_size)
        return jnp.sum(jnp.sin(logits[..., :vocab_size])), logits

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(function)(table, hidden), str(jax.make_jaxpr(loss)(table, hidden)).count("pallas_call")


@pytest.mark.parametrize(("rows", "table_rows", "vocab_size"), [((3, 1), 300, 300), ((2, 4), 520, 500)])
def test_the_unembed_kernel_has_the_values_and_gradients_of_the_matmul(rows, table_rows, vocab_size, request):
    want, num_kernels = call_unembed(rows, table_rows, vocab_size)
    assert num_kernels == 0
    request.getfixturevalue("kernels")
    got, num_kernels = call_unembed(rows, table_rows, vocab_size)
    assert num_kernels == 1
    assert got[0][1].dtype == jnp.float32
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), 4e-3)


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "data=8"])
def test_the_kernels_run_on_a_mesh(mesh, kernels):
    table, hidden = normal(256, 32, dtype=jnp.bfloat16), normal(8, 1, 32, dtype=jnp.bfloat16, seed=1)

    def run(table, hidden):
        return unembed(table, hidden, 256), rms_norm({"scale": table[0]}, hidden, 1e-5)

    want = jax.jit(run)(table, hidden)
    with Sharding(make_mesh(mesh)).scope():
        got = jax.jit(lambda *arguments: run(*arguments))(table, hidden)
        program = str(jax.make_jaxpr(lambda *arguments: run(*arguments))(table, hidden))
    assert program.count("pallas_call") == 2
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), 1e-6)


def test_the_kernels_are_chosen_only_for_supported_dtypes_and_few_rows_that_the_mesh_splits_evenly(kernels):
    def use_norm(*shape, dtype=jnp.bfloat16):
        return choices.norm_kernel(jnp.zeros(shape, dtype), jnp.zeros(shape[-1]))

    def use_unembed(rows, table_rows=8, dtype=jnp.bfloat16):
        return choices.unembed_kernel(jnp.zeros((table_rows, 16), dtype), jnp.zeros((*rows, 16), jnp.bfloat16))

    assert use_norm(64, 1, 16)
    assert not use_norm(65, 1, 16)
    assert not use_norm(8, 2, 16)  # two tokens per row
    assert not use_norm(8, 1, 16, dtype=jnp.float16)
    assert not use_norm(8, 1, 4, 16)  # groups
    assert use_unembed((8, 8))
    assert not use_unembed((8, 9))
    assert not use_unembed((8, 1), dtype=jnp.float32)  # a bfloat16 copy of the table would be made first
    with Sharding(make_mesh("data=2,tensor=4")).scope():
        assert use_norm(128, 1, 16)  # 64 rows on each device
        assert not use_norm(3, 1, 16)
        assert not use_unembed((8, 1), table_rows=6)


def test_the_kernels_are_not_used_where_a_pallas_call_raises(kernels):
    """On a mesh with Explicit axes, and in ``shard_map`` with ``check_vma=True`` (the default) for rows that vary."""
    x, params, table = normal(8, 1, 16), {"scale": normal(16, seed=1)}, normal(8, 16, dtype=jnp.bfloat16)
    want = rms_norm(params, x, 1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        got = jax.jit(lambda x: rms_norm(params, x, 1e-5))(rows)
        assert not choices.unembed_kernel(table, rows.astype(jnp.bfloat16))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def map_shards(function, *in_specs, out):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out))

    for specs in ((jax.P("data"), jax.P()), (jax.P(), jax.P())):  # rows that vary, and nothing that varies
        got = map_shards(lambda x, scale: rms_norm({"scale": scale}, x, 1e-5), *specs, out=specs[0])(x, params["scale"])
        np.testing.assert_allclose(got, want, rtol=1e-6)
    hidden = x.astype(jnp.bfloat16)
    by_vocabulary = map_shards(lambda table: unembed(table, hidden, 1), jax.P("data"), out=jax.P(None, None, "data"))
    assert_trees_close(by_vocabulary(table), unembed_pallas.reference(table, hidden), 1e-2)


def test_first_and_second_derivatives_in_forward_and_reverse_mode(kernels):
    x, params = normal(3, 1, 8), {"scale": normal(8, seed=1), "bias": normal(8, seed=2)}

    def loss(params, x):
        return jnp.sum(jnp.sin(layer_norm(params, x, 1e-5)))

    def reference_loss(params, x):
        return jnp.sum(jnp.sin(layer_norm(params, x[:, None], 1e-5)))  # four axes: no kernel

    def jacobian_of_gradient(function, argnums):
        return jax.jacrev(jax.grad(function, argnums), argnums)

    for derivative in (jax.jacfwd, jax.hessian, jacobian_of_gradient):
        got, want = (jax.jit(derivative(function, argnums=1))(params, x) for function in (loss, reference_loss))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    table, hidden = normal(24, 16, dtype=jnp.bfloat16), normal(2, 1, 16, dtype=jnp.bfloat16, seed=1)

    def table_loss(table):
        return jnp.sum(jnp.sin(unembed(table, hidden, 24)))

    def reference_table_loss(table):
        return jnp.sum(jnp.sin(unembed_pallas.reference(table, hidden)))

    @functools.partial(jax.jit, static_argnums=0)
    def second_derivative(loss):
        return jax.jvp(jax.grad(loss), (table,), (jnp.ones_like(table),))[1]

    got, want = map(second_derivative, (table_loss, reference_table_loss))
    assert_trees_close(jnp.float32(got), jnp.float32(want), 1e-2)


def test_vmap_over_parameters(kernels):
    x, params = normal(2, 3, 1, 8), {"scale": normal(2, 8, seed=1), "bias": normal(2, 8, seed=2)}
    got = jax.vmap(lambda params, x: layer_norm(params, x, 1e-5))(params, x)
    want = jax.vmap(lambda params, x: layer_norm(params, x[:, None], 1e-5))(params, x)[:, :, 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

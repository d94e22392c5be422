"""Tests of sums and norms over the channels of each head: merged heads give the results of separate heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices
from jaxlm.nn.head_norm import head_l2_normalize, head_layer_norm, head_sums
from jaxlm.nn.norm import l2_normalize, layer_norm
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close

B, T, H, K = 2, 3, 4, 8


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(H, K)).astype(np.float32) for name in ("scale", "bias")}
    return params, rng.normal(size=(B, T, H, K)).astype(dtype)


def separate_heads(params, x):
    sums = jnp.broadcast_to(jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True), x.shape)
    return sums, l2_normalize(x, 1e-6), layer_norm(params, x, 1e-5)


def merged_heads(params, x):
    flat = x.reshape(B, T, H * K)
    results = head_sums(flat, K), head_l2_normalize(flat, K, 1e-6), head_layer_norm(params, flat, 1e-5)
    return tuple(y.reshape(x.shape) for y in results)


def values_and_gradients(function, params, x):
    def loss(params, x):
        results = function(params, x)
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in results), results

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("by_matmul", [False, True])
def test_merged_heads(by_matmul, dtype, monkeypatch):
    monkeypatch.setattr(choices, "head_sums_by_matmul", lambda: by_matmul)
    params, x = arrays(dtype)
    got, want = (values_and_gradients(function, params, x) for function in (merged_heads, separate_heads))
    assert_trees_close(got, want, 1e-5 if dtype == np.float32 else 1e-2)


def test_devices_that_split_the_heads(monkeypatch):
    monkeypatch.setattr(choices, "head_sums_by_matmul", lambda: True)
    params, x = arrays()
    want = values_and_gradients(separate_heads, params, x)
    with Sharding(make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])).scope():
        got = values_and_gradients(merged_heads, params, x)
    assert_trees_close(got, want, 1e-5)

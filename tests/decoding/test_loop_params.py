"""Tests of the parameters in the loops of decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import get_model, spec
from jaxlm.decoding.loop import loop_params
from jaxlm.decoding.prompts import read_tokens
from jaxlm.testing.helpers import initial_params, random_tokens


@pytest.mark.parametrize("name", ["mamba2-tiny", "rwkv7-tiny", "gpt2-tiny"])
def test_norms_and_vectors_are_float32_and_results_are_equal(name):
    model = get_model(name, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), initial_params(model))
    converted = loop_params(model, params)
    for path, x in spec.flatten(converted).items():
        *parents, leaf = path.split("/")
        is_norm = any("norm" in parent for parent in parents)
        is_bias = leaf == "bias" and not is_norm
        assert x.dtype == (jnp.float32 if is_norm or (x.ndim == 1 and not is_bias) else jnp.bfloat16), path
    tokens = random_tokens(model, 2, 1)[:, 0]
    step = jax.jit(lambda params: read_tokens(model, params, model.init_state(2, 4), tokens))
    got, want = (jax.tree.map(lambda x: np.asarray(x, np.float32), step(each)) for each in (converted, params))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parameters_of_other_families_are_unchanged():
    """They may use a vector without a cast."""
    model = dataclasses.replace(get_model("gpt2-tiny"), family="mine")
    params = {"gain": jnp.ones(3, jnp.bfloat16), "blocks": [{"scale": jnp.ones(3, jnp.bfloat16)}]}
    assert loop_params(model, params) is params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_normalized_once_and_results_are_equal(dtype):
    model = get_model("resnet-lm-tiny", dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), initial_params(model))
    converted = loop_params(model, params)
    names = {path.rpartition("/")[2] for path in spec.flatten(converted)}
    assert "weight" in names
    assert not names & {"direction", "gain"}
    specs = jax.tree.map(lambda leaf: dataclasses.replace(leaf, dtype=dtype), model.specs)
    assert spec.differences(loop_params(model, specs), converted) == []
    tokens = random_tokens(model, 2, 1)[:, 0]
    step = jax.jit(lambda params: read_tokens(model, params, model.init_state(2, 4), tokens)[1])
    np.testing.assert_allclose(step(converted), step(params), rtol=1e-6 if dtype == "float32" else 2e-2, atol=1e-6)

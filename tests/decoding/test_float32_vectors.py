"""Tests of the parameters that the loops of decoding convert to float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import get_model, spec
from jaxlm.decoding.prompts import read_tokens, with_float32_vectors
from jaxlm.testing.helpers import initial_params, random_tokens


@pytest.mark.parametrize("name", ["mamba2-tiny", "rwkv7-tiny", "gpt2-tiny"])
def test_norms_and_vectors_are_float32_and_results_are_equal(name):
    model = get_model(name, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), initial_params(model))
    converted = with_float32_vectors(model, params)
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
    assert with_float32_vectors(model, params) is params

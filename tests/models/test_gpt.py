"""GPT-1 and GPT-2: published sizes, pre-norm and post-norm, and task heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import get_model
from jaxlm.nn import choices
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    tiny_model,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124439808),
        ("gpt2-medium", 354823168),
        ("gpt2-large", 774030080),
        ("gpt2-xl", 1557611200),
        ("openai-gpt", 116534784),
    ],
)
def test_published_parameter_counts(name, count):
    assert spec.count(get_model(name).specs) == count


def test_gpt_1_is_post_norm_without_final_norm():
    model = tiny_model("openai-gpt-tiny")
    params = initial_params(model)  # norms of scale 1 and bias 0
    assert "final_norm" not in params
    hidden = jax.jit(model.apply)(params, random_tokens(model, 2, 9))[0]
    assert np.allclose(hidden.mean(axis=-1), 0.0, atol=1e-5)
    assert np.allclose(hidden.var(axis=-1), 1.0, atol=1e-2)


def test_only_gpt_2_has_smaller_initial_residual_projections():
    for name, factor in (("gpt2-tiny", 0.5), ("openai-gpt-tiny", 1.0)):
        specs = get_model(name).specs["layers"][0]
        for weight in (specs["attention"]["output"]["weight"], specs["mlp"]["down"]["weight"]):
            assert weight.init == spec.Normal(0.02 * factor)


@pytest.mark.parametrize("name", ["gpt2-tiny", "openai-gpt-tiny"])
@pytest.mark.parametrize("task", ["causal", "none", "classification"])
def test_files_round_trip(name, task, tmp_path):
    model = tiny_model(name, task=task, num_labels=5 if task == "classification" else 2)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_position": "middle"}, "norm_position='middle' is unknown: choose from 'before', 'after'"),
        ({"task": "seq2seq"}, "task='seq2seq' is unknown"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("gpt2-tiny", **fields)


def test_accelerators_project_queries_keys_and_values_separately(monkeypatch):
    model = tiny_model("gpt2-tiny")
    params, tokens = add_noise(initial_params(model)), random_tokens(model, 2, 9)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens)[0]))

    fused = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(choices, "fused_qkv", lambda: False)
    separate = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert_trees_close(separate, fused, 1e-5, floor=1e-4)

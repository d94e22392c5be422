"""The heads for labels of decoders, and loading a language model with a new head (jaxlm.models.heads)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as config_lib
from jaxlm import spec
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import get_model
from jaxlm.models.heads import LABEL_HEADS, DecoderTask
from jaxlm.testing.contract import loss_of
from jaxlm.testing.helpers import (
    FIRST_VARIANTS,
    TINY,
    add_noise,
    assert_trees_equal,
    batch_of,
    initial_params,
    random_tokens,
    tiny_model,
    variant_params,
)  # fmt: skip

DECODERS = [
    name for name in TINY
    if config_lib.field_types(type(get_model(name).config)).get("task") == DecoderTask
    and get_model(name).task == "causal"
]  # fmt: skip


def test_all_decoders_are_tested():
    assert {"gpt2-tiny", "llama-tiny", "lstm-tiny", "gru-tiny", "mamba2-tiny", "griffin-tiny"} <= set(DECODERS)
    assert {"gated_deltanet-tiny", "xlstm-tiny", "rwkv7-tiny", "resnet-lm-tiny"} <= set(DECODERS) & set(FIRST_VARIANTS)


@pytest.mark.parametrize("name", variant_params(DECODERS))
def test_label_heads(name):
    """A label head has the right outputs, and the label of a text does not depend on padding. All parameters that the
    task has in common with the language model are the same."""
    headless = tiny_model(name, task="none")
    params, tokens = add_noise(initial_params(headless)), random_tokens(headless, 2, 8)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    hidden, _ = jax.jit(headless.apply)(params, tokens, segment_ids=segments)
    with pytest.raises(ValueError, match="task='none' has no head for labels: choose a task from classification"):
        headless.logits(params, hidden)
    for task, head in LABEL_HEADS.items():
        model = tiny_model(name, task=task, num_labels=3)
        heads = initial_params(model)
        assert heads.keys() - {head} == params.keys()
        task_params = {**params, head: heads[head]}
        pooled = hidden
        if task == "classification":
            pooled = model.pool(task_params, hidden, segment_ids=segments)
            alone = jnp.concatenate([model.pool(task_params, hidden[:1, 3:]), model.pool(task_params, hidden[1:, :6])])
            np.testing.assert_array_equal(pooled, alone)
        logits = model.logits(task_params, pooled)
        assert logits.shape == (*pooled.shape[:2], 2 if task == "span_qa" else 3)
        assert logits.dtype == jnp.float32


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("task", LABEL_HEADS)
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_of_labels_trains_all_parameters(name, task):
    model = tiny_model(name, task=task, num_labels=3)
    params = add_noise(initial_params(model))
    batch = batch_of(model, random_tokens(model, 3, 9))

    value, gradients = jax.jit(jax.value_and_grad(lambda params: loss_of(model, params, batch)))(params)
    assert np.isfinite(value)
    for path, gradient in spec.flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


@pytest.mark.plain_cases(4)
@pytest.mark.parametrize("task", LABEL_HEADS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_language_model_is_loaded_with_a_new_head(name, task, tmp_path):
    language_model = tiny_model(name)
    language_params = add_noise(initial_params(language_model))
    save_pretrained(tmp_path / "causal", language_model, language_params)
    fields = {} if task == "span_qa" else {"num_labels": 3}
    model, params = load_pretrained(tmp_path / "causal", task=task, **fields)
    head = LABEL_HEADS[task]
    assert {path.partition("/")[0] for path in model.metadata.initialized} == {head}
    assert_trees_equal(
        {name: params[name] for name in params if name != head},
        {name: language_params[name] for name in language_params if name != "head"},
    )
    save_pretrained(tmp_path / "labels", model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path / "labels")
    assert loaded_model.config == model.config
    assert_trees_equal(loaded_params, params)

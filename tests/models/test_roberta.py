"""Tests of RoBERTa in addition to the contract and oracle tests: the first position, the classifier, files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import get_model, roberta
from jaxlm.testing.helpers import assert_trees_equal, relative_error
from tests.models import test_bert
from tests.models.test_bert import hidden_of

setup = functools.partial(test_bert.setup, "roberta")


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [  # none: encoder and pooler; masked: encoder and head
        ("roberta-base", "none", 124_645_632),
        ("roberta-base", "masked", 124_697_433),
        ("roberta-large", "none", 355_359_744),
        ("roberta-large", "masked", 355_412_057),
    ],
)
def test_published_sizes(name, task, count):
    assert get_model(name, task=task).num_parameters == count


def test_the_first_token_of_a_document_reads_row_2_of_the_table():
    model, params, _ = setup()
    assert params["position_embedding"].shape == (66, 32)
    tokens = np.arange(64, dtype=np.int32)[None]

    @jax.jit
    def gradient(segments):
        def loss(table):
            hidden, _ = model.apply({**params, "position_embedding": table}, tokens, segment_ids=segments)
            return jnp.sum(jnp.where(segments[:, :, None] > 0, jnp.sin(hidden), 0.0))

        return jax.grad(loss)(params["position_embedding"])

    def rows_read(*runs):
        segments = np.repeat(*zip(*runs))[None].astype(np.int32)
        return set(np.flatnonzero(np.abs(gradient(segments)).max(axis=1)))

    assert rows_read((1, 64)) == set(range(2, 66))  # the longest sequence reads the last row
    assert rows_read((0, 10), (1, 5), (2, 3), (0, 46)) == {2, 3, 4, 5, 6}
    positions = np.arange(64, dtype=np.int32)[None]
    assert_trees_equal(hidden_of(model, params, tokens, positions=positions), hidden_of(model, params, tokens))
    for outside in (-1, -2, 64):  # rows 0 and 1 are not read either
        assert np.isnan(hidden_of(model, params, tokens, positions=np.where(positions == 3, outside, positions))).all()
    with pytest.raises(ValueError, match="65 tokens exceed max_positions=64"):
        model.apply(params, np.zeros((1, 65), np.int32))


def test_the_classifier_has_a_dense_layer_between_two_dropouts():
    model, params, _ = setup(task="classification", num_labels=3)
    assert {"classifier_dense", "classifier"} <= set(params)
    assert "pooler" not in params
    hidden = jax.random.normal(jax.random.key(1), (2, 10, 32))
    pooled = model.pool(params, hidden)
    assert model.logits(params, pooled).shape == (2, 1, 3)
    want = np.tanh(hidden[:, 0] @ params["classifier_dense"]["weight"] + params["classifier_dense"]["bias"][None])
    assert relative_error(pooled[:, 0], want) < 1e-5
    cfg = roberta.Config(**{**vars(model.config), "classifier_dropout": 0.5})
    dropped = np.asarray(roberta.pool(cfg, params, hidden, key=jax.random.key(0)))
    assert 0.2 < (dropped == 0).mean() < 0.8  # dropout after the dense layer
    remaining = dropped[dropped != 0] / 2
    assert (
        np.isclose(remaining, np.asarray(pooled)[dropped != 0], rtol=1e-3).mean() < 0.1
    )  # dropout before the dense layer


def test_roberta_has_no_next_sentence_head_and_no_state():
    with pytest.raises(ValueError, match="RoBERTa has no next-sentence head"):
        roberta.Config(next_sentence=True)
    model, params, tokens = setup()
    with pytest.raises(ValueError, match="carries no state"):
        model.apply(params, tokens, state={})


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("task", ["masked", "none", "classification", "token_classification", "span_qa"])
def test_max_positions_in_files_is_the_number_of_table_rows(tmp_path, task):
    model, params, _ = setup(task=task)
    save_pretrained(tmp_path, model, params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["max_position_embeddings"], config["pad_token_id"], config["type_vocab_size"]) == (66, 1, 1)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert (loaded_model.config.max_positions, loaded_model.config.task) == (64, task)
    assert_trees_equal(loaded_params, params)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pad_token_id", 0, "pad_token_id=0 is not supported"),
        ("hidden_act", "relu", "hidden_act='relu' is not supported"),  # the head of transformers would still have GELU
        ("max_position_embeddings", 2, "max_position_embeddings=2 must be an integer above 2"),
        # Without this field, the default of transformers applies: 2 token types. The default of jaxlm is 1.
        ("type_vocab_size", None, r"token_type_embeddings.weight expected F32\[2, 32\]"),
    ],
)
def test_an_unsupported_config_raises(tmp_path, field, value, message):
    model, params, _ = setup()
    save_pretrained(tmp_path, model, params)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), field: value}
    path.write_text(json.dumps({name: setting for name, setting in config.items() if setting is not None}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_missing_config_fields_have_the_defaults_of_transformers(tmp_path):
    model, params, _ = setup(norm_epsilon=1e-12)
    save_pretrained(tmp_path, model, params)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "layer_norm_eps"}))
    assert load_pretrained(tmp_path)[0].config.norm_epsilon == 1e-12

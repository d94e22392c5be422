"""Griffin: published sizes, the window, documents of any ids, Hawk, initial values, and supported fields of files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import get_model
from jaxlm.models.common import layer_kinds
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)
from tests.models.helpers import save_with_fields, setup


@pytest.mark.parametrize(("name", "count"), [("recurrentgemma-2b", 2682862080), ("recurrentgemma-9b", 8579977216)])
def test_parameter_counts(name, count):
    assert spec.count(get_model(name).specs) == count


def test_the_pattern_repeats_and_may_end_early():
    config = get_model("recurrentgemma-2b").config
    assert layer_kinds(config) == ("recurrent", "recurrent", "attention") * 8 + ("recurrent", "recurrent")
    kinds = [
        next(key for key in ("recurrent", "attention") if key in layer)
        for layer in tiny_model("griffin").specs["layers"]
    ]
    assert kinds == ["recurrent", "recurrent", "attention", "recurrent"]


def test_the_state_has_the_same_size_for_any_length():
    model = get_model("recurrentgemma-2b")
    assert model.state_specs(1, 10) == model.state_specs(1, 100_000)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.state_specs(1, 1)))
    assert size == 8 * 2 * 2048 * 256 * 4 + 18 * (3 + 1) * 2560 * 4 + (3 + 2) * 4


def test_tokens_attend_only_to_the_window():
    model, params, tokens = setup("griffin-tiny", num_layers=1, pattern=("attention",), window=4)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 128
    apply = jax.jit(lambda t: model.apply(params, t)[0])
    difference_T = np.abs(np.asarray(apply(tokens) - apply(changed))).max(axis=(0, 2))
    assert (difference_T[3:7] > 0).all()
    assert (difference_T[7:] == 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize("pattern", [("recurrent",), ("recurrent", "attention")])
def test_padding_anywhere_and_documents_over_several_calls(pattern):
    """Calls of several sizes with padding between tokens; the second row uses segment id 1 for two long documents."""
    model, params, _ = setup("griffin-tiny", num_layers=2, pattern=pattern)
    segments = np.array(
        [
            [0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 2, 2, 2],
            [1, 1, 1, 1, 0, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        ],
        np.int32,
    )
    tokens = random_tokens(model, 2, 20)
    documents = [[np.flatnonzero(segments[0] == n) for n in (1, 2)], [np.arange(4), np.arange(5, 9), np.arange(9, 18)]]
    whole = jax.jit(lambda t, i: model.apply(params, t, segment_ids=i)[0])(tokens, segments)
    step = jax.jit(lambda t, s, i: model.apply(params, t, state=s, segment_ids=i))
    state, outputs = model.init_state(2, 1), []
    for start, stop in ((0, 2), (2, 3), (3, 14), (14, 15), (15, 16), (16, 20)):
        hidden, state = step(tokens[:, start:stop], state, segments[:, start:stop])
        outputs.append(hidden)
    whole, pieces = np.asarray(whole), np.concatenate(outputs, axis=1)
    apply = jax.jit(lambda t: model.apply(params, t)[0])
    for row in range(2):
        for index in documents[row]:
            # Later tokens do not change earlier hidden states, so all documents are padded to one shape.
            padded = np.pad(tokens[row, index], (0, 12 - len(index)))
            want = np.asarray(apply(padded[None]))[0, : len(index)]
            assert relative_error(whole[row, index], want) < 2e-5
            assert relative_error(pieces[row, index], want) < 2e-5


def test_logits_are_bounded_and_padded_rows_have_no_probability():
    model, params, tokens = setup("griffin-tiny", logits_soft_cap=0.5, vocab_multiple=48)
    logits = np.asarray(jax.jit(lambda: model.logits(params, 100.0 * model.apply(params, tokens)[0]))())
    assert logits.shape[-1] == 144
    assert 0.499 < np.abs(logits[..., :128]).max() <= 0.5
    assert (logits[..., 128:] == np.finfo(np.float32).min).all()


def test_an_untied_head_is_a_parameter():
    assert "head" in tiny_model("griffin", tie_embeddings=False).specs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"lru_width": 30}, "num_heads=4 does not divide lru_width=30"),
        ({"num_heads": 16, "lru_width": 64}, "a head width of 2 .* is not a multiple of 4"),
        ({"pattern": ()}, r"pattern=\(\) must not be empty"),
        ({"pattern": ("mamba",)}, r"pattern=\('mamba',\) .* each entry is 'recurrent' or 'attention'"),
        ({"conv_width": 1}, "conv_width=1 must be at least 2"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal'"),
        ({"remat": "all"}, "remat='all' is unknown"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("griffin-tiny", **fields)


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "fields", [{}, {"pattern": ("recurrent",)}, {"tie_embeddings": False, "num_kv_heads": 2}, {"task": "none"}]
)
def test_files_round_trip(fields, tmp_path):
    model = tiny_model("griffin-tiny", **fields)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("recurrent_gemma", 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation='relu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported"),
        (
            {"block_types": ["mamba"]},
            r"block_types=\['mamba'\] must be a list in which each entry is 'recurrent' or 'attention'",
        ),
        ({"num_key_value_heads": "1"}, "num_key_value_heads='1' must be a whole number or None"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 2"),
        ({"head_dim": 16}, "head_dim=16 must be hidden_size / num_attention_heads = 32 / 4"),
        ({"logits_soft_cap": None}, "logits_soft_cap=None must be a finite number"),
    ],
)
def test_unsupported_settings_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "griffin-tiny", **fields))


def test_a_changed_width_changes_the_head_width_in_files(tmp_path):
    model, _ = load_pretrained(save_with_fields(tmp_path, "griffin-tiny", head_dim=8))
    changed = model.with_fields(embed_dim=64)
    save_pretrained(tmp_path, changed, initial_params(changed))
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 16
    assert load_pretrained(tmp_path)[0].config == changed.config


def test_an_odd_width_of_the_mlp_is_rounded_down_as_in_transformers(tmp_path):
    model, _ = load_pretrained(save_with_fields(tmp_path, "griffin-tiny", intermediate_size=97))
    assert model.config.mlp_dim == 48


@pytest.mark.thorough
def test_a_dropped_id_outside_the_vocabulary_has_no_effect():
    model = tiny_model("griffin")
    params, before = initial_params(model), model.init_state(1, 8)
    tokens = jnp.array([[3, model.config.vocab_size, model.config.vocab_size]])
    _, after = model.apply(params, tokens, state=before)
    kept = model.rollback(params, before, tokens, after, jnp.array([1]))
    got, _ = model.apply(params, jnp.array([[5]]), state=kept)
    want, _ = model.apply(params, jnp.array([[3, 5]]), state=before)
    assert_trees_close(got, want[:, 1:], 1e-5)

"""xLSTM: published size, initial values, gates, sLSTM layers in documents and streams, errors, and files."""

import json

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.adapt import LoRA
from jaxlm.interop import formats
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.interop.peft import save_adapter
from jaxlm.models import get_model
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    assert_trees_equal,
    initial_params,
    relative_error,
    tiny_model,
)
from tests.models.helpers import save_with_fields, setup

SLSTM = "xlstm-slstm-tiny"


def test_published_parameter_count():
    assert spec.count(get_model("xlstm-7b").specs) == 6_865_424_896


def test_a_long_text_has_a_small_state():
    model = get_model("xlstm-7b")
    assert spec.count(model.state_specs(1, 10**9)) == 32 * 8 * (256 * 512 + 256 + 1) + 1
    assert model.carried_state_length == 1


def test_initial_values_of_gates_and_weights():
    model = get_model(SLSTM, embed_dim=64, num_layers=4, mlp_dim=256)
    slstm, mlstm, *_ = initial_params(model)["layers"]
    gates = [mlstm["mlstm"][f"{name}_gate"] for name in ("input", "forget")]
    assert all((gate["weight"] == 0.0).all() for gate in gates)
    assert gates[0]["bias"].tolist() == [-10.0] * 4
    assert gates[1]["bias"].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert np.std(mlstm["mlstm"]["query"]["weight"]) == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)
    assert np.std(mlstm["mlp"]["down"]["weight"]) == pytest.approx(2 / 4 / 256**0.5, rel=0.05)
    cell = slstm["slstm"]["cell"]
    assert (cell["weight_hidden"] == 0.0).all()
    assert (cell["bias"][:, [0, 2, 3]] == 0.0).all()
    np.testing.assert_allclose(cell["bias"][:, 1], np.broadcast_to(np.linspace(3.0, 6.0, 16), (4, 16)), rtol=1e-6)


def test_only_matrices_and_taps_decay():
    model = get_model(SLSTM)
    decayed = {spec.split_layer(name)[0] for name, leaf in spec.flatten(model.specs).items() if leaf.decay}
    names = ("query", "key", "value", "output_gate", "input_gate", "forget_gate", "output")
    assert decayed == {
        "token_embedding",
        "head",
        *(f"layers/mlstm/{name}/weight" for name in names),
        *(f"layers/slstm/{name}/weight" for name in ("convolution", "input_forget", "cell_output")),
        "layers/slstm/cell/weight_hidden",
        *(f"layers/mlp/{name}/weight" for name in ("gate", "up", "down")),
    }


@pytest.mark.thorough
def test_packed_documents_with_an_slstm_equal_separate_documents_and_a_stream():
    """The contract tests this variant only in thorough runs. Its convolution must not read the previous document."""
    model, params, tokens = setup(SLSTM, batch=1, length=11)
    segments = np.array([[0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 2]], np.int32)
    forward = jax.jit(lambda tokens, segments, state: model.apply(params, tokens, segment_ids=segments, state=state))
    packed, _ = forward(tokens, segments, None)
    state, pieces = model.init_state(1, 11), []
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        piece, state = forward(tokens[:, start:stop], segments[:, start:stop], state)
        pieces.append(piece)
    packed, streamed = np.asarray(packed), np.concatenate(pieces, axis=1)
    for number in (1, 2):
        index = np.flatnonzero(segments[0] == number)
        alone, _ = jax.jit(model.apply)(params, tokens[:, index])
        assert relative_error(packed[:, index], alone) < 2e-6
        assert relative_error(streamed[:, index], alone) < 2e-6


def test_soft_caps_limit_gates_and_logits():
    model, params, tokens = setup("xlstm-tiny", logits_soft_cap=0.5, num_layers=1)
    large = jax.tree.map(lambda x: x, params)
    gate = large["layers"][0]["mlstm"]["input_gate"]
    gate["bias"] = gate["bias"] + 1e4
    hidden = 100.0 * np.asarray(apply(model, large, tokens)[0])
    assert np.isfinite(hidden).all()
    assert np.abs(jax.jit(model.logits)(large, hidden)).max() <= 0.5
    uncapped = model.with_fields(logits_soft_cap=None)
    assert np.abs(jax.jit(uncapped.logits)(large, hidden)).max() > 5.0
    # Without a cap, the largest input gate is not limited, and the output changes.
    gate["bias"] = params["layers"][0]["mlstm"]["input_gate"]["bias"] + 14.0
    capped, _ = apply(model, large, tokens)
    free, _ = apply(model.with_fields(gate_soft_cap=None), large, tokens)
    assert relative_error(capped, free) > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide key_dim=64"),
        ({"value_dim": 30}, "num_heads=4 does not divide value_dim=30"),
        ({"embed_dim": 30, "pattern": ("slstm",)}, "num_heads=4 does not divide embed_dim=30"),
        ({"embed_dim": 2}, "embed_dim=2 must be at least num_heads=4"),
        ({"pattern": ()}, r"pattern=\(\) must not be empty"),
        ({"pattern": ("lstm",)}, "each entry is 'mlstm' or 'slstm'"),
        ({"conv_width": 1}, "conv_width=1 must be at least 2"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap=0.0 must be positive, or None for no cap"),
        ({"mlp_dim": 0}, "mlp_dim=0 must be at least 1"),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal', 'classification'"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("xlstm-tiny", **fields)


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "fields", "model_type"),
    [
        ("xlstm-tiny", {"tie_embeddings": True, "logits_soft_cap": None}, "xlstm"),
        ("xlstm-tiny", {"embed_dim": 49, "key_dim": 4, "value_dim": 12, "mlp_dim": 7, "task": "none"}, "xlstm"),
        (SLSTM, {}, "jaxlm-xlstm"),
    ],
)
def test_files_round_trip(name, fields, model_type, tmp_path):
    model = tiny_model(name, **fields)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params, max_shard_bytes=20_000)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model.config == model.config
    assert_trees_equal(loaded_params, params)


def test_a_saved_slstm_model_loads_without_its_head(tmp_path):
    model = tiny_model(SLSTM)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    headless, loaded = load_pretrained(tmp_path, task="none")
    assert "head" not in loaded
    assert headless.metadata.unused_tensors == ("head",)


def test_names_and_layouts_of_tensors():
    model, params, _ = setup("xlstm-tiny")
    tensors, layer = dict(named_tensors(model, params)), params["layers"][1]
    name = "backbone.blocks.1.mlstm_layer."
    assert np.array_equal(tensors[name + "q.weight"], layer["mlstm"]["query"]["weight"].reshape(32, 64).T)
    assert np.array_equal(tensors[name + "out_proj.weight"], layer["mlstm"]["output"]["weight"].reshape(64, 32).T)
    assert np.array_equal(tensors[name + "igate_preact.bias"], layer["mlstm"]["input_gate"]["bias"])
    assert tensors[name + "multihead_norm.weight"].shape == (64,)
    assert tensors["backbone.blocks.1.ffn.proj_up_gate.weight"].shape == (48, 32)
    slstm = tiny_model(SLSTM)
    names = {name for name, _ in named_tensors(slstm, initial_params(slstm))}
    assert {"layers.0.slstm.cell.weight_hidden", "layers.1.mlstm.query.weight", "token_embedding", "head"} <= names


def test_an_slstm_model_has_no_adapters_of_peft(tmp_path):
    model, lora = tiny_model(SLSTM), LoRA(2, targets=("mlp/",))
    with pytest.raises(ValueError, match="family 'xlstm' with this config has no class in transformers"):
        save_adapter(tmp_path, model, lora, lora.specs(model.specs))


def read_fields(**fields):
    return formats.of("xlstm")[-1].read_fields(fields)


def test_sizes_of_the_published_config():
    assert read_fields() == {"key_dim": 2048, "value_dim": 4096, "mlp_dim": 10944}
    assert read_fields(hidden_size=100, ffn_proj_factor=1.5, ffn_round_up_to_multiple_of=32)["mlp_dim"] == 160


def test_a_changed_mlp_width_replaces_the_loaded_fields(tmp_path):
    model = tiny_model("xlstm-tiny", mlp_dim=48)
    save_with_fields(tmp_path / "a", "xlstm-tiny", ffn_proj_factor=1.2, ffn_round_up_to_multiple_of=16)  # also 48
    loaded, params = load_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    save_pretrained(tmp_path / "b", loaded, params)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["ffn_proj_factor"], written["ffn_round_up_to_multiple_of"]) == (1.2, 16)
    wider = loaded.with_fields(mlp_dim=50)
    save_pretrained(tmp_path / "c", wider, initial_params(wider))
    assert load_pretrained(tmp_path / "c")[0].config.mlp_dim == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"add_out_norm": False}, "add_out_norm=False is not supported"),
        ({"weight_mode": "fused"}, "weight_mode='fused' is not supported"),
        ({"embedding_dim": 64}, "embedding_dim=64 must be null or equal to hidden_size=32"),
        ({"num_blocks": 3}, "num_blocks=3 must be null or equal to num_hidden_layers=2"),
        ({"qk_dim_factor": None}, "qk_dim_factor=None must be a positive number"),
        ({"ffn_round_up_to_multiple_of": 0}, "ffn_round_up_to_multiple_of=0 must be a positive integer"),
    ],
)
def test_unsupported_settings_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "xlstm-tiny", **fields))

"""Llama and related models: published sizes, the window, task heads, and supported fields of files."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.config import from_json, to_json
from jaxlm.interop import config_json, formats
from jaxlm.interop.huggingface import load_pretrained, named_tensors, params_from_tensors, save_pretrained
from jaxlm.models import get_model
from jaxlm.models.llama import Config
from jaxlm.nn.attention.rotary import RotaryScaling
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
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


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6738415616),
        ("llama-3-8b", 8030261248),
        ("llama-3.2-1b", 1235814400),
        ("mistral-7b", 7241732096),
        ("mixtral-8x7b", 46702792704),
        ("qwen2-0.5b", 494032768),
        ("qwen3-0.6b", 596049920),
        ("qwen3-30b-a3b", 30532122624),
        ("gemma-3-1b", 999885952),
        ("smollm2-135m", 134515008),
        ("smollm2-360m", 361821120),
        ("smollm3-3b", 3075098624),
    ],
)
def test_published_parameter_counts(name, count):
    assert spec.count(get_model(name).specs) == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ("window",)}, r"window=None and pattern=\('window',\) contradict each other: set window if and"),
        ({"window": 4, "pattern": ("full",)}, r"window=4 and pattern=\('full',\) contradict each other"),
        (
            {"window": 8, "pattern": ("full", "full", "window"), "num_layers": 2},
            "set window if and only if at least one of the num_layers=2 layers has the kind 'window'",
        ),
        ({"pattern": ("local",)}, "each entry is 'full' or 'window' or 'no_positions'"),
        ({"window_rotary_base": 100.0}, "window_rotary_base=100.0 needs layers with a window"),
        ({"pattern": ("full", "no_positions"), "scan_layers": True}, "scan_layers=True needs layers of one kind"),
        ({"block": "gemma", "num_experts": 4}, "block='gemma' needs num_experts=None, got 4"),
        ({"block": "phi"}, "block='phi' is unknown"),
    ],
)
def test_bad_kinds_of_layers_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("llama-tiny", **fields)


@pytest.mark.thorough
def test_layers_without_positions_do_not_depend_on_the_order_of_earlier_tokens():
    model, params, tokens = setup("llama-tiny", num_layers=1, pattern=("no_positions",))
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    apply = jax.jit(lambda t: model.apply(params, t)[0][:, 2:])
    assert relative_error(apply(swapped), apply(tokens)) < 1e-6
    rotary = tiny_model("llama-tiny", num_layers=1)
    apply = jax.jit(lambda t: rotary.apply(params, t)[0][:, 2:])
    assert relative_error(apply(swapped), apply(tokens)) > 1e-3


def test_the_cache_has_only_key_value_heads():
    specs = get_model("llama-3-8b").state_specs(1, 4)
    assert [layer["key"].shape for layer in specs["layers"]] == [(1, 4, 8 * 128)] * 32


@pytest.mark.thorough
def test_grouped_heads_equal_repeated_heads():
    model, params, tokens = setup("llama-tiny")
    full_model = tiny_model("llama-tiny", num_kv_heads=4)

    def repeat_kv_heads(layer):
        attention = layer["attention"]
        repeated_weights = {
            name: {"weight": np.repeat(attention[name]["weight"], 2, axis=1)} for name in ("key", "value")
        }
        return {**layer, "attention": {**attention, **repeated_weights}}

    repeated_params = {**params, "layers": tuple(map(repeat_kv_heads, params["layers"]))}
    assert (
        relative_error(jax.jit(full_model.apply)(repeated_params, tokens)[0], jax.jit(model.apply)(params, tokens)[0])
        < 1e-6
    )


def test_tokens_attend_only_to_the_window():
    model, params, tokens = setup("llama-tiny", num_layers=1, window=4)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 128
    apply = jax.jit(lambda t: model.apply(params, t)[0])
    difference_T = np.abs(np.asarray(apply(tokens) - apply(changed))).max(axis=(0, 2))
    assert (difference_T[3:7] > 0).all()
    assert (difference_T[7:] == 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_does_not_count_padding_in_the_cache(side):
    model, params, tokens = setup("llama-tiny", batch=2, length=12, window=3)
    prompt, segments = np.full((2, 7), 5, np.int32), np.zeros((2, 7), np.int32)
    for row, n in enumerate((7, 2)):
        positions = slice(7 - n, 7) if side == "left" else slice(0, n)
        prompt[row, positions], segments[row, positions] = tokens[row, :n], 1
    step = jax.jit(lambda t, s, i: model.apply(params, t, state=s, segment_ids=i))
    _, state = step(prompt, model.init_state(2, 16), segments)
    outputs = []
    for step_index in range(5):
        next_tokens = np.stack([tokens[row, n + step_index] for row, n in enumerate((7, 2))])[:, None]
        hidden, state = step(next_tokens, state, np.ones((2, 1), np.int32))
        outputs.append(np.asarray(hidden)[:, 0])
    for row, n in enumerate((7, 2)):
        want = np.asarray(jax.jit(model.apply)(params, tokens[row : row + 1, : n + 5])[0])[0, n:]
        assert relative_error(np.stack(outputs, axis=1)[row], want) < 2e-5


@pytest.mark.thorough
def test_the_norm_makes_attention_independent_of_the_size_of_queries_and_keys():
    model, params, tokens = setup("llama-tiny", qk_norm=True, norm_epsilon=1e-12)
    for name in ("query", "key"):
        for layer in params["layers"]:
            layer["attention"][name]["weight"] *= 3.0
    want = jax.jit(model.apply)(setup("llama-tiny", qk_norm=True)[1], tokens)[0]
    assert relative_error(jax.jit(model.apply)(params, tokens)[0], want) < 1e-4
    assert [params["layers"][0]["attention"][f"{name}_norm"]["scale"].shape for name in ("query", "key")] == [(8,)] * 2


@pytest.mark.thorough
@pytest.mark.parametrize("fields", [{"experts_implementation": "blocks"}, {"capacity_factor": 4.0}])
def test_padding_and_packing_do_not_change_the_output_of_experts(fields):
    """Test the two implementations that the contract test does not choose for its small model."""
    model = tiny_model("mixtral-tiny", **fields)
    params, tokens = add_noise(initial_params(model)), random_tokens(model, 1, 14)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]], np.int32)
    apply = jax.jit(lambda t, s: model.apply(params, t, segment_ids=s)[0])
    packed = np.asarray(apply(tokens, segments))
    for document in (1, 2):
        (positions,) = np.nonzero(segments[0] == document)
        alone = apply(tokens[:, positions], np.ones((1, positions.size), np.int32))
        assert relative_error(packed[:, positions], alone) < 2e-5


@pytest.mark.thorough
@pytest.mark.parametrize("fields", [{}, {"experts_implementation": "blocks"}, {"capacity_factor": 0.75}])
def test_loss_and_gradients_on_an_expert_mesh_equal_those_on_one_device(fields):
    model = tiny_model("mixtral-tiny", **fields)
    params = add_noise(initial_params(model))
    segments = np.ones((8, 10), np.int32)
    segments[1, 7:] = segments[4, :2] = 0
    batch = causal.batch(random_tokens(model, 8, 10), segments)
    sharding = Sharding(make_mesh("data=2,tensor=2,expert=2"))

    def mean_loss(params):
        total, weight, _ = causal.loss_with_load_balance(0.5)(model, params, batch)
        return total / weight

    def sharded_mean_loss(params):
        with sharding.scope():
            return mean_loss(params)

    split_params = jax.device_put(params, sharding.tree(model.specs))
    gate = split_params["layers"][0]["experts"]["gate"]["weight"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 32, 24)
    got = jax.jit(jax.value_and_grad(sharded_mean_loss))(split_params)
    assert_trees_close(jax.device_get(got), jax.jit(jax.value_and_grad(mean_loss))(params), 2e-5)


def test_only_differences_of_positions_matter():
    model, params, tokens = setup("llama-tiny")
    base_positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    apply = jax.jit(lambda p: model.apply(params, tokens, positions=p)[0])
    assert relative_error(apply(base_positions + 1000), apply(base_positions)) < 1e-4
    assert relative_error(apply(base_positions * 3), apply(base_positions)) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "the head width 5 is odd"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 must be at most num_experts=4"),
        ({"num_experts": 4, "dense_layers": (2,)}, r"dense_layers=\(2,\) must be in \[0, num_layers=2\)"),
        ({"num_experts": 4, "dense_layers": (0, 1)}, "no layer has experts with expert_interval=1"),
        ({"num_experts": 4, "expert_interval": 3}, "no layer has experts with expert_interval=3"),
        ({"num_experts": 4, "expert_interval": 0}, "expert_interval=0 must be at least 1"),
        (
            {"num_experts": 4, "dense_layers": (1,), "scan_layers": True},
            "scan_layers=True needs layers of one kind, but only 1 of 2 layers have experts",
        ),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        (
            {"capacity_factor": 1.0, "experts_implementation": "blocks"},
            "experts_implementation='blocks' does not support capacity_factor",
        ),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal'"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("llama-tiny", **fields)


def test_a_too_long_state_raises():
    model, params, _ = setup("llama-tiny", max_positions=8)
    with pytest.raises(ValueError, match="9 tokens exceed max_positions=8"):
        model.apply(params, np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match="a state of 9 tokens exceeds max_positions=8"):
        model.state_specs(1, 9)


def test_a_config_with_rope_scaling_round_trips_through_json():
    config = get_model("llama-3.2-1b").config
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


# ---------------------------------------------------------------------------------------------------------- files

YARN = RotaryScaling("yarn", 4.0, 16, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=0.8)
MIXTRAL = {"num_experts": 4}
QWEN3_MOE = {"num_experts": 4, "qk_norm": True, "head_dim": 6, "expert_dim": 10}
GEMMA3 = {
    "block": "gemma", "num_layers": 3, "qk_norm": True, "window": 5, "pattern": ("window", "window", "full"),
    "window_rotary_base": 100.0, "attention_scale": 0.25, "head_dim": 6, "tie_embeddings": True,
}  # fmt: skip
SHAPES = {
    "llama": {"tie_embeddings": True},
    "llama3": {"rotary_scaling": RotaryScaling("llama3", 8.0, 16, 1.0, 2.0)},
    "linear": {"rotary_scaling": RotaryScaling("linear", 2.0), "head_dim": 6, "num_kv_heads": 1},
    "dynamic": {"rotary_scaling": RotaryScaling("dynamic", 2.0, 64)},
    "mistral": {"window": 5, "head_dim": 6, "rotary_scaling": YARN, "task": "token_classification", "num_labels": 4},
    "qwen2": {"qkv_bias": True, "task": "classification", "num_labels": 3},
    "qwen2 with a window": {"qkv_bias": True, "window": 7, "task": "none"},
    "mixtral": {**MIXTRAL, "window": 5, "num_experts": 3},
    "qwen3": {"qk_norm": True, "head_dim": 6, "task": "classification", "num_labels": 3},
    "qwen3_moe": {**QWEN3_MOE, "dense_layers": (0,), "window": 3},
    "smollm3": {"num_layers": 3, "pattern": ("full", "no_positions")},
    "gemma3_text": GEMMA3,
    "gemma3_text with equal layers": {**GEMMA3, "pattern": None, "tie_embeddings": False},
    "qwen3_moe with an interval": {**QWEN3_MOE, "expert_interval": 2, "renormalize_experts": False, "task": "span_qa"},
}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", SHAPES)
def test_files_round_trip(name, tmp_path):
    model = tiny_model("llama-tiny", **SHAPES[name])
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)
    expected = name.split()[0] if name.startswith(("mi", "qwen", "smol", "gemma")) else "llama"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == expected


@pytest.mark.thorough
def test_files_have_one_tensor_for_each_expert(tmp_path):
    """The tensors of a layer and an expert are the transposed matrices, in both layer layouts."""
    model = tiny_model("mixtral-tiny")
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    stacked_model, stacked_params = load_pretrained(tmp_path, scan_layers=True)
    assert_trees_equal(stacked_params, spec.restack(params))
    tensors = dict(named_tensors(stacked_model, stacked_params))
    assert len([name for name in tensors if ".experts." in name]) == 2 * 4 * 3
    down = params["layers"][1]["experts"]["down"]["weight"][2]
    assert np.array_equal(tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"], down.T)
    assert_trees_equal(params_from_tensors(stacked_model, tensors), stacked_params)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 10**9}))
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(ValueError, match="1000000000 experts in config.json, but only 41 tensors"):
        load_pretrained(tmp_path)


def read_experts(**fields):
    table = next(table for table in formats.of("llama") if table.model_type == "qwen3_moe")
    read = table.read_fields({"num_hidden_layers": 4, **fields})
    return read["num_experts"], read.get("expert_interval"), read.get("dense_layers")


def test_experts_in_files():
    """The fields of Qwen3-MoE say which layers have experts, and how many. Wrong fields are errors."""
    assert read_experts() == (128, 1, ())
    assert read_experts(num_experts=8, decoder_sparse_step=2, mlp_only_layers=[1]) == (8, 2, (1,))
    for dense in ({"num_experts": 0}, {"mlp_only_layers": [3, 2, 1, 0]}, {"decoder_sparse_step": 5}):
        assert read_experts(**dense)[0] is None
    assert read_experts(decoder_sparse_step=2, mlp_only_layers=[1, 3])[0] is None
    for wrong, message in (
        ({"num_experts": -1}, "num_experts=-1 must be at least 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 at least 1"),
        ({"mlp_only_layers": [4]}, r"mlp_only_layers=\[4\] must be a list of layer numbers below 4"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers='all' must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            read_experts(**wrong)


@pytest.mark.thorough
def test_a_loaded_model_that_changes_its_layers_writes_them(tmp_path):
    """A loaded config keeps fields that did not change, and they must still describe the model."""
    model = tiny_model("llama-tiny", **QWEN3_MOE, num_layers=4, expert_interval=2)
    save_pretrained(tmp_path, model, initial_params(model))
    loaded, _ = load_pretrained(tmp_path)
    for change in ({"expert_interval": 1, "dense_layers": (2,)}, {"num_layers": 6}, {"num_experts": None}):
        changed = loaded.with_fields(**change)
        save_pretrained(tmp_path, changed, initial_params(changed))
        reloaded, _ = load_pretrained(tmp_path)
        assert reloaded.specs == changed.specs
    dense = reloaded.with_fields(num_layers=5)
    save_pretrained(tmp_path, dense, initial_params(dense))
    assert load_pretrained(tmp_path)[0].specs == dense.specs


@pytest.mark.thorough
def test_tensor_prefix_of_question_answering_classes():
    for fields, prefix in (({}, "transformer."), ({"window": 5}, "model."), ({"qkv_bias": True}, "transformer.")):
        model = tiny_model("llama-tiny", task="span_qa", **fields)
        names = dict(named_tensors(model, initial_params(model)))
        assert {name for name in names if not name.startswith(prefix)} == {"qa_outputs.weight", "qa_outputs.bias"}


MIXTRAL_FILE = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"head_dim": "8"}, "head_dim='8' must be a whole number or None"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported in rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of type linear has no field factor"),
        ({"rope_theta": 0.0}, "rotary_base=0.0 must exceed 1"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear has no field factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2' of linear rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale=1.0 of yarn rope_scaling"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling has rope_type='dynamic' and type='linear', two names of the same field",
        ),
        (
            {"max_position_embeddings": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling of type dynamic needs .*: add max_position_embeddings",
        ),
        ({**MIXTRAL_FILE, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ({**MIXTRAL_FILE, "num_local_experts": 0}, "num_experts=0 must be at least 1"),
        ({**MIXTRAL_FILE, "num_experts_per_tok": 9}, "experts_per_token=9 must be at most num_experts=8"),
    ],
)
def test_unsupported_settings_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "llama-tiny", **fields))


def test_null_fields_of_rope_scaling_are_ignored(tmp_path):
    fields = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    models = [
        load_pretrained(save_with_fields(tmp_path, "llama-tiny", rope_scaling=scaling))[0]
        for scaling in (fields, {**fields, "mscale": None, "beta_fast": None})
    ]
    assert models[0] == models[1]


QWEN2 = {"architectures": ["Qwen2Model"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3}


def read_field(name, **fields):
    table = next(table for table in formats.of("llama") if fields["architectures"][0] in table.architectures)
    return table.read_fields({"num_hidden_layers": 2, **fields})[name]


read_window = functools.partial(read_field, "window")
read_pattern = functools.partial(read_field, "pattern")


def test_windows_in_files():
    """Qwen2 and Mistral have different fields and defaults for the window."""
    assert read_window(**QWEN2, max_window_layers=0) == 3
    assert read_window(**QWEN2) is None  # by default, only layers from 28 on have a window
    assert read_window(**{**QWEN2, "use_sliding_window": False}, max_window_layers=0) is None
    assert read_window(**QWEN2, layer_types=["sliding_attention"] * 2) == 3
    assert read_window(**QWEN2, max_window_layers=1) == 3
    assert read_pattern(**QWEN2, max_window_layers=1) == ("full", "window")
    assert read_pattern(**QWEN2, layer_types=["sliding_attention", "full_attention"]) == ("window", "full")
    assert read_pattern(**{**QWEN2, "sliding_window": None}, max_window_layers=1) is None
    with pytest.raises(ValueError, match="layer_types has {'chunked_attention'}: choose from full_attention, sliding"):
        read_window(**QWEN2, layer_types=["chunked_attention", "full_attention"])
    assert read_window(architectures=["MistralModel"]) == 4096
    assert read_window(architectures=["MistralModel"], sliding_window=None) is None


def test_field_names_of_transformers_5_are_read(tmp_path):
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    model, _ = load_pretrained(save_with_fields(tmp_path, "llama-tiny", rope_theta=..., rope_parameters=new))
    assert (model.config.rotary_base, model.config.rotary_scaling) == (500.0, RotaryScaling("linear", 2.0))
    changed = model.with_fields(rotary_base=1000.0, rotary_scaling=None)
    save_pretrained(tmp_path / "changed", changed, initial_params(changed))
    assert load_pretrained(tmp_path / "changed")[0].config == changed.config
    with pytest.raises(ValueError, match="partial_rotary_factor=0.5 in rope_parameters must be 1.0: this family has"):
        load_pretrained(save_with_fields(tmp_path, "llama-tiny", rope_parameters={"partial_rotary_factor": 0.5}))
    with pytest.raises(ValueError, match="rope_parameters has factor, but no rope_type that uses them"):
        load_pretrained(save_with_fields(tmp_path, "llama-tiny", rope_parameters={"factor": 2.0, "rope_theta": 500.0}))


def test_mistral_with_rotary_scaling_has_a_head_dim_in_files():
    """In transformers, its default is null in the classes of Mistral and Mixtral, and YaRN scaling multiplies it."""
    for fields in ({"window": 5}, MIXTRAL):
        model = tiny_model("llama-tiny", **fields, rotary_scaling=YARN)
        config = config_json.model_config_json(model, "float32")
        assert (config["model_type"], config["head_dim"]) == ("mixtral" if fields == MIXTRAL else "mistral", 8)
    content = {**MIXTRAL_FILE, "max_position_embeddings": 64, "torch_dtype": "float32"}
    content["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
    model = config_json.describe_model(content, Path("config.json"), {}).model
    assert config_json.model_config_json(model, "float32") == content
    assert config_json.model_config_json(model.with_fields(rotary_scaling=YARN), "float32")["head_dim"] == 128
    del content["rope_scaling"]
    model = config_json.describe_model(content, Path("config.json"), {"rotary_scaling": YARN}).model
    assert config_json.model_config_json(model, "float32")["head_dim"] == 128


def test_rotary_positions_of_gemma_3_in_files_of_transformers_5():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rope_parameters": rope}
    fields = config_json.describe_model(config, Path("config.json"), {}).model.config
    assert (fields.rotary_base, fields.window_rotary_base) == (1e6, 2e4)
    assert fields.rotary_scaling == RotaryScaling("linear", 8.0)
    del config["architectures"]
    assert config_json.describe_model(config, Path("config.json"), {}).model.config == fields
    rope["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(ValueError, match="rope_type='linear' of sliding_attention is not supported"):
        config_json.describe_model(config, Path("config.json"), {})
    with pytest.raises(ValueError, match="config.json: "):
        config_json.describe_model(
            {**config, "rope_parameters": None, "sliding_window_pattern": 0}, Path("config.json"), {}
        )


PRINT_PROGRAM = """
import jax, numpy as np
from jaxlm import get_model, spec
model = get_model("gemma-3-tiny")
print(jax.make_jaxpr(lambda params: model.apply(params, np.zeros((1, 8), np.int32)))(spec.abstract(model.specs)))
"""


@pytest.mark.thorough
def test_the_traced_program_does_not_depend_on_the_hash_seed_of_the_process():
    """Each process of a run must compile the same program, and find it in the compilation cache."""
    programs = [
        subprocess.run(
            [sys.executable, "-c", PRINT_PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "2")  # the iteration order of {"window", "full"} differs
    ]
    assert "cos" in programs[0]
    assert programs[0] == programs[1]

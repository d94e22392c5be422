"""Tests of metadata: other fields survive load and save, tokenizers and labels are saved, new heads are reported."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import spec
from jaxlm.config import field_types
from jaxlm.data import ByteTokenizer, PretrainedTokenizer, load_tokenizer, train_tokenizer
from jaxlm.interop import config_json, formats
from jaxlm.interop.formats import Format
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.interop.locations import locations_of
from jaxlm.models import FAMILIES, Model, get_model
from jaxlm.models.heads import LABEL_HEADS
from jaxlm.models.hybrid import Multipliers
from jaxlm.models.model import Metadata
from jaxlm.nn.attention.rotary import RotaryScaling
from jaxlm.testing.helpers import assert_trees_equal, initial_params, tiny_model
from jaxlm.training.checks import check_tokenizer
from tests.interop.classes import CLASSES, model_of_class

PARAMETERS = pytest.mark.parametrize(
    ("name", "table", "architecture"), CLASSES, ids=lambda value: value if isinstance(value, str) else ""
)
EXTRA_FIELDS: dict[str, Any] = {
    "pad_token_id": 9, "bos_token_id": None, "eos_token_id": [17, 5], "sep_token_id": 3, "mem_len": 7,
    "use_cache": False, "problem_type": "single_label_classification",
    "task_specific_params": {"a": [1, {"b": None}]}, "transformers_version": "4.8.2", "_name_or_path": "somewhere",
    "gradient_checkpointing": False,
}  # fmt: skip
WORDS = ["to be or not to be that is the question whether tis nobler"]


def params_with_distinct_entries(model: Model) -> Any:
    """Parameters whose entries all differ."""
    flat = spec.flatten(model.specs)
    ends = np.cumsum([leaf.size for leaf in flat.values()])
    leaves = [
        np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape)
        for leaf, end in zip(flat.values(), ends, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


def read(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def edit(directory: Path, **fields: Any) -> dict[str, Any]:
    """Set fields of ``config.json``; returns its new content."""
    config = {**read(directory), **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return config


def save_model(directory: Path, model: Model, **arguments: Any) -> Path:
    save_pretrained(directory, model, params_with_distinct_entries(model), **arguments)
    return directory


# ------------------------------------------------------------------------------------------- load and save


@PARAMETERS
def test_every_field_survives_load_and_save(name: str, table: Format, architecture: str, tmp_path: Path) -> None:
    save_model(tmp_path / "a", model_of_class(name, table, architecture))
    extra_fields = {field: value for field, value in EXTRA_FIELDS.items() if field not in table.required}
    if name == "transformer_xl":
        extra_fields.pop("mem_len")  # jaxlm has this config field
    config = read(tmp_path / "a")
    if "id2label" in config:
        extra_fields |= {"id2label": {"0": "bad", "1": "so so", "2": "good"}, "label2id": {"good": 2}}
    synonyms = {"gelu_new": "gelu_pytorch_tanh"}  # another name of the same function
    for field in ("activation_function", "hidden_act"):
        if field in config and synonyms.get(config[field]) in table.jaxlm_value_of.get(field, {}):
            extra_fields[field] = synonyms[config[field]]
    before = edit(tmp_path / "a", **extra_fields)
    generation = {
        "eos_token_id": 17,
        "pad_token_id": 9,
        "decoder_start_token_id": 4,
        "top_k": 3,
        "_from_model_config": 1,
    }
    if name == "t5":
        before = edit(tmp_path / "a", decoder_start_token_id=4)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(generation))
    model, params = load_pretrained(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params)
    assert read(tmp_path / "b") == before
    assert read(tmp_path / "b", "generation_config.json") == generation
    assert model.metadata.token_ids["eos"] == 17
    assert model.metadata.token_ids["sep"] == 3
    assert model.labels == (("bad", "so so", "good") if "id2label" in config else None)
    if name == "t5":
        assert model.config.decoder_start_id == 4


@pytest.mark.parametrize("name", [name for name in FAMILIES if not formats.of(name)])
def test_families_without_published_formats_keep_fields_and_labels(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    has_labels = model.task == "classification"
    if has_labels:
        model = model.with_labels([f"label {number}" for number in range(model.config.num_labels)])
    save_model(tmp_path / "a", model)
    assert ("id2label" in read(tmp_path / "a")) == has_labels
    before = edit(tmp_path / "a", eos_token_id=5, note="kept")
    loaded_model, params = load_pretrained(tmp_path / "a")
    assert loaded_model.labels == model.labels
    assert loaded_model == model
    save_pretrained(tmp_path / "b", loaded_model, params)
    assert read(tmp_path / "b") == before


def test_an_overridden_field_is_written(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "a", get_model("gpt2-tiny", activation="gelu_tanh"))
    edit(directory, activation_function="gelu_pytorch_tanh", attn_pdrop=0.25)
    model, params = load_pretrained(directory, activation="relu")
    save_pretrained(tmp_path / "b", model, params)
    assert read(tmp_path / "b")["activation_function"] == "relu"
    assert read(tmp_path / "b")["attn_pdrop"] == 0.25
    # The loaded config needs this field, but the overridden config does not.
    directory = save_model(tmp_path / "c", get_model("llama-tiny"))
    edit(directory, rope_scaling={"rope_type": "linear", "factor": 2.0})
    model, params = load_pretrained(directory)
    assert config_json.model_config_json(model, "float32")["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    model, params = load_pretrained(directory, rotary_scaling=None)
    assert "rope_scaling" not in config_json.model_config_json(model, "float32")


YARN = {"rope_type": "yarn", "factor": 4.0}
MHA = {"max_position_embeddings": 16, "num_key_value_heads": 32}


@pytest.mark.parametrize(
    ("architecture", "fields", "change"),
    [
        ("LlamaForCausalLM", {**MHA, "rope_scaling": YARN}, {"max_positions": 64}),
        ("LlamaForCausalLM", {**MHA, "rope_scaling": {**YARN, "finetuned": True}}, {"max_positions": 64}),
        ("LlamaForCausalLM", {**MHA, "rope_parameters": YARN}, {"max_positions": 64}),
        ("BambaModel", {}, {"attention_heads": 16}),
        ("BambaModel", {"max_position_embeddings": 16, "rope_scaling": YARN}, {"max_positions": None}),
        ("FalconH1Model", {}, {"embed_dim": 2048}),
        ("XLNetModel", {"d_head": 64}, {"num_heads": 8}),
    ],
)
def test_the_saved_config_describes_a_changed_model(architecture: str, fields: Any, change: Any) -> None:
    """The omitted fields of these configs have a default that depends on the changed field."""
    model_types = {"LlamaForCausalLM": "llama", "BambaModel": "bamba", "FalconH1Model": "falcon_h1"}
    config = {"model_type": model_types.get(architecture, "xlnet"), "architectures": [architecture], **fields}
    model = config_json.describe_model(config, Path("config.json"), {}).model
    assert config_json.model_config_json(model, "float32") == {**config, "torch_dtype": "float32"}
    changed = model.with_fields(**change)
    saved = config_json.model_config_json(changed, "float32")
    assert config_json.describe_model(saved, Path("config.json"), {}).model.config == changed.config


def test_the_padding_id_of_a_tokenizer_does_not_change_the_decoder_start_id() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "pad_token_id": 7}
    model = config_json.describe_model(config, Path("config.json"), {}).model
    tokenizer = train_tokenizer(WORDS, "word", 30, template="eos")
    saved = config_json.model_config_json(model, "float32", tokenizer)
    assert (saved["pad_token_id"], saved["decoder_start_token_id"]) == (0, 7)


def test_the_model_type_survives_if_another_format_also_fits(tmp_path: Path) -> None:
    table = next(table for table in formats.of("llama") if table.model_type == "mistral")
    directory = save_model(tmp_path / "a", model_of_class("llama", table, "MistralForCausalLM"))
    before = edit(directory, sliding_window=None)  # like Mistral since version 0.2, which computes the same as Llama
    model, params = load_pretrained(directory)
    save_pretrained(tmp_path / "b", model, params)
    assert read(tmp_path / "b") == before
    changed = model.with_fields(qkv_bias=True)
    config = config_json.model_config_json(changed, "float32")  # the Mistral format does not support qkv_bias
    assert (config["model_type"], "sliding_window" in config) == ("qwen2", False)


def test_the_special_ids_survive_a_new_model_type() -> None:
    """They are facts about the vocabulary. An omitted id has the default of the loaded model type."""

    def saved_ids(fields: dict[str, Any], **change: Any) -> tuple[str, dict[str, Any]]:
        model = config_json.describe_model({"vocab_size": 40, **fields}, Path("config.json"), {}).model
        config = config_json.model_config_json(model.with_fields(**change), "float32")
        return config["model_type"], {name: ids for name, ids in config.items() if name.endswith("_token_id")}

    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    ids = {"pad_token_id": 3, "bos_token_id": None, "eos_token_id": [5, 6]}
    assert saved_ids({**llama, **ids, "sep_token_id": 7}, qkv_bias=True) == ("qwen2", ids)
    assert saved_ids(llama, qkv_bias=True) == ("qwen2", {"bos_token_id": 1, "eos_token_id": 2})
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert saved_ids({**qwen, "eos_token_id": 9}, qkv_bias=False) == (
        "llama",
        {"bos_token_id": None, "eos_token_id": 9},
    )
    mamba = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    assert saved_ids({**mamba, **ids}, negative_eigenvalues=True) == ("jaxlm-mamba2", ids)
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 4}
    assert saved_ids({**t5, "eos_token_id": 8}, bias_per_layer=True) == (
        "umt5", {"pad_token_id": 0, "eos_token_id": 8, "decoder_start_token_id": 4},
    )  # fmt: skip


def test_an_overridden_decoder_start_id_is_written_into_both_files(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("t5-tiny"))
    (directory / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, "eos_token_id": 5}))
    model, _ = load_pretrained(directory)
    assert config_json.generation_config_json(model) == {"decoder_start_token_id": 0, "eos_token_id": 5}
    model, _ = load_pretrained(directory, decoder_start_id=6)
    assert config_json.generation_config_json(model) == {"decoder_start_token_id": 6, "eos_token_id": 5}
    assert config_json.model_config_json(model, "float32")["decoder_start_token_id"] == 6
    edit(directory, decoder_start_token_id=None, pad_token_id=3)  # T5 starts with its padding id
    model, _ = load_pretrained(directory)
    assert model.config.decoder_start_id == 3
    assert config_json.generation_config_json(model) == {"decoder_start_token_id": 0, "eos_token_id": 5}
    assert config_json.model_config_json(model, "float32")["decoder_start_token_id"] is None


def test_an_alias_must_equal_its_field_and_is_updated_with_it(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("gpt2-tiny"))
    edit(directory, num_attention_heads=4)
    model, _ = load_pretrained(directory)
    assert config_json.model_config_json(model, "float32")["num_attention_heads"] == 4
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, num_heads=2))
    config = config_json.model_config_json(changed, "float32")
    assert (config["n_head"], config["num_attention_heads"]) == (2, 2)
    edit(directory, num_attention_heads=8)
    with pytest.raises(ValueError, match="num_attention_heads=8 is an alias of n_head, which is 4: set only n_head"):
        load_pretrained(directory)
    config = edit(directory, num_attention_heads=4)
    del config["n_head"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an alias of n_head, which is 'missing': set only n_head"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("fields", "mlp"),
    [
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}, "relu"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}, "gated_gelu"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}, "gated_gelu"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu_new", "is_gated_act": True}, "gated_gelu"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu"}, None),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True}, None),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, None),
        ({"feed_forward_proj": "gated-silu"}, None),
    ],
)
def test_the_mlp_of_t5_follows_from_all_its_fields(fields: dict[str, Any], mlp: str | None) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **fields}
    if mlp is None:
        with pytest.raises(ValueError, match=r"feed_forward_proj=.* is not supported"):
            config_json.describe_model(config, Path("config.json"), {})
    else:
        model = config_json.describe_model(config, Path("config.json"), {}).model
        assert model.config.mlp == mlp
        assert config_json.model_config_json(model, "float32") == {**config, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("variant", "field", "value", "model_type"),
    [
        ("openai-gpt-tiny", "mlp_dim", 128, "openai-gpt"),
        ("mixtral-tiny", "expert_dim", 48, "mixtral"),
        ("mamba2-tiny", "multipliers", Multipliers(), "mamba2"),
        ("bamba-tiny", "multipliers", Multipliers(), "bamba"),
        ("llama-tiny", "attention_scale", 8**-0.5, "llama"),
        ("llama-tiny", "pattern", ("full",), "llama"),
    ],
)
def test_a_model_with_the_value_that_none_stands_for_is_saved(
    variant: str, field: str, value: Any, model_type: str
) -> None:
    model = get_model(variant, **{field: value})
    saved = config_json.model_config_json(model, "float32")
    assert saved["model_type"] == model_type
    loaded = config_json.describe_model(saved, Path("config.json"), {}).model
    assert getattr(loaded.config, field) is None
    assert loaded.specs == model.specs


UNPUBLISHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("openai-gpt-tiny", {"mlp_dim": 64}),
    ("llama-tiny", {"pattern": ("window", "full"), "window": 4}),
    ("llama-tiny", {"qk_norm": True, "qkv_bias": True}),
    ("llama-tiny", {"rotary_scaling": RotaryScaling("dynamic", 2.0, 32)}),
    ("llama-tiny", {"num_experts": 3, "experts_per_token": 1, "qkv_bias": True}),
    ("gated_deltanet-hybrid-tiny", {"num_experts": 3, "expert_dim": 5}),
    ("mamba2-tiny", {"norm_before_gate": True}),
    ("falcon-h1-tiny", {"norm_groups": 1}),
    ("falcon-h1-tiny", {"pattern": ("mamba2",)}),
    ("bamba-tiny", {"pattern": ("parallel", "mamba2")}),
    ("bamba-tiny", {"mlp_dim": None}),
    ("bamba-tiny", {"dt_limit_max": 1.0}),
    ("bamba-tiny", {"residual_in_float32": True}),
    ("transformer-xl-tiny", {"cutoffs": tuple(range(10, 19)), "embedding_divisor": 2, "token_dim": 512}),
    ("gemma-3-tiny", {"attention_scale": -0.3}),
    ("gemma-3-tiny", {"attention_scale": 0.0}),
    ("gated_deltanet-hybrid-tiny", {"max_positions": None, "rotary_scaling": RotaryScaling("yarn", 4.0, 8)}),
    ("roberta-tiny", {"vocab_size": 1}),
)
"""Models that no class in transformers can represent, although their family has published formats."""


@pytest.mark.parametrize(("variant", "fields"), UNPUBLISHED)
def test_a_model_that_no_class_can_represent_is_saved_with_names_of_jaxlm(
    variant: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = get_model(variant, **fields)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"jaxlm-{model.family}"
    loaded, loaded_params = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_trees_equal(loaded_params, params)


def test_a_yarn_truncate_of_null_is_false() -> None:
    """transformers tests whether the value is true; only a missing field is true by default."""
    config = {"model_type": "llama", "max_position_embeddings": 16, "rope_scaling": {**YARN, "truncate": None}}
    model = config_json.describe_model(config, Path("config.json"), {}).model
    assert model.config.rotary_scaling.truncate is False
    assert config_json.model_config_json(model, "float32")["rope_scaling"] == config["rope_scaling"]


def test_a_missing_field_is_not_added(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("bert-tiny"))
    config = {name: value for name, value in read(directory).items() if name not in ("is_decoder", "pruned_heads")}
    (directory / "config.json").write_text(json.dumps(config))
    model, _ = load_pretrained(directory)
    assert config_json.model_config_json(model, "float32") == config


def test_a_removed_window_is_not_written(tmp_path: Path) -> None:
    table = [table for table in formats.of("llama") if table.model_type == "qwen2"][-1]
    directory = save_model(tmp_path, model_of_class("llama", table, "Qwen2ForCausalLM"))
    edit(directory, use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 2)
    assert load_pretrained(directory)[0].config.window == 3
    config = config_json.model_config_json(load_pretrained(directory, window=None)[0], "float32")
    assert (config["use_sliding_window"], set(config["layer_types"])) == (False, {"full_attention"})


def test_the_layer_types_of_qwen2_beyond_the_last_layer_are_ignored(tmp_path: Path) -> None:
    table = [table for table in formats.of("llama") if table.model_type == "qwen2"][-1]
    directory = save_model(tmp_path, model_of_class("llama", table, "Qwen2ForCausalLM"))
    edit(directory, use_sliding_window=True, layer_types=["full_attention"] * 2 + ["sliding_attention"])
    assert load_pretrained(directory)[0].config.window is None
    edit(directory, layer_types=["sliding_attention"])
    with pytest.raises(ValueError, match="must be a list with one entry for each of 2 layers"):
        load_pretrained(directory)


def test_a_missing_decoder_start_id_is_the_padding_id(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("t5-tiny"))
    edit(directory, pad_token_id=7)
    assert load_pretrained(directory)[0].config.decoder_start_id == 0
    config = read(directory)
    del config["decoder_start_token_id"]
    (directory / "config.json").write_text(json.dumps(config))
    assert load_pretrained(directory)[0].config.decoder_start_id == 7


def test_metadata_does_not_affect_equality_and_survives_replace(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("gpt2-tiny"))
    model, _ = load_pretrained(directory)
    bare = Model(model.family, model.config)
    assert (bare, hash(bare)) == (model, hash(model))
    assert bare.metadata == Metadata()
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, remat="full"))
    assert changed.metadata is model.metadata
    assert "metadata" not in repr(model)


def test_a_generation_config_of_an_earlier_save_is_removed(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("gpt2-tiny"))
    (directory / "generation_config.json").write_text('{"eos_token_id": "3"}')
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id='3' must be a whole number or None or a list in"
    ):
        load_pretrained(directory)
    save_model(directory, get_model("gpt2-tiny"))
    assert not (directory / "generation_config.json").exists()


# ---------------------------------------------------------------------------------------------- labels


def test_labels_are_set_saved_and_loaded(tmp_path: Path) -> None:
    model = get_model("bert-tiny", task="classification", num_labels=2)
    assert model.labels is None
    save_model(tmp_path, model.with_labels(["bad", "good"]))
    assert read(tmp_path)["id2label"] == {"0": "bad", "1": "good"}
    assert read(tmp_path)["label2id"] == {"bad": 0, "good": 1}
    loaded_model, _ = load_pretrained(tmp_path)
    assert loaded_model.labels == ("bad", "good")
    assert loaded_model.with_labels(["-", "+"]).labels == ("-", "+")
    assert loaded_model.with_fields(remat="full").labels == ("bad", "good")
    assert loaded_model.with_fields(num_labels=3).labels is None


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("ab", TypeError, "must be a sequence of strings, got 'ab'"),
        (["a", 1], TypeError, r"must be a sequence of strings, got \['a', 1\]"),
        (["a"], ValueError, r"got 1 labels \['a'\] for num_labels=2"),
        (["a", "a"], ValueError, "labels must be distinct"),
    ],
)
def test_wrong_labels_raise(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_model("bert-tiny", task="classification", num_labels=2).with_labels(labels)
    with pytest.raises(ValueError, match="task='masked' has no labels"):
        get_model("bert-tiny", task="masked").with_labels(["a", "b"])


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, ["a", "b"], {"one": "a"}])
def test_label_tables_with_gaps_raise(labels: Any, tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("bert-tiny", task="classification", num_labels=2))
    edit(directory, id2label=labels)
    with pytest.raises(ValueError, match="config.json.*id2label=.* without a gap"):
        load_pretrained(directory)


@pytest.mark.parametrize("fields", [{"id2label": {"1": "a", "2": "b"}}, {"id2label": {}}, {"num_labels": 0}])
def test_labels_that_the_model_does_not_use_may_be_invalid(fields: dict[str, Any]) -> None:
    model = get_model("llama-tiny")
    config = config_json.model_config_json(model, "float32") | fields
    loaded = config_json.describe_model(config, Path("config.json"), {}).model
    assert (loaded, loaded.labels) == (model, None)
    assert config_json.model_config_json(loaded, "float32") == config
    head = {"task": "classification", "num_labels": 3}
    assert config_json.describe_model(config, Path("config.json"), head).model == get_model("llama-tiny", **head)
    with pytest.raises(ValueError, match="without a gap|num_labels=0 must be at least 1"):
        config_json.describe_model(config, Path("config.json"), {"task": "classification"})


def test_the_problem_type_survives_a_new_model_type() -> None:
    config = config_json.model_config_json(get_model("llama-tiny", task="classification"), "float32")
    config |= {"problem_type": "multi_label_classification"}

    def saved(**overrides: Any) -> dict[str, Any]:
        model = config_json.describe_model(config, Path("config.json"), overrides).model
        return config_json.model_config_json(model, "float32")

    assert (config["model_type"], saved()) == ("llama", config)
    windowed = saved(window=4)
    assert (windowed["model_type"], windowed["problem_type"]) == ("mistral", "multi_label_classification")
    assert not {"problem_type", "id2label"} & saved(task="none").keys()


# -------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("variant", "template", "expected"),
    [
        ("gpt2-tiny", "none", {"pad": 0, "bos": None, "eos": 1}),
        ("llama-tiny", "none", {"pad": 0, "bos": None, "eos": 1}),
        ("t5-tiny", "eos", {"pad": 0, "bos": None, "eos": 1}),
        ("roberta-tiny", "bos_eos", {"pad": 1, "bos": 0, "eos": 2}),
        ("bert-tiny", "cls_sep", {"pad": 0, "bos": None, "eos": None}),
        ("xlnet-tiny", "sep_cls", {"pad": 5, "bos": 1, "eos": 2}),
        ("lstm-tiny", "none", {"pad": 0, "bos": None, "eos": 1}),
    ],
)
def test_special_ids_come_from_the_tokenizer(variant: str, template: Any, expected: Any, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(WORDS, "word", 30, template=template)
    model = tiny_model(variant, vocab_size=40)
    save_model(tmp_path, model, tokenizer=tokenizer)
    assert {role: read(tmp_path)[f"{role}_token_id"] for role in expected} == expected
    assert load_tokenizer(tmp_path).special_ids == tokenizer.special_ids
    if model.task in ("causal", "seq2seq", "permutation"):
        generation = read(tmp_path, "generation_config.json")
        special_ids = {role: generation.get(f"{role}_token_id") for role in expected}
        assert special_ids == expected
        assert generation.get("decoder_start_token_id") == (0 if variant == "t5-tiny" else None)
    else:
        assert not (tmp_path / "generation_config.json").exists()
    loaded_model, _ = load_pretrained(tmp_path)
    assert loaded_model.metadata.token_ids["pad"] == expected["pad"]


def test_a_tokenizer_updates_only_the_special_ids_that_it_has(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "a", get_model("gpt2-tiny"))
    edit(directory, pad_token_id=7, bos_token_id=8, eos_token_id=[3, 256], n_note="kept")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "temperature": 0.5}))
    model, params = load_pretrained(directory, vocab_size=128)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=257))
    save_pretrained(tmp_path / "b", model, params_with_distinct_entries(model), ByteTokenizer())
    config = read(tmp_path / "b")
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (7, 8, [3, 256])
    assert config["n_note"] == "kept"
    assert read(tmp_path / "b", "generation_config.json") == {"eos_token_id": 256, "temperature": 0.5}
    assert load_tokenizer(tmp_path / "b") == ByteTokenizer()


def test_a_new_generation_config_has_the_settings_of_the_config() -> None:
    def saved(model_type: str, architecture: str, **fields: Any) -> dict[str, Any] | None:
        config = {"model_type": model_type, "architectures": [architecture], "vocab_size": 257, **fields}
        model = config_json.describe_model(config, Path("config.json"), {}).model
        assert config_json.generation_config_json(model) is None
        return config_json.generation_config_json(model, ByteTokenizer())

    ids = {"bos_token_id": 8, "eos_token_id": [256, 3, 4]}
    assert saved("llama", "LlamaForCausalLM", pad_token_id=None, **ids, top_k=50, max_length=20) == ids
    settings = {"num_beams": 4, "max_length": 84, "no_repeat_ngram_size": 2, "length_penalty": 0.6}
    assert saved("mt5", "MT5ForConditionalGeneration", eos_token_id=1, pad_token_id=0, **settings) == {
        "eos_token_id": 256, "pad_token_id": 0, "decoder_start_token_id": 0, **settings,
    }  # fmt: skip
    assert saved("bert", "BertForMaskedLM", max_length=512) is None


def test_tokenizer_files_of_an_earlier_save_are_removed(tmp_path: Path) -> None:
    model = get_model("gpt2-tiny", vocab_size=300)
    save_model(tmp_path, model, tokenizer=ByteTokenizer())
    trained = train_tokenizer(WORDS, "word", 30)
    save_model(tmp_path, model, tokenizer=trained)
    assert load_tokenizer(tmp_path).vocab_size == trained.vocab_size
    (tmp_path / "README.md").write_text("kept")
    save_model(tmp_path, model, tokenizer=ByteTokenizer())
    assert load_tokenizer(tmp_path) == ByteTokenizer()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "README.md", "checksums.json", "config.json", "generation_config.json", "jaxlm_tokenizer.json",
        "model.safetensors",
    ]  # fmt: skip


def test_tokenizers_that_do_not_fit_the_model_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer has 257 ids but the model has vocab_size=128"):
        save_model(tmp_path / "a", get_model("gpt2-tiny"), tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match=r"roberta needs pad_token_id=1, but the tokenizer has 0: .*'bos_eos'"):
        save_model(tmp_path / "a", get_model("roberta-tiny"), tokenizer=train_tokenizer(WORDS, "word", 30))
    assert not (tmp_path / "a").exists()


def test_a_special_token_without_a_role_may_be_outside_the_vocabulary(tmp_path: Path) -> None:
    """The vocabulary of Gemma 3 1B ends before the token of images."""
    tokenizer = train_tokenizer(WORDS, "word", 30)
    size = tokenizer.vocab_size
    model = get_model("gpt2-tiny", vocab_size=size)
    tokenizer.backend.add_special_tokens(["<image>"])
    larger = PretrainedTokenizer(tokenizer.backend, tokenizer.special_tokens)
    assert larger.vocab_size == size + 1
    save_model(tmp_path, model, tokenizer=larger)
    assert load_tokenizer(tmp_path).encode("to <image>")[1] == size
    check_tokenizer(load_pretrained(tmp_path)[0], load_tokenizer(tmp_path))
    with_role = PretrainedTokenizer(tokenizer.backend, {**tokenizer.special_tokens, "mask": "<image>"})
    with pytest.raises(ValueError, match=f"the tokenizer has {size + 1} ids but the model has vocab_size={size}"):
        save_model(tmp_path, model, tokenizer=with_role)
    tokenizer.backend.add_tokens(["question2"])  # not a special token
    with pytest.raises(ValueError, match=f"the tokenizer has {size + 2} ids but the model has vocab_size={size}"):
        save_model(tmp_path, model, tokenizer=PretrainedTokenizer(tokenizer.backend, tokenizer.special_tokens))


# ------------------------------------------------------------------------------------- newly initialized heads


def tasks(table: Format) -> list[str]:
    return list(dict.fromkeys(implied["task"] for implied in table.architectures.values()))


@pytest.mark.thorough
@PARAMETERS
def test_every_class_loads_for_every_task(name: str, table: Format, architecture: str, tmp_path: Path) -> None:
    model = model_of_class(name, table, architecture)
    save_model(tmp_path, model)
    saved_params = spec.flatten(params_with_distinct_entries(model))
    all_tasks = dict.fromkeys(task for other in formats.of(name) for task in tasks(other))
    for task in all_tasks:
        if name == "t5" and architecture.endswith("EncoderModel") and task == "seq2seq":
            continue  # has no decoder
        overrides = {"num_labels": 5} if task in ("classification", "token_classification") else {}
        loaded, params = load_pretrained(tmp_path, task=task, seed=3, **overrides)
        new_params = loaded.init(jax.random.key(3))  # not compiled, like the new arrays of load_pretrained
        expected = {
            path
            for path in spec.flatten(loaded.specs)
            if path not in saved_params or (path.partition("/")[0] in ("classifier", "token_classifier"))
        }
        assert set(loaded.metadata.initialized) == expected
        for path, leaf in spec.flatten(params).items():
            reference = spec.flatten(new_params)[path] if path in expected else saved_params[path]
            np.testing.assert_array_equal(leaf, reference, err_msg=path)
        dropped = set(saved_params) - set(spec.flatten(loaded.specs)) | (set(saved_params) & expected)
        locations = locations_of(model, config_json.format_of(model))
        assert set(loaded.metadata.unused_tensors) == {name for path in dropped for name in locations[path].names}
        assert loaded.labels is None


@pytest.mark.parametrize(
    ("name", "table", "architecture"),
    [case for case in CLASSES if case[1].architectures[case[2]]["task"] == "none"],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_with_any_task_can_be_saved(name: str, table: Format, architecture: str) -> None:
    model = model_of_class(name, table, architecture)
    config = config_json.model_config_json(model, "float32")
    for task in typing.get_args(field_types(type(model.config)).get("task")):
        if architecture.endswith("EncoderModel") and task == "seq2seq":
            continue  # has no decoder
        loaded = config_json.describe_model(config, Path("config.json"), {"task": task}).model
        saved = config_json.model_config_json(loaded, "float32")
        assert config_json.describe_model(saved, Path("config.json"), {}).model == loaded


def test_a_task_without_a_class_is_saved_in_jaxlms_own_format(tmp_path: Path) -> None:
    model = get_model("openai-gpt-tiny", task="token_classification", num_labels=3)
    save_model(tmp_path, model)
    assert read(tmp_path)["model_type"] == "jaxlm-gpt"
    loaded, params = load_pretrained(tmp_path)
    assert loaded == model
    assert_trees_equal(params, params_with_distinct_entries(model))
    loaded, _ = load_pretrained(tmp_path, task="causal")
    assert config_json.format_of(loaded).model_type == "openai-gpt"


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["bert-tiny", "roberta-tiny", "xlnet-tiny", "gpt2-tiny", "llama-tiny"])
def test_a_base_model_loads_as_a_classifier(variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_model(variant, task="none")
    save_model(tmp_path, base)
    with caplog.at_level(logging.INFO, logger="jaxlm"):
        model, params = load_pretrained(tmp_path, task="classification", num_labels=4)
    assert "new parameters, which must be trained: classifier" in caplog.text
    tokens = np.ones((2, 5), np.int32)
    hidden, _ = model.apply(initial_params(model), tokens)
    assert model.logits(params, model.pool(params, hidden)).shape == (2, 1, 4)
    other_model, other_params = load_pretrained(tmp_path, task="classification", num_labels=4, seed=1)
    assert other_model == model
    assert not np.array_equal(other_params["classifier"]["weight"], params["classifier"]["weight"])


@pytest.mark.parametrize("variant", ["bert-tiny", "roberta-tiny"])
def test_a_pooler_and_a_next_sentence_head_that_the_model_does_not_have_are_not_loaded(
    variant: str, tmp_path: Path
) -> None:
    """``bert-base-uncased`` has both, with the class ``BertForMaskedLM``; files of RoBERTa often have a pooler."""
    model = tiny_model(variant, task="masked")
    save_model(tmp_path, model)
    prefix, width = variant.partition("-")[0], model.config.embed_dim
    extra = {f"{prefix}.pooler.dense.weight": np.ones((width, width), np.float32)}
    if prefix == "bert":
        extra["cls.seq_relationship.bias"] = np.ones(2, np.float32)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | extra, path)
    (tmp_path / "checksums.json").unlink()
    loaded, params = load_pretrained(tmp_path)
    assert set(loaded.metadata.unused_tensors) == set(extra)
    assert_trees_equal(params, params_with_distinct_entries(model))
    save_file(load_file(path) | {"bert.unknown": np.ones(2, np.float32)}, path)
    with pytest.raises(ValueError, match=r"extra: bert.unknown"):
        load_pretrained(tmp_path)


def test_families_without_published_formats_get_new_heads(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("lstm-encoder-tiny", task="classification", num_labels=2))
    model, _ = load_pretrained(tmp_path, num_labels=3)
    assert {path.partition("/")[0] for path in model.metadata.initialized} == {"classifier"}
    model, _ = load_pretrained(tmp_path, task="token_classification", num_labels=2)
    assert {path.partition("/")[0] for path in model.metadata.initialized} == {"token_classifier"}
    assert {name.partition(".")[0] for name in model.metadata.unused_tensors} == {"classifier"}


def test_a_head_of_the_same_task_and_size_is_loaded(tmp_path: Path) -> None:
    model = get_model("bert-tiny", task="classification", num_labels=2).with_labels(["a", "b"])
    save_model(tmp_path, model)
    loaded, params = load_pretrained(tmp_path, task="classification", num_labels=2)
    assert (loaded.labels, loaded.metadata.initialized, loaded.metadata.unused_tensors) == (("a", "b"), (), ())
    np.testing.assert_array_equal(
        params["classifier"]["weight"], params_with_distinct_entries(model)["classifier"]["weight"]
    )
    # With another number of labels, the label names of the file do not apply.
    edit(tmp_path, problem_type="multi_label_classification")
    loaded, params = load_pretrained(tmp_path, num_labels=3)
    assert (loaded.labels, set(loaded.metadata.initialized)) == (None, {"classifier/weight", "classifier/bias"})
    config = config_json.model_config_json(loaded, "float32")
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert "problem_type" not in config


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_a_multilingual_t5_keeps_another_mlp_than_its_default(model_type: str, tmp_path: Path) -> None:
    model = get_model("t5-tiny", mlp="relu", bias_per_layer=model_type == "umt5")
    save_model(tmp_path / "a", model)
    edit(tmp_path / "a", model_type=model_type, architectures=[f"{model_type.upper()}ForConditionalGeneration"])
    loaded, params = load_pretrained(tmp_path / "a")
    save_pretrained(tmp_path / "b", loaded, params)
    assert read(tmp_path / "b") == read(tmp_path / "a")
    assert load_pretrained(tmp_path / "b")[0] == loaded
    assert loaded.config.mlp == "relu"


@pytest.mark.parametrize(
    ("model_type", "former", "present"),
    [
        ("t5", "T5WithLMHeadModel", "T5ForConditionalGeneration"),
        ("llama", "LLaMAForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_a_class_with_a_former_name_is_saved_with_its_present_name(model_type: str, former: str, present: str) -> None:
    config = {"model_type": model_type, "architectures": [former], "torch_dtype": "float32", "note": "kept"}
    model = config_json.describe_model(config, Path("config.json"), {}).model
    assert model == config_json.describe_model({**config, "architectures": present}, Path("config.json"), {}).model
    assert config_json.model_config_json(model, "float32") == {**config, "architectures": [present]}


def test_the_error_for_an_unknown_t5_class_does_not_propose_its_base_model(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("t5-tiny"))
    edit(directory, architectures=["T5ForQuestionAnswering"])
    for overrides in ({}, {"task": "none"}):
        with pytest.raises(ValueError, match=r"'T5ForQuestionAnswering' is not supported\. Supported: "):
            load_pretrained(directory, **overrides)


def test_an_unsupported_class_loads_as_its_base_model(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("bert-tiny", task="classification", num_labels=1))
    edit(directory, architectures=["BertForMultipleChoice"])
    message = r"'BertForMultipleChoice' is not supported; pass task=\.\.\. to load its base model"
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)
    model, _ = load_pretrained(directory, task="classification", num_labels=1)
    assert set(model.metadata.initialized) == {"classifier/weight", "classifier/bias"}
    assert config_json.model_config_json(model, "float32")["architectures"] == ["BertForSequenceClassification"]
    # These fields describe the head that was replaced.
    edit(directory, problem_type="regression", num_labels=1)
    model, _ = load_pretrained(directory, task="classification", num_labels=3)
    config = config_json.model_config_json(model, "float32")
    assert len(config["id2label"]) == 3
    assert not {"problem_type", "num_labels"} & config.keys()


def test_only_tensors_of_heads_may_be_missing_or_unused(tmp_path: Path) -> None:
    directory = save_model(tmp_path, get_model("bert-tiny", task="masked"))
    edit(directory, architectures=["BertForSequenceClassification"])
    with pytest.raises(ValueError, match=r"missing: classifier\.weight"):
        load_pretrained(directory)
    edit(directory, architectures=["BertForMaskedLM"])
    all_tensors = load_file(directory / "model.safetensors")

    def check_error(tensors: dict[str, np.ndarray], message: str, **overrides: Any) -> None:
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_pretrained(directory, **{"task": "classification", **overrides})

    base = "bert.encoder.layer.1.output.dense.weight"
    check_error({name: array for name, array in all_tensors.items() if name != base}, f"missing: {base}")
    check_error({**all_tensors, "bert.new": np.ones(2, np.float32)}, "extra: bert.new")
    check_error({**all_tensors, base: np.ones((2, 2), np.float32)}, f"differs: {base}")
    # A file with only a part of a head is damaged.
    partial = {name: array for name, array in all_tensors.items() if name != "cls.predictions.bias"}
    check_error(partial, "missing: cls.predictions.bias", task="masked")
    check_error(all_tensors, r"missing: bert\.encoder\.layer\.2\.", num_layers=3)
    check_error(all_tensors, "task='captions'", task="captions")
    headless = {name: array for name, array in all_tensors.items() if not name.startswith("cls.")}
    save_file(headless, directory / "model.safetensors")
    with pytest.raises(ValueError, match="missing: cls.predictions.bias"):
        load_pretrained(directory)
    model, _ = load_pretrained(directory, task="masked")
    assert all(path.startswith("masked/") for path in model.metadata.initialized)
    assert len(model.metadata.initialized) == 5


@pytest.mark.parametrize("scan_layers", [False, True])
def test_an_override_of_the_task_drops_no_layers_and_biases_and_no_head_of_the_same_task(
    scan_layers: bool, tmp_path: Path
) -> None:
    save_model(tmp_path, get_model("llama-tiny", qkv_bias=True, tie_embeddings=False))
    same_task: list[dict[str, Any]] = [{}, {"task": "causal"}, {"num_labels": 3}]
    other_task: list[dict[str, Any]] = [{"task": "none"}, {"task": "classification", "num_labels": 3}]

    def check_error(heads: list[dict[str, Any]], message: str, **change: Any) -> None:
        for head in heads:
            with pytest.raises(ValueError, match=message):
                load_pretrained(tmp_path, scan_layers=scan_layers, **head, **change)

    check_error(same_task + other_task, r"extra: model\.layers\.1\.", num_layers=1)
    check_error(same_task + other_task, r"extra: model\.layers\.0\.self_attn\.k_proj\.bias", qkv_bias=False)
    check_error(same_task, r"lm_head\.weight must equal model\.embed_tokens\.weight", tie_embeddings=True)
    for head in other_task:
        model, _ = load_pretrained(tmp_path, scan_layers=scan_layers, tie_embeddings=True, **head)
        assert model.metadata.unused_tensors == ("lm_head.weight",)


def test_recurrent_layers_are_not_dropped(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("lstm-tiny"))
    for task in ("causal", "classification"):
        with pytest.raises(ValueError, match=r"extra: layer_1\."):
            load_pretrained(tmp_path, task=task, num_layers=1)


def test_the_decoder_of_t5_is_dropped_only_with_another_task(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "a", get_model("t5-tiny"))
    model, _ = load_pretrained(directory, task="none", num_decoder_layers=0)
    assert {name.partition(".")[0] for name in model.metadata.unused_tensors} == {"decoder"}
    directory = save_model(tmp_path / "b", get_model("t5-tiny", task="none"))
    with pytest.raises(ValueError, match=r"extra: decoder\.block\.0\."):
        load_pretrained(directory, task="none", num_decoder_layers=0)


def test_parameters_outside_heads_are_not_initialized(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "t5", get_model("t5-tiny", task="none", num_decoder_layers=0))
    with pytest.raises(ValueError, match=r"missing: decoder\.block\.0\.layer\.0\.SelfAttention\.k\.weight"):
        load_pretrained(directory, task="seq2seq", num_decoder_layers=2)
    directory = save_model(tmp_path / "rnn", get_model("attention-rnn-lm-tiny"))
    with pytest.raises(ValueError, match=r"missing: .*\n.*layer_0\.backward"):
        load_pretrained(directory, task="classification", num_labels=2)


def test_new_parameters_have_the_dtype_of_the_others(tmp_path: Path) -> None:
    model = get_model("gpt2-tiny", task="none")
    save_pretrained(
        tmp_path, model, jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params_with_distinct_entries(model))
    )
    _, params = load_pretrained(tmp_path, task="classification")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    _, params = load_pretrained(tmp_path, task="classification", param_dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


def test_defaults_of_metadata() -> None:
    """A new ``Metadata`` is empty, and ``LABEL_HEADS`` lists the parameters of all heads."""
    assert Metadata() == Metadata(None, {}, {}, None, (), ())
    assert set(LABEL_HEADS.values()) == {"classifier", "token_classifier", "span"}


@pytest.mark.thorough
def test_a_family_without_a_task_with_labels_says_so(tmp_path: Path) -> None:
    model = tiny_model("mamba2-tiny")
    save_pretrained(tmp_path, model, initial_params(model))
    with pytest.raises(ValueError, match="family mamba2 has no task 'classification': it has causal, none"):
        load_pretrained(tmp_path, task="classification", num_labels=3)
    with pytest.raises(ValueError, match="'num_labels'"):
        load_pretrained(tmp_path, task="none", num_labels=3)


@pytest.mark.parametrize("variant", ["lstm-tiny", "gru-tiny"])
def test_a_recurrent_language_model_loads_as_a_classifier(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, embed_dim=16, hidden_dim=24)
    save_pretrained(tmp_path, model, params := initial_params(model))
    classifier, loaded = load_pretrained(tmp_path, task="classification", num_labels=3)
    assert all(path.startswith("classifier") for path in classifier.metadata.initialized)
    del params["head"], loaded["classifier"]
    assert_trees_equal(loaded, params)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2", "n_embd": 16, "n_head": 3},
            r"num_heads=3 does not .* \(in this file, num_heads is n_head and embed_dim is n_embd\)",
        ),
        (
            {"model_type": "llama", "rope_theta": 0},
            r"rotary_base=0 must .* \(in this file, .* is rope_theta\)",
        ),
        ({"model_type": "llama", "vocab_size": 0}, r"vocab_size=0 must be at least 1$"),
    ],
)
def test_errors_of_fields_also_have_the_names_in_the_file(config, message):
    with pytest.raises(ValueError, match=message):
        config_json.describe_model(config, Path("config.json"), {})

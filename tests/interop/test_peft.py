"""Tests of LoRA adapters in PEFT's layout: names, shapes, round trips, errors. ``test_peft_live.py`` runs PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.adapt import LoRA
from jaxlm.interop.huggingface import save_pretrained
from jaxlm.interop.peft import load_adapter, save_adapter
from jaxlm.testing.helpers import assert_trees_equal, initial_params, tiny_model

GPT = tiny_model("gpt2-tiny", scan_layers=True)
LLAMA = tiny_model("llama-tiny")
QKV = LoRA(4, alpha=8)


def random_adapter(model, lora, seed=3):
    """A trained tree with random values."""
    specs = lora.specs(model.specs)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(specs))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), specs)


def save_random_adapter(directory, model=GPT, lora=QKV):
    """Save a random adapter to a directory; returns its config and its tensors."""
    save_adapter(directory, model, lora, random_adapter(model, lora))
    return json.loads((directory / "adapter_config.json").read_text()), load_file(
        directory / "adapter_model.safetensors"
    )


def rewrite(directory, config, tensors):
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize(
    ("name", "overrides", "lora"),
    [
        ("gpt2-tiny", {}, LoRA(4, targets=("attention/", "mlp/"))),
        ("gpt2-tiny", {"task": "none"}, LoRA(4)),
        ("llama-tiny", {"vocab_size": 61, "vocab_multiple": 8}, LoRA(2, alpha=3.5, targets=("weight", "^head$"))),
        (
            "bert",
            {"task": "classification"},
            LoRA(3, targets=("weight",), full_training_patterns=("^layers/mlp_norm/", "^embedding")),
        ),
        ("t5", {"num_decoder_layers": 3}, LoRA(2, targets=("attention/", "mlp"))),
        ("mamba2", {"tie_embeddings": False}, LoRA(2, targets=("^head$",), full_training_patterns=("mixer/norm",))),
        ("gemma-3-tiny", {}, LoRA(2, targets=("attention/", "mlp/"))),  # equal trees, but layers of several kinds
        ("llama-tiny", {"pattern": ("full", "no_positions")}, LoRA(2, full_training_patterns=("mlp_norm",))),  # SmolLM3
        ("mixtral-tiny", {}, LoRA(2, targets=("experts/", "query"), full_training_patterns=("mlp_norm",))),
        ("mixtral-tiny", {"scan_layers": True}, LoRA(2, full_training_patterns=("experts/up",))),
        ("mixtral-tiny", {"qk_norm": True, "dense_layers": (0,)}, LoRA(2, targets=("experts/(down|router)", "mlp/"))),
        ("griffin", {}, LoRA(2, targets=("attention/", "recurrent/(gate|input)/", "mlp/"))),
        ("griffin", {"pattern": ("recurrent",)}, LoRA(2, targets=("mlp/",))),
        ("rwkv7", {}, LoRA(2, targets=("time_mix/(key|output)/", "channel_mix/value/"))),
        (
            "roberta",
            {"task": "token_classification", "num_labels": 5},
            LoRA(2, full_training_patterns=("^token_classifier/",)),
        ),
    ],
)
def test_adapters_round_trip(name, overrides, lora, tmp_path):
    model = tiny_model(name, **overrides)
    trained = random_adapter(model, lora)
    save_adapter(tmp_path, model, lora, trained)
    loaded_lora, loaded_params = load_adapter(tmp_path, model)
    assert loaded_lora.rank == lora.rank
    assert loaded_lora.scale == lora.scale
    assert loaded_lora.specs(model.specs) == lora.specs(model.specs)
    if "vocab_multiple" in overrides:  # the padding of the vocabulary is not in files
        assert not jnp.any(loaded_params["head"]["lora_a"][61:])
        trained["head"]["lora_a"] = trained["head"]["lora_a"].at[61:].set(0)
    assert_trees_equal(loaded_params, trained)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoRA(2, targets=("zx/weight",)),
            r"mixer/zx/weight \(.*layers.0.mixer.in_proj.weight\) is not the weight of a",
        ),
        (
            LoRA(2, targets=("^head$",), full_training_patterns=("convolution/",)),
            "BC_convolution/bias is a part of backbone.layers.0.mixer.conv1d.bias in the transformers class",
        ),
    ],
)
def test_parts_of_tensors_have_no_adapters(lora, message, tmp_path):
    """A tensor of transformers' Mamba-2 contains several parameters of jaxlm."""
    model = tiny_model("mamba2", tie_embeddings=False)
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path, model, lora, random_adapter(model, lora))


def test_names_and_layouts_equal_those_of_peft(tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    name = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
    assert set(tensors) == {name.format(layer, factor) for layer in (0, 1) for factor in "AB"}
    assert tensors[name.format(0, "A")].shape == (4, 32)
    assert tensors[name.format(0, "B")].shape == (96, 4)
    trained = random_adapter(GPT, LoRA(4))
    pair = trained["layers"]["attention"]["qkv"]["weight"]
    np.testing.assert_array_equal(tensors[name.format(1, "A")], pair["lora_a"][1].T)
    np.testing.assert_array_equal(tensors[name.format(1, "B")], pair["lora_b"][1].reshape(4, 96).T)
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["target_modules"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"]
    assert config["modules_to_save"] is None


def test_fully_trained_modules_are_saved(tmp_path):
    model = tiny_model("bert", task="classification")
    lora = LoRA(2, full_training_patterns=("^classifier/",))
    config, tensors = save_random_adapter(tmp_path, model, lora)
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    assert tensors["base_model.model.classifier.weight"].shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "overrides", "pattern", "message"),
    [
        (
            "bert",
            {"task": "classification"},
            "classifier/weight",
            r"classifier/bias \(classifier.bias\) is not trained in full, but classifier/weight of the same",
        ),
        (  # a module with a submodule
            "xlnet",
            {},
            "attention/",
            r"attention_norm/bias \(.*\) is not trained in full, but .*same module \(transformer.layer.0.rel_attn\)",
        ),
        ("xlnet", {}, "^mask_embedding$", r"but mask_embedding of the same module \(transformer\) is: PEFT"),
        ("xlnet", {"task": "none"}, "^mask_embedding$", r"but mask_embedding of the same module \(the whole model\)"),
        (
            "bert",
            {},
            "^masked/",
            r"token_embedding \(cls.predictions.decoder.weight\) is not trained in full, but masked",
        ),
        (  # PEFT compares the ends of names
            "llama-tiny",
            {"task": "none"},
            "^final_norm",
            r"final_norm/scale \(norm\) is trained in full, so PEFT would also copy layers/attention_norm/scale",
        ),
    ],
)
def test_only_complete_modules_can_be_trained_in_full(name, overrides, pattern, message, tmp_path):
    model, lora = tiny_model(name, **overrides), LoRA(2, targets=("mlp/",), full_training_patterns=(pattern,))
    trained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), lora.specs(model.specs))
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path, model, lora, trained)


@pytest.mark.parametrize(
    ("name", "overrides", "patterns", "modules", "task_type"),
    [
        ("roberta", {"task": "classification"}, ("^classifier",), ["classifier"], "SEQ_CLS"),
        ("roberta", {"task": "classification"}, ("^classifier/",), ["classifier.out_proj"], None),
        ("xlnet", {"task": "classification"}, ("^classifier/",), ["logits_proj"], "SEQ_CLS"),
        ("xlnet", {}, ("attention",), ["transformer.layer.0.rel_attn", "transformer.layer.1.rel_attn"], None),
        ("bert", {"task": "none", "next_sentence": True}, (), None, None),
    ],
)
def test_modules_and_task_type_of_heads_and_nested_modules(name, overrides, patterns, modules, task_type, tmp_path):
    """PEFT adds some heads to ``modules_to_save`` itself, and saves a module with its submodules."""
    model, lora = tiny_model(name, **overrides), LoRA(2, targets=("mlp/",), full_training_patterns=patterns)
    trained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), lora.specs(model.specs))
    save_adapter(tmp_path, model, lora, trained)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (modules, task_type)
    base_names = {name.split(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" in name}
    assert base_names == {"transformer" if name == "xlnet" else name}  # the prefix of classes with a head


@pytest.mark.parametrize(
    ("name", "overrides", "second_name"),
    [
        ("gpt2-tiny", {"task": "none"}, None),
        ("llama-tiny", {"tie_embeddings": False}, None),
        ("llama-tiny", {"tie_embeddings": True}, "lm_head.weight"),
        ("llama-tiny", {"tie_embeddings": True, "task": "classification"}, None),
        ("bert", {"task": "classification"}, None),
        ("bert", {"task": "masked"}, "cls.predictions.decoder.weight"),
        ("t5", {"tie_embeddings": False}, "encoder.embed_tokens.weight"),
        ("t5", {"task": "none"}, "encoder.embed_tokens.weight"),
    ],
)
def test_a_table_that_transformers_uses_twice_cannot_be_trained_in_full(name, overrides, second_name, tmp_path):
    model, lora = tiny_model(name, **overrides), LoRA(2, full_training_patterns=("^token_embedding$",))
    trained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), lora.specs(model.specs))
    if second_name is None:
        save_adapter(tmp_path, model, lora, trained)
        load_adapter(tmp_path, model)
    else:
        with pytest.raises(ValueError, match=f"tensor twice .* and {second_name}.*, and PEFT trains only one copy"):
            save_adapter(tmp_path, model, lora, trained)


def test_the_scale_of_rank_stabilized_adapters(tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    rewrite(tmp_path, config | {"use_rslora": True}, tensors)
    assert load_adapter(tmp_path, GPT)[0].scale == pytest.approx(8 / 4**0.5)
    rewrite(tmp_path, config | {"use_rslora": None, "bias": None}, tensors)
    assert load_adapter(tmp_path, GPT)[0].scale == pytest.approx(8 / 4)


def test_dropout_of_an_adapter_gives_a_warning(tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    rewrite(tmp_path, config | {"lora_dropout": 0.1}, tensors)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is not applied in further training"):
        load_adapter(tmp_path, GPT)


def test_factors_in_half_precision_become_float32(tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    rewrite(tmp_path, config, {name: x.astype(np.float16) for name, x in tensors.items()})
    _, trained = load_adapter(tmp_path, GPT)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported: only 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"alpha_pattern": {"c_attn": 3}}, "alpha_pattern={'c_attn': 3} is not supported"),
        ({"an_option_of_next_year": 1}, "an_option_of_next_year=1 is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported: it changes the base"),
        ({"r": 0}, "r=0 must be at least 1"),
        ({"lora_alpha": 0}, "adapter_config.json: lora_alpha=0 must be positive"),
        ({"r": 8}, r"c_attn.lora_A.weight' has shape \[4, 32\], but r=8 .* require \[8, 32\]"),
    ],
)
def test_errors_name_unsupported_config_fields(change, message, tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    rewrite(tmp_path, config | change, tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, GPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.0.attn.c_attn.lora_A.weight": None}, "lacks 'transformer.h.0.attn.c_attn.lora_A.weight'"),
        ({"transformer.h.7.attn.c_attn.lora_A.weight": (4, 32)}, "no module 'transformer.h.7.attn.c_attn'"),
        ({"transformer.h.0.attn.c_attn.lora_magnitude_vector": (96,)}, "neither a LoRA factor nor a parameter"),
        (
            {"transformer.wte.lora_A.weight": (4, 128)},
            r"token_embedding \(transformer.wte.weight\) is not the",
        ),
        ({"transformer.ln_f.bias": (3,)}, r"ln_f.bias' has shape \[3\], but the model requires \[32\]"),
        ({"lm_head.base_layer.weight": (4, 4)}, "is a weight of the base model: save the adapter with"),
        (
            {"transformer.wte.weight": (128, 32)},
            r"this tensor twice \(transformer.wte.weight and lm_head.weight\), and PEFT trains only one copy. To save",
        ),
    ],
)
def test_errors_name_tensors_that_do_not_fit(change, message, tmp_path):
    config, tensors = save_random_adapter(tmp_path)
    for name, shape in change.items():
        full = f"base_model.model.{name}"
        tensors = {key: x for key, x in tensors.items() if key != full}
        if shape is not None:
            tensors[full] = np.zeros(shape, np.float32)
    rewrite(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, GPT)


def test_errors_for_missing_or_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory: nothing is downloaded"):
        load_adapter(tmp_path / "nothing", GPT)
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        load_adapter(tmp_path, GPT)
    config, tensors = save_random_adapter(tmp_path)
    rewrite(tmp_path, config, {name.removeprefix("base_model."): x for name, x in tensors.items()})
    with pytest.raises(ValueError, match="do not begin with 'base_model.model.'"):
        load_adapter(tmp_path, GPT)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated"):
        load_adapter(tmp_path, GPT)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="only as a pickle file .adapter_model.bin.* with PEFT and save it"):
        load_adapter(tmp_path, GPT)


def test_errors_for_models_and_weights_that_peft_does_not_support(tmp_path):
    lstm, lora = tiny_model("lstm"), LoRA(2, targets=("weight_input",))
    with pytest.raises(ValueError, match="family 'lstm' has no class in transformers"):
        save_adapter(tmp_path, lstm, lora, random_adapter(lstm, lora))
    xlnet, lora = tiny_model("xlnet"), LoRA(2)
    with pytest.raises(ValueError, match="attention/query/weight .* is not the weight of a linear module"):
        save_adapter(tmp_path, xlnet, lora, random_adapter(xlnet, lora))
    for name, model_type in (("mamba2", "mamba2"), ("falcon-h1-tiny", "falcon_h1")):
        model, lora = tiny_model(name), LoRA(2, targets=("output/weight",))
        with pytest.raises(
            ValueError, match=f"output/weight .* PEFT rejects .* out_proj in models of type '{model_type}'"
        ):
            save_adapter(tmp_path, model, lora, random_adapter(model, lora))
    with pytest.raises(ValueError, match="trained tree of LoRA.* do not match"):
        save_adapter(tmp_path, LLAMA, LoRA(2), random_adapter(LLAMA, LoRA(3)))


def test_a_directory_cannot_have_a_model_and_an_adapter(tmp_path):
    """transformers would load the base model of the adapter instead of the model."""
    params = initial_params(GPT)
    save_pretrained(tmp_path / "model", GPT, params)
    with pytest.raises(
        ValueError, match=r"model contains a model \(config.json, model.safetensors\).*another directory"
    ):
        save_random_adapter(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    save_random_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter contains an adapter \(adapter_config.json\).*another directory"):
        save_pretrained(tmp_path / "adapter", GPT, params)
    assert not (tmp_path / "adapter" / "config.json").exists()

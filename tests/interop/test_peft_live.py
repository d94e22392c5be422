"""Compare LoRA adapters with ``peft`` on torch: run with ``-m live`` and the extras ``reference`` and ``adapters``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.adapt import LoRA
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.interop.peft import load_adapter, save_adapter
from jaxlm.models import Model
from jaxlm.testing.helpers import relative_error, tiny_model

pytestmark = pytest.mark.live

SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 50, "n_positions": 16},
        {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 7},
    ),
    "gpt2_base": (
        "GPT2Model", "GPT2Config",
        {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 50, "n_positions": 16},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "bert": (
        "BertForSequenceClassification", "BertConfig", {**SMALL_BERT, "vocab_size": 50, "num_labels": 3},
        {"target_modules": ["query", "value", "attention.output.dense"], "task_type": "SEQ_CLS"},
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 32, "tie_word_embeddings": False,
        },
        {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "lm_head"], "use_rslora": True},
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 20, "vocab_size": 50, "max_position_embeddings": 32, "num_local_experts": 4,
        },
        {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]},
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
         "vocab_size": 50, "decoder_start_token_id": 0},
        {"target_modules": ["q", "v", "o", "wi"], "lora_alpha": 16},
    ),
}  # fmt: skip


def peft_model(case: str, directory: Path) -> Any:
    """Save a random base model and random adapters for it in ``directory``; returns the adapted model."""
    import peft
    import torch
    import transformers

    architecture, config, sizes, options = CASES[case]
    torch.manual_seed(1)
    base = getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(directory / "base", safe_serialization=True)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    # By default, PEFT also writes the full weight of a head that has LoRA factors.
    model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return model


def torch_outputs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of a torch model, or the hidden states of a base class."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=ids, **extra)
    return (result.logits if hasattr(result, "logits") else result.last_hidden_state).numpy()


def jaxlm_outputs(model: Model, params: Any, tokens: np.ndarray) -> Any:
    if model.reads_source:
        hidden, _ = model.apply(params, tokens[:, ::-1], source=tokens)
    elif model.config.task == "classification":
        hidden, _ = model.apply(params, tokens)
        return model.logits(params, model.pool(params, hidden))[:, 0]
    else:
        hidden, _ = model.apply(params, tokens)
    return hidden if model.config.task == "none" else model.logits(params, hidden)


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_give_the_same_outputs_and_round_trip(case: str, tmp_path: Path) -> None:
    import peft
    import transformers

    adapted_model = peft_model(case, tmp_path)
    tokens = np.random.default_rng(0).integers(1, 50, (2, 7)).astype(np.int32)
    expected = torch_outputs(adapted_model, tokens)
    model, params = load_pretrained(tmp_path / "base")
    lora, trained = load_adapter(tmp_path / "adapter", model)
    merged = lora.merge(trained, lora.frozen(model.specs, params))
    run = jax.jit(lambda params: jaxlm_outputs(model, params, tokens))
    assert relative_error(run(merged), expected) < 1e-5
    assert relative_error(run(params), expected) > 1e-2  # the adapters change the outputs

    save_adapter(tmp_path / "back", model, lora, trained, base_model=str(tmp_path / "base"))
    architecture = getattr(transformers, CASES[case][0])
    base = architecture.from_pretrained(tmp_path / "base").eval()
    reloaded_model = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    assert relative_error(torch_outputs(reloaded_model, tokens), expected) < 1e-5
    reloaded_lora, reloaded_trained = load_adapter(tmp_path / "back", model)
    assert reloaded_lora == lora
    assert all(map(np.array_equal, jax.tree.leaves(reloaded_trained), jax.tree.leaves(trained)))

    save_pretrained(tmp_path / "merged", model, merged)
    assert (
        relative_error(torch_outputs(architecture.from_pretrained(tmp_path / "merged").eval(), tokens), expected) < 1e-5
    )


def test_peft_loads_an_adapter_without_a_trained_head(tmp_path: Path) -> None:
    """If the head is not trained, the file has no task type. With one, PEFT would require tensors of the head."""
    import peft
    import transformers

    peft_model("bert", tmp_path)
    model, params = load_pretrained(tmp_path / "base")
    lora = LoRA(2, targets=("attention/output",))
    trained, _ = lora.split(model.specs, params, jax.random.key(0))
    save_adapter(tmp_path / "adapter2", model, lora, trained)
    assert json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())["task_type"] is None
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    tokens = np.random.default_rng(0).integers(1, 50, (2, 7)).astype(np.int32)
    expected = torch_outputs(base, tokens)
    reloaded_model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter2").eval()
    assert relative_error(torch_outputs(reloaded_model, tokens), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "overrides", "lora"),
    [
        ("bert", {"task": "none", "next_sentence": True}, LoRA(2)),
        ("xlnet", {}, LoRA(2, targets=("mlp/",), full_training_patterns=("attention",))),
        ("xlnet", {"task": "classification"}, LoRA(2, targets=("mlp/",))),
        ("llama-tiny", {"task": "none"}, LoRA(2, full_training_patterns=("norm",))),
        ("gemma-3-tiny", {}, LoRA(2, targets=("attention/", "mlp/"))),
        ("llama-tiny", {"pattern": ("full", "no_positions")}, LoRA(2)),  # SmolLM3
        ("roberta", {"task": "classification"}, LoRA(2, full_training_patterns=("^classifier",))),
        (
            "roberta",
            {"task": "classification"},
            LoRA(2, targets=("^classifier_dense/weight",), full_training_patterns=("^classifier/",)),
        ),
    ],
)
def test_adapters_of_jaxlm_have_the_same_effect_in_peft(
    name: str, overrides: dict[str, Any], lora: LoRA, tmp_path: Path
) -> None:
    """PEFT ignores tensors with unknown names. So the test compares outputs with those of the merged model."""
    import peft
    import transformers

    model = tiny_model(name, **overrides)
    random = np.random.default_rng(0)
    params, trained = jax.tree.map(
        lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), (model.specs, lora.specs(model.specs))
    )
    save_adapter(tmp_path / "adapter", model, lora, trained)
    save_pretrained(tmp_path / "base", model, params)
    save_pretrained(tmp_path / "merged", model, lora.merge(trained, lora.frozen(model.specs, params)))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    tokens = random.integers(1, 50, (2, 7)).astype(np.int32)
    base = architecture.from_pretrained(tmp_path / "base").eval()
    expected = torch_outputs(architecture.from_pretrained(tmp_path / "merged").eval(), tokens)
    assert relative_error(torch_outputs(base, tokens), expected) > 1e-2  # the adapter changes the outputs
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(torch_outputs(adapted, tokens), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"query": 2}}, r"rank_pattern=\{'query': 2\} is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"layers_to_transform": [1]}, "lacks .* only some of the layers"),
        ({"target_modules": ["word_embeddings"]}, "lora_embedding_A"),
    ],
)
def test_errors_name_unsupported_options_of_peft(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    import peft
    import transformers

    base = transformers.BertModel(transformers.BertConfig(**SMALL_BERT, vocab_size=50))
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["query"], **options}))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model, _ = load_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter", model)

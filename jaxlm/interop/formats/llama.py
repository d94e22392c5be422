"""Formats of :mod:`jaxlm.models.llama`: Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats import experts
from jaxlm.interop.formats.format import DECODER_HEADS, TRANSPOSED, Format, integer
from jaxlm.interop.formats.rotary import read_rotary, write_rotary
from jaxlm.models.llama import Config, head_sizes


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    kv_heads, num_heads = integer(config, "num_key_value_heads"), integer(config, "num_attention_heads", 32)
    if kv_heads is not None and (kv_heads < 1 or num_heads % kv_heads):
        raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={num_heads}")
    return {"num_kv_heads": kv_heads, "head_dim": integer(config, "head_dim"), **read_rotary(config, 1.0)}


def _write_fields(cfg: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_key_value_heads": head_sizes(cfg)[1]}
    if cfg.head_dim is not None:
        fields["head_dim"] = cfg.head_dim
    return {**fields, **write_rotary(cfg.rotary_scaling, cfg.max_positions)}


def _read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}  # Mistral's defaults
    return {**_read_fields(config), "window": integer(config, "sliding_window")}


def _write_mistral(cfg: Config) -> dict[str, Any]:
    return {**_write_fields(cfg), "sliding_window": cfg.window}


def _write_mixtral(cfg: Config) -> dict[str, Any]:
    if cfg.num_experts is None:
        raise ValueError("model_type='mixtral' needs num_experts: a model without experts has another model_type")
    return _write_mistral(cfg)


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_mistral({"sliding_window": None, **config})  # Mixtral's default


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 32, **config}  # Qwen2's default
    window, layers = None, integer(config, "num_hidden_layers", 32)
    if config.get("use_sliding_window", False):
        first = integer(config, "max_window_layers", 28)
        kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
        num_windowed = kinds.count("sliding_attention")
        if 0 < num_windowed < layers:
            raise ValueError(
                f"a sliding window in {num_windowed} of {layers} layers is not supported: use it in all layers or none "
                f"(max_window_layers={first}, layer_types={config.get('layer_types')!r})"
            )
        window = integer(config, "sliding_window", 4096) if num_windowed else None
    return {**_read_fields(config), "window": window}


def _write_qwen2(cfg: Config) -> dict[str, Any]:
    # These fields are also written without a window, so that they replace the window of a loaded config.
    kind = "full_attention" if cfg.window is None else "sliding_attention"
    fields = {
        **_write_fields(cfg),
        "use_sliding_window": cfg.window is not None,
        "layer_types": [kind] * cfg.num_layers,
    }
    return fields if cfg.window is None else {**fields, "sliding_window": cfg.window, "max_window_layers": 0}


def _read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_qwen2({"head_dim": 128, **config})  # Qwen3's default


def _write_qwen3(cfg: Config) -> dict[str, Any]:
    return {**_write_qwen2(cfg), "head_dim": head_sizes(cfg)[2]}


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 4, **config}  # Qwen3-MoE's default
    num_layers = integer(config, "num_hidden_layers", 24)
    uses_window = config.get("use_sliding_window", False)
    return {
        **_read_fields(config),
        **experts.read_experts(config, num_layers, 128),
        "window": integer(config, "sliding_window", 4096) if uses_window else None,
    }


def _write_qwen3_moe(cfg: Config) -> dict[str, Any]:
    fields = {
        **_write_fields(cfg),
        **experts.write_experts(cfg),
        "head_dim": head_sizes(cfg)[2],
        "use_sliding_window": cfg.window is not None,
    }
    return fields if cfg.window is None else {**fields, "sliding_window": cfg.window}


_DENSE = {"qk_norm": False, "num_experts": None}
_LLAMA = Format(
    architectures={
        "LlamaForCausalLM": {"task": "causal"},
        "LlamaModel": {"task": "none"},
        "LlamaForSequenceClassification": {"task": "classification"},
        "LlamaForTokenClassification": {"task": "token_classification"},
    },
    model_type="llama",
    prefix="model.",
    default_fields={**_DENSE, "qkv_bias": False, "window": None},
    hf_name_of_field={
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "embed_dim": "hidden_size",
        "mlp_dim": "intermediate_size",
        "rotary_base": "rope_theta",
        "norm_epsilon": "rms_norm_eps",
        "init_stddev": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
    },
    read_fields=_read_fields,
    write_fields=_write_fields,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
    tensors={
        "token_embedding": "embed_tokens.weight",
        "layers/attention_norm/scale": "layers.{layer}.input_layernorm.weight",
        "layers/attention/query/weight": "layers.{layer}.self_attn.q_proj.weight",
        "layers/attention/query/bias": "layers.{layer}.self_attn.q_proj.bias",
        "layers/attention/key/weight": "layers.{layer}.self_attn.k_proj.weight",
        "layers/attention/key/bias": "layers.{layer}.self_attn.k_proj.bias",
        "layers/attention/value/weight": "layers.{layer}.self_attn.v_proj.weight",
        "layers/attention/value/bias": "layers.{layer}.self_attn.v_proj.bias",
        "layers/attention/output/weight": "layers.{layer}.self_attn.o_proj.weight",
        "layers/mlp_norm/scale": "layers.{layer}.post_attention_layernorm.weight",
        **{
            f"layers/mlp/{name}/weight": f"layers.{{layer}}.mlp.{hf_name}.weight"
            for name, hf_name in experts.SWIGLU.items()
        },
        "final_norm/scale": "norm.weight",
    },
    unprefixed_tensors=DECODER_HEADS,
    tied_tensors={"lm_head.weight": "token_embedding"},  # in files of models with a tied head
    layouts={
        **{f"layers/attention/{name}/weight": ((1, 2), (0,)) for name in ("query", "key", "value")},
        **{f"layers/attention/{name}/bias": ((0, 1),) for name in ("query", "key", "value")},
        "layers/attention/output/weight": ((2,), (0, 1)),
        **{f"layers/mlp/{name}/weight": TRANSPOSED for name in experts.SWIGLU},
        **{f"{name}/weight": TRANSPOSED for name in ("classifier", "token_classifier", "span")},
    },
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # in old files
)
_MISTRAL = dataclasses.replace(
    _LLAMA,
    architectures={
        "MistralForCausalLM": {"task": "causal"},
        "MistralModel": {"task": "none"},
        "MistralForSequenceClassification": {"task": "classification"},
        "MistralForTokenClassification": {"task": "token_classification"},
        "MistralForQuestionAnswering": {"task": "span_qa"},
    },
    model_type="mistral",
    default_fields={**_DENSE, "qkv_bias": False, "mlp_dim": 14336, "max_positions": 131072},
    read_fields=_read_mistral,
    write_fields=_write_mistral,
    required={"hidden_act": "silu"},
)
_MIXTRAL = dataclasses.replace(
    _MISTRAL,
    architectures={name.replace("Mistral", "Mixtral"): fields for name, fields in _MISTRAL.architectures.items()},
    model_type="mixtral",
    default_fields={
        "qkv_bias": False,
        "qk_norm": False,
        "expert_dim": None,
        "expert_interval": 1,
        "dense_layers": (),
        "renormalize_experts": True,
        "num_experts": 8,
        "experts_per_token": 2,
        "mlp_dim": 14336,
        "max_positions": 131072,
        "rotary_base": 1e6,
        "norm_epsilon": 1e-5,
    },
    hf_name_of_field={
        **_LLAMA.hf_name_of_field,
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    read_fields=_read_mixtral,
    write_fields=_write_mixtral,
    required={"hidden_act": "silu", "router_jitter_noise": 0.0},
    tensors={
        **_LLAMA.tensors,
        "layers/experts/router/weight": "layers.{layer}.block_sparse_moe.gate.weight",
        **{
            f"layers/experts/{name}/weight": f"layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{hf_name}.weight"
            for name, hf_name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
    },
    layouts={**_LLAMA.layouts, **experts.LAYOUTS},
)
_QWEN2 = dataclasses.replace(
    _LLAMA,
    architectures={
        "Qwen2ForCausalLM": {"task": "causal"},
        "Qwen2Model": {"task": "none"},
        "Qwen2ForSequenceClassification": {"task": "classification"},
        "Qwen2ForTokenClassification": {"task": "token_classification"},
    },
    model_type="qwen2",
    default_fields={**_DENSE, "qkv_bias": True, "vocab_size": 151936, "mlp_dim": 22016, "max_positions": 32768},
    read_fields=_read_qwen2,
    write_fields=_write_qwen2,
    required={"hidden_act": "silu"},
    token_ids={},
)
_QWEN3 = dataclasses.replace(
    _QWEN2,
    architectures={name.replace("Qwen2", "Qwen3"): fields for name, fields in _QWEN2.architectures.items()},
    model_type="qwen3",
    default_fields={
        "qk_norm": True,
        "num_experts": None,
        "qkv_bias": False,
        "vocab_size": 151936,
        "mlp_dim": 22016,
        "max_positions": 32768,
    },
    read_fields=_read_qwen3,
    write_fields=_write_qwen3,
    required={"hidden_act": "silu", "attention_bias": False},
    tensors={
        **_LLAMA.tensors,
        "layers/attention/query_norm/scale": "layers.{layer}.self_attn.q_norm.weight",
        "layers/attention/key_norm/scale": "layers.{layer}.self_attn.k_norm.weight",
    },
)
_QWEN3_MOE = dataclasses.replace(
    _QWEN3,
    architectures={name.replace("Qwen2", "Qwen3Moe"): fields for name, fields in _QWEN2.architectures.items()},
    model_type="qwen3_moe",
    default_fields={
        "qk_norm": True,
        "qkv_bias": False,
        "vocab_size": 151936,
        "num_layers": 24,
        "embed_dim": 2048,
        "mlp_dim": 6144,
        "max_positions": 32768,
        "expert_dim": 768,
        "experts_per_token": 8,
        "renormalize_experts": False,
    },
    hf_name_of_field={**_LLAMA.hf_name_of_field, **experts.HF_NAME_OF_FIELD},
    read_fields=_read_qwen3_moe,
    write_fields=_write_qwen3_moe,
    tensors={**_QWEN3.tensors, **experts.TENSORS},
    layouts={**_LLAMA.layouts, **experts.LAYOUTS},
)


def _span_qa(table: Format, architecture: str) -> Format:
    """The format of a question-answering class, in which the base model has another prefix than in other classes."""
    return dataclasses.replace(
        table, architectures={architecture: {"task": "span_qa"}}, prefix="transformer.",
        default_fields={**table.default_fields, "task": "span_qa"},
    )  # fmt: skip


FORMATS = (
    _span_qa(_LLAMA, "LlamaForQuestionAnswering"),
    _LLAMA,
    _MISTRAL,
    _MIXTRAL,
    _span_qa(_QWEN2, "Qwen2ForQuestionAnswering"),
    _QWEN2,
    _span_qa(_QWEN3, "Qwen3ForQuestionAnswering"),
    _QWEN3,
    _span_qa(_QWEN3_MOE, "Qwen3MoeForQuestionAnswering"),
    _QWEN3_MOE,
)

"""Formats of :mod:`jaxlm.models.llama`: Llama, Mistral and Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxlm.interop.formats.format import TRANSPOSED, Format
from jaxlm.models.llama import Config, head_sizes
from jaxlm.nn.attention.rotary import Kind, RotaryScaling

_SCALING = {
    "factor": ("factor", get_args(Kind)),
    "original_positions": ("original_max_position_embeddings", ("llama3", "yarn")),
    "low_frequency_factor": ("low_freq_factor", ("llama3",)),
    "high_frequency_factor": ("high_freq_factor", ("llama3",)),
    "beta_fast": ("beta_fast", ("yarn",)),
    "beta_slow": ("beta_slow", ("yarn",)),
    "truncate": ("truncate", ("yarn",)),
    "attention_factor": ("attention_factor", ("yarn",)),
}
"""Field of ``RotaryScaling`` -> its name in Hugging Face files, and the kinds of scaling that have this field."""


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    kv_heads, num_heads = _integer(config, "num_key_value_heads"), _integer(config, "num_attention_heads", 32)
    if kv_heads is not None and (kv_heads < 1 or num_heads % kv_heads):
        raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={num_heads}")
    fields: dict[str, Any] = {
        "num_kv_heads": kv_heads,
        "head_dim": _integer(config, "head_dim"),
    }
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    hf_scaling = config.get(name) or {}
    if not isinstance(hf_scaling, dict):
        raise ValueError(f"{name}={hf_scaling!r} must be a JSON object or null")
    hf_scaling = dict(hf_scaling)
    if "rope_theta" in hf_scaling:  # transformers 5 writes the field here
        fields["rotary_base"] = hf_scaling.pop("rope_theta")
    old_kind = hf_scaling.pop("type", "default")
    kind = hf_scaling.pop("rope_type", old_kind)
    if kind == "default":
        return fields
    if kind == "dynamic":
        hf_scaling.pop("original_max_position_embeddings", None)  # transformers does not read it
    if kind not in get_args(Kind):
        raise ValueError(
            f"rope_type={kind!r} is not supported in rope_scaling: choose from default, {', '.join(get_args(Kind))}"
        )
    field_of = {name: field for field, (name, kinds) in _SCALING.items() if kind in kinds}
    for name, value in hf_scaling.items():
        if name not in field_of or isinstance(value, str):
            raise ValueError(
                f"{name}={value!r} of {kind} rope_scaling is not supported: the supported fields are "
                f"{', '.join(field_of)}; their values must not be strings"
            )
    scaling = {field_of[name]: value for name, value in hf_scaling.items() if value is not None}
    if "factor" not in scaling:
        raise ValueError(f"rope_scaling of type {kind} lacks its factor")
    if kind in ("dynamic", "yarn"):
        scaling.setdefault("original_positions", config.get("max_position_embeddings"))
    return {**fields, "rotary_scaling": RotaryScaling(kind, **scaling)}


def _write_fields(cfg: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_key_value_heads": head_sizes(cfg)[1]}
    if cfg.head_dim is not None:
        fields["head_dim"] = cfg.head_dim
    scaling = cfg.rotary_scaling
    if scaling is None:
        return fields
    if scaling.kind == "dynamic" and scaling.original_positions != cfg.max_positions:
        raise ValueError(
            f"dynamic rotary scaling from {scaling.original_positions} to max_positions={cfg.max_positions} has no "
            "counterpart in Hugging Face files, because transformers computes the base from the length of each text"
        )
    hf_scaling = {name: getattr(scaling, field) for field, (name, kinds) in _SCALING.items() if scaling.kind in kinds}
    hf_scaling = {name: value for name, value in hf_scaling.items() if value is not None}
    return {**fields, "rope_scaling": {"rope_type": scaling.kind, **hf_scaling}}


def _read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}  # Mistral's defaults
    return {**_read_fields(config), "window": _integer(config, "sliding_window")}


def _write_mistral(cfg: Config) -> dict[str, Any]:
    return {**_write_fields(cfg), "sliding_window": cfg.window}


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 32, **config}  # Qwen2's default
    window, layers = None, _integer(config, "num_hidden_layers", 32)
    if config.get("use_sliding_window", False):
        first = _integer(config, "max_window_layers", 28)
        kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
        num_windowed = kinds.count("sliding_attention")
        if 0 < num_windowed < layers:
            raise ValueError(
                f"a sliding window in {num_windowed} of {layers} layers is not supported: use it in all layers or none "
                f"(max_window_layers={first}, layer_types={config.get('layer_types')!r})"
            )
        window = _integer(config, "sliding_window", 4096) if num_windowed else None
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


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> Any:
    value = config.get(name, default)
    if value is not None and type(value) is not int:
        raise ValueError(f"{name}={value!r} is not an integer")
    return value


_LLAMA = Format(
    architectures={
        "LlamaForCausalLM": {"task": "causal"},
        "LlamaModel": {"task": "none"},
        "LlamaForSequenceClassification": {"task": "classification"},
        "LlamaForTokenClassification": {"task": "token_classification"},
    },
    model_type="llama",
    prefix="model.",
    default_fields={"qkv_bias": False, "window": None},
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
        "layers/mlp/gate/weight": "layers.{layer}.mlp.gate_proj.weight",
        "layers/mlp/up/weight": "layers.{layer}.mlp.up_proj.weight",
        "layers/mlp/down/weight": "layers.{layer}.mlp.down_proj.weight",
        "final_norm/scale": "norm.weight",
    },
    unprefixed_tensors={
        "head": "lm_head.weight",
        "classifier/weight": "score.weight",
        "token_classifier/weight": "score.weight",
        "token_classifier/bias": "score.bias",
        "span/weight": "qa_outputs.weight",
        "span/bias": "qa_outputs.bias",
    },
    tied_tensors={"lm_head.weight": "token_embedding"},  # in files of models with a tied head
    layouts={
        **{f"layers/attention/{name}/weight": ((1, 2), (0,)) for name in ("query", "key", "value")},
        **{f"layers/attention/{name}/bias": ((0, 1),) for name in ("query", "key", "value")},
        "layers/attention/output/weight": ((2,), (0, 1)),
        **{f"layers/mlp/{name}/weight": TRANSPOSED for name in ("gate", "up", "down")},
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
    default_fields={"qkv_bias": False, "mlp_dim": 14336, "max_positions": 131072},
    read_fields=_read_mistral,
    write_fields=_write_mistral,
    required={"hidden_act": "silu"},
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
    default_fields={"qkv_bias": True, "vocab_size": 151936, "mlp_dim": 22016, "max_positions": 32768},
    read_fields=_read_qwen2,
    write_fields=_write_qwen2,
    required={"hidden_act": "silu"},
    token_ids={},
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
    _span_qa(_QWEN2, "Qwen2ForQuestionAnswering"),
    _QWEN2,
)

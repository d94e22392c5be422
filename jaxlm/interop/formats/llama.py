"""Formats of :mod:`jaxlm.models.llama`: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3 and Gemma 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_value
from jaxlm.interop.formats import decoders, experts
from jaxlm.interop.formats.format import (
    Format,
    class_with_prefix,
    classes,
    module_tensors,
    read_integer,
    shortest_pattern,
    usual_fields,
)
from jaxlm.interop.formats.rotary import read_rotary, write_rotary
from jaxlm.models.llama import Config, LayerKind, head_sizes, layer_kinds


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    kv_heads, head_dim = (read_integer(config, name, nullable=True) for name in ("num_key_value_heads", "head_dim"))
    num_heads = read_integer(config, "num_attention_heads", 32)
    if kv_heads is not None and (kv_heads < 1 or num_heads % kv_heads):
        raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={num_heads}")
    return {"num_kv_heads": kv_heads, "head_dim": head_dim, **read_rotary(config, 1.0)}


def _write_fields(cfg: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_key_value_heads": head_sizes(cfg)[1]}
    if cfg.head_dim is not None:
        fields["head_dim"] = cfg.head_dim
    return {**fields, **write_rotary(cfg.rotary_scaling, cfg.max_positions)}


def _read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}  # Mistral's defaults
    return {**_read_fields(config), "window": read_integer(config, "sliding_window", nullable=True)}


def _write_mistral(cfg: Config) -> dict[str, Any]:
    fields = {**_write_fields(cfg), "sliding_window": cfg.window}
    if cfg.rotary_scaling is not None:  # head_dim is null by default, but some kinds of scaling in transformers read it
        fields["head_dim"] = head_sizes(cfg)[2]
    return fields


def _write_mixtral(cfg: Config) -> dict[str, Any]:
    if cfg.num_experts is None:
        raise ValueError("model_type='mixtral' needs num_experts: a model without experts has another model_type")
    return _write_mistral(cfg)


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_mistral({"sliding_window": None, **config})  # Mixtral's default


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 32, **config}  # Qwen2's default
    num_layers = read_integer(config, "num_hidden_layers", 32)
    window, pattern = None, None
    if config.get("use_sliding_window", False):
        types = _layer_list(config, "layer_types", num_layers)
        if types is None and config.get("sliding_window", 4096) is not None:
            first = read_integer(config, "max_window_layers", 28)
            types = [_TYPE_OF_KIND["full" if layer < first else "window"] for layer in range(num_layers)]
        kinds = _layer_kinds(types or [])
        if "window" in kinds:
            window, pattern = read_integer(config, "sliding_window", 4096), _pattern(kinds)
    return {**_read_fields(config), "window": window, "pattern": pattern}


def _write_qwen2(cfg: Config) -> dict[str, Any]:
    # use_sliding_window and layer_types are also written for a model without a window. Otherwise, saving would keep
    # these fields of a loaded config with a window.
    types = _layer_types(cfg, "qwen2")
    fields = {**_write_fields(cfg), "use_sliding_window": cfg.window is not None, "layer_types": types}
    if cfg.window is None:
        return fields
    first_window = layer_kinds(cfg).index("window")
    return {**fields, "sliding_window": cfg.window, "max_window_layers": first_window}


def _read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    return _read_qwen2({"head_dim": 128, **config})  # Qwen3's default


def _write_qwen3(cfg: Config) -> dict[str, Any]:
    return {**_write_qwen2(cfg), "head_dim": head_sizes(cfg)[2]}


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 4, **config}  # Qwen3-MoE's default
    num_layers = read_integer(config, "num_hidden_layers", 24)
    uses_window = config.get("use_sliding_window", False)
    return {
        **_read_fields(config),
        **experts.read_experts(config, num_layers, 128),
        "window": read_integer(config, "sliding_window", 4096, nullable=True) if uses_window else None,
    }


def _write_qwen3_moe(cfg: Config) -> dict[str, Any]:
    fields = {
        **_write_fields(cfg),
        **experts.write_experts(cfg),
        "head_dim": head_sizes(cfg)[2],
        "use_sliding_window": cfg.window is not None,
    }
    return fields if cfg.window is None else {**fields, "sliding_window": cfg.window}


def _pattern(kinds: list[LayerKind]) -> tuple[LayerKind, ...] | None:
    """The shortest pattern whose repetition gives these kinds; None if all kinds are ``full`` or all are ``window``."""
    pattern = shortest_pattern(kinds)
    return None if pattern in ((), ("full",), ("window",)) else pattern


def _layer_list(config: Mapping[str, Any], name: str, num_layers: int) -> list[Any] | None:
    """The first ``num_layers`` entries of a list in ``config.json``; None if the list is missing or null."""
    values = config.get(name)
    if values is not None and (not isinstance(values, list) or len(values) < num_layers):
        raise ValueError(f"{name}={values!r} must be a list with one entry for each of {num_layers} layers")
    return None if values is None else values[:num_layers]


_TYPE_OF_KIND: dict[LayerKind, str] = {"full": "full_attention", "window": "sliding_attention"}
"""Kind of layer -> its name in ``layer_types``."""


def _layer_types(cfg: Config, model_type: str) -> list[str]:
    """The field ``layer_types``, for formats without layers that lack positions."""
    kinds = layer_kinds(cfg)
    if "no_positions" in kinds:
        raise ValueError(f"a model with no_positions layers cannot be written as model_type={model_type!r}")
    return [_TYPE_OF_KIND[kind] for kind in kinds]


def _layer_kinds(types: list[Any]) -> list[LayerKind]:
    """The kind of each layer, from the names in ``layer_types``."""
    kind_of = {name: kind for kind, name in _TYPE_OF_KIND.items()}
    if unknown := {name for name in types if name not in kind_of}:
        raise ValueError(f"layer_types has {unknown}: choose from {', '.join(kind_of)}")
    return [kind_of[name] for name in types]


def _read_smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 4, **config}  # SmolLM3's default
    num_layers = read_integer(config, "num_hidden_layers", 36)
    has_rotary = _layer_list(config, "no_rope_layers", num_layers)  # 1: the layer has rotary positions
    if has_rotary is None:
        interval = read_integer(config, "no_rope_layer_interval", 4, minimum=1)
        has_rotary = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    kinds: list[LayerKind] = ["full" if rotary else "no_positions" for rotary in has_rotary]
    return {**_read_fields(config), "pattern": _pattern(kinds)}


def _write_smollm3(cfg: Config) -> dict[str, Any]:
    kinds = layer_kinds(cfg)
    if "window" in kinds:
        raise ValueError("a model with a window cannot be written as model_type='smollm3'")
    fields = {**_write_fields(cfg), "layer_types": ["full_attention"] * cfg.num_layers}
    return {**fields, "no_rope_layers": [int(kind == "full") for kind in kinds]}


_GEMMA3_PERIOD = 6
"""In Gemma 3, every sixth layer has no window."""


def _read_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 4, "head_dim": 256, **config}  # Gemma 3's defaults
    num_layers, scalar = read_integer(config, "num_hidden_layers", 26), config.get("query_pre_attn_scalar", 256)
    check_value(float, scalar, "query_pre_attn_scalar")
    if scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar={scalar!r} must be above 0")
    types = _layer_list(config, "layer_types", num_layers)
    if types is None:
        period = read_integer(config, "sliding_window_pattern", _GEMMA3_PERIOD, minimum=1)
        types = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(num_layers)]
    kinds = _layer_kinds(types)
    window = read_integer(config, "sliding_window", 4096) if "window" in kinds else None
    base = config.get("rope_local_base_freq", 10000.0)
    rope = config.get("rope_parameters")
    # transformers 5 has one object for each type of layer
    if isinstance(rope, dict) and not rope.keys().isdisjoint(_TYPE_OF_KIND.values()):
        local = {**(rope.get("sliding_attention") or {})}
        base = local.pop("rope_theta", base)
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type={local['rope_type']!r} of sliding_attention is not supported: only 'default' is supported"
            )
        config = {**config, "rope_parameters": rope.get("full_attention")}
    return {
        **_read_fields(config), "pattern": _pattern(kinds), "window": window,
        "window_rotary_base": None if window is None else base, "attention_scale": scalar**-0.5,
    }  # fmt: skip


def _write_gemma3(cfg: Config) -> dict[str, Any]:
    types, width = _layer_types(cfg, "gemma3_text"), head_sizes(cfg)[2]
    if cfg.attention_scale is not None and cfg.attention_scale <= 0:
        raise ValueError(f"model_type='gemma3_text' needs a positive attention_scale, got {cfg.attention_scale}")
    if cfg.window is not None and cfg.window_rotary_base is None:
        raise ValueError(
            "model_type='gemma3_text' needs window_rotary_base: set it to rotary_base (rotary_scaling then has no "
            "effect on the layers with a window)"
        )
    fields: dict[str, Any] = {
        "head_dim": width,
        "query_pre_attn_scalar": width if cfg.attention_scale is None else cfg.attention_scale**-2,
        "layer_types": types,
    }
    if cfg.window is not None:
        fields |= {"sliding_window": cfg.window, "rope_local_base_freq": cfg.window_rotary_base}
    return {**_write_fields(cfg), **fields}


_LLAMA_BLOCK = {
    "block": "llama", "attention_scale": None, "window_rotary_base": None, "qk_norm": False, "qkv_bias": False,
}  # fmt: skip
_NO_PATTERN = {**_LLAMA_BLOCK, "pattern": None}
_NO_EXPERTS = {**_NO_PATTERN, "num_experts": None}
_LAYER = "layers.{layer}."
_HEAD_NORMS = module_tensors("layers/attention/", f"{_LAYER}self_attn.", query_norm="q_norm", key_norm="k_norm")
_LLAMA = Format(
    architectures=classes("Llama", *decoders.TASKS),
    model_type="llama",
    prefix="model.",
    default_fields={**_NO_EXPERTS, "window": None},
    none_means={
        "attention_scale": lambda cfg: head_sizes(cfg)[2] ** -0.5,
        "expert_dim": lambda cfg: cfg.mlp_dim,
        "pattern": lambda cfg: ("full",) if cfg.window is None else ("window",),
    },
    hf_name_of_field={**decoders.FIELDS, **usual_fields("num_heads", "attention_dropout")},
    read_fields=_read_fields,
    write_fields=_write_fields,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
    tensors={
        "token_embedding": "embed_tokens.weight",
        **module_tensors("layers/attention/", f"{_LAYER}self_attn.", **decoders.ATTENTION),
        **module_tensors("layers/mlp/", f"{_LAYER}mlp.", **decoders.SWIGLU),
        **module_tensors("layers/", _LAYER, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
        **module_tensors("", "", final_norm="norm"),
    },
    unprefixed_tensors=decoders.HEADS,
    tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # in old files
)
_MISTRAL = dataclasses.replace(
    _LLAMA,
    architectures=classes("Mistral", *decoders.TASKS, "span_qa"),
    model_type="mistral",
    default_fields={**_NO_EXPERTS, "mlp_dim": 14336, "max_positions": 131072},
    read_fields=_read_mistral,
    write_fields=_write_mistral,
    required={"hidden_act": "silu"},
)
_MIXTRAL = dataclasses.replace(
    _MISTRAL,
    architectures=classes("Mixtral", *decoders.TASKS, "span_qa"),
    model_type="mixtral",
    not_null=("num_local_experts",),
    default_fields={
        **_MISTRAL.default_fields,
        "expert_dim": None,
        "expert_interval": 1,
        "dense_layers": (),
        "renormalize_experts": True,
        "num_experts": 8,
        "experts_per_token": 2,
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
        **module_tensors("layers/experts/", f"{_LAYER}block_sparse_moe.", router="gate"),
        **module_tensors(
            "layers/experts/", f"{_LAYER}block_sparse_moe.experts.{{expert}}.", gate="w1", up="w3", down="w2"
        ),
    },
)
_QWEN2 = dataclasses.replace(
    _LLAMA,
    architectures=classes("Qwen2", *decoders.TASKS),
    model_type="qwen2",
    default_fields={
        **_LLAMA_BLOCK,
        "num_experts": None,
        "qkv_bias": True,
        "vocab_size": 151936,
        "mlp_dim": 22016,
        "max_positions": 32768,
    },
    read_fields=_read_qwen2,
    write_fields=_write_qwen2,
    required={"hidden_act": "silu"},
    token_ids={},
)
_QWEN3 = dataclasses.replace(
    _QWEN2,
    architectures=classes("Qwen3", *decoders.TASKS),
    model_type="qwen3",
    default_fields={**_QWEN2.default_fields, "qk_norm": True, "qkv_bias": False},
    read_fields=_read_qwen3,
    write_fields=_write_qwen3,
    required={"hidden_act": "silu", "attention_bias": False},
    tensors={**_LLAMA.tensors, **_HEAD_NORMS},
)
_QWEN3_MOE = dataclasses.replace(
    _QWEN3,
    architectures=classes("Qwen3Moe", *decoders.TASKS),
    model_type="qwen3_moe",
    default_fields={
        **_NO_PATTERN,
        "qk_norm": True,
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
)


_SMOLLM3 = dataclasses.replace(
    _LLAMA,
    architectures=classes("SmolLM3", *decoders.TASKS),
    model_type="smollm3",
    default_fields={
        **_LLAMA_BLOCK,
        "num_experts": None,
        "window": None,
        "vocab_size": 128256,
        "num_layers": 36,
        "num_heads": 16,
        "embed_dim": 2048,
        "max_positions": 32768,
        "rotary_base": 2e6,
        "tie_embeddings": True,
    },
    read_fields=_read_smollm3,
    write_fields=_write_smollm3,
    required={**_LLAMA.required, "use_sliding_window": False, "sliding_window": None},
    token_ids={"pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001},
)
_GEMMA3 = dataclasses.replace(
    _LLAMA,
    architectures={
        "Gemma3ForCausalLM": {"task": "causal"},
        "Gemma3TextForSequenceClassification": {"task": "classification"},
    },
    model_type="gemma3_text",
    not_null=("rope_local_base_freq",),
    default_fields={
        "block": "gemma",
        "qk_norm": True,
        "num_experts": None,
        "qkv_bias": False,
        "vocab_size": 262208,
        "num_layers": 26,
        "num_heads": 8,
        "embed_dim": 2304,
        "mlp_dim": 9216,
        "max_positions": 131072,
        "rotary_base": 1e6,
        "tie_embeddings": True,
    },
    read_fields=_read_gemma3,
    write_fields=_write_gemma3,
    required={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    token_ids={"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    tensors={
        **_LLAMA.tensors,
        **_HEAD_NORMS,
        **module_tensors("layers/", _LAYER, attention_output_norm="post_attention_layernorm"),
        **module_tensors("layers/", _LAYER, mlp_norm="pre_feedforward_layernorm"),
        **module_tensors("layers/", _LAYER, mlp_output_norm="post_feedforward_layernorm"),
    },
)


FORMATS = (
    class_with_prefix(_LLAMA, "LlamaForQuestionAnswering", "span_qa", "transformer."),
    _LLAMA,
    _MISTRAL,
    _MIXTRAL,
    class_with_prefix(_QWEN2, "Qwen2ForQuestionAnswering", "span_qa", "transformer."),
    _QWEN2,
    class_with_prefix(_QWEN3, "Qwen3ForQuestionAnswering", "span_qa", "transformer."),
    _QWEN3,
    class_with_prefix(_QWEN3_MOE, "Qwen3MoeForQuestionAnswering", "span_qa", "transformer."),
    _QWEN3_MOE,
    class_with_prefix(_SMOLLM3, "SmolLM3ForQuestionAnswering", "span_qa", "transformer."),
    _SMOLLM3,
    class_with_prefix(_GEMMA3, "Gemma3TextModel", "none", ""),
    _GEMMA3,  # the last format is the default for files without architectures
)

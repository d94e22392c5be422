"""Format of :mod:`jaxlm.models.gated_deltanet`: Qwen3-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from jaxlm.models.common import layer_kinds
from jaxlm.models.gated_deltanet import Config, Mixer

_LAYER_TYPES: dict[str, Mixer] = {"linear_attention": "delta_rule", "full_attention": "attention"}


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    num_layers = read_integer(config, "num_hidden_layers", Config.num_layers)
    fields = experts.read_experts(config, num_layers, 512)
    if fields["num_experts"] is not None:
        fields["shared_expert_dim"] = read_integer(config, "shared_expert_intermediate_size", 512)
    return {**fields, "pattern": _pattern(config, num_layers), **read_rotary(config, None)}


def _pattern(config: Mapping[str, Any], num_layers: int) -> tuple[Mixer, ...]:
    """The shortest pattern of mixers whose repetition gives the mixers of all layers, from ``config.json``."""
    types = config.get("layer_types")
    if types is None:
        interval = read_integer(config, "full_attention_interval", 4, minimum=1)
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(name in _LAYER_TYPES for name in types):
        raise ValueError(
            f"layer_types={types!r} must name the mixer of each of num_hidden_layers={num_layers} layers: choose from "
            f"{', '.join(_LAYER_TYPES)}"
        )
    return shortest_pattern([_LAYER_TYPES[name] for name in types])


def _write_fields(cfg: Config) -> dict[str, Any]:
    shared = {} if cfg.shared_expert_dim is None else {"shared_expert_intermediate_size": cfg.shared_expert_dim}
    if cfg.num_experts is not None and not shared:
        raise ValueError("model_type='qwen3_next' has a shared expert: set shared_expert_dim, or num_experts to None")
    if cfg.max_positions is None and cfg.rotary_scaling is not None and cfg.rotary_scaling.kind in ("yarn", "llama3"):
        raise ValueError(f"model_type='qwen3_next' needs max_positions for {cfg.rotary_scaling.kind} scaling: set it")
    name_of = {mixer: name for name, mixer in _LAYER_TYPES.items()}
    return {
        "layer_types": [name_of[mixer] for mixer in layer_kinds(cfg)],
        **experts.write_experts(cfg),
        **shared,
        **write_rotary(cfg.rotary_scaling, cfg.max_positions),
    }


_LAYER = "layers.{layer}."
_DELTA, _ATTENTION = f"{_LAYER}linear_attn.", f"{_LAYER}self_attn."
_QWEN3_NEXT = Format(
    architectures=classes("Qwen3Next", *decoders.TASKS),
    model_type="qwen3_next",
    prefix="model.",
    default_fields={"negative_eigenvalues": False, "expert_dim": 512, "experts_per_token": 10},
    hf_name_of_field={
        **decoders.FIELDS,
        **experts.HF_NAME_OF_FIELD,
        "delta_key_heads": "linear_num_key_heads",
        "delta_value_heads": "linear_num_value_heads",
        "delta_key_dim": "linear_key_head_dim",
        "delta_value_dim": "linear_value_head_dim",
        "conv_width": "linear_conv_kernel_dim",
        **usual_fields("num_heads", "head_dim", "attention_bias"),
        "num_kv_heads": "num_key_value_heads",
        "rotary_fraction": "partial_rotary_factor",
    },
    read_fields=_read_fields,
    write_fields=_write_fields,
    required={"hidden_act": "silu", "attention_dropout": 0.0},
    tensors={
        "token_embedding": "embed_tokens.weight",
        **module_tensors("layers/", _LAYER, mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
        **module_tensors("layers/delta_rule/", _DELTA, query_key_value_gate="in_proj_qkvz", beta_decay="in_proj_ba"),
        **module_tensors("layers/delta_rule/", _DELTA, convolution="conv1d", norm="norm", output="out_proj"),
        **{f"layers/delta_rule/{name}": _DELTA + name for name in ("A_log", "dt_bias")},
        **module_tensors("layers/attention/", _ATTENTION, query_gate="q_proj", output="o_proj"),
        **module_tensors("layers/attention/", _ATTENTION, key="k_proj", value="v_proj"),
        **module_tensors("layers/attention/", _ATTENTION, query_norm="q_norm", key_norm="k_norm"),
        **module_tensors("layers/mlp/", f"{_LAYER}mlp.", **decoders.SWIGLU),
        **experts.TENSORS,
        **module_tensors("layers/experts/shared/", f"{_LAYER}mlp.shared_expert.", **decoders.SWIGLU),
        **module_tensors("layers/experts/", f"{_LAYER}mlp.", shared_gate="shared_expert_gate"),
        **module_tensors("", "", final_norm="norm"),
    },
    unprefixed_tensors=decoders.HEADS,
    tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
    layouts={"layers/delta_rule/convolution/weight": ((1,), (), (0,))},
    ignored=(r"mtp\..*",),  # multi-token prediction layers, which transformers also ignores
)

FORMATS = (class_with_prefix(_QWEN3_NEXT, "Qwen3NextForQuestionAnswering", "span_qa", "transformer."), _QWEN3_NEXT)

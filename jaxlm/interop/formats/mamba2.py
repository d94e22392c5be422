"""Formats of :mod:`jaxlm.models.mamba2`: Mamba-2, Bamba and Falcon-H1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_value
from jaxlm.interop.formats import decoders
from jaxlm.interop.formats.format import Format, classes, module_tensors, read_integer, shortest_pattern, usual_fields
from jaxlm.interop.formats.rotary import read_rotary, write_rotary
from jaxlm.models.common import layer_kinds
from jaxlm.models.hybrid import Multipliers
from jaxlm.models.mamba2 import Config, Mixer, mixer_width, num_heads

_INFINITY = {"__float__": "Infinity"}
"""The JSON value that transformers 5 writes for infinity. Older versions write ``Infinity``, which JSON forbids."""


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, head_dim = config.get("num_heads", 128), config.get("head_dim", 64)
    width = config.get("expand", 2) * config.get("hidden_size", 4096)
    if type(heads) is not int or heads * head_dim != width:
        raise ValueError(f"num_heads={heads!r} times head_dim={head_dim} must equal expand * hidden_size = {width}")
    limit = config.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, list) or len(limit) != 2:
        raise ValueError(f"time_step_limit={limit!r} must be a list of two numbers")
    low, high = (math.inf if x == _INFINITY else x for x in limit)
    if not all(type(x) in (int, float) for x in (low, high)) or math.isinf(low):
        raise ValueError(f"time_step_limit={limit!r} must be a list of two numbers, and the first must be finite")
    return {"dt_limit_min": low, "dt_limit_max": None if high == math.inf else high}


def _write_fields(cfg: Config) -> dict[str, Any]:
    high = math.inf if cfg.dt_limit_max is None else cfg.dt_limit_max
    return {"num_heads": num_heads(cfg), "time_step_limit": [cfg.dt_limit_min, high]}


def _read_bamba_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    num_layers, width = read_integer(config, "num_hidden_layers", 32), read_integer(config, "hidden_size", 4096)
    indices = config.get("attn_layer_indices")
    check_value(list[int] | None, indices, "attn_layer_indices")
    mixer_of_layer: list[Mixer] = ["attention" if i in (indices or ()) else "mamba2" for i in range(num_layers)]
    expand = read_integer(config, "mamba_expand", 2)
    return {
        "pattern": shortest_pattern(mixer_of_layer), "expand": expand, "head_dim": _head_dim(config, expand * width),
        **_read_attention(config), **read_rotary(config, None),
    }  # fmt: skip


def _read_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``attention_kv_heads`` and ``attention_head_dim``, from ``config.json``."""
    heads, width = read_integer(config, "num_attention_heads", 32, minimum=1), read_integer(config, "hidden_size", 4096)
    kv_heads = read_integer(config, "num_key_value_heads", 8, nullable=True)
    head_dim = read_integer(config, "head_dim", width // heads)
    if head_dim < 4 and "head_dim" not in config:
        raise ValueError(f"hidden_size={width} / num_attention_heads={heads} must be at least 4, or set head_dim")
    return {"attention_kv_heads": heads if kv_heads is None else kv_heads, "attention_head_dim": head_dim}


def _head_dim(config: Mapping[str, Any], width: int) -> int:
    """The head width of a mixer with total width ``width``, from ``mamba_n_heads`` and ``mamba_d_head``."""
    heads, head_dim = read_integer(config, "mamba_n_heads", 128), config.get("mamba_d_head", "auto")
    if head_dim == "auto":
        head_dim = width // heads if heads else 0
    if type(head_dim) is not int or head_dim * heads != width:
        raise ValueError(
            f"mamba_n_heads={heads} times mamba_d_head={config.get('mamba_d_head', 'auto')!r} must equal the width of "
            f"the mixer, {width}"
        )
    return head_dim


def _write_bamba_fields(cfg: Config) -> dict[str, Any]:
    if "parallel" in layer_kinds(cfg) or int(cfg.expand) != cfg.expand:
        raise ValueError(
            f"pattern={cfg.pattern} and expand={cfg.expand}: model_type='bamba' has no parallel blocks, and needs an "
            "integer expand"
        )
    indices = [layer for layer, mixer in enumerate(layer_kinds(cfg)) if mixer == "attention"]
    return {**_write_hybrid_fields(cfg), "attn_layer_indices": indices, "mamba_expand": int(cfg.expand)}


def _write_hybrid_fields(cfg: Config) -> dict[str, Any]:
    if cfg.mlp_dim is None:
        raise ValueError("mlp_dim=None: the blocks of model_type='bamba' and 'falcon_h1' have MLPs, so set mlp_dim")
    return {
        "mamba_n_heads": num_heads(cfg), "mamba_d_head": cfg.head_dim, "num_key_value_heads": cfg.attention_kv_heads,
        "head_dim": cfg.attention_head_dim, **write_rotary(cfg.rotary_scaling, cfg.max_positions),
    }  # fmt: skip


_MULTIPLIERS: dict[str, tuple[str, ...]] = {
    "embedding_multiplier": ("embedding",), "lm_head_multiplier": ("head",), "ssm_in_multiplier": ("mixer_input",),
    "ssm_out_multiplier": ("mixer_output",), "attention_in_multiplier": ("attention_input",),
    "key_multiplier": ("key",), "attention_out_multiplier": ("attention_output",),
    "ssm_multipliers": ("z", "x", "B", "C", "dt"), "mlp_multipliers": ("mlp_gate", "mlp_output"),
}  # fmt: skip
"""HF config field -> fields of ``Multipliers``. If there are several, the HF field is a list with their values."""
_NOT_NULL_MULTIPLIERS = ("embedding_multiplier", "lm_head_multiplier")
"""HF config fields that must not be null. Null in another field of a multiplier means 1."""


def _read_multipliers(config: Mapping[str, Any]) -> Multipliers | None:
    """The field ``multipliers``, from ``config.json``; None if all multipliers are 1."""
    fields: dict[str, float] = {}
    for hf_name, names in _MULTIPLIERS.items():
        value = config.get(hf_name)
        if value is None and (hf_name not in config or hf_name not in _NOT_NULL_MULTIPLIERS):
            continue  # the multiplier is 1
        is_list = len(names) > 1
        check_value(list[float] if is_list else float, value, hf_name)
        numbers: Any = value if is_list else [value]
        if len(numbers) != len(names):
            raise ValueError(f"{hf_name}={value!r} must have {len(names)} numbers")
        fields.update(zip(names, map(float, numbers), strict=True))
    multipliers = Multipliers(**fields)
    return None if multipliers == Multipliers() else multipliers


def _read_falcon_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = read_integer(config, "hidden_size", 4096, minimum=1)
    width = read_integer(config, "mamba_d_ssm", 1024, nullable=True)
    if width is None:
        width = read_integer(config, "mamba_expand", 2) * hidden
    biases = [config.get(name, False) for name in ("mamba_proj_bias", "projectors_bias")]
    if biases[0] != biases[1]:
        raise ValueError(f"mamba_proj_bias={biases[0]} and projectors_bias={biases[1]} must be equal")
    has_norm = config.get("mamba_rms_norm", False)
    return {
        "expand": width / hidden, "head_dim": _head_dim(config, width), "multipliers": _read_multipliers(config),
        "norm_groups": read_integer(config, "mamba_n_groups", 1) if has_norm else None,
        **_read_attention(config), **read_rotary(config, 1.0),
    }  # fmt: skip


def _write_falcon_fields(cfg: Config) -> dict[str, Any]:
    if cfg.norm_groups not in (None, cfg.num_groups):
        raise ValueError(
            f"norm_groups={cfg.norm_groups}: model_type='falcon_h1' needs norm_groups=None (no norm) or "
            f"norm_groups=num_groups={cfg.num_groups}"
        )
    m = Multipliers() if cfg.multipliers is None else cfg.multipliers
    values = {hf_name: [getattr(m, name) for name in names] for hf_name, names in _MULTIPLIERS.items()}
    return {
        **_write_hybrid_fields(cfg), "mamba_d_ssm": mixer_width(cfg), "mamba_rms_norm": cfg.norm_groups is not None,
        "projectors_bias": cfg.linear_bias,
        **{hf_name: numbers if len(numbers) > 1 else numbers[0] for hf_name, numbers in values.items()},
    }  # fmt: skip


def _mixer_tensors(module: str) -> dict[str, str]:
    """``Format.tensors`` of a mixer, which is called ``module`` in transformers.

    The rows of ``in_proj`` are z, x, B, C and dt, in this order. The channels of ``conv1d`` are x, B and C, in order.
    """
    prefix = f"layers.{{layer}}.{module}."
    return {
        **module_tensors("layers/mixer/", prefix, zx="in_proj", BC="in_proj", dt="in_proj", output="out_proj"),
        **module_tensors("layers/mixer/", prefix, x_convolution="conv1d", BC_convolution="conv1d", norm="norm"),
        **{f"layers/mixer/{name}": prefix + name for name in ("dt_bias", "A_log", "D")},
    }


# A depthwise convolution of torch has a weight of shape [channels, 1, taps].
_LAYOUTS = {f"layers/mixer/{name}_convolution/weight": ((1,), (), (0,)) for name in ("x", "BC")}
_HYBRID_TENSORS = {
    "token_embedding": "embed_tokens.weight",
    **module_tensors("layers/", "layers.{layer}.", norm="input_layernorm", mlp_norm="pre_ff_layernorm"),
    **_mixer_tensors("mamba"),
    **module_tensors("layers/attention/", "layers.{layer}.self_attn.", **decoders.ATTENTION),
    **module_tensors("layers/mlp/", "layers.{layer}.feed_forward.", **decoders.SWIGLU),
    **module_tensors("", "", final_norm="final_layernorm"),
}
"""``Format.tensors`` of Bamba and Falcon-H1."""
_HYBRID_FIELDS = {
    **decoders.FIELDS,
    "state_size": "mamba_d_state",
    "num_groups": "mamba_n_groups",
    "conv_width": "mamba_d_conv",
    "linear_bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
    "attention_heads": "num_attention_heads",
    "attention_bias": "attention_bias",
}
"""``Format.hf_name_of_field`` that Bamba and Falcon-H1 share."""
_HYBRID_DEFAULTS = {
    "vocab_size": 128000,
    "embed_dim": 4096,
    "num_layers": 32,
    "mlp_dim": 14336,
    "state_size": 256,
    "dt_limit_min": 0.0,
    "dt_limit_max": None,
    "residual_in_float32": False,
    "tie_embeddings": False,
    "negative_eigenvalues": False,
}
"""``Format.default_fields`` that Bamba and Falcon-H1 share."""
_NONE_MEANS = {"multipliers": lambda cfg: Multipliers()}
"""``Format.none_means`` of Mamba-2 and Bamba."""

_FALCON_H1 = Format(
    architectures=classes("FalconH1", "causal", "none"),
    model_type="falcon_h1",
    prefix="model.",
    default_fields={
        **_HYBRID_DEFAULTS,
        "pattern": ("parallel",),
        "max_positions": 8192,
        "norm_before_gate": True,
        "rotary_base": 100000.0,
        "rotary_fraction": 1.0,
    },
    hf_name_of_field={**_HYBRID_FIELDS, "norm_before_gate": "mamba_norm_before_gate"},
    read_fields=_read_falcon_fields,
    write_fields=_write_falcon_fields,
    not_null=("intermediate_size",),
    required={"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False},
    token_ids={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    tensors=_HYBRID_TENSORS,
    unprefixed_tensors={"head": "lm_head.weight"},
    tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
    layouts=_LAYOUTS,
)
_BAMBA = dataclasses.replace(
    _FALCON_H1,
    architectures=classes("Bamba", "causal", "none"),
    model_type="bamba",
    default_fields={
        **_HYBRID_DEFAULTS,
        "max_positions": 262144,
        "norm_before_gate": False,
        "norm_groups": 1,
        "multipliers": None,
    },
    none_means=_NONE_MEANS,
    hf_name_of_field={**_HYBRID_FIELDS, "rotary_fraction": "partial_rotary_factor"},
    read_fields=_read_bamba_fields,
    write_fields=_write_bamba_fields,
)

FORMATS = (
    Format(
        architectures=classes("Mamba2", "causal", "none"),
        model_type="mamba2",
        prefix="backbone.",
        default_fields={
            "vocab_size": 32768,
            "embed_dim": 4096,
            "num_layers": 64,
            "num_groups": 8,
            "init_stddev": 0.1,
            "tie_embeddings": False,
            "norm_before_gate": False,
            "pattern": ("mamba2",),
            "norm_groups": 1,
            "multipliers": None,
            "mlp_dim": None,
            "max_positions": None,
            "negative_eigenvalues": False,
        },
        none_means=_NONE_MEANS,
        hf_name_of_field={
            **usual_fields("vocab_size", "num_layers", "embed_dim", "tie_embeddings", "init_stddev"),
            **usual_fields("expand", "head_dim", "state_size"),
            "num_groups": "n_groups",
            "conv_width": "conv_kernel",
            "linear_bias": "use_bias",
            "conv_bias": "use_conv_bias",
            "norm_epsilon": "layer_norm_epsilon",
            "residual_in_float32": "residual_in_fp32",
            "init_dt_min": "time_step_min",
            "init_dt_max": "time_step_max",
            "init_dt_floor": "time_step_floor",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={"hidden_act": "silu", "rms_norm": True},
        token_ids={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        tensors={
            "token_embedding": "embeddings.weight",
            **module_tensors("layers/", "layers.{layer}.", norm="norm"),
            **_mixer_tensors("mixer"),
            **module_tensors("", "", final_norm="norm_f"),
        },
        unprefixed_tensors={"head": "lm_head.weight"},
        tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
        layouts=_LAYOUTS,
        renamed={"backbone.embedding.weight": "backbone.embeddings.weight"},  # the name in files of the authors' code
    ),
    _FALCON_H1,
    _BAMBA,
)

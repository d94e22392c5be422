"""Format of :mod:`jaxlm.models.xlstm`: xLSTM 7B, which has only mLSTM layers. transformers has no sLSTM layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.format import Format, classes, module_tensors, usual_fields
from jaxlm.models.xlstm import Config

_DUPLICATES = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
"""HF field -> HF field with the same meaning. transformers reads both fields, so their values must be equal."""


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    embed_dim = config.get("hidden_size", Config.embed_dim)
    sizes = {"hidden_size": embed_dim, "num_hidden_layers": config.get("num_hidden_layers", Config.num_layers)}
    for duplicate, name in _DUPLICATES.items():
        value = config.get(duplicate)
        if value is not None and value != sizes[name]:
            raise ValueError(f"{duplicate}={value!r} must be null or equal to {name}={sizes[name]!r}")
    factors = {"qk_dim_factor": 0.5, "v_dim_factor": 1.0, "ffn_proj_factor": 2.667}
    for name, default in factors.items():
        factors[name] = config.get(name, default)
        if type(factors[name]) not in (int, float) or not 0 < factors[name] < math.inf:
            raise ValueError(f"{name}={factors[name]!r} must be a positive number")
    multiple = config.get("ffn_round_up_to_multiple_of", 64)
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"ffn_round_up_to_multiple_of={multiple!r} must be a positive integer")
    return {
        "key_dim": int(embed_dim * factors["qk_dim_factor"]),
        "value_dim": int(embed_dim * factors["v_dim_factor"]),
        "mlp_dim": int((embed_dim * factors["ffn_proj_factor"] + multiple - 1) // multiple * multiple),
    }


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "embedding_dim": cfg.embed_dim,
        "num_blocks": cfg.num_layers,
        "qk_dim_factor": _factor(cfg.key_dim, cfg.embed_dim),
        "v_dim_factor": _factor(cfg.value_dim, cfg.embed_dim),
        # The width of the MLP depends on both of these fields. So both are written, and neither keeps its loaded value.
        "ffn_proj_factor": cfg.mlp_dim / cfg.embed_dim,
        "ffn_round_up_to_multiple_of": cfg.mlp_dim,
    }


def _factor(width: int, embed_dim: int) -> float:
    """A factor with ``int(embed_dim * factor) == width``.

    The rounded quotient ``width / embed_dim`` can be slightly too small. The result is then the next larger float.
    """
    factor = width / embed_dim
    return factor if int(embed_dim * factor) == width else math.nextafter(factor, math.inf)


_MLSTM = {
    "query": "q",
    "key": "k",
    "value": "v",
    "output_gate": "ogate_preact",
    "input_gate": "igate_preact",
    "forget_gate": "fgate_preact",
    "output": "out_proj",
    "norm": "multihead_norm",
}
_LAYER = "blocks.{layer}."

FORMATS = (
    Format(
        architectures=classes("xLSTM", "causal", "none"),
        model_type="xlstm",
        prefix="backbone.",
        default_fields={"pattern": ("mlstm",)},
        hf_name_of_field={
            **usual_fields("vocab_size", "num_layers", "embed_dim", "tie_embeddings", "gate_soft_cap"),
            "num_heads": "num_heads",
            "logits_soft_cap": "output_logit_soft_cap",
            "norm_epsilon": "norm_eps",
            "mlstm_epsilon": "eps",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={"use_bias": False, "add_out_norm": True, "weight_mode": "single"},
        token_ids={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        tensors={
            "token_embedding": "embeddings.weight",
            **module_tensors("layers/", _LAYER, mixer_norm="norm_mlstm", mlp_norm="norm_ffn"),
            **module_tensors("layers/mlstm/", f"{_LAYER}mlstm_layer.", **_MLSTM),
            **module_tensors("layers/mlp/", f"{_LAYER}ffn.", gate="proj_up_gate", up="proj_up", down="proj_down"),
            **module_tensors("", "", final_norm="out_norm"),
        },
        unprefixed_tensors={"head": "lm_head.weight"},
        tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
    ),
)

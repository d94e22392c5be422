"""Formats of :mod:`jaxlm.models.transformer_xl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_value
from jaxlm.interop.formats.format import Format, classes, module_tensors, read_integer, usual_fields
from jaxlm.models.transformer_xl import Config


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    cutoffs, clamp = config.get("cutoffs", []), read_integer(config, "clamp_len", 0)
    check_value(list[int], cutoffs, "cutoffs")
    if "cutoffs" in config:
        fields["cutoffs"] = tuple(cutoffs)
    if "clamp_len" in config:
        fields["clamp_length"] = clamp if clamp > 0 else None
    tie_projs = config.get("tie_projs")
    check_value(list[bool] | None, tie_projs, "tie_projs")
    tied = tie_projs or [False, config.get("proj_share_all_but_first", True)]
    if tie_projs and "cutoffs" in config and len(tied) != 1 + len(cutoffs):
        raise ValueError(f"tie_projs={tied} must have one entry more than cutoffs={cutoffs}")
    if tied[0] or len(set(tied[1:])) > 1:
        raise ValueError(
            f"tie_projs={tied} is not supported: the first entry must be false, and all other entries must be equal"
        )
    fields["tie_projections"] = all(tied[1:])
    return fields


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "cutoffs": list(cfg.cutoffs),
        "clamp_len": -1 if cfg.clamp_length is None else cfg.clamp_length,
        "proj_share_all_but_first": cfg.tie_projections,
        "tie_projs": [False] + [cfg.tie_projections] * len(cfg.cutoffs),
    }


_CLUSTERS = range(1, 9)  # of rare tokens; a model with more clusters is saved in jaxlm's own format
_PROJECTIONS = [
    "token_projection",
    "head/projection",
    *(f"{prefix}tails/cluster_{i}/projection" for prefix in ("", "head/") for i in _CLUSTERS),
]

FORMATS = (
    Format(
        architectures={
            "TransfoXLLMHeadModel": {"task": "causal"},
            **classes("TransfoXL", "none", "classification"),
        },
        model_type="transfo-xl",
        prefix="transformer.",
        hf_name_of_field={
            **usual_fields("vocab_size", "same_length", "tie_embeddings", "dropout"),
            "embedding_divisor": "div_val",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "head_dim": "d_head",
            "embed_dim": "d_model",
            "token_dim": "d_embed",
            "mlp_dim": "d_inner",
            "memory_length": "mem_len",
            "pre_norm": "pre_lnorm",
            "untie_relative": "untie_r",
            "norm_epsilon": "layer_norm_epsilon",
            "init_stddev": "init_std",
            "projection_init_stddev": "proj_init_std",
            "attention_dropout": "dropatt",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={"attn_type": 0, "adaptive": True, "sample_softmax": -1},
        aliases={
            "n_token": "vocab_size",
            "hidden_size": "d_model",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        token_ids={"eos_token_id": 0},
        tensors={
            "token_embedding": "word_emb.emb_layers.0.weight",
            "token_projection": "word_emb.emb_projs.0",
            **{f"tails/cluster_{i}/embedding": f"word_emb.emb_layers.{i}.weight" for i in _CLUSTERS},
            **{f"tails/cluster_{i}/projection": f"word_emb.emb_projs.{i}" for i in _CLUSTERS},
            "content_bias": "r_w_bias",
            "position_bias": "r_r_bias",
            "layers/attention/content_bias": "layers.{layer}.dec_attn.r_w_bias",
            "layers/attention/position_bias": "layers.{layer}.dec_attn.r_r_bias",
            **module_tensors(
                "layers/attention/", "layers.{layer}.dec_attn.", qkv="qkv_net", relative="r_net", output="o_net"
            ),
            **module_tensors("layers/", "layers.{layer}.dec_attn.", attention_norm="layer_norm"),
            **module_tensors("layers/mlp/", "layers.{layer}.pos_ff.CoreNet.", up="0", down="3"),
            **module_tensors("layers/", "layers.{layer}.pos_ff.", mlp_norm="layer_norm"),
        },
        unprefixed_tensors={
            "head/bias": "crit.out_layers.0.bias",
            "head/embedding": "crit.out_layers.0.weight",
            "head/projection": "crit.out_projs.0",
            "head/cluster_weight": "crit.cluster_weight",
            "head/cluster_bias": "crit.cluster_bias",
            **{f"head/tails/cluster_{i}/bias": f"crit.out_layers.{i}.bias" for i in _CLUSTERS},
            **{f"head/tails/cluster_{i}/embedding": f"crit.out_layers.{i}.weight" for i in _CLUSTERS},
            **{f"head/tails/cluster_{i}/projection": f"crit.out_projs.{i}" for i in _CLUSTERS},
            "classifier/weight": "score.weight",
        },
        tied_tensors={  # in some files of models with tied embeddings or projections
            "crit.out_layers.0.weight": "token_embedding",
            **{f"crit.out_layers.{i}.weight": f"tails/cluster_{i}/embedding" for i in _CLUSTERS},
            **{f"crit.out_projs.{i}": f"tails/cluster_{i}/projection" for i in _CLUSTERS},
        },
        layer_copies={
            "layers.{layer}.dec_attn.r_w_bias": "content_bias",
            "layers.{layer}.dec_attn.r_r_bias": "position_bias",
        },
        layouts=dict.fromkeys(_PROJECTIONS, ((1,), (0,))),
        ignored=(r"pos_emb\.inv_freq",),
    ),
)

"""Formats of :mod:`jaxlm.models.xlnet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.format import Format, classes, module_tensors, read_integer, usual_fields
from jaxlm.models.xlnet import Config, pool_dropout


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    clamp = read_integer(config, "clamp_len", -1)
    width, num_heads = config.get("d_model", Config.embed_dim), config.get("n_head", Config.num_heads)
    d_head = read_integer(config, "d_head", 0)
    if "d_head" in config and d_head * num_heads != width:
        raise ValueError(f"d_head={d_head} must be d_model / n_head = {width} / {num_heads}")
    return {"clamp_length": clamp if clamp > 0 else None}


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "clamp_len": -1 if cfg.clamp_length is None else cfg.clamp_length,
        "summary_last_dropout": pool_dropout(cfg),
        "d_head": cfg.embed_dim // cfg.num_heads,
    }


_PROJECTIONS = ("query", "key", "value", "relative", "output")

FORMATS = (
    Format(
        architectures={
            "XLNetLMHeadModel": {"task": "permutation"},
            **classes("XLNet", "none", "classification", "token_classification"),
            "XLNetForQuestionAnsweringSimple": {"task": "span_qa"},
        },
        model_type="xlnet",
        prefix="transformer.",
        hf_name_of_field={
            **usual_fields("vocab_size", "init_stddev", "dropout"),
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "embed_dim": "d_model",
            "mlp_dim": "d_inner",
            "activation": "ff_activation",
            "norm_epsilon": "layer_norm_eps",
            "reuse_length": "reuse_len",
            "pool_dropout": "summary_last_dropout",
        },
        default_fields={"pool_dropout": 0.1},
        read_fields=_read_fields,
        write_fields=_write_fields,
        jaxlm_value_of={"ff_activation": {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}},
        # The family supports only these values. Any other value is an error. For the effect of bi_data=True, pass
        # ``right_to_left`` to ``xlnet.apply``.
        required={
            "attn_type": "bi",
            "bi_data": False,
            "same_length": False,
            "untie_r": True,
            "tie_word_embeddings": True,
            "summary_type": "last",
            "summary_use_proj": True,
            "summary_activation": "tanh",
        },
        aliases={
            "n_token": "vocab_size",
            "hidden_size": "d_model",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 5},
        tensors={
            "token_embedding": "word_embedding.weight",
            "mask_embedding": "mask_emb",
            **{f"layers/attention/{name}/weight": f"layer.{{layer}}.rel_attn.{name[0]}" for name in _PROJECTIONS},
            "layers/attention/content_bias": "layer.{layer}.rel_attn.r_w_bias",
            "layers/attention/position_bias": "layer.{layer}.rel_attn.r_r_bias",
            "layers/attention/type_bias": "layer.{layer}.rel_attn.r_s_bias",
            "layers/attention/type_embedding": "layer.{layer}.rel_attn.seg_embed",
            **module_tensors("layers/", "layer.{layer}.rel_attn.", attention_norm="layer_norm"),
            **module_tensors("layers/mlp/", "layer.{layer}.ff.", up="layer_1", down="layer_2"),
            **module_tensors("layers/", "layer.{layer}.ff.", mlp_norm="layer_norm"),
        },
        unprefixed_tensors={
            "output_bias": "lm_loss.bias",
            **module_tensors("", "", pool="sequence_summary.summary", classifier="logits_proj"),
            **module_tensors("", "", token_classifier="classifier", span="qa_outputs"),
        },
        tied_tensors={"lm_loss.weight": "token_embedding"},
        layouts={
            "mask_embedding": ((), (), (0,)),
            **{f"layers/attention/{name}/weight": ((0,), (1,), (2,)) for name in _PROJECTIONS},
            "layers/attention/output/weight": ((2,), (0,), (1,)),
        },
    ),
)

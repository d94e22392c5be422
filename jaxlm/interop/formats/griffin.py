"""Format of :mod:`jaxlm.models.griffin`: RecurrentGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_value
from jaxlm.interop.formats import decoders
from jaxlm.interop.formats.format import Format, classes, module_tensors, read_integer, usual_fields
from jaxlm.interop.formats.rotary import read_rotary
from jaxlm.models.griffin import Config, Mixer, lru_width


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    num_heads, embed_dim = config.get("num_attention_heads", 10), config.get("hidden_size", 2560)
    kv_heads, head_dim = (read_integer(config, name, nullable=True) for name in ("num_key_value_heads", "head_dim"))
    # intermediate_size is twice the hidden width of the MLP, because the authors' code has one matrix for the gate and
    # the up projection.
    mlp_dim = read_integer(config, "intermediate_size", 7680, minimum=2)
    pattern = config.get("block_types", list(Config.pattern))
    check_value(list[Mixer], pattern, "block_types")
    if head_dim is not None and head_dim * num_heads != embed_dim:
        raise ValueError(f"head_dim={head_dim} must be hidden_size / num_attention_heads = {embed_dim} / {num_heads}")
    rotary = read_rotary(config, 0.5)
    if "rotary_scaling" in rotary:
        raise ValueError(f"scaled rotary positions are not supported: {rotary['rotary_scaling']}")
    kv_heads = num_heads if kv_heads is None else kv_heads
    return {"num_kv_heads": kv_heads, "mlp_dim": mlp_dim // 2, "pattern": tuple(pattern), **rotary}


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "num_key_value_heads": cfg.num_kv_heads, "intermediate_size": 2 * cfg.mlp_dim,
        "block_types": list(cfg.pattern), "lru_width": lru_width(cfg), "head_dim": cfg.embed_dim // cfg.num_heads,
    }  # fmt: skip


_MIXER = "layers.{layer}.temporal_block."
_RG_LRU = {"recurrence_gate": "recurrent_gate", "input_gate": "input_gate"}

FORMATS = (
    Format(
        architectures=classes("RecurrentGemma", "causal", "none"),
        model_type="recurrent_gemma",
        prefix="model.",
        hf_name_of_field={
            **usual_fields("vocab_size", "num_layers", "num_heads", "embed_dim", "rotary_base", "norm_epsilon"),
            **usual_fields("tie_embeddings", "attention_dropout", "lru_width", "logits_soft_cap"),
            "conv_width": "conv1d_width",
            "window": "attention_window_size",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={
            "hidden_activation": "gelu_pytorch_tanh",
            "partial_rotary_factor": 0.5,
            "attention_bias": False,
        },
        token_ids={"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        tensors={
            "token_embedding": "embed_tokens.weight",
            **module_tensors("layers/", "layers.{layer}.", mixer_norm="temporal_pre_norm", mlp_norm="channel_pre_norm"),
            **module_tensors("layers/recurrent/", _MIXER, gate="linear_y", input="linear_x", output="linear_out"),
            **module_tensors("layers/recurrent/", _MIXER, convolution="conv_1d"),
            **module_tensors("layers/attention/", _MIXER, **decoders.ATTENTION),
            **module_tensors("layers/mlp/", "layers.{layer}.mlp_block.", **decoders.SWIGLU),
            **{
                f"layers/recurrent/rg_lru/{path}/{kind}": f"{_MIXER}rg_lru.{name}_{kind}"
                for path, name in _RG_LRU.items()
                for kind in ("weight", "bias")
            },
            "layers/recurrent/rg_lru/lambda": f"{_MIXER}rg_lru.recurrent_param",
            **module_tensors("", "", final_norm="final_norm"),
        },
        unprefixed_tensors={"head": "lm_head.weight"},
        tied_tensors={"lm_head.weight": "token_embedding"},
        layouts={
            "layers/recurrent/convolution/weight": ((1,), (), (0,)),
            **{f"layers/recurrent/rg_lru/{name}/weight": ((0,), (1,), (2,)) for name in _RG_LRU},
            **{f"layers/recurrent/rg_lru/{name}/bias": ((0,), (1,)) for name in _RG_LRU},
        },
    ),
)

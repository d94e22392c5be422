"""Formats of :mod:`jaxlm.models.t5`: T5 (v1.0 and v1.1), mT5 and umT5."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.format import Format, module_tensors, read_integer
from jaxlm.models.t5 import Config


def _stack_names(stack: str, mlp: int) -> dict[str, str]:
    """``Format.tensors`` of one stack, "encoder" or "decoder". ``mlp`` is the index of the MLP among the sublayers."""
    path, block = f"{stack}/layers/", f"{stack}.block.{{layer}}.layer."
    projections = {name: name[0] for name in ("query", "key", "value", "output")}
    return {
        f"{stack}/relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{path}relative_bias": f"{block}0.SelfAttention.relative_attention_bias.weight",
        **module_tensors(path, block, attention_norm="0.layer_norm", cross_norm="1.layer_norm"),
        **module_tensors(path, f"{block}{mlp}.", mlp_norm="layer_norm"),
        **module_tensors(f"{path}attention/", f"{block}0.SelfAttention.", **projections),
        **module_tensors(f"{path}cross_attention/", f"{block}1.EncDecAttention.", **projections),
        **module_tensors(f"{path}mlp/", f"{block}{mlp}.DenseReluDense.", up="wi", gate="wi_0", gated="wi_1", down="wo"),
        **module_tensors(f"{stack}/", f"{stack}.", final_norm="final_layer_norm"),
    }


# Files may contain these copies of the token embedding. ``lm_head.weight`` is a copy only if the head is tied.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_TENSORS = {"token_embedding": "shared.weight", **_stack_names("encoder", 1), **_stack_names("decoder", 2)}

_MLPS: dict[str, tuple[str, str, bool]] = {
    "relu": ("relu", "relu", False),
    "gated_gelu": ("gated-gelu", "gelu_new", True),
}
"""jaxlm's ``mlp`` -> HF's ``feed_forward_proj``, ``dense_act_fn`` and ``is_gated_act``."""


def _write_fields(cfg: Config) -> dict[str, Any]:
    projection, activation, is_gated = _MLPS[cfg.mlp]
    return {
        "feed_forward_proj": projection, "dense_act_fn": activation, "is_gated_act": is_gated,
        "decoder_start_token_id": cfg.decoder_start_id,
    }  # fmt: skip


def _read_fields(default: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The function ``Format.read_fields``. ``default`` is the value of a missing field ``feed_forward_proj``."""
    fields: dict[str, Any] = {}
    projection = config.get("feed_forward_proj", default)
    defaults = {name: (activation, is_gated) for name, activation, is_gated in _MLPS.values()}
    if projection not in list(defaults):
        raise ValueError(f"feed_forward_proj={projection!r} is not supported: choose from {', '.join(defaults)}")
    # transformers derives dense_act_fn and is_gated_act from feed_forward_proj, but values in the config take
    # precedence.
    default_activation, default_is_gated = defaults[projection]
    activation = config.get("dense_act_fn", default_activation)
    is_gated = config.get("is_gated_act", default_is_gated)
    known_activation = "gelu_new" if activation == "gelu_pytorch_tanh" else activation
    mlp = [name for name, (_, *values) in _MLPS.items() if values == [known_activation, is_gated]]
    if not mlp:
        raise ValueError(
            f"feed_forward_proj={projection!r} with dense_act_fn={activation!r} and is_gated_act={is_gated!r} is "
            "not supported: only 'relu' without a gate and 'gelu_new' with a gate are supported"
        )
    fields["mlp"] = mlp[0]
    # transformers 5 writes tie_word_embeddings=True for all models. If scale_decoder_outputs is present, it tells
    # whether the head is tied.
    scale_outputs = config.get("scale_decoder_outputs")
    if isinstance(scale_outputs, bool):
        fields["tie_embeddings"] = scale_outputs
    buckets = config.get("relative_attention_num_buckets", Config.num_buckets)
    if buckets < 4 or buckets % 2:
        raise ValueError(f"relative_attention_num_buckets={buckets} must be even and at least 4")
    # Without decoder_start_token_id, a target starts with the padding id.
    start, pad = read_integer(config, "decoder_start_token_id", nullable=True), config.get("pad_token_id")
    if start is None and type(pad) is int:
        start = pad
    return fields if start is None else {**fields, "decoder_start_id": start}


def _format(model_type: str, class_prefix: str, default_fields: dict[str, Any], *, mlp: str) -> Format:
    """The format of a ``model_type``.

    Args:
        mlp: value of the jaxlm config field ``mlp`` if ``config.json`` lacks ``feed_forward_proj``.
    """
    return Format(
        architectures={
            f"{class_prefix}ForConditionalGeneration": {"task": "seq2seq"},
            f"{class_prefix}EncoderModel": {"task": "none", "num_decoder_layers": 0},
            f"{class_prefix}Model": {"task": "none"},
        },
        model_type=model_type,
        prefix="",
        hf_name_of_field={
            "vocab_size": "vocab_size", "num_layers": "num_layers", "num_decoder_layers": "num_decoder_layers",
            "num_heads": "num_heads", "embed_dim": "d_model", "head_dim": "d_kv", "mlp_dim": "d_ff",
            "tie_embeddings": "tie_word_embeddings",
            "num_buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance",
            "norm_epsilon": "layer_norm_epsilon", "dropout": "dropout_rate",
        },
        default_fields=default_fields,
        read_fields=functools.partial(_read_fields, _MLPS[mlp][0]),
        write_fields=_write_fields,
        required={"tie_encoder_decoder": False, "pruned_heads": {}},
        aliases={
            "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
        token_ids={"pad_token_id": 0, "eos_token_id": 1},
        tensors=_TENSORS,
        unprefixed_tensors={"head": "lm_head.weight"},
        tied_tensors=dict.fromkeys(_COPIES, "token_embedding"),
        # Files of T5 v1.0 contain this embedding, which no layer uses.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )  # fmt: skip


_MULTILINGUAL = {"tie_embeddings": False, "mlp_dim": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112}
"""The defaults of mT5's config class that differ from T5's. umT5 has the same defaults, but a tied head."""

FORMATS = (
    _format("t5", "T5", {"bias_per_layer": False}, mlp="relu"),
    _format("mt5", "MT5", {**_MULTILINGUAL, "bias_per_layer": False}, mlp="gated_gelu"),
    _format("umt5", "UMT5", {**_MULTILINGUAL, "tie_embeddings": True, "bias_per_layer": True}, mlp="gated_gelu"),
)

"""The names of mixtures of experts in files of Qwen3-MoE and Qwen3-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.decoders import SWIGLU
from jaxlm.interop.formats.format import module_tensors, read_integer
from jaxlm.models.experts import ExpertsConfig

HF_NAME_OF_FIELD = {
    "expert_dim": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "renormalize_experts": "norm_topk_prob",
}
"""``Format.hf_name_of_field`` of the fields about experts that need no computation."""

TENSORS = {
    **module_tensors("layers/experts/", "layers.{layer}.mlp.", router="gate"),
    **module_tensors("layers/experts/", "layers.{layer}.mlp.experts.{expert}.", **SWIGLU),
}
"""``Format.tensors`` of the experts."""


def read_experts(config: Mapping[str, Any], num_layers: int, default_num_experts: int) -> dict[str, Any]:
    """The jaxlm config fields ``num_experts``, ``expert_interval`` and ``dense_layers``, from ``config.json``.

    If no layer has experts, the result contains these fields and the fields in :data:`HF_NAME_OF_FIELD`, all with the
    default values of ``ExpertsConfig``. The default of ``num_experts`` is None.

    Args:
        config: the contents of ``config.json``.
        num_layers: the number of layers.
        default_num_experts: the value of the HF field ``num_experts`` if ``config`` lacks it.

    Raises:
        ValueError: ``num_experts``, ``decoder_sparse_step`` or ``mlp_only_layers`` has a wrong type or is out of range.
    """
    num_experts = read_integer(config, "num_experts", default_num_experts)
    interval = read_integer(config, "decoder_sparse_step", 1)
    if num_experts < 0 or interval < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 0, and decoder_sparse_step={interval} at least 1")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of layer numbers below {num_layers}")
    dense_instead_of_experts = {layer for layer in dense if (layer + 1) % interval == 0}
    if num_experts == 0 or num_layers // interval == len(dense_instead_of_experts):
        names = ("num_experts", "expert_interval", "dense_layers", *HF_NAME_OF_FIELD)
        return {name: getattr(ExpertsConfig, name) for name in names}
    return {"num_experts": num_experts, "expert_interval": interval, "dense_layers": tuple(dense)}


def write_experts(cfg: Any) -> dict[str, Any]:
    """The inverse of :func:`read_experts`. The result also contains ``moe_intermediate_size``."""
    fields = {"moe_intermediate_size": cfg.mlp_dim if cfg.expert_dim is None else cfg.expert_dim}
    if cfg.num_experts is None:
        return {**fields, "num_experts": 0, "mlp_only_layers": list(range(cfg.num_layers))}
    return {
        **fields,
        "num_experts": cfg.num_experts,
        "decoder_sparse_step": cfg.expert_interval,
        "mlp_only_layers": list(cfg.dense_layers),
    }

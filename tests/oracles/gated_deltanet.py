"""Reference of gated_deltanet: Qwen3-Next of transformers, with all heads, without attention, and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.gpt import reference_results

# The delta rule's output for the first token is q @ k times the value. Its RMS norm is nearly the sign of q @ k. With
# the published epsilon of 1e-6, both libraries amplify rounding errors where q @ k is small. The case
# "published_epsilon" has no such q @ k, so it has the same tolerances as the other cases.
_EPSILON = 0.03
_TINY: dict[str, Any] = {
    "vocab_size": 31, "max_position_embeddings": 12, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 3, "rms_norm_eps": _EPSILON,
}  # fmt: skip
_WIDE: dict[str, Any] = {
    "vocab_size": 131, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 40, "num_experts": 4,
    "num_hidden_layers": 4, "mlp_only_layers": [0, 1, 2, 3], "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 8,
    "linear_value_head_dim": 10, "rms_norm_eps": _EPSILON,
}  # fmt: skip
# The cache of transformers needs layers of both kinds.
_PURE: dict[str, Any] = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2, "use_cache": False}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 5,
}  # fmt: skip
_CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "base": ("Qwen3NextForCausalLM", _TINY, "left"),
    "pure": ("Qwen3NextForCausalLM", {**_TINY, **_PURE, "tie_word_embeddings": True}, "right"),
    "classification": ("Qwen3NextForSequenceClassification", {**_TINY, "num_labels": 3}, "right"),
    "wide": ("Qwen3NextForCausalLM", _WIDE, "left"),
    "bias": ("Qwen3NextForCausalLM", {**_WIDE, "attention_bias": True, "rope_scaling": _YARN}, None),
    "heads": ("Qwen3NextModel", {**_WIDE, "linear_num_value_heads": 12, "partial_rotary_factor": 1.0}, "right"),
    "long": ("Qwen3NextForCausalLM", {**_WIDE, "rope_theta": 100.0, "linear_conv_kernel_dim": 7}, None),
    "span_qa": ("Qwen3NextForQuestionAnswering", _TINY, None),
    "tagging": ("Qwen3NextForTokenClassification", {**_WIDE, "num_labels": 5}, "left"),
    "experts": ("Qwen3NextForCausalLM", {**_TINY, **_EXPERTS, "mlp_only_layers": [1]}, "left"),
    "experts_step": (
        "Qwen3NextForCausalLM",
        {**_WIDE, **_EXPERTS, "mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": False}, "right"
    ),
    "published_epsilon": ("Qwen3NextForCausalLM", {**_TINY, "rms_norm_eps": 1e-6}, "left"),
}  # fmt: skip
CASES = ("base", "pure", "classification", "experts")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import transformers

    name, shape, padding = _CASES[case]
    config = getattr(transformers, name).config_class(**shape, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)

"""Reference of llama: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3 and Gemma 3 of transformers.

The cases have all heads, all kinds of rotary scaling, and experts in all or some layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.gpt import reference_results

_TINY = {
    "vocab_size": 31, "max_position_embeddings": 12, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip
_WIDE = {
    "vocab_size": 131, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
# With these values, the few positions of a case cover slow, intermediate and fast pairs of rotary scaling.
_LLAMA3 = {
    **_TINY, "max_position_embeddings": 80, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "rope_theta": 100.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    },
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0, "beta_slow": 0.2,
}  # fmt: skip
_MIXTRAL = {"num_local_experts": 4, "intermediate_size": 8}
_QWEN3_MOE = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "mlp_only_layers": [0], "head_dim": 4,
}  # fmt: skip
_GEMMA3 = {
    "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 11, "rope_theta": 1000.0,
    "rope_local_base_freq": 100.0,
}  # fmt: skip
_GEMMA3_LAYERS = ["sliding_attention", "full_attention"]
_CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "base": ("LlamaForCausalLM", {**_TINY, "rms_norm_eps": 1e-3}, "left"),
    "mistral": ("MistralForCausalLM", {**_TINY, "sliding_window": 4, "head_dim": 4}, "right"),
    "qwen2": ("Qwen2ForCausalLM", {**_TINY, "tie_word_embeddings": True}, None),
    "llama3": ("LlamaForCausalLM", _LLAMA3, None),
    "classification": ("LlamaForSequenceClassification", {**_TINY, "num_labels": 3}, "right"),
    "span_qa": ("LlamaForQuestionAnswering", _TINY, None),
    "wide": ("LlamaForCausalLM", {**_WIDE, "num_key_value_heads": 1, "tie_word_embeddings": True}, "right"),
    "linear": ("LlamaForCausalLM", {**_WIDE, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}, None),
    "dynamic": ("LlamaForCausalLM", {**_WIDE, "rope_scaling": {"type": "dynamic", "factor": 3.0}}, None),
    "yarn": ("LlamaForCausalLM", {**_WIDE, "rope_scaling": _YARN}, "left"),
    "yarn_fraction": (
        "Qwen2ForCausalLM", {**_WIDE, "rope_scaling": {**_YARN, "truncate": False, "attention_factor": 0.7}}, None
    ),
    "llama_base": ("LlamaModel", {**_WIDE, "num_key_value_heads": None}, "left"),
    "tagging": ("LlamaForTokenClassification", {**_WIDE, "num_labels": 5}, "left"),
    "mistral_window": ("MistralForCausalLM", {**_WIDE, "sliding_window": 7}, "left"),
    "mistral_span_qa": ("MistralForQuestionAnswering", {**_WIDE, "sliding_window": 9}, None),
    "mistral_classification": ("MistralForSequenceClassification", {**_WIDE, "num_labels": 2}, "left"),
    "qwen2_window": (
        "Qwen2ForCausalLM", {**_WIDE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, "right"
    ),
    "qwen2_span_qa": ("Qwen2ForQuestionAnswering", _WIDE, None),
    "qwen2_tagging": ("Qwen2ForTokenClassification", {**_WIDE, "num_labels": 4}, "right"),
    "mixtral": ("MixtralForCausalLM", {**_TINY, **_MIXTRAL}, "left"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_TINY, **_QWEN3_MOE, "norm_topk_prob": False}, "right"),
    "mixtral_window": ("MixtralForCausalLM", {**_WIDE, "num_local_experts": 6, "sliding_window": 5}, "right"),
    "mixtral_classification": ("MixtralForSequenceClassification", {**_WIDE, **_MIXTRAL, "num_labels": 3}, "left"),
    "qwen3": ("Qwen3ForCausalLM", {**_WIDE, "head_dim": 12, "tie_word_embeddings": True}, "left"),
    "qwen3_window": (
        "Qwen3Model",
        {**_WIDE, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, "right",
    ),
    "qwen3_moe_step": (
        "Qwen3MoeForCausalLM",
        {**_WIDE, "num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 10, "decoder_sparse_step": 2,
         "norm_topk_prob": True, "head_dim": 8, "use_sliding_window": True, "sliding_window": 7}, "left",
    ),
    "qwen3_moe_span_qa": ("Qwen3MoeForQuestionAnswering", {**_TINY, **_QWEN3_MOE}, None),
    "gemma3": ("Gemma3ForCausalLM", {**_TINY, **_GEMMA3, "layer_types": _GEMMA3_LAYERS}, "left"),
    "gemma3_wide": (
        "Gemma3ForCausalLM",
        {**_WIDE, **_GEMMA3, "num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "right",
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**_WIDE, "no_rope_layer_interval": 3}, "left"),
    "smollm3_classification": ("SmolLM3ForSequenceClassification", {**_WIDE, "num_labels": 3}, "right"),
    "qwen2_mixed_windows": (
        "Qwen2ForCausalLM", {**_WIDE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "left"
    ),
}  # fmt: skip
CASES = ("base", "mistral", "qwen2", "llama3", "classification", "span_qa", "mixtral", "qwen3_moe", "gemma3")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import transformers

    name, shape, padding = _CASES[case]
    config = getattr(transformers, name).config_class(**shape, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)

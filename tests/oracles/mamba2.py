"""Reference of mamba2: the classes of transformers for Mamba-2 and for its hybrids with attention, Bamba and
Falcon-H1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.gpt import reference_results

_TINY: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 4, "state_size": 5,
    "n_groups": 2, "chunk_size": 4,
}  # fmt: skip
_WIDE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 16, "state_size": 16,
    "n_groups": 1, "chunk_size": 8,
}  # fmt: skip
_BAMBA: dict[str, Any] = {
    "vocab_size": 31, "max_position_embeddings": 12, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 3,
    "attn_layer_indices": [1], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_n_heads": 6,
    "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 4, "use_cache": False,
}  # fmt: skip
_BAMBA_WIDE: dict[str, Any] = {
    **_BAMBA, "vocab_size": 131, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 40,
    "num_hidden_layers": 4, "attn_layer_indices": [0, 3], "num_attention_heads": 3, "num_key_value_heads": 3,
    "head_dim": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 3,
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "vocab_size": 31, "max_position_embeddings": 12, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 16, "mamba_n_heads": 4,
    "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 4, "mamba_rms_norm": True, "use_cache": False,
    "embedding_multiplier": 3.0, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.6,
    "ssm_multipliers": [0.5, 0.75, 1.5, 0.65, 1.75], "mlp_multipliers": [0.9, 0.55],
}  # fmt: skip
_FALCON_WIDE: dict[str, Any] = {
    **_FALCON, "vocab_size": 131, "max_position_embeddings": 64, "hidden_size": 48, "intermediate_size": 40,
    "num_hidden_layers": 3, "head_dim": 16, "mamba_d_ssm": 72, "mamba_n_heads": 6, "mamba_n_groups": 3,
    "mamba_d_state": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "base": ("Mamba2ForCausalLM", _TINY, "left"),
    "tied": (
        "Mamba2ForCausalLM",
        {
            **_TINY, "n_groups": 1, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False,
            "tie_word_embeddings": True, "time_step_limit": (0.3, 0.9), "layer_norm_epsilon": 1e-3,
        },
        "right",
    ),
    "wide": ("Mamba2ForCausalLM", _WIDE, "right"),
    "groups": ("Mamba2ForCausalLM", {**_WIDE, "n_groups": 6, "use_bias": True, "expand": 1, "head_dim": 8}, None),
    "headless": ("Mamba2Model", {**_WIDE, "conv_kernel": 2}, "left"),
    "bamba": ("BambaForCausalLM", _BAMBA, "left"),
    # If in_proj has biases, padding on the left changes the outputs of real tokens in transformers.
    "bamba_bias": (
        "BambaForCausalLM",
        {
            **_BAMBA_WIDE, "attention_bias": True, "mamba_proj_bias": True, "tie_word_embeddings": True,
            "partial_rotary_factor": 1.0, "rope_scaling": _YARN, "rope_theta": 500.0,
        },
        "right",
    ),
    "bamba_headless": ("BambaModel", {**_BAMBA_WIDE, "attn_layer_indices": None, "mamba_conv_bias": False}, "left"),
    "falcon": ("FalconH1ForCausalLM", _FALCON, "left"),
    "falcon_bias": (
        "FalconH1ForCausalLM",
        {
            **_FALCON_WIDE, "attention_bias": True, "mamba_proj_bias": True, "projectors_bias": True,
            "tie_word_embeddings": True, "rope_scaling": _YARN, "mamba_norm_before_gate": False,
        },
        "right",
    ),
    "falcon_headless": ("FalconH1Model", {**_FALCON_WIDE, "mamba_rms_norm": False, "mamba_d_ssm": None}, "left"),
}  # fmt: skip
CASES = ("base", "tied", "bamba", "falcon")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import transformers

    name, shape, padding = _CASES[case]
    config = getattr(transformers, name).config_class(**shape, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)

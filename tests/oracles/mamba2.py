"""Reference of mamba2: the Mamba-2 classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.gpt import reference_results

_TINY = {
    "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 4, "state_size": 5,
    "n_groups": 2, "chunk_size": 4,
}  # fmt: skip
_WIDE = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 16, "state_size": 16,
    "n_groups": 1, "chunk_size": 8,
}  # fmt: skip
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
}  # fmt: skip
CASES = ("base", "tied")
LIVE = ("wide", "groups", "headless")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import transformers

    name, shape, padding = _CASES[case]
    config = transformers.Mamba2Config(**shape, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)

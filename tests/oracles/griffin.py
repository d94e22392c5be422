"""Reference of griffin: the RecurrentGemma classes of transformers, which read each document separately.

The classes have no documents, their recurrent blocks also read padding, and they apply the window only with a cache.
So each document is one call, and no document is longer than the window. ``tests/models/test_griffin_live.py`` compares
cached decoding with a window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles._float64 import as_float32, float64
from tests.oracles._native import each_text, padding

_TINY = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "lru_width": 12, "attention_window_size": 12,
}  # fmt: skip
_WIDE = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_window_size": 32,
}  # fmt: skip
_CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # class, shape, padding or documents
    "base": ("RecurrentGemmaForCausalLM", {**_TINY, "logits_soft_cap": 3.0}, "packed"),
    "untied": (
        "RecurrentGemmaForCausalLM",
        {**_TINY, "tie_word_embeddings": False, "conv1d_width": 3, "block_types": ["attention", "recurrent"]}, "left",
    ),
    "wide": ("RecurrentGemmaForCausalLM", {**_WIDE, "rope_theta": 100.0, "rms_norm_eps": 1e-3}, "right"),
    "hawk": ("RecurrentGemmaForCausalLM", {**_WIDE, "block_types": ["recurrent"], "conv1d_width": 2}, "packed"),
    "attention": ("RecurrentGemmaForCausalLM", {**_WIDE, "block_types": ["attention"]}, "packed"),
    "model": ("RecurrentGemmaModel", {**_WIDE, "num_key_value_heads": None}, "none"),
}  # fmt: skip
CASES = ("base", "untied")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import torch
    import transformers

    from benchmarks.torch_models import forget_states  # imports torch

    name, shape, kind = _CASES[case]
    seed = list(_CASES).index(case)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(transformers.RecurrentGemmaConfig(**shape)).eval()
    # The noise makes biases and norm weights differ from 0. With more noise in the wide cases, attention probabilities
    # are near 0 or 1. Float32 gradients of torch then differ from its float64 gradients by 3e-5.
    noise = min(0.25, shape["hidden_size"] ** -0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    model.save_pretrained(directory)

    rng = np.random.default_rng(seed)
    B, T = 3, shape["attention_window_size"]
    tokens = rng.integers(1, shape["vocab_size"], (B, T)).astype(np.int32)  # id 0 is torch's padding_idx
    segment_ids = padding(kind, (B, T))

    def run(text: np.ndarray) -> Any:
        forget_states(model)
        ids = torch.from_numpy(text).long()[None]
        if name == "RecurrentGemmaModel":
            return model(ids, use_cache=False).last_hidden_state[0]
        output = model(ids, use_cache=False, output_hidden_states=True)
        return torch.cat([output.hidden_states[-1], output.logits], dim=-1)[0]

    with float64(model):
        outputs, real = each_text(run, tokens, segment_ids)
    hidden, logits = outputs[..., : shape["hidden_size"]], outputs[..., shape["hidden_size"] :]
    result: dict[str, Any] = {"input/tokens": tokens, "hidden": hidden, "real": real}
    if segment_ids is not None:
        result["input/segment_ids"] = segment_ids
    if name != "RecurrentGemmaModel":
        targets = rng.integers(0, shape["vocab_size"], (B, T)).astype(np.int32)
        weights = (real & (rng.random((B, T)) < 0.8)).astype(np.float32)
        losses = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(targets).long(), reduction="none")
        loss = (losses * torch.from_numpy(weights)).sum() / weights.sum()
        loss.backward()
        result |= {"logits": logits, "targets": targets, "weights": weights, "loss": loss}
        result |= {f"gradient/{key}": parameter.grad for key, parameter in model.named_parameters()}
    return as_float32(result)

"""Reference of gpt: GPT-1 and GPT-2 of transformers, without a head and with the heads for language modelling,
classification, labels of tokens and (GPT-2) answers to questions.

Other decoder families use :func:`reference_results` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.classes import declare_tied_head
from tests.oracles._float64 import as_float32, float64

_TINY = {"vocab_size": 31, "n_positions": 12, "n_embd": 9, "n_layer": 2, "n_head": 3}
_WIDE = {"vocab_size": 131, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4}
_CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "base": ("GPT2LMHeadModel", _TINY, "left"),
    "gpt1": ("OpenAIGPTLMHeadModel", _TINY, "left"),
    "gpt1_classification": ("OpenAIGPTForSequenceClassification", {**_TINY, "num_labels": 3}, "right"),
    "classification": ("GPT2ForSequenceClassification", {**_TINY, "num_labels": 4}, "right"),
    "tagging": ("GPT2ForTokenClassification", {**_TINY, "num_labels": 3}, "left"),
    "span_qa": ("GPT2ForQuestionAnswering", _TINY, None),
    "wide": ("GPT2LMHeadModel", {**_WIDE, "n_inner": 20, "tie_word_embeddings": False}, "right"),
    "gpt1_wide": ("OpenAIGPTLMHeadModel", {**_WIDE, "afn": "relu", "layer_norm_epsilon": 1e-3}, "right"),
    "gpt1_base": ("OpenAIGPTModel", {**_WIDE, "n_head": 12}, None),
    "classification_left": ("GPT2ForSequenceClassification", {**_WIDE, "num_labels": 2}, "left"),
    "gpt2_base": ("GPT2Model", {**_WIDE, "activation_function": "gelu"}, None),
}
CASES = ("base", "gpt1", "gpt1_classification", "classification", "tagging", "span_qa")
LIVE = ("wide", "gpt1_wide", "gpt1_base", "classification_left", "gpt2_base")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random GPT, and return its results for random texts."""
    import transformers

    name, shape, padding = _CASES[case]
    config_class = transformers.OpenAIGPTConfig if name.startswith("OpenAI") else transformers.GPT2Config
    config = config_class(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)


def reference_results(name: str, config: Any, padding: str | None, seed: int, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, class ``name`` of transformers with ``config``, and return its results.

    The results are computed in float64.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Strong decays have inaccurate float32 gradients: in jaxlm for Bamba and Falcon-H1, in transformers for
            # Qwen3-Next (docs/families/mamba2.md, gated_deltanet.md). So the decays are made weak.
            if config.model_type in ("qwen3_next", "bamba", "falcon_h1") and key.endswith("A_log"):
                parameter.fill_(-2.0)
            parameter.add_(0.25 * torch.randn(parameter.shape))  # so that biases are not 0 and scales are not 1
    declare_tied_head(model)
    model.save_pretrained(directory)

    B, T = 3, min(getattr(config, "max_position_embeddings", 24), 24)  # Mamba-2 has no maximum length
    mask = torch.ones(B, T, dtype=torch.long)
    if padding is not None:
        for row, pads in enumerate((0, 4, 2)):
            mask[row, slice(T - pads, T) if padding == "right" else slice(0, pads)] = 0
    # No real token has the padding id: classifiers search for this id, and its embedding may get no gradient in torch.
    tokens = torch.randint(1, config.vocab_size, (B, T)).masked_fill(mask == 0, config.pad_token_id)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with float64(model):
        hidden = getattr(model, "model", model.base_model)(**inputs).last_hidden_state
        output = model(**inputs)
    result = {"input/tokens": tokens.int(), "hidden": hidden}
    if padding is not None:
        result["input/segment_ids"] = mask.int()

    if "last_hidden_state" not in output:
        logits = (
            torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits
        )
        if "start_logits" in output:  # a softmax over positions for the start and one for the end
            targets, weights = torch.randint(T, (B, 2)), torch.ones(B)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)
        elif logits.ndim == 2:
            targets, weights = torch.randint(logits.shape[-1], (B,)), torch.ones(B)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        else:
            targets, weights = torch.randint(logits.shape[-1], (B, T)), mask * (torch.rand(B, T) < 0.8)
            losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        result |= {"logits": logits, "targets": targets.int(), "weights": weights.float(), "loss": loss}
        result |= {f"gradient/{key}": parameter.grad for key, parameter in model.named_parameters()}
    return as_float32(result)

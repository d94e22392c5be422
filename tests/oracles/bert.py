"""Reference of bert: the BERT classes of transformers, with padding on both sides and with sentence pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CASES = ("masked", "classification", "tagging", "span_qa", "base")
LIVE = ("wide", "tanh", "pretraining", "next_sentence")

_TINY = {
    "vocab_size": 27, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
    "max_position_embeddings": 14,
}  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "masked": ("BertForMaskedLM", {}, "right"),
    "classification": ("BertForSequenceClassification", {"num_labels": 4}, "right"),
    "tagging": ("BertForTokenClassification", {"num_labels": 5, "num_attention_heads": 1}, "left"),
    "span_qa": ("BertForQuestionAnswering", {"hidden_act": "relu"}, None),
    "base": ("BertModel", {"layer_norm_eps": 1e-3}, "right"),
    "wide": (
        "BertForMaskedLM",
        {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 131},
        "left",
    ),
    "tanh": (
        "BertForMaskedLM",
        {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 3, "intermediate_size": 9},
        None,
    ),
    "pretraining": ("BertForPreTraining", {"hidden_act": "gelu_new"}, "left"),
    "next_sentence": ("BertForNextSentencePrediction", {"num_attention_heads": 6}, "right"),
}


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random BERT, and return its results for random sentence pairs."""
    from transformers import BertConfig

    name, shape, padding = _MODELS[case]
    seed = list(_MODELS).index(case)
    return reference_results(name, BertConfig(**{**_TINY, **shape}), padding, seed, directory)


def reference_results(name: str, config: Any, padding: str | None, seed: int, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random encoder, class ``name`` of transformers with ``config``, and return its results."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases are not 0 and scales are not 1
            parameter.add_(0.25 * torch.randn(parameter.shape))
    model.save_pretrained(directory)

    B, T = 3, 11
    mask = torch.ones(B, T, dtype=torch.long)
    if padding is not None:
        for row, pads in enumerate((0, 4, 2)):
            mask[row, slice(T - pads, T) if padding == "right" else slice(0, pads)] = 0
    # No real token has the padding id, because the gradient of its embedding is 0 in torch.
    tokens = torch.randint(3, config.vocab_size, (B, T)).masked_fill(mask == 0, config.pad_token_id)
    types = torch.randint(config.type_vocab_size, (B, T))
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    if config.model_type == "bert":  # RoBERTa computes the positions from the padding
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)

    labels, targets, weights = _labels(name, config, mask)
    output = model(**inputs, **labels, output_hidden_states=True)
    result = {
        "input/tokens": tokens.int(), "input/segment_ids": mask.int(), "input/token_types": types.int(),
        "hidden": output.hidden_states[-1],
    }  # fmt: skip
    if targets is not None:
        if name.endswith("PreTraining"):
            logits = output.prediction_logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())
        elif name.endswith("QuestionAnswering"):
            logits, loss = torch.stack([output.start_logits, output.end_logits], dim=-1), output.loss
        else:
            logits, loss = output.logits, output.loss
        loss.backward()
        result |= {"logits": logits, "targets": targets.int(), "weights": weights.float(), "loss": loss}
        for key, parameter in model.named_parameters():
            unused = torch.zeros_like(parameter)  # the masked-token loss does not use the next-sentence head
            result[f"gradient/{key}"] = unused if parameter.grad is None else parameter.grad
    return {key: value.detach().numpy() for key, value in result.items()}


def _labels(name: str, config: Any, mask: Any) -> tuple[dict[str, Any], Any, Any]:
    """Random labels as arguments of the class, and targets and weights of a batch (None for a class without loss)."""
    import torch

    B, T = mask.shape
    if name.endswith("SequenceClassification"):
        targets = torch.randint(config.num_labels, (B,))
        return {"labels": targets}, targets, torch.ones(B)
    if name.endswith("QuestionAnswering"):
        targets = torch.randint(T, (B, 2))
        return {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}, targets, torch.ones(B)
    if name.endswith(("MaskedLM", "PreTraining", "TokenClassification")):
        targets = torch.randint(config.num_labels if "Token" in name else config.vocab_size, (B, T))
        target_mask = (mask == 1) & (torch.rand(B, T) < 0.4)
        return {"labels": targets.masked_fill(~target_mask, -100)}, targets, target_mask
    return {}, None, None

"""Reference of roberta: the RoBERTa classes of transformers, which compute positions, with padding on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.bert import reference_results

CASES = ("masked", "classification", "base")
LIVE = ("wide", "tagging", "span_qa")

_TINY = {
    "vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 15, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "masked": ("RobertaForMaskedLM", {}, "right"),
    "classification": ("RobertaForSequenceClassification", {"num_labels": 3}, "right"),
    "base": ("RobertaModel", {"type_vocab_size": 2}, "left"),
    "wide": (
        "RobertaForMaskedLM",
        {"hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 3, "vocab_size": 113},
        "left",
    ),
    "tagging": ("RobertaForTokenClassification", {"num_labels": 6}, "right"),
    "span_qa": ("RobertaForQuestionAnswering", {"layer_norm_eps": 1e-3}, None),
}


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random RoBERTa, and return its results for random texts."""
    from transformers import RobertaConfig

    name, shape, padding = _MODELS[case]
    seed = 100 + list(_MODELS).index(case)
    return reference_results(name, RobertaConfig(**{**_TINY, **shape}), padding, seed, directory)

"""Reference of lstm: ``torch.nn.LSTM``, one layer, one direction and one text at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles import _recurrent

_SMALL = {"vocab_size": 30, "embed_dim": 10}
_CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # variant, fields of the config, padding
    "base": ("lstm-tiny", {"vocab_size": 30, "embed_dim": 8, "hidden_dim": 10, "num_layers": 3}, "none"),
    "documents": ("lstm-tiny", {**_SMALL, "hidden_dim": 12, "tie_embeddings": False}, "packed"),
    "left": ("lstm-tiny", {**_SMALL, "hidden_dim": 8}, "left"),
    "classes": ("lstm-encoder-tiny", {**_SMALL, "hidden_dim": 8, "num_labels": 3}, "right"),
    "tags": (
        "lstm-encoder-tiny",
        {**_SMALL, "hidden_dim": 6, "num_labels": 4, "task": "token_classification"},
        "packed",
    ),
    "wide": ("lstm-tiny", {"vocab_size": 90, "embed_dim": 24, "hidden_dim": 64, "num_layers": 3}, "right"),
    "deep": ("lstm-encoder-tiny", {"embed_dim": 20, "hidden_dim": 24, "num_layers": 3}, "left"),
    "one_way": ("lstm-encoder-tiny", {"hidden_dim": 24, "direction": "forward"}, "right"),
    "headless": ("lstm-encoder-tiny", {"num_layers": 1, "task": "none"}, "packed"),
}
CASES = ("base", "documents", "left", "classes", "tags")
LIVE = ("wide", "deep", "one_way", "headless")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random LSTM, and return torch's results for random texts."""
    layer = functools.partial(_recurrent.torch_layer, "LSTM")
    return _recurrent.reference(*_CASES[case], list(_CASES).index(case), layer, directory)

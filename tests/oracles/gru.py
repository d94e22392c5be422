"""Reference of gru: ``torch.nn.GRU`` (reset after) and a loop in torch (reset before), one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles import _recurrent

_SMALL = {"vocab_size": 30, "embed_dim": 10}
_CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # variant, fields of the config, padding
    "base": ("gru-tiny", {"vocab_size": 30, "embed_dim": 8, "hidden_dim": 10, "num_layers": 3}, "none"),
    "before": ("gru-tiny", {**_SMALL, "hidden_dim": 12, "reset": "before", "tie_embeddings": False}, "packed"),
    "left": ("gru-tiny", {**_SMALL, "hidden_dim": 8}, "left"),
    "classes": ("gru-encoder-tiny", {**_SMALL, "hidden_dim": 8, "num_labels": 3}, "right"),
    "tags": (
        "gru-encoder-tiny",
        {**_SMALL, "hidden_dim": 6, "reset": "before", "task": "token_classification"},
        "packed",
    ),
    "wide": ("gru-tiny", {"vocab_size": 90, "embed_dim": 24, "hidden_dim": 64, "num_layers": 3}, "right"),
    "deep": ("gru-encoder-tiny", {"embed_dim": 20, "hidden_dim": 24, "num_layers": 3, "reset": "before"}, "left"),
    "headless": ("gru-encoder-tiny", {"num_layers": 1, "task": "none"}, "packed"),
}
CASES = ("base", "before", "left", "classes", "tags")
LIVE = ("wide", "deep", "headless")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random GRU, and return torch's results for random texts."""
    return _recurrent.reference(*_CASES[case], list(_CASES).index(case), _layer, directory)


def _layer(params: dict[str, Any], x: Any) -> Any:
    if "bias_hidden" in params:
        return _recurrent.torch_layer("GRU", params, x)
    import torch

    def product(x: Any, weight: str, gate: int) -> Any:
        return x @ params[weight][:, gate]

    h, outputs = torch.zeros(params["bias"].shape[1]), []
    for token in x:
        projected = [product(token, "weight_input", gate) + params["bias"][gate] for gate in range(3)]
        r = torch.sigmoid(projected[0] + product(h, "weight_hidden", 0))
        z = torch.sigmoid(projected[1] + product(h, "weight_hidden", 1))
        n = torch.tanh(projected[2] + product(r * h, "weight_hidden", 2))
        h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs)

"""Reference of alexnet (convolutional networks over characters), the classifier and the language model, in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_TINY = {"vocab_size": 17, "max_positions": 30, "embed_dim": 16, "channels": 8, "fc_dim": 12, "kernels": (5, 3)}
_DEEP = {"vocab_size": 71, "embed_dim": 70, "channels": 24, "kernels": (7, 7, 3, 3, 3, 3), "pools": (3, 3, 1, 1, 1, 3)}
_LM = {"vocab_size": 20, "embed_dim": 8, "channels": 10, "fc_dim": 12, "kernels": (3, 2)}
_CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # variant, fields of the config, padding
    "base": ("alexnet-tiny", {**_TINY, "pools": (3, 2), "num_labels": 3}, "right"),
    "forward": ("alexnet-tiny", {**_TINY, "pools": (2, 1), "embedding": "learned", "reverse": False}, "left"),
    "lm": ("alexnet-lm-tiny", {**_LM, "pools": (3, 2)}, "none"),
    "lm_packed": ("alexnet-lm-tiny", {**_LM, "pools": (2, 3)}, "packed"),
    "deep": ("alexnet-tiny", {**_DEEP, "max_positions": 150, "fc_dim": 20, "num_labels": 5}, "left"),
    "features": ("alexnet-tiny", {**_DEEP, "max_positions": 151, "task": "none"}, "right"),
    "lm_deep": ("alexnet-lm-tiny", {**_DEEP, "embedding": "one_hot"}, "packed"),
    "lm_left": ("alexnet-lm-tiny", {**_DEEP, "vocab_size": 40, "embed_dim": 16}, "left"),
}
CASES = ("base", "forward", "lm", "lm_packed")
LIVE = ("deep", "features", "lm_deep", "lm_left")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random network, and return torch's results for random texts."""
    variant, fields, segments = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model(variant, **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    B, T = 3, 14 if cfg.task == "causal" and len(cfg.kernels) == 2 else 140 if cfg.task == "causal" else 28
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    segment_ids = _native.padding(segments, (B, T))
    if cfg.embedding == "one_hot":
        tensors["token_embedding"].requires_grad_(False)
    if cfg.task == "causal":
        hidden, real = _native.each_text(lambda text: hidden_of_text(cfg, tensors, text), tokens, segment_ids)
        logits = hidden @ tensors["head"].mT
    else:
        hidden = features_of_texts(cfg, tensors, tokens, segment_ids)
        real, logits = np.ones(hidden.shape[:2], bool), None
        if cfg.task == "classification":
            x = hidden_layers(tensors, hidden.flatten(1))
            logits = x @ tensors["classifier/weight"] + tensors["classifier/bias"]
    return _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)


def features_of_texts(cfg: Any, tensors: dict[str, Any], tokens: np.ndarray, segment_ids: np.ndarray | None) -> Any:
    """Features [B, S, C] of complete texts. As in the paper, texts are reversed, and short texts end with zeros."""
    import torch
    from torch.nn import functional

    x = torch.zeros(len(tokens), cfg.max_positions, cfg.embed_dim)
    for row in range(len(tokens)):
        text = tokens[row] if segment_ids is None else tokens[row][segment_ids[row] > 0]
        text = torch.from_numpy(text.copy()).long()
        x[row, : len(text)] = tensors["token_embedding"][text.flip(0) if cfg.reverse else text]
    x = x.mT
    for layer, pool in enumerate(cfg.pools):
        weight, bias = tensors[f"layer_{layer}/weight"].permute(2, 1, 0), tensors[f"layer_{layer}/bias"]
        x = functional.max_pool1d(functional.conv1d(x, weight, bias).relu(), pool)
    return x.mT


def hidden_of_text(cfg: Any, tensors: dict[str, Any], text: np.ndarray) -> Any:
    """Hidden states [T, fc_dim] of one text."""
    import torch
    from torch.nn import functional

    x, dilation = tensors["token_embedding"][torch.from_numpy(text).long()].mT[None], 1
    for layer, (kernel, pool) in enumerate(zip(cfg.kernels, cfg.pools, strict=True)):
        weight, bias = tensors[f"layer_{layer}/weight"].permute(2, 1, 0), tensors[f"layer_{layer}/bias"]
        x = functional.pad(x, ((kernel - 1) * dilation, 0))
        x = functional.conv1d(x, weight, bias, dilation=dilation).relu()
        x = functional.pad(x, ((pool - 1) * dilation, 0), value=-torch.inf)
        x = functional.max_pool1d(x, pool, stride=1, dilation=dilation)
        dilation *= pool
    return hidden_layers(tensors, x[0].mT)


def hidden_layers(tensors: dict[str, Any], x: Any) -> Any:
    """The outputs of the two fully connected layers."""
    for name in ("fc_1", "fc_2"):
        x = (x @ tensors[f"{name}/weight"] + tensors[f"{name}/bias"]).relu()
    return x

"""Reference of attention_rnn_lm: ``torch.nn.LSTM`` and the attention equations of the papers, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native, _recurrent

_SMALL = {"vocab_size": 30, "embed_dim": 6, "hidden_dim": 12}
_LM, _CLASSIFIER = "attention-rnn-lm-tiny", "attention-rnn-classifier-tiny"
_CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # variant, fields of the config, padding
    "base": (_LM, {**_SMALL, "num_layers": 1}, "none"),
    "window": (_LM, {**_SMALL, "window": 3, "parts": 2, "num_layers": 1}, "packed"),
    "predict": (_LM, {**_SMALL, "window": 2, "parts": 3, "num_layers": 1}, "left"),
    "classes": (_CLASSIFIER, {**_SMALL, "hidden_dim": 6, "attention_dim": 7, "num_labels": 3}, "right"),
    "one_hop": (_CLASSIFIER, {**_SMALL, "hidden_dim": 5, "num_layers": 1, "hops": 1}, "left"),
    "deep": (_LM, {"num_layers": 3, "hidden_dim": 48, "parts": 3}, "packed"),
    "short": (_LM, {"num_layers": 2, "hidden_dim": 40, "window": 1}, "right"),
    "hops": (_CLASSIFIER, {"num_layers": 2, "hidden_dim": 20, "hops": 5, "num_labels": 6}, "none"),
}
CASES = ("base", "window", "predict", "classes", "one_hop")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return the results of the equations for random texts."""
    import torch

    variant, fields, segments = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model(variant, **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (3, 11)).astype(np.int32)
    segment_ids = _native.padding(segments, tokens.shape)
    if cfg.task == "causal":
        hidden, real = _native.each_text(lambda text: language_model(cfg, tensors, text), tokens, segment_ids)
        logits = hidden @ tensors["head/weight"].mT + tensors["head/bias"]
    else:
        hidden, real = _native.each_text(lambda text: both_directions(cfg, tensors, text), tokens, segment_ids)
        texts = [row[torch.from_numpy(mask)] for row, mask in zip(hidden, real, strict=True)]
        logits = torch.stack([embedding(tensors, text) for text in texts]) @ tensors["classifier/weight"]
        logits = logits + tensors["classifier/bias"]
    return _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)


def _lstm(tensors: dict[str, Any], name: str, x: Any) -> Any:
    params = {path.removeprefix(f"{name}/"): x for path, x in tensors.items() if path.startswith(f"{name}/")}
    return _recurrent.torch_layer("LSTM", params, x)


def language_model(cfg: Any, tensors: dict[str, Any], text: np.ndarray) -> Any:
    """h*[t] of Daniluk et al. 2017, section 2, with attention, key-value attention or key-value-predict attention."""
    import torch

    x = tensors["token_embedding"][torch.from_numpy(text).long()]
    for layer in range(cfg.num_layers):
        x = _lstm(tensors, f"layer_{layer}", x)
    W_Y, W_h, w = (tensors[f"alignment/{name}"] for name in ("key/weight", "query/weight", "score"))
    W_r, W_x, bias = (tensors[f"output/{name}"] for name in ("found/weight", "state/weight", "state/bias"))
    width = cfg.hidden_dim // cfg.parts
    outputs, keys, values = [], [], []
    for h in x:
        parts = [h[i * width : (i + 1) * width] for i in range(cfg.parts)]
        k, v, p = {1: lambda a: (a, a, a), 2: lambda a, b: (a, b, b), 3: lambda a, b, c: (a, b, c)}[cfg.parts](*parts)
        first = 0 if cfg.window is None else max(0, len(keys) - cfg.window)
        r = torch.zeros(width)
        if keys:
            M = [torch.tanh(key @ W_Y + k @ W_h) for key in keys[first:]]
            weights = torch.softmax(torch.stack([w @ m for m in M]), 0)
            r = sum(weight * value for weight, value in zip(weights, values[first:], strict=True))
        outputs.append(torch.tanh(r @ W_r + p @ W_x + bias))
        keys.append(k)
        values.append(v)
    return torch.stack(outputs)


def both_directions(cfg: Any, tensors: dict[str, Any], text: np.ndarray) -> Any:
    """The matrix H of hidden states of Lin et al. 2017, [T, 2H]."""
    import torch

    x = tensors["token_embedding"][torch.from_numpy(text).long()]
    for layer in range(cfg.num_layers):
        forward = _lstm(tensors, f"layer_{layer}/forward", x)
        backward = _lstm(tensors, f"layer_{layer}/backward", x.flip(0)).flip(0)
        x = torch.cat([forward, backward], dim=-1)
    return x


def embedding(tensors: dict[str, Any], H: Any) -> Any:
    """The flattened matrix M = A H with A = softmax(W_s2 tanh(W_s1 H' + b)) (Lin et al. 2017, eq. 6)."""
    import torch

    W_s1, b, W_s2 = (tensors[f"pooling/{name}"] for name in ("key/weight", "key/bias", "score/weight"))
    A = torch.softmax(W_s2.mT @ torch.tanh(W_s1.mT @ H.mT + b[:, None]), dim=1)
    return (A @ H).flatten()

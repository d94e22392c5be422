"""Reference of resnet: VDCNN with torch's convolutions, batch norms and poolings. Texts are padded as in the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_TINY = {
    "vocab_size": 30,
    "max_positions": 16,
    "embed_dim": 6,
    "channels": 8,
    "blocks": (1, 1),
    "k_max": 3,
    "fc_dim": 12,
}
_WIDE = {"vocab_size": 70, "max_positions": 48, "embed_dim": 16, "channels": 20, "blocks": (2, 1, 1, 2), "k_max": 4}
_CASES: dict[str, tuple[dict[str, Any], str]] = {  # fields of the config, padding
    "base": ({**_TINY, "shortcut": False, "num_labels": 3}, "right"),
    "shortcut": ({**_TINY, "shortcut": True, "num_labels": 2}, "left"),
    "k_max_pool": ({**_TINY, "shortcut": True, "downsample": "k_max_pool"}, "none"),
    "convolution": ({**_TINY, "shortcut": True, "downsample": "convolution", "norm_epsilon": 1e-2}, "right"),
    "wide": ({**_WIDE, "fc_dim": 40, "shortcut": True, "num_labels": 14}, "left"),
    "plain": ({**_WIDE, "fc_dim": 24, "shortcut": False, "downsample": "convolution"}, "none"),
    "features": ({**_WIDE, "downsample": "k_max_pool", "task": "none"}, "right"),
}
CASES = ("base", "shortcut", "k_max_pool", "convolution")
LIVE = ("wide", "plain", "features")
# The loss is a mean over only three texts, so its rounding error is as large as that of the logits.
TOLERANCES = {"loss": 1e-5}


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random VDCNN, and return torch's results for random texts."""
    fields, segments = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model("resnet-tiny", **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    B, T = 3, cfg.max_positions - 4
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    segment_ids = _native.padding(segments, (B, T))
    hidden, _ = features(cfg, tensors, tokens, segment_ids, training=False)
    logits = labels(cfg, tensors, hidden) if cfg.task == "classification" else None
    real = np.ones(hidden.shape[:2], bool)
    return _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)


def features(
    cfg: Any, tensors: dict[str, Any], tokens: np.ndarray, segment_ids: np.ndarray | None, *, training: bool
) -> tuple[Any, dict[str, Any]]:
    """Features [B, S, C], and the running statistics, which torch updates in place if ``training``."""
    import torch
    from torch.nn import functional

    statistics = {path: x.detach().clone() for path, x in tensors.items() if path.startswith("statistics")}

    def conv(name: str, x: Any, stride: int = 1) -> Any:
        weight = tensors[f"{name}/weight"].permute(2, 1, 0)
        pad = weight.shape[-1] // 2
        return functional.conv1d(x, weight, tensors.get(f"{name}/bias"), stride=stride, padding=pad)

    def norm(name: str, x: Any) -> Any:
        mean, variance = (statistics[f"statistics/{name}/{part}"] for part in ("mean", "variance"))
        scale, bias = (tensors[f"{name}/{part}"] for part in ("scale", "bias"))
        return functional.batch_norm(x, mean, variance, scale, bias, training, cfg.norm_momentum, cfg.norm_epsilon)

    x = torch.zeros(len(tokens), cfg.max_positions, cfg.embed_dim)
    for row in range(len(tokens)):
        text = tokens[row] if segment_ids is None else tokens[row][segment_ids[row] > 0]
        x[row, : len(text)] = tensors["token_embedding"][torch.from_numpy(text).long()]
    x = conv("input", x.mT)
    layer = 0
    for group, blocks in enumerate(cfg.blocks):
        for block in range(blocks):
            name, stride = f"layer_{layer}", 1
            if group and not block:
                if cfg.downsample == "max_pool":
                    x = functional.max_pool1d(x, 3, stride=2, padding=1)
                elif cfg.downsample == "k_max_pool":
                    x = k_max(x, x.shape[-1] // 2)
                else:
                    stride = 2
            residual = conv(f"{name}/shortcut", x, stride) if f"{name}/shortcut/weight" in tensors else x
            x = functional.relu(norm(f"{name}/norm_1", conv(f"{name}/convolution_1", x, stride)))
            x = norm(f"{name}/norm_2", conv(f"{name}/convolution_2", x))
            x = functional.relu(x + residual if cfg.shortcut else x)
            layer += 1
    return x.mT, statistics


def k_max(x: Any, k: int) -> Any:
    """The k largest values along the last axis, in their original order. Among equal values, the first are selected."""
    positions = x.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    return x.gather(-1, positions)


def labels(cfg: Any, tensors: dict[str, Any], hidden: Any) -> Any:
    """Logits [B, num_labels]."""
    x = k_max(hidden.mT, cfg.k_max).mT.flatten(1)
    for name in ("fc_1", "fc_2"):
        x = (x @ tensors[f"{name}/weight"] + tensors[f"{name}/bias"]).relu()
    return x @ tensors["classifier/weight"] + tensors["classifier/bias"]

"""Reference of resnet: VDCNN with torch's convolutions, batch norms and poolings. Texts are padded as in the paper."""

from __future__ import annotations

import dataclasses
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

    statistics = {path: x.detach().clone() for path, x in tensors.items() if path.startswith("statistics")}
    x = torch.zeros(len(tokens), cfg.max_positions, cfg.embed_dim)
    for row in range(len(tokens)):
        text = tokens[row] if segment_ids is None else tokens[row][segment_ids[row] > 0]
        x[row, : len(text)] = tensors["token_embedding"][torch.from_numpy(text).long()]
    return _call(cfg, "body", {**tensors, **statistics}, x.mT, training=training).mT, statistics


def labels(cfg: Any, tensors: dict[str, Any], hidden: Any) -> Any:
    """Logits [B, num_labels]."""
    return _call(cfg, "head", tensors, hidden.mT, training=False)


def _call(cfg: Any, part: str, tensors: dict[str, Any], x: Any, *, training: bool) -> Any:
    """The output of a part of torch's VDCNN with the tensors of jaxlm."""
    import torch

    from benchmarks import torch_models

    named = torch_models.vdcnn_state({path.replace("/", "."): tensor for path, tensor in tensors.items()})
    state = {name.removeprefix(f"{part}."): tensor for name, tensor in named.items() if name.startswith(f"{part}.")}
    module = getattr(torch_models.VDCNN(dataclasses.asdict(cfg)), part).train(training)
    return torch.func.functional_call(module, state, (x,))

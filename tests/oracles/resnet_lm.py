"""Reference of resnet_lm: GCNN (fairseq's ``fconv_lm``) with torch's convolution, GLU and weight norm, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_BOTTLENECK = ((8, 3, 1), (6, 1, 0), (6, 4, 0), (12, 1, 3))
_DEEP = ((24, 5, 1), (24, 1, 0), (16, 4, 2), (40, 3, 3), (40, 2, 0), (32, 7, 4))
_CASES: dict[str, tuple[dict[str, Any], str]] = {  # fields of the config, padding
    "base": ({"vocab_size": 30, "embed_dim": 10, "blocks": ((8, 3, 1), (8, 4, 1))}, "none"),
    "bottleneck": ({"vocab_size": 30, "embed_dim": 8, "blocks": _BOTTLENECK}, "packed"),
    "left": ({"vocab_size": 24, "embed_dim": 6, "blocks": ((10, 2, 0), (8, 5, 1))}, "left"),
    "deep": ({"vocab_size": 90, "embed_dim": 20, "blocks": _DEEP}, "packed"),
    "right": ({"vocab_size": 64, "embed_dim": 16, "blocks": ((32, 4, 1),) * 3}, "right"),
    "headless": ({"vocab_size": 64, "embed_dim": 16, "blocks": _DEEP, "task": "none"}, "left"),
}
CASES = ("base", "bottleneck", "left")
LIVE = ("deep", "right", "headless")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random GCNN, and return torch's results for random texts."""
    fields, segments = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model("resnet-lm-tiny", **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (3, 13)).astype(np.int32)
    segment_ids = _native.padding(segments, tokens.shape)
    hidden, real = _native.each_text(lambda text: hidden_of_text(cfg, tensors, text), tokens, segment_ids)
    logits = hidden @ tensors["head"].mT if cfg.task == "causal" else None
    return _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)


def hidden_of_text(cfg: Any, tensors: dict[str, Any], text: np.ndarray) -> Any:
    """Hidden states [T, C] of one text."""
    import torch
    from torch.nn import functional

    def linear(name: str, x: Any) -> Any:
        direction, gain = tensors[f"{name}/direction"].mT, tensors[f"{name}/gain"][:, None]
        return functional.linear(x, torch._weight_norm(direction, gain, 0), tensors[f"{name}/bias"])

    x = linear("input", tensors["token_embedding"][torch.from_numpy(text).long()])
    outputs = [x]
    for number, (_, kernel, residual) in enumerate(cfg.blocks):
        name = f"layer_{number}/convolution"
        # From [kernel, in, 2, out] to torch's [2 * out, in, kernel]: first the linear half, then the gate.
        direction = tensors[f"{name}/direction"].flatten(2).permute(2, 1, 0)
        weight = torch._weight_norm(direction, tensors[f"{name}/gain"].flatten()[:, None, None], 0)
        padded = functional.pad(x.mT, (kernel - 1, 0))
        x = functional.glu(functional.conv1d(padded, weight, tensors[f"{name}/bias"].flatten()), dim=0).mT
        if residual:
            earlier, projection = outputs[-residual], f"layer_{number}/residual"
            earlier = linear(projection, earlier) if f"{projection}/gain" in tensors else earlier
            x = (x + earlier) * 0.5**0.5
        outputs.append(x)
    return x

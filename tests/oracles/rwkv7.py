"""Reference of rwkv7: the equations of the paper in torch, one token at a time, on the tensors of the files.

``tests/models/test_rwkv7_live.py`` compares this reference with the authors' package ``rwkv``, which has no gradients.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_TINY: dict[str, Any] = {
    "vocab_size": 30, "embed_dim": 12, "head_dim": 4, "mlp_dim": 20, "decay_rank": 3, "rate_rank": 4, "value_rank": 2,
    "gate_rank": 5, "group_norm_epsilon": 64e-5,
}  # fmt: skip
_WIDE = {**_TINY, "vocab_size": 90, "embed_dim": 48, "head_dim": 16, "mlp_dim": 100, "num_layers": 4, "gate_rank": 30}
_CASES: dict[str, tuple[dict[str, Any], str]] = {  # fields of the config, padding
    "base": (_TINY, "packed"),
    "deep": ({**_TINY, "num_layers": 3, "head_dim": 6, "norm_epsilon": 1e-3}, "left"),
    "wide": (_WIDE, "right"),
    "shallow": ({**_WIDE, "num_layers": 1, "head_dim": 48, "group_norm_epsilon": 0.01}, "none"),
    "headless": ({**_WIDE, "task": "none"}, "packed"),
}
CASES = ("base", "deep")
LIVE = ("wide", "shallow", "headless")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random RWKV-7, and return torch's results for random texts."""
    from safetensors.torch import load_file

    fields, segments = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model("rwkv7-tiny", **fields)
    _native.save(model, _native.parameters(model, seed), directory)
    tensors = {name: x.requires_grad_() for name, x in load_file(directory / "model.safetensors").items()}
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (3, 21)).astype(np.int32)
    segment_ids = _native.padding(segments, tokens.shape)
    hidden, real = _native.each_text(lambda text: hidden_of_text(model.config, tensors, text), tokens, segment_ids)
    logits = hidden @ tensors["head.weight"].mT if model.task == "causal" else None
    return _native.results_of_named(tensors, tokens, segment_ids, hidden, logits, real, seed)


def hidden_of_text(cfg: Any, tensors: dict[str, Any], text: np.ndarray) -> Any:
    """Hidden states [T, D] of one text."""
    import torch
    from torch.nn import functional

    D, K = cfg.embed_dim, cfg.head_dim

    def norm(name: str, x: Any) -> Any:
        return functional.layer_norm(x, (D,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], cfg.norm_epsilon)

    x = norm("blocks.0.ln0", tensors["emb.weight"][torch.from_numpy(text).long()])
    value_of_first_layer = None
    for layer in range(cfg.num_layers):
        prefix = f"blocks.{layer}."
        weights = {name.removeprefix(prefix): x.squeeze() for name, x in tensors.items() if name.startswith(prefix)}
        mixed, value_of_first_layer = _time_mix(
            weights, norm(f"{prefix}ln1", x), value_of_first_layer, K, cfg.group_norm_epsilon
        )
        x = x + mixed
        shifted = _interpolate(norm(f"{prefix}ln2", x), weights["ffn.x_k"])
        x = x + torch.relu(shifted @ weights["ffn.key.weight"].mT) ** 2 @ weights["ffn.value.weight"].mT
    return norm("ln_out", x)


def _interpolate(x: Any, mu: Any) -> Any:
    """Token shift: ``(1 - mu) * x_t + mu * x_{t-1}``. Before the first token there are zeros."""
    import torch

    return torch.lerp(x, torch.cat([torch.zeros_like(x[:1]), x[:-1]]), mu)


def _time_mix(weights: dict[str, Any], x: Any, first_value: Any, K: int, epsilon: float) -> tuple[Any, Any]:
    import torch
    from torch.nn import functional

    w = {name.removeprefix("att."): tensor for name, tensor in weights.items() if name.startswith("att.")}
    T, H = len(x), w["x_r"].shape[0] // K
    xr, xw, xk, xv, xa, xg = (_interpolate(x, w[f"x_{letter}"]) for letter in "rwkvag")
    r, k, v = xr @ w["receptance.weight"].mT, xk @ w["key.weight"].mT, xv @ w["value.weight"].mT
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w["w0"] + torch.tanh(xw @ w["w1"]) @ w["w2"]))
    rate = torch.sigmoid(w["a0"] + xa @ w["a1"] @ w["a2"])
    gate = torch.sigmoid(xg @ w["g1"]) @ w["g2"]
    if first_value is None:
        first_value = v
    else:
        v = torch.lerp(v, first_value, torch.sigmoid(w["v0"] + xv @ w["v1"] @ w["v2"]))
    removal = functional.normalize((k * w["k_k"]).view(T, H, K), dim=-1)
    k = k * torch.lerp(torch.ones_like(rate), rate, w["k_a"])
    r, k, v, decay, rate = (y.view(T, H, K) for y in (r, k, v, decay, rate))

    state, outputs = torch.zeros(H, K, K), []  # [head, value, key]
    for t in range(T):
        transition = torch.diag_embed(decay[t]) - removal[t, :, :, None] * (rate[t] * removal[t])[:, None]
        state = state @ transition + v[t, :, :, None] * k[t, :, None]
        outputs.append((state @ r[t, :, :, None])[..., 0])
    out = functional.group_norm(torch.stack(outputs).flatten(1), H, w["ln_x.weight"], w["ln_x.bias"], epsilon)
    bonus = (r * k * w["r_k"].view(H, K)).sum(-1, keepdim=True) * v
    return ((out + bonus.flatten(1)) * gate) @ w["output.weight"].mT, first_value

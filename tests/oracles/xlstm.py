"""Reference of xlstm: the xLSTM class of transformers (only mLSTM layers), and the papers' equations in torch.

The class reads padding, so padding is on the right. With an sLSTM layer, a torch loop over the steps of each text
computes the equations without a stabilizer, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles import _native
from tests.oracles.gpt import reference_results

# Without `use_cache`, the class computes gradients, and the widths of all heads need not be multiples of 64.
_TINY: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_heads": 3, "ffn_proj_factor": 1.2,
    "ffn_round_up_to_multiple_of": 2, "use_cache": False,
}  # fmt: skip
_WIDE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_heads": 4, "use_cache": False,
}  # fmt: skip
_CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class, shape, side of the padding
    "base": ("xLSTMForCausalLM", _TINY, "right"),
    "wide": (
        "xLSTMForCausalLM",
        {**_WIDE, "qk_dim_factor": 0.25, "v_dim_factor": 1.5, "norm_eps": 1e-4, "eps": 1e-3},
        "right",
    ),
    "caps": (
        "xLSTMForCausalLM",
        {**_WIDE, "gate_soft_cap": 4.0, "output_logit_soft_cap": 3.0, "norm_eps": 1e-3, "tie_word_embeddings": True},
        None,
    ),
    "headless": ("xLSTMModel", {**_WIDE, "num_heads": 1, "gate_soft_cap": None}, None),
}
_EQUATION_CASES: dict[str, tuple[dict[str, Any], str]] = {  # config fields, segments
    "slstm": ({"pattern": ("slstm", "mlstm"), "embed_dim": 12, "mlp_dim": 10, "num_heads": 3}, "packed"),
    "slstm_wide": ({"pattern": ("slstm",), "conv_width": 3, "logits_soft_cap": None}, "left"),
}
CASES = ("base", "slstm")
LIVE = ("wide", "caps", "headless", "slstm_wide")


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    if case in _EQUATION_CASES:
        return _equations(case, directory)
    import transformers

    name, shape, padding = _CASES[case]
    config = transformers.xLSTMConfig(**shape, pad_token_id=0)
    return reference_results(name, config, padding, list(_CASES).index(case), directory)


def _equations(case: str, directory: Path) -> dict[str, np.ndarray]:
    import torch

    from jaxlm import get_model

    fields, segments = _EQUATION_CASES[case]
    fields = {"vocab_size": 31, "num_layers": 2, "key_dim": 12, "value_dim": 24, **fields}
    model = get_model("xlstm-tiny", **fields)
    seed = 10 + list(_EQUATION_CASES).index(case)
    tensors = _native.parameters(model, seed)
    tokens = np.random.default_rng(seed).integers(0, 31, (3, 18)).astype(np.int32)
    ids = _native.padding(segments, tokens.shape)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    hidden, real = _native.each_text(lambda text: _hidden(model.config, doubles, text).float(), tokens, ids)
    logits = hidden @ tensors["head"].T
    cap = model.config.logits_soft_cap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return _native.results(model, tensors, tokens, ids, hidden, logits, real, seed, directory)


def _hidden(cfg: Any, tensors: dict[str, Any], tokens: np.ndarray) -> Any:
    """The hidden states of one text, [T, D]."""
    import torch

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + cfg.norm_epsilon) * tensors[f"{name}/scale"]

    x = tensors["token_embedding"][torch.from_numpy(tokens).long()]
    for number in range(cfg.num_layers):
        layer = f"layers/{number}"
        mixer = cfg.pattern[number % len(cfg.pattern)]
        weights = {
            name.removeprefix(f"{layer}/{mixer}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{layer}/{mixer}/")
        }
        x = x + {"mlstm": _mlstm, "slstm": _slstm}[mixer](cfg, weights, norm(x, f"{layer}/mixer_norm"))
        y = norm(x, f"{layer}/mlp_norm")
        gate, up, down = (tensors[f"{layer}/mlp/{name}/weight"] for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
    return norm(x, "final_norm")


def _head_norm(cfg: Any, weights: dict[str, Any], x: Any) -> Any:
    """Layer norm of each head, [T, H, V], without a bias."""
    import torch

    normalised = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=cfg.norm_epsilon)
    return normalised * weights["norm/scale"].reshape(x.shape[-2:])


def _mlstm(cfg: Any, weights: dict[str, Any], x: Any) -> Any:
    import torch

    def heads(name: str) -> Any:
        return torch.einsum("td,dhk->thk", x, weights[f"{name}/weight"])

    def gate(name: str) -> Any:
        value = x @ weights[f"{name}/weight"] + weights[f"{name}/bias"]
        return value if cfg.gate_soft_cap is None else cfg.gate_soft_cap * torch.tanh(value / cfg.gate_soft_cap)

    q, k, v = heads("query") / (cfg.key_dim // cfg.num_heads) ** 0.5, heads("key"), heads("value")
    i, f = torch.exp(gate("input_gate")), torch.sigmoid(gate("forget_gate"))
    C, n, m, outputs = 0.0, 0.0, torch.zeros(cfg.num_heads).double(), []
    for t in range(len(x)):
        C = f[t, :, None, None] * C + i[t, :, None, None] * k[t, :, :, None] * v[t, :, None, :]
        n = f[t, :, None] * n + i[t, :, None] * k[t]
        m = torch.maximum(torch.log(f[t]) + m, torch.log(i[t]))
        divisor = torch.clamp((q[t] * n).sum(-1).abs(), min=1.0) + cfg.mlstm_epsilon * torch.exp(m)
        outputs.append(torch.einsum("hk,hkv->hv", q[t], C) / divisor[:, None])
    x = _head_norm(cfg, weights, torch.stack(outputs)) * torch.sigmoid(heads("output_gate"))
    return torch.einsum("thv,hvd->td", x, weights["output/weight"])


def _slstm(cfg: Any, weights: dict[str, Any], x: Any) -> Any:
    import torch

    (T, D), H, reach = x.shape, cfg.num_heads, cfg.conv_width - 1
    padded = torch.cat([torch.zeros(reach, D).double(), x])
    local = sum(weights["convolution/weight"][tap] * padded[tap : tap + T] for tap in range(reach + 1))
    local = torch.nn.functional.silu(local + weights["convolution/bias"])
    gates_if, gates_zo = (
        torch.einsum("thp,hpgq->tghq", y.reshape(T, H, -1), weights[f"{name}/weight"])
        for name, y in (("input_forget", local), ("cell_output", x))
    )
    R, bias = weights["cell/weight_hidden"], weights["cell/bias"].transpose(0, 1)
    h, c, n, outputs = torch.zeros(H, D // H).double(), 0.0, 0.0, []
    for t in range(T):
        recurrent = torch.einsum("hp,hpgq->ghq", h, R)
        i, f, z, o = torch.cat([gates_if[t], gates_zo[t]]) + recurrent + bias
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return _head_norm(cfg, weights, torch.stack(outputs)).reshape(T, D)

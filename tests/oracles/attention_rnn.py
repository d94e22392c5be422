"""Reference of attention_rnn: the equations of the papers in torch, step by step and for one text at a time.

The equations are from Bahdanau et al. 2015, appendix A; Luong et al. 2015, sections 2 and 3; and See et al. 2017,
section 2.2. torch computes the gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_SMALL = {"vocab_size": 30, "embed_dim": 6, "hidden_dim": 8, "output_dim": 5}
_LUONG = {**_SMALL, "output_dim": 7}
_DEEP = {"vocab_size": 60, "embed_dim": 12, "hidden_dim": 20, "output_dim": 16, "num_layers": 3}
_CASES: dict[
    str, tuple[str, dict[str, Any], str, str]
] = {  # variant, fields, padding of the source, padding of the target
    "bahdanau": ("attention-rnn-tiny", {**_SMALL, "source_vocab_size": 24, "attention_dim": 9}, "none", "none"),
    "packed": ("attention-rnn-tiny", _SMALL, "packed", "packed"),
    "dot": ("attention-rnn-luong-tiny", {**_LUONG, "score": "dot"}, "right", "left"),
    "general": ("attention-rnn-luong-tiny", {**_LUONG, "num_layers": 1}, "packed", "packed"),
    "concat": ("attention-rnn-luong-tiny", {**_LUONG, "score": "concat"}, "left", "right"),
    "local": ("attention-rnn-luong-tiny", {**_LUONG, "num_layers": 1, "window": 2}, "left", "none"),
    "copy": ("attention-rnn-copy-tiny", _SMALL, "packed", "packed"),
    "copy_luong": ("attention-rnn-luong-tiny", {**_LUONG, "num_layers": 1, "copy": True}, "left", "right"),
    "bahdanau_left": ("attention-rnn-tiny", {**_SMALL, "hidden_dim": 24, "output_dim": 30}, "left", "left"),
    "bahdanau_headless": ("attention-rnn-tiny", {"task": "none"}, "right", "right"),
    "deep": ("attention-rnn-luong-tiny", {**_DEEP, "source_vocab_size": 40}, "packed", "packed"),
    "deep_concat": ("attention-rnn-luong-tiny", {**_DEEP, "score": "concat", "attention_dim": 10}, "none", "none"),
    "deep_local": ("attention-rnn-luong-tiny", {**_DEEP, "score": "dot", "window": 3}, "packed", "packed"),
}
CASES = ("bahdanau", "packed", "dot", "general", "concat", "local", "copy", "copy_luong")
LIVE = tuple(case for case in _CASES if case not in CASES)


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return the results of the equations for random texts."""
    import torch

    variant, fields, source_padding, target_padding = _CASES[case]
    seed = list(_CASES).index(case)
    model = get_model(variant, **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (3, 11)).astype(np.int32)
    source = rng.integers(0, cfg.source_vocab_size or cfg.vocab_size, (3, 13)).astype(np.int32)
    segment_ids = _native.padding(target_padding, tokens.shape)
    source_ids = _native.padding(source_padding, source.shape)
    target_segments = np.ones_like(tokens) if segment_ids is None else segment_ids
    source_segments = np.ones_like(source) if source_ids is None else source_ids

    decode = bahdanau if cfg.attention == "bahdanau" else luong
    rows = []
    for row in range(len(tokens)):
        hidden = torch.zeros(tokens.shape[1], cfg.output_dim + (1 + cfg.vocab_size if cfg.copy else 0))
        for number in range(1, target_segments[row].max() + 1):
            positions = np.nonzero(target_segments[row] == number)[0]
            text = source[row, source_segments[row] == number]
            outputs = decode(cfg, tensors, text, tokens[row, positions])
            outputs = [torch.cat([x, *copy_outputs(cfg, tensors, text, *rest)]) for x, *rest in outputs]
            hidden = hidden.index_copy(0, torch.from_numpy(positions), torch.stack(outputs))
        rows.append(hidden)
    hidden = torch.stack(rows)
    logits = None
    if cfg.task == "seq2seq":
        features = hidden[..., : cfg.output_dim]
        logits = features @ tensors["head/weight"].mT + tensors["head/bias"]
        if cfg.copy:
            p = torch.sigmoid(hidden[..., cfg.output_dim, None])
            logits = torch.log(p * torch.softmax(logits, -1) + (1 - p) * hidden[..., cfg.output_dim + 1 :])
    real = target_segments > 0
    results = _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)
    results["input/source"] = source
    if source_ids is not None:
        results["input/source_segment_ids"] = source_ids
    return results


def _embedded(tensors: dict[str, Any], text: np.ndarray, *, source: bool) -> Any:
    import torch

    table = "source_embedding" if source and "source_embedding" in tensors else "token_embedding"
    return tensors[table][torch.from_numpy(text).long()]


def copy_outputs(
    cfg: Any, tensors: dict[str, Any], source: np.ndarray, s: Any, e: Any, c: Any, weights: Any
) -> list[Any]:
    """The logit of p_gen (See et al. 2017, eq. 8), and the copy probability of each word of the vocabulary (eq. 9)."""
    import torch

    if not cfg.copy:
        return []
    gate = sum(tensors[f"copy/{name}/weight"][:, 0] @ x for name, x in (("state", s), ("embedding", e), ("context", c)))
    words = []
    for word in range(cfg.vocab_size):
        words.append(sum((a for a, token in zip(weights, source, strict=True) if token == word), torch.zeros(())))
    return [gate + tensors["copy/bias"], torch.stack(words)]


# ------------------------------------------------------------------------------------------------------- Bahdanau


def bahdanau(cfg: Any, tensors: dict[str, Any], source: np.ndarray, target: np.ndarray) -> list[Any]:
    """For each target token: t[i], s[i-1], the embedding, c[i] and the attention weights."""
    import torch

    x = _embedded(tensors, source, source=True)
    zeros = torch.zeros(cfg.hidden_dim)
    forward, state = [], zeros
    for e in x:
        state = gru(tensors, "encoder/forward", e, state)
        forward.append(state)
    backward, state = [], zeros
    for e in reversed(list(x)):
        state = gru(tensors, "encoder/backward", e, state)
        backward.insert(0, state)
    annotations = [torch.cat(pair) for pair in zip(forward, backward, strict=True)]

    init_name = "decoder/begin"
    s = torch.tanh(backward[0] @ tensors[f"{init_name}/weight"] + tensors[f"{init_name}/bias"])
    W, U, v = (tensors[f"alignment/{name}"] for name in ("query/weight", "key/weight", "score"))
    outputs = []
    for e in _embedded(tensors, target, source=False):
        energies = torch.stack([v @ torch.tanh(s @ W + h @ U) for h in annotations])
        weights = torch.softmax(energies, 0)
        c = sum(weight * h for weight, h in zip(weights, annotations, strict=True))
        t = tensors["output/state/bias"]  # [D, 2]: maxout over the last axis
        for x, name in ((s, "state"), (e, "embedding"), (c, "context")):
            t = t + torch.einsum("i,ijk->jk", x, tensors[f"output/{name}/weight"])
        outputs.append((torch.maximum(t[:, 0], t[:, 1]), s, e, c, weights))
        s = gru(tensors, "decoder/layer_0", e, s, c)
    return outputs


def gru(tensors: dict[str, Any], name: str, e: Any, s: Any, c: Any = None) -> Any:
    """One GRU step. The reset gate is applied before the matrix product, and z is the weight of the old state."""
    import torch

    W, U, b = (tensors[f"{name}/{part}"] for part in ("weight_input", "weight_hidden", "bias"))
    inputs = [e @ W[:, gate] + b[gate] for gate in range(3)]
    if c is not None:
        C = tensors["decoder/context/weight"]
        inputs = [x + c @ C[:, gate] for gate, x in enumerate(inputs)]
    r = torch.sigmoid(inputs[0] + s @ U[:, 0])
    z = torch.sigmoid(inputs[1] + s @ U[:, 1])
    proposal = torch.tanh(inputs[2] + (r * s) @ U[:, 2])
    return (1 - z) * proposal + z * s


# ---------------------------------------------------------------------------------------------------------- Luong


def luong(cfg: Any, tensors: dict[str, Any], source: np.ndarray, target: np.ndarray) -> list[Any]:
    """For each target token: h~[t], h[t], the embedding, c[t] and the attention weights."""
    import torch

    zeros = torch.zeros(cfg.hidden_dim)
    states = [(zeros, zeros) for _ in range(cfg.num_layers)]
    memory = []
    for x in _embedded(tensors, source, source=True):
        for layer in range(cfg.num_layers):
            states[layer] = lstm(tensors, f"encoder/layer_{layer}", x, *states[layer])
            x = states[layer][0]
        memory.append(x)
    outputs, attentional = [], torch.zeros(cfg.output_dim)
    for e in _embedded(tensors, target, source=False):
        x = e
        for layer in range(cfg.num_layers):
            feed = attentional if layer == 0 else None
            states[layer] = lstm(tensors, f"decoder/layer_{layer}", x, *states[layer], feed)
            x = states[layer][0]
        scores = torch.stack([score(cfg, tensors, x, h) for h in memory])
        if cfg.window is None:
            weights = torch.softmax(scores, 0)
        else:
            D, S = cfg.window, len(memory)
            W_p, v_p = tensors["alignment/place/hidden/weight"], tensors["alignment/place/score"]
            p = S * torch.sigmoid(v_p @ torch.tanh(x @ W_p))
            window_positions = [s for s in range(S) if p.item() - D <= s <= p.item() + D]
            weights = torch.zeros(S).index_copy(
                0, torch.tensor(window_positions), torch.softmax(scores[window_positions], 0)
            )
            weights = weights * torch.exp(-((torch.arange(S) - p) ** 2) / (2 * (D / 2) ** 2))
        c = sum(weight * h for weight, h in zip(weights, memory, strict=True))
        W_c = torch.cat([tensors["output/context/weight"], tensors["output/state/weight"]])
        attentional = torch.tanh(torch.cat([c, x]) @ W_c + tensors["output/state/bias"])
        outputs.append((attentional, x, e, c, weights))
    return outputs


def score(cfg: Any, tensors: dict[str, Any], h: Any, source: Any) -> Any:
    """The score of a query and a key: one of the three functions of Luong et al. 2015, section 3.1."""
    import torch

    if cfg.score == "dot":
        return h @ source
    if cfg.score == "general":
        return h @ (source @ tensors["alignment/key/weight"])
    W_a = torch.cat([tensors["alignment/query/weight"], tensors["alignment/key/weight"]])
    return tensors["alignment/score"] @ torch.tanh(torch.cat([h, source]) @ W_a)


def lstm(tensors: dict[str, Any], name: str, x: Any, h: Any, c: Any, feed: Any = None) -> Any:
    """One LSTM step. With input feeding, the input is [x; feed]."""
    import torch

    W, U, b = (tensors[f"{name}/{part}"] for part in ("weight_input", "weight_hidden", "bias"))
    if feed is not None:
        x, W = torch.cat([x, feed]), torch.cat([W, tensors["decoder/feed/weight"]])
    total = [x @ W[:, gate] + h @ U[:, gate] + b[gate] for gate in range(4)]
    i, f, o = (torch.sigmoid(total[gate]) for gate in (0, 1, 3))
    c = f * c + i * torch.tanh(total[2])
    return o * torch.tanh(c), c

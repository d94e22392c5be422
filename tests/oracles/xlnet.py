"""Reference of xlnet: the XLNet classes of transformers, as permutation and left-to-right models and with all heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.complete_models import perm_mask, target_mapping

CASES = ("tagging", "permutation", "causal", "classification")
LIVE = ("base", "span_qa", "wide", "clamped", "bare")

_TINY: dict[str, Any] = {"vocab_size": 31, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12}
_CONFIGS: dict[str, dict[str, Any]] = {
    "classification": {**_TINY, "num_labels": 4},
    "tagging": {**_TINY, "num_labels": 3, "ff_activation": "relu"},
    "wide": {"vocab_size": 50, "d_model": 48, "n_layer": 3, "n_head": 3, "d_inner": 40, "ff_activation": "gelu_new"},
    "clamped": {**_TINY, "d_model": 20, "clamp_len": 3, "layer_norm_eps": 1e-3},
}
_CLASSES = {
    "tagging": "XLNetForTokenClassification",
    "classification": "XLNetForSequenceClassification",
    "span_qa": "XLNetForQuestionAnsweringSimple",
    "base": "XLNetModel",
    "bare": "XLNetModel",
}


def random_model(case: str) -> Any:
    """The model of a case, with noise on every parameter, so that biases are not 0 and scales are not 1."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed([*CASES, *LIVE].index(case))
    config = transformers.XLNetConfig(**_CONFIGS.get(case, _TINY))
    model = getattr(transformers, _CLASSES.get(case, "XLNetLMHeadModel"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    return model


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import torch
    from torch.nn.functional import cross_entropy

    model = random_model(case)
    model.save_pretrained(directory)
    rng = np.random.default_rng(len(case))
    B, T, P = 3, 10, 4
    V = model.config.vocab_size
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    segments = np.ones((B, T), np.int32)
    inputs: dict[str, np.ndarray] = {"tokens": tokens}
    if case not in ("bare", "span_qa"):  # pads on the left, as in the authors' code (a random span could include pads)
        segments[1, :3] = segments[2, :1] = 0
        inputs["segment_ids"] = segments
    model_inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": segments.astype(np.float32)}
    if case not in ("causal", "bare"):
        inputs["token_types"] = model_inputs["token_type_ids"] = rng.integers(0, 3, (B, T)).astype(np.int32)
    result: dict[str, np.ndarray] = {}

    labels = rng.integers(0, 3, (B, T)).astype(np.int32)
    weights = (segments * rng.integers(0, 2, (B, T))).astype(np.float32)
    if case in ("permutation", "wide", "clamped"):
        order = np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)
        order[:, :-P][rng.random((B, T - P)) < 0.5] = -1  # context: all positions attend to it
        targets = np.stack([T - P + rng.permutation(P) for _ in range(B)]).astype(np.int32)
        inputs |= {"order": order, "targets": targets}
        model_inputs |= {"perm_mask": perm_mask(order, targets), "target_mapping": target_mapping(targets, T)}
        labels = np.take_along_axis(tokens, targets, axis=1)
        weights = rng.random((B, P)).astype(np.float32)
        result["real"] = np.ones((B, P), bool)
    elif case == "causal":
        # There is a query after each token, so the sequence is one longer. No position attends to the added token.
        model_inputs["input_ids"] = np.pad(tokens, ((0, 0), (0, 1)))
        model_inputs["attention_mask"] = np.pad(model_inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
        positions = np.tile(np.arange(T + 1), (B, 1))
        model_inputs |= {
            "perm_mask": perm_mask(positions, positions[:, 1:]),
            "target_mapping": target_mapping(positions[:, 1:], T + 1),
        }
        labels = rng.integers(0, V, (B, T)).astype(np.int32)
    elif case == "classification":
        labels, weights = np.array([3, 0, 1], np.int32), np.ones(B, np.float32)
    elif case == "span_qa":
        labels, weights = np.array([[1, 4], [5, 5], [3, 9]], np.int32), np.ones(B, np.float32)

    model_inputs = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in model_inputs.items()}
    model_inputs["input_ids"] = model_inputs["input_ids"].long()
    output = model(**model_inputs, output_hidden_states=True)
    if _CLASSES.get(case) == "XLNetModel":
        hidden = output.last_hidden_state
    else:
        hidden = model.transformer(**model_inputs).last_hidden_state
        if case == "span_qa":
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
            loss = cross_entropy(logits, torch.from_numpy(labels).long())
        else:
            logits = output.logits
            losses = cross_entropy(logits.flatten(0, -2), torch.from_numpy(labels).long().flatten(), reduction="none")
            token_weights = torch.from_numpy(weights).flatten()
            loss = (losses * token_weights).sum() / token_weights.sum()
        loss.backward()
        result |= {
            "logits": logits.detach().numpy(),
            "targets": labels,
            "weights": weights,
            "loss": loss.detach().numpy(),
            **{
                f"gradient/{name}": np.zeros(parameter.shape, np.float32)
                if parameter.grad is None  # the initial query vector, if there is no query stream
                else parameter.grad.numpy()
                for name, parameter in model.named_parameters()
            },
        }
    return {
        **result,
        "hidden": hidden.detach().numpy(),
        **{f"input/{name}": x for name, x in inputs.items()},
    }

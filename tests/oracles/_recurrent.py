"""Functions of the oracles of lstm and gru: stacked torch layers, which run separately on each text, without pads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.models import get_model
from tests.oracles import _native

_TASK_HEADS = {"classification": "classifier", "token_classification": "token_classifier"}

LayerOf = Callable[[dict[str, Any], Any], Any]
"""A function from a layer's parameters by name and inputs [T, D] to hidden states [T, H], in forward direction."""


def reference(
    variant: str, fields: dict[str, Any], segments: str, seed: int, layer: LayerOf, directory: Path
) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return torch's results for random texts."""
    import torch

    model = get_model(variant, **fields)
    cfg, tensors = model.config, _native.parameters(model, seed)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (3, 11)).astype(np.int32)
    segment_ids = _native.padding(segments, tokens.shape)

    def hidden_of_text(text: np.ndarray) -> Any:
        x = tensors["token_embedding"][torch.from_numpy(text).long()]
        for index in range(cfg.num_layers):
            name = f"layer_{index}/"
            params = {path.removeprefix(name): x for path, x in tensors.items() if path.startswith(name)}
            if cfg.direction == "forward":
                x = layer(params, x)
                continue
            forward, backward = (
                {path.removeprefix(f"{side}/"): x for path, x in params.items() if path.startswith(side)}
                for side in ("forward", "backward")
            )
            x = torch.cat([layer(forward, x), layer(backward, x.flip(0)).flip(0)], dim=-1)
        return x

    hidden, real = _native.each_text(hidden_of_text, tokens, segment_ids)
    if cfg.task == "causal":
        table = tensors["token_embedding"] if cfg.tie_embeddings else tensors["head/weight"]
        logits = hidden @ table.mT + tensors["head/bias"]
    elif cfg.task in _TASK_HEADS:
        head = _TASK_HEADS[cfg.task]
        if cfg.task == "classification":
            x = torch.stack([row[torch.from_numpy(mask)].amax(0) for row, mask in zip(hidden, real, strict=True)])
        else:
            x = hidden
        logits = x @ tensors[f"{head}/weight"] + tensors[f"{head}/bias"]
    else:
        logits = None
    return _native.results(model, tensors, tokens, segment_ids, hidden, logits, real, seed, directory)


def torch_layer(kind: str, params: dict[str, Any], x: Any) -> Any:
    """Hidden states of ``torch.nn.LSTM`` or ``torch.nn.GRU`` with jaxlm's parameters."""
    import torch

    from benchmarks.torch_models import recurrent_state

    state = {f"{name}_l0": weights for name, weights in recurrent_state(params).items()}
    module = getattr(torch.nn, kind)(x.shape[-1], params["weight_hidden"].shape[0])
    return torch.func.functional_call(module, state, (x,))[0]

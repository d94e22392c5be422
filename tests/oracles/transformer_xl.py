"""Reference of transformer_xl: the deprecated class of transformers, with memories of length 0.

By default, the class would create memories of zeros and attend to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CASES = ("base", "divided", "pre_norm", "padded")
LIVE = ("wide", "projected", "one_softmax", "untied", "classifier")

SHAPE = {
    "vocab_size": 30, "cutoffs": [10, 20], "div_val": 1, "n_layer": 2, "n_head": 2, "d_head": 5, "d_model": 8,
    "d_embed": 8, "d_inner": 12, "mem_len": 6, "clamp_len": -1, "same_length": False, "dropout": 0.0, "dropatt": 0.0,
    "trainer_compatible": True,
}  # fmt: skip
"""Config of the smallest model: one embedding table, separate u and v in each layer, distances that are not clamped."""

CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "divided": {"div_val": 2, "d_embed": 12, "same_length": True, "clamp_len": 3},
    "pre_norm": {"pre_lnorm": True, "untie_r": False},
    "padded": {"div_val": 2, "same_length": True, "mem_len": 4},
    "wide": {
        "vocab_size": 90, "cutoffs": [20, 40, 60], "div_val": 4, "n_layer": 3, "n_head": 4, "d_head": 16, "d_model": 64,
        "d_embed": 64, "d_inner": 128, "mem_len": 16, "clamp_len": 10, "same_length": True,
    },
    "projected": {"d_embed": 6, "clamp_len": 4},
    "one_softmax": {"cutoffs": [], "untie_r": False},
    "untied": {"div_val": 2, "tie_word_embeddings": False, "proj_share_all_but_first": False, "pre_lnorm": True},
    "classifier": {"num_labels": 3, "pad_token_id": 0},
}  # fmt: skip


def random_model(case: str) -> Any:
    """The model of a case, with noise on every parameter."""
    import torch

    from benchmarks.torch_models import transformer_xl_module

    module = transformer_xl_module()
    model_class = module.TransfoXLForSequenceClassification if case == "classifier" else module.TransfoXLLMHeadModel
    torch.manual_seed(sum(case.encode()))
    model = model_class(module.TransfoXLConfig(**{**SHAPE, **CHANGES[case]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def state_to_save(model: Any) -> dict[str, Any]:
    """The tensors of a model, for ``save_pretrained``, which does not save u and v if all layers share them.

    So each layer has a copy, as in a model that transformers has loaded.
    """
    return {name: x.clone() if ".dec_attn.r_" in name else x for name, x in model.state_dict().items()}


def no_memory(model: Any, batch: int) -> list[Any]:
    """The memories of all layers, with length 0."""
    import torch

    return [torch.zeros(0, batch, model.config.d_model) for _ in range(model.config.n_layer)]


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import torch

    model = random_model(case)
    model.save_pretrained(directory, state_dict=state_to_save(model))
    batch, length = (3, 24) if case == "wide" else (2, 11)
    generator = np.random.default_rng(sum(case.encode()))
    tokens = generator.integers(1, model.config.vocab_size, (batch, length)).astype(np.int32)
    real = np.ones((batch, length), bool)
    if case in ("padded", "classifier"):
        real[1, 7:] = False  # there is no attention mask; pads on the right do not affect a causal model
        tokens[~real] = 0
    ids, memory = torch.tensor(tokens, dtype=torch.long), no_memory(model, batch)
    inputs = {"input/tokens": tokens} | ({} if real.all() else {"input/segment_ids": real.astype(np.int32)})
    hidden = model.transformer(ids, mems=memory).last_hidden_state
    if case == "classifier":
        labels = generator.integers(0, model.config.num_labels, batch)
        output = model(ids, mems=memory, labels=torch.tensor(labels))
        logits, loss, targets, weights = output.logits, output.loss, labels, np.ones(batch)
    else:
        labels = torch.where(torch.tensor(real), ids, -100)
        output = model(ids, mems=memory, labels=labels)  # the class shifts the labels
        logits, loss = model(ids, mems=memory).prediction_scores, output.loss
        targets, weights = np.roll(tokens, -1, axis=1), np.zeros((batch, length))
        weights[:, :-1] = real[:, 1:]
    loss.backward()
    gradients = {f"gradient/{name}": parameter.grad for name, parameter in model.named_parameters()}
    return inputs | {
        "hidden": hidden.detach().numpy(),
        "logits": logits.detach().numpy(),
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
        "loss": loss.detach().numpy(),
        **{name: gradient.numpy() for name, gradient in gradients.items()},
    }

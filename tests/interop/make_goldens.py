"""Write the goldens of ``test_huggingface.py``: the outputs of small random GPT-2 models of transformers.

    python tests/interop/make_goldens.py

Needs the ``reference`` extra. Run it only if a case changes, not because a test fails. Each case is a directory that
transformers saved. Its ``reference.npz`` has the tokens, the mask, hidden states, logits, the loss and gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

GOLDENS = Path(__file__).parent / "goldens"
SHAPE = {"n_layer": 2, "bos_token_id": None, "eos_token_id": None}

CASES: dict[str, dict[str, Any]] = {
    "tied": {"vocab_size": 61, "n_positions": 20, "n_embd": 24, "n_head": 3},
    "untied": {
        "vocab_size": 48, "n_positions": 17, "n_embd": 16, "n_head": 2, "n_inner": 40, "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
    "padded": {
        "vocab_size": 33, "n_positions": 16, "n_embd": 20, "n_head": 5, "n_inner": 24, "layer_norm_epsilon": 1e-3,
    },
    "base": {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_head": 4, "activation_function": "relu"},
}  # fmt: skip


def make(name: str, seed: int) -> None:
    torch.manual_seed(seed)  # for the initial weights
    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, **CASES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases are not 0 and scales are not 1
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(model.config.vocab_size, (3, 14), generator=generator)
    mask = torch.ones_like(tokens)
    if name == "padded":
        mask[0, :5] = mask[2, :1] = 0
    # As in ``generate``, the first real token has position 0.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Pads and the first token after pads have no label.
    labels = tokens.masked_fill(mask * torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0, -100)
    output = model(tokens, attention_mask=mask, position_ids=positions, labels=labels, output_hidden_states=True)
    output.loss.backward()
    saved = model.transformer if name == "base" else model
    saved.save_pretrained(GOLDENS / name)
    (GOLDENS / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        GOLDENS / name / "reference.npz",
        tokens=tokens.int().numpy(), mask=mask.int().numpy(), loss=output.loss.detach().numpy(),
        hidden=output.hidden_states[-1].detach().numpy(), logits=output.logits.detach().numpy(),
        **{f"gradient of {key}": value.grad.numpy() for key, value in model.named_parameters()},
    )  # fmt: skip


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        make(case, number)

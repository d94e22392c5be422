"""Reference of t5: T5, mT5 and umT5 of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# With few buckets, distances of less than ten tokens are in the logarithmic buckets too.
SMALL = {
    "vocab_size": 30, "d_model": 8, "d_kv": 3, "d_ff": 10, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 7,
}  # fmt: skip
LARGER = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 4}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# case -> (class, fields of its config, source length, target length, side of the padding)
MODELS = {
    "base": ("T5ForConditionalGeneration", SMALL, 10, 8, None),
    "gated": ("T5ForConditionalGeneration", {**SMALL, **GATED, "num_decoder_layers": 1}, 7, 9, None),
    "umt5": ("UMT5ForConditionalGeneration", {**SMALL, **GATED}, 9, 9, None),
    "padded": ("T5ForConditionalGeneration", SMALL, 10, 8, "right"),
    "left": ("T5ForConditionalGeneration", {**SMALL, **GATED}, 10, 8, "left"),
    "long": ("T5ForConditionalGeneration", {**LARGER, "num_layers": 3}, 150, 140, None),
    "mt5": ("MT5ForConditionalGeneration", {**LARGER, "num_layers": 1, "num_decoder_layers": 3}, 17, 30, "right"),
    "umt5_tied": ("UMT5ForConditionalGeneration", {**LARGER, "num_layers": 2}, 33, 21, "left"),
    "headless": ("T5Model", {**LARGER, "num_layers": 2, "layer_norm_epsilon": 1e-3}, 12, 20, "right"),
}
CASES = ("base", "gated", "umt5", "padded", "left")
LIVE = ("long", "mt5", "umt5_tied", "headless")


def build(case: str):
    """The reference model of a case, with noise on every parameter."""
    import torch
    import transformers

    name, fields, *_ = MODELS[case]
    torch.manual_seed(sorted(MODELS).index(case))
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**fields, decoder_start_token_id=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # T5 does not scale attention scores. With large weights, attention would be almost one-hot.
            parameter += (0.25 if "norm" in name or "bias" in name else 0.05) * torch.randn_like(parameter)
    return model.eval()


def reference(case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a random model, and return its results for random texts."""
    import torch

    _, fields, sources, targets, side = MODELS[case]
    model = build(case)
    model.save_pretrained(directory)
    rng = np.random.default_rng(sorted(MODELS).index(case))
    rows = 3
    source, tokens, labels = (
        rng.integers(1, fields["vocab_size"], (rows, length)).astype(np.int32) for length in (sources, targets, targets)
    )
    tokens[:, 0] = 0
    results = {"input/tokens": tokens, "input/source": source, "targets": labels}
    masks = {}
    if side is not None:
        for name, length in (("source_segment_ids", sources), ("segment_ids", targets)):
            real = np.array([length, length - 3, length // 2])
            position = np.arange(length)[None]
            mask = position < real[:, None] if side == "right" else position >= length - real[:, None]
            masks[name] = mask.astype(np.int32)
        results |= {f"input/{name}": mask for name, mask in masks.items()}
    weights = masks.get("segment_ids", np.ones(tokens.shape)).astype(np.float32)
    if side is None:
        weights[1, -2:] = 0.0
    inputs = {
        "input_ids": torch.tensor(source, dtype=torch.long),
        "decoder_input_ids": torch.tensor(tokens, dtype=torch.long),
    }
    if side is not None:
        inputs["attention_mask"] = torch.tensor(masks["source_segment_ids"])
        inputs["decoder_attention_mask"] = torch.tensor(masks["segment_ids"])
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    hidden = output.decoder_hidden_states[-1]
    results["hidden"] = hidden.detach().numpy()
    if case == "headless":
        return {name: value for name, value in results.items() if name != "targets"}
    losses = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), torch.tensor(labels, dtype=torch.long).flatten(), reduction="none"
    )
    weight = torch.tensor(weights).flatten()
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    results |= {"logits": output.logits.detach().numpy(), "weights": weights, "loss": loss.detach().numpy()}
    results |= {f"gradient/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return results

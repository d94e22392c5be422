"""Tests of RoBERTa checkpoints of fairseq: random weights in its layout, against the model's equations in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jaxlm.interop.fairseq import roberta_from_fairseq
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.testing.helpers import apply, relative_error

V, D, H, F, LAYERS, ROWS = 19, 12, 3, 20, 2, 14
TOKENS = np.random.default_rng(1).integers(4, V, (2, 9)).astype(np.int32)


def checkpoint() -> dict[str, np.ndarray]:
    """Random weights with names and shapes of fairseq's ``RobertaModel`` with one classification head."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, D), "embed_positions.weight": (ROWS, D)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (D,)

    norm("layernorm_embedding")
    for layer in range(LAYERS):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"layers.{layer}.self_attn.{name}", D, D)
        norm(f"layers.{layer}.self_attn_layer_norm")
        linear(f"layers.{layer}.fc1", F, D)
        linear(f"layers.{layer}.fc2", D, F)
        norm(f"layers.{layer}.final_layer_norm")
    shapes = {f"encoder.sentence_encoder.{name}": shape for name, shape in shapes.items()}
    linear("encoder.lm_head.dense", D, D)
    norm("encoder.lm_head.layer_norm")
    shapes["encoder.lm_head.bias"] = (V,)
    linear("classification_heads.mnli.dense", D, D)
    linear("classification_heads.mnli.out_proj", 3, D)
    weights = {name: (0.4 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    weights["encoder.lm_head.weight"] = weights["encoder.sentence_encoder.embed_tokens.weight"]
    weights["encoder.sentence_encoder.version"] = np.array([3.0], np.float32)
    return weights


def reference(weights: dict[str, np.ndarray], head: str | None) -> np.ndarray:
    """The logits, in NumPy: post-norm layers, and learned positions that start at row 2 of the table."""
    w = {name.removeprefix("encoder.").removeprefix("sentence_encoder."): x for name, x in weights.items()}
    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], H, D // H).swapaxes(1, 2)

    T = TOKENS.shape[1]
    x = norm("layernorm_embedding", w["embed_tokens.weight"][TOKENS] + w["embed_positions.weight"][2 : T + 2])
    for layer in range(LAYERS):
        name = f"layers.{layer}.self_attn"
        q, k, v = (split(linear(f"{name}.{part}_proj", x)) for part in "qkv")
        scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(D // H))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = norm(f"{name}_layer_norm", x + linear(f"{name}.out_proj", mixed))
        name = f"layers.{layer}"
        x = norm(f"{name}.final_layer_norm", x + linear(f"{name}.fc2", gelu(linear(f"{name}.fc1", x))))
    if head is not None:
        name = f"classification_heads.{head}"
        return linear(f"{name}.out_proj", np.tanh(linear(f"{name}.dense", x[:, 0])))
    return norm("lm_head.layer_norm", gelu(linear("lm_head.dense", x))) @ w["lm_head.weight"].T + w["lm_head.bias"]


def old_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with the names and layout of checkpoints from before fairseq 0.9.

    One matrix has the weights of queries, keys and values. Names begin with ``decoder`` instead of ``encoder``, and
    have ``emb_layer_norm`` instead of ``layernorm_embedding``.
    """
    old = dict(weights)
    for layer in range(LAYERS):
        name = f"encoder.sentence_encoder.layers.{layer}.self_attn"
        for part in ("weight", "bias"):
            old[f"{name}.in_proj_{part}"] = np.concatenate([old.pop(f"{name}.{x}_proj.{part}") for x in "qkv"])
    renamed = {name.replace("layernorm_embedding", "emb_layer_norm"): x for name, x in old.items()}
    return {
        f"decoder.{name.removeprefix('encoder.')}" if "encoder." in name else name: x for name, x in renamed.items()
    }


def logits(model: Any, params: Any) -> np.ndarray:
    hidden, _ = apply(model, params, TOKENS)
    if model.config.task == "classification":
        return np.asarray(model.logits(params, model.pool(params, hidden)))[:, 0]
    return np.asarray(model.logits(params, hidden))


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("head", [None, "mnli"])
def test_logits_equal_the_equations(names: str, head: str | None, tmp_path: Any) -> None:
    weights = checkpoint()
    model, params = roberta_from_fairseq(
        weights if names == "new" else old_names(weights), num_heads=H, head=head, hidden_dropout=0.0
    )
    assert (model.config.num_layers, model.config.max_positions, model.config.mlp_dim) == (LAYERS, ROWS - 2, F)
    expected = reference(weights, head)
    assert relative_error(logits(model, params), expected) < 1e-5
    unused_name = "classification_heads.mnli.dense.bias" if head is None else "lm_head.bias"
    assert unused_name in model.metadata.unused_tensors
    if names == "new":  # also after saving and loading Hugging Face files
        save_pretrained(tmp_path, model, params)
        np.testing.assert_array_equal(logits(*load_pretrained(tmp_path)), logits(model, params))


def test_errors_name_the_bad_weights() -> None:
    weights = checkpoint()
    with pytest.raises(ValueError, match=r"no classification head 'rte' in the weights: they have \['mnli'\]"):
        roberta_from_fairseq(weights, num_heads=H, head="rte")
    prenorm = {**weights, "encoder.sentence_encoder.layer_norm.weight": np.ones(D, np.float32)}
    with pytest.raises(ValueError, match=r"layer_norm.weight: \(12,\), expected nothing"):
        roberta_from_fairseq(prenorm, num_heads=H)
    missing = {name: x for name, x in weights.items() if "layers.1.fc1.bias" not in name}
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.dense\.bias: missing, expected \(20,\)"):
        roberta_from_fairseq(missing, num_heads=H)
    for name in ("out_proj.weight", "out_proj.bias"):
        missing = {key: x for key, x in weights.items() if not key.endswith(f"mnli.{name}")}
        with pytest.raises(ValueError, match=rf"{name}.* missing"):
            roberta_from_fairseq(missing, num_heads=H, head="mnli")
    untied = {**weights, "encoder.lm_head.weight": np.zeros((V, D), np.float32)}
    with pytest.raises(ValueError, match="untied weights are not supported"):
        roberta_from_fairseq(untied, num_heads=H)
    with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=12"):
        roberta_from_fairseq(weights, num_heads=5)
    with pytest.raises(ValueError, match="no embed_tokens.weight in the weights"):
        roberta_from_fairseq({"a": np.zeros(1)}, num_heads=1)

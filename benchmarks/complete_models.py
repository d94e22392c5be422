"""Benchmarks of complete models: the training batch of each family, and its classes in other libraries.

The worker ``baselines.Machine`` writes one batch to the directory of the checkpoint, and all implementations read it.
JAX is imported only in the functions that need it. Shapes: B batch, T time, P predicted positions, S source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes

SIZES = {
    "gpt": (2, 512), "llama": (2, 512), "bert": (8, 128), "t5": (8, 128), "xlnet": (8, 128),
    "transformer_xl": (8, 128), "lstm": (20, 35), "resnet": (128, 1024), "mamba2": (2, 256),
}  # fmt: skip
"""Default training batch of each family: rows, and tokens per row. The sizes of the LSTM are from Zaremba et al. 2014.
A VDCNN (``resnet``) reads texts of 1024 characters. The source and the target of T5 each have 128 tokens."""
TORCH_CLASSES = {
    "gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "xlnet": "XLNetLMHeadModel", "transformer_xl": "", "lstm": "", "resnet": "",
    "mamba2": "Mamba2ForCausalLM",
}  # fmt: skip
"""Class name in transformers, by family; empty: the class is in ``torch_models``."""
FLAX = {name: f"Flax{TORCH_CLASSES[name]}" for name in ("gpt", "llama", "bert", "t5")}
"""Name of the deprecated Flax class in transformers, by family."""
DECODED_FAMILIES = ("gpt", "llama", "t5", "xlnet", "lstm", "mamba2")
"""Families whose generation is compared with a baseline."""
CLASSES = {"torch": TORCH_CLASSES, "torch-compile": TORCH_CLASSES, "flax": FLAX}
FILE = "batch.npz"
TINY_FIELDS: dict[str, dict[str, Any]] = {"lstm": {"tie_embeddings": False}, "resnet": {"shortcut": False}}
"""Config fields of the tiny variants, so that they have the same architecture as the large variants."""


def build(name: str, *, quick: bool = False) -> Any:
    """The jaxlm model (``quick``: its tiny variant) without dropout, because libraries sample dropout differently."""
    import jaxlm
    from jaxlm.models.registry import family

    model = jaxlm.get_model(name)
    fields: dict[str, Any] = {}
    if quick:
        name = next(variant for variant in family(model.family).VARIANTS if variant.endswith("-tiny"))
        fields = TINY_FIELDS.get(model.family, {})
    return jaxlm.get_model(name, **model.zero_dropout, **fields)


def sizes(model: Any, quick: bool, batch: int | None, length: int | None) -> tuple[int, int]:
    """Rows, and tokens per row, of a training batch: ``batch`` and ``length``, or the defaults of the family.

    Raises:
        ValueError: ``length`` is not the text length of a VDCNN, or is odd or below 10 for XLNet.
    """
    default_batch, default_length = (2, 32) if quick else SIZES[model.family]
    if model.family == "resnet":
        default_length = model.config.max_positions
        if length not in (None, default_length):
            raise ValueError(f"--length {length}: a VDCNN reads texts of max_positions={default_length}")
    if model.family == "xlnet" and length is not None and (length % 2 or length < 10):
        raise ValueError(f"--length {length} must be even and at least 10: an XLNet row has two parts of equal length")
    return batch or default_batch, length or default_length


def num_decoding_parameters(model: Any) -> int:
    """Number of parameters in the matrix products that decode one token."""
    from jaxlm.plan import flops

    return flops.matmul_parameters(model, decoding=True)


def example(model: Any, batch: int, length: int) -> Any:
    """A batch of random tokens for the objective of the model, created with ``jaxlm.objectives``."""
    from jaxlm.objectives import causal, classification, masked, permutation, seq2seq

    cfg, rng = model.config, np.random.default_rng(1)
    tokens = shapes.random_tokens(cfg.vocab_size, batch, length)
    task = model.task
    if model.family == "transformer_xl":
        return causal.batch(shapes.zipf_tokens(cfg.vocab_size, batch, length + 1))
    if task == "masked":
        count = max(1, round(masked.MaskingConfig.rate * length))
        config = masked.MaskingConfig(mask_id=0, vocab_size=cfg.vocab_size, num_predict=count)
        return masked.batch(tokens, rng, config)
    if task == "permutation":
        half = length // 2
        permutation_config = permutation.PermutationConfig(
            reuse_length=half, permutation_length=half, num_predict=length // 6
        )
        return permutation.batch(tokens[:, : length - 3], rng, permutation_config)
    if task == "classification":
        labels = rng.integers(0, cfg.num_labels, batch).astype(np.int32)
        return classification.batch(tokens, labels, num_labels=cfg.num_labels)
    if task == "seq2seq":
        return seq2seq.batch(tokens, tokens[:, ::-1].copy(), start_id=cfg.decoder_start_id)
    assert task == "causal", task
    return causal.batch(shapes.random_tokens(cfg.vocab_size, batch, length + 1))


def save(batch: Any, directory: str) -> None:
    """Write a batch without padding to the directory of its model."""
    assert batch.segment_ids is None
    assert batch.reset is None
    arrays = {
        "tokens": batch.tokens,
        "labels": batch.targets,
        "weights": batch.weights,
        "target_positions": batch.target_positions,
    }
    np.savez(Path(directory) / FILE, **{name: x for name, x in (arrays | batch.inputs).items() if x is not None})


def load(directory: str) -> dict[str, np.ndarray]:
    """The arrays of a batch by name. ``labels``: from ``Batch.targets``; ``targets``: positions that XLNet predicts."""
    with np.load(Path(directory) / FILE) as file:
        return dict(file)


def batch_of(arrays: dict[str, np.ndarray]) -> Any:
    """The arrays of :func:`load` as a ``Batch`` of jaxlm."""
    from jaxlm.objectives.batch import Batch

    inputs = dict(arrays)
    tokens, labels, weights = (inputs.pop(name) for name in ("tokens", "labels", "weights"))
    return Batch(tokens, labels, weights, target_positions=inputs.pop("target_positions", None), inputs=inputs)


def inputs(family: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a batch as keyword arguments of the classes of transformers."""
    if family == "t5":
        return {"input_ids": arrays["source"], "decoder_input_ids": arrays["tokens"]}
    if family == "xlnet":
        # A target of weight 0 is padding: its position is not predicted, and its row of the mapping is 0.
        is_target = arrays["weights"] > 0
        targets = np.where(is_target, arrays["targets"], arrays["targets"][:, :1])
        mapping = target_mapping(targets, arrays["tokens"].shape[1]) * is_target[..., None]
        return {
            "input_ids": arrays["tokens"], "token_type_ids": arrays["token_types"],
            "perm_mask": perm_mask(arrays["order"], targets), "target_mapping": mapping.astype(np.float32),
        }  # fmt: skip
    return {"input_ids": arrays["tokens"]}


IGNORED = -100
"""The label that the losses of torch and transformers ignore."""


def labels(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Labels with the shape of the logits without the last axis. Labels of weight 0 are :data:`IGNORED`."""
    weighted = np.where(arrays["weights"] > 0, arrays["labels"], IGNORED)
    if "target_positions" not in arrays:
        return weighted
    result = np.full(arrays["tokens"].shape, IGNORED, weighted.dtype)
    np.put_along_axis(result, arrays["target_positions"], weighted, axis=1)
    return result


def perm_mask(order: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """XLNet's mask [B, T, T] for an order [B, T]: 1 at [b, i, j] if position i must not attend to position j.

    Targets [B, P] do not attend to themselves.
    """
    is_target = target_mapping(targets, order.shape[1]).max(axis=1) > 0
    query_order = np.where(is_target, order - 1, order)
    return (order[:, None, :] > query_order[:, :, None]).astype(np.float32)


def target_mapping(targets: np.ndarray, length: int) -> np.ndarray:
    """One-hot rows [B, P, T] of the positions [B, P] that XLNet predicts."""
    return np.eye(length, dtype=np.float32)[targets]

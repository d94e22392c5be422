"""Whole models: what each family is trained on, and what its classes in other libraries are called and given.

The machine's worker writes one batch next to the checkpoint; every peer reads it. Only what makes it imports JAX.
Shapes: B batch, T time, P places that are predicted, S source.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes

SIZES = {
    "gpt": (2, 512), "llama": (2, 512), "bert": (8, 128), "t5": (8, 128), "xlnet": (8, 128),
    "transformer_xl": (8, 128), "lstm": (20, 35), "resnet": (128, 1024),
}  # fmt: skip
"""Rows, and tokens of a row, of a training batch of each family, unless others are asked for. The LSTM's are those of
Zaremba et al. 2014; a VDCNN reads texts of 1024 characters; T5's source and target have as many tokens each."""
TORCH = {
    "gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "xlnet": "XLNetLMHeadModel", "transformer_xl": "", "lstm": "", "resnet": "",
}  # fmt: skip
"""The class of transformers, by family; empty: that of ``torch_models``."""
FLAX = {name: f"Flax{TORCH[name]}" for name in ("gpt", "llama", "bert", "t5")}
"""The old Flax class of transformers."""
DECODES = ("gpt", "llama", "t5", "xlnet", "lstm")
"""Families whose generation has a peer."""
CLASSES = {"torch": TORCH, "torch-compile": TORCH, "flax": FLAX}
FILE = "batch.npz"
QUICK: dict[str, dict[str, Any]] = {"lstm": {"tie_embeddings": False}, "resnet": {"shortcut": False}}
"""Config fields that make a family's tiny variant what its large one is to the peers."""


def build(name: str, *, quick: bool = False) -> Any:
    """The jaxlm model without dropout, which no two libraries draw alike; ``quick``: its family's tiny variant."""
    import jaxlm
    from jaxlm.models.model import family

    model = jaxlm.get_model(name)
    fields: dict[str, Any] = {}
    if quick:
        name = next(variant for variant in family(model.family).VARIANTS if variant.endswith("-tiny"))
        fields = QUICK.get(model.family, {})
    rates = {field.name: 0.0 for field in dataclasses.fields(model.config) if field.name.endswith("dropout")}
    return jaxlm.get_model(name, **rates, **fields)


def sizes(model: Any, quick: bool, batch: int | None, length: int | None) -> tuple[int, int]:
    """Rows and tokens of a training batch: those asked for, or the usual ones.

    Raises:
        ValueError: less than one, or a text of another length than a VDCNN's.
    """
    for name, given in (("batch", batch), ("length", length)):
        if given is not None and given < 1:
            raise ValueError(f"--{name} {given} must be at least 1")
    usual_batch, usual_length = (2, 32) if quick else SIZES[model.family]
    if model.family == "resnet":
        usual_length = model.config.max_positions
        if length not in (None, usual_length):
            raise ValueError(f"--length {length}: a VDCNN reads texts of max_positions={usual_length}")
    return batch or usual_batch, length or usual_length


def decoded_parameters(model: Any) -> int:
    """Parameters that one new token reads, all of them: not an encoder's, nor tables where it looks up one row."""
    from jaxlm import spec
    from jaxlm.plan import flops

    encoder = sum(leaf.size for name, leaf in spec.flatten(model.specs).items() if name.startswith("encoder/"))
    return flops.matmul_parameters(model) - encoder


def counted_flops(model: Any, batch: Any) -> Any:
    """FLOPs of a training step on a batch: three times those of the forward pass in its plain form."""
    from jaxlm import spec
    from jaxlm.objectives import objective
    from jaxlm.plan import flops
    from jaxlm.plan.program import plain_form, task_of

    model, loss = plain_form(model), objective(task_of(model)).loss
    forward = flops.counted_flops(lambda params: loss(model, params, batch)[0], spec.abstract(model.specs))
    return flops.Flops(
        3 * forward.amount, "3 * dots and convolutions of the forward pass, at the predicted places only"
    )


def example(model: Any, batch: int, length: int) -> Any:
    """A batch of the model's objective from random tokens, as ``jaxlm.objectives`` makes it."""
    from jaxlm.objectives import causal, classification, masked, permutation, seq2seq
    from jaxlm.plan.program import task_of

    cfg, rng = model.config, np.random.default_rng(1)
    tokens = shapes.random_tokens(cfg.vocab_size, batch, length)
    task = task_of(model)
    if model.family == "transformer_xl":
        return causal.batch(shapes.zipf_tokens(cfg.vocab_size, batch, length + 1))
    if task == "masked":
        count = max(1, round(masked.RATE * length))
        return masked.batch(tokens, rng, mask_id=0, vocab_size=cfg.vocab_size, num_predict=count)
    if task == "permutation":
        half = length // 2
        return permutation.batch(
            tokens[:, : length - 3], rng, reuse_length=half, permutation_length=half, num_predict=length // 6
        )
    if task == "classification":
        labels = rng.integers(0, cfg.num_labels, batch).astype(np.int32)
        return classification.batch(tokens, labels, num_labels=cfg.num_labels)
    if task == "seq2seq":
        return seq2seq.batch(tokens, tokens[:, ::-1].copy(), start_id=cfg.decoder_start_id)
    assert task == "causal", task
    return causal.batch(shapes.random_tokens(cfg.vocab_size, batch, length + 1))


def save(batch: Any, directory: str) -> None:
    """Write a batch without padding next to its model."""
    assert batch.segment_ids is None
    assert batch.reset is None
    arrays = {"tokens": batch.tokens, "labels": batch.targets, "weights": batch.weights, "places": batch.places}
    np.savez(Path(directory) / FILE, **{name: x for name, x in (arrays | batch.inputs).items() if x is not None})


def load(directory: str) -> dict[str, np.ndarray]:
    """The arrays of a batch by name: its targets are ``labels`` (``targets`` are places that XLNet predicts)."""
    with np.load(Path(directory) / FILE) as file:
        return dict(file)


def batch_of(arrays: dict[str, np.ndarray]) -> Any:
    """The same as jaxlm's ``Batch``."""
    from jaxlm.objectives.batch import Batch

    inputs = dict(arrays)
    tokens, labels, weights = (inputs.pop(name) for name in ("tokens", "labels", "weights"))
    return Batch(tokens, labels, weights, places=inputs.pop("places", None), inputs=inputs)


def inputs(family: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch as the classes of transformers take it."""
    if family == "t5":
        return {"input_ids": arrays["source"], "decoder_input_ids": arrays["tokens"]}
    if family == "xlnet":
        return {
            "input_ids": arrays["tokens"], "token_type_ids": arrays["token_types"],
            "perm_mask": perm_mask(arrays["order"], arrays["targets"]),
            "target_mapping": target_mapping(arrays["targets"], arrays["tokens"].shape[1]),
        }  # fmt: skip
    return {"input_ids": arrays["tokens"]}


IGNORED = -100
"""The label that no loss counts, in torch and transformers."""


def labels(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Labels in the shape of the logits without their last axis; :data:`IGNORED` where nothing counts."""
    counted = np.where(arrays["weights"] > 0, arrays["labels"], IGNORED)
    if "places" not in arrays:
        return counted
    found = np.full(arrays["tokens"].shape, IGNORED, counted.dtype)
    np.put_along_axis(found, arrays["places"], counted, axis=1)
    return found


def perm_mask(order: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """XLNet's mask [B, T, T] of an order [B, T]: 1 where i must not see j. Targets [B, P] do not see themselves."""
    is_target = target_mapping(targets, order.shape[1]).max(axis=1) > 0
    query_order = np.where(is_target, order - 1, order)
    return (order[:, None, :] > query_order[:, :, None]).astype(np.float32)


def target_mapping(targets: np.ndarray, length: int) -> np.ndarray:
    """One-hot rows [B, P, T] of the places [B, P] that XLNet predicts."""
    return np.eye(length, dtype=np.float32)[targets]

"""Benchmarks of complete models: the training batch of each family, and its classes in other libraries.

``baselines.Machine`` writes one batch to the directory of the checkpoint, and all implementations read it. Processes
that run torch also import this module, so it imports jaxlm only in the functions that use jaxlm. Shapes: B batch, T
time, P predicted positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes

DEFAULT_BATCH_SIZES = {
    "gpt": (2, 512), "llama": (2, 512), "bert": (8, 128), "t5": (8, 128), "xlnet": (8, 128),
    "transformer_xl": (8, 128), "lstm": (20, 35), "resnet": (128, 1024), "mamba2": (2, 256), "griffin": (2, 512),
    "gated_deltanet": (2, 512), "xlstm": (2, 512),
}  # fmt: skip
"""Default training batch of each family: (rows, tokens per row). The sizes of the LSTM are from Zaremba et al. 2014.
The tokens of a VDCNN (``resnet``) are characters. The source and the target of T5 each have 128 tokens."""
OWN_TORCH_FAMILIES = ("transformer_xl", "lstm", "resnet")
"""Families whose torch model is in ``torch_models``. Other families have a class in transformers."""
FLAX_FAMILIES = ("gpt", "bert", "t5")
"""Families with a Flax class in transformers (deprecated). Llama is missing: its Flax class ignores ``rope_theta`` and
``tie_word_embeddings``, so it computes another loss for SmolLM2."""
DECODED_FAMILIES = ("gpt", "llama", "t5", "xlnet", "lstm", "mamba2")
"""Families whose generation is compared with a baseline."""
FAMILIES_BY_BASELINE = {
    "torch": tuple(DEFAULT_BATCH_SIZES), "torch-compile": tuple(DEFAULT_BATCH_SIZES), "flax": FLAX_FAMILIES,
}  # fmt: skip
"""The families that each baseline has."""
REDUCED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "griffin-12-layers": (
        "recurrentgemma-2b",
        {"vocab_size": 50304, "num_layers": 12, "num_heads": 12, "embed_dim": 768, "mlp_dim": 2304},
    ),
    "gated-deltanet-12-layers": (
        "qwen3-next-80b-a3b",
        {
            "vocab_size": 50304, "num_layers": 12, "embed_dim": 768, "mlp_dim": 2048, "num_experts": None,
            "shared_expert_dim": None, "delta_key_heads": 6, "delta_value_heads": 12, "delta_key_dim": 64,
            "delta_value_dim": 64, "num_heads": 12, "num_kv_heads": 4, "head_dim": 64, "tie_embeddings": True,
        },
    ),
    "xlstm-12-layers": (
        "xlstm-7b",
        {
            "vocab_size": 50304, "num_layers": 12, "embed_dim": 768, "mlp_dim": 2048, "num_heads": 4, "key_dim": 384,
            "value_dim": 768, "tie_embeddings": True,
        },
    ),
    "mixtral-12-layers": (
        "mixtral-8x7b",
        {
            "vocab_size": 50304, "num_layers": 12, "embed_dim": 768, "mlp_dim": 1024, "num_heads": 12,
            "num_kv_heads": 4, "tie_embeddings": True,
        },
    ),
}  # fmt: skip
"""Models for which the published models are too large to be trained on a CPU: a published model, and the config fields
that are changed. The width and the number of layers are those of GPT-2."""
BATCH_FILE = "batch.npz"
"""Name of the file of the batch."""
TINY_FIELDS: dict[str, dict[str, Any]] = {
    "lstm": {"tie_embeddings": False}, "resnet": {"shortcut": False}, "griffin": {"window": 64},
}  # fmt: skip
"""Changes to config fields of the tiny variants. They give a tiny variant the architecture of the published variant.
For griffin, the window is longer than a row, because without a cache, the class in transformers has no window."""


def build(name: str, *, quick: bool = False) -> Any:
    """The jaxlm model ``name``, or with ``quick`` a tiny variant of its family (Mixtral: ``mixtral-tiny``).

    The dropout rates are 0, because each library samples dropout differently.

    Args:
        name: a key of :data:`REDUCED_MODELS`, or a name for ``jaxlm.get_model``.
    """
    import jaxlm
    from jaxlm.models.registry import family

    name, fields = REDUCED_MODELS.get(name, (name, {}))
    model = jaxlm.get_model(name, **fields)
    if quick:
        tiny = [variant for variant in family(model.family).VARIANTS if variant.endswith("-tiny")]
        name = next((variant for variant in tiny if variant.split("-")[0] == name.split("-")[0]), tiny[0])
        fields = TINY_FIELDS.get(model.family, {})
    return jaxlm.get_model(name, **model.zero_dropout, **fields)


def sizes(model: Any, quick: bool, batch: int | None, length: int | None) -> tuple[int, int]:
    """(rows, tokens per row) of a training batch: ``batch`` and ``length``; where they are None, the default.

    The default is :data:`DEFAULT_BATCH_SIZES`, or (2, 32) with ``quick``. The default length of a VDCNN is its
    ``max_positions``.

    Raises:
        ValueError: ``length`` is above ``max_positions`` of the model; the model is a VDCNN and ``length`` is not its
            ``max_positions``; or the model is an XLNet and ``length`` is odd or below 10.
    """
    default_batch, default_length = (2, 32) if quick else DEFAULT_BATCH_SIZES[model.family]
    if model.family == "resnet":
        default_length = model.config.max_positions
        if length not in (None, default_length):
            raise ValueError(f"--length {length}: a VDCNN reads texts of max_positions={default_length}")
    limit = model.max_positions
    if limit is not None and length is not None and length > limit:
        raise ValueError(f"--length {length}: the model reads texts of at most max_positions={limit} tokens")
    if model.family == "xlnet" and length is not None and (length % 2 or length < 10):
        raise ValueError(f"--length {length} must be even and at least 10: an XLNet row has two parts of equal length")
    return batch or default_batch, length or default_length


def num_decoding_parameters(model: Any) -> int:
    """Number of parameters that the decoding of one token reads (``jaxlm.plan.flops.matmul_parameters``).

    Not counted: embedding tables that are not output heads, the encoder, and the key and value projections of its
    output.
    """
    from jaxlm.plan import flops

    return flops.matmul_parameters(model, decoding=True)


def example(model: Any, batch: int, length: int) -> Any:
    """A ``Batch`` of ``batch`` rows of ``length`` random tokens, for the objective of the model."""
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
    """Write the arrays of a batch to :data:`BATCH_FILE` in a directory. The batch has no padding and no resets."""
    assert batch.segment_ids is None
    assert batch.reset is None
    arrays = {
        "tokens": batch.tokens,
        "labels": batch.targets,
        "weights": batch.weights,
        "target_positions": batch.target_positions,
    }
    np.savez(Path(directory) / BATCH_FILE, **{name: x for name, x in (arrays | batch.inputs).items() if x is not None})


def torch_options(family: str, length: int) -> dict[str, Any]:
    """Changes to the config of the torch class, for texts of ``length`` tokens.

    Mamba2ForCausalLM computes arrays of B * T * chunk_size * heads * state_size entries. With the published chunk size
    of 256, the layers of mamba2-130m need more than 32 GB for a training step with 2 rows of 256 tokens. In
    transformers 4.57, the chunked mLSTM of xLSTMForCausalLM is wrong for more than one chunk, so it gets one chunk.
    """
    return {"mamba2": {"chunk_size": 32}, "xlstm": {"chunk_size": length}}.get(family, {})


def load(directory: str) -> dict[str, np.ndarray]:
    """The arrays of a saved batch by name.

    ``labels`` has the target ids (``Batch.targets``). ``targets`` has the positions [B, P] that XLNet predicts; other
    families have no ``targets``.
    """
    with np.load(Path(directory) / BATCH_FILE) as file:
        return dict(file)


def batch_of(arrays: dict[str, np.ndarray]) -> Any:
    """The arrays of :func:`load` as a ``Batch`` of jaxlm."""
    from jaxlm.objectives.batch import Batch

    inputs = dict(arrays)
    tokens, labels, weights = (inputs.pop(name) for name in ("tokens", "labels", "weights"))
    return Batch(tokens, labels, weights, target_positions=inputs.pop("target_positions", None), inputs=inputs)


def transformers_class(directory: str) -> str:
    """The name of the torch class in transformers that has the architecture of a checkpoint."""
    return json.loads((Path(directory) / "config.json").read_text())["architectures"][0]


def inputs(family: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of :func:`load` as keyword arguments of the class in transformers (:func:`transformers_class`)."""
    if family == "t5":
        return {"input_ids": arrays["source"], "decoder_input_ids": arrays["tokens"]}
    if family == "xlnet":
        # A target of weight 0 is padding. Its position is replaced by that of the first target, so that ``perm_mask``
        # does not treat another position as a target. Its row of the mapping is 0, so nothing is predicted.
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
    """The labels for the logits of torch or Flax: [B, T], for XLNet [B, P], for classification [B].

    Positions without a target, and targets of weight 0, have the label :data:`IGNORED`.
    """
    weighted = np.where(arrays["weights"] > 0, arrays["labels"], IGNORED)
    if "target_positions" not in arrays:
        return weighted
    result = np.full(arrays["tokens"].shape, IGNORED, weighted.dtype)
    np.put_along_axis(result, arrays["target_positions"], weighted, axis=1)
    return result


def perm_mask(order: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """XLNet's argument ``perm_mask`` [B, T, T]: 1 at [b, i, j] if position i must not attend to position j, else 0.

    A position attends to positions of the same or a lower order. A target position attends only to positions of a lower
    order, so it does not attend to itself.

    Args:
        order: [B, T], the order of each position.
        targets: [B, P], the target positions.
    """
    is_target = target_mapping(targets, order.shape[1]).max(axis=1) > 0
    query_order = np.where(is_target, order - 1, order)
    return (order[:, None, :] > query_order[:, :, None]).astype(np.float32)


def target_mapping(targets: np.ndarray, length: int) -> np.ndarray:
    """XLNet's argument ``target_mapping``: one-hot rows [B, P, T] of the target positions [B, P], float32."""
    return np.eye(length, dtype=np.float32)[targets]

"""Functions of the oracles of families without published files: random parameters as torch tensors, and results.

The references compute with torch on tensors with the names and shapes of jaxlm's parameters. So no conversion of names
or gradients is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import spec
from jaxlm.interop.huggingface import save_pretrained
from jaxlm.models import Model
from jaxlm.testing.helpers import initial_params


def parameters(model: Model, seed: int) -> dict[str, Any]:
    """Initial parameters plus noise as torch tensors, by path. Variances are positive; one-hot tables have no noise."""
    import torch

    rng = np.random.default_rng(seed)
    tensors = {}
    for path, leaf in spec.flatten(initial_params(model, seed)).items():
        array = np.asarray(leaf)
        if path.endswith("variance"):
            array = rng.uniform(0.5, 1.5, array.shape)
        elif path != "token_embedding" or getattr(model.config, "embedding", "learned") == "learned":
            # Scale the noise by the number of inputs: large activations would increase the rounding errors of the loss.
            scale = min(0.25, np.prod(array.shape[:-1]) ** -0.5)
            array = array + scale * rng.standard_normal(array.shape)
        tensors[path] = torch.tensor(array.astype(np.float32), requires_grad=True)
    return tensors


def padding(segments: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Segment ids [B, T]. ``left``, ``right``: side of the padding; ``packed``: two texts per row; ``none``: None."""
    B, T = shape
    if segments == "none":
        return None
    ids = np.ones((B, T), np.int32)
    for row, pads in enumerate((0, 3, T // 2)[:B]):
        if segments == "packed":
            ids[row, T // 3 + row :] = 2
            ids[row, T - pads :] = 0
        else:
            ids[row, slice(0, pads) if segments == "left" else slice(T - pads, T)] = 0
    return ids


def each_text(
    run: Callable[[np.ndarray], Any], tokens: np.ndarray, segment_ids: np.ndarray | None
) -> tuple[Any, np.ndarray]:
    """Run each text separately; returns the outputs at the texts' positions [B, T, C], and a mask of real positions."""
    import torch

    ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    rows = []
    for row, row_ids in zip(tokens, ids, strict=True):
        positions = [np.nonzero(row_ids == number)[0] for number in range(1, row_ids.max() + 1)]
        outputs = torch.cat([run(row[text_positions]) for text_positions in positions])
        order = np.concatenate(positions)
        rows.append(outputs.new_zeros(len(row), outputs.shape[-1]).index_copy(0, torch.from_numpy(order), outputs))
    return torch.stack(rows), ids > 0


def results(
    model: Model,
    tensors: dict[str, Any],
    tokens: np.ndarray,
    segment_ids: np.ndarray | None,
    hidden: Any,
    logits: Any,
    real: np.ndarray,
    seed: int,
    directory: Path,
) -> dict[str, np.ndarray]:
    """Write the files of the model, and return the reference results (``tests.oracles``).

    Args:
        logits: [B, labels] or [B, T, V]; None for a model without a head.
        real: mask of the compared positions.
    """
    save(model, tensors, directory)
    named = {path.replace("/", "."): tensor for path, tensor in tensors.items()}
    return results_of_named(named, tokens, segment_ids, hidden, logits, real, seed)


def save(model: Model, tensors: dict[str, Any], directory: Path) -> None:
    """Write the files of a model with the parameters ``tensors``, torch tensors by path."""
    leaves = [tensor.detach().numpy() for tensor in tensors.values()]
    save_pretrained(directory, model, jax.tree.unflatten(jax.tree.structure(model.specs), leaves))


def results_of_named(
    tensors: dict[str, Any],
    tokens: np.ndarray,
    segment_ids: np.ndarray | None,
    hidden: Any,
    logits: Any,
    real: np.ndarray,
    seed: int,
) -> dict[str, np.ndarray]:
    """As :func:`results`, for parameters with the names of the tensors in files, which are already written."""
    import torch

    result = {"input/tokens": tokens, "hidden": hidden, "real": real}
    if segment_ids is not None:
        result["input/segment_ids"] = segment_ids
    if logits is not None:
        rng = np.random.default_rng(seed + 1)
        targets = rng.integers(0, logits.shape[-1], logits.shape[:-1]).astype(np.int32)
        weights = np.ones(targets.shape, np.float32)
        if targets.ndim == 2:
            weights = (real & (rng.random(real.shape) < 0.8)).astype(np.float32)
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets.reshape(-1)).long(), reduction="none"
        )
        loss = (losses * torch.from_numpy(weights.reshape(-1))).sum() / weights.sum()
        loss.backward()
        result |= {"logits": logits, "targets": targets, "weights": weights, "loss": loss}
        for name, tensor in tensors.items():
            result[f"gradient/{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return {key: x if isinstance(x, np.ndarray) else x.detach().numpy() for key, x in result.items()}

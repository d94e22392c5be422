"""Comparison of each family with a reference implementation. Each family has a module; all use :func:`compare`.

A module has these names:

    CASES                       tiny models, whose files and reference results are stored (goldens/FAMILY.npz)
    LIVE                        further models, which are compared only if torch is installed
    reference(case, directory)  writes the files of a random model to ``directory`` and returns the reference results

The reference results are a dict of arrays:

    input/<keyword>          arguments of ``apply``; ``input/tokens`` is required
    hidden, logits           hidden states and logits of the reference
    real                     mask of the compared positions (default: positions with a segment id above 0)
    targets, weights, loss   as in ``jaxlm.objectives.batch.Batch``, and the mean loss
    gradient/<name>          gradient of each parameter, with the name of ``jaxlm.interop.huggingface.named_tensors``

Commands:

    python -m tests.oracles                     print a table of the largest relative differences of all cases
    python -m tests.oracles --write [FAMILY]    write the goldens again (if a case changes, not if a test fails)
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxlm.interop.huggingface import load_pretrained, named_tensors
from jaxlm.objectives import objective
from jaxlm.objectives.batch import Batch
from jaxlm.testing.helpers import relative_error

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("_", "test_")))

TOLERANCES = {"hidden": 1e-5, "logits": 1e-5, "loss": 2e-6, "gradient": 2e-5}
"""Maximum of ``max |difference| / max |reference|`` in float32. A module can have larger ones in its ``TOLERANCES``."""


def oracle(family: str) -> ModuleType:
    """The module of a family in this package."""
    return importlib.import_module(f"tests.oracles.{family}")


def tolerances(family: str) -> dict[str, float]:
    """The tolerance of each quantity for a family."""
    return {**TOLERANCES, **getattr(oracle(family), "TOLERANCES", {})}


def write_goldens(family: str) -> None:
    """Write the goldens of a family to one file: the results and the model files of all its cases."""
    arrays = {}
    for case in oracle(family).CASES:
        with tempfile.TemporaryDirectory() as directory:
            results = oracle(family).reference(case, Path(directory))
            files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}
        arrays |= {f"{case}/{key}": x for key, x in results.items()}
        for name, contents in files.items():
            if name not in ("generation_config.json", "README.md"):
                arrays[f"{case}/files/{name}"] = np.frombuffer(contents, np.uint8)
    np.savez_compressed(GOLDENS / f"{family}.npz", **arrays)


def read_golden(family: str, case: str, directory: Path) -> dict[str, np.ndarray]:
    """Write the files of a stored model to ``directory``, and return the stored reference results."""
    with np.load(GOLDENS / f"{family}.npz") as file:
        arrays = {key.removeprefix(f"{case}/"): file[key] for key in file if key.startswith(f"{case}/")}
    directory.mkdir(parents=True, exist_ok=True)
    for key in [key for key in arrays if key.startswith("files/")]:
        (directory / key.removeprefix("files/")).write_bytes(arrays.pop(key).tobytes())
    return arrays


def compare(directory: Path, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative error of each quantity in the reference results, for example ``{"hidden": 3e-7, ...}``."""
    model, params = load_pretrained(directory)
    inputs = {key.removeprefix("input/"): x for key, x in reference.items() if key.startswith("input/")}
    tokens, segment_ids = inputs.pop("tokens"), inputs.pop("segment_ids", None)
    targets, weights = reference.get("targets"), reference.get("weights")
    task = model.task

    @jax.jit
    def outputs(params: Any, tokens: Any, segment_ids: Any, inputs: Any) -> Any:
        hidden, _ = model.apply(params, tokens, segment_ids=segment_ids, **inputs)
        if task == "none" or "logits" not in reference:
            return hidden, None
        pooled = hidden if task != "classification" else model.pool(params, hidden, segment_ids=segment_ids)
        return hidden, model.logits(params, pooled)

    hidden, logits = outputs(params, tokens, segment_ids, inputs)
    real = reference.get("real")
    if real is None:
        real = np.ones(hidden.shape[:2], bool) if segment_ids is None else segment_ids > 0
    errors = {}
    if "hidden" in reference:
        errors["hidden"] = relative_error(hidden[real], reference["hidden"][real])
    if "logits" in reference:
        got, want = np.asarray(logits), reference["logits"]
        if task == "classification":
            got = got[:, 0]
        else:
            got, want = got[real][:, : want.shape[-1]], want[real]
        errors["logits"] = relative_error(got, want)
    if "loss" in reference:
        batch = Batch(tokens, targets, weights, segment_ids, inputs)

        @jax.jit
        def loss_and_gradients(params: Any, batch: Batch) -> Any:
            def mean(params: Any) -> Any:
                total, weight, _ = objective(task).loss(model, params, batch)
                return total / weight

            return jax.value_and_grad(mean)(params)

        loss, gradients = loss_and_gradients(params, batch)
        errors["loss"] = relative_error(loss, reference["loss"])
        got_gradients = dict(named_tensors(model, gradients))
        want_gradients = {
            key.removeprefix("gradient/"): x for key, x in reference.items() if key.startswith("gradient/")
        }
        assert got_gradients.keys() == want_gradients.keys(), sorted(got_gradients.keys() ^ want_gradients.keys())
        # Some gradients are only rounding errors (for example, of a key bias). So each error is divided by at least 1 %
        # of the largest gradient.
        largest = max(np.abs(x).max() for x in want_gradients.values())
        errors["gradient"] = max(
            np.abs(got_gradients[name] - want_gradients[name]).max()
            / max(np.abs(want_gradients[name]).max(), 1e-2 * largest)
            for name in got_gradients
        )
    return errors

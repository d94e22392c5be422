"""What several tests need."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.models import FAMILIES, Model, get_model
from jaxlm.models.model import family
from jaxlm.objectives.batch import Batch

TINY = tuple(variant for name in FAMILIES for variant in family(name).VARIANTS if variant.endswith("-tiny"))
"""The tiny variants of all families: one for each form that a family has."""


FIRST = tuple(next(variant for variant in TINY if variant in family(name).VARIANTS) for name in FAMILIES)
"""The first form of each family: what a plain ``pytest`` tests; the others are marked ``thorough``."""


def forms(names: Any = TINY) -> list[Any]:
    """Parameters of a test over forms."""
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def tiny_model(name: str, **overrides: Any) -> Model:
    """A tiny variant (or the first one of a family), without dropout unless asked for."""
    if name in FAMILIES:
        name = next(variant for variant in family(name).VARIANTS if variant.endswith("-tiny"))
    config = get_model(name).config
    rates = {field.name: 0.0 for field in dataclasses.fields(config) if field.name.endswith("dropout")}
    return get_model(name, **{**rates, **overrides})


def with_stacked_layers(model: Model) -> Model:
    """The model with ``scan_layers=True``; the same model if its family has no such field."""
    if not hasattr(model.config, "scan_layers"):
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, scan_layers=True))


def task_of(model: Model) -> str:
    """The task of a model."""
    return getattr(model.config, "task", "causal")


def decodes(model: Model) -> bool:
    """Whether the model carries a state, so that it can decode."""
    try:
        model.state_specs(1, 2)
    except TypeError:
        return False
    return True


def source_of(model: Model, rows: int, seed: int = 5) -> dict[str, np.ndarray]:
    """The source that an encoder-decoder reads beside ``rows`` rows of tokens; nothing for other models."""
    return {"source": random_tokens(model, rows, 6, seed)} if model.reads_source else {}


def batch_of(model: Model, tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    """What the model's task makes of a window [B, T + 1]: next tokens, the tokens themselves at some places, or labels
    that follow from the tokens. Places that are padding do not count."""
    read, following = tokens[:, :-1], tokens[:, 1:]
    inputs = source_of(model, len(tokens))
    before = None if segment_ids is None else segment_ids[:, :-1]
    weights = np.ones(read.shape, np.float32)
    task = task_of(model)
    if task in ("causal", "permutation", "seq2seq"):
        if segment_ids is not None:
            weights = ((before == segment_ids[:, 1:]) & (before > 0)).astype(np.float32)
        return Batch(read, following, weights, before, inputs)
    if before is not None:
        weights = (before > 0).astype(np.float32)
    if task == "masked":
        return Batch(read, (read + 1) % 7, weights * (np.arange(read.shape[1]) % 3 == 1), before, inputs)
    if task == "tagging":
        return Batch(read, read % model.config.num_labels, weights, before, inputs)
    ones = np.ones(len(tokens), np.float32)
    if task == "classification":
        return Batch(read, read[:, 0] % model.config.num_labels, ones, before, inputs)
    assert task == "span_qa", task
    return Batch(read, np.stack([read[:, 0] % 3, 3 + read[:, 1] % 3], axis=1), ones, before, inputs)


def lively(params: Any) -> Any:
    """Parameters moved away from their near-symmetric start, so that a wrong sign or a lost term shows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(99), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def random_tokens(model: Model, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random ids [batch, length] int32."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, length)).astype(np.int32)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over largest absolute value of ``expected``; infinite if either is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {expected.shape}")
    error = np.max(np.abs(actual - expected), initial=0.0) / max(np.max(np.abs(expected), initial=0.0), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def assert_trees_close(actual: Any, expected: Any, tolerance: float, *, floor: float = 0.0) -> None:
    """Every leaf within ``tolerance`` relative error, or the path of the worst.

    ``floor``: a leaf is measured against at least this share of the largest number in the tree, for those that are
    nothing but rounding (the gradient of a bias on attention keys is 0).
    """
    want = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected)]
    least = floor * max((np.max(np.abs(leaf), initial=0.0) for leaf in want), default=0.0)
    errors = {}
    for (path, leaf), one in zip(jax.tree_util.tree_flatten_with_path(actual)[0], want, strict=True):
        error = relative_error(leaf, one)
        errors[jax.tree_util.keystr(path)] = error * min(1.0, np.max(np.abs(one), initial=0.0) / max(least, 1e-30))
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} > {tolerance:.0e}"


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Every leaf equal bit for bit."""
    for (path, leaf), want in zip(
        jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
        leaf, want = np.asarray(leaf), np.asarray(want)
        assert leaf.dtype == want.dtype, path
        assert leaf.tobytes() == want.tobytes(), f"{jax.tree_util.keystr(path)} differs"

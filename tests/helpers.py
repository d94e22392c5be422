"""What several tests need."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxlm.models import Model
from jaxlm.models.model import family


def tiny_model(name: str, **overrides: Any) -> Model:
    """The tiny variant of a family, without dropout unless asked for."""
    (variant,) = [variant for variant in family(name).VARIANTS if variant.endswith("-tiny")]
    config = family(name).VARIANTS[variant]
    rates = {field.name: 0.0 for field in dataclasses.fields(config) if field.name.endswith("dropout")}
    return Model(name, dataclasses.replace(config, **{**rates, **overrides}))


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


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within ``tolerance`` relative error, or the path of the worst."""
    errors = {
        jax.tree_util.keystr(path): relative_error(leaf, want)
        for (path, leaf), want in zip(
            jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(expected), strict=True
        )
    }
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

"""Functions and constants for tests: tiny models, their inputs and parameters, and comparisons of arrays."""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxlm import spec
from jaxlm.models import FAMILIES, Model, family_names, get_model
from jaxlm.models.registry import family
from jaxlm.objectives.batch import Batch
from jaxlm.spec import Params, State


def tiny_variants(families: Sequence[str]) -> tuple[str, ...]:
    """The tiny variants of the families. A family with several architectures has a tiny variant for each of them."""
    return tuple(
        variant for name in families for variant in getattr(family(name), "VARIANTS", {}) if variant.endswith("-tiny")
    )


TINY = tiny_variants(FAMILIES)
"""The tiny variants of all families of the package."""


FIRST_VARIANTS = tuple(next(variant for variant in TINY if variant in family(name).VARIANTS) for name in FAMILIES)
"""The first tiny variant of each family of the package. Tests of other variants have the mark ``thorough``."""


def variant_params(names: Any = TINY) -> list[Any]:
    """Values for ``pytest.mark.parametrize``: the names, with the mark ``thorough`` on all but :data:`FIRST_VARIANTS`.

    Names of variants of other packages get no mark.
    """
    thorough = set(TINY) - set(FIRST_VARIANTS)
    return [pytest.param(name, marks=pytest.mark.thorough) if name in thorough else name for name in names]


def tiny_model(name: str, **overrides: Any) -> Model:
    """The model of a tiny variant, or of the first tiny variant of a family. Dropout rates are 0 unless overridden."""
    if name in family_names():
        variants = tiny_variants((name,))
        if not variants:
            raise ValueError(f"family {name!r} has no variant whose name ends in '-tiny': add one to its VARIANTS")
        name = variants[0]
    return get_model(name, **{**get_model(name).zero_dropout, **overrides})


def with_stacked_layers(model: Model) -> Model:
    """The model with ``scan_layers=True``. If its config has no such field, the same model."""
    return model.with_known_fields(scan_layers=True)


def can_stack_layers(model: Model) -> bool:
    """Whether the config accepts ``scan_layers=True``. For this, all layers must be of one kind."""
    if not hasattr(model.config, "scan_layers"):
        return False
    try:
        model.with_fields(scan_layers=True)
    except ValueError:  # a pattern of different layers
        return False
    return True


def decodes(model: Model) -> bool:
    """Whether the model has a state, which decoding needs."""
    try:
        model.state_specs(1, 2)
    except TypeError:
        return False
    return True


def source_inputs(model: Model, rows: int) -> dict[str, np.ndarray]:
    """``{"source": ids}`` with random ids [rows, 6] for an encoder-decoder; empty for other models."""
    return {"source": random_tokens(model, rows, 6, seed=5)} if model.reads_source else {}


def batch_of(model: Model, tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    """A batch for the model's task. Its inputs are the first T of the tokens [B, T + 1].

    The targets depend on the task:

    - "causal", "permutation", "seq2seq": the next tokens. Weight 0: padding, and the last token of each document.
    - "masked": ``(token + 1) % 7``. Weight 0: padding, and all positions except every third one.
    - "token_classification": a label computed from each token. Weight 0: padding.
    - "classification", "span_qa": a label or a span computed from the first tokens of the row. All weights are 1.
    """
    inputs, next_tokens = tokens[:, :-1], tokens[:, 1:]
    source = source_inputs(model, len(tokens))
    input_segments: Any = None if segment_ids is None else segment_ids[:, :-1]
    weights: Any = np.ones(inputs.shape, np.float32)
    task = model.task
    if task in ("causal", "permutation", "seq2seq"):
        if segment_ids is not None:
            weights = ((input_segments == segment_ids[:, 1:]) & (input_segments > 0)).astype(np.float32)
        return Batch(inputs, next_tokens, weights, input_segments, source)
    if input_segments is not None:
        weights = (input_segments > 0).astype(np.float32)
    if task == "masked":
        every_third = np.arange(inputs.shape[1]) % 3 == 1
        return Batch(inputs, (inputs + 1) % 7, weights * every_third, input_segments, source)
    if task == "token_classification":
        return Batch(inputs, inputs % model.config.num_labels, weights, input_segments, source)
    ones = np.ones(len(tokens), np.float32)
    if task == "classification":
        return Batch(inputs, inputs[:, 0] % model.config.num_labels, ones, input_segments, source)
    assert task == "span_qa", task
    spans = np.stack([inputs[:, 0] % 3, 3 + inputs[:, 1] % 3], axis=1)
    return Batch(inputs, spans, ones, input_segments, source)


def initial_params(model: Model, seed: int = 0) -> Any:
    """The initial parameters of the model, up to rounding, as new arrays."""
    return initial_values(model.specs, seed)


def initial_values(specs: spec.Tree, seed: int = 0) -> Any:
    """``spec.init(specs, jax.random.key(seed))`` up to rounding, as new arrays.

    NumPy draws the values. JAX would compile the initialization of each tree, and this takes longer than most tests.
    """
    named_specs, treedef = jax.tree_util.tree_flatten_with_path(specs)
    return jax.tree.map(jax.device_put, jax.tree.unflatten(treedef, _drawn_values(tuple(named_specs), seed)))


def initialized_params(model: Model, seed: int = 0) -> Any:
    """The parameters of ``model.init`` in ``jit``. Models with equal specs share one compiled function."""
    named_specs, treedef = jax.tree_util.tree_flatten_with_path(model.specs)
    return jax.tree.map(jax.device_put, _initialized_values(tuple(named_specs), treedef, seed))


@functools.lru_cache(maxsize=64)
def _initialized_values(named_specs: tuple[Any, ...], treedef: Any, seed: int) -> Any:
    return jax.device_get(_init(named_specs, treedef, jax.random.key(seed)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(named_specs: tuple[Any, ...], treedef: Any, key: jax.Array) -> Any:
    return spec.init(jax.tree.unflatten(treedef, [array for _, array in named_specs]), key)


@functools.lru_cache(maxsize=64)
def _drawn_values(named_specs: tuple[Any, ...], seed: int) -> list[np.ndarray]:
    """The values of each leaf. The keys of leaves and layers are those of ``spec.init``."""
    values = []
    for path, leaf in named_specs:
        name, number = spec.split_layer(spec.path_name(path))
        key = _fold_in((np.uint32(0), np.uint32(seed)), zlib.crc32(name.encode()))
        if leaf.is_stacked:
            layers = [
                _draw(leaf.init, _fold_in(key, layer), leaf.shape[1:], leaf.dtype) for layer in range(leaf.shape[0])
            ]
            values.append(np.stack(layers))
        else:
            values.append(_draw(leaf.init, key if number is None else _fold_in(key, number), leaf.shape, leaf.dtype))
    return values


def _draw(init: Any, key: tuple[Any, Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The values of an initializer. NumPy draws float32 Gaussian and uniform values, JAX all other random values."""
    if isinstance(init, spec.Constant):
        return np.full(shape, init.value, dtype)
    if dtype == np.float32 and isinstance(init, (spec.Normal, spec.Uniform)):
        index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
        first, second = _threefry(key, np.zeros_like(index), index)
        unit = (((first ^ second) >> 9) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1.0)
        high = np.float32(init.bound if isinstance(init, spec.Uniform) else 1.0)
        low = -high if isinstance(init, spec.Uniform) else np.nextafter(-high, np.float32(0.0))  # erfinv(-1) = -inf
        uniform = np.maximum(low, unit * (high - low) + low)
        if isinstance(init, spec.Uniform):
            return uniform
        return (np.sqrt(2.0) * special.erfinv(uniform.astype(np.float64)) * init.stddev).astype(np.float32)
    return np.asarray(_initializer(init, shape, jnp.dtype(dtype))(np.array(key, np.uint32)))


@functools.lru_cache(maxsize=64)
def _initializer(init: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.jit(lambda key_data: init(jax.random.wrap_key_data(key_data, impl="threefry2x32"), shape, dtype))


def _fold_in(key: tuple[Any, Any], number: int) -> tuple[Any, Any]:
    """``jax.random.fold_in`` of the data of a threefry key."""
    first, second = _threefry(key, np.zeros(1, np.uint32), np.array([number], np.uint32))
    return first[0], second[0]


def _threefry(key: tuple[Any, Any], first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The generator Threefry-2x32 of Salmon et al. (2011) with 20 rounds."""
    keys = [np.full(1, word, np.uint32) for word in (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))]
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            first = first + second
            second = ((second << rotation) | (second >> (32 - rotation))) ^ first
        first, second = first + keys[(block + 1) % 3], second + keys[(block + 2) % 3] + np.uint32(block + 1)
    return first, second


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Model, params: Params, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
    """``model.apply`` in ``jit``. Equal models and shapes share one compilation, which makes the tests faster."""
    return model.apply(params, tokens, **inputs)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode_state(
    model: Model, params: Params, source: jax.Array, length: int, segment_ids: jax.Array | None = None
) -> State:
    """``model.init_decode_state`` in ``jit``."""
    return model.init_decode_state(params, source, length, segment_ids=segment_ids)


def add_noise(params: Params) -> Any:
    """The parameters plus Gaussian noise with standard deviation 0.1.

    With the initial values (biases 0, scales 1), a test could miss a wrong sign or term.
    """
    rng = np.random.default_rng(99)  # NumPy, because JAX would compile the noise for each shape

    def noisy(x: Any) -> jax.Array:
        return jax.device_put(np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(x.dtype))

    return jax.tree.map(noisy, params)


def random_tokens(model: Model, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids, [batch, length] int32."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, length)).astype(np.int32)


def relative_error(actual: Any, expected: Any, *, min_scale: float = 1e-30) -> float:
    """``max |actual - expected| / max |expected|``; infinity if a value is not finite. The shapes must be equal.

    The divisor is at least ``min_scale``.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {expected.shape}")
    error = np.max(np.abs(actual - expected), initial=0.0) / max(np.max(np.abs(expected), initial=0.0), min_scale)
    return float(error) if np.isfinite(error) else float("inf")


def assert_trees_close(actual: Any, expected: Any, tolerance: float, *, floor: float = 0.0) -> None:
    """Assert that the trees have the same structure, and that the relative error of each leaf is at most ``tolerance``.

    The message names the worst leaf.

    The relative error is the largest difference, divided by the largest absolute expected value of the leaf. All
    expected values must be finite.

    Args:
        floor: the divisor is at least ``floor`` times the largest absolute expected value of the tree. So leaves that
            have only rounding errors do not fail. For example, the true gradient of the key bias of attention is 0.
    """
    _assert_same_structure(actual, expected)
    expected_leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(actual)[0]]
    for name, want in zip(names, expected_leaves, strict=True):
        assert np.all(np.isfinite(want)), f"{name}: an expected value is not finite"
    largest = max((np.max(np.abs(leaf), initial=0.0) for leaf in expected_leaves), default=0.0)
    pairs = zip(names, jax.tree.leaves(actual), expected_leaves, strict=True)
    min_scale = max(floor * largest, 1e-30)
    errors = {name: relative_error(leaf, want, min_scale=min_scale) for name, leaf, want in pairs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} > {tolerance:.0e}"


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Assert that the trees have the same structure, and that each leaf has the same shape, dtype and bits."""
    _assert_same_structure(actual, expected)
    for (path, leaf), want in zip(
        jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
        leaf, want = np.asarray(leaf), np.asarray(want)
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == want.dtype, f"{name}: dtypes {leaf.dtype} and {want.dtype} differ"
        assert leaf.shape == want.shape, f"{name}: shapes {leaf.shape} and {want.shape} differ"
        assert leaf.tobytes() == want.tobytes(), f"{name} differs"


def _assert_same_structure(actual: Any, expected: Any) -> None:
    got: Any = jax.tree.structure(actual)
    want: Any = jax.tree.structure(expected)
    assert got == want, f"the structures {got} and {want} differ"

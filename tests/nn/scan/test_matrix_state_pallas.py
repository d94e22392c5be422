"""Tests of the TPU kernels of linear_attention, the delta rules and mlstm, interpreted on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.scan import (
    gated_delta_rule,
    generalized_delta_rule,
    generalized_delta_rule_pallas,
    head_blocks,
    linear_attention,
    mlstm,
    ssd,
)
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.nn.tpu import one_tpu

SHAPES = {  # B, T, G, H, K, V
    "shared keys, padded time": (2, 40, 1, 4, 16, 8),
    "own keys": (1, 33, 4, 4, 8, 16),
    "two groups": (1, 20, 2, 8, 128, 32),
    "two blocks of heads": (1, 20, 1, 8, 16, 32),
}
OWN_KEYS = SHAPES["own keys"]


def arrays(B, T, G, H, K, V, dtype=np.float32):
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(B, T, G, K)).astype(dtype) for _ in range(2))
    value, state = rng.normal(size=(B, T, H, V)).astype(dtype), rng.normal(size=(B, H, K, V)).astype(np.float32)
    log_decay = -0.3 * rng.exponential(size=(B, T, H)).astype(np.float32)
    return query * dtype(K**-0.5), key, value, log_decay, state


def delta_rule_arrays(*shape, dtype=np.float32):
    query, key, value, log_decay, state = arrays(*shape, dtype=dtype)
    key = (key / np.linalg.norm(key.astype(np.float32), axis=-1, keepdims=True)).astype(dtype)
    beta = np.random.default_rng(1).uniform(0.0, 2.0, log_decay.shape).astype(np.float32)
    return query, key, value, log_decay, beta, state


def mlstm_arrays(*shape, dtype=np.float32):
    query, key, value, log_forget, cell = arrays(*shape, dtype=dtype)
    log_input, normalizer, stabilizer = (
        np.random.default_rng(1).normal(size=size).astype(np.float32)
        for size in (log_forget.shape, cell.shape[:3], cell.shape[:2])
    )
    return query, key, value, log_input, log_forget, {"cell": cell, "normalizer": normalizer, "stabilizer": stabilizer}


def generalized_arrays(*shape, dtype=np.float32):
    query, key, value, log_decay, rate, state = delta_rule_arrays(*shape, dtype=dtype)
    log_decay = np.random.default_rng(2).uniform(-0.6, 0.0, query.shape).astype(np.float32)
    low_rank = -key, (key * (0.5 * rate[..., None])).astype(dtype)
    return query, key, value, log_decay, low_rank, state


def with_scale(query, key, value, log_decay, scale, state, **options):
    return linear_attention(query, key, value, log_decay, state, scale_BTH=scale, **options)


FUNCTIONS = {
    "scale": (with_scale, delta_rule_arrays),
    "linear_attention": (linear_attention, arrays),
    "gated_delta_rule": (gated_delta_rule, delta_rule_arrays),
    "mlstm": (mlstm, mlstm_arrays),
    "generalized_delta_rule": (
        functools.partial(generalized_delta_rule, min_log_decay=-0.61), generalized_arrays,
    ),
}  # fmt: skip
OTHER_FUNCTIONS = [name for name in FUNCTIONS if name != "linear_attention"]


def masks(B, T):
    rng = np.random.default_rng(1)
    return {"reset_BT": rng.random((B, T)) < 0.1, "keep_BT": rng.random((B, T)) < 0.8}


def value_and_gradients(arguments, function=linear_attention, **options):
    def loss(arguments):
        out, last = function(*arguments, **options)
        weights = np.random.default_rng(2).normal(size=out.shape)
        return jnp.sum(weights * out.astype(jnp.float32)) + sum(map(jnp.sum, map(jnp.sin, jax.tree.leaves(last)))), (
            out, last,
        )  # fmt: skip

    gradients, values = jax.jit(jax.grad(loss, has_aux=True))(tuple(arguments))
    return {"values": values, "gradients": gradients}


@pytest.fixture
def on_tpu(monkeypatch):
    """Run the kernels in Pallas's interpreter, with chunks of 16 steps and blocks of at most 4 heads."""
    interpret(monkeypatch)
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 16)
    monkeypatch.setattr(generalized_delta_rule_pallas, "CHUNK", 16)
    monkeypatch.setattr(head_blocks, "MAX_HEADS", 4)


def interpret(monkeypatch):
    """Run the kernels in Pallas's interpreter."""
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, masked, on_tpu):
    """The kernel of ``linear_attention`` has the values and gradients of the reference."""
    options = masks(*shape[:2]) if masked else {}
    got = value_and_gradients(arrays(*shape), implementation="pallas", **options)
    want = value_and_gradients(arrays(*shape), implementation="reference", **options)
    assert_trees_close(got, want, 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_values_and_gradients_of_the_other_functions(name, masked, on_tpu):
    function, arguments = FUNCTIONS[name]
    options = masks(*OWN_KEYS[:2]) if masked else {}
    got, want = (
        value_and_gradients(arguments(*OWN_KEYS), function, implementation=implementation, **options)
        for implementation in ("pallas", "reference")
    )
    assert_trees_close(got, want, 1e-5)


def test_equal_keys_of_the_delta_rule(on_tpu):
    """Powers of the triangular matrix have entries of up to 2e6 here. Its inverse has small entries."""
    query, key, value, log_decay, beta, state = delta_rule_arrays(*OWN_KEYS)
    key, log_decay, beta = np.broadcast_to(key[:, :1], key.shape), np.zeros_like(log_decay), np.full_like(beta, 2.0)
    got, want = (
        value_and_gradients(
            (query, key, value, log_decay, beta, state), gated_delta_rule, implementation=implementation
        )
        for implementation in ("pallas", "reference")
    )
    assert_trees_close(got, want, 2e-5)


def test_decays_of_almost_zero(on_tpu):
    """The state is forgotten, also by a log decay of -inf, and the gradients are finite."""
    query, key, value, log_decay, state = arrays(*OWN_KEYS)
    log_decay[:, 5], log_decay[:, 20] = -np.inf, -500.0
    got = value_and_gradients((query, key, value, log_decay, state), implementation="pallas")
    want = value_and_gradients((query, key, value, log_decay, state), implementation="chunked")
    assert_trees_close(got, want, 2e-5)  # a sum of log decays of 208 has a rounding error of 1e-5


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    ("name", "shape"), [*((name, OWN_KEYS) for name in FUNCTIONS), ("scale", SHAPES["shared keys, padded time"])]
)
def test_bfloat16(name, shape, on_tpu):
    """The errors are about the rounding error of bfloat16, 0.004, as for the implementation chunked."""
    function, make_arguments = FUNCTIONS[name]
    arguments = make_arguments(*shape, dtype=jnp.bfloat16)
    got, chunked = (value_and_gradients(arguments, function, implementation=name) for name in ("pallas", "chunked"))
    in_float32 = jax.tree.map(lambda x: np.asarray(x, np.float32), arguments)
    exact = value_and_gradients(in_float32, function, implementation="reference")
    for result, other, want in zip(*map(jax.tree.leaves, (got, chunked, exact)), strict=True):
        assert result.dtype == other.dtype
        as_float = np.asarray(result, np.float32)
        assert relative_error(as_float, want) < max(0.02, 2.0 * relative_error(np.asarray(other, np.float32), want))


@pytest.mark.thorough
def test_the_sum_of_the_gradients_of_decays_in_bfloat16(on_tpu, monkeypatch):
    """This sum is the gradient of ``A`` of ``ssd``: rounding errors of y and of the value gradients must cancel."""
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 128)
    arguments = delta_rule_arrays(1, 128, 1, 4, 16, 32, dtype=jnp.bfloat16)

    def gradient(arguments, implementation):
        gradients = value_and_gradients(arguments, with_scale, implementation=implementation)["gradients"]
        return np.sum(np.asarray(gradients[3], np.float64), axis=1)

    exact = gradient([np.asarray(x, np.float32) for x in arguments], "reference")
    error, chunked_error = (relative_error(gradient(arguments, name), exact) for name in ("pallas", "chunked"))
    assert error < 2.0 * chunked_error + 0.005


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
@pytest.mark.parametrize("steps", [40, 130])
def test_chunks_of_the_default_size_with_nan_at_padding(name, steps, monkeypatch):
    interpret(monkeypatch)
    function, make_arguments = FUNCTIONS[name]
    *inputs, state = make_arguments(1, steps, 2, 2, 8, 16)
    options = masks(1, steps)
    keep = options["keep_BT"]
    inputs = jax.tree.map(
        lambda x: np.where(keep.reshape(1, steps, *(1,) * (x.ndim - 2)), x, np.float32(np.nan)), inputs
    )
    got, want = (
        jax.jit(functools.partial(function, implementation=each, **options))(*inputs, state)
        for each in ("pallas", "reference")
    )
    assert_trees_close(got, want, 2e-5)


def test_mlstm_needs_whole_registers_for_the_normalizer(on_tpu):
    arguments = mlstm_arrays(1, 16, 32, 32, 100, 64)
    with pytest.raises(ValueError, match="needs a block of J heads that fits into VMEM"):
        mlstm(*arguments, implementation="pallas")


def test_state_space_model_with_negative_eigenvalues(on_tpu):
    rng = np.random.default_rng(0)
    x, dt = rng.normal(size=(2, 24, 4, 8)), rng.uniform(0.1, 2.0, (2, 24, 4))
    B, C = (rng.normal(size=(2, 24, 1, 16)) for _ in range(2))
    arguments = [np.asarray(y, np.float32) for y in (x, dt, -rng.uniform(0.1, 1.0, 4), B, C)]
    with pytest.raises(ValueError, match="does not support negative eigenvalues: leave the implementation out"):
        ssd(*arguments, negative_eigenvalues=True, implementation="pallas")
    got, want = (
        jax.jit(functools.partial(ssd, negative_eigenvalues=True, implementation=name, **masks(2, 24)))(*arguments)
        for name in (None, "reference")
    )
    assert_trees_close(got, want, 1e-5)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 33, 4, 4, 8, 16),  # own keys
        (1, 20, 1, 8, 16, 32),  # one group
        (1, 20, 2, 8, 128, 64),  # a group for each device
        (1, 20, 4, 8, 128, 128),  # two groups for each device
        (1, 20, 1, 2, 16, 32),  # one group, and one head for each device
    ],
)
def test_heads_of_several_devices(shape, on_tpu):
    """Heads that are split over devices give the results of one device."""
    check_on_several_devices("linear_attention", shape)


@pytest.mark.thorough
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_several_devices(name, on_tpu):
    """The other functions also give the results of one device."""
    check_on_several_devices(name, OWN_KEYS)


def check_on_several_devices(name, shape):
    function, make_arguments = FUNCTIONS[name]
    arguments, options = make_arguments(*shape), masks(*shape[:2])
    want = value_and_gradients(arguments, function, implementation="reference", **options)
    with Sharding(make_mesh({"data": 1, "tensor": 2}, devices=jax.devices()[:2])).scope():
        got = value_and_gradients(arguments, function, implementation="pallas", **options)
    assert_trees_close(got, want, 1e-5)


def test_groups_that_the_devices_cannot_share_are_named(on_tpu):
    query, _, value, _, _ = arrays(1, 20, 2, 8, 128, 64)
    with Sharding(make_mesh({"data": 1, "tensor": 4}, devices=jax.devices()[:4])).scope():
        reason = head_blocks.unsupported_reason(query, value)
    assert reason == (
        "needs numbers of heads and groups that are divisible by 4 (a single group is allowed), not 8 and 2"
    )


@pytest.mark.parametrize(
    ("shape", "in_bfloat16", "in_float32"),
    [
        ((1, 80, 128, 64), 8, 8),  # mamba2-2.7b
        ((8, 8, 256, 512), 2, 2),  # xlstm-7b
        ((32, 32, 128, 128), 8, 4),  # qwen3-next-80b-a3b
        ((32, 32, 192, 8), None, None),  # the compiler pads the rows of a state to 128 entries
    ],
)
def test_heads_of_a_block(shape, in_bfloat16, in_float32):
    assert head_blocks.heads_per_block(*shape, 2) == in_bfloat16
    assert head_blocks.heads_per_block(*shape, 4) == in_float32


@pytest.mark.parametrize(
    ("shape", "in_bfloat16", "in_float32"),
    [((32, 32, 64, 64), 8, 8), ((16, 16, 128, 128), 8, 4), ((8, 8, 192, 16), None, None)],  # the first: rwkv7-1.5b
)
def test_heads_of_a_block_of_the_generalized_delta_rule(shape, in_bfloat16, in_float32):
    estimate = generalized_delta_rule_pallas.vmem_bytes
    assert head_blocks.heads_per_block(*shape, 2, estimate) == in_bfloat16
    assert head_blocks.heads_per_block(*shape, 4, estimate) == in_float32


def test_the_kernel_of_the_generalized_delta_rule_rejects_heads_that_do_not_fit(on_tpu):
    arguments = generalized_arrays(1, 16, 1, 1, 1900, 8)
    with pytest.raises(ValueError, match="needs a block of J heads that fits into VMEM"):
        generalized_delta_rule(*arguments, min_log_decay=-0.61, implementation="pallas")


def test_without_a_state_the_generalized_delta_rule_starts_with_zeros(on_tpu):
    *arguments, state = generalized_arrays(*OWN_KEYS)
    run = functools.partial(generalized_delta_rule, min_log_decay=-0.61, implementation="pallas")
    assert_trees_close(jax.jit(run)(*arguments), jax.jit(run)(*arguments, np.zeros_like(state)), 1e-7)


def test_several_chunks_of_the_default_size(on_tpu, monkeypatch):
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 128)
    shape = (1, 300, 1, 2, 8, 64)
    got, want = (
        value_and_gradients(arrays(*shape), implementation=name, **masks(1, 300)) for name in ("pallas", "reference")
    )
    assert_trees_close(got, want, 2e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "per_channel", "message"),
    [
        ((1, 8, 2, 2, 8, 8), np.float16, False, "supports float32 and bfloat16, not float16"),
        ((1, 8, 2, 2, 8, 8), np.float32, True, "supports one decay per head, not one per channel"),
        ((1, 8, 3, 6, 8, 8), np.float32, False, "needs a block of J heads that fits into VMEM"),
    ],
)
def test_unsupported_arguments_are_named(shape, dtype, per_channel, message, on_tpu):
    query, key, value, log_decay, state = arrays(*shape, dtype=dtype)
    if per_channel:
        log_decay = np.repeat(log_decay[..., None], shape[4], axis=-1)
    with pytest.raises(ValueError, match=f"implementation 'pallas' {message}.*: leave the implementation out"):
        linear_attention(query, key, value, log_decay, state, implementation="pallas")


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (None, "needs a min_log_decay of at least -3.75, not None"),
        (-4.0, "needs a min_log_decay of at least -3.75, not -4.0"),
        (-1.0, "supports float32 and bfloat16, not float16"),
    ],
)
def test_the_kernel_of_the_generalized_delta_rule_needs_a_bound(bound, message, on_tpu):
    query, key, value, _, _ = arrays(*OWN_KEYS, dtype=np.float16 if bound == -1.0 else np.float32)
    with pytest.raises(ValueError, match=f"'pallas' {message}: leave the implementation out"):
        generalized_delta_rule(query, key, value, 0 * key, (key, key), min_log_decay=bound, implementation="pallas")


def test_the_choice_depends_on_the_platform_and_the_arguments(monkeypatch):
    assert choices.matrix_scan(64, None) == "chunked"
    with pytest.raises(ValueError, match="runs only on tpu"):
        linear_attention(*arrays(*OWN_KEYS), implementation="pallas")
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert choices.matrix_scan(64, None) == "pallas"
    assert choices.matrix_scan(64, "supports something else") == "chunked"
    assert choices.matrix_scan(1, None) == "reference"
    assert [choices.kernel_chunk(steps) for steps in (1, 100, 128, 1000)] == [16, 112, 128, 128]


@pytest.mark.live
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("linear_attention", (2, 300, 1, 24, 128, 64)),
        ("linear_attention", (2, 100, 4, 4, 256, 256)),
        ("linear_attention", (8, 256, 8, 64, 128, 64)),
        ("gated_delta_rule", (2, 300, 16, 16, 128, 128)),
        ("gated_delta_rule", (1, 100, 4, 4, 64, 128)),
        ("mlstm", (2, 300, 8, 8, 256, 512)),
        ("generalized_delta_rule", (2, 300, 32, 32, 64, 64)),
        # VMEM cannot keep complete arrays of these sizes.
        ("linear_attention", (8, 1024, 16, 16, 128, 128)),
        ("gated_delta_rule", (8, 1024, 16, 16, 128, 128)),
        ("generalized_delta_rule", (8, 1024, 16, 16, 128, 128)),
        ("mlstm", (8, 1024, 8, 8, 256, 512)),
    ],
)
def test_the_tpu_compiler_accepts_the_kernels(name, shape, dtype):
    target = one_tpu("v5e:2x2")
    function, make_arguments = FUNCTIONS[name]
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target.replicated()),
        make_arguments(*shape, dtype=dtype),
    )

    def loss(arguments):
        out, last = function(*arguments)
        return jnp.sum(out.astype(jnp.float32)) + sum(map(jnp.sum, jax.tree.leaves(last)))

    with target.scope():
        text = jax.jit(jax.grad(loss)).lower(arguments).compile().as_text()
    kernel = name if name.endswith("delta_rule") else "linear_attention"
    assert text.count(f"{kernel}_backward") >= 1

"""Tests of Pallas attention with biases (interpreted on the CPU) against the reference: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.attention import attention, pallas, split
from jaxlm.nn.attention.bias import as_dense
from jaxlm.nn.attention.distance_bias import (
    distance_bias,
    distance_bias_at_positions,
    distance_bias_at_query_positions,
    type_bias,
)
from jaxlm.nn.attention.mask import Mask
from jaxlm.sharding import Rules, Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, relative_error

B, H, K = 2, 2, 8


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """Run the kernels in Pallas's interpreter."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)


def orders(T, S):
    rng = np.random.default_rng(1)
    query, key = (rng.integers(0, 50, (B, n)).astype(np.int32) for n in (T, S))
    query[0, :3] = -1  # no key is visible
    return {"query_order": query, "key_order": key}


def segments(T, S):
    rng = np.random.default_rng(2)
    query, key = (np.sort(rng.integers(0, 4, (B, n)), axis=1).astype(np.int32) for n in (T, S))
    return {"query_segments": query, "key_segments": key + 2}  # some segments have only queries or only keys


def arrays(T, S, heads=H):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    floats = draw(B, T, H, K), draw(B, S, heads, K), draw(B, S, heads, K), draw(25, H), draw(T + S, H, K), draw(2, H, K)
    return floats, draw(B, T, H, K)


def make_biases(kinds, q, numbers, vectors, types, S):
    T = q.shape[1]
    constructors = {
        "numbers": lambda: distance_bias(numbers, 12, T, S, query_offset=S - T),
        "numbers of all heads": lambda: distance_bias(numbers[:, :1], 12, T, S, query_offset=0),
        "dense numbers": lambda: as_dense(distance_bias(numbers, 12, T, S, query_offset=S - T), T, S),
        "vectors": lambda: distance_bias(vectors, S, T, S, query_offset=S - T, q_BTHK=q, scale=0.5),
        "vectors of queries": lambda: distance_bias_at_query_positions(
            vectors, S, S - T + np.random.default_rng(3).integers(0, T, (B, T)), S, q_BTHK=q, scale=0.5
        ),
        "types": lambda: type_bias(
            q, types, np.arange(T)[None] % 3 + np.array([[0], [1]]), np.arange(S)[None] % 2, scale=0.5
        ),
    }
    return [constructors[kind]() for kind in kinds]


CASES = {
    "no bias, keys for all heads": ((), Mask(causal=True), 256, 256),
    "numbers": (("numbers",), Mask(), 256, 256),
    "numbers of all heads, keys for all heads, padded": (("numbers of all heads",), Mask(), 130, 200),
    "numbers, causal": (("numbers",), Mask(causal=True), 256, 256),
    "dense numbers, padded": (("dense numbers",), Mask(), 100, 128),
    "vectors": (("vectors",), Mask(), 256, 256),
    "vectors, causal, window, padded": (("vectors",), Mask(causal=True, window=70), 200, 200),
    "vectors, more keys, padded": (("vectors",), Mask(), 130, 300),
    "vectors, types, orders, without keys": (("vectors", "types"), Mask(causal=True, **orders(128, 256)), 128, 256),
    "vectors and types, padded": (("vectors", "types"), Mask(causal=True, **orders(140, 140)), 140, 140),
    "vectors of queries, padded": (("vectors of queries", "types"), Mask(), 85, 300),
    "vectors of queries, orders": (("vectors of queries",), Mask(causal=True, **orders(256, 256)), 256, 256),
    "segments, without keys": (("vectors",), Mask(**segments(130, 200)), 130, 200),
    "only orders": ((), Mask(causal=True, **orders(256, 256)), 256, 256),
}  # fmt: skip


def run(attend, kinds, S, floats, cotangent):
    """The output, and the gradients of all arrays."""

    def attend_with_tables(q, k, v, *tables):
        return attend(q, k, v, make_biases(kinds, q, *tables, S))

    @jax.jit
    def value_and_gradients(*floats):
        out, vjp_fn = jax.vjp(attend_with_tables, *floats)
        return out, vjp_fn(jnp.asarray(cotangent))

    return value_and_gradients(*floats)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_values_and_gradients(name, monkeypatch):
    kinds, mask, T, S = CASES[name]
    monkeypatch.setattr(pallas, "MAX_BLOCK", 128)  # several blocks
    monkeypatch.setattr(choices, "causal_tile", lambda: 128)
    floats, cotangent = arrays(T, S, heads=1 if "keys for all heads" in name else H)

    def kernel(q, k, v, bias):
        return pallas.attention(q, k, v, mask, scale=0.3, biases=tuple(bias))

    got = run(kernel, kinds, S, floats, cotangent)
    want = run(
        lambda q, k, v, bias: attention(q, k, v, mask, scale=0.3, bias=bias, implementation="reference"),
        kinds, S, floats, cotangent,
    )  # fmt: skip
    assert_trees_close(got, want, 1e-5)
    used = [np.abs(gradient).max() > 1e-3 for gradient in want[1][3:]]
    assert used == [any(name in kind for kind in kinds) for name in ("numbers", "vectors", "types")]
    if "without keys" in name:
        assert np.any(np.all(np.asarray(want[0]) == 0.0, axis=(2, 3)))


HEADS = {
    "two heads of width 64 in a vector": (4, 4, 64, 64),
    "heads that fill vectors, grouped queries": (4, 2, 128, 128),
    "two key heads in a vector, grouped queries": (8, 4, 64, 64),
    "one key head, two query heads in a vector": (4, 1, 64, 64),
    "an odd number of heads: all in one block": (3, 3, 64, 64),
    "values of another width": (4, 4, 64, 32),
}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", HEADS)
def test_blocks_with_several_heads_equal_the_reference(name, monkeypatch):
    H, G, K, V = HEADS[name]
    monkeypatch.setattr(choices, "causal_tile", lambda: 128)
    rng = np.random.default_rng(4)
    q, k, v, cotangent, numbers = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 256, H, K), (2, 256, G, K), (2, 256, G, V), (2, 256, H, V), (511, H))
    )
    mask = Mask(causal=True)

    def run_with(attend):
        def attend_with_bias(q, k, v, numbers):
            return attend(q, k, v, (distance_bias(numbers, 255, 256, 256, query_offset=0),))

        out, vjp_fn = jax.vjp(jax.jit(attend_with_bias), q, k, v, numbers)
        return out, vjp_fn(cotangent)

    got = run_with(lambda q, k, v, biases: pallas.attention(q, k, v, mask, scale=0.1, biases=biases))
    want = run_with(lambda q, k, v, bias: attention(q, k, v, mask, scale=0.1, bias=bias, implementation="reference"))
    assert_trees_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("heads", "widths", "expected"),
    [
        ((12, 12), (64, 64), (2, 1)),
        ((32, 8), (128, 128), (1, 1)),
        ((14, 2), (64, 64), (2, 7)),
        ((8, 1), (64, 64), (1, 2)),
        ((9, 3), (64, 64), (3, 3)),
        ((4, 1), (256, 256), (1, 1)),
    ],
)
def test_a_block_has_the_fewest_heads_that_fill_whole_vectors(heads, widths, expected):
    assert pallas._heads_of_block(heads, widths) == expected


@pytest.mark.thorough
def test_bfloat16_is_as_accurate_as_blockwise():
    """In bfloat16, the error relative to the float32 reference is not larger than that of ``blockwise``."""
    kinds, mask, S = ("vectors", "types"), Mask(), 256
    floats, cotangent = arrays(256, S)
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), floats)

    def kernel(q, k, v, bias):
        return pallas.attention(q, k, v, mask, scale=0.3, biases=tuple(bias))

    def attend_with(implementation):
        return lambda q, k, v, bias: attention(q, k, v, mask, scale=0.3, bias=bias, implementation=implementation)

    exact = run(attend_with("reference"), kinds, S, jax.tree.map(lambda x: x.astype(jnp.float32), halves), cotangent)
    half = jnp.asarray(cotangent, jnp.bfloat16)

    def errors(result):
        as_float = jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x, np.float32), result))
        return [np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-9) for x, y in zip(as_float, jax.tree.leaves(exact))]

    got = errors(run(kernel, kinds, S, halves, half))
    blockwise = errors(run(attend_with("blockwise"), kinds, S, halves, half))
    assert all(x < 1.3 * y + 2e-3 for x, y in zip(got, blockwise, strict=True)), (got, blockwise)


@pytest.mark.parametrize(("rows", "heads", "is_dense"), [(1, 2, False), (2, 2, True), (2, 9, False)])
def test_a_shared_bias_is_dense_for_several_rows_if_it_fits_into_vmem(rows, heads, is_dense, monkeypatch):
    calls = []
    monkeypatch.setattr(pallas, "as_dense", lambda *arguments: calls.append(1) or as_dense(*arguments))
    q, bias = jnp.zeros((rows, 512, heads, 64)), distance_bias(jnp.zeros((25, heads)), 12, 512, 512, query_offset=0)
    jax.eval_shape(lambda q: pallas.attention(q, q, q, Mask(), scale=1.0, biases=(bias,)), q)
    assert bool(calls) == is_dense


@pytest.mark.thorough
def test_each_device_runs_its_own_rows_and_heads():
    floats, cotangent = arrays(128, 128)
    mask = Mask(causal=True, **orders(128, 128))
    sharding = Sharding(make_mesh("data=2,tensor=2,fsdp=1", devices=jax.devices()[:4]))

    def kernel(q, k, v, bias):
        return pallas.attention(q, k, v, mask, scale=0.3, biases=tuple(bias))

    def split(q, k, v, bias):
        with sharding.scope():
            return kernel(q, k, v, bias)

    kinds = "vectors", "types", "numbers"
    # The gradients of the tables are summed over devices.
    assert_trees_close(run(split, kinds, 128, floats, cotangent), run(kernel, kinds, 128, floats, cotangent), 2e-6)


def test_a_kernel_computes_whole_heads_if_a_rule_splits_their_width():
    """A device that had a part of the width of a head would compute a part of each score."""
    q, k, v = (np.random.default_rng(i).normal(size=(2, 4, 2, 8)).astype(np.float32) for i in range(3))

    def scores_times_values(qkv, floats, integers):
        q, k, v = qkv
        return jnp.einsum("BHTS,BSHV->BTHV", jnp.tanh(jnp.einsum("BTHK,BSHK->BHTS", q, k)), v)

    mesh_sharding = Sharding(
        make_mesh("data=2,tensor=2", devices=jax.devices()[:4]), Rules.of(batch="data", kv="tensor")
    )
    with mesh_sharding.scope():
        out = jax.jit(lambda *qkv: split.shard_attention(scores_times_values, qkv, (), ()))(q, k, v)
    assert relative_error(out, jax.jit(scores_times_values)((q, k, v), (), ())) < 1e-6


def test_unsupported_arguments_give_the_reason():
    q, positions = jnp.zeros((B, 8, H, K)), jnp.zeros((1, 8), jnp.int32)

    def attend(**changes):
        attention(q, q, q, **{"implementation": "pallas", **changes})

    with pytest.raises(ValueError, match="'pallas' runs only on tpu, but this computation is compiled for cpu"):
        attend()
    with pytest.raises(ValueError, match="'pallas' has no dropout"):
        attend(dropout=0.1, key=jax.random.key(0))
    long = jnp.zeros((B, 520, H, K))
    with pytest.raises(ValueError, match="'pallas' takes dense biases only with .* at most 512 queries"):
        attention(long, long, long, bias=jnp.zeros((1, 1, 520, 520)), implementation="pallas")
    with pytest.raises(ValueError, match="does not support the bias ByPositions: TPU kernels need a KernelBiasFn"):
        attend(bias=distance_bias_at_positions(jnp.zeros((9, H)), 4, positions, positions))

    def reason(keys, heads=H, width=K, mask=Mask()):  # noqa: B008 (frozen)
        qkv = (jax.ShapeDtypeStruct((B, keys, heads, width), jnp.bfloat16),) * 3
        return pallas.unsupported_reason(qkv, mask, (), None)

    assert "supports at most 4096 keys, got 8192" in reason(8192)
    assert "blocks that do not fit into VMEM: 25 query heads and 25 key heads of width 64" in reason(
        1024, 25, 64, Mask(causal=True)
    ), "25 heads of width 64 are in one block"
    assert reason(1024, 24, 64, Mask(causal=True)) is None
    with Sharding(make_mesh("data=4,sequence=2")).scope():
        assert "without a sequence axis" in reason(128)


def test_blocks_divide_the_queries_and_fit_into_vmem():
    sizes = {128: 128, 256: 256, 384: 384, 512: 512, 640: 128, 1024: 512}
    assert {length: pallas._block_size(length, length) for length in sizes} == sizes
    assert pallas._block_size(4096, pallas.MAX_KEYS) == 128

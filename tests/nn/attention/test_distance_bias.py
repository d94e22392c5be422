"""Tests of relative biases. The reference gathers one row of the table for each pair of query and key.

The biases are compared as arrays. Blockwise attention with a bias is compared with reference attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.attention import attention, blockwise
from jaxlm.nn.attention.bias import AttentionBias, dense_bias
from jaxlm.nn.attention.distance_bias import (
    distance_bias,
    distance_bias_at_positions,
    distance_bias_at_query_positions,
    sinusoids,
    type_bias,
)
from jaxlm.nn.attention.mask import Mask
from jaxlm.testing.helpers import assert_trees_close, relative_error

B, H, K = 2, 3, 4
SHAPES = [(5, 5, 0), (5, 8, 3), (1, 8, 7), (6, 9, 4), (4, 4, 1)]  # queries, keys, query_offset


def test_sinusoids_are_concatenated_and_not_interleaved():
    table = np.asarray(sinusoids(jnp.asarray([3, 0, -2]), 6))
    for row, distance in zip(table, (3, 0, -2)):
        angles = distance / np.array([1.0, 10000 ** (2 / 6), 10000 ** (4 / 6)])
        assert relative_error(row, np.concatenate([np.sin(angles), np.cos(angles)])) < 1e-6
    with pytest.raises(ValueError, match="width=5 must be even"):
        sinusoids(jnp.arange(3), 5)


def gathered_bias(table, max_distance, distance_BTS, q=None):
    """The bias by its definition, [B, H, T, S]: the table row of each pair, or its product with the query."""
    rows = jnp.clip(max_distance - jnp.asarray(distance_BTS), 0, table.shape[0] - 1)
    row_BTS = table[rows]
    if q is None:
        return jnp.moveaxis(row_BTS, -1, 1)
    return 0.5 * jnp.einsum("BTHK,BTSHK->BHTS", q, jnp.broadcast_to(row_BTS, (B, *row_BTS.shape[1:])))


def arrays(queries, rows, vectors):
    key_1, key_2 = jax.random.split(jax.random.key(0))
    table = jax.random.normal(key_1, (rows, H, K) if vectors else (rows, H))
    return table, jax.random.normal(key_2, (B, queries, H, K)) if vectors else None


def compare(function, reference, *arguments):
    """Compare the values and all gradients, with a different weight on each entry."""

    def run(function):
        out, vjp_fn = jax.vjp(function, *arguments)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    # 1e-5, because the gradient of a row that all pairs use is a sum of terms of both signs.
    assert_trees_close(jax.jit(run, static_argnums=0)(function), jax.jit(run, static_argnums=0)(reference), 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize(("queries", "keys", "query_offset"), SHAPES)
def test_distance_bias(queries, keys, query_offset, vectors):
    """The table is exactly long enough, too short at either end, or longer than needed."""
    distance = (query_offset + np.arange(queries))[None, :, None] - np.arange(keys)
    for max_distance, rows in ((distance.max(), queries + keys - 1), (2, 4), (40, 60), (2, 1), (-40, 3), (60, 3)):
        table, q = arrays(queries, rows, vectors)

        def function(table, *q, max_distance=max_distance):
            query = q[0] if q else None
            return dense_bias(
                distance_bias(
                    table, int(max_distance), queries, keys, query_offset=query_offset, q_BTHK=query, scale=0.5
                ),
                queries,
                keys,
            )

        def reference(table, *q, max_distance=max_distance):
            return gathered_bias(table, max_distance, distance, *q)

        compare(function, reference, table, *(() if q is None else (q,)))


@pytest.mark.parametrize("vectors", [False, True])
def test_distance_bias_at_positions(vectors):
    """Each row of the batch has its own positions, in any order; outside the table, the nearest row is used."""
    rng = np.random.default_rng(0)
    query, key = rng.integers(0, 9, (B, 5)), rng.integers(0, 9, (B, 7))
    table, q = arrays(5, 9, vectors)

    def function(table, *q):
        query_vectors = q[0] if q else None
        return dense_bias(
            distance_bias_at_positions(
                table, 5, jnp.asarray(query), jnp.asarray(key), q_BTHK=query_vectors, scale=0.5
            ), 5, 7,
        )  # fmt: skip

    distance = query[:, :, None] - key[:, None, :]
    compare(function, lambda table, *q: gathered_bias(table, 5, distance, *q), table, *(() if q is None else (q,)))


def test_unsigned_positions_do_not_wrap():
    table, positions = jnp.arange(7.0)[:, None], np.array([[0, 5, 2]])
    got = dense_bias(distance_bias_at_positions(table, 3, *(jnp.asarray(positions, jnp.uint8),) * 2), 3, 3)
    assert np.array_equal(got[0, 0], np.clip(3 - (positions.T - positions), 0, 6))


def test_distance_bias_at_query_positions():
    query = np.random.default_rng(0).integers(0, 7, (B, 5))
    table, q = arrays(5, 13, True)

    def function(table, q):
        return dense_bias(distance_bias_at_query_positions(table, 6, jnp.asarray(query), 7, q_BTHK=q, scale=0.5), 5, 7)

    distance = query[:, :, None] - np.arange(7)
    compare(function, lambda table, q: gathered_bias(table, 6, distance, q), table, q)
    with pytest.raises(ValueError, match="a table of 13 distances is too short for 14 keys"):
        distance_bias_at_query_positions(table, 6, jnp.asarray(query), 14, q_BTHK=q)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_small_integers_as_query_positions_do_not_wrap(dtype):
    """The difference of ``max_distance`` and the positions does not fit into the dtype of the positions."""
    table, q = arrays(5, 700, True)
    got, want = (
        dense_bias(distance_bias_at_query_positions(table, 300, jnp.arange(5).astype(name)[None], 5, q_BTHK=q), 5, 5)
        for name in (dtype, "int32")
    )
    assert np.array_equal(got, want)


@pytest.mark.parametrize("merge", [False, True])
def test_type_bias(monkeypatch, merge):
    """The bias depends on whether query and key have the same token type."""
    monkeypatch.setattr(choices, "merge_head_axes", lambda: merge)
    rng = np.random.default_rng(0)
    query, key = rng.integers(0, 3, (B, 5)), rng.integers(0, 3, (B, 7))
    table, q = arrays(5, 2, True)
    index = jnp.asarray(query[:, :, None] != key[:, None, :]).astype(int)
    function = lambda q, table: dense_bias(type_bias(q, table, query, key, scale=0.5), 5, 7)  # noqa: E731
    compare(function, lambda q, table: 0.5 * jnp.einsum("BTHK,BTSHK->BHTS", q, table[index]), q, table)


def bias_of(kind, table, vectors, q, types):
    """The biases for T queries and T keys, as in the model families."""
    T = q.shape[1]
    positions = jnp.arange(T)[None] + jnp.asarray([[0], [3]])
    if kind == "numbers":
        return distance_bias(table, 12, T, T, query_offset=0)
    if kind == "numbers of positions":
        return distance_bias_at_positions(table, 12, positions, positions)
    if kind == "vectors":
        return distance_bias(vectors, T, T, T, query_offset=0, q_BTHK=q, scale=0.5)
    if kind == "vectors of queries":
        return distance_bias_at_query_positions(vectors, T, positions % T, T, q_BTHK=q, scale=0.5)
    return [
        distance_bias_at_positions(vectors, T, positions // 2, positions // 2, q_BTHK=q, scale=0.5),
        type_bias(q, types, positions % 3, positions % 2, scale=0.5),
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    "kind", ["numbers", "numbers of positions", "vectors", "vectors of queries", "vectors and types"]
)
def test_blockwise_attention_with_biases_equals_the_reference(monkeypatch, kind, sequential):
    monkeypatch.setattr(sharding, "platform", lambda: "cpu" if sequential else "gpu")
    monkeypatch.setattr(blockwise, "BLOCK_ROWS", (16, 16))
    monkeypatch.setattr(blockwise, "KEY_RANGE_MULTIPLE", 8)
    monkeypatch.setattr(blockwise, "MIN_KEYS_FOR_RANGES", 32)
    T = 40
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
    table, vectors, types = (
        jax.random.normal(key, shape) for key, shape in zip(keys[3:], [(25, H), (2 * T, H, K), (2, H, K)])
    )
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), axis=1))
    for mask in (Mask(causal=True), Mask(query_segments=segments, key_segments=segments)):

        @functools.partial(jax.jit, static_argnums=0)
        def run(implementation, mask=mask):
            def attend(q, k, v, *tables):
                bias = bias_of(kind, *tables[:2], q, tables[2])
                return attention(q, k, v, mask, bias=bias, implementation=implementation)

            out, vjp_fn = jax.vjp(attend, q, k, v, table, vectors, types)
            return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

        want = run("reference")
        assert_trees_close(run("blockwise"), want, 5e-6)
        assert sum(np.abs(gradient).max() > 1e-3 for gradient in want[1][3:]) == (2 if kind.endswith("types") else 1)


def test_blockwise_attention_has_gradients_for_float64_biases():
    """The gradients are summed in float32, for arrays that a tile slices and for arrays that it reads completely."""

    def loss(q, dense, table):
        positions = jnp.arange(5)[None]
        biases = [
            dense,
            distance_bias(table, 5, 5, 5, query_offset=0, q_BTHK=q),
            distance_bias_at_positions(table, 5, positions, positions, q_BTHK=q),
        ]
        return sum(jnp.sum(attention(q, q, q, bias=bias, implementation="blockwise")) for bias in biases)

    with jax.enable_x64(True):
        arrays = jnp.ones((B, 5, H, K)), jnp.ones((1, H, 5, 5)), jnp.ones((10, H, K))
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *arrays)
    assert [x.dtype for x in gradients] == [np.float64] * 3


@pytest.mark.thorough
def test_memory_is_linear_in_time_with_a_bias():
    """The temporary memory of the gradient doubles with twice the length, for tables of numbers and of vectors."""

    def temporaries(kind, T):
        def value(q, k, v, *tables):
            return jnp.sum(attention(q, k, v, Mask(causal=True), bias=bias_of(kind, *tables[:2], q, tables[2])))

        shapes = [(2, T, 1, K)] * 3 + [(25, 1), (2 * T, 1, K), (2, 1, K)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(value, argnums=range(6))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for kind in ("numbers", "vectors"):
        assert temporaries(kind, 16384) < 2.2 * temporaries(kind, 8192) < 2.2 * 8192 * 8192 * 4 / 2, kind


def test_biases_with_wrong_shapes_raise():
    q = jnp.zeros((B, 5, H, K))
    bias = distance_bias(jnp.zeros((9, H + 1)), 4, 5, 5, query_offset=0)
    with pytest.raises(ValueError, match=r"an array \(1, 4, 1, 10\) of an attention bias must be \[1 or 2, 1 or 3"):
        attention(q, q, q, bias=bias)
    integers = {"query": jnp.zeros((3, 5), jnp.int32)}
    with pytest.raises(ValueError, match=r"an integer array .* of an attention bias must be \[1 or 2"):
        attention(q, q, q, bias=AttentionBias(bias.bias_fn, {"table": jnp.zeros((1, H, 1, 10))}, integers))

"""Tests of each implementation of attention against a definition in float64: values and all gradients."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.attention import attention, blockwise, cudnn, pallas, splash
from jaxlm.nn.attention.bias import AttentionBias
from jaxlm.nn.attention.cache import CacheContext, CacheView, append, append_and_read
from jaxlm.nn.attention.distance_bias import distance_bias, distance_bias_at_positions
from jaxlm.nn.attention.mask import Mask, keep
from jaxlm.nn.cpu_choices import CpuChoices
from jaxlm.nn.dropout import keep_rows
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, relative_error

SHAPES = [(2, 40, 40, 3, 8), (1, 300, 300, 2, 16), (2, 131, 257, 2, 8)]  # B, T, S, H, K


def inputs(B, T, S, H, K, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(B, n, H, K)).astype(dtype)  # noqa: E731
    return draw(T), draw(S), draw(S), draw(T)


def dense(q, k, v, allowed, scale):
    """softmax(scale q k^T) v with a dense mask [B, T, S], computed row by row."""
    out = np.zeros((*q.shape[:3], v.shape[3]), np.float64)
    for b, t, h in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        visible = np.flatnonzero(allowed[b, t])
        if visible.size:
            scores = scale * k[b, visible, h].astype(np.float64) @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, visible, h]
    return out


def masks(B, T, S):
    """Yield a name, a mask, and the dense mask computed by loops from the definition."""
    rng = np.random.default_rng(1)
    segments_T, segments_S = (np.sort(rng.integers(0, 4, (B, n)), axis=1).astype(np.int32) for n in (T, S))
    order_T, order_S = (rng.integers(0, 50, (B, n)).astype(np.int32) for n in (T, S))
    same = np.array([[[segments_T[b, t] == segments_S[b, s] for s in range(S)] for t in range(T)] for b in range(B)])
    before = np.array([[[order_S[b, s] <= order_T[b, t] for s in range(S)] for t in range(T)] for b in range(B)])
    near = np.array([[[order_T[b, t] - order_S[b, s] < 9 for s in range(S)] for t in range(T)] for b in range(B)])
    everything = np.ones((B, T, S), bool)
    segments = {"query_segments": segments_T, "key_segments": segments_S}
    order = {"query_order": order_T, "key_order": order_S}
    yield "all", Mask(), everything
    yield "segments", Mask(**segments), same
    yield "order", Mask(causal=True, **order), before
    yield "order, window", Mask(causal=True, window=9, **order), before & near
    yield "order, segments", Mask(causal=True, **order, **segments), before & same
    if T == S:
        triangle = np.tril(everything)
        band = triangle & ~np.tril(everything, -9)
        yield "causal", Mask(causal=True), triangle
        yield "causal, window", Mask(causal=True, window=9), band
        yield "causal, segments", Mask(causal=True, **segments), triangle & same


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_of_every_mask(shape):
    q, k, v, cotangent = inputs(*shape)
    for name, mask, allowed in masks(*shape[:3]):
        results = {}
        for implementation in ("reference", "blockwise"):

            def value_and_gradients(q, k, v, mask, implementation=implementation):
                out, vjp_fn = jax.vjp(lambda q, k, v: attention(q, k, v, mask, implementation=implementation), q, k, v)
                return out, vjp_fn(jnp.asarray(cotangent))

            results[implementation] = jax.jit(value_and_gradients)(q, k, v, mask)
        expected = dense(q, k, v, allowed, shape[-1] ** -0.5)
        assert relative_error(results["reference"][0], expected) < 3e-6, name
        assert_trees_close(results["blockwise"], results["reference"], 3e-6)
        grads = results["reference"][1]
        assert all(np.isfinite(g).all() for g in grads), name


def test_reference_gradient_against_differences_in_float64():
    with jax.enable_x64(True):
        q, k, v, cotangent = inputs(1, 6, 6, 1, 4, np.float64)
        mask = Mask(
            causal=True, query_segments=np.array([[1, 1, 1, 2, 2, 0]]), key_segments=np.array([[1, 1, 1, 2, 2, 0]])
        )
        allowed = np.asarray(keep(mask, 6, 6))

        def scalar(q, k, v):
            return float(np.sum(dense(q, k, v, allowed, 0.5) * cotangent))

        total = lambda *a: jnp.sum(attention(*a, mask, scale=0.5) * cotangent)  # noqa: E731
        grads = jax.device_get(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v))
        for which, grad in enumerate(grads):
            for index in [(0, 1, 0, 2), (0, 4, 0, 0), (0, 5, 0, 3)]:
                arrays = [x.copy() for x in (q, k, v)]
                arrays[which][index] += 1e-5
                up = scalar(*arrays)
                arrays[which][index] -= 2e-5
                # The reference computes its softmax in float32.
                assert (up - scalar(*arrays)) / 2e-5 == pytest.approx(float(grad[index]), abs=2e-5)


def test_a_query_without_visible_keys_gives_zeros_and_no_gradient():
    q, k, v, _ = inputs(1, 4, 4, 1, 4)
    mask = Mask(query_segments=np.array([[1, 2, 1, 1]]), key_segments=np.array([[1, 1, 1, 1]]))
    for implementation in ("reference", "blockwise"):

        def total(*arrays, implementation=implementation):
            out = attention(*arrays, mask, implementation=implementation)
            return jnp.sum(out), out

        (value, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        assert np.isfinite(float(value))
        assert np.all(np.asarray(out)[0, 1] == 0)
        assert all(np.isfinite(g).all() for g in grads)
        assert np.all(np.asarray(grads[0])[0, 1] == 0)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True)])
def test_dropout_is_the_same_in_every_implementation_and_has_the_given_rate(mask):
    q, k, v, cotangent = inputs(2, 300, 300, 2, 8)

    def run(implementation, key):
        out, vjp_fn = jax.vjp(
            lambda *a: attention(*a, mask, dropout=0.3, key=key, implementation=implementation), q, k, v
        )
        return out, vjp_fn(jnp.asarray(cotangent))

    run = jax.jit(run, static_argnums=0)
    want, got = (run(name, jax.random.key(7)) for name in ("reference", "blockwise"))
    assert_trees_close(got, want, 3e-6)
    other_key = run("blockwise", jax.random.key(8))
    assert relative_error(other_key[0], want[0]) > 0.1
    # If all values are 1, the output is the sum of the kept probabilities. Its mean is 1.
    attend = jax.jit(functools.partial(attention, dropout=0.3, key=jax.random.key(7), implementation="blockwise"))
    assert np.mean(attend(q, k, np.ones_like(v))) == pytest.approx(1.0, abs=0.01)
    kept = jax.jit(keep_rows, static_argnums=(2, 3))(jax.random.key(0), np.arange(500, dtype=np.uint32), 200, 0.3)
    assert np.mean(kept) == pytest.approx(0.7, abs=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize(("sections", "is_mask_shared"), [(1, False), (4, False), (4, True)])
def test_sections_and_ranges_of_keys_of_long_sequences(monkeypatch, sections, is_mask_shared):
    """The code for thousands of queries, tested on a short sequence whose last block is not full."""
    values = CpuChoices(max_shared_mask_queries=256 if is_mask_shared else 1)
    monkeypatch.setattr(choices, "cpu_choices", lambda: values)
    monkeypatch.setattr(blockwise, "BLOCK_ROWS", (24, 24))
    monkeypatch.setattr(blockwise, "MAX_SECTIONS", sections)
    monkeypatch.setattr(blockwise, "KEY_RANGE_MULTIPLE", 8)
    monkeypatch.setattr(blockwise, "MIN_KEYS_FOR_RANGES", 16)
    shape = (1, 200, 200, 2, 8)
    q, k, v, cotangent = inputs(*shape)
    for name, mask, _ in masks(*shape[:3]):

        @functools.partial(jax.jit, static_argnums=0)
        def run(implementation, mask=mask):
            out, vjp_fn = jax.vjp(functools.partial(attention, mask=mask, implementation=implementation), q, k, v)
            return out, vjp_fn(jnp.asarray(cotangent))

        want = run("reference")
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(want)), name
        assert_trees_close(run("blockwise"), want, 3e-6)


@pytest.mark.thorough
def test_memory_is_linear_in_time():
    """The temporary memory of the gradient doubles with twice the length; for a dense matrix it would be four times."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, Mask(causal=True))), argnums=(0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(16384)
    assert long < 2.2 * short
    assert long < 16384 * 16384 * 4 / 4


def test_all_heads_together_equal_a_loop_over_heads():
    q, k, v, _ = inputs(2, 150, 150, 2, 8)

    @functools.partial(jax.jit, static_argnums=0)
    def run(sequential):
        return blockwise.attention(
            q, k, v, Mask(causal=True), scale=0.3, biases=(), dropout=0.2, key=jax.random.key(0), sequential=sequential
        )

    assert relative_error(run(False), run(True)) < 3e-6


@pytest.mark.thorough
def test_the_gradient_of_a_shared_bias_is_summed_over_devices():
    """The devices communicate the sums of the gradients of the table, and no tiles of scores."""
    B, T, H = 8, 300, 2
    q, k, v, cotangent = inputs(B, T, T, H, 8)
    table = np.random.default_rng(2).normal(size=(33, H)).astype(np.float32)

    def gradients(sequential):
        def value(table, q):
            bias = distance_bias(table, 16, T, T, query_offset=0)
            out = blockwise.attention(
                q, k, v, Mask(causal=True), scale=0.3, biases=(bias,), dropout=0.0, key=None, sequential=sequential
            )
            return jnp.sum(out * cotangent)

        return jax.grad(value, argnums=(0, 1))

    want = jax.jit(gradients(True))(table, q)
    assert_trees_close(jax.jit(gradients(False))(table, q), want, 1e-5)
    mesh_sharding = Sharding(make_mesh("data=4,tensor=2"))

    def sharded_gradients(table, q):
        with mesh_sharding.scope():
            return gradients(False)(table, sharding.constrain(q, ("batch", None, None, None)))

    compiled = jax.jit(sharded_gradients).lower(table, q).compile()
    assert_trees_close(compiled(table, q), want, 1e-5)
    summed = re.findall(r"= \(?f32\[([\d,]*)\][^=]* all-reduce(?:-start)?\(", compiled.as_text())
    assert summed
    assert all(np.prod([int(size) for size in shape.split(",")]) <= 2 * T * H for shape in summed)


def test_errors_name_bad_input():
    q, k, v, _ = inputs(1, 4, 6, 2, 4)
    with pytest.raises(ValueError, match="a causal mask over 4 queries and 6 keys needs query_order"):
        attention(q, k, v, Mask(causal=True))
    with pytest.raises(ValueError, match=r"must be \[batch, time, heads, width\], with at least one query"):
        attention(q[:, :0], k, v)
    with pytest.raises(ValueError, match=r"must be \[batch, time, heads, width\], with at least one query"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"key_segments \(1, 4\) must be \[1 or 1, 6\]"):
        attention(q, k, v, Mask(query_segments=np.ones((1, 4), int), key_segments=np.ones((1, 4), int)))
    with pytest.raises(ValueError, match=r"query_order \(2, 4\) must be \[1 or 1, 4\]"):
        attention(q, k, v, Mask(causal=True, query_order=np.ones((2, 4), int), key_order=np.ones((2, 6), int)))
    with pytest.raises(ValueError, match=r"bias \(1, 4, 6\) must be \[1 or 1, 1 or 2, 4, 6\]"):
        attention(q, k, v, Mask(), bias=np.zeros((1, 4, 6)))
    with pytest.raises(ValueError, match=r"k must be \[B, S, G, K\]"):
        attention(q, k[:, :, :1], v)
    with pytest.raises(ValueError, match="where G divides H"):
        attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match=r"bias \(1, 2, 4, 5\) must be \[1 or 1, 1 or 2, 4, 6\]"):
        attention(q, k, v, bias=np.zeros((1, 2, 4, 5)))
    with pytest.raises(
        ValueError,
        match="no attention implementation 'flash': choose from reference, blockwise, decode, splash, pallas, cudnn",
    ):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="takes query_order and key_order together"):
        Mask(causal=True, query_order=np.zeros((1, 4)))
    with pytest.raises(ValueError, match="window=3 needs causal=True"):
        Mask(window=3)


@pytest.mark.thorough
@pytest.mark.parametrize("is_mask_shared", [True, False])
def test_documents_and_grouped_queries_in_a_loop_over_heads(monkeypatch, is_mask_shared):
    """With ranges of keys and 64-bit indices, for one stored mask of all heads and for one mask per head."""
    values = CpuChoices(max_shared_mask_queries=256 if is_mask_shared else 1)
    monkeypatch.setattr(choices, "cpu_choices", lambda: values)
    monkeypatch.setattr(blockwise, "BLOCK_ROWS", (16, 16))
    monkeypatch.setattr(blockwise, "KEY_RANGE_MULTIPLE", 8)
    monkeypatch.setattr(blockwise, "MIN_KEYS_FOR_RANGES", 16)
    q, k, v, cotangent = inputs(2, 40, 40, 4, 8)
    segment_ids = np.repeat([[1, 2, 2, 0, 3], [1, 1, 1, 1, 1]], 8, axis=1).astype(np.int32)
    mask = Mask(causal=True, query_segments=segment_ids, key_segments=segment_ids)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        attend = functools.partial(attention, mask=mask, implementation=implementation)
        out, vjp_fn = jax.vjp(attend, q, k[:, :, :2], v[:, :, :2])
        return out, vjp_fn(jnp.asarray(cotangent))

    with jax.enable_x64(True):
        assert_trees_close(run("blockwise"), run("reference"), 3e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("sequential", [True, False])
def test_grouped_queries_read_the_key_head_of_their_group(monkeypatch, sequential):
    monkeypatch.setattr(sharding, "platform", lambda: "cpu" if sequential else "gpu")
    q, k, v, _ = inputs(2, 5, 7, 6, 4)
    grouped = k[:, :, :2], v[:, :, :2]

    def repeat_heads(k, v):
        return [jnp.stack([x[:, :, head // 3] for head in range(6)], axis=2) for x in (k, v)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend):
        out, vjp_fn = jax.vjp(attend, q, *grouped)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    want = run(lambda q, k, v: attention(q, *repeat_heads(k, v), implementation="reference"))
    for implementation in ("reference", "blockwise"):
        got = run(lambda q, k, v, i=implementation: attention(q, k, v, implementation=i))
        assert_trees_close(got, want, 2e-6)


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("implementation", ["blockwise", "blockwise of all heads", "decode"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])  # rows and heads
def test_a_dense_bias_gives_the_values_and_gradients_of_the_reference(implementation, shape, monkeypatch):
    T, S = (2, 300) if implementation == "decode" else (300, 280)
    *qkv, _ = inputs(2, T, S, 3, 8)
    bias = np.random.default_rng(8).normal(size=(*shape, T, S)).astype(np.float32)
    if implementation != "decode":
        bias[:, :, :5] = np.finfo(np.float32).min  # as transformers masks rows of padding
    mask = Mask(causal=True, query_order=np.arange(T)[None] + 100, key_order=np.arange(S)[None])
    if implementation == "blockwise of all heads":
        monkeypatch.setattr(choices, "loop_over_heads", lambda: False)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        attend = lambda q, k, v, bias: attention(q, k, v, mask, bias=bias, implementation=implementation)  # noqa: E731
        out, vjp_fn = jax.vjp(attend, *qkv, bias)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    assert_trees_close(run(implementation.split()[0]), run("reference"), 3e-6)


def test_a_boolean_dense_bias_has_gradients_of_the_inputs():
    *qkv, _ = inputs(1, 300, 300, 1, 4)
    bias = np.random.default_rng(8).random((1, 1, 300, 300)) < 0.5

    def gradients(bias):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, bias=bias))), (0, 1, 2)))(*qkv)

    assert_trees_close(gradients(bias), gradients(bias.astype(np.float32)), 1e-7)


@dataclasses.dataclass(frozen=True)
class IndexBias:
    """Bias function without float arrays: the distance of the indices, or of the positions if there are any."""

    def required_slices(self, tile):
        return {}

    def __call__(self, arrays, integers, tile):
        rows, columns = tile.indices()
        if integers is not None:
            rows, columns = tile.query_column(integers["query"]), tile.key_row(integers["key"])
        return -0.3 * jnp.abs(rows - columns).astype(jnp.float32)


@pytest.mark.parametrize("positions", [False, True])
def test_a_bias_may_have_no_float_arrays(positions):
    q, k, v, _ = inputs(2, 5, 5, 3, 4)
    index_BT = np.arange(5, dtype=np.int32) * np.array([[1], [3]] if positions else [[1]], np.int32)
    bias = AttentionBias(IndexBias(), {}, {"query": index_BT, "key": index_BT} if positions else None)
    dense_BHTS = -0.3 * np.abs(index_BT[:, None, :, None] - index_BT[:, None, None, :]).astype(np.float32)
    want = jax.jit(functools.partial(attention, implementation="reference"))(q, k, v, bias=dense_BHTS)
    for implementation in ("reference", "blockwise", "decode", None):
        got = jax.jit(functools.partial(attention, implementation=implementation))(q, k, v, bias=bias)
        assert relative_error(got, want) < 2e-6, implementation


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "decode"])
@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_unsigned_orders_do_not_wrap(dtype, implementation):
    q, k, v, _ = inputs(2, 5, 5, 3, 4)
    order = np.arange(5)[None]
    attend = jax.jit(functools.partial(attention, implementation=implementation))
    for window in (None, 2):
        got, want = (
            attend(q, k, v, Mask(causal=True, window=window, query_order=each, key_order=each))
            for each in (order.astype(dtype), order.astype("int32"))
        )
        assert np.array_equal(got, want)


def test_a_bias_is_added_to_the_scaled_scores_and_has_a_gradient():
    q, k, v, _ = inputs(2, 4, 4, 3, 8)
    bias = np.random.default_rng(8).normal(size=(1, 3, 4, 4)).astype(np.float32)
    mask = Mask(causal=True)

    def plain(bias):
        scores = jnp.einsum("BTHK,BSHK->BHTS", q, k) * 0.5 + bias
        scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool))[None, None], scores, -jnp.inf)
        return jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(scores, axis=-1), v)

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradient(attend, bias):
        out, vjp_fn = jax.vjp(attend, bias)
        return out, vjp_fn(jnp.cos(out))[0]  # the gradient of the sum of the sines

    attend = lambda bias: attention(q, k, v, mask, scale=0.5, bias=bias)  # noqa: E731
    (got, got_gradient), (want, want_gradient) = (output_and_gradient(f, bias) for f in (attend, plain))
    assert relative_error(got, want) < 1e-6
    assert relative_error(got_gradient, want_gradient) < 1e-5


def cached_inputs(filled, S=700, G=2):
    """Queries (the last tokens of the ``filled`` slots of each row), keys, values and the mask."""
    B, T, H, K = len(filled), 2, 4, 8
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K)
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    slot_1S, filled_B1 = np.arange(S, dtype=np.int32)[None], np.array(filled, np.int32)[:, None]
    segments = np.where(slot_1S < filled_B1, np.int32(1), np.int32(0))
    mask = Mask(
        causal=True, query_order=filled_B1 - T + np.arange(T, dtype=np.int32),
        key_order=np.broadcast_to(slot_1S, (B, S)), query_segments=np.ones((B, T), np.int32), key_segments=segments,
    )  # fmt: skip
    return q, k, v, mask


attend_with = jax.jit(attention, static_argnames="implementation")


def with_nan(x, slots):
    """A copy of keys or values with NaN in the given slots."""
    x = x.copy()
    x[:, slots] = np.nan
    return x


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("filled", [(3, 90), (170, 4), (300, 350), (700, 20)])
def test_few_queries_over_a_cache(monkeypatch, filled, kind):
    """``decode`` has the values and gradients of ``reference`` on each platform."""
    monkeypatch.setattr(sharding, "platform", lambda: kind)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    q, k, v, mask = cached_inputs(filled)
    table = np.random.default_rng(9).normal(size=(9, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, mask):
        def attend(q, k, v, table):
            bias = distance_bias_at_positions(table, 5, mask.query_order, mask.key_order)
            return attention(q, k, v, mask, bias=bias, implementation=implementation)

        out, vjp_fn = jax.vjp(attend, q, k, v, table)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    assert_trees_close(run("decode", mask), run("reference", mask), 3e-6)


@pytest.mark.parametrize("products", ["sums", "merged", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_computes_the_products_in_three_ways(monkeypatch, products, dtype):
    """One query per key head; keys of a width that is not a multiple of 8; wider values."""
    random = np.random.default_rng(2)
    q = random.normal(size=(2, 1, 4, 12)).astype(dtype)
    k, v = (random.normal(size=(2, 300, 4, width)).astype(dtype) for width in (12, 20))
    mask = Mask(query_segments=np.ones((2, 1), np.int32), key_segments=np.arange(300)[None] < np.array([[7], [290]]))
    monkeypatch.setattr(choices, "decode_products", lambda *arguments: products)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        out, vjp_fn = jax.vjp(lambda *inputs: attention(*inputs, mask, implementation=implementation), q, k, v)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)).astype(dtype))

    assert_trees_close(run("decode"), run("reference"), 3e-6 if dtype == "float32" else 0.02)


def test_sums_are_chosen_for_one_float32_query_of_each_of_eight_heads():
    def choose(B=2, T=1, H=8, G=8, dtype=np.float32, shards=1):
        return choices.decode_products((B, T, H, 16), (B, 100, G, 16), dtype, shards)

    assert choose() == "sums"
    assert {choose(B=1), choose(T=2), choose(H=16), choose(H=4, G=4), choose(dtype=jnp.bfloat16), choose(shards=2)} == {
        "merged"
    }
    assert choose(B=1, shards=3) == "reference"


def test_decode_ignores_the_orders_of_a_mask_that_is_not_causal():
    q, k, v, mask = cached_inputs((3, 90))
    mask = Mask(query_order=mask.query_order, key_order=mask.key_order)
    out = attend_with(q, k, v, mask, implementation="decode")
    assert relative_error(out, attend_with(q, k, v, mask, implementation="reference")) < 3e-6


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "data=1,tensor=4"])
def test_decode_with_heads_split_over_devices(monkeypatch, kind, mesh):
    """There are two key heads: one for each of two devices, or fewer than the four devices."""
    q, k, v, mask = cached_inputs((3, 300))
    want = attend_with(q, k, v, mask, implementation="reference")
    monkeypatch.setattr(sharding, "platform", lambda: kind)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    mesh_sharding = Sharding(make_mesh(mesh, devices=jax.devices()[:4]))

    @jax.jit
    def run(q, k, v):
        with mesh_sharding.scope():
            q = sharding.constrain(q, ("batch", None, "heads", None))
            if mesh.endswith("2"):
                k, v = (sharding.constrain(x, ("batch", None, "heads", None)) for x in (k, v))
            return attention(q, k, v, mask, implementation="decode")

    assert relative_error(run(q, k, v), want) < 3e-6


@pytest.mark.parametrize(("filled", "read"), [((3, 90), 175), ((170, 4), 175), ((300, 350), 350), ((20, 351), 700)])
def test_only_the_filled_part_of_a_cache_is_read(filled, read):
    """Masked slots that are read are multiplied with 0, so a NaN in them makes the output NaN."""
    q, k, v, mask = cached_inputs(filled)
    out = attend_with(q, k, with_nan(v, slice(read, None)), mask)
    assert relative_error(out, attend_with(q, k, v, mask, implementation="reference")) < 3e-6
    assert np.isnan(attend_with(q, k, with_nan(v, slice(read - 1, None)), mask)).any()


def test_few_queries_over_a_source_read_only_its_real_tokens():
    """Cross attention to an encoder has no orders, but it uses the same branches as a cache."""
    q, k, v, _ = cached_inputs((0, 0))
    segments = np.where(np.arange(700)[None] < np.array([[300], [20]]), 1, 0)
    mask = Mask(query_segments=np.ones((2, 2), np.int32), key_segments=segments)
    want = attend_with(q, k, v, mask, implementation="reference")
    got = attend_with(q, k, with_nan(v, slice(350, None)), mask)
    assert relative_error(got, want) < 3e-6


def context_from(start_B):
    return CacheContext(None, None, Mask(), start_B, None)


@pytest.mark.thorough
def test_a_view_writes_and_reads_one_layer_of_the_stack():
    q, k, v, mask = cached_inputs((6, 90))
    new = np.random.default_rng(5).normal(size=(2, 3, 2, 8)).astype(np.float32)
    start = jnp.asarray([3, 87])
    heads_shape, stack = k.shape, np.stack([k - 1.0, k, k + 1.0])
    stack = jnp.asarray(stack.reshape(3, *heads_shape[:2], -1))
    view = CacheView(stack, jnp.int32(1))
    kv, (keys, _) = append_and_read({"key": view, "value": view}, (new, new), context_from(start))
    written = kv["key"]
    want = np.asarray(jax.jit(append)(k, new, start))
    assert written.shape == stack.shape[1:]
    assert keys.shape == heads_shape
    np.testing.assert_array_equal(written.read(120), want[:, :120].reshape(2, 120, -1))
    np.testing.assert_array_equal(keys.read(120), want[:, :120])
    per_layer, (per_layer_keys, _) = append_and_read(
        {"key": stack[1], "value": stack[1]}, (new, new), context_from(start)
    )
    np.testing.assert_array_equal(per_layer["key"], written.read(heads_shape[1]))
    assert per_layer_keys.shape == heads_shape
    np.testing.assert_array_equal(per_layer_keys.read(heads_shape[1]), want)
    np.testing.assert_array_equal(per_layer_keys.read(7), want[:, :7])
    np.testing.assert_array_equal(np.asarray(written.stack)[[0, 2]], np.asarray(stack)[[0, 2]])
    for implementation in ("decode", "reference", None):
        values = CacheView(v.reshape(1, *heads_shape[:2], -1), 0, heads_shape[2])
        got = attend_with(q, keys, values, mask, implementation=implementation)
        assert relative_error(got, attend_with(q, want, v, mask, implementation="reference")) < 3e-6


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_the_call_of_cudnn_computes_attention(causal, window):
    """The call with ``implementation="xla"``, which needs no GPU."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(2, 9, 9, 4, 8)[:3])
    grouped, mask = (k[:, :, :2], v[:, :, :2]), Mask(causal=causal, window=window)
    got, want = (
        jax.jit(functools.partial(attend, mask=mask, scale=0.3, implementation=implementation))(q, *grouped)
        for attend, implementation in ((cudnn.attention, "xla"), (attention, "reference"))
    )
    assert got.dtype == want.dtype
    assert relative_error(got, want) < 1e-2  # bfloat16 probabilities


@pytest.mark.parametrize(
    ("implementation", "dtype", "options", "message"),
    [
        ("cudnn", "float32", {}, "'cudnn' takes bfloat16 and float16, not float32: leave the implementation out"),
        ("cudnn", "bfloat16", {"dropout": 0.1, "key": jax.random.key(0)}, "'cudnn' has no dropout"),
        ("cudnn", "bfloat16", {"bias": np.zeros((1, 1, 4, 4))}, "'cudnn' takes no bias"),
        ("cudnn", "bfloat16", {"mask": Mask(query_segments=np.ones((1, 4)), key_segments=np.ones((1, 4)))}, "segments"),
        ("cudnn 4", "bfloat16", {}, "'cudnn' takes head widths that are multiples of 8 up to 128, not 4"),
        ("cudnn", "bfloat16", {}, "'cudnn' runs only on gpu, but this computation is compiled for cpu"),
        ("decode", "float32", {"dropout": 0.1, "key": jax.random.key(0)}, "'decode' has no dropout"),
    ],
)
def test_unsupported_arguments_give_the_reason(implementation, dtype, options, message):
    implementation, *width = implementation.split()
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(1, 4, 4, 2, int(width[0]) if width else 8)[:3])
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, implementation=implementation, **options)


def test_cudnn_needs_values_of_the_width_of_the_keys(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    q, v = (jax.ShapeDtypeStruct((1, 256, 2, width), jnp.bfloat16) for width in (16, 8))
    with pytest.raises(ValueError, match=r"'cudnn' takes values of the width of the keys \(16\), not 8"):
        jax.eval_shape(functools.partial(attention, implementation="cudnn"), q, q, v)
    assert jax.eval_shape(attention, q, q, v).shape == v.shape


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_cudnn_needs_an_ampere_gpu(monkeypatch, capability):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "attention", lambda q, *_, **__: q)
    q, uses_exp = jax.ShapeDtypeStruct((1, 256, 2, 16), jnp.bfloat16), {}
    for name in ("8.0", capability):
        monkeypatch.setattr(sharding, "compute_capability", lambda name=name: name)
        uses_exp[name] = "exp" in str(jax.make_jaxpr(lambda q: attention(q, q, q))(q))
    assert uses_exp == {"8.0": False, capability: True}, "cudnn is chosen only on the newer GPU"
    with pytest.raises(ValueError, match=rf"'cudnn' needs an NVIDIA GPU .* 8\.0 or higher, not {capability}: leave"):
        jax.eval_shape(functools.partial(attention, implementation="cudnn"), q, q, q)


def test_default_implementation_on_a_tpu(monkeypatch):
    """``pallas`` for short rows or if ``splash`` does not support the mask; ``blockwise`` if no kernel supports it."""
    called = []

    def record_call(name):
        def attend(q, k, v, mask, **_):
            called.append(name)
            return q

        return attend

    modules = {"pallas": pallas, "splash": splash, "blockwise": blockwise}
    for name, module in modules.items():
        monkeypatch.setattr(module, "attention", record_call(name))
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")

    def default(T, S, mask=Mask(causal=True), heads=2, width=8, **options):  # noqa: B008 (frozen)
        q, k = (jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32) for length in (T, S))
        called.clear()
        jax.eval_shape(lambda q, k: attention(q, k, k, mask, **options), q, k)
        return called[0] if called else "reference"

    bias = distance_bias(jnp.zeros((9, 2)), 4, 100, 100, query_offset=0)
    long_bias = distance_bias(jnp.zeros((9, 2)), 4, 5000, 5000, query_offset=0)
    order = {f"{side}_order": jnp.zeros((1, 2048), jnp.int32) for side in ("query", "key")}
    assert default(1024, 1024) == "pallas"
    assert default(1024, 1024, dropout=0.1, key=jax.random.key(0)) == "blockwise"
    assert default(2048, 2048) == "splash"
    assert default(1024, 1024, heads=25, width=64) == "splash", "the 25 heads of GPT-2 XL do not fit into VMEM"
    assert default(2048, 2048, Mask(causal=True, **order)) == "pallas"
    assert default(100, 100) == "pallas"
    assert default(32, 32) == "reference"
    assert default(100, 100, bias=bias) == "pallas"
    assert default(5000, 5000, bias=long_bias) == "blockwise"
    monkeypatch.setattr(sharding, "device_kind", lambda: "TPU v4")
    assert default(1024, 1024) == "splash"
    with pytest.raises(ValueError, match="'pallas' needs a TPU v5 or newer"):
        default(1024, 1024, implementation="pallas")

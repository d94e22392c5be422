"""Tests of the cache of local attention against attention over the whole text of each document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.attention import attention, window_cache
from jaxlm.nn.segments import segment_boundaries

# Calls of several sizes, with padding on both sides and in the middle. Documents continue and start, and segment id 1
# is used for two documents of the first row.
CALLS = [
    [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 0, 2]],
    [[1], [1], [2]],
    [[1], [0], [2]],
    [[2, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 2]],
    [[1], [2], [0]],
    [[1, 1], [2, 2], [3, 3]],
]
G, K = 2, 3


def keys_of(count, rng):
    return [rng.normal(size=(3, count, heads, K)).astype(np.float32) for heads in (4, G, G)]


def visible_attention(q_HK, keys_NGK, values_NGK):
    """Attention of one query over a list of keys."""
    heads = np.repeat(np.stack(keys_NGK), 2, axis=1), np.repeat(np.stack(values_NGK), 2, axis=1)
    scores_HN = np.einsum("HK,NHK->HN", q_HK, heads[0]) / np.sqrt(K)
    weights_HN = np.exp(scores_HN - scores_HN.max(axis=1, keepdims=True))
    return np.einsum("HN,NHK->HK", weights_HN / weights_HN.sum(axis=1, keepdims=True), heads[1])


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("window", [1, 3, 4, 16])
def test_attention_equals_that_over_the_last_tokens_of_the_document(window):
    rng = np.random.default_rng(0)
    state = spec.init(window_cache.token_count_specs(3))
    kv = spec.init(window_cache.layer_specs(3, window, G, K, jnp.float32))
    documents, last_segment = [[], [], []], None

    @jax.jit
    def step(q, k, v, segments, last_segment, state, kv):
        start, keep, last_segment = segment_boundaries(segments, last_segment, include_first=True)
        context, state = window_cache.make_context(segments, state, start, keep, window)
        kv, (keys, values) = window_cache.append_and_read(kv, (k, v), context)
        out = attention(q, keys, values, context.mask)
        return (out, start, keep, context.positions), last_segment, state, kv

    for call in CALLS:
        segments = np.array(call, np.int32)
        T = segments.shape[1]
        q, k, v = keys_of(T, rng)
        outputs, last_segment, state, kv = step(q, k, v, segments, last_segment, state, kv)
        got, start, keep, positions = map(np.asarray, outputs)
        assert np.isfinite(got).all()
        for row, document in enumerate(documents):
            for t in np.flatnonzero(keep[row]):
                if start[row, t]:
                    document.clear()
                assert positions[row, t] == len(document)
                document.append((k[row, t], v[row, t]))
                want = visible_attention(q[row, t], *zip(*document[-window:], strict=True))
                np.testing.assert_allclose(got[row, t], want, rtol=2e-5, atol=1e-6)
    layer_specs = window_cache.layer_specs(3, window, G, K, jnp.float32)
    assert spec.differences({**window_cache.token_count_specs(3), **layer_specs}, {**state, **kv}) == []


def test_without_a_state_the_mask_has_no_order():
    """An order per token would exclude the implementations that skip tiles outside the window."""
    tokens = jnp.zeros((2, 5), jnp.int32)
    context, state = window_cache.make_context(tokens, None, None, None, 3)
    assert (state, context.slots, context.mask.arrays) == (None, None, (None,) * 4)
    assert np.array_equal(context.positions, [[0, 1, 2, 3, 4]])
    start, keep, _ = segment_boundaries(jnp.asarray([[1, 1, 2, 1, 0], [4, 4, 4, 0, 0]]), include_first=True)
    context, _ = window_cache.make_context(tokens, None, start, keep, 3)
    assert context.mask.query_order is None
    assert np.array_equal(context.mask.query_segments, [[1, 1, 3, 4, 0], [1, 1, 1, 0, 0]])
    assert np.array_equal(context.positions, [[0, 1, 0, 0, 0], [0, 1, 2, 0, 0]])
    keys = (jnp.ones((2, 5, G, K)), jnp.ones((2, 5, G, K)))
    assert window_cache.append_and_read(None, keys, context) == (None, keys)


def test_no_array_grows_with_the_text():
    specs = window_cache.layer_specs(2, 8, G, K, jnp.bfloat16)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in specs.items()} == {
        "key": ((2, 8, G * K), jnp.bfloat16), "value": ((2, 8, G * K), jnp.bfloat16),
    }  # fmt: skip
    assert all("batch" in leaf.axes for leaf in jax.tree.leaves((specs, window_cache.token_count_specs(2))))


def test_missing_masks_raise():
    tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    state = spec.init(window_cache.token_count_specs(2))
    with pytest.raises(ValueError, match="start_BT and keep_BT must not be None with a state: pass the masks of"):
        window_cache.make_context(tokens, state, None, None, 4)
    with pytest.raises(ValueError, match="keep_BT must not be None: pass the masks of segment_boundaries"):
        window_cache.make_context(tokens, None, mask, None, 4)

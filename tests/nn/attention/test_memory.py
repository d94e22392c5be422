"""Tests of the memory of the last hidden states against Python lists of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.attention import memory
from jaxlm.nn.attention.mask import Mask, keep

# Three calls with three rows each: padding on the left, on the right and in the middle; documents continue and start.
CALLS = [
    [[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 2]],
    [[1, 1, 2, 2], [1, 0, 0, 0], [2, 2, 0, 0]],
    [[2, 3, 0, 3], [0, 0, 0, 0], [0, 2, 2, 3]],
]


def run(slots, calls=CALLS):
    """Yield (segments, tokens, context, state) of each call. The hidden state of a token is its number."""
    state = spec.init(memory.memory_specs(None, 3, slots, 1, jnp.float32))
    for call, segments in enumerate(calls):
        segments = np.array(segments, np.int32)
        tokens = 1 + 100 * call + np.arange(segments.size, dtype=np.float32).reshape(segments.shape)
        context, state = read(tokens, state, segments)
        yield segments, tokens, context, state


@jax.jit
def read(tokens, state, segments):
    context, state = memory.make_context(tokens, state, segments)
    hidden = memory.append(state["hidden"], tokens[..., None], context)
    return context, {**state, "hidden": hidden}


@pytest.mark.parametrize("slots", [1, 3, 5, 12])
def test_the_memory_contains_the_last_real_tokens_in_order(slots):
    histories = [[], [], []]
    for segments, tokens, _, state in run(slots):
        for row, history in enumerate(histories):
            history += [(token, s) for token, s in zip(tokens[row], segments[row]) if s > 0]
            remembered = [
                (token, s)
                for token, s in zip(state["hidden"][row, :, 0].tolist(), state["segment_ids"][row].tolist())
                if s > 0
            ]
            assert remembered == history[-slots:]
            assert np.all(np.diff(np.asarray(state["segment_ids"][row]) > 0) >= 0)  # empty slots come first
    assert spec.differences(memory.memory_specs(None, 3, slots, 1, jnp.float32), state) == []


def test_mask_and_distances_equal_those_of_single_documents():
    histories = [[], [], []]
    slots = 12
    for segments, _, context, _ in run(slots):
        visible = np.asarray(keep(context.mask, 4, slots + 4))
        distance = np.asarray(context.query_positions)[:, :, None] - np.asarray(context.key_positions)[:, None, :]
        for row, history in enumerate(histories):
            past = [None] * (slots - len(history)) + [(s, n) for n, s in enumerate(history)]
            new_tokens = []
            for s in segments[row]:
                new_tokens.append((s, len(history)) if s > 0 else None)
                history += [s] if s > 0 else []
            for q, query in enumerate(new_tokens):
                if query is None:
                    continue
                for k, key in enumerate(past + new_tokens):
                    is_visible = key is not None and key[0] == query[0] and key[1] <= query[1]
                    assert visible[row, q, k] == is_visible
                    if is_visible:
                        assert distance[row, q, k] == query[1] - key[1]


def test_positions_without_segments():
    """Distances count the memory, and a window works without a state."""
    state = spec.init(memory.memory_specs(1, 2, 3, 1, jnp.float32))
    for _ in range(3):
        context, state = memory.make_context(jnp.zeros((2, 2), int), state, None)
        assert context.kept_indices is None
    distance = context.query_positions[:, :, None] - context.key_positions[:, None, :]
    assert np.array_equal(distance[0], [[3, 2, 1, 0, -1], [4, 3, 2, 1, 0]])
    context, state = memory.make_context(jnp.zeros((2, 4), int), None, None, window=2)
    assert state is None
    assert np.array_equal(keep(context.mask, 4, 4)[0], np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))


def test_a_window_counts_tokens_and_not_padding():
    segments = jnp.asarray([[1, 0, 0, 1, 1]])
    context, _ = memory.make_context(jnp.zeros((1, 5), int), None, segments, window=2)
    assert np.array_equal(keep(context.mask, 5, 5)[0, 3], [True, False, False, True, False])


@pytest.mark.parametrize("kept", [None, jnp.asarray([[1, 2], [0, 2]])])
def test_the_memory_has_no_gradient(kept):
    old, new = jnp.ones((2, 2, 3)), jnp.ones((2, 1, 3))
    context = memory.MemoryContext(jnp.ones((1, 1)), jnp.ones((1, 3)), Mask(), kept)
    gradients = jax.grad(lambda old, new: jnp.sum(memory.append(old, new, context)), argnums=(0, 1))(old, new)
    assert all(np.all(np.asarray(gradient) == 0.0) for gradient in gradients)


def test_a_memory_without_slots_raises():
    with pytest.raises(ValueError, match="a memory needs at least 1 slot, got slots=0"):
        memory.memory_specs(1, 2, 0, 4, jnp.float32)


@pytest.mark.parametrize("slots", [3, 12])
def test_the_decoding_layout_keeps_the_same_tokens_as_the_usual_layout(slots):
    specs = memory.memory_specs(None, 3, slots, 1, jnp.float32)
    *_, state = list(run(slots))[-1]
    usual, num_added = state, 4
    state = memory.to_decoding_layout(specs, state, num_added)
    assert spec.differences(memory.decoding_specs(specs, num_added), state) == []
    used = np.arange(slots + num_added) < np.asarray(state["length"])[:, None]
    assert np.array_equal(np.asarray(state["segment_ids"]) > 0, used)  # tokens first
    for call in range(num_added):
        token, segments = jnp.full((3, 1), 1000.0 + call), jnp.asarray([[3], [int(call in (0, 3))], [4]])
        _, usual = read(token, usual, segments)
        context, state = read(token, state, segments)
        # A token attends to itself and to the last M tokens of its document.
        visible = np.asarray(keep(context.mask, 1, slots + num_added))[:, 0]
        for row in np.flatnonzero(np.asarray(segments[:, 0])):
            assert 1 <= visible[row].sum() <= slots + 1
            assert set(np.asarray(state["segment_ids"])[row, visible[row]].tolist()) == {int(segments[row, 0])}
    back = memory.from_decoding_layout(specs, state, num_added)
    for name in specs:
        kept = np.asarray(usual["segment_ids"]) > 0  # entries of empty slots may differ
        assert np.array_equal(np.asarray(back[name])[kept], np.asarray(usual[name])[kept])
    assert np.array_equal(back["segment_ids"], usual["segment_ids"])


def test_the_decoding_layout_refuses_several_tokens_and_arrays_without_slots():
    specs = memory.memory_specs(1, 2, 3, 1, jnp.float32)
    state = memory.to_decoding_layout(specs, spec.init(specs), 4)
    with pytest.raises(ValueError, match="one token per call with a causal mask, got 2 tokens and causal=True"):
        memory.make_context(jnp.zeros((2, 2), int), state, None)
    for shape, axes in (((2,), ("batch",)), ((2, 5, 3), ("batch", None, None)), ((3, 2), (None, "batch"))):
        other_specs = {**specs, "other": spec.ArraySpec(shape, axes)}
        message = rf"the array other \[{', '.join(map(str, shape))}\] of the state has no axis of 3 memory slots after"
        with pytest.raises(ValueError, match=message):
            memory.to_decoding_layout(other_specs, spec.init(other_specs), 4)

"""Absorbed attention of Transformer-XL and XLNet: few queries attend to the memory without projecting it first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import get_model, spec
from jaxlm.nn import choices
from jaxlm.nn.attention import memory
from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal, initial_params, random_tokens

ROWS = 3
XLNET = "xlnet-tiny", {}
CASES = {
    "xlnet": (*XLNET, {}),
    "xlnet, pads": (*XLNET, {"segment_ids": np.array([[1], [0], [1]])}),
    "xlnet, types": (*XLNET, {"token_types": np.array([[1], [0], [2]])}),
    "xlnet, reversed": (*XLNET, {"right_to_left": np.array([True, False, True])}),
    "xl": ("transformer-xl-tiny", {}, {}),
    "xl, pre-norm": ("transformer-xl-tiny", {"pre_norm": True, "untie_relative": False}, {}),
    "xl, clamped": ("transformer-xl-tiny", {"clamp_length": 4, "same_length": True, "memory_length": 6}, {}),
    "xl, two tokens, pads": ("transformer-xl-tiny", {}, {"segment_ids": np.array([[1, 1], [0, 1], [1, 0]])}),
}


def step(case, monkeypatch, absorbed, key=None, **rates):
    """((hidden states, next state) of a call after nine tokens, gradients, calls of ``memory.attend_to_inputs``)."""
    name, fields, inputs = CASES[case]
    monkeypatch.setattr(choices, "MIN_ABSORBED_CONTEXT", 0 if absorbed else 10**9)
    calls, attend = [], memory.attend_to_inputs
    monkeypatch.setattr(memory, "attend_to_inputs", lambda *a, **k: calls.append(1) or attend(*a, **k))
    model = get_model(name, **fields, **rates)
    params = initial_params(model)
    num_tokens = inputs["segment_ids"].shape[1] if "segment_ids" in inputs else 1
    tokens = random_tokens(model, ROWS, 9 + num_tokens)
    prefix_inputs = {name: np.broadcast_to(x[:, :1], (ROWS, 9)) if x.ndim == 2 else x for name, x in inputs.items()}
    prefix_inputs.pop("segment_ids", None)
    _, state = jax.jit(model.apply)(params, tokens[:, :9], state=model.init_state(ROWS, 12), **prefix_inputs)

    def run(params):
        hidden, next_state = model.apply(params, tokens[:, 9:], state=state, key=key, **inputs)
        weights = jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32).reshape(hidden.shape))
        return jnp.sum(hidden * weights), (hidden, next_state)

    gradients, outputs = jax.jit(jax.grad(run, has_aux=True))(params)
    monkeypatch.setattr(memory, "attend_to_inputs", attend)
    return outputs, gradients, len(calls)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_absorbed_attention_has_equal_outputs_and_gradients(monkeypatch, case):
    want, want_gradients, projected_calls = step(case, monkeypatch, absorbed=False)
    got, gradients, calls = step(case, monkeypatch, absorbed=True)
    assert projected_calls == 0
    assert calls == (2 if "xlnet" in case else 1)  # one per stream, because the loop over layers is traced once
    assert_trees_close(got, want, 3e-6)
    assert_trees_close(gradients, want_gradients, 1e-5, floor=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "rates"), [("xlnet", {"dropout": 0.3}), ("xl", {"attention_dropout": 0.3})])
def test_dropout_of_probabilities_disables_absorbed_attention(monkeypatch, case, rates):
    results = [step(case, monkeypatch, absorbed, jax.random.key(1), **rates) for absorbed in (False, True)]
    assert [calls for *_, calls in results] == [0, 0]
    assert_trees_equal(results[1][:2], results[0][:2])


def test_absorbed_attention_needs_few_queries_and_many_inputs():
    def absorbed(queries, inputs):
        q, context = jnp.zeros((2, queries, 3, 16)), jnp.zeros((2, inputs, 48))
        return choices.absorbed_attention(q, context, dropout=0.1, key=None)

    assert absorbed(4, choices.MIN_ABSORBED_CONTEXT)
    assert absorbed(4, choices.MIN_ABSORBED_CONTEXT // 2)  # two rows, and the minimum counts the inputs of all rows
    assert not absorbed(5, choices.MIN_ABSORBED_CONTEXT)
    assert not absorbed(4, choices.MIN_ABSORBED_CONTEXT // 2 - 1)


LAYOUT_CASES = {
    "xlnet": ("xlnet-tiny", {}, 6),
    "xlnet, stacked layers": ("xlnet-tiny", {"scan_layers": True}, 20),
    "xl": ("transformer-xl-tiny", {}, 6),
    "xl, stacked layers": ("transformer-xl-tiny", {"scan_layers": True, "clamp_length": 4}, 20),
    "xl, pre-norm": ("transformer-xl-tiny", {"pre_norm": True, "untie_relative": False}, 6),
    "xl, same length": ("transformer-xl-tiny", {"same_length": True, "memory_length": 5}, 6),
}


@pytest.mark.plain_cases(3)
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_both_layouts_of_the_memory_give_equal_hidden_states_and_states(monkeypatch, case, absorbed):
    """Also after the memory has dropped tokens. The second row reads padding in the second and third call."""
    name, fields, slots = LAYOUT_CASES[case]
    monkeypatch.setattr(choices, "MIN_ABSORBED_CONTEXT", 0 if absorbed else 10**9)
    model = get_model(name, **fields)
    params, tokens, num_steps = initial_params(model), random_tokens(model, ROWS, 13), 4
    specs, prefix_segments = model.state_specs(ROWS, slots), np.ones((ROWS, 9), np.int32)
    prefix_segments[0, :4] = 0
    prefix = {"segment_ids": prefix_segments, "state": spec.init(specs)}
    _, usual = jax.jit(model.apply)(params, tokens[:, :9], **prefix)
    decoding = memory.to_decoding_layout(specs, usual, num_steps)
    apply = jax.jit(model.apply)
    for step in range(num_steps):
        segments = np.array([[1], [int(step in (0, 3))], [1]], np.int32)
        token = tokens[:, 9 + step : 10 + step]
        want, usual = apply(params, token, state=usual, segment_ids=segments)
        got, decoding = apply(params, token, state=decoding, segment_ids=segments)
        real = segments[:, 0] > 0
        assert_trees_close(np.asarray(got)[real], np.asarray(want)[real], 3e-6)
    back = memory.from_decoding_layout(specs, decoding, num_steps)
    assert np.array_equal(back["segment_ids"], usual["segment_ids"])
    is_token = np.asarray(usual["segment_ids"]) > 0
    for got, want in zip(*(jax.tree.leaves(spec.unstack(state)["layers"]) for state in (back, usual)), strict=True):
        assert_trees_close(np.asarray(got)[is_token], np.asarray(want)[is_token], 3e-6)


def test_token_types_in_both_layouts_of_the_memory():
    model = get_model("xlnet-tiny")
    params, tokens, types = initial_params(model), random_tokens(model, ROWS, 8), np.array([[1], [0], [2]])
    specs, apply = model.state_specs(ROWS, 10), jax.jit(model.apply)
    prefix = {"token_types": np.broadcast_to(types, (ROWS, 7)), "state": spec.init(specs)}
    _, usual = apply(params, tokens[:, :7], **prefix)
    decoding = memory.to_decoding_layout(specs, usual, 2)
    want, usual = apply(params, tokens[:, 7:], state=usual, token_types=types)
    got, decoding = apply(params, tokens[:, 7:], state=decoding, token_types=types)
    assert_trees_close(got, want, 3e-6)
    back = memory.from_decoding_layout(specs, decoding, 2)
    assert np.array_equal(back["token_types"], usual["token_types"])


def test_the_decoding_layout_refuses_an_order_and_reversed_rows():
    model = get_model("xlnet-tiny")
    specs = model.state_specs(2, 4)
    state, one = memory.to_decoding_layout(specs, spec.init(specs), 4), np.zeros((2, 1), np.int32)
    for inputs in ({"order": one, "targets": one}, {"right_to_left": np.array([True, False])}):
        with pytest.raises(ValueError, match="a memory in the decoding layout reads tokens from left to right"):
            model.apply(initial_params(model), one, state=state, **inputs)

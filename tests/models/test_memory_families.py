"""Absorbed attention of Transformer-XL and XLNet: few queries attend to the memory without projecting it first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import get_model
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

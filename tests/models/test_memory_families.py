"""What Transformer-XL and XLNet share: few queries meet the memory itself, and not keys and values made of it."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm import get_model
from jaxlm.nn import memory
from tests.helpers import assert_trees_close, assert_trees_equal, random_tokens

ROWS = 3
XLNET = "xlnet-tiny", {}
CASES = {
    "xlnet": (*XLNET, {}),
    "xlnet, pads": (*XLNET, {"segment_ids": jnp.array([[1], [0], [1]])}),
    "xlnet, types": (*XLNET, {"token_types": jnp.array([[1], [0], [2]])}),
    "xlnet, reversed": (*XLNET, {"right_to_left": jnp.array([True, False, True])}),
    "xl": ("transformer-xl-tiny", {}, {}),
    "xl, norms before": ("transformer-xl-tiny", {"pre_norm": True, "untie_relative": False}, {}),
    "xl, clamped": ("transformer-xl-tiny", {"clamp_length": 4, "same_length": True, "memory_length": 6}, {}),
    "xl, two tokens, pads": ("transformer-xl-tiny", {}, {"segment_ids": jnp.array([[1, 1], [0, 1], [1, 0]])}),
}


def step(case, monkeypatch, directly, key=None, **rates):
    """Hidden states and the next state of a call after nine tokens, the gradients, and how often a memory was met."""
    name, fields, inputs = CASES[case]
    monkeypatch.setattr(memory, "DIRECTLY_FROM", 0 if directly else 10**9)
    met, attend = [], memory.attend
    monkeypatch.setattr(memory, "attend", lambda *a, **k: met.append(1) or attend(*a, **k))
    model = get_model(name, **fields, **rates)
    params = model.init(jax.random.key(0))
    count = inputs["segment_ids"].shape[1] if "segment_ids" in inputs else 1
    tokens = random_tokens(model, ROWS, 9 + count)
    first = {name: jnp.broadcast_to(x[:, :1], (ROWS, 9)) if x.ndim == 2 else x for name, x in inputs.items()}
    first.pop("segment_ids", None)
    _, state = model.apply(params, tokens[:, :9], state=model.init_state(ROWS, 12), **first)

    def run(params):
        hidden, after = model.apply(params, tokens[:, 9:], state=state, key=key, **inputs)
        return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32).reshape(hidden.shape))), (
            hidden,
            after,
        )

    gradients, made = jax.jit(jax.grad(run, has_aux=True))(params)
    monkeypatch.setattr(memory, "attend", attend)
    return made, gradients, len(met)


@pytest.mark.parametrize("case", CASES)
def test_meeting_the_memory_directly_gives_the_same_and_the_same_gradients(monkeypatch, case):
    want, want_gradients, none = step(case, monkeypatch, directly=False)
    got, gradients, met = step(case, monkeypatch, directly=True)
    assert none == 0
    assert met == (2 if "xlnet" in case else 1)  # streams; the loop over layers is traced once
    assert_trees_close(got, want, 3e-6)
    assert_trees_close(gradients, want_gradients, 1e-5, floor=1e-3)


@pytest.mark.parametrize(("case", "rates"), [("xlnet", {"dropout": 0.3}), ("xl", {"attention_dropout": 0.3})])
def test_probabilities_that_are_dropped_need_keys_and_values(monkeypatch, case, rates):
    made = [step(case, monkeypatch, directly, jax.random.key(1), **rates) for directly in (False, True)]
    assert [met for *_, met in made] == [0, 0]
    assert_trees_equal(made[1][:2], made[0][:2])


def test_many_queries_and_few_inputs_are_projected():
    def met(queries, inputs):
        return memory.is_met_directly(jnp.zeros((2, queries, 3, 16)), jnp.zeros((2, inputs, 48)), dropout=0.1, key=None)

    assert met(4, memory.DIRECTLY_FROM)
    assert met(4, memory.DIRECTLY_FROM // 2)  # in each of two rows
    assert not met(5, memory.DIRECTLY_FROM)
    assert not met(4, memory.DIRECTLY_FROM // 2 - 1)

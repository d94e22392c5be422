"""GRU: the reset gate. tests/oracles compares values and gradients; test_recurrent_families.py tests the rest."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm import spec
from jaxlm.models import get_model
from jaxlm.testing.helpers import add_noise, apply, initial_params, random_tokens, relative_error, tiny_model


def test_reset_before_the_product_has_no_hidden_bias():
    after, before = (spec.flatten(get_model("gru-tiny", reset=reset).specs) for reset in ("after", "before"))
    assert after.keys() - before.keys() == {"layer_0/bias_hidden", "layer_1/bias_hidden"}
    assert before.keys() < after.keys()
    with pytest.raises(ValueError, match="reset='none' is unknown: choose from 'after', 'before'"):
        get_model("gru", reset="none")


def test_both_resets_decode_step_by_step_and_differ():
    hidden = {}
    for reset in ("after", "before"):
        model = tiny_model("gru", reset=reset)
        tokens = random_tokens(model, 2, 6)
        params = add_noise(initial_params(model))
        hidden[reset] = apply(model, params, tokens)[0]
        step = jax.jit(lambda t, s, model=model, params=params: model.apply(params, t, state=s))
        state, outputs = model.init_state(2, 6), []
        for position in range(6):
            output, state = step(tokens[:, position : position + 1], state)
            outputs.append(output)
        assert relative_error(jnp.concatenate(outputs, axis=1), hidden[reset]) < 2e-6
    assert relative_error(hidden["after"], hidden["before"]) > 1e-2


def test_a_gru_layer_has_three_quarters_of_the_parameters_of_an_lstm_layer():
    shape = {"num_layers": 2, "embed_dim": 650, "hidden_dim": 650}
    gru, lstm = (get_model(name, **shape).specs["layer_1"] for name in ("gru", "lstm"))
    assert spec.count({name: gru[name] for name in lstm}) * 4 == spec.count(lstm) * 3

"""Layer layouts of the families with a config field ``pattern``: one mixer for all layers, or several mixers."""

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.testing.helpers import add_noise, initial_params, random_tokens, relative_error, tiny_model

MIXERS = {
    "griffin-tiny": ("recurrent", "attention"),
    "xlstm-tiny": ("slstm",),  # the contract tests the mLSTM
    "gated_deltanet-hybrid-tiny": ("attention",),  # the contract tests the delta rule
    "bamba-tiny": ("mamba2", "attention"),  # with an MLP
    "falcon-h1-tiny": ("parallel",),  # with multipliers
    "gemma-3-tiny": ("window",),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "mixer"), [(name, mixer) for name, mixers in MIXERS.items() for mixer in mixers])
def test_layers_of_one_kind_can_be_stacked(name, mixer):
    model = tiny_model(name, pattern=(mixer,), num_layers=2)
    stacked, tokens = model.with_fields(scan_layers=True), random_tokens(model, 2, 12)
    params, results = add_noise(initial_params(model)), []
    for variant, weights in ((model, params), (stacked, spec.restack(params))):
        step, state = jax.jit(variant.apply), variant.init_state(2, 12)
        first, state = step(weights, tokens[:, :9], state=state)
        last, state = step(weights, tokens[:, 9:], state=state)
        results.append((np.concatenate([first, last], axis=1), spec.restack(state)))
    for got, want in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[0]), strict=True):
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", ["griffin-tiny", "xlstm-slstm-tiny", "gated_deltanet-hybrid-tiny", "bamba-tiny"])
def test_layers_of_several_kinds_cannot_be_stacked(name):
    model = tiny_model(name)
    with pytest.raises(ValueError, match=r"scan_layers=True needs layers of one kind, but pattern=.*: set scan_layers"):
        model.with_fields(scan_layers=True)

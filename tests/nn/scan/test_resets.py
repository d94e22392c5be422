"""Tests that a reset sets the state of a scan to zeros, also if the state is NaN, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.scan import (
    Chunked,
    gated_delta_rule,
    generalized_delta_rule,
    generalized_delta_rule_pallas,
    linear_attention,
    linear_scan,
    mlstm,
    ssd,
    vector_state,
)
from jaxlm.testing.helpers import assert_trees_close

B, T, H, K, V = 2, 13, 2, 4, 8
MATRIX = ("reference", "chunked", "pallas")
CHANNELS = ("reference", "chunked", None)  # without an implementation and a gradient, a loop over steps
IMPLEMENTATIONS = {
    "linear_attention": MATRIX, "one decay per channel": CHANNELS, "gated_delta_rule": MATRIX,
    "generalized_delta_rule": CHANNELS, "bounded decays": MATRIX, "ssd": MATRIX,
    "negative eigenvalues": ("reference", "chunked"), "mlstm": MATRIX,
    "linear_scan": ("reference", "sequential", "chunked", "pallas"),
}  # fmt: skip


def function_and_state(name):
    """``run(inputs, state, **options)``, the inputs [B, T, ...], and a state that is NaN in channel 0."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v, state = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, H, K, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gate, log_decay, log_decays = abs(draw(B, T, H)), -abs(draw(B, T, H)), -abs(draw(B, T, H, K))
    state[..., 0] = np.nan
    if name == "linear_scan":
        return linear_scan, (np.exp(-abs(draw(B, T, V))), draw(B, T, V)), state[:, 0, 0]
    if name == "mlstm":
        nan = np.full((B, H, K), np.nan, np.float32)
        return mlstm, (q, k, v, gate, log_decay), {"cell": state, "normalizer": nan, "stabilizer": nan[..., 0]}
    if name in ("ssd", "negative eigenvalues"):
        options = {"negative_eigenvalues": True} if name == "negative eigenvalues" else {}
        run = lambda q, k, v, dt, state, **more: ssd(v, dt, -np.ones(H, "f"), k, q, state, **options, **more)  # noqa: E731
        return run, (q, k, v, gate), state
    if name == "gated_delta_rule":
        return gated_delta_rule, (q, k, v, log_decay, gate), state
    if name == "generalized_delta_rule":
        return generalized_delta_rule, (q, k, v, log_decays, (-k, 0.5 * k)), state
    if name == "bounded decays":
        run = functools.partial(generalized_delta_rule, min_log_decay=-0.6)
        return run, (q, k, v, np.maximum(log_decays, -0.6), (-k, 0.5 * k)), state
    return linear_attention, (q, k, v, log_decay if name == "linear_attention" else log_decays), state


@pytest.mark.plain_cases(3)
@pytest.mark.parametrize(
    ("name", "implementation"), [(name, each) for name, several in IMPLEMENTATIONS.items() for each in several]
)
def test_a_reset_replaces_a_state_of_nan(name, implementation, monkeypatch):
    """Row 0 has a reset at its first step, row 1 has one inside a chunk."""
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "kernel_chunk", lambda steps: 16)
    monkeypatch.setattr(generalized_delta_rule_pallas, "CHUNK", 16)
    monkeypatch.setattr(vector_state, "CHUNK", 4)
    run, inputs, nan_state = function_and_state(name)
    reset = np.zeros((B, T), bool)
    reset[0, 0] = reset[1, 6] = True
    options = {"reset_BT": reset, "keep_BT": np.arange(T)[None] != [[3], [8]], "implementation": implementation}
    if implementation == "chunked" and name != "linear_scan":
        options["implementation"] = Chunked(4)

    def loss(inputs, state):
        out, last = run(*inputs, state, **options)
        return jnp.sum(jnp.sin(out[0])), (out, last)

    @jax.jit
    def results(inputs, state):
        if implementation is None:
            return None, loss(inputs, state)[1]
        gradients, outputs = jax.grad(loss, has_aux=True)(inputs, state)
        return jax.tree.map(lambda x: x[0], gradients), outputs

    gradients, (out, last) = results(inputs, nan_state)
    want_gradients, (want, want_last) = results(inputs, jax.tree.map(np.zeros_like, nan_state))
    got = out[0], out[1, 6:], last, gradients
    assert_trees_close(got, (want[0], want[1, 6:], want_last, want_gradients), 1e-6)
    assert np.isnan(out[1, :6][..., 0]).all()


def test_a_reset_of_linear_scan_ends_the_effect_of_nan_inputs_in_the_same_chunk(monkeypatch):
    monkeypatch.setattr(vector_state, "CHUNK", 8)
    (decay, new), reset = function_and_state("linear_scan")[1], np.arange(T)[None].repeat(B, 0) == 5
    with_nan = np.where(np.arange(T)[None, :, None] == 2, np.float32(np.nan), new)
    for implementation in ("reference", "sequential", "chunked"):
        scan = jax.jit(lambda x, name=implementation: linear_scan(decay, x, reset_BT=reset, implementation=name)[0])
        assert_trees_close(scan(with_nan)[:, 5:], scan(new)[:, 5:], 1e-6)


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_a_reset_of_mlstm_ends_the_effect_of_nan_gates_in_an_earlier_chunk(implementation):
    run, (q, k, v, log_input, log_forget), _ = function_and_state("mlstm")
    reset = np.arange(T)[None].repeat(B, 0) == 8
    cell = jax.jit(lambda gate: run(q, k, v, gate, log_forget, reset_BT=reset, implementation=implementation))
    (out, last), (want, want_last) = (
        cell(np.where(np.arange(T)[None, :, None] == 2, np.float32(nan), log_input)) for nan in (np.nan, 0.0)
    )
    assert np.isnan(out[:, 2:8]).all()
    assert_trees_close((out[:, 8:], last), (want[:, 8:], want_last), 1e-6)

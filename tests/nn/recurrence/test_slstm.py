"""Tests of the sLSTM against the paper's equations without a stabilizer in float64, with gradients of all inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn import choices
from jaxlm.nn.cpu_choices import CpuChoices
from jaxlm.nn.recurrence import slstm, slstm_specs, slstm_state_specs
from jaxlm.nn.recurrence.slstm import STATE_NAMES
from jaxlm.nn.segments import segment_boundaries
from jaxlm.spec import Normal
from jaxlm.testing.helpers import assert_trees_close, initial_values, relative_error
from tests.nn.results import float64_results, random_masks, results

B, T, H, P = 2, 11, 2, 3


def arguments(strength=1.0):
    """Parameters, inputs, and a state. The normalizer of a state is positive."""
    specs = slstm_specs(H, P, Normal(0.7), Normal(0.5))
    params = initial_values(specs)
    rng = np.random.default_rng(1)
    state = {name: rng.standard_normal((B, H, P)).astype(np.float32) for name in STATE_NAMES}
    state["normalizer"] = 1.0 + np.abs(state["normalizer"])
    return jax.device_get(params), np.float32(strength * rng.standard_normal((B, T, H, 4, P))), state


def equations(params, projected, state, reset_BT=None, keep_BT=None):
    """Equations 8 to 10 of the paper with the gates themselves, and full matrices instead of blocks.

    The cell and the normalizer are those without a stabilizer. Equation 15 gives the stabilizer of the last state.
    """
    R = [jax.scipy.linalg.block_diag(*(params["weight_hidden"][h, :, gate] for h in range(H))) for gate in range(4)]
    reset_BT = np.zeros((B, T), bool) if reset_BT is None else reset_BT
    keep_BT = np.ones((B, T), bool) if keep_BT is None else keep_BT

    def step(old, inputs):
        projected, reset, real = inputs
        h, c, n, m = (jnp.where(reset[:, None, None], 0.0, x) for x in old)
        total = projected + params["bias"][None]
        gates = (total[:, :, gate] + (h.reshape(B, H * P) @ R[gate]).reshape(B, H, P) for gate in range(4))
        log_i, f, z, o = gates
        m = jnp.where(n == 0.0, log_i, jnp.maximum(jax.nn.log_sigmoid(f) + m, log_i))
        c = jax.nn.sigmoid(f) * c + jnp.exp(log_i) * jnp.tanh(z)
        n = jax.nn.sigmoid(f) * n + jnp.exp(log_i)
        h = jax.nn.sigmoid(o) * c / n
        new = tuple(jnp.where(real[:, None, None], x, y) for x, y in zip((h, c, n, m), old, strict=True))
        return new, new[0]

    m = state["stabilizer"]
    first = state["hidden"], jnp.exp(m) * state["cell"], jnp.exp(m) * state["normalizer"], m
    inputs_TB = tuple(jnp.swapaxes(x, 0, 1) for x in (projected, reset_BT, keep_BT))
    (h, c, n, m), steps_TB = jax.lax.scan(step, first, inputs_TB)
    return jnp.swapaxes(steps_TB, 0, 1), {
        "hidden": h, "cell": jnp.exp(-m) * c, "normalizer": jnp.exp(-m) * n, "stabilizer": m,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def chunks_of_four_steps(monkeypatch):
    monkeypatch.setattr(choices, "cpu_choices", lambda: CpuChoices(recurrence_chunk_rows=4 * B))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_all_gradients_equal_those_of_the_equations(masked, monkeypatch):
    options = random_masks(B, T) if masked else {}
    want = float64_results(equations, arguments(), **options)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    assert_trees_close(results(slstm, arguments(), **options, implementation="reference"), want, 3e-6)
    for rows in (4 * B, 512):  # two full chunks and a partial chunk; one chunk
        monkeypatch.setattr(choices, "cpu_choices", lambda rows=rows: CpuChoices(recurrence_chunk_rows=rows))
        assert_trees_close(results(slstm, arguments(), **options), want, 3e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_strong_gates(implementation):
    """Gates from exp(-100) to exp(100). The state is computed without a stabilizer in float64."""
    params, projected, state = arguments(40.0)
    got = results(slstm, (params, projected, state), implementation=implementation)
    assert_trees_close(got, float64_results(equations, (params, projected, state)), 1e-5, floor=0.1)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_extreme_gates_have_finite_values_and_gradients(gate, implementation):
    params, projected, state = arguments()
    signs = np.random.default_rng(1).choice([0.0, 1.0], projected.shape)
    projected = np.float32(projected + gate * signs)
    state = jax.tree.map(np.zeros_like, state)
    got = results(slstm, (params, projected, state), implementation=implementation, **random_masks(B, T))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_the_first_output_of_a_document_does_not_depend_on_its_gates():
    """``c_1 / n_1`` is z_1, also if both gates are nearly 0: then a stabilizer of 0 would give 0 / 0."""
    params, projected, _ = arguments()
    projected[:, :, :, 0] -= 1000.0
    reset_BT = np.zeros((B, T), bool)
    reset_BT[:, 5] = True
    hidden, _ = jax.jit(slstm)(params, projected, reset_BT=reset_BT)
    total = projected + params["bias"]
    first = np.tanh(total[:, :, :, 2]) / (1 + np.exp(-total[:, :, :, 3]))
    assert relative_error(np.asarray(hidden)[:, [0, 5]], first[:, [0, 5]]) < 1e-6


def test_single_steps_give_the_same_states():
    params, projected, state = arguments()
    want, want_last = jax.device_get(jax.jit(slstm)(params, projected, state))
    layer = jax.jit(slstm)
    for t in range(T):
        _, state = layer(params, projected[:, t : t + 1], state)
        assert relative_error(state["hidden"], want[:, t]) < 1e-6
    assert_trees_close(state, want_last, 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(implementation):
    segments = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 0, 1, 1, 1, 2, 0, 2, 2, 2, 0]])
    reset_BT, keep_BT, _ = map(np.asarray, jax.jit(segment_boundaries)(segments))
    params, without_nan, _ = arguments()
    with_nan = np.where(keep_BT[:, :, None, None, None], without_nan, np.float32(np.nan))
    layer = jax.jit(functools.partial(slstm, implementation=implementation))

    def loss(params, projected):
        out, last = layer(params, projected, reset_BT=reset_BT, keep_BT=keep_BT)
        return jnp.sum(jnp.sin(jnp.where(keep_BT[:, :, None, None], out, 0.0))), (out, last)

    gradients, (out, last) = jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, with_nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out, last)))
    assert (gradients[1][~keep_BT] == 0.0).all()
    assert np.array_equal(out[:, -1], last["hidden"]), "at padding, the output is the unchanged hidden state"
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = layer(params, without_nan[row : row + 1, index])
            assert relative_error(out[row : row + 1, index], separate) < 1e-6
        assert_trees_close(jax.tree.map(lambda x, row=row: x[row : row + 1], last), separate_last, 1e-6)


def test_bfloat16_keeps_a_float32_state():
    params, projected, state = arguments()
    (out, last), gradients = results(slstm, (params, projected.astype(jnp.bfloat16), state))
    assert out.dtype == gradients[1].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((last, gradients[0]))} == {jnp.dtype("float32")}
    rounded = projected.astype(jnp.bfloat16).astype(np.float32)
    assert_trees_close(((out, last), gradients), float64_results(equations, (params, rounded, state)), 0.05)


def test_only_inputs_and_one_state_per_chunk_are_saved():
    params, projected, state = arguments()
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(slstm, *arguments)[1], params, projected, state)
    saved = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert saved <= projected.size + spec.count(params) + 4 * spec.count(slstm_state_specs(B, H, P))


def test_bad_inputs_raise():
    params, projected, state = arguments()
    with pytest.raises(
        ValueError,
        match=r"the input \[2, 11, 2, 3, 3\] must be .* heads, gates and width of the parameters, \[2, 4, 3\]",
    ):
        slstm(params, projected[:, :, :, :3])
    with pytest.raises(ValueError, match="at least one step"):
        slstm(params, projected[:, :0])
    with pytest.raises(ValueError, match=r"'cell' of the state is \[2, 2, 2\]: it must be \[2, 2, 3\]"):
        slstm(params, projected, {**state, "cell": state["cell"][..., :2]})
    with pytest.raises(ValueError, match=r"reset_BT \[2, 3\] must be \[batch, time\] of the input, \[2, 11\]"):
        slstm(params, projected, reset_BT=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="no slstm implementation 'fast': choose from reference, chunked"):
        slstm(params, projected, implementation="fast")

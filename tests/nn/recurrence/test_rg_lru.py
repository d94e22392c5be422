"""Tests of the RG-LRU against the paper's equations as a loop over steps in float64, with gradients of all inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.recurrence import rg_lru, rg_lru_specs
from jaxlm.nn.recurrence.rg_lru import MAX_SQRT_SLOPE, DecayInit
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import add_noise, assert_trees_close, initial_values, relative_error
from tests.nn.results import results

B, T, W, N = 2, 13, 12, 3
IMPLEMENTATIONS = ("reference", "sequential", "chunked")
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 0, 1, 0, 1, 2, 0, 3, 3, 3, 3, 0, 0]], np.int32)


def arguments():
    params = initial_values(rg_lru_specs(W, N))
    x, state = (np.random.default_rng(1).standard_normal(shape).astype(np.float32) for shape in ((B, T, W), (B, W)))
    return jax.device_get(add_noise(params)), 2.0 * x, state


def equations(params, x_BTW, state_BW, start_BT, keep_BT):
    """Equations 1 to 4 of the paper, with full matrices instead of blocks. Padding does not change the state."""
    blocks = params["recurrence_gate"]["weight"].shape[0]

    def gate(name, x_BW):
        weight, bias = params[name]["weight"], params[name]["bias"]
        matrix = jax.scipy.linalg.block_diag(*(weight[block] for block in range(blocks)))
        return jax.nn.sigmoid(x_BW @ matrix + bias.reshape(1, -1))

    def step(state_BW, inputs):
        x_BW, start_B, keep_B = inputs
        start_B1, keep_B1 = start_B[:, None], keep_B[:, None]
        a = jax.nn.sigmoid(-params["lambda"])[None] ** (8.0 * gate("recurrence_gate", x_BW))
        scale = jnp.where(start_B1, 1.0, jnp.sqrt(1.0 - a**2))
        new = a * jnp.where(start_B1, 0.0, state_BW) + scale * (gate("input_gate", x_BW) * x_BW)
        state_BW = jnp.where(keep_B1, new, state_BW)
        return state_BW, state_BW

    inputs_TB = tuple(jnp.swapaxes(x, 0, 1) for x in (x_BTW, start_BT, keep_BT))
    state_BW, steps_TB = jax.lax.scan(step, state_BW, inputs_TB)
    return jnp.swapaxes(steps_TB, 0, 1), state_BW


def masks(kind, with_state):
    """Document starts and real steps for the equations, and the mask arguments of ``rg_lru``."""
    last = np.array([1, 1]) if with_state else None
    segments = SEGMENTS if kind == "documents" else np.ones_like(SEGMENTS)
    boundaries = jax.jit(functools.partial(segment_boundaries, include_first=True))
    start, keep, _ = map(np.asarray, boundaries(segments, last))
    if kind == "documents":
        return start, keep, {"reset_BT": start, "keep_BT": keep}
    return start, keep, {}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", ["one document", "documents"])
def test_values_and_all_gradients_equal_the_equations(kind, with_state):
    start, keep, options = masks(kind, with_state)
    inputs = arguments() if with_state else arguments()[:2]
    with jax.enable_x64(True):
        inputs64 = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        zeros = (np.zeros((B, W)),) if not with_state else ()
        want = results(lambda *given: equations(*given, *zeros, start, keep), inputs64)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
    for implementation in IMPLEMENTATIONS:
        got = results(lambda *given: rg_lru(*given, **options, implementation=implementation), inputs)  # noqa: B023
        assert_trees_close(got, want, 5e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_calls_and_single_steps_equal_one_call(implementation):
    params, x, _ = arguments()
    layer = jax.jit(functools.partial(rg_lru, implementation=implementation))
    want, want_last = jax.device_get(layer(params, x))
    state, outputs = None, []
    for chunk in (slice(0, 1), slice(1, 8), slice(8, T)):
        out, state = layer(params, x[:, chunk], state)
        outputs.append(out)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(state, want_last) < 1e-6
    state = np.full((B, W), 7.0, np.float32)  # the first step of a document does not read the state
    for t in range(T):
        _, state = layer(params, x[:, t : t + 1], state, reset_BT=np.full((B, 1), t == 0))
        assert relative_error(state, want[:, t]) < 1e-6


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(implementation):
    params, x, _ = arguments()
    # Without the starts of the first documents: the state is None.
    reset, keep, _ = map(np.asarray, jax.jit(segment_boundaries)(SEGMENTS))

    def loss(params, x):
        out, last = rg_lru(params, x, reset_BT=reset, keep_BT=keep, implementation=implementation)
        return jnp.sum(jnp.sin(jnp.where(keep[:, :, None], out, 0.0))), (out, last)

    with_nan = np.where(keep[:, :, None], x, np.float32(np.nan))
    gradients, (out, last) = jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, with_nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out, last)))
    assert (gradients[1][~keep] == 0.0).all()
    layer = jax.jit(rg_lru)
    for row in range(B):
        for document in range(1, SEGMENTS[row].max() + 1):
            index = np.flatnonzero(SEGMENTS[row] == document)
            separate, separate_last = layer(params, x[row : row + 1, index])
            assert relative_error(out[row : row + 1, index], separate) < 1e-6
        assert relative_error(last[row : row + 1], separate_last) < 1e-6


def test_a_decay_of_one_has_finite_gradients():
    """With a closed recurrence gate, the decay is 1: the state does not change, and the input scale is 0."""
    params, x, state = arguments()
    params["recurrence_gate"]["bias"] = np.full((N, W // N), -1e4, np.float32)

    def loss(params, x, state):
        out, _ = rg_lru(params, x, state)
        return jnp.sum(out), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, state)
    assert np.array_equal(out, np.broadcast_to(state[:, None], x.shape))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_weak_decay_keeps_its_digits():
    """With decay 1 - 5e-7, ``sqrt(1 - decay^2)`` in float32 would have an error of 3 %."""
    params, x, state = arguments()
    params = {**params, "lambda": np.full(W, -16.0, np.float32)}
    params["recurrence_gate"] = jax.tree.map(np.zeros_like, params["recurrence_gate"])
    out, _ = jax.jit(rg_lru)(params, x, np.zeros_like(state))
    with jax.enable_x64(True):
        params64, x64 = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, x))
        masks64 = np.zeros((B, T), bool), np.ones((B, T), bool)
        want, _ = jax.jit(equations)(params64, x64, np.zeros((B, W)), *masks64)
    assert relative_error(out, want) < 2e-6


def test_the_slope_of_the_scale_is_bounded():
    """One step from a zero state: d output / d gate bias = slope * d(1 - a^2) / d bias, with a bounded slope."""
    params, x, _ = arguments()
    params = {**params, "lambda": np.full(W, -40.0, np.float32)}  # 1 - a^2 is about 1e-17 in exact arithmetic
    zero = {name: jax.tree.map(np.zeros_like, params[name]) for name in ("recurrence_gate", "input_gate")}
    params = {**params, **zero}

    def out(bias):
        gate = {**zero["recurrence_gate"], "bias": bias}
        return rg_lru({**params, "recurrence_gate": gate}, x[:, :1], jnp.zeros((B, W)))[1].sum()

    got = jax.jit(jax.grad(out))(np.zeros((N, W // N), np.float32))
    d_square = 16.0 * np.log1p(np.exp(-40.0)) * 0.25  # d(1 - a^2) / d bias at gate 0.5
    want = MAX_SQRT_SLOPE * d_square * np.sum(x[:, 0] * 0.5, axis=0).reshape(N, W // N)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_a_float32_state(implementation):
    params, x, state = arguments()
    run = lambda x: results(lambda *given: rg_lru(*given, implementation=implementation), (params, x, state))  # noqa: E731
    (out, last), gradients = run(x.astype(jnp.bfloat16))
    assert (out.dtype, last.dtype, gradients[1].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert_trees_close(((out, last), gradients), run(x), 0.03)


def test_initial_decays_are_in_the_ring():
    values = DecayInit()(jax.random.key(0), (4000,), jnp.float32)
    decay = np.exp(-np.asarray(jax.nn.softplus(values)))
    assert 0.8999 < decay.min() < 0.901
    assert 0.998 < decay.max() < 0.9991
    assert np.mean(decay**2) == pytest.approx((0.9**2 + 0.999**2) / 2, abs=3e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTW": np.ones((B, T, 7), np.float32)}, r"x \[2, 13, 7\] must be \[batch, time, width\] with the width 12"),
        ({"state_BW": np.ones((B, 5), np.float32)}, r"state_BD \[2, 5\] must be"),
        ({"reset_BT": np.ones((B, 5), bool)}, r"reset_BT \[2, 5\] must be \[batch, time\] of the input"),
        ({"implementation": "fast"}, "no linear_scan implementation 'fast'"),
    ],
)
def test_wrong_arguments_raise(change, message):
    params, x, state = arguments()
    with pytest.raises(ValueError, match=message):
        rg_lru(params, **{"x_BTW": x, "state_BW": state, **change})


def test_blocks_must_divide_the_width():
    with pytest.raises(ValueError, match="blocks=5 must divide width=12"):
        rg_lru_specs(12, 5)

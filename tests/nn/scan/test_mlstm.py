"""Tests of the mLSTM cell against the equations without a stabilizer in float64: gradients, state, documents, gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import Chunked, linear_attention, mlstm
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.nn.results import float64_results, random_masks, results

B, T, H, K, V = 2, 11, 2, 3, 4
EPSILON = 1e-2  # larger than in published models, so that its gradients are visible


def arrays(strength=1.0, seed=0):
    """Queries, keys, values, log input gates, log forget gates, and an initial state."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H), (B, H, K, V), (B, H, K), (B, H)]
    q, k, v, i, f, cell, normalizer, m = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    state = {"cell": cell, "normalizer": normalizer, "stabilizer": m}
    return q, k, v, np.float32(strength) * i, -np.logaddexp(np.float32(0), np.float32(-strength) * f), state


def plain_loop(q, k, v, log_i, log_f, state, reset_BT=None, keep_BT=None):
    """Equations 19 to 21 of the paper with the gates themselves, as a loop over steps. Only epsilon needs m."""
    reset_BT = np.zeros(q.shape[:2], bool) if reset_BT is None else reset_BT
    keep_BT = np.ones(q.shape[:2], bool) if keep_BT is None else keep_BT

    def step(old, inputs):
        q, k, v, log_i, log_f, reset, real = inputs
        C, n, m = (jnp.where(jnp.expand_dims(reset, range(1, x.ndim)), 0.0, x) for x in old)
        i, f = jnp.exp(log_i), jnp.exp(log_f)
        C = f[..., None, None] * C + i[..., None, None] * k[..., None] * v[:, :, None]
        n = f[..., None] * n + i[..., None] * k
        m = jnp.maximum(log_f + m, log_i)
        divisor = jnp.maximum(jnp.abs(jnp.sum(q * n, axis=-1)), 1.0) + EPSILON * jnp.exp(m)
        out = jnp.sum(q[..., None] * C, axis=2) / divisor[..., None]
        new = tuple(
            jnp.where(jnp.expand_dims(real, range(1, x.ndim)), x, y) for x, y in zip((C, n, m), old, strict=True)
        )
        return new, jnp.where(real[:, None, None], out, 0.0)

    m = state["stabilizer"]
    first = jnp.exp(m)[..., None, None] * state["cell"], jnp.exp(m)[..., None] * state["normalizer"], m
    inputs_TB = (jnp.swapaxes(x, 0, 1) for x in (q, k, v, log_i, log_f, reset_BT, keep_BT))
    (C, n, m), out_TB = jax.lax.scan(step, first, tuple(inputs_TB))
    last = {
        "cell": jnp.exp(-m)[..., None, None] * C, "normalizer": jnp.exp(-m)[..., None] * n, "stabilizer": m,
    }  # fmt: skip
    return jnp.swapaxes(out_TB, 0, 1), last


CELL = functools.partial(mlstm, epsilon=EPSILON)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_all_gradients_equal_those_of_the_equations(masked):
    arguments, options = arrays(), random_masks(B, T) if masked else {}
    want = float64_results(plain_loop, arguments, **options)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    assert_trees_close(results(CELL, arguments, **options, implementation="reference"), want, 3e-6)
    for chunk in (1, 4, 64):  # two full chunks and a partial chunk; one chunk that is reduced to a power of two
        got = results(CELL, arguments, **options, implementation=Chunked(chunk))
        assert_trees_close(got, want, 5e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", Chunked(16)])
@pytest.mark.parametrize("strength", [10.0, 100.0])
def test_strong_gates(strength, implementation):
    """Gates from exp(-250) to exp(250) in one chunk: in float64 without a stabilizer, in float32 with a stabilizer."""
    arguments = arrays(strength)
    want = float64_results(plain_loop, arguments)
    got = results(CELL, arguments, implementation=implementation)
    # The gradients of the initial state are nearly 0. Rounding a gate of 250 changes its exponential by 1e-5.
    assert_trees_close(got, want, 1e-5, floor=0.1)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
@pytest.mark.parametrize("gate", [-1e4, -100.0, 1e4])
def test_extreme_gates_have_finite_values_and_gradients(gate, implementation):
    q, k, v, log_i, log_f, state = arrays()
    signs = np.random.default_rng(1).choice(np.float32([0.0, 1.0]), log_i.shape)
    arguments = (q, k, v, log_i + gate, log_f - signs * abs(gate), jax.tree.map(np.zeros_like, state))
    (out, last), gradients = results(CELL, arguments, implementation=implementation, **random_masks(B, T))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, last, gradients)))
    if gate < 0:
        assert np.abs(out).max() < 1e-30  # the input gate is 0
    else:
        assert np.abs(out).max() > 0.1


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_two_gates_of_zero_reset_the_state(implementation):
    q, k, v = np.ones((3, 1, 5, 1, 1), np.float32)
    log_gate = np.float32([0.0, 0.0, -np.inf, 0.0, 0.0]).reshape(1, 5, 1)

    def total(*arguments):
        out, last = mlstm(*arguments, epsilon=0.0, implementation=implementation)
        return jnp.sum(out), (out, last["normalizer"])

    arguments = (q, 2.0 * k, v, log_gate, log_gate)
    gradients, (out, normalizer) = jax.jit(jax.grad(total, range(5), has_aux=True))(*arguments)
    assert (out.ravel().tolist(), float(normalizer.ravel()[0])) == ([1.0, 1.0, 0.0, 1.0, 1.0], 4.0)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_the_output_of_large_gates_is_a_normalized_mean(implementation):
    """With ``q = k`` and positive normalizers, the output is a weighted mean of the values: it is in their range."""
    _, k, v, log_i, log_f, _ = arrays(5.0)
    k = np.broadcast_to(np.abs(k[:, :1]), k.shape)
    cell = jax.jit(functools.partial(mlstm, epsilon=0.0, implementation=implementation))
    out = np.asarray(cell(k, k, v, log_i + 60.0, log_f)[0])
    assert (out <= np.maximum.accumulate(v, axis=1) + 1e-5).all()
    assert (out >= np.minimum.accumulate(v, axis=1) - 1e-5).all()
    assert relative_error(out[:, 0], v[:, 0]) < 1e-6


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_padding_after_large_gates_is_zero_without_epsilon(implementation):
    q, k, v, log_i, log_f, _ = arrays()
    keep = random_masks(B, T)["keep_BT"]

    def loss(*arguments):
        out, _ = mlstm(*arguments, keep_BT=keep, epsilon=0.0, implementation=implementation)
        return jnp.sum(out**2), out

    value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    (_, out), gradients = value_and_gradients(q, k, v, log_i + 150.0, log_f)
    assert not np.asarray(out)[~keep].any()
    assert all(np.isfinite(leaf).all() for leaf in (out, *gradients))


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_small_input_gates_give_linear_attention(implementation):
    """If ``|q @ n|`` is below 1, the divisor is 1 and the mLSTM is linear attention with keys ``i k``."""
    q, k, v, log_i, log_f, _ = arrays()
    log_i = log_i - 8.0
    got, _ = jax.jit(functools.partial(mlstm, epsilon=0.0, implementation=implementation))(q, k, v, log_i, log_f)
    attend = jax.jit(functools.partial(linear_attention, implementation="reference"))
    want, _ = attend(q, np.exp(log_i)[..., None] * k, v, log_f)
    assert relative_error(got, want) < 3e-6


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_several_calls_equal_one_call(implementation):
    *inputs, state = arrays()
    cell = jax.jit(functools.partial(CELL, implementation=implementation))
    want, want_last = cell(*inputs, state)
    outputs = []
    for steps in (slice(0, 1), slice(1, 2), slice(2, T)):
        out, state = cell(*(x[:, steps] for x in inputs), state)
        outputs.append(out)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 2e-6
    assert_trees_close(state, want_last, 2e-6)


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(implementation):
    segments = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 0, 1, 1, 1, 2, 0, 2, 2, 2, 0]])
    reset_BT, keep_BT, _ = map(np.asarray, jax.jit(segment_boundaries)(segments))
    *without_nan, _ = arrays(3.0)
    with_nan = [np.where(keep_BT.reshape(B, T, *(1,) * (x.ndim - 2)), x, np.float32(np.nan)) for x in without_nan]
    cell = jax.jit(functools.partial(CELL, implementation=implementation))

    def loss(*arguments):
        out, last = cell(*arguments, reset_BT=reset_BT, keep_BT=keep_BT)
        return jnp.sum(jnp.sin(out)), (out, last)

    gradients, (out, last) = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, range(5), has_aux=True))(*with_nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out, last)))
    assert all((leaf[~keep_BT] == 0.0).all() for leaf in (out, *gradients))
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = cell(*(x[row : row + 1, index] for x in without_nan))
            assert relative_error(out[row : row + 1, index], separate) < 2e-6
        assert_trees_close(jax.tree.map(lambda x, row=row: x[row : row + 1], last), separate_last, 2e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_bfloat16_keeps_a_float32_state(implementation):
    arguments = arrays()
    bfloat16_arguments = [x.astype(jnp.bfloat16) for x in arguments[:3]] + list(arguments[3:])
    rounded = [x.astype(np.float32) for x in bfloat16_arguments[:3]] + list(arguments[3:])
    (out, last), gradients = results(CELL, bfloat16_arguments, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(last)} == {jnp.dtype("float32")}
    assert [leaf.dtype for leaf in gradients[:5]] == [x.dtype for x in bfloat16_arguments[:5]]
    assert_trees_close(((out, last), gradients), float64_results(plain_loop, rounded), 0.05)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("log_forget", [-1.6, -8.0])
def test_the_gradient_of_a_strong_forget_gate_is_accurate_in_bfloat16(log_forget):
    q, k, v, log_i, log_f, state = arrays()
    q, k = np.abs(q), np.abs(k)  # with a normalizer near 0, the division would amplify rounding errors
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    arguments = [*rounded, 0.1 * log_i, np.full_like(log_f, log_forget), state]
    (_, got), (_, want) = (
        results(CELL, arguments, implementation=Chunked(4)),
        float64_results(plain_loop, arguments),
    )
    assert np.linalg.norm(got[4] - want[4]) < 0.01 * np.linalg.norm(want[4])


def test_a_long_text_keeps_its_precision():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2000, 1, 8)).astype(np.float32) for _ in range(3))
    q, k = np.abs(q), np.abs(k)  # with a normalizer near 0, the division would amplify rounding errors
    log_i = 5.0 * rng.standard_normal((1, 2000, 1)).astype(np.float32)
    log_f = np.log(rng.uniform(0.9, 1.0, (1, 2000, 1))).astype(np.float32)
    (reference, _), (chunked, _) = (
        jax.jit(functools.partial(mlstm, implementation=name))(q, k, v, log_i, log_f)
        for name in ("reference", "chunked")
    )
    assert np.isfinite(reference).all()
    assert relative_error(chunked, reference) < 3e-5


def test_saved_memory_is_linear_with_one_state_per_chunk():
    def saved(steps):
        shapes = (*((1, steps, 1, 32) for _ in range(3)), *((1, steps, 1) for _ in range(2)))
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        cell = functools.partial(mlstm, implementation=Chunked(64))
        residuals = jax.eval_shape(lambda *arguments: jax.vjp(cell, *arguments)[1], *arguments)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    growth = (saved(512) - saved(256)) / 256
    assert growth < 32 * 33 / 64 + 15 * 33  # a state per chunk, and a few vectors per step; a state per step is 1056


def test_bad_inputs_raise():
    q, k, v, log_i, log_f, state = arrays()
    with pytest.raises(ValueError, match=r"query \[2, 11, 2, 3\] and key \[2, 11, 2, 2\] must both be"):
        mlstm(q, k[..., :2], v, log_i, log_f)
    with pytest.raises(ValueError, match="at least one step"):
        mlstm(q[:, :0], k[:, :0], v[:, :0], log_i[:, :0], log_f[:, :0])
    with pytest.raises(ValueError, match=r"log_input \[2, 11, 2, 1\] must be \[batch, time, heads\], \[2, 11, 2\]"):
        mlstm(q, k, v, log_i[..., None], log_f)
    with pytest.raises(ValueError, match=r"log_forget \[2, 11\] must be \[batch, time, heads\], \[2, 11, 2\]"):
        mlstm(q, k, v, log_i, log_f[..., 0])
    with pytest.raises(ValueError, match=r"'cell' of the state is \[2, 2, 3, 3\]: it must be \[2, 2, 3, 4\]"):
        mlstm(q, k, v, log_i, log_f, {**state, "cell": state["cell"][..., :3]})
    with pytest.raises(ValueError, match=r"'stabilizer' of the state is missing: it must be \[2, 2\]"):
        mlstm(q, k, v, log_i, log_f, {name: state[name] for name in ("cell", "normalizer")})
    with pytest.raises(ValueError, match=r"reset_BT \[2, 3\] must be \[batch, time\] of the query, \[2, 11\]"):
        mlstm(q, k, v, log_i, log_f, reset_BT=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="no mlstm implementation 'fast': choose from reference, chunked"):
        mlstm(q, k, v, log_i, log_f, implementation="fast")


def test_long_rows_in_float16_do_not_overflow():
    ones = np.ones((1, 1536, 1, 64), np.float16)
    gates = np.zeros((1, 1536, 1), np.float32)
    out, _ = jax.jit(mlstm)(ones, ones, ones, gates, gates)
    assert np.allclose(np.asarray(out, np.float32), 1.0, atol=2e-3)

"""Tests of SSD against its two definitions: a state space model as a loop, and masked attention (quadratic)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import Chunked, ssd
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.nn.results import float64_results, results

B, T, H, P, G, N = 2, 21, 6, 3, 2, 4
NAMES = ("x", "dt", "A", "B", "C", "state")


def arrays(seed=1):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, G, N), (B, T, G, N), (B, H, N, P)]
    x, dt, A, b, c, state = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, np.log1p(np.exp(dt)), -np.exp(A), b, c, state


def masks():
    segments = np.array([[0] * 2 + [1] * 5 + [2] * 9 + [0] + [2] * 4, [1] * 9 + [0] * 3 + [1, 2, 3] * 3])
    reset_BT, keep_BT, _ = map(np.asarray, jax.jit(segment_boundaries)(segments))
    return {"reset_BT": reset_BT, "keep_BT": keep_BT}


def recurrence(x, dt, A, b, c, state, reset_BT=None, keep_BT=None, negative_eigenvalues=False):
    """Equation 2 of the paper, with ``exp(dt A)`` and ``dt B`` as discretized parameters, as a loop over steps."""
    b, c = (jnp.repeat(y, H // G, axis=2) for y in (b, c))
    reset_BT = np.zeros((B, T), bool) if reset_BT is None else reset_BT
    keep_BT = np.ones((B, T), bool) if keep_BT is None else keep_BT

    def step(state, inputs):
        x, dt, b, c, reset, real = inputs
        before = jnp.where(reset[:, None, None, None], 0.0, state)
        decay = jnp.exp(dt * A[None])
        decay = 2 * decay - 1 if negative_eigenvalues else decay
        after = decay[..., None, None] * before + dt[..., None, None] * b[..., None] * x[:, :, None]
        y = jnp.einsum("BHN,BHNP->BHP", c, after)
        return jnp.where(real[:, None, None, None], after, state), jnp.where(real[:, None, None], y, 0.0)

    inputs_TB = tuple(jnp.swapaxes(y, 0, 1) for y in (x, dt, b, c, reset_BT, keep_BT))
    state, outputs_TB = jax.lax.scan(step, state, inputs_TB)
    return jnp.swapaxes(outputs_TB, 0, 1), state


def masked_attention(x, dt, A, b, c):
    """The dual form (section 5): ``(L * C B.T) (dt x)`` with the products of decays ``L[t, s]``."""
    b, c = (np.repeat(y, H // G, axis=2) for y in (b, c))
    total_BTH = np.cumsum(dt * A, axis=1)
    L = np.tril(np.ones((T, T)))[None, ..., None] * np.exp(total_BTH[:, :, None] - total_BTH[:, None])
    return np.einsum("BTSH,BTHN,BSHN,BSHP->BTHP", L, c, b, dt[..., None] * x, optimize=True)


@functools.cache
def expected(masked, **options):
    """The results of the loop in float64."""
    arguments, options = arrays(), {**options, **(masks() if masked else {})}
    return float64_results(recurrence, arguments, **options)


@pytest.mark.plain_cases(3)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4), Chunked(16), Chunked(64), None])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_all_gradients_equal_the_recurrence(masked, implementation):
    got = results(ssd, arrays(), **(masks() if masked else {}), implementation=implementation)
    assert_trees_close(got, expected(masked), 3e-6)


@pytest.mark.parametrize("options", [{"implementation": "reference"}, {"implementation": Chunked(4)}])
@pytest.mark.parametrize("masked", [False, True])
def test_negative_eigenvalues(masked, options):
    """Values and gradients equal the recurrence with the decay ``2 exp(dt A) - 1``."""
    got = results(ssd, arrays(), negative_eigenvalues=True, **(masks() if masked else {}), **options)
    want = expected(masked, negative_eigenvalues=True)
    assert_trees_close(got, want, 3e-6)
    assert relative_error(expected(masked)[0][0], want[0][0]) > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_the_gradient_of_negative_eigenvalues_is_accurate_for_decays_near_zero(dtype, tolerance):
    x, dt, A, b, c, state = arrays()
    half = [np.asarray(jnp.asarray(y, dtype).astype(jnp.float32)) for y in (x, b, c)]  # rounded
    dt[:, ::3] = -np.log(np.float32([0.5, 0.5 + 1e-6, 0.5 - 1e-4]))[np.arange(7) % 3][None, :, None] / -A
    function = functools.partial(ssd, negative_eigenvalues=True)
    got = results(function, [half[0].astype(dtype), dt, A, half[1].astype(dtype), half[2].astype(dtype), state])[1]
    want = results(recurrence, [half[0], dt, A, *half[1:], state], negative_eigenvalues=True)[1]
    for name, x, y in zip(NAMES, got, want, strict=True):
        if name in ("dt", "A"):
            assert np.linalg.norm(x - y) / np.linalg.norm(y) < tolerance, name


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_one_state_per_chunk_is_saved(negative_eigenvalues):
    """If the text gets longer, the saved memory grows by the inputs and one state per chunk. No arrays are computed."""
    state = 2 * 16 * 16

    def saved(steps, implementation):
        shapes = [(1, steps, 2, 16), (1, steps, 2), (2,), (1, steps, 1, 16), (1, steps, 1, 16), (1, 2, 16, 16)]
        run = functools.partial(ssd, negative_eigenvalues=negative_eigenvalues, implementation=implementation)
        arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        residuals = jax.eval_shape(lambda *arguments: jax.vjp(run, *arguments)[1], *arguments)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    def growth(implementation):
        return (saved(512, implementation) - saved(256, implementation)) / 256

    assert growth(Chunked(32)) - growth(Chunked(64)) == state / 32 - state / 64
    assert growth(Chunked(64)) - state / 64 < 2 * (2 * 16 + 2 + 16 + 16)  # the inputs, at most twice
    assert growth("reference") > state


def test_the_reference_multiplies_by_the_step_sizes_in_float32():
    """Also with negative eigenvalues, bfloat16 inputs are not rounded again."""
    x, dt, A, b, c, state = arrays()
    x, b, c = (y.astype(jnp.bfloat16) for y in (x, b, c))
    run = jax.jit(functools.partial(ssd, negative_eigenvalues=True, implementation="reference"))
    y, last = run(x, dt, A, b, c, state)
    assert y.dtype == jnp.bfloat16
    assert relative_error(last, run(*(z.astype(np.float32) for z in (x, dt, A, b, c)), state)[1]) < 1e-6


def test_the_dual_form_is_the_same_function():
    *inputs, _ = arrays()
    assert relative_error(jax.jit(ssd)(*inputs)[0], masked_attention(*inputs)) < 3e-6


def test_chunks_of_a_text_equal_the_text():
    x, dt, A, b, c, state = arrays()
    run, outputs = jax.jit(ssd), []
    for start, stop in ((0, 1), (1, 2), (2, 13), (13, T)):
        part = slice(start, stop)
        y, state = run(x[:, part], dt[:, part], A, b[:, part], c[:, part], state)
        outputs.append(y)
    want, last = run(*arrays())
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(state, last) < 1e-6


def test_groups_equal_repeated_groups():
    x, dt, A, b, c, state = arrays()
    repeated = (np.repeat(y, H // G, axis=2) for y in (b, c))
    assert_trees_close(jax.jit(ssd)(x, dt, A, b, c, state), jax.jit(ssd)(x, dt, A, *repeated, state), 1e-6)


def test_the_state_is_float32_in_bfloat16():
    x, dt, A, b, c, state = arrays()
    half = (x.astype(jnp.bfloat16), dt, A, b.astype(jnp.bfloat16), c.astype(jnp.bfloat16), state)
    outputs, gradients = results(ssd, half, **masks())
    assert [leaf.dtype for leaf in outputs] == [jnp.bfloat16, jnp.float32]
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in half]
    assert_trees_close((outputs, gradients), expected(True), 0.03)


def test_bad_shapes_raise():
    x, dt, A, b, c, state = arrays()
    message = r"x \[2, 21, 6, 3\] must be .*, dt \[2, 21, 5\] must be \[batch, time, heads\], and A"
    with pytest.raises(ValueError, match=message):
        ssd(x, dt[..., :5], A, b, c)
    with pytest.raises(ValueError, match=r"and A \[5\] must be \[heads\]"):
        ssd(x, dt, A[:5], b, c)
    with pytest.raises(ValueError, match=r"B \[2, 21, 2, 3\] and C \[2, 21, 2, 4\] must both be"):
        ssd(x, dt, A, b[..., :3], c)
    with pytest.raises(ValueError, match="the number of groups must divide the 6 heads of x"):
        ssd(x, dt, A, np.repeat(b, 2, axis=2), np.repeat(c, 2, axis=2))
    message = r"B \[2, 21, 2, 4\] and C \[2, 21, 2, 4\] must .* the batch and time of x \[2, 20, 6, 3\]"
    with pytest.raises(ValueError, match=message):
        ssd(x[:, :20], dt[:, :20], A, b, c)
    with pytest.raises(ValueError, match=r"x \[2, 0, 6, 3\] must be .*, with at least one step"):
        ssd(x[:, :0], dt[:, :0], A, b[:, :0], c[:, :0])
    with pytest.raises(ValueError, match=r"keep_BT \[2, 20\] must be \[batch, time\] of the input, \[2, 21\]"):
        ssd(x, dt, A, b, c, keep_BT=np.ones((2, 20), bool))
    with pytest.raises(ValueError, match=r"state \[2, 6, 3, 4\] must be \[batch, heads, state size, width\]"):
        ssd(x, dt, A, b, c, state.swapaxes(2, 3))

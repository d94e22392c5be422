"""Tests of SSD against its two definitions: a state space model as a loop, and masked attention (quadratic)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import ssd
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, relative_error

B, T, H, P, G, N = 2, 21, 6, 3, 2, 4
NAMES = ("x", "dt", "A", "B", "C", "state")


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, G, N), (B, T, G, N), (B, H, N, P)]
    x, dt, A, b, c, state = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, jax.nn.softplus(dt), -jnp.exp(A), b, c, state


def masks():
    segments = jnp.array([[0] * 2 + [1] * 5 + [2] * 9 + [0] + [2] * 4, [1] * 9 + [0] * 3 + [1, 2, 3] * 3])
    reset_BT, keep_BT, _ = segment_boundaries(segments)
    return {"reset_BT": reset_BT, "keep_BT": keep_BT}


def recurrence(x, dt, A, b, c, state, reset_BT=None, keep_BT=None, negative_eigenvalues=False):
    """Equation 2 of the paper, with ``exp(dt A)`` and ``dt B`` as discretized parameters, as a loop over steps."""
    b, c = (jnp.repeat(y, H // G, axis=2) for y in (b, c))
    outputs = []
    for t in range(T):
        before = state if reset_BT is None else jnp.where(reset_BT[:, t, None, None, None], 0.0, state)
        new = dt[:, t, :, None, None] * b[:, t, :, :, None] * x[:, t, :, None, :]
        decay = jnp.exp(dt[:, t] * A[None])
        decay = 2 * decay - 1 if negative_eigenvalues else decay
        after = decay[..., None, None] * before + new
        y = jnp.einsum("BHN,BHNP->BHP", c[:, t], after)
        real_B = jnp.ones(B, bool) if keep_BT is None else keep_BT[:, t]
        state = jnp.where(real_B[:, None, None, None], after, state)
        outputs.append(jnp.where(real_B[:, None, None], y, 0.0))
    return jnp.stack(outputs, axis=1), state


def masked_attention(x, dt, A, b, c):
    """The dual form (section 5): ``(L * C B.T) (dt x)`` with the products of decays ``L[t, s]``."""
    b, c = (jnp.repeat(y, H // G, axis=2) for y in (b, c))
    total_BTH = jnp.cumsum(dt * A[None, None], axis=1)
    L = jnp.exp(total_BTH[:, :, None] - total_BTH[:, None]) * jnp.tril(jnp.ones((T, T)))[None, ..., None]
    return jnp.einsum("BTSH,BTHN,BSHN,BSHP->BTHP", L, c, b, dt[..., None] * x)


def results(function, arguments, **options):
    """The outputs and the gradients of all inputs; the last state is part of the loss."""

    def loss(*arguments):
        outputs = function(*arguments, **options)
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in outputs), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, range(6), has_aux=True))(*arguments)
    return outputs, dict(zip(NAMES, gradients, strict=True))


@functools.cache
def expected(masked, **options):
    """The results of the loop in float64."""
    arguments, options = arrays(), {**options, **(masks() if masked else {})}
    with jax.enable_x64(True):
        return results(recurrence, [jnp.asarray(np.asarray(x), jnp.float64) for x in arguments], **options)


@pytest.mark.plain_cases(3)
@pytest.mark.parametrize("options", [{"implementation": "reference"}, {"chunk": 4}, {"chunk": 16}, {"chunk": 64}, {}])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_all_gradients_equal_the_recurrence(masked, options):
    got = results(ssd, arrays(), **(masks() if masked else {}), **options)
    assert_trees_close(got, expected(masked), 3e-6)


@pytest.mark.parametrize("options", [{"implementation": "reference"}, {"chunk": 4}])
@pytest.mark.parametrize("masked", [False, True])
def test_negative_eigenvalues(masked, options):
    """Values and gradients equal the recurrence with the decay ``2 exp(dt A) - 1``."""
    got = results(ssd, arrays(), negative_eigenvalues=True, **(masks() if masked else {}), **options)
    want = expected(masked, negative_eigenvalues=True)
    assert_trees_close(got, want, 1e-4)  # decays close to 0 lose digits: the gradient of their logarithm is large
    assert relative_error(expected(masked)[0][0], want[0][0]) > 0.1


def test_a_decay_of_zero_has_a_finite_gradient():
    ones, A = jnp.ones((1, 4, 1, 1)), -jnp.log(jnp.array([2.0]))  # 2 * exp(A) - 1 = 0
    function = functools.partial(ssd, negative_eigenvalues=True)
    y, gradient = jax.value_and_grad(lambda dt: jnp.sum(function(ones, dt, A, ones, ones)[0]))(ones[..., 0])
    assert y == pytest.approx(4.0, abs=1e-5)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_the_dual_form_is_the_same_function():
    *inputs, _ = arrays()
    assert relative_error(ssd(*inputs)[0], masked_attention(*inputs)) < 3e-6


def test_chunks_of_a_text_equal_the_text():
    x, dt, A, b, c, state = arrays()
    outputs = []
    for start, stop in ((0, 1), (1, 2), (2, 13), (13, T)):
        part = slice(start, stop)
        y, state = ssd(x[:, part], dt[:, part], A, b[:, part], c[:, part], state)
        outputs.append(y)
    want, last = ssd(*arrays())
    assert relative_error(jnp.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(state, last) < 1e-6


def test_groups_equal_repeated_groups():
    x, dt, A, b, c, state = arrays()
    repeated = (jnp.repeat(y, H // G, axis=2) for y in (b, c))
    assert_trees_close(ssd(x, dt, A, b, c, state), ssd(x, dt, A, *repeated, state), 1e-6)


def test_the_state_is_float32_in_bfloat16():
    x, dt, A, b, c, state = arrays()
    half = (x.astype(jnp.bfloat16), dt, A, b.astype(jnp.bfloat16), c.astype(jnp.bfloat16), state)
    outputs, gradients = results(ssd, half, **masks())
    assert [leaf.dtype for leaf in outputs] == [jnp.bfloat16, jnp.float32]
    assert [gradients[name].dtype for name in NAMES] == [leaf.dtype for leaf in half]
    assert_trees_close((outputs, gradients), expected(True), 0.03)


def test_bad_shapes_raise():
    x, dt, A, b, c, state = arrays()
    with pytest.raises(ValueError, match=r"x \[2, 21, 6, 3\] must be .*, dt \[2, 21, 5\] \[batch, time, heads\] and A"):
        ssd(x, dt[..., :5], A, b, c)
    with pytest.raises(ValueError, match=r"and A \[5\] \[heads\]"):
        ssd(x, dt, A[:5], b, c)
    with pytest.raises(ValueError, match=r"B \[2, 21, 2, 3\] and C \[2, 21, 2, 4\] must both be"):
        ssd(x, dt, A, b[..., :3], c)
    with pytest.raises(ValueError, match="the number of groups must divide the 6 heads of x"):
        ssd(x, dt, A, jnp.repeat(b, 2, axis=2), jnp.repeat(c, 2, axis=2))
    with pytest.raises(ValueError, match=r"state \[2, 6, 3, 4\] must be \[batch, heads, key width, value width\]"):
        ssd(x, dt, A, b, c, state.swapaxes(2, 3))

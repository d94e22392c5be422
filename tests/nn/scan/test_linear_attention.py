"""Tests of linear attention with decay against a loop over steps in float64: gradients, state, documents, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import Chunked, linear_attention
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal, relative_error
from tests.nn.results import float64_results, random_masks, results

B, T, H, K, V = 2, 13, 2, 3, 4
DECAYS = ("head", "channel", "grouped")
"""One decay per head or per channel; grouped: one decay per head, and pairs of heads that share queries and keys."""


def arrays(decay, strength=1.0, seed=0):
    rng, heads = np.random.default_rng(seed), 2 * H if decay == "grouped" else H
    decays = (B, T, H, K) if decay == "channel" else (B, T, heads)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, heads, V), decays, (B, heads, K, V)]
    q, k, v, g, state = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v, -strength * np.exp(g), state


def reference_loop(q, k, v, log_decay, state, reset_BT=None, keep_BT=None):
    """The equations as a loop over steps."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    reset_BT = np.zeros((B, T), bool) if reset_BT is None else reset_BT
    keep_BT = np.ones((B, T), bool) if keep_BT is None else keep_BT

    def step(state, inputs):
        q, k, v, log_decay, reset, real = inputs
        factor = jnp.exp(log_decay)
        factor = factor[..., None, None] if factor.ndim == 2 else factor[..., None]
        new = factor * jnp.where(reset[:, None, None, None], 0.0, state) + k[..., None] * v[:, :, None]
        out = jnp.sum(q[..., None] * new, axis=2)
        return jnp.where(real[:, None, None, None], new, state), jnp.where(real[:, None, None], out, 0.0)

    inputs_TB = tuple(jnp.swapaxes(x, 0, 1) for x in (q, k, v, log_decay, reset_BT, keep_BT))
    state, out_TB = jax.lax.scan(step, state, inputs_TB)
    return jnp.swapaxes(out_TB, 0, 1), state


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_values_and_all_gradients_equal_those_of_the_loop(decay, masked):
    arguments, options = arrays(decay), random_masks(B, T) if masked else {}
    want = float64_results(reference_loop, arguments, **options)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    assert_trees_close(results(linear_attention, arguments, **options, implementation="reference"), want, 2e-6)
    for chunk in (4, 64):  # three full chunks and a partial chunk; one chunk that is reduced to a power of two
        got = results(linear_attention, arguments, **options, implementation=Chunked(chunk))
        assert_trees_close(got, want, 2e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_strong_and_weak_decays(decay):
    """One chunk has log decays whose sum is -1e4 (``exp(-sum)`` would overflow), weak decays, and decays of 0."""
    q, k, v, log_decay, state = arrays(decay)
    log_decay = log_decay * np.random.default_rng(1).choice(np.float32([0.0, 1e-3, 1.0, 1e3]), log_decay.shape)
    log_decay[:, 5] = -np.inf
    arguments = (q, k, v, log_decay, state)
    want = float64_results(reference_loop, arguments)
    for options in ({"implementation": "reference"}, {"implementation": Chunked(16)}):
        got = results(linear_attention, arguments, **options)
        assert_trees_close(got, want, 2e-6)
        assert (got[1][3][:, 5] == 0.0).all()


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_scales_multiply_the_new_values(implementation):
    q, k, v, log_decay, state = arrays("grouped")
    options = {"implementation": implementation, **random_masks(B, T)}

    def with_scale(q, k, v, scale, state):
        return linear_attention(q, k, v, log_decay, state, scale_BTH=scale, **options)

    def scaled_values(q, k, v, scale, state):
        scale = jnp.where(options["keep_BT"][..., None], scale, 0.0)
        return linear_attention(q, k, v * scale[..., None], log_decay, state, **options)

    scale = np.where(options["keep_BT"][..., None], np.sin(log_decay), np.float32(np.nan))  # NaN at padding
    arguments = (q, k, v, scale, state)
    assert_trees_close(results(with_scale, arguments), results(scaled_values, arguments), 1e-6)


@pytest.mark.parametrize("decay", ["head", "grouped"])
def test_the_reference_multiplies_by_the_scale_in_float32(decay):
    q, k, v, log_decay, state = arrays(decay)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    scale = np.exp(log_decay)
    attend = jax.jit(functools.partial(linear_attention, implementation="reference"))
    out, last = attend(q, k, v, log_decay, state, scale_BTH=scale)
    assert out.dtype == jnp.bfloat16
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    assert relative_error(last, attend(q, k, v, log_decay, state, scale_BTH=scale)[1]) < 1e-6


@pytest.mark.parametrize("decays", [1, 64])
def test_float16_scores_do_not_overflow(decays):
    """The product of a query and a key is 102,400, above the largest float16, but the outputs are small."""
    q, v = jnp.full((1, 8, 1, 64), 40.0, jnp.float16), jnp.full((1, 8, 1, 2), 1e-3, jnp.float16)
    log_decay = jnp.full((1, 8, 1) if decays == 1 else (1, 8, 1, decays), -0.1)

    def run(v, implementation):
        return linear_attention(q, q, v, log_decay, implementation=implementation)[0]

    expected, expected_vjp = jax.vjp(lambda v: run(v, "reference"), v)
    out, vjp = jax.vjp(lambda v: run(v, "chunked"), v)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(out, expected, rtol=2e-3)
    cotangent = jnp.full_like(out, 1e-3)
    np.testing.assert_allclose(vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=2e-3)


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
@pytest.mark.parametrize("decay", DECAYS)
def test_several_calls_and_single_steps_equal_one_call(decay, implementation):
    q, k, v, log_decay, state = arrays(decay)
    attend = jax.jit(functools.partial(linear_attention, implementation=implementation))
    want, want_last = attend(q, k, v, log_decay, state)
    carry, outputs = state, []
    for chunk in (slice(0, 1), slice(1, 8), slice(8, T)):
        out, carry = attend(q[:, chunk], k[:, chunk], v[:, chunk], log_decay[:, chunk], carry)
        outputs.append(out)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(carry, want_last) < 1e-6
    steps = []
    for t in range(T):
        out, state = attend(*(x[:, t : t + 1] for x in (q, k, v, log_decay)), state)
        steps.append(out)
    assert relative_error(np.concatenate(steps, axis=1), want) < 1e-6
    assert relative_error(state, want_last) < 1e-6


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(decay, implementation):
    segments = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 0, 1, 0, 1, 2, 0, 2, 2, 2, 2, 0, 0]])
    reset_BT, keep_BT, _ = map(np.asarray, jax.jit(segment_boundaries)(segments))
    without_nan = arrays(decay)[:4]
    with_nan = [np.where(keep_BT.reshape(B, T, *(1,) * (x.ndim - 2)), x, np.float32(np.nan)) for x in without_nan]
    attend = jax.jit(functools.partial(linear_attention, implementation=implementation))

    def loss(*arguments):
        out, last = attend(*arguments, reset_BT=reset_BT, keep_BT=keep_BT)
        return jnp.sum(jnp.sin(out)), (out, last)

    gradients, (out, last) = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, range(4), has_aux=True))(*with_nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out, last)))
    assert all((leaf[~keep_BT] == 0.0).all() for leaf in (out, *gradients))
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = attend(*(x[row : row + 1, index] for x in without_nan))
            assert relative_error(out[row : row + 1, index], separate) < 1e-6
        assert relative_error(last[row : row + 1], separate_last) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", Chunked(4)])
def test_bfloat16_keeps_a_float32_state(implementation):
    arguments = arrays("channel")
    bfloat16_arguments = [x.astype(jnp.bfloat16) for x in arguments[:3]] + list(arguments[3:])
    (out, last), gradients = results(linear_attention, bfloat16_arguments, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert [leaf.dtype for leaf in gradients] == [x.dtype for x in bfloat16_arguments]
    assert_trees_close(((out, last), gradients), float64_results(reference_loop, arguments), 0.03)
    ones, attend = (
        np.ones((1, 3000, 1, 1), jnp.bfloat16),
        functools.partial(linear_attention, implementation=implementation),
    )
    _, last = jax.jit(attend)(ones, ones, ones / 256, np.zeros((1, 3000, 1), np.float32))
    assert last.item() == 3000 / 256  # a sum in bfloat16 would stop growing at 1


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("log_decay", [-1.6, -8.0])
@pytest.mark.parametrize("decay", ["channel", "grouped"])
def test_the_gradient_of_a_strong_decay_is_accurate(log_decay, decay):
    """Rounding errors of weights and values are small relative to the gradient, which is about ``exp(log_decay)``."""
    q, k, v, decays, state = arrays(decay)
    for dtype, tolerance in ((jnp.bfloat16, 0.01), (jnp.float32, 3e-6)):
        rounded = [jnp.asarray(x, dtype) for x in (q, k, v)]
        arguments = [*rounded, np.full_like(decays, log_decay), state]
        got, want = (
            np.asarray(gradients[3])
            for _, gradients in (
                results(linear_attention, arguments, implementation=Chunked(4)),
                float64_results(reference_loop, arguments),
            )
        )
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


def test_the_default_is_a_loop_without_a_gradient_and_chunks_with_one():
    arguments = arrays("channel")
    rule = linear_attention
    run = {name: jax.jit(functools.partial(rule, implementation=name)) for name in (None, "reference", "chunked")}
    assert not np.array_equal(run["reference"](*arguments)[0], run["chunked"](*arguments)[0])
    assert_trees_equal(run[None](*arguments), run["reference"](*arguments))
    assert_trees_equal(results(rule, arguments), results(rule, arguments, implementation="chunked"))
    tangents = jax.tree.map(np.ones_like, tuple(arguments))
    forward_mode = jax.jit(lambda name: jax.jvp(run[name], tuple(arguments), tangents), static_argnums=0)
    assert_trees_equal(forward_mode(None), forward_mode("chunked"))


def test_only_inputs_and_one_state_per_chunk_are_saved():
    q, k, v, log_decay, state = arrays("channel")
    attend = functools.partial(linear_attention, implementation=Chunked(4))
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(attend, *arguments)[1], q, k, v, log_decay, state)
    padded = B * 16 * H
    saved = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert saved <= padded * (2 * K + V + K) + 4 * state.size + 2 * log_decay.size + B * T


def test_bad_inputs_raise():
    q, k, v, log_decay, state = arrays("head")
    with pytest.raises(ValueError, match=r"query \[2, 13, 2, 3\] and key \[2, 13, 2, 2\] must both be"):
        linear_attention(q, k[..., :2], v, log_decay)
    with pytest.raises(ValueError, match="at least one step and one head"):
        linear_attention(q[:, :, :0], k[:, :, :0], v, log_decay)
    with pytest.raises(ValueError, match="at least one step"):
        linear_attention(q[:, :0], k[:, :0], v[:, :0], log_decay[:, :0])
    with pytest.raises(ValueError, match=r"log_decay \[2, 13, 2, 1\] must be \[2, 13, 2\], one for each head, or"):
        linear_attention(q, k, v, log_decay[..., None])
    with pytest.raises(ValueError, match=r"scale \[2, 13, 1\] must be \[2, 13, 2\], one for each head"):
        linear_attention(q, k, v, log_decay, scale_BTH=log_decay[..., :1])
    with pytest.raises(ValueError, match=r"state \[2, 2, 3, 3\] must be \[batch, heads, key width, value width\]"):
        linear_attention(q, k, v, log_decay, state[..., :3])
    with pytest.raises(ValueError, match=r"reset_BT \[2, 3\] must be \[batch, time\] of the query, \[2, 13\]"):
        linear_attention(q, k, v, log_decay, reset_BT=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="heads of query and key, 2, must divide the number of heads of value, 3"):
        linear_attention(q, k, np.concatenate([v, v[:, :, :1]], axis=2), log_decay)
    with pytest.raises(ValueError, match=r"one decay per channel, .*: repeat the 1 heads of query and key 2 times"):
        linear_attention(q[:, :, :1], k[:, :, :1], v, arrays("channel")[3])
    with pytest.raises(ValueError, match=r"Chunked\(24\): the number of steps must be a power of two"):
        Chunked(24)
    with pytest.raises(ValueError, match=r"Chunked\(0\): the number of steps must be a power of two"):
        Chunked(0)
    with pytest.raises(ValueError, match=r"Chunked\(4.0\): the number of steps must be a power of two"):
        Chunked(4.0)
    with pytest.raises(ValueError, match=r"implementation 32: for chunks of this size, write Chunked\(32\)"):
        linear_attention(q, k, v, log_decay, implementation=32)
    with pytest.raises(ValueError, match="no linear_attention implementation 'fast': choose from reference, chunked"):
        linear_attention(q, k, v, log_decay, implementation="fast")

"""Tests of the elementwise linear recurrence: all implementations against a loop, with all gradients; memory use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import linear_scan, vector_state
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.nn.results import results

B, T, D = 3, 11, 4
IMPLEMENTATIONS = ("reference", "sequential", "chunked")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(vector_state, "CHUNK", 4)  # two full chunks and a partial chunk


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    a, b, h = (rng.standard_normal(shape).astype(np.float32) for shape in [(B, T, D), (B, T, D), (B, D)])
    return (1 / (1 + np.exp(-a))).astype(dtype), b.astype(dtype), h


def masks():
    rng = np.random.default_rng(4)
    return {"reset_BT": rng.random((B, T)) < 0.3, "keep_BT": rng.random((B, T)) < 0.7}


def reference_loop(decay, new, state, reset_BT=None, keep_BT=None, reverse=False):
    states = {}
    for t in range(T)[:: -1 if reverse else 1]:
        real = True if keep_BT is None else keep_BT[:, t, None]
        before = state if reset_BT is None else jnp.where(reset_BT[:, t, None], 0.0, state)
        state = jnp.where(real, decay[:, t] * before + new[:, t], state)
        states[t] = state
    return jnp.stack([states[t] for t in range(T)], axis=1), state


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", ["none", "reset", "keep", "both"])
def test_values_and_all_gradients_equal_those_of_the_loop(masked, reverse):
    used_masks = {name: mask for name, mask in masks().items() if masked == "both" or name.startswith(masked)}
    want = results(reference_loop, arrays(), **used_masks, reverse=reverse)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    for implementation in IMPLEMENTATIONS:
        got = results(linear_scan, arrays(), **used_masks, reverse=reverse, implementation=implementation)
        assert_trees_close(got, want, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_calls_equal_one_call(implementation):
    decay, new, state = arrays()
    scan = jax.jit(functools.partial(linear_scan, implementation=implementation))
    want, want_last = scan(decay, new, state)
    outputs = []
    for chunk in (slice(0, 1), slice(1, 6), slice(6, T)):
        hidden, state = scan(decay[:, chunk], new[:, chunk], state)
        outputs.append(hidden)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(state, want_last) < 1e-6


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(implementation, reverse):
    segments = np.array(
        [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], [0, 1, 1, 0, 1, 0, 2, 0, 2, 2, 0]]
    )
    boundaries = jax.jit(functools.partial(segment_boundaries, reverse=reverse))
    reset_BT, keep_BT, _ = map(np.asarray, boundaries(segments))
    decay, new = (np.where(keep_BT[:, :, None], x, np.float32(np.nan)) for x in arrays()[:2])
    scan = jax.jit(functools.partial(linear_scan, reverse=reverse, implementation=implementation))

    def loss(decay, new):
        hidden, last = scan(decay, new, reset_BT=reset_BT, keep_BT=keep_BT)
        return jnp.sum(jnp.where(keep_BT[:, :, None], jnp.sin(hidden), 0.0)), (hidden, last)

    gradients, (hidden, last) = jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(decay, new))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, hidden, last)))
    assert all((leaf[~keep_BT] == 0.0).all() for leaf in gradients)
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = scan(decay[row : row + 1, index], new[row : row + 1, index])
            assert relative_error(hidden[row : row + 1, index], separate) < 1e-6
            if document == (1 if reverse else 2):  # the document that is read last
                assert relative_error(last[row : row + 1], separate_last) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_a_float32_state(implementation):
    def total(size, dtype):
        decay, new = np.ones((1, 3000, 1), dtype), np.full((1, 3000, 1), size, dtype)
        return jax.jit(functools.partial(linear_scan, implementation=implementation))(decay, new)

    hidden, last = total(2.0**-8, jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert last.item() == 3000 / 256  # a sum in bfloat16 would stop growing at 1
    got = results(functools.partial(linear_scan, implementation=implementation), arrays(jnp.bfloat16))
    assert [leaf.dtype for leaf in got[1]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert_trees_close(got, results(reference_loop, arrays()), 0.03)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_remains_if_the_product_of_the_decays_underflows(implementation):
    """Only a reset ends the effect of NaN."""
    decay, new, state = np.full((1, T, 1), 1e-15, np.float32), np.ones((1, T, 1), np.float32), np.full((1, 1), np.nan)
    out, last = jax.jit(functools.partial(linear_scan, implementation=implementation))(decay, new, state)
    assert np.isnan(out).all()
    assert np.isnan(last).all()


@pytest.mark.parametrize("masked", [False, True])
def test_no_iteration_copies_the_buffer(masked):
    """One copy in each of T iterations would make the scan quadratic in T."""
    decay, new, state = arrays()
    options = {**(masks() if masked else {}), "implementation": "sequential"}

    def gradients(decay, new, state, dhidden, dlast):
        _, vjp_fn = jax.vjp(lambda *x: linear_scan(*x, **options), decay, new, state)
        return vjp_fn((dhidden, dlast))

    forward = jax.jit(lambda *x: linear_scan(*x, **options), donate_argnums=1).lower(decay, new, state)
    for lowered, max_copies in ((forward, 0), (jax.jit(gradients).lower(decay, new, state, new, state), 2)):
        lines = lowered.compile().as_text().splitlines()
        copies = [line for line in lines if " copy(" in line and f"f32[{B},{T},{D}]" in line]
        loops = [line for line in lines if " while(" in line]
        assert len(loops) == (1 if max_copies == 0 else 2)
        assert (
            len(copies) <= max_copies
        )  # copies before a loop are allowed if the loop overwrites an array that it does not own
        assert not any("while/body" in line for line in copies)


def test_only_decay_and_states_are_saved_for_the_gradient():
    """The states are the output. So the scan saves them for all steps, and not one state per chunk."""
    decay, new, state = arrays()
    for implementation in ("sequential", "chunked"):

        @jax.jit
        def states_and_saved(*arguments, implementation=implementation):
            (hidden, _), vjp_fn = jax.vjp(functools.partial(linear_scan, implementation=implementation), *arguments)
            return hidden, vjp_fn

        hidden, residuals = states_and_saved(decay, new, state)
        saved = [leaf for leaf in jax.tree.leaves(residuals) if leaf.size >= new.size]
        assert len(saved) == 2
        assert all(any(np.array_equal(leaf, array) for leaf in saved) for array in (decay, hidden))


def test_vmap_over_an_ensemble():
    """``vmap`` of the sequential scan equals separate scans."""
    decay, new, state = (np.stack([x, x[::-1]]) for x in arrays())
    got = jax.jit(jax.vmap(functools.partial(linear_scan, implementation="sequential")))(decay, new, state)
    separate = jax.jit(reference_loop)
    want = [separate(*(x[i] for x in (decay, new, state))) for i in range(2)]
    assert_trees_close(got, jax.tree.map(lambda *x: np.stack(x), *want), 1e-6)


def test_bad_inputs_raise():
    decay, new, state = arrays()
    with pytest.raises(ValueError, match=r"decay \[3, 11, 3\] and input \[3, 11, 4\] must both be"):
        linear_scan(decay[..., :3], new)
    with pytest.raises(ValueError, match="at least one step"):
        linear_scan(decay[:, :0], new[:, :0])
    with pytest.raises(ValueError, match=r"state_BD \[3, 2\] must be \[batch, channels\] of the input, \[3, 4\]"):
        linear_scan(decay, new, state[:, :2])
    with pytest.raises(ValueError, match=r"keep_BT \[3, 2\] must be \[batch, time\] of the input, \[3, 11\]"):
        linear_scan(decay, new, keep_BT=np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="keep_BT has dtype int32: pass a boolean array, such as segment_ids > 0"):
        linear_scan(decay, new, keep_BT=np.ones(new.shape[:2], np.int32))
    with pytest.raises(ValueError, match="the input has dtype int32: it must be a floating-point dtype"):
        linear_scan(decay, new.astype(np.int32))
    with pytest.raises(
        ValueError, match="no linear_scan implementation 'fast': choose from reference, sequential, chunked"
    ):
        linear_scan(decay, new, implementation="fast")

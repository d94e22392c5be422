"""Tests of both delta rules against a loop over steps in float64: gradients, state, documents, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.scan import (
    Chunked,
    delta_rule,
    gated_delta_rule,
    generalized_delta_rule,
    linear_attention,
    matrix_state,
)
from jaxlm.nn.scan.triangular import inverse_unit_lower
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal, relative_error
from tests.nn.results import float64_results, random_masks, results

B, T, H, K, V = 2, 13, 2, 3, 4
IMPLEMENTATIONS = ("reference", Chunked(4))


def generalized(q, k, v, log_decay, a, b, state=None, **options):
    return generalized_delta_rule(q, k, v, log_decay, (a, b), state, **options)


RULES = {"gated": gated_delta_rule, "generalized": generalized}
every_rule = pytest.mark.parametrize("name", RULES)


def arrays(name="gated", strength=1.0, seed=0):
    """The arguments of a rule: queries, keys, values, log decays, the other inputs, and an initial state.

    The gated rule has keys of length 1, and betas in [0, 2]. The generalized rule has ``a = -c`` and ``b = rate * c``
    with c of length 1, and rates in [0, 2].
    """
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H), (B, H, K, V)]
    if name == "generalized":
        shapes[3:5] = [(B, T, H, K)] * 2
    q, k, v, g, b, state = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay, rate = -strength * np.exp(g), 2 / (1 + np.exp(-2 * b))
    if name == "gated":
        return q, unit, v, log_decay, rate, state
    return q, k[:, ::-1], v, log_decay, -unit, rate * unit, state


def reference_loop(q, k, v, log_decay, *others, reset_BT=None, keep_BT=None):
    """The equation as a loop over steps: each step multiplies the state by a matrix, and adds ``key value.T``."""
    *others, state = others
    if len(others) == 1:  # gated: exp(g) * (I - beta k k.T)
        new_key = others[0][..., None] * k
        matrix = jnp.exp(log_decay)[..., None, None] * (jnp.eye(K) - new_key[..., :, None] * k[..., None, :])
    else:  # generalized: diag(exp(g)) + b a.T
        a, b = others
        new_key, matrix = k, jnp.exp(log_decay)[..., None] * jnp.eye(K) + b[..., :, None] * a[..., None, :]
    reset_BT = np.zeros((B, T), bool) if reset_BT is None else reset_BT
    keep_BT = np.ones((B, T), bool) if keep_BT is None else keep_BT

    def step(state, inputs):
        q, new_key, v, matrix, reset, real = inputs
        before = jnp.where(reset[:, None, None, None], 0.0, state)
        new = jnp.einsum("BHKL,BHLV->BHKV", matrix, before) + new_key[..., None] * v[:, :, None]
        out = jnp.sum(q[..., None] * new, axis=2)
        return jnp.where(real[:, None, None, None], new, state), jnp.where(real[:, None, None], out, 0.0)

    inputs_TB = tuple(jnp.swapaxes(x, 0, 1) for x in (q, new_key, v, matrix, reset_BT, keep_BT))
    state, out_TB = jax.lax.scan(step, state, inputs_TB)
    return jnp.swapaxes(out_TB, 0, 1), state


def loop_results(arguments, **options):
    with jax.numpy_rank_promotion("allow"):
        return float64_results(reference_loop, arguments, **options)


def fail(*arguments):
    raise AssertionError("this function must not be called")


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("masked", [True, False])
def test_bounded_log_decays_have_the_results_of_the_loop(masked, monkeypatch):
    """With the triangular systems of accelerators. The chunks of 8 steps have products of decays down to exp(-24)."""
    q, k, v, log_decay, a, b, state = arrays("generalized")
    arguments = q, k, v, np.maximum(log_decay, -3.0), a, b, state
    options = random_masks(B, T) if masked else {}
    monkeypatch.setattr(choices, "whole_triangular_systems", lambda: True)
    monkeypatch.setattr(delta_rule, "_scores", fail)
    rule = functools.partial(generalized, min_log_decay=-3.0, implementation=Chunked(8))
    got = results(rule, arguments, **options)
    assert_trees_close(got, loop_results(arguments, **options), 4e-6)


def test_chunks_whose_decays_could_overflow_do_not_use_the_bound(monkeypatch):
    arguments = arrays("generalized", strength=10.0)
    monkeypatch.setattr(delta_rule, "_bounded_scores", fail)
    rule = functools.partial(generalized, min_log_decay=-100.0, implementation="chunked")
    assert_trees_close(jax.jit(rule)(*arguments), loop_results(arguments)[0], 4e-6)


def test_float16_does_not_use_the_bound(monkeypatch):
    """The factors of a chunk of 64 steps would overflow."""
    monkeypatch.setattr(delta_rule, "_bounded_scores", fail)
    arguments = (jnp.asarray(x, jnp.float16) for x in arrays("generalized")[:-1])
    jax.eval_shape(functools.partial(generalized, min_log_decay=-0.5, implementation="chunked"), *arguments)


def test_an_accelerator_has_large_chunks_only_with_a_sufficient_bound(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    small, large = choices.GENERALIZED_DELTA_RULE_CHUNK_ACCELERATOR, choices.GENERALIZED_DELTA_RULE_CHUNK_BOUNDED
    sizes, scan = [], matrix_state.scan_chunks

    def recorded(*arguments):
        sizes.append(arguments[4])
        return scan(*arguments)

    monkeypatch.setattr(matrix_state, "scan_chunks", recorded)
    for bound in (None, -delta_rule.MAX_CHUNK_DECAY / large, -delta_rule.MAX_CHUNK_DECAY / small):
        jax.eval_shape(functools.partial(generalized, min_log_decay=bound), *arrays("generalized"))
    assert sizes == [small, large, small]


def test_a_positive_bound_of_the_log_decays_is_an_error():
    with pytest.raises(ValueError, match=r"min_log_decay=0.5 must be at most 0"):
        generalized(*arrays("generalized"), min_log_decay=0.5)


def test_the_inverse_of_a_matrix_with_one_row_has_its_shape(monkeypatch):
    monkeypatch.setattr(choices, "whole_triangular_systems", lambda: True)
    assert inverse_unit_lower(jnp.zeros((2, 3, 1, 1))).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("whole", [True, False])
def test_inverse_of_a_triangular_matrix(whole, monkeypatch):
    monkeypatch.setattr(choices, "whole_triangular_systems", lambda: whole)
    matrix = 0.3 * np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    want = np.linalg.inv(np.eye(16) + np.tril(matrix.astype(np.float64), -1))
    assert relative_error(inverse_unit_lower(jnp.asarray(matrix)), want) < 1e-6


@pytest.mark.plain_cases(1)
@every_rule
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_all_gradients_equal_those_of_the_loop(name, masked):
    arguments, options = arrays(name), random_masks(B, T) if masked else {}
    want = loop_results(arguments, **options)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))
    assert_trees_close(results(RULES[name], arguments, **options, implementation="reference"), want, 2e-6)
    for chunk in (1, 4, 64):  # three full chunks and a partial chunk; one chunk that is reduced to a power of two
        got = results(RULES[name], arguments, **options, implementation=Chunked(chunk))
        assert_trees_close(got, want, 2e-6)


@every_rule
def test_strong_and_weak_decays(name):
    """One chunk has log decays whose sum is -1e4 (``exp(-sum)`` would overflow), weak decays, and decays of 0."""
    q, k, v, log_decay, *others = arrays(name)
    log_decay = log_decay * np.random.default_rng(1).choice(np.float32([0.0, 1e-3, 1.0, 1e3]), log_decay.shape)
    log_decay[:, 5] = -np.inf
    arguments = (q, k, v, log_decay, *others)
    want = loop_results(arguments)
    for options in ({"implementation": "reference"}, {"implementation": Chunked(16)}):
        got = results(RULES[name], arguments, **options)
        assert_trees_close(got, want, 2e-6)
        assert (got[1][3][:, 5] == 0.0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_generalized_rule_contains_the_gated_rule(implementation):
    q, k, v, log_decay, beta, state = arrays()
    decay, beta_BTH1 = np.exp(log_decay)[..., None], beta[..., None]
    per_channel = np.broadcast_to(log_decay[..., None], k.shape)
    general = jax.jit(functools.partial(generalized, implementation=implementation))
    gated = jax.jit(functools.partial(gated_delta_rule, implementation="reference"))
    got = general(q, beta_BTH1 * k, v, per_channel, -k, decay * beta_BTH1 * k, state)
    assert_trees_close(got, gated(q, k, v, log_decay, beta, state), 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_generalized_rule_can_swap_two_entries_of_the_state(implementation):
    """An eigenvalue of -1: ``I - c c.T`` with c = (1, -1, 0) exchanges the first two rows of the state."""
    q, _, v, _, _, _, state = arrays("generalized")
    zeros, swap = np.zeros_like(q), np.broadcast_to(np.float32([1.0, -1.0, 0.0]), q.shape)
    rule = jax.jit(functools.partial(generalized, implementation=implementation))
    out, last = rule(q, zeros, v, zeros, -swap, swap, state)
    assert relative_error(last, state[:, :, [1, 0, 2]]) < 2e-6  # an odd number of steps
    assert relative_error(np.asarray(out)[:, 1], np.einsum("BHK,BHKV->BHV", q[:, 1], state)) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_with_beta_one_stores_the_value_and_with_beta_two_reflects_the_state(implementation):
    q, k, v, _, _, state = arrays()
    k = np.broadcast_to(k[:, :1], k.shape)  # the same key in all steps
    gate = np.zeros((B, T, H), np.float32)
    rule = jax.jit(functools.partial(gated_delta_rule, implementation=implementation))
    out, _ = rule(k, k, v, gate, gate + 1.0, state)
    assert relative_error(out, v) < 1e-6
    out, _ = rule(k, k, np.zeros_like(v), gate, gate + 2.0, state)
    old = np.einsum("BHK,BHKV->BHV", k[:, 0], state)
    signs = (-1.0) ** np.arange(1, T + 1)
    assert relative_error(out, signs[None, :, None, None] * old[:, None]) < 1e-5  # |k| is 1 only up to rounding


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_orthogonal_keys_give_linear_attention(implementation):
    """With orthogonal keys and an empty state, no step finds an old value: the rule adds ``beta k v.T``."""
    keys = np.broadcast_to(np.eye(8, dtype=np.float32)[None, :, None], (B, 8, H, 8))
    rng = np.random.default_rng(0)
    q, v = (rng.standard_normal((B, 8, H, width)).astype(np.float32) for width in (8, V))
    _, _, _, log_decay, beta, _ = (x[:, :8] for x in arrays())
    rule = jax.jit(functools.partial(gated_delta_rule, implementation=implementation))
    attend = jax.jit(functools.partial(linear_attention, implementation="reference"))
    want = attend(q, keys, beta[..., None] * v, log_decay)
    assert_trees_close(rule(q, keys, v, log_decay, beta), want, 1e-6)


@pytest.mark.plain_cases(1)
@every_rule
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_calls_equal_one_call(name, implementation):
    *inputs, state = arrays(name)
    rule = jax.jit(functools.partial(RULES[name], implementation=implementation))
    want, want_last = rule(*inputs, state)
    outputs = []
    for steps in (slice(0, 1), slice(1, 2), slice(2, 9), slice(9, T)):
        out, state = rule(*(x[:, steps] for x in inputs), state)
        outputs.append(out)
    assert relative_error(np.concatenate(outputs, axis=1), want) < 1e-6
    assert relative_error(state, want_last) < 1e-6


@pytest.mark.plain_cases(1)
@every_rule
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents_and_padding_may_be_nan(name, implementation):
    segments = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 0, 1, 0, 1, 2, 0, 2, 2, 2, 2, 0, 0]])
    reset_BT, keep_BT, _ = map(np.asarray, jax.jit(segment_boundaries)(segments))
    without_nan = arrays(name)[:-1]
    with_nan = [np.where(keep_BT.reshape(B, T, *(1,) * (x.ndim - 2)), x, np.float32(np.nan)) for x in without_nan]
    rule = jax.jit(functools.partial(RULES[name], implementation=implementation))

    def loss(*arguments):
        out, last = rule(*arguments, reset_BT=reset_BT, keep_BT=keep_BT)
        return jnp.sum(jnp.sin(out)), (out, last)

    compiled = jax.jit(jax.grad(loss, range(len(with_nan)), has_aux=True))
    gradients, (out, last) = jax.tree.map(np.asarray, compiled(*with_nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out, last)))
    assert all((leaf[~keep_BT] == 0.0).all() for leaf in (out, *gradients))
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = rule(*(x[row : row + 1, index] for x in without_nan))
            assert relative_error(out[row : row + 1, index], separate) < 1e-6
        assert relative_error(last[row : row + 1], separate_last) < 1e-6


@pytest.mark.plain_cases(2)
@every_rule
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_a_float32_state(name, implementation):
    arguments = arrays(name)
    bfloat16_arguments = [x.astype(jnp.bfloat16) for x in arguments[:3]] + list(arguments[3:])
    rounded = [x.astype(np.float32) for x in bfloat16_arguments]
    (out, last), gradients = results(RULES[name], bfloat16_arguments, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert [leaf.dtype for leaf in gradients] == [x.dtype for x in bfloat16_arguments]
    assert_trees_close(((out, last), gradients), loop_results(rounded), 0.03)


def test_a_long_text_with_reflections_keeps_its_precision():
    """3000 steps without decay and with betas up to 2: the chunked form stays near the loop, and both stay bounded."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 3000, 1, 8)).astype(np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0.0, 2.0, (1, 3000, 1)).astype(np.float32)
    (reference, _), (chunked, _) = (
        jax.jit(functools.partial(gated_delta_rule, implementation=name))(q, k, v, np.zeros_like(beta), beta)
        for name in ("reference", "chunked")
    )
    assert np.abs(reference).max() < 200
    assert relative_error(chunked, reference) < 1e-5


def test_a_long_text_with_the_decays_and_rates_of_rwkv7_keeps_its_precision():
    rng = np.random.default_rng(0)
    q, k, v, c = (rng.standard_normal((1, 3000, 1, 8)).astype(np.float32) for _ in range(4))
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    rate = rng.uniform(0.0, 1.0, c.shape).astype(np.float32)
    log_decay = np.float32(-np.exp(-0.5)) * rng.uniform(0.0, 1.0, c.shape).astype(np.float32) ** 8  # most are weak
    (reference, _), (chunked, _) = (
        jax.jit(functools.partial(generalized, implementation=name))(q, k, v, log_decay, -c, rate * c)
        for name in IMPLEMENTATIONS
    )
    assert np.abs(reference).max() < 200
    assert relative_error(chunked, reference) < 1e-5


def test_the_default_is_a_loop_without_a_gradient_and_chunks_with_one():
    arguments = arrays("generalized")
    rule = RULES["generalized"]
    run = {name: jax.jit(functools.partial(rule, implementation=name)) for name in (None, "reference", "chunked")}
    assert not np.array_equal(run["reference"](*arguments)[0], run["chunked"](*arguments)[0])
    assert_trees_equal(run[None](*arguments), run["reference"](*arguments))
    assert_trees_equal(results(rule, arguments), results(rule, arguments, implementation="chunked"))


@every_rule
def test_only_inputs_and_one_state_per_chunk_are_saved(name):
    arguments = arrays(name)
    rule = functools.partial(RULES[name], implementation=Chunked(4))
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(rule, *arguments)[1], *arguments)
    inputs = sum(x.size for x in arguments[:-1]) * 16 // T
    saved = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert saved <= inputs + 4 * arguments[-1].size + B * T


def test_bad_inputs_raise():
    q, k, v, log_decay, beta, state = arrays()
    with pytest.raises(ValueError, match=r"query \[2, 13, 2, 3\] and key \[2, 13, 2, 2\] must both be"):
        gated_delta_rule(q, k[..., :2], v, log_decay, beta)
    with pytest.raises(ValueError, match="at least one step"):
        gated_delta_rule(q[:, :0], k[:, :0], v[:, :0], log_decay[:, :0], beta[:, :0])
    with pytest.raises(ValueError, match=r"log_decay \[2, 13, 2, 1\] must be \[batch, time, heads\], \[2, 13, 2\]"):
        gated_delta_rule(q, k, v, log_decay[..., None], beta)
    with pytest.raises(ValueError, match=r"beta \[2, 13\] must be \[batch, time, heads\], \[2, 13, 2\]"):
        gated_delta_rule(q, k, v, log_decay, beta[..., 0])
    with pytest.raises(ValueError, match=r"state \[2, 2, 3, 3\] must be \[batch, heads, key width, value width\]"):
        gated_delta_rule(q, k, v, log_decay, beta, state[..., :3])
    with pytest.raises(ValueError, match=r"reset_BT \[2, 3\] must be \[batch, time\] of the query, \[2, 13\]"):
        gated_delta_rule(q, k, v, log_decay, beta, reset_BT=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="no gated_delta_rule implementation 'fast': choose from reference, chunked"):
        gated_delta_rule(q, k, v, log_decay, beta, implementation="fast")


def test_bad_inputs_of_the_generalized_rule_raise():
    q, k, v, log_decay, a, b, state = arrays("generalized")
    rule = generalized
    with pytest.raises(ValueError, match=r"log_decay \[2, 13, 2\] must have the shape of the query, \[2, 13, 2, 3\]"):
        rule(q, k, v, log_decay[..., 0], a, b)
    with pytest.raises(ValueError, match=r"a \[2, 12, 2, 3\] must have the shape of the query"):
        rule(q, k, v, log_decay, a[:, 1:], b)
    with pytest.raises(ValueError, match=r"b \[2, 13, 2, 2\] must have the shape of the query"):
        rule(q, k, v, log_decay, a, b[..., 1:])
    with pytest.raises(ValueError, match=r"value \[2, 13, 4\] must be \[batch, time, heads, value width\]"):
        rule(q, k, v[:, :, 0], log_decay, a, b)
    with pytest.raises(ValueError, match=r"state \[2, 2, 3, 3\] must be \[batch, heads, key width, value width\]"):
        rule(q, k, v, log_decay, a, b, state[..., :3])
    with pytest.raises(ValueError, match=r"keep_BT \[2, 3\] must be \[batch, time\] of the query, \[2, 13\]"):
        rule(q, k, v, log_decay, a, b, keep_BT=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"low_rank must be the tuple \(a, b\) of two arrays, not ndarray"):
        generalized_delta_rule(q, k, v, log_decay, a)
    with pytest.raises(ValueError, match="no generalized_delta_rule implementation 'fast': choose from reference"):
        rule(q, k, v, log_decay, a, b, implementation="fast")

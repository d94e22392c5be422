import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import host, sharding
from jaxlm.nn import choices
from jaxlm.nn.cpu_choices import CpuChoices
from jaxlm.nn.embedding import unembed
from jaxlm.nn.loss import chunked_cross_entropy, cross_entropy, selected_cross_entropy
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, relative_error

B, T, D, V = 2, 13, 8, 31


def make_arrays():
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(V, D)).astype(np.float32), "unused": np.ones((3, 3), np.float32)}
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([-0.5, 0.0, 1.5], (B, T)).astype(np.float32)
    return params, hidden, targets, weights


def head(params, hidden):
    return jnp.einsum("BTD,VD->BTV", hidden, params["table"])


def unchunked_loss(params, hidden, targets, weights):
    return jnp.sum(cross_entropy(head(params, hidden), targets) * weights)


def value_and_gradients(function, *arguments):
    """The value and the gradients of all arguments, computed by one program."""
    return jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(arguments)))))(*arguments)


def test_cross_entropy_against_float64():
    params, hidden, targets, _ = make_arrays()
    logits = hidden.astype(np.float64) @ params["table"].astype(np.float64).T
    want = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert relative_error(cross_entropy(jnp.asarray(logits, jnp.float32), targets), want) < 1e-6


@pytest.mark.parametrize("max_chunk_logits", [1, 2 * 5 * V, 2 * 12 * V, 10**9])
def test_chunked_equals_unchunked_in_value_and_all_gradients(max_chunk_logits):
    params, hidden, targets, weights = make_arrays()

    def chunked(params, hidden):
        return 2.5 * chunked_cross_entropy(head, params, hidden, targets, weights, max_chunk_logits=max_chunk_logits)

    want = value_and_gradients(lambda p, h: 2.5 * unchunked_loss(p, h, targets, weights), params, hidden)
    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden)
    assert_trees_close(got, want, 3e-6)
    assert relative_error(jax.jit(chunked)(params, hidden), want[0]) < 1e-6
    assert np.all(np.asarray(got[1][0]["unused"]) == 0)


def test_selected_equals_unchunked_in_value_and_all_gradients():
    params, hidden, targets, weights = make_arrays()
    table = {"table": params["table"]}

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda p, h: function(p, h, targets, weights), argnums=(0, 1)))(table, hidden)

    want = loss(unchunked_loss)
    assert_trees_close(loss(lambda *arrays: selected_cross_entropy(head, *arrays)), want, 3e-6)
    value = jax.jit(lambda p, h: selected_cross_entropy(head, p, h, targets, weights))(table, hidden)
    assert relative_error(value, want[0]) < 1e-6


@pytest.mark.parametrize("function", [chunked_cross_entropy, selected_cross_entropy])
@pytest.mark.parametrize("rows", [0, B])
def test_losses_of_float64_are_float32_and_their_gradients_float64(function, rows):
    params, hidden, targets, weights = make_arrays()
    with jax.enable_x64(True):
        arrays = {"table": np.float64(params["table"])}, np.float64(hidden)[:rows]

        def loss(params, hidden):
            return function(head, params, hidden, targets[:rows], weights[:rows])

        assert jax.eval_shape(loss, *arrays).dtype == np.float32
        value, gradients = jax.eval_shape(jax.value_and_grad(loss, argnums=(0, 1)), *arrays)
    assert value.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype(np.float64)}


def test_the_logits_of_all_positions_never_exist():
    """All temporary arrays of the compiled gradient together are smaller than an eighth of the logits."""
    rows, width, vocabulary = 4096, 16, 4096
    params = {"table": jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((1, rows, width), jnp.float32)
    ints = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, rows), jnp.float32)

    def temporaries(max_chunk_logits):
        grad = jax.grad(
            lambda p, h, t, w: chunked_cross_entropy(head, p, h, t, w, max_chunk_logits=max_chunk_logits),
            argnums=(0, 1),
        )
        return jax.jit(grad).lower(params, hidden, ints, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2**18) < rows * vocabulary * 4 / 8
    assert temporaries(2**30) > rows * vocabulary * 4


def test_positions_of_weight_zero_are_ignored():
    params, hidden, targets, weights = make_arrays()
    weights[0, :4] = 0.0
    run = jax.jit(jax.value_and_grad(lambda h, t: chunked_cross_entropy(head, params, h, t, weights)))
    want = run(hidden, targets.copy())
    targets[0, :4] = -7
    got = run(hidden, targets)
    assert_trees_close(got, want, 0.0)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1)])
def test_selected_positions_may_be_fewer_than_shards(shape):
    arrays = make_arrays()
    hidden, targets, weights = (x[: shape[0], : shape[1]] for x in arrays[1:])
    want = value_and_gradients(lambda p, h: unchunked_loss(p, h, targets, weights), arrays[0], hidden)

    def selected(params, hidden):
        with Sharding(make_mesh("data=8")).scope():
            return selected_cross_entropy(head, params, hidden, targets, weights)

    assert_trees_close(jax.jit(jax.value_and_grad(selected, argnums=(0, 1)))(arrays[0], hidden), want, 3e-6)


@pytest.mark.parametrize("function", [chunked_cross_entropy, selected_cross_entropy])
def test_targets_and_weights_of_another_shape_raise(function):
    params, hidden, targets, weights = make_arrays()
    with pytest.raises(ValueError, match=r"targets .* must have the same batch and time as the hidden states"):
        function(head, params, hidden, targets[:, 1:], weights)
    with pytest.raises(ValueError, match=r"weights .* must have the same batch and time as the hidden states"):
        function(head, params, hidden, targets, weights.T)


def test_a_target_outside_the_vocabulary_gives_nan():
    params, hidden, targets, weights = make_arrays()
    weights[0, 0] = 1.0
    run = jax.jit(lambda targets: chunked_cross_entropy(head, params, hidden, targets, weights))
    for bad in (V, V + 5, -1):
        targets[0, 0] = bad
        assert np.isnan(run(targets.copy()))
    assert np.all(np.isnan(cross_entropy(np.zeros((1, 2, 300), np.float32), np.array([[-1, -100]], np.int8))))


def test_a_target_in_the_padding_of_the_vocabulary_gives_nan():
    params, hidden, targets, weights = make_arrays()
    table = np.pad(params["table"], ((0, 1), (0, 0)))
    weights[0, 0], targets[0, 0] = 1.0, V

    def padded_head(table, hidden):
        return unembed(table, hidden, V)

    losses = np.asarray(jax.jit(lambda hidden: cross_entropy(padded_head(table, hidden), targets))(hidden))
    assert np.isnan(losses[0, 0])
    assert np.isfinite(losses[0, 1:]).all()
    for function in (chunked_cross_entropy, selected_cross_entropy):
        loss = lambda hidden, function=function: function(padded_head, table, hidden, targets, weights)  # noqa: E731
        assert np.isnan(jax.jit(loss)(hidden))
        assert np.isnan(value_and_gradients(loss, hidden)[0])


def test_the_loss_of_bfloat16_hidden_states_is_float32():
    params, hidden, targets, weights = make_arrays()
    run = jax.jit(jax.value_and_grad(lambda h: chunked_cross_entropy(head, params, h, targets, weights)))
    got, want = run(hidden.astype(jnp.bfloat16)), run(hidden)
    assert got[0].dtype == jnp.float32
    assert got[1].dtype == jnp.bfloat16
    assert relative_error(got[0], want[0]) < 1e-2


def test_chunks_are_as_large_as_the_limit_per_device_allows(monkeypatch):
    def loss_of(hidden):
        head = lambda table, hidden: hidden @ table  # noqa: E731
        return chunked_cross_entropy(head, jnp.ones((4, V)), hidden, targets, jnp.ones((8, 16)))

    def chunks():
        trace = jax.make_jaxpr(jax.grad(loss_of))(jnp.ones((8, 16, 4)))
        lengths = [equation.params["length"] for equation in _scans(trace.jaxpr)]
        return 1 + sum(lengths)  # the first chunk is computed before the loop

    targets = jnp.zeros((8, 16), int)
    monkeypatch.setattr(choices, "cpu_choices", lambda: CpuChoices(max_logits=8 * V))
    assert chunks() == 16
    with Sharding(make_mesh("data=4,tensor=2")).scope():
        assert chunks() == 2
    monkeypatch.setattr(host, "is_freed_memory_kept", lambda: True)
    assert chunks() == 8


@pytest.mark.parametrize(("limit", "chunks"), [(147, 3), (128, 3), (127, 5), (97, 5), (63, 10), (1, 300)])
def test_chunks_on_accelerators_are_multiples_of_lanes_or_powers_of_two(monkeypatch, limit, chunks):
    params, *_ = make_arrays()
    rng = np.random.default_rng(1)
    hidden, targets = rng.normal(size=(1, 300, D)).astype(np.float32), rng.integers(0, V, (1, 300))
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")

    def chunked(params, hidden):
        return chunked_cross_entropy(head, params, hidden, targets, np.ones((1, 300)), max_chunk_logits=limit * V)

    gradient = jax.grad(chunked, argnums=(0, 1))
    assert 1 + sum(scan.params["length"] for scan in _scans(jax.make_jaxpr(gradient)(params, hidden).jaxpr)) == chunks
    _, want = value_and_gradients(lambda p, h: unchunked_loss(p, h, targets, np.ones((1, 300))), params, hidden)
    assert_trees_close(jax.jit(gradient)(params, hidden), want, 3e-6)


def _scans(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from _scans(inner)


@pytest.mark.parametrize("max_chunk_logits", [2 * 5 * V, 10**9])
def test_label_smoothing_in_value_and_all_gradients(max_chunk_logits):
    """Compare with the cross entropy of an explicit target distribution; two padding ids get no probability."""
    params, hidden, targets, weights = make_arrays()
    targets, smoothing, real = np.minimum(targets, V - 3), 0.2, np.arange(V) < V - 2

    def padded_head(params, hidden):
        return jnp.where(real[None, None], head(params, hidden), jnp.finfo(jnp.float32).min)

    def explicit_loss(params, hidden):
        log_probs = jax.nn.log_softmax(head(params, hidden)[..., : V - 2])
        distribution = (1 - smoothing) * jax.nn.one_hot(targets, V - 2) + smoothing / (V - 2)
        return -jnp.sum(weights * jnp.sum(distribution * log_probs, axis=-1))

    def chunked(params, hidden):
        return chunked_cross_entropy(
            padded_head, params, hidden, targets, weights, label_smoothing=smoothing, max_chunk_logits=max_chunk_logits
        )

    want = value_and_gradients(explicit_loss, params, hidden)
    assert_trees_close(jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden), want, 5e-6)
    assert relative_error(jax.jit(chunked)(params, hidden), want[0]) < 2e-6
    plain_loss = lambda p, h: jnp.sum(weights * cross_entropy(padded_head(p, h), targets, smoothing))  # noqa: E731
    assert relative_error(jax.jit(plain_loss)(params, hidden), want[0]) < 2e-6


def test_a_position_of_weight_0_may_have_a_hidden_state_that_is_not_finite():
    hidden, table = np.ones((1, 4, 3), np.float32), np.ones((5, 3), np.float32)
    hidden[0, 2] = np.nan
    weights = np.float32([[1.0, 1.0, 0.0, 1.0]])

    def loss(table):
        return chunked_cross_entropy(lambda t, x: x @ t.T, table, hidden, np.zeros((1, 4), np.int32), weights)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradients(loss, table)))


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    hidden, targets = np.full((1, 512, 1), 0.01, jnp.bfloat16), np.ones((1, 512), np.int32)
    table, weights = np.zeros((2, 1), jnp.bfloat16), np.ones((1, 512), np.float32)

    def loss(table, max_chunk_logits):
        return chunked_cross_entropy(
            lambda t, x: x @ t.T, table, hidden, targets, weights, max_chunk_logits=max_chunk_logits
        )

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, chunked = (np.asarray(gradient(table, size), np.float32) for size in (1024, 4))
    assert chunked[0, 0] == pytest.approx(2.56, rel=0.01)
    assert whole[0, 0] == pytest.approx(2.56, rel=0.01)


@pytest.mark.parametrize(
    ("steps", "longest", "expected"), [(100, 120, 100), (1024, 953, 512), (1024, 333, 256), (1000, 300, 256), (9, 5, 4)]
)
def test_chunks_on_an_accelerator_have_equal_aligned_lengths(monkeypatch, steps, longest, expected):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert choices.loss_chunk(steps, longest) == expected

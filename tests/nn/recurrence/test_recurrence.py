"""Tests of LSTM and GRU layers: values and gradients against a loop over steps that JAX differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm import sharding, spec
from jaxlm.nn import choices, recurrence
from jaxlm.nn.cpu_choices import CpuChoices
from jaxlm.nn.segments import segment_boundaries
from jaxlm.testing.helpers import add_noise, assert_trees_close, assert_trees_equal, initial_values, relative_error

B, T, D, H = 3, 7, 5, 4
KINDS = ("lstm", "gru_after", "gru_before")


def layer_of(kind):
    return recurrence.lstm if kind == "lstm" else recurrence.gru


@functools.cache
def setup(kind, dtype="float32"):
    if kind == "lstm":
        specs, state_specs = recurrence.lstm_specs(D, H), recurrence.lstm_state_specs(B, H)
    else:
        specs = recurrence.gru_specs(D, H, reset=kind.removeprefix("gru_"))
        state_specs = recurrence.gru_state_specs(B, H)
    params = add_noise(add_noise(initial_values(specs)))
    rng = np.random.default_rng(1)
    state = {name: rng.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in state_specs.items()}
    return params, rng.standard_normal((B, T, D)).astype(dtype), state


def reference_loop(kind, params, x, state=None, reset_BT=None, keep_BT=None, reverse=False):
    """The equations as a loop over steps, in the dtype of the parameters."""
    w, u, b = (params[name] for name in ("weight_input", "weight_hidden", "bias"))

    def product(x, weight, gate):
        return x @ weight[:, gate]

    def lstm_step(x, h, c):
        i, f, g, o = (product(x, w, gate) + product(h, u, gate) + b[gate][None] for gate in range(4))
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def gru_step(x, h):
        r, z = (jax.nn.sigmoid(product(x, w, gate) + product(h, u, gate) + b[gate][None]) for gate in range(2))
        after = kind == "gru_after"
        inner = r * (product(h, u, 2) + params["bias_hidden"][None]) if after else product(r * h, u, 2)
        n = jnp.tanh(product(x, w, 2) + b[2][None] + inner)
        return ((1 - z) * n + z * h,)

    names = ("hidden", "cell") if kind == "lstm" else ("hidden",)
    carry = tuple(jnp.zeros((x.shape[0], H)) if state is None else state[name] for name in names)
    outputs = {}
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        real = True if keep_BT is None else keep_BT[:, t, None]
        if reset_BT is not None:
            carry = tuple(jnp.where(reset_BT[:, t, None] & real, 0.0, leaf) for leaf in carry)
        new_carry = (lstm_step if kind == "lstm" else gru_step)(x[:, t], *carry)
        carry = tuple(jnp.where(real, new, old) for new, old in zip(new_carry, carry))
        outputs[t] = carry[0]
    return jnp.stack([outputs[t] for t in range(x.shape[1])], axis=1), dict(zip(names, carry))


def masks():
    rng = np.random.default_rng(4)
    return {"reset_BT": rng.random((B, T)) < 0.3, "keep_BT": rng.random((B, T)) < 0.7}


CASES = {
    "reference": ({"implementation": "reference"}, 512),
    "one chunk": ({"implementation": "chunked"}, 512),
    "chunks of 3, 3 and 1": ({}, 3 * B),  # the default implementation is chunked
    "chunks of 2 with remat": ({"remat": True}, 2 * B),
}
"""(Arguments of the layer, rows of a chunk)."""


@pytest.fixture(params=CASES)
def options(request, monkeypatch):
    arguments, rows = CASES[request.param]
    monkeypatch.setattr(choices, "cpu_choices", lambda: CpuChoices(recurrence_chunk_rows=rows))
    return arguments


def value_and_gradients(layer, params, x, state, **inputs):
    def weighted(params, x, state):
        hidden, last = layer(params, x, state, **inputs)
        leaves = [hidden, *jax.tree.leaves(last)]  # the last state is part of the loss, so that its gradient is tested
        loss = sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in leaves)
        return loss, (hidden, last)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(params, x, state)
    return jax.device_get((outputs, gradients))


@functools.cache
def reference_results(kind, masked, reverse):
    return value_and_gradients(
        functools.partial(reference_loop, kind), *setup(kind), **(masks() if masked else {}), reverse=reverse
    )


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(("masked", "reverse"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients_equal_those_of_the_loop(kind, masked, reverse, options):
    inputs = {**(masks() if masked else {}), "reverse": reverse}
    outputs, gradients = value_and_gradients(layer_of(kind), *setup(kind), **inputs, **options)
    want, want_gradients = reference_results(kind, masked, reverse)
    assert_trees_close(outputs, want, 1e-6)
    assert_trees_close(gradients, want_gradients, 2e-6)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_row_equals_the_loop(kind):
    """For one row, the weights are read in the layout in which they are stored."""
    params, x, state = setup(kind)
    arguments = params, x[:1], jax.tree.map(lambda leaf: leaf[:1], state)
    outputs, gradients = value_and_gradients(layer_of(kind), *arguments, implementation="chunked")
    want, want_gradients = value_and_gradients(functools.partial(reference_loop, kind), *arguments)
    assert_trees_close(outputs, want, 1e-6)
    assert_trees_close(gradients, want_gradients, 2e-6)


def loops_of(jaxpr):
    """Yield each loop of a jaxpr, and whether it contains another loop."""
    for eqn in jaxpr.eqns:
        inner = [loop for sub in jaxprs_in_params(eqn.params) for loop in loops_of(sub)]
        yield from inner
        if eqn.primitive.name == "scan":
            yield eqn, bool(inner)


@pytest.mark.parametrize("rows", [512, 3 * B])
@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_over_steps_carries_a_weight_gradient(kind, rows, monkeypatch):
    monkeypatch.setattr(choices, "cpu_choices", lambda: CpuChoices(recurrence_chunk_rows=rows))
    params, x, _ = setup(kind)

    def loops_with_weight_gradient(implementation):
        layer = functools.partial(layer_of(kind), implementation=implementation)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(layer(p, x)[0])))(params).jaxpr
        steps = [loop for loop, has_inner in loops_of(jaxpr) if not has_inner]
        assert len(steps) >= 2
        return [loop for loop in steps for var in loop.outvars if var.aval.shape == params["weight_hidden"].shape]

    assert not loops_with_weight_gradient("chunked")
    assert loops_with_weight_gradient("reference")


@pytest.mark.parametrize("kind", KINDS)
def test_remat_saves_no_gates(kind):
    params, x, _ = setup(kind)

    def saved_size(remat):
        layer = functools.partial(layer_of(kind), remat=remat)
        residuals = jax.eval_shape(lambda *arguments: jax.vjp(layer, *arguments)[1], params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    gates = {"lstm": 4, "gru_after": 4, "gru_before": 3}[kind]  # gru_after: also the product of the candidate
    assert saved_size(False) - saved_size(True) == gates * B * T * H


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_over_the_cell_equals_the_layer(kind):
    params, x, state = setup(kind)
    want, last = jax.jit(layer_of(kind))(params, x, state)
    cell = recurrence.lstm_cell if kind == "lstm" else recurrence.gru_cell
    step = jax.jit(lambda x, state: cell(params, recurrence.project(params, x), state))
    outputs = []
    for t in range(T):
        state = step(x[:, t], state)
        outputs.append(state["hidden"])
    assert relative_error(np.stack(outputs, axis=1), want) < 1e-6
    assert_trees_close(state, last, 1e-6)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_state_is_cast_to_float32(kind, implementation):
    params, x, state = setup(kind)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    layer = jax.jit(functools.partial(layer_of(kind), implementation=implementation))
    want = layer(params, x, jax.tree.map(lambda leaf: leaf.astype(np.float32), state))
    assert_trees_equal(layer(params, x, state), want)


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_padded_document_equals_a_separate_document(kind, reverse):
    """Each row contains two documents and padding. A separate call without padding for each document gives the same."""
    params, x, _ = setup(kind)
    segments = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 2, 0, 0, 0], [0, 1, 1, 1, 1, 2, 0]], np.int32)
    boundaries = jax.jit(functools.partial(segment_boundaries, reverse=reverse))
    reset_BT, keep_BT, _ = map(np.asarray, boundaries(segments))
    x = np.where(keep_BT[:, :, None], x, np.float32(100.0))
    layer = jax.jit(functools.partial(layer_of(kind), reverse=reverse))
    hidden, last = jax.device_get(layer(params, x, reset_BT=reset_BT, keep_BT=keep_BT))
    assert np.isfinite(hidden).all()
    for row in range(B):
        for document in (1, 2):
            index = np.flatnonzero(segments[row] == document)
            separate, separate_last = layer(params, x[row : row + 1, index])
            assert relative_error(hidden[row : row + 1, index], separate) < 1e-6
            if document == (1 if reverse else 2):  # the document that is read last
                assert_trees_close(jax.tree.map(lambda leaf: leaf[row : row + 1], last), separate_last, 1e-6)  # noqa: B023


def test_boundaries_of_documents_that_continue_across_padding_and_calls():
    segments = np.array([[1, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 3, 3, 0, 1, 1]], np.int32)
    boundaries = jax.jit(segment_boundaries, static_argnames=("include_first", "reverse"))
    reset_BT, keep_BT, last_B = boundaries(segments, np.array([1, 2, 2]))
    assert reset_BT.astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 1, 0]]
    assert keep_BT.tolist() == (segments > 0).tolist()
    assert last_B.tolist() == [2, 2, 1]
    assert boundaries(segments)[0].astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0, 0, 0, 0, 1, 0]]
    reset_BT, _, _ = boundaries(segments, np.array([1, 2, 0]), include_first=True)
    assert reset_BT.astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 1, 0]]
    reset_BT, _, _ = boundaries(segments, include_first=True)
    assert reset_BT.astype(int).tolist() == [[1, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 1, 0]]
    reset_BT, _, last_B = boundaries(segments, reverse=True)
    assert reset_BT.astype(int).tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]]
    assert last_B.tolist() == [1, 0, 3]


@pytest.mark.plain_cases(3)
@pytest.mark.parametrize(
    ("rows", "options"), [(B, "reference"), (B, "chunks of 2 with remat"), (1, "one chunk")], indirect=["options"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_a_float32_state_and_float32_gradients(kind, rows, options):
    params, x, state = setup(kind)
    x, state = x[:rows], jax.tree.map(lambda leaf: leaf[:rows], state)
    layer = functools.partial(layer_of(kind), **options)

    def gradients(x):
        def loss(p, s):
            hidden, last = layer(p, x, s)
            return jnp.sum(hidden.astype(jnp.float32) ** 2), (hidden, last)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, state)

    (got, (hidden, last)), (want, _) = gradients(x.astype(jnp.bfloat16)), gradients(x)
    assert hidden.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((last, got)))
    assert_trees_close(got, want, 0.05)


def test_the_cell_state_accumulates_in_float32_for_bfloat16_inputs():
    """A cell that adds a small number in each of 2000 steps; a bfloat16 cell state would stop growing at 2."""
    params = spec.init(recurrence.lstm_specs(1, 1, spec.ZEROS), None)
    bias = np.float32([[-5.0], [50.0], [50.0], [50.0]])  # input gate 0.0067, forget and output gates 1, candidate 1
    _, state = jax.jit(recurrence.lstm)({**params, "bias": bias}, np.zeros((1, 2000, 1), jnp.bfloat16))
    assert state["cell"].item() == pytest.approx(2000 / (1 + np.exp(5.0)), rel=1e-3)


def test_bad_inputs_raise():
    params, x, _ = setup("lstm")
    with pytest.raises(ValueError, match="the input has width 3, but weight_input needs width 5"):
        recurrence.lstm(params, x[..., :3])
    with pytest.raises(ValueError, match=r"keep_BT \[3, 2\] must be \[batch, time\] of the input, \[3, 7\]"):
        recurrence.lstm(params, x, keep_BT=np.ones((3, 2), bool))
    with pytest.raises(
        ValueError, match=r"the input \[3, 0, 5\] must be \[batch, time, width\], with at least one step"
    ):
        recurrence.gru({**params, "weight_input": params["weight_input"][:, :3]}, x[:, :0])
    hidden = np.zeros((3, H), np.float32)
    with pytest.raises(ValueError, match=rf"'cell' of the state is missing: it must be \[3, {H}\]"):
        recurrence.lstm(params, x, {"hidden": hidden})
    with pytest.raises(ValueError, match=rf"'hidden' of the state is \[2, {H}\]: it must be \[3, {H}\]"):
        recurrence.lstm(params, x, {"hidden": hidden[:2], "cell": hidden})
    with pytest.raises(ValueError, match="reset='never' is unknown: choose from 'after', 'before'"):
        recurrence.gru_specs(D, H, reset="never")
    with pytest.raises(
        ValueError, match="no lstm implementation 'fast': choose from reference, chunked, pallas, cudnn"
    ):
        recurrence.lstm(params, x, implementation="fast")
    with pytest.raises(
        ValueError, match="lstm implementation 'reference' does not support remat: leave the implementation out"
    ):
        recurrence.lstm(params, x, implementation="reference", remat=True)


def test_the_states_after_each_token_are_those_of_the_layer():
    """Also with a reset at padding and a NaN input at padding, which have no effect."""
    params, x, _ = setup("lstm")
    reset_BT, keep_BT = masks().values()
    inputs = {"reset_BT": reset_BT | ~keep_BT, "keep_BT": keep_BT}
    x = np.where(keep_BT[:, :, None], x, np.nan)

    def states(params, x, state, **inputs):
        after = recurrence.lstm_states(params, x, **inputs)
        return after["hidden"], jax.tree.map(lambda leaf: leaf[:, -1], after)

    got = value_and_gradients(states, params, x, None, **inputs)
    want = value_and_gradients(recurrence.lstm, params, x, None, **inputs)
    assert_trees_close(got, want, 2e-6)
    with pytest.raises(ValueError, match="keep_BT has dtype int64: pass a boolean array"):
        recurrence.lstm_states(params, x, reset_BT, keep_BT.astype(np.int64))
    with pytest.raises(ValueError, match="the input has width 3, but weight_input needs width 5"):
        recurrence.lstm_states(params, x[..., :3], reset_BT, keep_BT)


# --------------------------------------------------------------------------------------------------------- cuDNN


def test_unsupported_arguments_of_cudnn_give_the_reason(monkeypatch):
    params, x, _ = setup("lstm")
    with pytest.raises(
        ValueError, match="runs only on gpu, but this computation is compiled for cpu: leave the implementation out"
    ):
        recurrence.lstm(params, x, implementation="cudnn")
    with pytest.raises(ValueError, match="gru implementation 'cudnn' supports only an LSTM: leave"):
        recurrence.gru(setup("gru_after")[0], x, implementation="cudnn")
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="supports only float32, got bfloat16: leave the implementation out"):
        recurrence.lstm(params, x.astype(jnp.bfloat16), implementation="cudnn")
    with pytest.raises(ValueError, match="cannot reset the state at segment boundaries: leave the implementation out"):
        recurrence.lstm(params, x, implementation="cudnn", reset_BT=np.ones((B, T), bool))


@pytest.fixture
def cudnn_by_reference(monkeypatch):
    """Replace JAX's cuDNN call by JAX's reference implementation, because the tests have no GPU."""
    from jax.experimental import rnn

    def lstm(x, h_0, c_0, weights, lengths, *sizes):
        unpacked = rnn.unpack_lstm_weights(weights, sizes[0], sizes[1], sizes[2], sizes[4])
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *sizes)

    monkeypatch.setattr(rnn, "lstm", lstm)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, (7, 3, 1)])
def test_the_call_of_cudnn_computes_the_layer(lengths, reverse, cudnn_by_reference):
    inputs = {"reverse": reverse}
    if lengths is not None:
        inputs["keep_BT"] = np.arange(T)[None, :] < np.array(lengths)[:, None]
    got = value_and_gradients(recurrence.lstm, *setup("lstm"), **inputs, implementation="cudnn")
    want = value_and_gradients(functools.partial(reference_loop, "lstm"), *setup("lstm"), **inputs)
    assert_trees_close(got[0], want[0], 1e-6)
    assert_trees_close(got[1], want[1], 2e-6)


def test_cudnn_gives_nan_if_padding_is_not_only_at_the_end(cudnn_by_reference):
    params, x, _ = setup("lstm")
    keep_BT = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], bool)
    hidden, last = jax.jit(functools.partial(recurrence.lstm, implementation="cudnn"))(params, x, keep_BT=keep_BT)
    for leaf in (hidden, *last.values()):
        finite = np.isfinite(np.asarray(leaf)).reshape(B, -1)
        assert finite.all(axis=1).tolist() == [True, False, False]
        assert not finite[1:].any()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_an_input_of_padding_may_be_nan(implementation):
    params = initial_values(recurrence.lstm_specs(3, 4))
    x = np.random.default_rng(1).standard_normal((1, 6, 3)).astype(np.float32)
    x[0, 2] = np.nan

    def loss(params):
        reset, keep, _ = segment_boundaries(jnp.asarray([[1, 1, 0, 1, 1, 1]]))
        hidden, _ = recurrence.lstm(params, x, reset_BT=reset, keep_BT=keep, implementation=implementation)
        return jnp.sum(hidden)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))

"""LSTM and GRU layers against a plain loop, their gradients against autodiff of that loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn import recurrence
from jaxlm.nn.recurrence import borders
from tests.helpers import assert_trees_close, lively, relative_error

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
    params = lively(lively(spec.init(specs, jax.random.key(0))))
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.ndim), x.shape), spec.init(state_specs))
    return params, jax.random.normal(jax.random.key(1), (B, T, D)).astype(dtype), state


def plain(kind, params, x, state=None, reset_BT=None, keep_BT=None, reverse=False):
    """The equations, one step after the other, in the dtype of the parameters."""
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
            carry = tuple(jnp.where(reset_BT[:, t, None] & real, 0.0, one) for one in carry)
        new = (lstm_step if kind == "lstm" else gru_step)(x[:, t], *carry)
        carry = tuple(jnp.where(real, one, old) for one, old in zip(new, carry))
        outputs[t] = carry[0]
    return jnp.stack([outputs[t] for t in range(x.shape[1])], axis=1), dict(zip(names, carry))


def masks():
    rng = np.random.default_rng(4)
    return {"reset_BT": jnp.asarray(rng.random((B, T)) < 0.3), "keep_BT": jnp.asarray(rng.random((B, T)) < 0.7)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_every_gradient_are_those_of_the_plain_loop(kind, masked, reverse):
    params, x, state = setup(kind)
    inputs = {**(masks() if masked else {}), "reverse": reverse}

    def weighted(layer, params, x, state):
        hidden, last = layer(params, x, state, **inputs)
        leaves = [hidden, *jax.tree.leaves(last)]  # the last state has a gradient of its own
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in leaves), (
            hidden,
            last,
        )

    gradient = jax.value_and_grad(weighted, argnums=(1, 2, 3), has_aux=True)
    (_, want), want_gradients = jax.jit(functools.partial(gradient, functools.partial(plain, kind)))(params, x, state)
    (_, got), gradients = jax.jit(functools.partial(gradient, layer_of(kind)))(params, x, state)
    assert_trees_close(got, want, 1e-6)
    assert_trees_close(gradients, want_gradients, 2e-6)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_carries_a_weight_gradient(kind):
    params, x, _ = setup(kind)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(layer_of(kind)(p, x)[0])))(params)
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        assert all(var.aval.shape != params["weight_hidden"].shape for var in loop.outvars)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_in_another_loop_gives_what_the_layer_gives(kind):
    params, x, state = setup(kind)
    want, last = layer_of(kind)(params, x, state)
    cell = recurrence.lstm_cell if kind == "lstm" else recurrence.gru_cell
    outputs = []
    for t in range(T):
        state = cell(params, recurrence.project(params, x[:, t]), state)
        outputs.append(state["hidden"])
    assert relative_error(jnp.stack(outputs, axis=1), want) < 1e-6
    assert_trees_close(state, last, 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pads_on_either_side_and_neighbours_change_nothing(kind, reverse):
    """Rows hold two documents between pads; each document alone, without pads, gives the same."""
    params, x, _ = setup(kind)
    segments = jnp.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 2, 0, 0, 0], [0, 1, 1, 1, 1, 2, 0]], jnp.int32)
    reset_BT, keep_BT, _ = borders(segments, reverse=reverse)
    x = jnp.where(keep_BT[:, :, None], x, 100.0)
    hidden, last = layer_of(kind)(params, x, reset_BT=reset_BT, keep_BT=keep_BT, reverse=reverse)
    assert np.isfinite(np.asarray(hidden)).all()
    for row in range(B):
        for document in (1, 2):
            at = np.flatnonzero(np.asarray(segments)[row] == document)
            alone, alone_last = layer_of(kind)(params, x[row : row + 1, at], reverse=reverse)
            assert relative_error(hidden[row, at], alone[0]) < 1e-6
            if document == (1 if reverse else 2):  # the last that is read
                assert_trees_close(jax.tree.map(lambda leaf: leaf[row : row + 1], last), alone_last, 1e-6)  # noqa: B023


def test_borders_of_documents_that_go_on_across_pads_and_calls():
    segments = jnp.array([[1, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 3, 3, 0, 1, 1]], jnp.int32)
    reset_BT, keep_BT, last_B = borders(segments, jnp.array([1, 2, 2]))
    assert reset_BT.astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 1, 0]]
    assert keep_BT.tolist() == (segments > 0).tolist()
    assert last_B.tolist() == [2, 2, 1]
    assert borders(segments)[0].astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0, 0, 0, 0, 1, 0]]
    reset_BT, _, last_B = borders(segments, reverse=True)
    assert reset_BT.astype(int).tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]]
    assert last_B.tolist() == [1, 0, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_a_float32_state_and_float32_gradients(kind):
    params, x, state = setup(kind)
    hidden, last = layer_of(kind)(params, x.astype(jnp.bfloat16), state)
    assert hidden.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(last))

    def gradients(x):
        return jax.grad(lambda p, s: jnp.sum(layer_of(kind)(p, x, s)[0].astype(jnp.float32) ** 2), (0, 1))(
            params, state
        )

    got, want = gradients(x.astype(jnp.bfloat16)), gradients(x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    assert_trees_close(got, want, 0.05)


def test_a_long_float32_sum_survives_bfloat16():
    """A cell that adds a little at each of 2000 steps: in bfloat16 it would stop growing at 2."""
    params = spec.init(recurrence.lstm_specs(1, 1, spec.ZEROS), None)
    bias = jnp.array([[-5.0], [50.0], [50.0], [50.0]])  # input gate 0.0067, forget and output gates 1, candidate 1
    _, state = recurrence.lstm({**params, "bias": bias}, jnp.zeros((1, 2000, 1), jnp.bfloat16))
    assert float(state["cell"][0, 0]) == pytest.approx(2000 / (1 + np.exp(5.0)), rel=1e-3)


def test_bad_inputs_are_named():
    params, x, _ = setup("lstm")
    with pytest.raises(ValueError, match="the input is 3 wide, but weight_input is made for 5"):
        recurrence.lstm(params, x[..., :3])
    with pytest.raises(ValueError, match=r"keep_BT \[3, 2\] must be \[batch, time\] of the input, \[3, 7\]"):
        recurrence.lstm(params, x, keep_BT=jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="reset='never' is unknown: choose from 'after', 'before'"):
        recurrence.gru_specs(D, H, reset="never")

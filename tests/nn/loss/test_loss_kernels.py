"""Tests of the TPU kernels of the cross entropy, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.embedding import Unembedding
from jaxlm.nn.loss import chunked_cross_entropy, pallas, selected_cross_entropy
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close

V, D = 300, 40
LOSSES = {"chunked": chunked_cross_entropy, "selected": selected_cross_entropy}


@pytest.fixture
def kernels(monkeypatch):
    """Use the kernels as on a TPU, but in Pallas's interpreter, with small blocks and several calls."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "loss_kernels", lambda table, hidden: True)
    sizes = {"MAX_BLOCK_IDS": 128, "MAX_BLOCK_ROWS": 128, "MAX_SUM_SHARE": 2 * 128 * 128 * 4 / 2**26}
    for name, value in sizes.items():
        monkeypatch.setattr(pallas, name, value)


def make_inputs(B=4, T=90, dtype=jnp.float32, bias=True):
    """Parameters, hidden states, targets and weights. Some weights are 0, and some are negative."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}
    if bias:
        params["bias"] = jnp.asarray(rng.normal(size=V), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    targets = jnp.asarray(rng.integers(0, 290, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.8), jnp.float32)
    return params, hidden, targets, weights


def make_head(vocab_size=290, soft_cap=None):
    def head(params, hidden):
        return Unembedding(
            params["table"], jnp.sin(hidden), params.get("bias"), vocab_size=vocab_size, soft_cap=soft_cap
        )

    return head


def value_and_gradients(loss, params, hidden, targets, weights, head=None):
    """The loss without and with gradients, and the gradients."""
    head = head or make_head()
    function = lambda params, hidden: loss(head, params, hidden, targets, weights)  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(params, hidden)
    return jax.jit(function)(params, hidden), value, gradients


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("vocab_size", "soft_cap"), [(V, None), (290, 3.0)])
def test_the_kernels_have_the_value_and_the_gradients_of_the_loss(loss, bias, vocab_size, soft_cap, request):
    head, inputs = make_head(vocab_size, soft_cap), make_inputs(bias=bias)
    want = value_and_gradients(LOSSES[loss], *inputs, head)
    request.getfixturevalue("kernels")
    got = value_and_gradients(LOSSES[loss], *inputs, head)
    assert_trees_close(got, want, 1e-5)


def test_with_bfloat16_the_gradient_of_the_table_is_summed_in_float32(request):
    """The dtypes are those of the arguments, and the errors are those of rounding the hidden states and the logits'
    gradient."""
    params, hidden, *rest = make_inputs()
    want = value_and_gradients(chunked_cross_entropy, params, hidden, *rest)
    request.getfixturevalue("kernels")
    got = value_and_gradients(chunked_cross_entropy, params, hidden.astype(jnp.bfloat16), *rest)
    assert got[2][0]["table"].dtype == jnp.float32
    assert got[2][1].dtype == jnp.bfloat16
    assert_trees_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), 2e-2)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=4"])
def test_on_a_mesh_each_device_computes_its_rows(mesh, request):
    params, hidden, targets, weights = make_inputs(B=8)
    want = value_and_gradients(chunked_cross_entropy, params, hidden, targets, weights)
    request.getfixturevalue("kernels")
    sharding = Sharding(make_mesh(mesh))
    rows = sharding.named_sharding(("batch", None))
    arrays = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
    table = jax.device_put(params["table"], sharding.named_sharding(("vocab", "embed")))
    with sharding.scope():
        got = value_and_gradients(chunked_cross_entropy, params | {"table": table}, *arrays)
    assert_trees_close(got, want, 1e-5)


@pytest.mark.parametrize("target", [-1, 290, V, 1000])
def test_a_target_outside_the_vocabulary_gives_nan_unless_its_weight_is_0(target, kernels):
    params, hidden, targets, weights = make_inputs(B=1)
    hidden, targets = hidden.at[0, 5].set(jnp.nan), targets.at[0, 5].set(target)
    ignored = value_and_gradients(chunked_cross_entropy, params, hidden, targets, weights.at[0, 5].set(0))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(ignored))
    assert not ignored[2][1][0, 5].any()
    hidden = hidden.at[0, 5].set(1.0)
    for value in value_and_gradients(chunked_cross_entropy, params, hidden, targets, weights.at[0, 5].set(2))[:2]:
        assert jnp.isnan(value)


def test_the_kernels_run_in_steps_and_evaluation_but_not_under_vmap(kernels):
    params, hidden, targets, weights = make_inputs(B=2)

    def loss(params, hidden):
        return chunked_cross_entropy(make_head(), params, hidden, targets, weights)

    def count(function):
        return str(jax.make_jaxpr(function)(params, hidden)).count("pallas_call[")

    assert count(loss) == 1
    assert count(jax.grad(loss)) == 2
    models = [params, jax.tree.map(lambda x: 2 * x, params)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    got = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(stacked, hidden)
    want = [jax.jit(jax.grad(loss))(model, hidden) for model in models]
    assert_trees_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 1e-5)


def test_second_derivatives_are_those_of_the_loss(request):
    params, hidden, targets, weights = make_inputs(B=1, T=20)

    def hessian_product(params, hidden):
        gradient = jax.grad(lambda *args: chunked_cross_entropy(make_head(), *args, targets, weights), argnums=(0, 1))
        return jax.jvp(gradient, (params, hidden), (params, jnp.cos(hidden)))[1]

    want = jax.jit(hessian_product)(params, hidden)
    request.getfixturevalue("kernels")
    assert_trees_close(jax.jit(lambda *args: hessian_product(*args))(params, hidden), want, 1e-5)


def test_losses_with_label_smoothing_have_no_kernels(kernels):
    params, *inputs = make_inputs(B=1, T=20)
    loss = lambda params: chunked_cross_entropy(make_head(), params, *inputs, label_smoothing=0.1)  # noqa: E731
    assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(loss))(params))


def test_under_vmap_and_in_derivatives_the_logits_are_in_chunks(kernels):
    """The program has an array of the logits of one time step, and none of the logits of all time steps."""
    params, hidden, targets, weights = make_inputs(B=2, T=40)

    def loss(params):
        return chunked_cross_entropy(make_head(), params, hidden, targets, weights, max_chunk_logits=2 * V)

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    for function, argument, rows in (
        (jax.vmap(jax.grad(loss)), stacked, "2,2"),
        (lambda params: jax.jvp(jax.grad(loss), (params,), (params,)), params, "2"),
    ):
        text = str(jax.make_jaxpr(function)(argument))
        assert "pallas_call" not in text
        assert f"[{rows},1,{V}]" in text
        assert f"[{rows},40,{V}]" not in text


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16])
def test_narrow_integer_targets(dtype, request):
    params, hidden, targets, weights = make_inputs(B=1)
    arrays = params, hidden, (targets % 120).astype(dtype), weights
    want = value_and_gradients(chunked_cross_entropy, *arrays)
    request.getfixturevalue("kernels")
    assert_trees_close(value_and_gradients(chunked_cross_entropy, *arrays), want, 1e-5)


def test_rows_of_padding_ids_may_be_nan(kernels):
    params, hidden, targets, weights = make_inputs(B=1)
    params["table"] = params["table"].at[290:].set(jnp.nan)
    results = value_and_gradients(chunked_cross_entropy, params, hidden, targets, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results))


SUPPORTED = {"V": 4096, "D": 64, "T": 128, "table": "float32", "hidden": "bfloat16", "mesh": "data=8"}


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, True),
        ({"mesh": "fsdp=8"}, True),
        ({"table": "bfloat16"}, True),
        ({"mesh": "data=4,tensor=2"}, False),
        ({"mesh": "data=4,sequence=2"}, False),
        ({"hidden": "float32"}, False),
        ({"table": "float16"}, False),
        ({"V": 1024}, False),
        ({"D": 2048}, False),
        ({"T": 32}, False),
    ],
)
def test_the_kernels_are_chosen_for_supported_arguments(change, want, monkeypatch):
    """By default, each of the 8 devices has 4 rows and 512 positions."""
    monkeypatch.setattr(choices, "_is_new_tpu", lambda: True)
    setting = SUPPORTED | change
    table = jax.ShapeDtypeStruct((setting["V"], setting["D"]), setting["table"])
    hidden = jax.ShapeDtypeStruct((32, setting["T"], setting["D"]), setting["hidden"])
    with Sharding(make_mesh(setting["mesh"])).scope():
        assert choices.loss_kernels(table, hidden) == want

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.activation import activation
from jaxlm.nn.alignment import align, alignment_specs
from jaxlm.nn.attention import attention
from jaxlm.nn.attention.cache import append
from jaxlm.nn.attention.distance_bias import distance_bias
from jaxlm.nn.convolution import convolution_specs, depthwise_convolution, weight_norm, weight_norm_specs
from jaxlm.nn.copying import copied_tokens
from jaxlm.nn.dropout import dropout, keep_mask
from jaxlm.nn.embedding import argmax, embed, round_up, unembed
from jaxlm.nn.experts import expert_specs, load_balance_loss, mixture_of_experts
from jaxlm.nn.linear import add_bias, linear, linear_specs
from jaxlm.nn.loss import chunked_cross_entropy, cross_entropy
from jaxlm.nn.norm import layer_norm, layer_norm_specs, rms_norm, rms_norm_specs
from jaxlm.nn.recurrence import gru, gru_specs, lstm, lstm_specs, rg_lru, rg_lru_specs, slstm
from jaxlm.nn.recurrence.slstm import STATE_NAMES, slstm_specs
from jaxlm.nn.scan import Chunked, gated_delta_rule, generalized_delta_rule, linear_attention, linear_scan, mlstm
from jaxlm.nn.segments import positions_in_segments
from jaxlm.spec import ZEROS, Normal
from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal, relative_error

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("separate", "block_rows"), [(True, None), (False, None), (True, 4)])
@pytest.mark.parametrize(
    ("rows", "inputs", "shape"),
    [((3, 7), 1, (8, 3, 2, 3)), ((4, 5), 2, (3, 4, 5)), ((22,), 1, (9, 4)), ((6,), 2, (2, 2, 2, 7))],
)
def test_gradients_of_linear_equal_autodiff(monkeypatch, rows, inputs, shape, separate, block_rows, merge):
    """Functions before and after the layer make all gradients nonuniform. Weights have more inputs or more outputs."""
    monkeypatch.setattr(choices, "isolate_weight_gradient", lambda: separate)
    if block_rows:
        monkeypatch.setattr(choices, "weight_gradient_block_rows", lambda rows, outputs: block_rows)
    monkeypatch.setattr(choices, "merge_head_axes", lambda: merge)
    x = jax.random.normal(jax.random.key(0), (*rows, *shape[:inputs]))
    params = {"weight": jax.random.normal(jax.random.key(1), shape), "bias": jnp.ones(shape[inputs:])}

    def gradients(layer):
        def loss(params, x):
            y = layer(params, jnp.sin(x))
            return jnp.sum(jnp.tanh(y) * jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    def definition(params, x):
        return jnp.tensordot(x, params["weight"], inputs) + params["bias"].reshape((1,) * len(rows) + shape[inputs:])

    got = gradients(lambda params, x: linear(params, x, num_input_axes=inputs))
    assert_trees_close(got, gradients(definition), 1e-5)


def test_the_weight_gradient_of_many_rows_is_a_loop_over_blocks_on_one_device(monkeypatch):
    def gradient(rows):
        loss = lambda weight: jnp.sum(linear({"weight": weight}, jnp.ones((rows, 8))) ** 2)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, 4))))

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = 4 * choices.weight_gradient_block_rows(2**30, 4)
    assert "scan" in gradient(rows)
    assert "scan" not in gradient(rows - 1)
    assert choices.weight_gradient_block_rows(2**30, 2**20) == 1024
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert "scan" not in gradient(rows)


def test_linear_merges_the_axes_of_heads_of_an_empty_batch(monkeypatch):
    monkeypatch.setattr(choices, "merge_head_axes", lambda: True)
    bias, weight = jnp.ones((2, 4)), jnp.ones((2, 4, 8))
    assert add_bias(jnp.zeros((0, 5, 2, 4)), bias).shape == (0, 5, 2, 4)
    assert linear({"weight": weight}, jnp.zeros((0, 5, 2, 4)), num_input_axes=2).shape == (0, 5, 8)


def test_linear_with_a_head_width_that_is_split_over_explicit_axes(monkeypatch):
    """JAX cannot merge an axis with a split axis after it."""
    monkeypatch.setattr(choices, "merge_head_axes", lambda: True)
    x, weight, bias = draw(5, 8), draw(8, 2, 4), draw(2, 4)
    want = np.tensordot(x, weight, 1) + bias
    with jax.set_mesh(sharding.make_mesh("tensor=2", devices=jax.devices()[:2], axis_type=AxisType.Explicit)):
        params = {
            "weight": jax.device_put(weight, PartitionSpec(None, None, "tensor")),
            "bias": jax.device_put(bias, PartitionSpec(None, "tensor")),
        }
        assert relative_error(jax.jit(linear)(params, x), want) < 1e-6


def test_linear_over_one_and_several_axes():
    params = {"weight": draw(5, 3, 2, 4), "bias": draw(3, 2, 4)}
    x = draw(2, 7, 5)
    want = np.einsum("btd,dchk->btchk", x, params["weight"]) + params["bias"]
    assert relative_error(linear(params, x), want) < 1e-6
    params = {"weight": draw(2, 4, 5), "bias": draw(5)}
    x = draw(2, 7, 2, 4)
    want = np.einsum("bthk,hkd->btd", x, params["weight"]) + params["bias"]
    assert relative_error(linear(params, x, num_input_axes=2), want) < 1e-6
    assert linear(params, jnp.asarray(x, jnp.bfloat16), num_input_axes=2).dtype == jnp.bfloat16
    assert linear_specs((2, 4, 5), ("heads", "kv", "embed"), ZEROS, num_input_axes=2)["bias"].axes == ("embed",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_heads_on_a_tpu_equal_those_on_other_platforms(monkeypatch, dtype):
    """The gradient of the bias is the sum of the output gradients, computed in float32."""
    x, dy = jnp.asarray(draw(5, 40, 6), dtype), jnp.asarray(draw(5, 40, 3, 4), dtype)
    params = {"weight": draw(6, 3, 4), "bias": draw(3, 4)}

    def results(platform):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        out, vjp_fn = jax.vjp(linear, params, x)
        return out, vjp_fn(dy)

    (out, (got, dx)), (want_out, (want, want_dx)) = results("tpu"), results("gpu")
    assert_trees_equal((out, got["weight"], dx), (want_out, want["weight"], want_dx))
    assert relative_error(got["bias"], np.asarray(dy, np.float64).sum((0, 1))) < 1e-6


@pytest.mark.thorough
def test_layer_norm_against_its_formula_and_gradient():
    params, x = {"scale": draw(6), "bias": draw(6)}, draw(3, 4, 6)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5) * params["scale"] + params[
        "bias"
    ]
    assert relative_error(layer_norm(params, x, 1e-5), want) < 1e-6
    # Layer norm is invariant to adding a constant and to scaling, so its gradient is orthogonal to both changes.
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(layer_norm(params, x, 0.0))))(jnp.asarray(x))
    assert np.abs(np.asarray(grad).sum(-1)).max() < 1e-5
    assert np.abs(np.sum(np.asarray(grad) * x, -1)).max() < 1e-5


def test_layer_norm_statistics_are_float32():
    x = jnp.asarray(1000.0 + 20.0 * draw(1, 1, 64), jnp.bfloat16)
    out = layer_norm({"scale": jnp.ones(64), "bias": jnp.zeros(64)}, x, 1e-5)
    assert out.dtype == jnp.bfloat16
    assert float(jnp.std(out.astype(jnp.float32))) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (30.0, 1.0), (0.0, 1e-3), (-200.0, 20.0), (7.0, 0.0)])
def test_layer_norm_of_half_precision_equals_that_of_its_values_in_float32(mean, spread):
    """The one-pass variance is accurate, even if the mean is tens of standard deviations."""
    x = jnp.asarray(mean + spread * draw(2, 3, 512), jnp.bfloat16)
    params = {"scale": 1.0 + 0.1 * draw(512), "bias": draw(512)}
    weights = draw(2, 3, 512)

    def loss(x):
        return jnp.sum(layer_norm(params, x, 1e-5).astype(jnp.float32) * weights)

    x32 = x.astype(jnp.float32)
    assert relative_error(layer_norm(params, x, 1e-5), layer_norm(params, x32, 1e-5)) < 2**-7
    assert relative_error(jax.grad(loss)(x), jax.grad(loss)(x32)) < 2**-6


@pytest.mark.thorough
def test_embedding_rows_gradient_and_bad_ids():
    table, ids = draw(9, 4), np.array([[0, 8, 3, 3]])
    np.testing.assert_array_equal(embed(table, ids, jnp.float32), table[ids])
    grad = jax.grad(lambda t: jnp.sum(embed(t, jnp.asarray(ids), jnp.float32)))(jnp.asarray(table))
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], [1, 0, 0, 2, 0, 0, 0, 0, 1])
    assert np.isnan(embed(table, np.array([[9, -1]]), jnp.float32)).all()
    padded = jnp.ones((256, 3))  # the number of rows does not fit into uint8
    out = embed(padded, np.array([[249, 250]], np.uint8), jnp.float32, size=250)
    assert np.isnan(out).all(axis=-1).tolist() == [[False, True]]


def test_unembed_masks_padding_rows():
    table, hidden = draw(8, 4), draw(2, 3, 4)
    logits = unembed(table, hidden, 6)
    assert relative_error(logits[..., :6], hidden @ table[:6].T) < 1e-6
    np.testing.assert_allclose(jax.nn.softmax(logits)[..., 6:], 0.0)
    assert (round_up(65, 8), round_up(64, 8), round_up(7, 1)) == (72, 64, 7)


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((400, 400))
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.25, abs=0.01)
    assert float(jnp.mean(dropped)) == pytest.approx(1.0, abs=0.01)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    with pytest.raises(ValueError, match=r"rate=1.0 must be in \[0, 1\)"):
        dropout(x, 1.0, jax.random.key(0))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_keep_mask_has_the_given_rate_and_independent_entries(rate):
    kept = np.asarray(keep_mask(jax.random.key(1), rate, (300, 1001)), float)
    sigma = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * sigma
    # Neighbours use bits of the same random word, but they must be independent.
    neighbours = np.mean((kept[:, 0:1000:2] - kept.mean()) * (kept[:, 1:1000:2] - kept.mean()))
    assert abs(neighbours) < 4 * rate * (1 - rate) / (300 * 500) ** 0.5


@pytest.mark.thorough
def test_a_longer_keep_mask_starts_with_the_shorter_one():
    shorter, longer = (keep_mask(jax.random.key(2), 0.3, (n,)) for n in (37, 52))
    assert shorter.shape == (37,)
    assert shorter.tolist() == longer[:37].tolist()
    assert bool(jnp.all(keep_mask(jax.random.key(2), 1e-6, (5, 5))))


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 1, 4096), (2, 3, 4), (3, 11, 4)])
def test_unembed_and_its_gradients_equal_the_matmul(shape):
    """For one row, one wide row, few rows and many rows, which use different matmuls on a CPU."""
    table, hidden, weight = draw(8, shape[-1]), draw(*shape), draw(*shape[:2], 8)

    def logits_and_gradients(logits):
        values, gradients_of = jax.vjp(logits, table, hidden)
        return values, *gradients_of(weight)

    got = logits_and_gradients(lambda table, hidden: unembed(table, hidden, 8))
    want = logits_and_gradients(lambda table, hidden: hidden @ table.T)
    for array, want_array in zip(got, want, strict=True):
        assert relative_error(array, want_array) < 1e-5


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1, 4096), (4, 64)])
def test_the_logits_of_a_few_rows_do_not_copy_the_table(rows, width):
    """As in decoding, the logits have a bias, and a part of them is used. XLA would transpose the table for one row."""
    table, bias, hidden = draw(512, width), draw(512), draw(rows, 1, width)

    @jax.jit
    def first_half(table, bias, hidden):
        return (unembed(table, hidden, 512) + bias[None, None])[..., :256]

    temporary = first_half.lower(table, bias, hidden).compile().memory_analysis().temp_size_in_bytes
    assert temporary < table.nbytes / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_argmax_of_computed_logits(dtype):
    """Both uses of the logits, in the maximum and in the comparison, have the same rounding."""
    x = draw(8, 5003)

    def logits(x):
        return (30.0 * jnp.tanh(x * 1.1 / 30.0)).astype(dtype)

    want = np.asarray(jax.jit(logits)(x), np.float32).argmax(axis=-1)
    np.testing.assert_array_equal(jax.jit(lambda x: argmax(logits(x)))(x), want)


def test_argmax_returns_the_first_largest_logit():
    logits = np.random.default_rng(0).integers(-3, 3, (2, 50, 7)).astype(np.float32)  # with equal logits
    assert argmax(logits).dtype == jnp.int32
    np.testing.assert_array_equal(argmax(logits), logits.argmax(axis=-1))
    nothing_allowed, with_nan = np.full(5, -np.inf), np.array([1.0, np.nan, 2.0])
    assert int(argmax(jnp.asarray(nothing_allowed))) == 0
    assert 0 <= int(argmax(jnp.asarray(with_nan))) <= 3


@pytest.mark.parametrize(("name", "at_one"), [("gelu", 0.8413447), ("gelu_tanh", 0.8411920), ("relu", 1.0)])
def test_activations_at_one(name, at_one):
    """Each activation has the right value at 1. An unknown name is an error."""
    assert float(activation(name)(jnp.float32(1.0))) == pytest.approx(at_one, abs=1e-6)
    with pytest.raises(ValueError, match="no activation is called 'swush'"):
        activation("swush")


def test_the_derivatives_of_the_exact_gelu_equal_those_of_its_definition():
    """The function has its own rule. First derivatives in both modes, and the second derivative."""
    x = np.linspace(-8.0, 8.0, 97, dtype=np.float32)

    @jax.jit
    def derivatives(x):
        reverse = [jax.vmap(jax.grad(f))(x) for f in (activation("gelu"), exact)]
        forward = jax.jvp(activation("gelu"), (x,), (jnp.ones_like(x),))[1]
        second = [jax.vmap(jax.grad(jax.grad(f)))(x) for f in (activation("gelu"), exact)]
        return *reverse, forward, *second

    def exact(x):
        return jax.nn.gelu(x, approximate=False)

    reverse, want, forward, second, want_second = derivatives(x)
    for got in (reverse, forward):
        np.testing.assert_allclose(got, want, atol=3e-7)
    np.testing.assert_allclose(second, want_second, atol=1e-6)


def test_positions_within_documents_and_continued_from_a_state():
    segments = jnp.asarray([[0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0], [3, 3, 4, 4, 4, 0]])
    assert positions_in_segments(segments).tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 2, 0]]
    after = positions_in_segments(segments, jnp.asarray([1, 1, 3]), jnp.asarray([10, 20, 30]))
    assert after.tolist() == [[0, 0, 10, 11, 0, 1], [20, 21, 22, 0, 0, 0], [30, 31, 0, 1, 2, 0]]


def test_positions_do_not_count_padding_in_a_document():
    segments = jnp.asarray([[1, 0, 1, 1, 0, 2], [1, 1, 0, 2, 0, 2]])
    whole = positions_in_segments(segments)
    assert whole.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 1]]
    rest = positions_in_segments(segments[:, 2:], jnp.asarray([1, 1]), jnp.asarray([1, 2]))
    assert rest.tolist() == [[1, 2, 0, 0], [0, 0, 0, 1]]


@pytest.mark.thorough
def test_small_integer_ids_do_not_wrap():
    table = jnp.arange(384.0)[:, None]
    ids = jnp.asarray([[3, 255]], jnp.uint8)
    assert embed(table, ids, "float32", size=257)[..., 0].tolist() == [[3.0, 255.0]]
    for dtype in (jnp.uint8, jnp.int8):
        copied = copied_tokens(jnp.ones((1, 1, 3)), jnp.asarray([[1, 5, 100]], dtype), 300)
        assert np.flatnonzero(copied).tolist() == [1, 5, 100]


def test_append_writes_each_row_at_its_own_length():
    slots = jnp.zeros((2, 5, 1))
    after = append(slots, jnp.asarray([[[1.0], [2.0]], [[3.0], [4.0]]]), jnp.asarray([0, 3]))
    assert after[..., 0].tolist() == [[1, 2, 0, 0, 0], [0, 0, 0, 3, 4]]


def array(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def empty(*shape):
    return array(0, 9, *shape)


def dropped(x):
    return dropout(x, 0.5, jax.random.key(0))


def attention_with_bias(q, table):
    return attention(q, q, q, bias=distance_bias(table, 9, queries=9, keys=9, query_offset=0, q_BTHK=q))


def mixture(params, x):
    return mixture_of_experts(params, x, num_selected=2, renormalize=True, implementation="blocks")[0]


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (attention, [empty(4, 8)] * 3, {"implementation": "blockwise"}),
        (attention, [empty(4, 8), empty(2, 8), empty(2, 8)], {"implementation": "decode"}),
        (mixture, [expert_specs(4, 6, 3, Normal(1.0)), empty(4)], {}),
        (lstm, [lstm_specs(5, 4), empty(5)], {"implementation": "chunked"}),
        (gru, [gru_specs(5, 4), empty(5)], {"implementation": "reference"}),
        (slstm, [slstm_specs(2, 4), empty(2, 4, 4)], {}),
        (mlstm, [*[empty(2, 8)] * 3, empty(2), empty(2)], {"implementation": Chunked(4)}),
        (linear_scan, [empty(4)] * 2, {"implementation": "chunked"}),
        (linear_attention, [empty(1, 8), empty(1, 8), empty(2, 3), empty(2)], {"implementation": Chunked(4)}),
        (linear_attention, [empty(2, 8)] * 4, {"implementation": Chunked(4)}),
        (gated_delta_rule, [*[empty(2, 8)] * 3, empty(2), empty(2)], {"implementation": Chunked(4)}),
        (generalized_delta_rule, [*[empty(2, 8)] * 4, (empty(2, 8), empty(2, 8))], {"implementation": Chunked(4)}),
        (lstm, [lstm_specs(5, 4), empty(5), dict.fromkeys(("hidden", "cell"), array(0, 4))], {}),
        (slstm, [slstm_specs(2, 4), empty(2, 4, 4), dict.fromkeys(STATE_NAMES, array(0, 2, 4))], {}),
        (
            mlstm,
            [
                *[empty(2, 8)] * 3,
                *[empty(2)] * 2,
                {"cell": array(0, 2, 8, 8), "normalizer": array(0, 2, 8), "stabilizer": array(0, 2)},
            ],
            {"implementation": "reference"},
        ),
        (attention_with_bias, [empty(2, 8), array(18, 2, 8)], {}),
        (dropped, [empty(4)], {}),
        (dropped, [array(2, 0, 4)], {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_of_an_empty_batch_have_gradients(function, arguments, options):
    def total(arguments):
        return sum(jnp.sum(x) for x in jax.tree.leaves(function(*arguments, **options)))

    gradients = jax.eval_shape(jax.grad(total), arguments)
    assert jax.tree.map(lambda x: x.shape, gradients) == jax.tree.map(lambda x: x.shape, arguments)


@pytest.mark.thorough
def test_functions_of_bfloat16_need_no_implicit_dtype_promotion():
    """JAX can trace the functions and their gradients with ``jax_numpy_dtype_promotion="strict"``."""
    normal = Normal(1.0)
    ids, weights = np.zeros((2, 9), int), np.ones((2, 9), np.float32)
    masks = {"keep_BT": weights > 0}
    moe = {"num_selected": 2, "renormalize": True, **masks}
    cases = [
        (mixture_of_experts, [expert_specs(4, 6, 3, normal), array(2, 9, 4)], {**moe, "capacity_factor": 1.0}),
        (mixture_of_experts, [expert_specs(4, 6, 3, normal), array(2, 9, 4)], {**moe, "implementation": "blocks"}),
        (lambda x: cross_entropy(x, ids, 0.1), [array(2, 9, 5)], {}),
        (
            lambda table, x: chunked_cross_entropy(lambda t, x: x @ t, table, x, ids, weights, label_smoothing=0.1),
            [array(4, 5), array(2, 9, 4)],
            {},
        ),
        (align, [alignment_specs("dot", 4, 4, 4, normal, local=True), array(2, 4), array(2, 9, 4)], {"window": 2}),
        (lambda params, x: layer_norm(params, x, 1e-5), [layer_norm_specs(4), array(2, 9, 4)], {}),
        (lambda params, x: rms_norm(params, x, 1e-5), [rms_norm_specs(4), array(2, 9, 4)], {}),
        (
            lambda params: weight_norm(params, num_input_axes=2),
            [weight_norm_specs(convolution_specs((3, 4, 4), (None, None), normal), num_input_axes=2)],
            {},
        ),
        (slstm, [slstm_specs(2, 4), array(2, 9, 2, 4, 4)], masks),
        (rg_lru, [rg_lru_specs(4, 2), array(2, 9, 4)], masks),
        (mlstm, [*[array(2, 9, 2, 4)] * 3, *[array(2, 9, 2)] * 2], masks),
        (
            depthwise_convolution,
            [{"weight": array(3, 4)}, array(2, 9, 4)],
            {"padding": "causal", "implementation": "shifts"},
        ),
    ]
    with jax.numpy_dtype_promotion("strict"):
        for function, arguments, options in cases:

            def total(arguments, function=function, options=options):
                return sum(jnp.sum(x, dtype=np.float32) for x in jax.tree.leaves(function(*arguments, **options)))

            arrays = jax.tree.map(lambda x: array(*x.shape, dtype=jnp.bfloat16), arguments)
            assert jax.tree.map(lambda x: x.dtype, jax.eval_shape(jax.grad(total), arrays)) == jax.tree.map(
                lambda x: x.dtype, arrays
            )


def test_results_are_float32_if_64_bit_types_are_enabled():
    def balance_loss(params, x):
        return load_balance_loss(mixture_of_experts(params, x, num_selected=2, renormalize=True)[1])

    with jax.enable_x64(True):
        slstm_params = {**slstm_specs(2, 4), "bias": array(2, 4, 4, dtype=np.float64)}
        results = [
            jax.eval_shape(balance_loss, expert_specs(4, 6, 3, Normal(1.0)), array(2, 9, 4)),
            jax.eval_shape(lambda weights: copied_tokens(weights, np.zeros((2, 5), int), 7), array(2, 9, 5)),
            *(
                jax.eval_shape(
                    lambda *arrays, i=i: slstm(*arrays, implementation=i), slstm_params, array(2, 9, 2, 4, 4)
                )
                for i in ("reference", "chunked")
            ),
        ]
    assert {x.dtype for x in jax.tree.leaves(results)} == {np.dtype(np.float32)}

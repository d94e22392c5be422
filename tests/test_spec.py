import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.spec import ONES, ZEROS, ArraySpec, Constant, InverseSoftplus, LogOfUniform, Normal, Uniform
from jaxlm.testing.helpers import assert_trees_equal


def test_errors_name_what_is_wrong_with_a_spec():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 axes but 1 names"):
        ArraySpec((2, 3), ("embed",))
    with pytest.raises(ValueError, match="distinct"):
        ArraySpec((2, 3), ("embed", "embed"))
    with pytest.raises(ValueError, match="positive"):
        ArraySpec((2, 0), ("embed", "mlp"))


def test_spec_counts_and_compares_by_value():
    first, second = (ArraySpec((3, 4), ("embed", None), Normal(0.1), jnp.bfloat16) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != ArraySpec((3, 4), ("embed", None), Normal(0.2), jnp.bfloat16)
    assert (first.size, first.nbytes) == (12, 24)
    assert spec.count({"a": first, "b": {"c": first}}) == 24


@pytest.mark.parametrize(
    ("init", "mean", "deviation"),
    [
        (Normal(0.02), 0.0, 0.02),
        (Uniform(0.3), 0.0, 0.3 / 3**0.5),
        (ONES, 1.0, 0.0),
        (Constant(-2.0), -2.0, 0.0),
        (LogOfUniform(1.0, 16.0), 1.95743, 0.67331),
    ],
)
def test_initial_values_have_the_stated_moments(init, mean, deviation):
    (values,) = jax.tree.leaves(spec.init({"w": ArraySpec((400, 300), (None, None), init)}, jax.random.key(0)))
    assert np.mean(values) == pytest.approx(mean, abs=3e-3)
    assert np.std(values) == pytest.approx(deviation, abs=3e-3)


def test_inverse_softplus_of_a_number_with_a_uniform_logarithm():
    values = InverseSoftplus(0.001, 0.1, 1e-4)(jax.random.key(0), (400, 300), jnp.float32)
    logs = jnp.log(jax.nn.softplus(values))
    assert np.mean(logs) == pytest.approx(0.5 * np.log(0.001 * 0.1), abs=0.01)
    assert np.std(logs) == pytest.approx(np.log(100) / 12**0.5, abs=0.01)
    floored = jax.nn.softplus(InverseSoftplus(0.001, 0.1, 0.01)(jax.random.key(0), (400,), jnp.float32))
    assert np.min(floored) == pytest.approx(0.01)
    assert np.mean(floored > 0.011) == pytest.approx(0.48, abs=0.1)


def test_init_without_a_key_works_only_for_constants():
    assert np.all(np.asarray(spec.init({"s": ArraySpec((2,), ("batch",), ONES)})["s"]) == 1)
    with pytest.raises(ValueError, match=r"'a/w' has the initializer Normal\(stddev=1.0\), which needs a key"):
        spec.init({"a": {"w": ArraySpec((2,), (None,), Normal(1.0))}})


def test_layers_of_a_stack_differ_and_do_not_depend_on_the_number_of_layers():
    layer = {"w": ArraySpec((5, 6), ("embed", "mlp"), Normal(1.0))}
    three, seven = (spec.init(spec.stack(n, layer), jax.random.key(0))["w"] for n in (3, 7))
    assert three.shape == (3, 5, 6)
    np.testing.assert_array_equal(three, seven[:3])
    assert len({np.asarray(row).tobytes() for row in seven}) == 7


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_layers_have_the_same_values_in_both_layouts(implementation):
    layer = {"w": ArraySpec((5, 6), ("embed", "mlp"), Normal(1.0)), "b": ArraySpec((6,), ("mlp",), ONES)}
    stacked, per_layer = (
        {"encoder": {"layers": spec.layers([layer] * 3, stacked=is_stacked)}, "table": layer["w"]}
        for is_stacked in (True, False)
    )
    assert spec.unstack(stacked) == per_layer
    assert spec.restack(per_layer) == stacked
    key = jax.random.key(4, impl=implementation)
    values = [spec.init(specs, key) for specs in (stacked, per_layer)]
    assert_trees_equal(spec.unstack(values[0]), values[1])
    assert spec.count(stacked) == spec.count(per_layer)


def test_raw_keys_give_the_same_values_as_typed_keys():
    specs = {"a": ArraySpec((2,), (None,), Normal(1.0)), "b": ArraySpec((3,), (None,), Normal(1.0))}
    assert_trees_equal(spec.init(specs, jax.random.PRNGKey(3)), spec.init(specs, jax.random.key(3)))


def test_stacked_layers_must_be_equal():
    layer, other = ({"w": ArraySpec((width,), ("embed",), Normal(1.0))} for width in (5, 6))
    assert spec.layers([layer, other], stacked=False) == (layer, other)
    with pytest.raises(ValueError, match="layer 1 differs from layer 0: stacked layers must be equal"):
        spec.layers([layer, other], stacked=True)


def test_layers_of_different_kinds_stay_per_layer():
    layer = {"w": np.ones(2), "b": np.ones(2)}
    tree = {"layers": (layer, {"w": np.zeros(2)}, layer)}
    assert spec.restack(tree)["layers"] == tree["layers"]
    assert spec.restack({"layers": (layer, layer)})["layers"]["w"].shape == (2, 2)
    of_other_shape = {"layers": tuple({"w": ArraySpec((2, n), ("embed", "mlp"))} for n in (4, 8))}
    assert spec.restack(of_other_shape) == of_other_shape


def test_split_layer():
    for name, parts in {
        "layers/3/mlp/up": ("layers/mlp/up", 3),
        "optimizer/1/mu/encoder/layers/12/w": ("optimizer/1/mu/encoder/layers/w", 12),
        "layer_0/bias": ("layer_0/bias", None),
        "layers/mlp/up": ("layers/mlp/up", None),
    }.items():
        assert spec.split_layer(name) == parts


def test_unstack_splits_only_stacked_layers():
    stack = {"w": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "b": np.ones((2, 3), np.float32)}
    tree = {"table": np.zeros((4, 2)), "encoder": {"layers": stack}}
    per_layer = spec.unstack(tree)
    np.testing.assert_array_equal(per_layer["encoder"]["layers"][1]["w"], [[6, 7, 8], [9, 10, 11]])
    assert len(per_layer["encoder"]["layers"]) == 2
    assert per_layer["table"] is tree["table"]
    unstacked_twice = spec.unstack(per_layer)
    assert all(
        leaf is expected_leaf
        for leaf, expected_leaf in zip(jax.tree.leaves(unstacked_twice), jax.tree.leaves(per_layer), strict=True)
    )
    # Parameters, a container of parameters, and the states of several optimizers.
    for wrap in (lambda params: params, lambda params: (3, [params]), lambda params: {"adamw": (params, 3)}):
        assert_trees_equal(spec.unstack(wrap(tree)), wrap(per_layer))
        assert_trees_equal(spec.restack(wrap(per_layer)), wrap(tree))
    assert spec.restack(tree)["encoder"]["layers"] == stack


def test_fold_name_gives_different_keys_and_accepts_none():
    key = jax.random.key(0)
    first, second = (jax.random.key_data(spec.fold_in_name(key, name)).tolist() for name in ("a", "b"))
    assert first != second
    assert spec.fold_in_name(None, "a") is None


def test_diff_names_every_kind_of_difference():
    expected = {
        "a": ArraySpec((2, 3), (None, None)),
        "b": {"c": ArraySpec((4,), (None,)), "d": ArraySpec((1,), (None,))},
    }
    actual = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros((5,), np.float32)}, "e": np.zeros(2)}
    assert spec.differences(expected, actual) == [
        "missing: b/d float32[1]",
        "extra: e float64[2]",
        "differs: b/c expected float32[4], got float32[5]",
    ]
    halves = {"a": np.zeros((2, 3), np.float16), "b": {"c": np.zeros(4, np.float32), "d": np.zeros(1, np.float32)}}
    assert spec.differences(expected, halves) == ["differs: a expected float32[2, 3], got float16[2, 3]"]
    assert spec.differences(expected, halves, dtypes=False) == []
    assert spec.differences({"a": ArraySpec((), ())}, {"a": 1.0}) == ["differs: a expected float32[], got 'float'"]
    with pytest.raises(ValueError, match=r"the weights do not match \(3 differences\):\n  missing: b/d"):
        spec.require_same(expected, actual, "the weights")
    with pytest.raises(ValueError, match="and 2 more"):
        spec.require_same(expected, actual, "the weights", max_shown=1)


def test_take_and_reset_find_the_axis_by_name():
    specs = {"k": ArraySpec((2, 3, 4), ("layers", "batch", None), ZEROS), "n": ArraySpec((3,), ("batch",), ONES)}
    tree = {"k": jnp.arange(24.0).reshape(2, 3, 4), "n": jnp.asarray([5.0, 6.0, 7.0])}
    taken = spec.take_rows_clipped(specs, tree, jnp.asarray([2, 2, 0]))
    np.testing.assert_array_equal(taken["k"], np.asarray(tree["k"])[:, [2, 2, 0]])
    assert taken["n"].tolist() == [7.0, 7.0, 5.0]
    reset = spec.reset(specs, tree, jnp.asarray([False, True, False]))
    assert reset["n"].tolist() == [5.0, 1.0, 7.0]
    np.testing.assert_array_equal(reset["k"][:, 1], 0)
    np.testing.assert_array_equal(reset["k"][:, 0], np.asarray(tree["k"])[:, 0])
    per_layer = spec.unstack({"layers": {"k": specs["k"]}}), spec.unstack({"layers": {"k": tree["k"]}})
    taken_per_layer = spec.take_rows_clipped(*per_layer, jnp.asarray([2, 2, 0]))
    np.testing.assert_array_equal(taken_per_layer["layers"][1]["k"], taken["k"][1])
    with pytest.raises(ValueError, match=r"'w' has axes \('embed',\): none of them is 'batch'"):
        spec.take_rows_clipped({"w": ArraySpec((2,), ("embed",))}, {"w": jnp.zeros(2)}, jnp.asarray([0]))


def test_decay_mask_follows_the_specs():
    specs = {"w": ArraySpec((2,), (None,), decay=True), "b": ArraySpec((2,), (None,))}
    assert spec.decay_mask(specs) == {"w": True, "b": False}

"""The assertions of ``jaxlm.testing.helpers`` fail for wrong trees."""

import numpy as np
import pytest

from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal


@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("wrong", [1.0, np.nan])
def test_a_wrong_leaf_fails_also_if_the_expected_values_are_zero(wrong, floor):
    expected = {"a": np.ones(2), "b": np.zeros(2)}
    assert_trees_close(expected, expected, 0.0, floor=floor)
    with pytest.raises(AssertionError, match=r"\['b'\]: relative error"):
        assert_trees_close({**expected, "b": np.array([0.0, wrong])}, expected, 1e-3, floor=floor)


@pytest.mark.parametrize("actual", [{"b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, (np.ones(2),)])
def test_trees_of_another_structure_fail(actual):
    with pytest.raises(AssertionError, match="the structures .* differ"):
        assert_trees_close(actual, {"a": np.ones(2)}, 1e-3)
    with pytest.raises(AssertionError, match="the structures .* differ"):
        assert_trees_equal(actual, {"a": np.ones(2)})


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_an_expected_value_that_is_not_finite_fails(unknown):
    tree = {"a": np.ones(2), "b": np.array([0.0, unknown])}
    with pytest.raises(AssertionError, match=r"\['b'\]: an expected value is not finite"):
        assert_trees_close(tree, tree, 1e-3)


def test_a_rounding_error_below_the_floor_does_not_fail():
    expected = {"a": np.ones(2), "b": np.zeros(2)}
    assert_trees_close({**expected, "b": np.full(2, 1e-7)}, expected, 1e-3, floor=1e-3)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [(np.zeros((1, 2)), "shapes"), (np.zeros(2, np.int64), "dtypes"), (np.array([0.0, -0.0]), "differs")],
)
def test_equal_trees_have_equal_shapes_dtypes_and_bits(leaf, message):
    with pytest.raises(AssertionError, match=rf"\['b'\].*{message}"):
        assert_trees_equal({"b": leaf}, {"b": np.zeros(2)})

"""The objective of token classification: weights of labels, and the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import token_classification
from tests.objectives.stub import MeanModel, check_loss_and_gradient, random_tokens


def test_ignored_labels_and_padding_have_weight_0():
    labels = np.array([[2, token_classification.IGNORED_LABEL, 0, 1, 1]])
    segments = np.array([[1, 1, 2, 2, 0]])
    batch = token_classification.batch(np.ones((1, 5), np.int32), labels, segments, num_labels=3)
    assert batch.targets.tolist() == [[2, 0, 0, 1, 0]]
    assert batch.weights.tolist() == [[1, 0, 1, 1, 0]]
    assert batch.weights.dtype == np.float32
    assert token_classification.batch(np.ones((1, 5), np.int32), labels, num_labels=3).weights.tolist() == [
        [1, 0, 1, 1, 1]
    ]


def test_loss_is_the_cross_entropy_of_the_labels():
    model, tokens = MeanModel(3), random_tokens(2, 6)
    labels = np.where(tokens % 4 == 3, token_classification.IGNORED_LABEL, tokens % 4)
    batch = token_classification.batch(tokens, labels, num_labels=3)
    assert 0 < batch.weights.sum() < 12

    def reference(params):
        losses = cross_entropy(model.logits(params, model.apply(params, tokens)[0]), jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(labels >= 0, losses, 0.0))

    assert (
        check_loss_and_gradient(lambda p: token_classification.loss(model, p, batch), reference, model.init())
        == batch.weights.sum()
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((2, 3), 7), r"label 7 is not in \[0, num_labels=7\); use -100 for ignored targets"),
        (np.full((2, 3), -1), r"label -1 is not in"),
        (np.ones((2, 3), bool), "labels must be integers, got bool"),
        (np.zeros((2, 4), int), r"labels \[2, 4\] must have the shape of tokens \[2, 3\]"),
    ],
)
def test_invalid_labels_raise_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        token_classification.batch(np.zeros((2, 3), np.int32), labels, num_labels=7)
    if labels.shape == (2, 3):
        with pytest.raises(ValueError, match=message):
            token_classification.batch(np.zeros((2, 3), np.int32), labels, np.ones((2, 3), int), num_labels=7)

"""The objective of classification: batches, loss and accuracy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import get_model
from jaxlm.models.model import Metadata
from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import classification
from tests.objectives.stub import VOCAB, MeanModel, check_loss_and_gradient, random_tokens

MODEL = MeanModel(5)
TOKENS = random_tokens(4, 7)
SEGMENTS = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 7, [0] * 2 + [1] * 5], np.int32)


def test_loss_is_the_cross_entropy_of_the_pooled_output():
    batch = classification.batch(TOKENS, np.array([4, 0, classification.IGNORED_LABEL, 2]), SEGMENTS, num_labels=5)
    assert batch.targets.tolist() == [4, 0, 0, 2]
    assert batch.weights.tolist() == [1, 1, 0, 1]

    def reference(params):
        hidden, _ = MODEL.apply(params, TOKENS, segment_ids=SEGMENTS)
        last = jnp.stack([hidden[row, position] for row, position in ((0, 6), (1, 3), (3, 6))])
        return jnp.sum(cross_entropy(MODEL.logits(params, last), jnp.asarray([4, 0, 2])))

    assert check_loss_and_gradient(lambda p: classification.loss(MODEL, p, batch), reference, MODEL.init()) == 3


def test_a_row_with_weight_0_does_not_change_the_loss():
    batch = classification.batch(TOKENS, np.array([1, 1, classification.IGNORED_LABEL, 1]), SEGMENTS, num_labels=5)
    broken = batch.replace(
        tokens=np.where(np.arange(4)[:, None] == 2, VOCAB, TOKENS)
    )  # the hidden states of row 2 are NaN
    expected, actual = (classification.loss(MODEL, MODEL.init(), b)[0] for b in (batch, broken))
    assert actual == expected


def test_model_and_pooling_receive_the_dropout_key():
    class KeyedModel(MeanModel):
        def apply(self, params, tokens, *, key=None, **inputs):
            return super().apply(params, tokens, **inputs)[0] * (1.0 if key is None else 2.0), None

        def pool(self, params, hidden, segment_ids=None, key=None):
            return super().pool(params, hidden, segment_ids) * (1.0 if key is None else 0.5)

    model, batch = KeyedModel(5), classification.batch(TOKENS, np.array([4, 0, 1, 2]), num_labels=5)
    without_key, with_key = (
        classification.loss(model, model.init(), batch, key=key)[0] for key in (None, jax.random.key(0))
    )
    assert with_key == without_key  # 2 * 0.5 = 1, if apply and pool both receive the key


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 5], r"label 5 is not in \[0, num_labels=5\); use -100 for ignored targets"),
        ([0, -1, 2, 3], r"label -1 is not in \[0, num_labels=5\)"),
        ([0, 1, 2], r"labels \[3\] must have one label for each row of tokens \[4, 7\]"),
    ],
)
def test_invalid_labels_raise_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        classification.batch(np.zeros((4, 7), np.int32), np.array(labels), num_labels=5)


def test_the_batch_has_the_additional_inputs():
    types = {"token_types": np.zeros((2, 3), np.int32)}
    batch = classification.batch(np.zeros((2, 3), np.int32), np.zeros(2, int), num_labels=2, inputs=types)
    assert batch.inputs == types
    assert batch.inputs is not types


def test_class_weights_and_label_smoothing_are_defined_as_in_torch():
    labels, class_weights, smoothing = np.array([4, 0, classification.IGNORED_LABEL, 2]), (1.0, 2.0, 3.0, 4.0, 0.5), 0.1
    batch = classification.batch(TOKENS, labels, SEGMENTS, num_labels=5)
    loss = classification.make_loss(label_smoothing=smoothing, class_weights=class_weights)

    def reference(params):
        hidden, _ = MODEL.apply(params, TOKENS, segment_ids=SEGMENTS)
        log_probs = jax.nn.log_softmax(MODEL.logits(params, MODEL.pool(params, hidden, SEGMENTS))[:, 0])
        smoothed_labels = (1 - smoothing) * jax.nn.one_hot(np.maximum(labels, 0), 5) + smoothing / 5
        weights = np.where(labels >= 0, np.asarray(class_weights)[np.maximum(labels, 0)], 0.0).astype(np.float32)
        return -jnp.sum(weights * jnp.sum(smoothed_labels * log_probs, axis=-1))

    check_loss_and_gradient(lambda p: (*loss(MODEL, p, batch)[:1], 3.0, None), reference, MODEL.init())
    assert float(loss(MODEL, MODEL.init(), batch)[1]) == 0.5 + 1.0 + 3.0
    with pytest.raises(ValueError, match="2 class_weights for num_labels=5"):
        classification.make_loss(class_weights=(1.0, 2.0))(MODEL, MODEL.init(), batch)
    with pytest.raises(ValueError, match="label_smoothing=1.0 must be in"):
        classification.make_loss(label_smoothing=1.0)
    for weight in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            classification.make_loss(class_weights=(weight, 1.0))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_model_with_another_problem_type_in_its_files_is_not_trained(problem):
    model, batch = MeanModel(5), classification.batch(TOKENS, np.array([0, 1, 2, 3]), SEGMENTS, num_labels=5)
    model.problem_type = problem
    with pytest.raises(ValueError, match=f"problem_type='{problem}', but this objective needs exactly one label"):
        classification.loss(model, {}, batch)
    model.problem_type = "single_label_classification"
    classification.check_problem_type(model)


def test_a_new_head_has_no_problem_type():
    model = get_model("bert-tiny", task="classification")
    loaded = Metadata(config={"problem_type": "regression"})
    assert dataclasses.replace(model, metadata=loaded).problem_type == "regression"
    new_head = dataclasses.replace(loaded, initialized=("classifier/weight",))
    assert dataclasses.replace(model, metadata=new_head).problem_type is None


def test_accuracy_ignores_rows_with_weight_0():
    batch = classification.batch(TOKENS, np.array([0, 0, classification.IGNORED_LABEL, 0]), SEGMENTS, num_labels=5)
    params = MODEL.init()
    hidden, _ = MODEL.apply(params, TOKENS, segment_ids=SEGMENTS)
    best = np.argmax(MODEL.logits(params, MODEL.pool(params, hidden, SEGMENTS))[:, 0], axis=-1)
    correct_batch = batch.replace(targets=best.astype(np.int32))
    assert [float(x) for x in classification.accuracy(MODEL, params, correct_batch)[:2]] == [3.0, 3.0]
    wrong_batch = batch.replace(targets=((best + 1) % 5).astype(np.int32))
    assert float(classification.accuracy(MODEL, params, wrong_batch)[0]) == 0.0

"""Batches for a classifier, and training a classifier on them."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxlm.data import Batches
from jaxlm.data.buckets import Bucketed
from jaxlm.data.examples import Examples
from jaxlm.data.vocabularies import train_tokenizer
from jaxlm.metrics import proportion
from jaxlm.models import resnet
from jaxlm.objectives import classification as objective
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.tasks import classification
from jaxlm.tasks.predict import classify
from jaxlm.testing.helpers import FIRST_VARIANTS, initial_params, tiny_model
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.report import read_confusion, read_results, read_samples, write_results

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five"]
LABELS = ("colour", "number")


def examples(count=40):
    """Return random texts. The label tells whether the first word is a colour or a number."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        words = rng.choice(WORDS, rng.integers(2, 12)).tolist()
        rows.append({"text": " ".join(words), "label": LABELS[WORDS.index(words[0]) > 2]})
    return Examples(rows)


def tokenizer(template="none"):
    return train_tokenizer(WORDS, "word", 60, template=template)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["bert-tiny", "xlnet-tiny"])
def test_training_and_prediction_encode_texts_in_the_same_way(name):
    """Training and ``classify`` compute equal probabilities, because they encode texts in the same way."""
    template = {"bert-tiny": "cls_sep", "xlnet-tiny": "sep_cls"}[name]
    model = tiny_model(name, task="classification", num_labels=2).with_labels(LABELS)
    tokens, params = tokenizer(template), initial_params(model)
    data = examples(10)
    encoded = classification.encode(data, tokens, LABELS, model)
    assert ("token_types" in encoded[0]) == model.reads_token_types == True  # noqa: E712
    (batch,) = classification.batches(encoded, 2, 10, num_buckets=1)
    loss = jax.jit(lambda params: objective.loss(model, params, batch)[0])(params)
    probabilities = classify(model, params, tokens, data.column("text")).probabilities
    expected = -sum(np.log(probabilities[row, LABELS.index(label)]) for row, label in enumerate(data.column("label")))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(classification.predict(model, params, encoded, batch_size=4), probabilities, rtol=1e-5)
    assert classification.predict(model, params, [], batch_size=4).shape == (0, model.config.num_labels)
    for tokens, message in ((np.ones(3), "has dtype float64"), (np.ones((1, 1), np.int32), "must be a 1-D")):
        with pytest.raises(ValueError, match=message):
            classification.predict(model, params, [encoded[0], {**encoded[0], "tokens": tokens}])


def test_predictions_do_not_reuse_the_trace_of_another_sharding():
    model = tiny_model("lstm-encoder-tiny", num_labels=2)
    params = initial_params(model)
    encoded = [{"tokens": np.arange(1, 4, dtype=np.int32), "label": 0}] * 8
    with Sharding(make_mesh("data=8")).scope():
        expected = classification.predict(model, params, encoded, batch_size=8)
    on_one_device = jax.device_put(params, jax.devices()[0])
    np.testing.assert_allclose(classification.predict(model, on_one_device, encoded, batch_size=8), expected, rtol=1e-5)


def test_write_test_writes_the_files_for_the_report(tmp_path):
    data = Examples([{"text": text, "label": label} for text, label in (("a", "x"), ("b", "y"), ("c", "y"))])
    score = classification.write_test(tmp_path, data, ("x", "y"), np.array([0, 0, 1]))
    assert (score.value, score.count) == (pytest.approx(2 / 3), 3)
    assert read_confusion(tmp_path)[1].tolist() == [[1, 0], [1, 1]]
    assert read_samples(tmp_path)[0] == {"source": "b", "label": "y", "output": "x"}
    with pytest.raises(ValueError, match="has the label 'z': known labels are x, y"):
        classification.write_test(tmp_path, Examples([{"text": "a", "label": "z"}]), ("x", "y"), np.array([0]))


def supports_classification(name):
    try:
        model = tiny_model(name, task="classification", num_labels=2, vocab_size=64)
    except (TypeError, ValueError) as error:
        if not re.search("task|num_labels", str(error)):
            raise
        return False
    return hasattr(model.module, "pool")


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in FIRST_VARIANTS if supports_classification(name)])
def test_empty_rows_do_not_change_loss_and_gradient(name):
    """Empty rows of an incomplete batch change neither the loss nor the gradient."""
    model = tiny_model(name, task="classification", num_labels=2, vocab_size=64)
    encoded = classification.encode(examples(3), tokenizer(), LABELS, model)
    params = initial_params(model)
    evaluate = jax.jit(jax.value_and_grad(lambda params, batch: objective.loss(model, params, batch)[0]))
    results = []
    for rows in (3, 5):
        (batch,) = classification.batches(encoded, 2, rows, num_buckets=1)
        assert batch.tokens.shape[0] == rows
        results.append(evaluate(params, batch))
    (loss, gradient), (padded_loss, padded_gradient) = results
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
    for expected, actual in zip(jax.tree.leaves(gradient), jax.tree.leaves(padded_gradient), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.thorough
def test_a_classifier_for_own_examples_needs_ten_lines(tmp_path):
    data, tokens = examples(), tokenizer()
    model = tiny_model("lstm-encoder-tiny", vocab_size=tokens.vocab_size, num_labels=2).with_labels(LABELS)
    encoded = classification.encode(data, tokens, LABELS, model)
    config = TrainingConfig(steps=60, batch_size=20, evaluate_every=60, checkpoint_every=None)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-2, warmup_steps=2), model.specs, config.steps)
    trainer = config.trainer(model, optimizer, objective.loss)
    batches = Batches(Bucketed(encoded, 20, num_buckets=1), to_batch=classification.to_batch(2))
    evaluate = Evaluator(model, classification.METRICS, classification.batches(encoded, 2, 20, num_buckets=1))
    result = train(trainer, batches, evaluate, config, Run(tmp_path))
    assert result.validation["accuracy"] == 1.0
    assert classify(model, result.params, tokens, ["red one", "two blue"]).labels == list(LABELS)


def test_errors_name_bad_examples(caplog):
    model = tiny_model("bert-tiny", task="classification", num_labels=2)
    with pytest.raises(
        ValueError, match="example 0 of the examples has the label 'x': known labels are colour, number"
    ):
        classification.encode(Examples([{"text": "red", "label": "x"}]), tokenizer(), LABELS, model)
    small = tiny_model("bert-tiny", task="classification", num_labels=2, vocab_size=2)
    with pytest.raises(
        ValueError, match=r"the text '.*' of the examples: id \d+ at position 0 is outside the vocabulary of 2"
    ):
        classification.encode(examples(3), tokenizer(), LABELS, small)
    rows = [{"tokens": np.array([token], np.int32)} for token in (1, 2)]
    with pytest.raises(ValueError, match="example 1: id 2 at position 0 is outside the vocabulary of 2 ids"):
        classification.predict(small, initial_params(small), rows)
    labeler = tiny_model("bert-tiny", task="token_classification", num_labels=2)
    with pytest.raises(ValueError, match="it does not classify texts"):
        classification.predict(labeler, initial_params(labeler), rows)
    long = Examples([{"text": "red " * 100, "label": "colour"}], "long.tsv")
    with pytest.raises(
        ValueError, match="the text 'red .*' of long.tsv has 100 tokens: it must have from 1 to .* max_length"
    ):
        classification.encode(long, tokenizer(), LABELS, model)
    with caplog.at_level("WARNING", "jaxlm"):
        encoded = classification.encode(long, tokenizer(), LABELS, model, max_length=20)
    assert len(encoded[0]["tokens"]) == 20
    assert caplog.messages == ["1 of 1 texts of long.tsv are truncated to 20 tokens"]
    with pytest.raises(
        ValueError, match="the labels of long.tsv are ..colour..: a classifier needs at least two labels"
    ):
        classification.encode(long, tokenizer(), ("colour",), model)
    with pytest.raises(ValueError, match="the labels of long.tsv are .*, but the model has num_labels=2"):
        classification.encode(long, tokenizer(), ("colour", "number", "shape"), model)
    with pytest.raises(ValueError, match="a part of long.tsv must have at least one example, got none"):
        classification.encode(long[:0], tokenizer(), LABELS, model)


@pytest.mark.parametrize("template", ["none", "cls_sep"])
def test_training_and_classify_refuse_texts_without_tokens(template):
    model = tiny_model("bert-tiny", task="classification", num_labels=2)
    tokens = tokenizer(template)
    row = {"text": "red", "label": "colour"}
    with pytest.raises(
        ValueError, match="example 1 of a.tsv has the text '\\\\t', which has no tokens: leave the example"
    ):
        classification.encode(Examples([row, {**row, "text": "\t"}], "a.tsv"), tokens, LABELS, model)
    with pytest.raises(ValueError, match="text 1 is '\\\\t', which has no tokens"):
        classify(model, None, tokens, ["red", "\t"])
    pairs = Examples([{**row, "text": "", "pair": "red"}, {**row, "pair": ""}])
    assert len(classification.encode(pairs, tokens, LABELS, model)) == 2, "one of both texts may have no tokens"


def test_convolutions_get_the_length_of_the_longest_input():
    texts = ["red", "blue " * 70]
    fields = functools.partial(classification.convolution_fields, tokenizer=tokenizer(), texts=texts)
    assert fields("alexnet", changes={"kernels": (5,)}) == {"max_positions": 70, "pools": (66,)}
    assert fields("alexnet", changes={"kernels": (5,)}, max_length=64) == {"max_positions": 64, "pools": (60,)}
    assert fields("alexnet", changes={"kernels": (80,)}) == {"max_positions": 80, "pools": (1,)}
    assert fields("alexnet", changes={"kernels": (7, 3)}) == {"max_positions": 70}
    assert fields("alexnet", changes={"kernels": ("a",)}) == {"max_positions": 70}  # the config reports the wrong type
    assert fields("resnet") == {"max_positions": 72}
    assert fields("resnet", max_length=10) == {"max_positions": 64}
    assert fields("resnet", changes={"k_max": "a"}) == fields("resnet")  # the config reports the wrong type
    for changes in ({"blocks": (1, 1)}, {"blocks": (1,) * 5}, {"k_max": 30}, {"blocks": (1,), "k_max": 90}):
        resnet.Config(**changes, **fields("resnet", changes=changes))  # the length is valid
    assert fields("resnet", changes={"blocks": (1, 1)}, max_length=10) == {"max_positions": 32}


def test_folds_are_pooled_over_their_examples(tmp_path):
    scores = [proportion("accuracy", 9, 10), proportion("accuracy", 15, 30)]
    for fold, score in enumerate(scores):
        run = tmp_path / f"fold-{fold}"
        run.mkdir()
        write_results(run, task="sentiment", family="lstm", parameters=7, minutes=0.5, data="here", scores=[score])
    pooled = classification.write_folds(tmp_path, scores)
    assert (pooled.value, pooled.count) == (24 / 40, 40)
    results = read_results(tmp_path)
    assert (results["minutes"], results["parameters"], results["data"]) == (1.0, 7, "here")
    assert results["accuracy_of_folds"] == [0.9, 0.5]
    assert results["standard_deviation_over_folds"] == 0.2828
    with pytest.raises(ValueError, match="needs the scores of at least two folds, got 1: add folds"):
        classification.write_folds(tmp_path, scores[:1])

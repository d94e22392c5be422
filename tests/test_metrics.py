"""Tests of metric values, their confidence intervals, and the errors for bad input."""

import sys

import numpy as np
import pytest
import scipy.stats

from jaxlm import metrics
from jaxlm.metrics import Score


def test_a_score_prints_as_one_line():
    assert str(Score("accuracy", 0.9048, 0.8835, 0.9226, 872)) == "accuracy 0.905 [0.883, 0.923]"
    assert str(Score("BLEU", 38.214, 37.0, 39.456, 1000)) == "BLEU 38.21 [37.00, 39.46]"
    assert str(Score("perplexity", 12.5)) == "perplexity 12.50"
    with pytest.raises(ValueError, match="give both ends or neither"):
        Score("accuracy", 0.5, low=0.4)


def test_accuracy_has_a_wilson_interval():
    # Expected ends: Wilson 1927, (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) at p = 0.9, n = 10, z = 1.96.
    score = metrics.accuracy([1] * 9 + [0], [1] * 10)
    assert (score.value, score.count) == (0.9, 10)
    assert score.low == pytest.approx(0.59585, abs=1e-4)
    assert score.high == pytest.approx(0.98212, abs=1e-4)
    assert metrics.accuracy(np.array(["neg", "pos"]), ["neg", "neg"]).value == 0.5
    assert metrics.accuracy(np.array(["neg", "pos"], object), ["neg", "neg"]).value == 0.5
    assert metrics.proportion("legal moves", 20, 20).high == 1.0
    assert metrics.proportion("legal moves", 0, 20).low == 0.0
    for successes in range(8):  # an independent implementation
        expected = scipy.stats.binomtest(successes, 7).proportion_ci(method="wilson")
        score = metrics.proportion("legal moves", successes, 7)
        assert (score.low, score.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    half = metrics.proportion("score", 3.5, 7)  # three wins, three losses and a draw
    assert half.low + half.high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="legal moves: 3 successes of 2 examples"):
        metrics.proportion("legal moves", 3, 2)


@pytest.mark.parametrize(
    ("predictions", "labels", "error", "message"),
    [
        ([1, 0], [1], ValueError, r"predictions \[2\] and labels \[1\]"),
        ([], [], ValueError, "at least one"),
        ([1, 0], [1, -100], ValueError, "label -100 is negative: remove"),
        (["a"], [1], TypeError, "both must be integers or both strings"),
        (np.array(["a"], object), [1], TypeError, "both must be integers or both strings"),
        ([1], [np.nan], TypeError, "predictions are int64 and labels are float64: both must be integers"),
        (np.array([b"a"]), ["a"], TypeError, r"predictions are \|S1 and labels are <U1: both must be integers or both"),
    ],
)
def test_accuracy_rejects_bad_predictions_and_labels(predictions, labels, error, message):
    with pytest.raises(error, match=message):
        metrics.accuracy(predictions, labels)


def test_integer_labels_in_an_object_array_are_accepted():
    assert metrics.accuracy(np.array([1, 0], object), [1, 1]).value == 0.5
    assert metrics.accuracy(np.array([np.int64(1), np.int64(0)], object), [1, 1]).value == 0.5


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        (["Paris"], [{"text": ["Paris"], "answer_start": [3]}], r"answers\[0\] is dict: give a list of strings"),
        ({"q1": "Paris"}, [["Paris"]], "predictions is dict: give a list of strings"),
        ({"Paris"}, [["Paris"]], "predictions is set: give a list of strings"),
    ],
)
def test_mappings_and_sets_are_not_lists_of_strings(predictions, answers, message):
    with pytest.raises(TypeError, match=message):
        metrics.exact_match(predictions, answers)


def test_confusion_counts_labels_by_row_and_predictions_by_column():
    counts = metrics.confusion([0, 1, 1, 2, 1], [0, 0, 1, 2, 2], 4)
    np.testing.assert_array_equal(counts, [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"labels: 2 is not in \[0, num_labels=2\)"):
        metrics.confusion([0, 1], [0, 2], 2)
    with pytest.raises(TypeError, match="predictions must be integers, got <U1"):
        metrics.confusion(["a", "b"], ["a", "b"], 2)


def test_macro_f1_weights_classes_equally():
    # a: 2 of 2 predictions are right and 2 of 3 labels are found, F1 0.8. b: 1 of 2 and 1 of 1, F1 2/3.
    score = metrics.macro_f1(["a", "b", "b", "a"] * 50, ["a", "a", "b", "a"] * 50)
    assert score.value == pytest.approx((0.8 + 2 / 3) / 2)
    assert score.low < score.value < score.high
    assert score == metrics.macro_f1(["a", "b", "b", "a"] * 50, ["a", "a", "b", "a"] * 50)


def test_equal_values_have_no_bootstrap_interval():
    assert metrics.mean("a", [2.0, 2.0, 2.0]).low is None
    assert metrics.mean("a", [2.0]).interval_text == ""
    assert metrics.macro_f1([0, 1], [0, 1]).interval_text == ""


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(5.0, 2.0, 2000)
    score = metrics.mean("score", values, seed=1)
    low, high = metrics.bootstrap(lambda indices: values[indices].mean(), len(values), seed=1)
    assert (score.low, score.high) == (low, high)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert score == metrics.mean("score", values, seed=1) != metrics.mean("score", values, seed=2)
    with pytest.raises(ValueError, match=r"values\[1\] is not finite"):
        metrics.mean("score", [1.0, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        metrics.mean("score", [])


HYPOTHESES = ["the cat sat on the mat", "a dog barks at the red car", "it is raining"] * 4
REFERENCES = ["the cat sat on a mat", "The dog barks at the red car", "it rains"] * 4


def test_bleu_equals_sacrebleu_and_includes_its_signature():
    import sacrebleu

    score = metrics.bleu(HYPOTHESES, REFERENCES)
    assert score.value == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert score.low < score.value < score.high
    assert "case:mixed" in score.detail
    assert "tok:13a" in score.detail
    lower = metrics.bleu(HYPOTHESES, [text.upper() for text in REFERENCES], tokenize="none", lowercase=True)
    assert lower.value == pytest.approx(metrics.bleu(HYPOTHESES, [text.lower() for text in REFERENCES]).value)
    assert lower.name == "BLEU (none, lowercase)"
    assert "case:lc" in lower.detail
    assert "tok:none" in lower.detail


def test_bleu_of_equal_texts_is_100():
    score = metrics.bleu(["a b c d e"] * 3, ["a b c d e"] * 3)  # sacrebleu: 100.00000000000004
    assert score.low <= score.value <= score.high <= 100


def test_chrf_of_texts_without_common_characters():
    """Bootstrap samples without a match have a score of 0."""
    score = metrics.chrf(["", "", "a cat sits"], ["b dog", "c x", "a cat sits"])
    assert score.low < score.value < score.high
    assert metrics.chrf(["x", "y"], ["a b", "c d"]).value == 0.0


def test_chrf_equals_sacrebleu():
    import sacrebleu

    score = metrics.chrf(HYPOTHESES, REFERENCES)
    assert score.value == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score)
    assert score.name == "chrF2"
    assert score.low < score.value < score.high


def test_rouge_f_measures_equal_hand_computed_values():
    # "cats"/"cat" and "runs"/"running" share their stems: 3 of 4 words in both texts, 2 of 3 bigrams.
    first, second, longest = metrics.rouge(["the cats runs home"] * 2, ["the cat running away"] * 2)
    assert (first.value, second.value, longest.value) == pytest.approx((3 / 4, 2 / 3, 3 / 4))
    assert (first.name, second.name, longest.name) == ("ROUGE-1", "ROUGE-2", "ROUGE-L")
    assert (first.low, first.detail) == (None, "rouge-score, F-measure, stemmed")  # two equal examples
    first, *_ = metrics.rouge(["a cat", "b"], ["a cat", "c"])
    assert first.detail == "rouge-score, F-measure, stemmed; bootstrap of 1000 samples, seed 0"


def test_squad_normalization_and_the_best_of_several_answers():
    assert metrics.normalize_answer("  The  Saint-Denis, an Abbey! ") == "saintdenis abbey"
    predictions = ["the Eiffel Tower", "in 1889 or so", "", "Paris"]
    answers = [["Eiffel tower.", "tower"], ["1889"], [], []]
    exact = metrics.exact_match(predictions, answers)
    assert exact.value == 50.0
    assert exact.low == pytest.approx(15.004, abs=1e-3)
    # F1 of the second question: 1 common word, 4 predicted words and 1 word in the answer.
    assert metrics.token_f1(predictions, answers).value == pytest.approx(100 * (1 + 2 / 5 + 1 + 0) / 4)
    for bad_predictions, bad_answers, message in [
        ("ab", [["a"], ["b"]], "predictions is one string: give a list"),
        (["1889"], ["1889"], r"answers\[0\] is one string: give a list"),
        (["a", "b"], [["a"], None], r"answers\[1\] is NoneType: give a list of strings"),
        (["a", None], [["a"], []], r"predictions\[1\] is NoneType: it must be a string"),
        (["a", "b"], [["a"], ["b", 3]], r"answers\[1\]\[1\] is int: it must be a string"),
    ]:
        with pytest.raises(TypeError, match=message):
            metrics.exact_match(bad_predictions, bad_answers)
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        metrics.token_f1(["1889"], [["1889"], ["1890"]])


@pytest.mark.live
def test_squad_metrics_agree_with_transformers():
    from transformers.data.metrics import squad_metrics

    words = ["the", "A", "an", "Tower", "tower.", "of", "London", "1889", "—", "d'Arc", "¿qué?", "U.S.", "  ", "!"]
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(words, rng.integers(0, 5)))

    predictions = [text() for _ in range(300)]
    answers = [[text() for _ in range(rng.integers(0, 4))] for _ in range(300)]
    expected_exact, expected_f1 = [], []
    for prediction, accepted in zip(predictions, answers, strict=True):
        golds = [answer for answer in accepted if squad_metrics.normalize_answer(answer)] or [""]
        expected_exact.append(max(squad_metrics.compute_exact(gold, prediction) for gold in golds))
        expected_f1.append(max(squad_metrics.compute_f1(gold, prediction) for gold in golds))
    assert 0 < sum(expected_exact) < 300
    assert metrics.exact_match(predictions, answers).value == pytest.approx(100 * np.mean(expected_exact))
    assert metrics.token_f1(predictions, answers).value == pytest.approx(100 * np.mean(expected_f1))


@pytest.mark.parametrize("metric", [metrics.bleu, metrics.chrf, metrics.rouge])
def test_text_metrics_reject_bad_texts(metric):
    with pytest.raises(ValueError, match="2 .* for 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 .* for 0 references"):
        metric([], [])
    with pytest.raises(TypeError, match=r"references\[1\] is NoneType"):
        metric(["a", "b"], ["a", None])
    with pytest.raises(TypeError, match="references is one string"):
        metric(["a"], "a")


def test_error_for_an_unknown_sacrebleu_tokenizer():
    with pytest.raises(ValueError, match=r"tokenize='13b' must be one of none, zh, 13a"):
        metrics.bleu(["a"], ["a"], tokenize="13b")


@pytest.mark.parametrize(
    ("package", "metric"),
    [("sacrebleu.metrics", "bleu"), ("sacrebleu.metrics", "chrf"), ("rouge_score.rouge_scorer", "rouge")],
)
def test_error_for_a_missing_package_names_the_extra(monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[metrics\]' in"):
        getattr(metrics, metric)(["a"], ["a"])


def test_first_sentence() -> None:
    """A sentence ends at a line end after punctuation, or at an empty line; white space is stripped."""
    assert metrics.first_sentence(" A box, e.g.\nmade of wood. It has a lid.") == "A box, e.g."
    assert metrics.first_sentence("Version 1.2 of a box\n\nIt has a lid.") == "Version 1.2 of a box"

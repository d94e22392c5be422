"""Metric values with 95 % intervals: accuracy, F1, BLEU, chrF, ROUGE, and SQuAD's exact match and F1.

The first argument of these metrics contains the model's outputs, and the second contains the references. Each metric
returns a :class:`Score` (:func:`rouge` returns three). :func:`mean` and :func:`proportion` make a score from other
values, and :func:`confusion` counts the pairs of a label and a prediction. sacrebleu computes BLEU and chrF, and
rouge-score computes ROUGE. The extra ``metrics`` installs both packages.

Intervals of proportions are Wilson intervals (Wilson 1927). sacrebleu computes the intervals of BLEU and chrF: the mean
score of the bootstrap samples, plus or minus half the distance between the 2.5th and 97.5th percentiles of the scores,
cut to the range from 0 to 100. All other intervals are percentile bootstrap intervals over examples (Efron and
Tibshirani 1993, chapter 13). There is no percentile bootstrap interval if all examples have the same value, or, for
macro F1, if all predictions are right. Intervals account for the random choice of the examples, but not for the
training seed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxlm import extras

BOOTSTRAP_SAMPLES = 1000
"""Number of resampled test sets for a bootstrap interval, including the intervals that sacrebleu computes."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric value with its 95 % interval.

    Attributes:
        name: name of the metric, for example ``accuracy``.
        value: the metric over all examples.
        low: lower end of the interval. None: there is no interval.
        high: upper end of the interval. None: there is no interval.
        count: number of scored items, such as texts, tokens or chess moves. None: unknown.
        detail: how the value and the interval are computed, for example sacrebleu's signature.

    Raises:
        ValueError: only one of ``low`` and ``high`` is given.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.name}: low={self.low} and high={self.high}: give both ends or neither")

    @property
    def interval_text(self) -> str:
        """The interval as text, for example ``[0.884, 0.923]``; empty if there is no interval."""
        if self.low is None or self.high is None:
            return ""
        decimals = self._decimals
        return f"[{self.low:.{decimals}f}, {self.high:.{decimals}f}]"

    @property
    def value_text(self) -> str:
        """The value as text. It has as many decimals as the interval: 3 if all numbers are below 10, otherwise 2."""
        return f"{self.value:.{self._decimals}f}"

    @property
    def _decimals(self) -> int:
        largest = max(abs(number) for number in (self.value, self.low, self.high) if number is not None)
        return 3 if largest < 10 else 2

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.value_text, self.interval_text) if part)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (low, high) of a statistic of ``count`` examples.

    Args:
        statistic: a function that returns the statistic of a resampled test set, from the indices [count] of its
            examples.
        seed: seed of the random choice of the examples.
    """
    rng = np.random.default_rng(seed)
    # Draw one test set at a time, because the indices of all test sets need BOOTSTRAP_SAMPLES * count * 8 bytes.
    results = [statistic(rng.integers(0, count, count)) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def mean(name: str, values: npt.ArrayLike, seed: int = 0) -> Score:
    """The mean of ``values`` [N], one number per example, with its bootstrap interval (no interval if all are equal).

    Raises:
        ValueError: ``values`` does not have the shape [N] with N at least 1, or a value is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"values must have the shape [N] with N at least one, got shape {list(numbers.shape)}")
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"values[{int(np.argmin(np.isfinite(numbers)))}] is not finite")
    if np.ptp(numbers) == 0:
        return Score(name, float(numbers[0]), count=len(numbers))
    low, high = bootstrap(lambda indices: float(numbers[indices].mean()), len(numbers), seed)
    return Score(name, float(numbers.mean()), low, high, len(numbers), _bootstrap_detail(seed))


def proportion(name: str, successes: float, count: int) -> Score:
    """``successes / count`` with its Wilson interval.

    Args:
        successes: a number that need not be an integer. For example, a drawn game can count 0.5.

    Raises:
        ValueError: ``count`` is less than 1, or ``successes`` is not in [0, count].
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{name}: {successes} successes of {count} examples: need 0 <= successes <= count, count >= 1")
    z = 1.959963984540054  # the 97.5th percentile of a normal distribution
    p, z2 = float(successes / count), z**2 / int(count)
    center, half = p + z2 / 2, math.sqrt(z2 * p * (1 - p) + z2**2 / 4)
    low = 0.0 if successes == 0 else (center - half) / (1 + z2)
    high = 1.0 if successes == count else (center + half) / (1 + z2)
    return Score(name, p, low, high, int(count), "Wilson interval")


# --------------------------------------------------------------------------------------------- classification


def accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> Score:
    """The fraction of predictions [N] that equal their labels [N] (integers or strings), with its Wilson interval.

    Raises:
        ValueError: the arrays do not have the same shape [N] with N at least 1, or a label is negative, such as the
            label -100 of an ignored position.
        TypeError: the arrays have neither integers nor strings, or one has integers and the other has strings.
    """
    predicted, expected = _check_labels(predictions, labels)
    return proportion("accuracy", int(np.sum(predicted == expected)), len(expected))


def confusion(predictions: npt.ArrayLike, labels: npt.ArrayLike, num_labels: int) -> np.ndarray:
    """The confusion matrix [num_labels, num_labels]: entry (i, j) counts the examples with label i and prediction j.

    Raises:
        ValueError: the arrays do not have the same shape [N] with N at least 1, or a label or prediction is outside
            [0, num_labels).
        TypeError: the labels or predictions are not integers.
    """
    predicted, expected = _check_labels(predictions, labels)
    for name, values in (("predictions", predicted), ("labels", expected)):
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} must be integers, got {values.dtype}")
        outside = values[(values < 0) | (values >= num_labels)]
        if outside.size:
            raise ValueError(f"{name}: {outside[0]} is not in [0, num_labels={num_labels})")
    pairs = expected.astype(np.int64) * num_labels + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels)


def macro_f1(predictions: npt.ArrayLike, labels: npt.ArrayLike, seed: int = 0) -> Score:
    """The unweighted mean of the F1 in [0, 1] over all classes, with a bootstrap interval.

    The classes are all values that occur in the labels [N] or the predictions [N] (integers or strings). There is no
    interval if all predictions are right.

    Raises:
        ValueError: the arrays do not have the same shape [N] with N at least 1, or a label is negative.
        TypeError: the arrays have neither integers nor strings, or one has integers and the other has strings.
    """
    predicted, expected = _check_labels(predictions, labels)
    classes, class_indices = np.unique(np.concatenate([predicted, expected]), return_inverse=True)
    predicted, expected = np.split(class_indices, 2)

    # ``confusion`` is not used here, because its result would be too large for many classes.
    def counts_of(indices: np.ndarray) -> np.ndarray:
        return np.bincount(indices, minlength=len(classes))

    def score(indices: np.ndarray | slice) -> float:
        sample_predicted, sample_expected = predicted[indices], expected[indices]
        occurrences = counts_of(sample_predicted) + counts_of(sample_expected)
        occurs = occurrences > 0  # a resampled test set may not contain all classes
        correct = sample_predicted[sample_predicted == sample_expected]
        return float(np.mean(2 * counts_of(correct)[occurs] / occurrences[occurs]))

    if np.array_equal(predicted, expected):
        return Score("macro F1", 1.0, count=len(expected))
    low, high = bootstrap(score, len(expected), seed)
    return Score("macro F1", score(slice(None)), low, high, len(expected), _bootstrap_detail(seed))


# --------------------------------------------------------------------------------------------- generated text


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a", lowercase: bool = False
) -> Score:
    """Corpus BLEU in [0, 100] (Papineni et al. 2002), computed by sacrebleu (Post 2018).

    The name of the score includes a tokenizer or case that is not the default, for example ``BLEU (intl, lowercase)``.
    sacrebleu computes the interval from 1,000 bootstrap samples. This needs about 50 MB of memory per 1,000 sentences.
    The environment variable ``SACREBLEU_SEED`` sets the seed (default 12345). ``detail`` is sacrebleu's signature with
    the tokenizer, the case, the smoothing and the version.

    Args:
        hypotheses: detokenized outputs.
        references: one detokenized reference for each output.
        tokenize: sacrebleu's tokenizer: ``13a`` (WMT), ``intl``, ``char``, ``none``, ...
        lowercase: whether to ignore case.

    Raises:
        ValueError: the numbers of texts differ, there are no texts, or the tokenizer is unknown.
        TypeError: ``hypotheses`` or ``references`` is one string, or has an item that is not a string.
        ImportError: sacrebleu is not installed.
    """
    metrics = import_sacrebleu()
    _check_texts(hypotheses, references, "hypotheses")
    if tokenize not in metrics.BLEU.TOKENIZERS:
        raise ValueError(f"tokenize={tokenize!r} must be one of {', '.join(metrics.BLEU.TOKENIZERS)}")
    variant = ", ".join([tokenize] * (tokenize != "13a") + ["lowercase"] * lowercase)
    name = f"BLEU ({variant})" if variant else "BLEU"
    return _corpus_score(name, metrics.BLEU(tokenize=tokenize, lowercase=lowercase), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False) -> Score:
    """Corpus chrF2 in [0, 100] (Popović 2015): the F-score of character 1- to 6-grams with beta = 2.

    sacrebleu computes the score. The arguments, the interval and the errors are the same as for :func:`bleu`, but there
    is no tokenizer.
    """
    metrics = import_sacrebleu()
    _check_texts(hypotheses, references, "hypotheses")
    return _corpus_score(
        "chrF2 (lowercase)" if lowercase else "chrF2", metrics.CHRF(lowercase=lowercase), hypotheses, references
    )


def rouge(predictions: Sequence[str], references: Sequence[str], seed: int = 0) -> tuple[Score, Score, Score]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures in [0, 1] (Lin 2004), averaged over examples, with Porter stemming.

    The intervals are bootstrap intervals over examples. A score has no interval if all examples have the same value.
    rouge-score's tokenizer keeps only the letters a-z and digits, so the values are meaningful only for English.

    Raises:
        ValueError: the numbers of texts differ, or there are no texts.
        TypeError: ``predictions`` or ``references`` is one string, or has an item that is not a string.
        ImportError: rouge-score is not installed.
    """
    rouge_scorer = import_rouge_scorer()
    _check_texts(predictions, references, "predictions")
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=True)
    results = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    scores = (mean(name, [result[key].fmeasure for result in results], seed) for key, name in names.items())
    method = "rouge-score, F-measure, stemmed"
    rouge_1, rouge_2, rouge_l = (
        dataclasses.replace(score, detail="; ".join(part for part in (method, score.detail) if part))
        for score in scores
    )
    return rouge_1, rouge_2, rouge_l


# --------------------------------------------------------------------------------------------- question answering

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_sentence(text: str) -> str:
    """The first sentence of a text, or its first paragraph if that is shorter: the summary of the baseline "lead-1".

    A sentence ends at the first ``.``, ``!`` or ``?`` before white space.
    """
    return re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0]


def normalize_answer(text: str) -> str:
    """The normalized answer of SQuAD: lower case, without punctuation, articles and extra white space.

    The definition is that of the official evaluation script (Rajpurkar et al. 2016).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Score:
    """The percentage [0, 100] of predictions that equal an accepted answer after :func:`normalize_answer`.

    The interval is a Wilson interval.

    Args:
        predictions: one text for each question; empty if the model gives no answer.
        answers: the accepted answers of each question; empty for a question without an answer.

    Raises:
        ValueError: the numbers of predictions and questions differ, or there are no questions.
        TypeError: ``predictions`` or the accepted answers of a question are not a list, or have an item that is not a
            string.
    """
    matches = [
        any(normalize_answer(prediction) == normalize_answer(answer) for answer in accepted)
        for prediction, accepted in predictions_and_answers(predictions, answers)
    ]
    score = proportion("exact match", sum(matches), len(matches))
    assert score.low is not None
    assert score.high is not None
    return dataclasses.replace(score, value=100 * score.value, low=100 * score.low, high=100 * score.high)


def token_f1(predictions: Sequence[str], answers: Sequence[Sequence[str]], seed: int = 0) -> Score:
    """SQuAD's F1 in [0, 100], averaged over questions: the highest :func:`word_f1` of the prediction and an answer.

    For a question without an answer, the F1 is 100 if the prediction has no words, and 0 otherwise (SQuAD 2.0). The
    arguments and errors are the same as for :func:`exact_match`. The interval is a bootstrap interval over questions.
    """
    values = [
        max(word_f1(prediction, answer) for answer in accepted)
        for prediction, accepted in predictions_and_answers(predictions, answers)
    ]
    return mean("F1", [100 * value for value in values], seed)


def word_f1(prediction: str, answer: str) -> float:
    """The F1 in [0, 1] of the words of two texts after :func:`normalize_answer`.

    A word that occurs n times counts n times. If both texts have no words, the F1 is 1. If only one text has no
    words, the F1 is 0.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def predictions_and_answers(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[tuple[str, Sequence[str]]]:
    """Each prediction with its accepted answers. The errors are those of :func:`exact_match`.

    As in SQuAD 2.0, answers with an empty normalized form are ignored. If no answer is left, the only accepted answer
    is the empty text.
    """
    _check_strings("predictions", predictions)
    if len(predictions) != len(answers) or not len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(answers)} questions: give one prediction for each question, and "
            "at least one question"
        )
    for index, accepted in enumerate(answers):
        _check_strings(f"answers[{index}]", accepted)
    return [
        (prediction, [answer for answer in accepted if normalize_answer(answer)] or [""])
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]


# --------------------------------------------------------------------------------------------- shared functions


def _bootstrap_detail(seed: int) -> str:
    return f"bootstrap of {BOOTSTRAP_SAMPLES} samples, seed {seed}"


def _check_labels(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check the predictions and the labels, and return them as arrays [N]."""
    predicted, expected = (_without_objects(np.asarray(values)) for values in (predictions, labels))
    if predicted.shape != expected.shape or expected.ndim != 1 or not expected.size:
        raise ValueError(
            f"predictions {list(predicted.shape)} and labels {list(expected.shape)} must have the same shape [N], "
            "with N at least one"
        )
    kinds = "U" if expected.dtype.kind == "U" else "iub"
    if predicted.dtype.kind not in kinds or expected.dtype.kind not in kinds:
        raise TypeError(
            f"predictions are {predicted.dtype} and labels are {expected.dtype}: both must be integers or both strings"
        )
    if expected.dtype.kind != "U" and np.any(expected < 0):
        raise ValueError(f"label {expected[expected < 0][0]} is negative: remove ignored examples")
    return predicted, expected


def _without_objects(values: np.ndarray) -> np.ndarray:
    """The array. An object array with only strings, or with only integers, gets the dtype of strings or integers."""
    is_uniform = any(all(isinstance(value, kind) for value in values.flat) for kind in (str, (int, np.integer)))
    return np.asarray(values.tolist()) if values.dtype == object and is_uniform else values


def _check_strings(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str | Mapping | Set) or not isinstance(values, Collection):
        kind = "one string" if isinstance(values, str) else type(values).__name__
        raise TypeError(f"{name} is {kind}: give a list of strings")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] is {type(value).__name__}: it must be a string")


def _check_texts(texts: Sequence[str], references: Sequence[str], name: str) -> None:
    for argument, values in ((name, texts), ("references", references)):
        _check_strings(argument, values)
    if len(texts) != len(references) or not len(texts):
        raise ValueError(
            f"{len(texts)} {name} for {len(references)} references: give the same number of both, and at least one"
        )


def import_sacrebleu() -> Any:
    """The module ``sacrebleu.metrics``. If sacrebleu is not installed, an ``ImportError`` names the extra."""
    return extras.import_optional("sacrebleu.metrics", "metrics", "BLEU and chrF need sacrebleu")


def import_rouge_scorer() -> Any:
    """The module ``rouge_scorer`` of the package rouge-score. If the package is not installed, an ``ImportError`` names
    the extra that installs it."""
    return extras.import_optional("rouge_score.rouge_scorer", "metrics", "ROUGE needs rouge-score")


def _corpus_score(name: str, metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    compute = metric._compute_score_from_stats

    def compute_float(stats: Any) -> Any:
        # sacrebleu's mean over the bootstrap samples raises an error if some scores are float32 and others are float.
        sample_score = compute(stats)
        sample_score.score = float(sample_score.score)
        return sample_score

    metric._compute_score_from_stats = compute_float
    result = metric.corpus_score(list(hypotheses), [list(references)], n_bootstrap=BOOTSTRAP_SAMPLES)
    # sacrebleu returns the interval only as text and in two private attributes: its center and half of its width.
    # A rounding error can make the score of equal texts larger than 100.
    numbers = (result.score, result._mean - result._ci, result._mean + result._ci)
    value, low, high = (min(100.0, max(0.0, float(number))) for number in numbers)
    return Score(name, value, low, high, len(hypotheses), str(metric.get_signature()))

"""Question answering: training targets of windows, and the best spans, which must equal those of a brute-force search.

Live tests compare windows with those of transformers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.data import ByteTokenizer, CharTokenizer, train_tokenizer
from jaxlm.data.buckets import Bucketed
from jaxlm.data.encodings import Encoding
from jaxlm.data.examples import Examples
from jaxlm.decoding import NotFiniteError
from jaxlm.tasks import question_answering
from jaxlm.tasks.question_answering import (
    Answer,
    answer,
    best_no_answer_threshold,
    to_batch,
    training_windows,
    write_test,
)
from jaxlm.testing.helpers import add_noise, initial_params, tiny_model
from jaxlm.training.report import read_attention, read_samples

BYTES = ByteTokenizer()
CONTEXTS = (
    "Ångström\u2019s café \u2013 in Malmö \u2013 opened in 1998; in 1998 it closed. "
    "東京 has a second café: \u201cÅngström II\u201d.",
    "The Norse raiders (Normans) came from Denmark, Iceland and Norway. " * 6 + "Their leader was Rollo, of Norway.",
    "A a a a b a a. The answer is a\u0301 and not a!\nIt costs $3.50\u20134.00 per kg.",
)
ANSWERS = (
    ("in 1998", "1998", "Malmö", "東京", "\u201cÅngström II\u201d", "Ångström\u2019s café", "."),
    ("Norway", "Rollo", "Denmark, Iceland and Norway", "(Normans)", "leader was Rollo"),
    ("a a b", "b", "$3.50\u20134.00", "a!\nIt", "not a!"),
)
MODELS = ("bert-tiny", "roberta-tiny", "xlnet-tiny")


def examples() -> list[dict[str, Any]]:
    """Return one example for every occurrence of every answer."""
    result = []
    for context, answers in zip(CONTEXTS, ANSWERS, strict=True):
        for text in answers:
            start = context.find(text)
            while start >= 0:
                example = {"id": f"{text}-{start}", "question": "What is it?", "context": context}
                result.append({**example, "answers": [text], "starts": [start]})
                start = context.find(text, start + 1)
    return result


EXAMPLES = examples()


@functools.cache
def tokenizer(name: str) -> Any:
    texts = [*CONTEXTS, "What is it?"]
    match name:
        case "bytes":
            return BYTES
        case "characters":
            return CharTokenizer.from_text("".join(texts))
        case _:
            kind, template = name.split()
            return train_tokenizer(texts, kind, 330, template=template)  # type: ignore[arg-type]


QA_MODEL = tiny_model("bert-tiny", vocab_size=400, task="span_qa", max_positions=256, num_token_types=3)
"""A model for ``training_windows``, which needs no parameters."""


@functools.cache
def model_and_params(name: str, **fields: Any) -> tuple[Any, Any]:
    model = tiny_model(name, vocab_size=400, task="span_qa", **fields)
    return model, add_noise(initial_params(model))


def windows_of(name: str, example: dict[str, Any], max_length: int, stride: int) -> list[Encoding]:
    return tokenizer(name).encode_windows(example["question"], example["context"], max_length=max_length, stride=stride)


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe cls_sep", "unigram sep_cls", "bpe bos_eos"])
def test_targets_are_the_answer_in_every_window_that_contains_it(name: str) -> None:
    max_length, stride = 80, 30
    assert len(EXAMPLES) > 35
    for example in EXAMPLES:
        (text,), (start,) = example["answers"], example["starts"]
        rows = training_windows(QA_MODEL, tokenizer(name), [example], max_length=max_length, stride=stride)
        windows = windows_of(name, example, max_length, stride)
        num_windows_with_answer = 0
        for row, window in zip(rows, windows, strict=True):
            np.testing.assert_array_equal(row["tokens"], window.ids)
            offsets = window.offsets[window.sequence_ids == 1]
            first, last = row["first"], row["last"]
            if offsets[0, 0] <= start and offsets[-1, 1] >= start + len(text):
                num_windows_with_answer += 1
                assert window.sequence_ids[first] == window.sequence_ids[last] == 1
                target_text = example["context"][window.offsets[first, 0] : window.offsets[last, 1]]
                assert text in target_text
                if name in ("bytes", "characters"):
                    assert target_text == text
                # The target has no unnecessary tokens: its first and last tokens overlap the answer.
                inside = (window.sequence_ids == 1) & (window.offsets[:, 1] > start)
                inside &= window.offsets[:, 0] < start + len(text)
                assert (first, last) == (np.flatnonzero(inside)[0], np.flatnonzero(inside)[-1])
            elif "sep_cls" in name:
                assert first == last == window.ids.size - 1
            else:
                assert first == last == 0
        assert num_windows_with_answer >= 1


def test_the_target_is_the_most_frequent_answer() -> None:
    example = {**EXAMPLES[0], "answers": ["Malmö", "1998", "1998", "in 1998"], "starts": [21, 48, 39, 45]}
    (row,) = training_windows(QA_MODEL, BYTES, [example])
    (window,) = windows_of("bytes", example, 256, 0)
    assert window.offsets[row["first"], 0] == 21, "all pairs of text and start are different: the first is used"
    example = {**example, "answers": ["Malmö", "1998", "1998"], "starts": [21, 39, 39]}
    (row,) = training_windows(QA_MODEL, BYTES, [example])
    assert window.offsets[row["first"]].tolist() == [39, 40]


def test_white_space_around_an_answer_is_not_part_of_the_target() -> None:
    context = EXAMPLES[0]["context"]
    example = {**EXAMPLES[0], "answers": [" in 1998; "], "starts": [context.index(" in 1998; ")]}
    (row,) = training_windows(QA_MODEL, tokenizer("bpe cls_sep"), [example])
    (window,) = windows_of("bpe cls_sep", example, 256, 0)
    assert context[window.offsets[row["first"], 0] : window.offsets[row["last"], 1]] == "in 1998;"


def test_the_target_of_unanswerable_questions_is_the_cls_token() -> None:
    example = {**EXAMPLES[20], "answers": [], "starts": []}
    for name in ("bytes", "bpe cls_sep", "unigram sep_cls"):
        for row in training_windows(QA_MODEL, tokenizer(name), [example], max_length=64):
            position = row["tokens"].size - 1 if "sep_cls" in name else 0
            assert row["first"] == row["last"] == position


def test_a_batch_has_token_types_and_weight_0_for_empty_rows() -> None:
    rows = training_windows(QA_MODEL, tokenizer("bpe cls_sep"), EXAMPLES[:3], max_length=64)
    source = Bucketed(rows, batch_size=len(rows) + 2, num_buckets=1, shuffle=False)
    batch = to_batch(source.batch(0, range(len(rows) + 2)))
    assert batch.weights.tolist() == [1.0] * len(rows) + [0.0] * 2
    assert batch.inputs["token_types"].max() == 1
    assert [row["first"] for row in rows] == batch.targets[:-2, 0].tolist()
    assert batch.segment_ids.sum(axis=1).tolist() == [row["tokens"].size for row in rows] + [1] * 2


def test_batches_are_not_longer_than_max_length() -> None:
    windows = training_windows(QA_MODEL, tokenizer("bpe cls_sep"), EXAMPLES[:6], max_length=30)
    assert max(window["tokens"].size for window in windows) == 30
    lengths = [
        max(batch.tokens.shape[1] for batch in question_answering.batches(windows, 4, max_length=limit))
        for limit in (30, None)
    ]
    assert lengths == [30, 32]
    with pytest.raises(ValueError, match=r"tokens of example \d+ has 30 entries, more than max_length=29"):
        question_answering.batches(windows, 4, max_length=29)


def test_errors_name_questions_with_nonfinite_logits() -> None:
    model, params = model_and_params("bert-tiny")
    table = params["token_embedding"].at[ord("*"), 0].set(np.inf)
    with pytest.raises(NotFiniteError, match=r"the logits of question 1 are not finite: .*: token_embedding \(1 of"):
        answer(
            model, {**params, "token_embedding": table}, BYTES, ["Who?"] * 3, ["a" * 90, "b" * 80 + "*", "c"],
            max_length=50,
        )  # fmt: skip


def test_errors_for_invalid_training_examples() -> None:
    model = model_and_params("bert-tiny")[0]
    with pytest.raises(ValueError, match="question 'q': no window has the whole answer .*: use a larger stride"):
        training_windows(
            model, BYTES, [{**EXAMPLES[20], "id": "q", "answers": [CONTEXTS[1][5:60]], "starts": [5]}],
            max_length=48, stride=5,
        )  # fmt: skip
    with pytest.raises(ValueError, match="question 'q': the context has no tokens: ''"):
        training_windows(model, BYTES, [{**EXAMPLES[0], "id": "q", "context": ""}])
    with pytest.raises(ValueError, match="question 'q': id 104 at position 1 is outside the vocabulary of 100 ids"):
        training_windows(tiny_model("bert-tiny", vocab_size=100, task="span_qa"), BYTES, [{**EXAMPLES[0], "id": "q"}])
    with pytest.raises(ValueError, match="a masked-token head: it does not answer questions"):
        training_windows(tiny_model("bert-tiny"), BYTES, EXAMPLES)
    with pytest.raises(ValueError, match="the tokenizer returns token type 1, but roberta has num_token_types=1"):
        training_windows(tiny_model("roberta-tiny", vocab_size=400, task="span_qa"), tokenizer("bpe cls_sep"), EXAMPLES)
    with pytest.raises(ValueError, match="max_length=65 must be at most 64, the model's max_positions"):
        training_windows(model, BYTES, EXAMPLES, max_length=65)
    space = CONTEXTS[0].index(" ")
    with pytest.raises(ValueError, match="question 'q': the answer ' ' has no tokens: remove this example, or"):
        training_windows(QA_MODEL, BYTES, [{**EXAMPLES[0], "id": "q", "answers": [" "], "starts": [space]}])
    with pytest.raises(ValueError, match="question 'q': the answer 'in 1998' is not at character 1 of the context"):
        training_windows(QA_MODEL, BYTES, [{**EXAMPLES[0], "id": "q", "answers": ["in 1998"], "starts": [1]}])
    with pytest.raises(ValueError, match="question 'q' has 2 'answers' and 1 'starts': give one start per answer"):
        training_windows(QA_MODEL, BYTES, [{**EXAMPLES[0], "id": "q", "answers": ["a", "b"], "starts": [0]}])
    with pytest.raises(ValueError, match="question 'q' has no field 'starts': convert SQuAD's format with"):
        training_windows(QA_MODEL, BYTES, [{"id": "q", "question": "?", "context": "a b", "answers": {"text": ["a"]}}])


# -------------------------------------------------------------------------------------------------- answers


@functools.cache
def logits(name: str) -> Any:
    """Return a compiled function of params, ids [T] and token types that returns logits [T, 2]."""
    model = model_and_params(name)[0]

    @jax.jit
    def compute(params: Any, ids: Any, types: Any) -> Any:
        inputs = {} if types is None else {"token_types": types[None]}
        return model.logits(params, model.apply(params, ids[None], **inputs)[0])[0]

    return compute


def brute_force(name: str, tokens: Any, question: str, context: str, max_tokens: int, size: tuple[int, int]) -> Answer:
    """Return the best of all spans of all windows. Each window is a batch without padding."""
    params = model_and_params(name)[1]
    best, no_answer_score = (-np.inf, 0, 0), np.inf
    for window in tokens.encode_windows(question, context, max_length=size[0], stride=size[1]):
        starts, ends = np.asarray(logits(name)(params, window.ids, window.token_types)).T
        cls_position = window.ids.size - 1 if window.ids[-1] == tokens.special_ids.cls else 0
        no_answer_score = min(no_answer_score, starts[cls_position] + ends[cls_position])
        inside = np.flatnonzero(window.sequence_ids == 1).tolist()
        for first in inside:
            for last in inside:
                if first <= last < first + max_tokens and starts[first] + ends[last] > best[0]:
                    span = int(window.offsets[first, 0]), int(window.offsets[last, 1])
                    best = (starts[first] + ends[last], *span)
    return Answer(context[best[1] : best[2]], float(best[0] - no_answer_score), best[1], best[2])


TOKENIZER_OF = {"bert-tiny": "bpe cls_sep", "roberta-tiny": "bpe bos_eos", "xlnet-tiny": "unigram sep_cls"}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_best_spans_of_all_windows(name: str) -> None:
    max_tokens = 7
    tokens = tokenizer(TOKENIZER_OF[name])
    questions = ["What is it?", "Who?", "What is it?"]
    answers = answer(
        *model_and_params(name),
        tokens,
        questions,
        CONTEXTS,
        max_answer_tokens=max_tokens,
        max_length=40,
        stride=13,
        batch_size=4,
    )
    for question, context, actual in zip(questions, CONTEXTS, answers, strict=True):
        expected = brute_force(name, tokens, question, context, max_tokens, (40, 13))
        assert (actual.text, actual.start, actual.end) == (expected.text, expected.start, expected.end)
        assert actual.score == pytest.approx(expected.score, abs=2e-4)
        assert actual.text == context[actual.start : actual.end] != ""


def test_order_and_batch_size_do_not_change_answers() -> None:
    questions, contexts = ["What is it?"] * len(CONTEXTS), list(CONTEXTS)
    tokens = tokenizer("bpe cls_sep")
    expected = answer(*model_and_params("bert-tiny"), tokens, questions, contexts)
    compiled: Any = question_answering._best_spans
    compiled_before = compiled._cache_size()
    for batch_size in (1, 3):
        answers = answer(*model_and_params("bert-tiny"), tokens, questions, contexts[::-1], batch_size=batch_size)[::-1]
        assert [item.text for item in answers] == [item.text for item in expected]
        np.testing.assert_allclose([item.score for item in answers], [item.score for item in expected], atol=1e-4)
    assert compiled._cache_size() <= compiled_before + 4, "at most two lengths, 56 and 64, and two batch sizes"


def test_answers_below_the_threshold_are_empty() -> None:
    questions = ["What is it?"] * len(CONTEXTS)
    tokens = tokenizer("bpe cls_sep")
    all_answers = answer(*model_and_params("bert-tiny"), tokens, questions, CONTEXTS)
    scores = sorted(actual.score for actual in all_answers)
    answers = answer(*model_and_params("bert-tiny"), tokens, questions, CONTEXTS, no_answer_threshold=scores[0] + 1e-3)
    for actual, expected in zip(answers, all_answers, strict=True):
        assert actual.score == pytest.approx(expected.score)
        assert (
            actual == expected
            if expected.score > scores[0] + 1e-3
            else (actual.text, actual.start, actual.end) == ("", 0, 0)
        )
    assert sum(actual.text == "" for actual in answers) == 1


def test_best_no_answer_threshold_equals_a_search_over_thresholds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = int(rng.integers(1, 12))
        answers = [
            Answer(str(rng.choice(["red ball", "ball", "Mary"])), float(rng.integers(4)), 0, 1) for _ in range(count)
        ]
        references = [[] if rng.random() < 0.4 else ["red ball", "it"] for _ in range(count)]

        def total(threshold: float, answers: Any = answers, references: Any = references) -> float:
            texts = [item.text if item.score > threshold else "" for item in answers]
            result = 0.0
            for text, reference_texts in zip(texts, references, strict=True):
                if reference_texts and text:
                    result += {"red ball": 1.0, "ball": 2 / 3, "Mary": 0.0}[text]
                else:
                    result += float(not reference_texts and not text)
            return result

        best = max(total(threshold) for threshold in np.arange(-1.5, 5.0, 0.5))
        assert total(best_no_answer_threshold(answers, references)) == pytest.approx(best)


def test_errors_for_questions_that_cannot_be_answered() -> None:
    model, params = model_and_params("bert-tiny")
    with pytest.raises(TypeError, match=r"questions must be a sequence of strings, got one string: pass \['Who\?'\]"):
        answer(model, params, BYTES, "Who?", ["Mary"])
    with pytest.raises(TypeError, match="contexts must be a sequence of strings"):
        answer(model, params, BYTES, ["Who?"], "Mary")
    with pytest.raises(ValueError, match="each question needs one context: got 2 questions and 1 contexts"):
        answer(model, params, BYTES, ["Who?", "What?"], ["Mary"])
    with pytest.raises(ValueError, match="there are no questions"):
        answer(model, params, BYTES, [], [])
    with pytest.raises(ValueError, match="question 1: the question has no tokens: ''"):
        answer(model, params, BYTES, ["Who?", ""], ["Mary", "Mary"])
    with pytest.raises(ValueError, match="question 0: max_length=64 leaves 4 tokens for the context"):
        answer(model, params, BYTES, ["Who" * 20], ["Mary " * 20])
    with pytest.raises(ValueError, match="max_length=384 must be at most 64"):
        answer(model, params, BYTES, ["Who?"], ["Mary"], max_length=384)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        answer(model, params, BYTES, ["Who?"], ["Mary"], max_length=0)
    with pytest.raises(ValueError, match="max_answer_tokens=0 must be at least 1"):
        answer(model, params, BYTES, ["Who?"], ["Mary"], max_answer_tokens=0)
    with pytest.raises(ValueError, match="a masked-token head: it does not answer questions"):
        answer(tiny_model("bert-tiny"), params, BYTES, ["Who?"], ["Mary"])


# --------------------------------------------------------------------------------------------- transformers


@pytest.mark.live
@pytest.mark.parametrize("template", ["cls_sep", "bos_eos"])
def test_windows_and_targets_equal_those_of_transformers(template: str, tmp_path: Path) -> None:
    import transformers

    jaxlm_tokenizer = tokenizer(f"bpe {template}")
    jaxlm_tokenizer.save(tmp_path)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = model_and_params("bert-tiny")[0]
    for example in EXAMPLES:
        rows = training_windows(model, jaxlm_tokenizer, [example], max_length=60, stride=31)
        hf_windows = hf_tokenizer(
            example["question"], example["context"], truncation="only_second", max_length=60, stride=31,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        assert [row["tokens"].tolist() for row in rows] == hf_windows["input_ids"]
        (text,), (start,) = example["answers"], example["starts"]
        for number, (row, offsets) in enumerate(zip(rows, hf_windows["offset_mapping"], strict=True)):
            inside = [position for position, sequence in enumerate(hf_windows.sequence_ids(number)) if sequence == 1]
            actual, expected = (offsets[row["first"]][0], offsets[row["last"]][1]), (0, 0)
            if offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= start + len(text):
                first = max(position for position in inside if offsets[position][0] <= start)
                last = min(position for position in inside if offsets[position][1] >= start + len(text))
                # A character can have several byte tokens. jaxlm includes all of them; transformers includes only
                # the last one of the first character and the first one of the last character.
                expected = (offsets[first][0], offsets[last][1])
            assert actual == expected


# ------------------------------------------------------------------------------------------ files of a test


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "kind"), [("xlnet-tiny", "word sep_cls"), ("bert-tiny", "word cls_sep")])
def test_an_attention_map_has_the_tokens_in_the_order_that_the_model_reads(
    tmp_path: Path, name: str, kind: str
) -> None:
    model, params = model_and_params(name)
    rows = [EXAMPLES[0], EXAMPLES[8], {**EXAMPLES[0], "question": "What is it? " * 20}]
    write_test(tmp_path, model, params, tokenizer(kind), Examples(rows), [Answer("in 1998", 1.0, 0, 7)] * 3)
    assert len(read_samples(tmp_path)) == 3
    maps = read_attention(tmp_path)
    assert len(maps) == 2, "a question of 60 tokens has no map, because it leaves no token for its context"
    for item, row in zip(maps, rows, strict=False):
        (window, *_) = tokenizer(kind).encode_windows(row["question"], row["context"], max_length=60, stride=0)
        assert len(item.columns) == len(window.ids) <= 60
        words = [item.columns[position] for position in np.flatnonzero(window.sequence_ids >= 0)]
        question, context = row["question"].split(), row["context"].split()[: len(words) - 3]
        assert words == (question + context if name == "bert-tiny" else context + question)

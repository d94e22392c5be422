"""SQuAD files in both formats, and errors for bad questions and files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.data.squad import read_squad

CONTEXT = "Ångström\u2019s café \u2013 opened in 1998; in 1998 it closed."


def question(**changes: Any) -> dict[str, Any]:
    answers = [{"text": "1998", "answer_start": 28}, {"text": "in 1998", "answer_start": 34}]
    return {"id": "q1", "question": "When did it open?", "answers": answers, **changes}


def squad_json(*articles: tuple[str, list[dict[str, Any]]]) -> str:
    data = [{"title": title, "paragraphs": [{"context": CONTEXT, "qas": qas}]} for title, qas in articles]
    return json.dumps({"version": "v2.0", "data": data}, ensure_ascii=False)


def write(path: Path, text: str) -> Path:
    content = text.encode("utf-8", errors="backslashreplace")  # a surrogate becomes an escape sequence of JSON
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_official_files_have_titles_and_unanswerable_questions(tmp_path: Path, name: str) -> None:
    impossible = question(id="q2", answers=[], is_impossible=True, plausible_answers=[{"text": "x", "answer_start": 0}])
    examples = read_squad(
        write(tmp_path / name, squad_json(("Café", [question(), impossible]), ("Bar", [question(id="q3")])))
    )
    assert examples.column("id") == ["q1", "q2", "q3"]
    assert examples.column("group") == ["Café", "Café", "Bar"]
    assert examples[0]["answers"] == ["1998", "in 1998"]
    assert examples[0]["starts"] == [28, 34]
    assert [
        CONTEXT[start:].startswith(text)
        for text, start in zip(examples[0]["answers"], examples[0]["starts"], strict=True)
    ]
    assert (examples[1]["answers"], examples[1]["starts"]) == ([], [])
    first, rest = examples.split(0.5, by="group")
    assert not {*first.column("group")} & {*rest.column("group")}


@pytest.mark.parametrize("name", ["dev.jsonl", "dev.jsonl.gz"])
@pytest.mark.parametrize("count", [1, 3])
def test_json_lines_are_grouped_by_context(tmp_path: Path, name: str, count: int) -> None:
    rows = [question(id=f"q{n}", context=CONTEXT) for n in range(count)]
    examples = read_squad(write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows)))
    assert examples.column("id") == [f"q{n}" for n in range(count)]
    assert examples.column("group") == [CONTEXT] * count


def test_answers_can_be_lists_as_in_the_datasets_package(tmp_path: Path) -> None:
    answers = {"text": ["1998"], "answer_start": [28]}
    examples = read_squad(write(tmp_path / "f", json.dumps(question(context=CONTEXT, title="Café", answers=answers))))
    assert (examples[0]["answers"], examples[0]["starts"], examples[0]["group"]) == (["1998"], [28], "Café")


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_answer_starts_are_corrected_by_up_to_two_characters(tmp_path: Path, shift: int) -> None:
    answers = [{"text": "1998", "answer_start": 28 + shift}]
    examples = read_squad(write(tmp_path / "f", squad_json(("Café", [question(answers=answers)]))))
    assert examples[0]["starts"] == [28]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answers": [{"text": "1998", "answer_start": 20}]},
            "'1998' is not at character 20 of the context, which has 'ened'",
        ),
        (
            {"answers": [{"text": "1999", "answer_start": 28}]},
            "'1999' is not at character 28 of the context, which has '1998'",
        ),
        ({"answers": [{"text": "Å", "answer_start": -3}]}, "'Å' is not at character -3"),
        ({"answers": [{"text": " ", "answer_start": 0}]}, "an answer needs a text and a start, got ' ' and 0"),
        ({"answers": [{"text": "1998"}]}, "'answers' must be a list of objects with 'text' and 'answer_start'"),
        ({"answers": {"text": ["a", "b"], "answer_start": [1]}}, "'answers' must be a list of objects"),
        ({"question": " "}, "'question' must be a text, got ' '"),
        ({"question": "a\ud83d"}, r"character 1 of 'question', '\\ud83d', is a surrogate and has no UTF-8 bytes"),
    ],
)
def test_bad_questions_raise_an_error_or_are_reported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "dev.json", squad_json(("Café", [question(), question(id="bad", **changes)])))
    with pytest.raises(ValueError, match=message) as error:
        read_squad(path)
    assert str(error.value).startswith(f"{path}, question 2: id 'bad': ")
    examples = read_squad(path, on_error="report")
    assert examples.column("id") == ["q1"]
    (rejected,) = examples.rejected
    assert rejected.line == 2
    assert rejected.reason.startswith("id 'bad': ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": None}, "id=None must be a string or a whole number"),
        ({"id": True}, "id=True must be a string or a whole number"),
        ({"id": "\ud800"}, "character 0 of 'id'.* is a surrogate"),
        ({"title": "\ud800"}, "character 0 of 'title'.* is a surrogate"),
        ({"title": ["a", "b"]}, r"title=\['a', 'b'\] must be a string or None"),
    ],
)
def test_ids_and_titles_of_another_type_raise_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "f.jsonl", json.dumps(question(context=CONTEXT, **changes)))
    with pytest.raises(ValueError, match=rf"f\.jsonl, question 1: id .*: {message}"):
        read_squad(path)


def test_an_error_has_a_reason_if_all_questions_are_invalid(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.json", squad_json(("Café", [question(question=""), question(answers=3)])))
    message = "has no examples: all 2 questions are invalid, for example question 1: id 'q1': 'question' must be"
    with pytest.raises(ValueError, match=message):
        read_squad(path, on_error="report")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is neither SQuAD JSON"),
        ('{"data": [{"title": "x"}]}', "is not SQuAD JSON: KeyError 'paragraphs'"),
        ('{"data": 3}', "is not SQuAD JSON: TypeError"),
        ('{"data"', "question 1: id None: the file is neither SQuAD JSON nor one JSON object per line: "),
        ('{"data": []}', "has no examples"),
        ('{\n"data": [],\n"data": []\n}', "f: the key 'data' occurs twice"),
        ('{"data": [], "data": []}', "f: the key 'data' occurs twice"),
        ('{"id": 7, "id": 8}\n{}', "question 1: id None: .*: the key 'id' occurs twice"),
        ("", "has no examples"),
        ('{"id": 7, "context": "a"}', "question 1: id 7: no field 'question': the fields are 'id', 'context'"),
        ("[" * 100_000, "question 1: id None: .*: it is nested too deeply"),
        ("3\n4", "question 1: id None: the line must be a JSON object, got int"),
    ],
)
def test_files_in_neither_format_raise_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_squad(write(tmp_path / "f", text))


def test_damaged_files_raise_errors(tmp_path: Path) -> None:
    compressed = write(tmp_path / "whole.gz", squad_json(("Café", [question()]))).read_bytes()
    (tmp_path / "half.gz").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(ValueError, match="half.gz: the gzip file is truncated or damaged"):
        read_squad(tmp_path / "half.gz")
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin is not UTF-8 text: byte 0xe9 at offset 3, line 1"):
        read_squad(tmp_path / "latin")
    with pytest.raises(FileNotFoundError):
        read_squad(tmp_path / "none.json")
    with pytest.raises(ValueError, match="on_error='ignore' must be 'raise' or 'report'"):
        read_squad(tmp_path / "latin", on_error="ignore")  # type: ignore[arg-type]

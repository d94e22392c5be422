"""SQuAD: questions about texts, with spans of the text as answers (Rajpurkar et al. 2016, 2018).

    official JSON   {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}
    JSONL           one object per line: {"id", "context", "question", "answers"}, and optionally "title"

``answers`` is a list of ``{"text", "answer_start"}``, or ``{"text": [...], "answer_start": [...]}`` as in the package
``datasets``. ``answers`` is empty for a question without an answer (SQuAD 2.0). Files may be compressed (``.gz``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import check_value
from jaxlm.data.examples import Example, Examples, OnError, make_examples
from jaxlm.data.text_files import check_no_surrogate, text_chunks
from jaxlm.json_files import DuplicateKeyError, parse

MAX_SHIFT = 2
"""Maximum distance in characters between the start in the file and the actual start of the answer. Some starts in
published files are wrong by one character."""


def read_squad(path: str | Path, *, on_error: OnError = "raise") -> Examples:
    """The questions of a SQuAD file as examples.

    The fields are ``id``, ``context``, ``question``, ``answers``, ``starts`` and ``group``. ``answers`` has the answers
    of all annotators, and ``starts`` has the position of the first character of each answer in ``context``. Both are
    empty for a question without an answer. ``group`` is the title of the article, or the context if there is no title.
    Split the examples by ``group`` (``examples.split(0.8, by="group")``), so that no text is in two parts.

    Args:
        on_error: "report" lists invalid questions in ``Examples.rejected`` instead of raising an error.
            ``Rejected.line`` is then the number of the question in the file, from 1.

    Raises:
        FileNotFoundError: the file does not exist.
        InvalidLineError: a question is invalid: its line cannot be parsed, a field is missing or has a wrong type, a
            text is empty or has a surrogate, or an answer is not in the context within :data:`MAX_SHIFT` characters of
            its start. The message names the file, the number of the question and its id (None if the line cannot be
            parsed or has no id). ``InvalidLineError`` is a ``ValueError``.
        ValueError: the file is not UTF-8, has another format, or is official JSON with a key twice in an object. No
            question is valid. ``on_error`` is unknown.

    Example:
        >>> read_squad("dev-v1.1.json")[0]["answers"]                # doctest: +SKIP
        ['Denver Broncos', 'Denver Broncos', 'Denver Broncos']
    """

    def read_question(record: Any) -> Example:
        question_id = None
        try:
            question = _parse_record(record)
            question_id = question.get("id")
            return squad_example(question)
        except ValueError as error:
            raise ValueError(f"id {question_id!r}: {error}") from error

    return make_examples(path, enumerate(_read_records(Path(path)), start=1), read_question, on_error, "question")


def read_squad_files(paths: Sequence[Path]) -> dict[str, Examples]:
    """File name -> the questions of the file. If two files have the same name, all keys are paths."""
    names = [path.name for path in paths]
    unique = len(set(names)) == len(names)
    return {path.name if unique else str(path): read_squad(path) for path in paths}


def _read_records(path: Path) -> Iterator[Any]:
    """Yield each question of the file: a JSON object in the JSONL format, or an unparsed line of a JSONL file."""
    text = "".join(text_chunks(path))
    try:
        content = parse(text)
    except ValueError as error:  # a file with several JSON lines is not one JSON document
        lines = [line for line in text.split("\n") if line.strip()]
        # In JSONL, a key twice makes one line invalid. In official JSON, it makes the file invalid.
        if isinstance(error, DuplicateKeyError) and (len(lines) == 1 or not lines[0].rstrip().endswith("}")):
            raise ValueError(f"{path}: {error}") from error
        yield from lines
        return
    if isinstance(content, dict) and "data" in content:
        try:
            yield from _questions(content["data"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not SQuAD JSON: {type(error).__name__} {error}") from error
    elif isinstance(content, dict):
        yield content
    else:
        raise ValueError(f"{path} is neither SQuAD JSON (an object with 'data') nor JSONL (one object per line)")


def _questions(articles: list[Any]) -> Iterator[dict[str, Any]]:
    """The questions of official JSON as objects in the JSONL format."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {**question, "context": paragraph["context"], "title": article.get("title")}


def _parse_record(record: Any) -> Mapping[str, Any]:
    """The JSON object of a question. ``record`` is this object, or an unparsed line."""
    if isinstance(record, str):
        try:
            record = parse(record)
        except ValueError as error:
            raise ValueError(f"the file is neither SQuAD JSON nor one JSON object per line: {error}") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"the line must be a JSON object, got {type(record).__name__}")
    return record


def squad_example(record: Mapping[str, Any]) -> Example:
    """The example of a question in SQuAD's format, for example of a row of a data set of ``datasets``.

    The result has the fields that :func:`read_squad` lists.

    Args:
        record: ``id``, ``context``, ``question``, ``answers`` and optionally ``title``. ``answers`` is a list of
            ``{"text", "answer_start"}``, or ``{"text": [...], "answer_start": [...]}``.

    Raises:
        ValueError: a field is missing or invalid, or an answer is not in the context within :data:`MAX_SHIFT`
            characters of its start.
    """
    for name in ("id", "context", "question", "answers"):
        if name not in record:
            raise ValueError(f"no field {name!r}: the fields are {', '.join(map(repr, record))}")
    for name in ("context", "question"):
        if not isinstance(record[name], str) or not record[name].strip():
            raise ValueError(f"{name!r} must be a text, got {record[name]!r}")
        check_no_surrogate(record[name], repr(name))
    title = record.get("title")
    for name, value, kind in (("id", record["id"], str | int), ("title", title, str | None)):
        check_value(kind, value, name)
        check_no_surrogate(str(value), repr(name))
    context, answers, starts = record["context"], [], []
    for text, start in _answers(record["answers"]):
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            raise ValueError(f"an answer needs a text and a start, got {text!r} and {start!r}")
        position = _find_answer(context, text, start)
        if position is None:
            actual = context[max(0, start) : max(0, start) + len(text)]
            raise ValueError(
                f"the answer {text!r} is not at character {start} of the context, which has {actual!r} there"
            )
        answers.append(text)
        starts.append(position)
    return {
        "id": str(record["id"]),
        "context": context,
        "question": record["question"],
        "answers": answers,
        "starts": starts,
        "group": title or context,
    }


def _answers(value: Any) -> list[tuple[Any, Any]]:
    """The (text, start) of each answer."""
    try:
        if isinstance(value, Mapping):
            return list(zip(value["text"], value["answer_start"], strict=True))
        return [(answer["text"], answer["answer_start"]) for answer in value]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'answers' must be a list of objects with 'text' and 'answer_start', got {value!r}"
        ) from error


def _find_answer(context: str, text: str, start: int) -> int | None:
    """The position nearest to ``start`` at which the context has ``text``, or None.

    The result is None if no such position is within ``MAX_SHIFT`` characters of ``start``.
    """
    for shift in sorted(range(-MAX_SHIFT, MAX_SHIFT + 1), key=abs):
        if start + shift >= 0 and context.startswith(text, start + shift):
            return start + shift
    return None

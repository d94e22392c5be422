"""Small runs of the question answering experiment: on stories, then on SQuAD files from these weights.

Also the command ``jaxlm answer``.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import jaxlm
from experiments import question_answering
from experiments.question_answering import Experiment, parts
from jaxlm import cli
from jaxlm.data import load_tokenizer
from jaxlm.data.stories import make_stories
from jaxlm.tasks.question_answering import answer
from jaxlm.training.report import read_attention, read_results, read_samples

TINY = (
    "--training.batch-size", "8", "--training.evaluate-every", "100", "--training.checkpoint-every", "100",
    "--optimizer.warmup-steps", "1", "--buckets", "1",
)  # fmt: skip
SMALL_MODEL = ("--model.set", "num_layers=1", "num_heads=2", "embed_dim=16", "max_positions=96")


def main(*arguments: Any) -> int:
    return question_answering.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on stories. Tests must not change it."""
    run: Path = tmp_path_factory.mktemp("qa") / "run"
    sizes = ("--stories", "60", "--sentences", "3", "--epochs", "1", "--validation-fraction", "0.1")
    assert main(*TINY, *SMALL_MODEL, *sizes, "--output", run) == 0
    return run


def squad_file(path: Path, articles: int, *, unanswerable: bool) -> Path:
    """Write a file in the official format. Each article has two stories. Stories can have an unanswerable question."""
    stories = list(make_stories(2 * articles, seed=5, questions=1, sentences=3))
    data = []
    for number in range(articles):
        paragraphs = []
        for story in stories[2 * number : 2 * number + 2]:
            answers = [{"text": story["answers"][0], "answer_start": story["starts"][0]}]
            qas: list[dict[str, Any]] = [{"id": story["id"], "question": story["question"], "answers": answers}]
            if unanswerable:
                qas.append({"id": f"{story['id']}-no", "question": "Who is old?", "answers": []})
            paragraphs.append({"context": story["context"], "qas": qas})
        data.append({"title": f"article {number}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def test_files_of_a_run(finished_run: Path) -> None:
    results = read_results(finished_run)
    assert [score.name for score in results["scores"]] == ["exact match", "F1"]
    assert results["no_answer_threshold"] is None
    assert results["compilations"] == 1
    samples = read_samples(finished_run)
    assert all(sample["output"] in sample["context"] for sample in samples)
    assert all(sample["reference"] in sample["context"] for sample in samples)
    assert (finished_run / "report.html").stat().st_size > 1000
    maps = read_attention(finished_run)
    assert len(maps) == 4
    assert all(item.rows == item.columns and item.rows.count("[SEP]") == 2 for item in maps), "a question and its story"
    config = json.loads((finished_run / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"]


@pytest.mark.thorough
@pytest.mark.usefixtures("no_svg")
def test_training_on_squad_files_from_pretrained_weights(finished_run: Path, tmp_path: Path) -> None:
    data = squad_file(tmp_path / "train.json", 12, unanswerable=True)
    shifted = squad_file(tmp_path / "shifted.json", 2, unanswerable=False)
    command = [
        "--preset", "minilm", *TINY, "--epochs", "1", "--model.pretrained", finished_run / "model", "--data", data,
        "--extra-tests", shifted, "--windows.max-length", "40", "--windows.stride", "8", "--test-fraction", "0.2",
        "--validation-fraction", "0.2", "--output", tmp_path / "run",
    ]  # fmt: skip
    assert main(*command) == 0
    results = read_results(tmp_path / "run")
    names = ["exact match", "F1", "exact match on shifted.json", "F1 on shifted.json"]
    assert [score.name for score in results["scores"]] == names
    assert [score.count for score in results["scores"]] == [12, 12, 4, 4], (
        "3 articles of the test split and 2 of the other file"
    )
    assert isinstance(results["no_answer_threshold"], float)
    assert main(*command) == 2, "the directory is not empty"


@pytest.mark.parametrize("option", ["--test", "--extra-tests"])
def test_a_test_question_that_is_too_long_is_found_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    data = squad_file(tmp_path / "train.json", 12, unanswerable=False)
    row = {"id": "long", "question": "Who is it? " * 40, "context": STORY, "answers": []}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    command = (*TINY, *SMALL_MODEL, "--epochs", "1", "--data", data, "--validation-fraction", "0.2")
    assert main(*command, option, tmp_path / "long.jsonl", "--output", tmp_path / "run") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'long.jsonl'}: question 'long': max_length=96 leaves 0 tokens for the context" in line
    assert not (tmp_path / "run").exists()


def test_splits_share_no_article(tmp_path: Path) -> None:
    data = squad_file(tmp_path / "a.json", 20, unanswerable=False)
    experiment = Experiment(data=data, validation_fraction=0.1, test_fraction=0.1)
    groups = [set(split.column("group")) for split in parts(experiment)]
    assert [len(group) for group in groups] == [16, 2, 2]
    assert len(set().union(*groups)) == 20
    test = squad_file(tmp_path / "b.json", 3, unanswerable=False)
    training, validation, test_split = parts(Experiment(data=data, test=test, validation_fraction=0.1))
    assert (len(training), len(validation), len(test_split)) == (36, 4, 6)


# --------------------------------------------------------------------------------------------- the command


STORY = "Mary went to the garden. Mary took the red ball."
QUESTIONS = ["Where is Mary?", "Who has the red ball?"]


def printed_lines(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    capsys.readouterr()
    assert cli.main(["answer", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_command_reads_files_and_standard_input(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = jaxlm.load_pretrained(finished_run / "model")
    tokenizer = load_tokenizer(finished_run / "model")
    answers = answer(model, params, tokenizer, QUESTIONS, [STORY] * 2)
    expected = [f"{item.text}\t{item.score:.4f}" for item in answers]
    (tmp_path / "story.txt").write_text(STORY)
    assert (
        printed_lines(capsys, finished_run, "--question", *QUESTIONS, "--context", tmp_path / "story.txt") == expected
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
    assert printed_lines(capsys, finished_run / "model", "--question", *QUESTIONS) == expected
    rows = [{"question": question, "context": STORY, "id": 3} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert printed_lines(capsys, finished_run, "--file", tmp_path / "rows.jsonl") == expected
    empty_answers = printed_lines(
        capsys, finished_run, "--file", tmp_path / "rows.jsonl", "--no-answer-threshold", "1000"
    )
    assert empty_answers == [f"\t{item.score:.4f}" for item in answers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no question: give --question (with --context FILE), or --file FILE"),
        (("--question", "Who?", "--file", "rows.jsonl"), "give --question with --context, or --file, not both"),
        (("--question", "Who?"), "standard input is empty: it must contain the text for the questions"),
    ],
)
def test_invalid_commands_print_an_error(
    finished_run: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert cli.main(["answer", str(finished_run), *arguments]) == 2
    assert message in capsys.readouterr().err

"""Small runs of the summarization experiment, its data, and the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from experiments import summarization
from experiments.summarization import Data, Experiment, parts, read, shorten
from jaxlm.data import load_tokenizer
from jaxlm.data.examples import Examples
from jaxlm.data.vocabularies import train_tokenizer
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.training.report import read_metrics, read_results, read_samples

TINY = (
    "--training.batch-size", "8", "--training.evaluate-every", "100", "--training.checkpoint-every", "100",
    "--optimizer.warmup-steps", "1", "--buckets", "1", "--vocab-size", "320", "--epochs", "1", "--max-source", "24",
    "--max-summary", "8", "--num-beams", "2", "--data.test-fraction", "0.2", "--data.validation-fraction", "0.1",
)  # fmt: skip
SIZES = ("source_vocab_size=None", "embed_dim=8", "hidden_dim=12", "output_dim=8")
NOUNS = ("box", "shelf", "table", "lamp", "chair", "clock", "river", "tower")


def main(*arguments: Any) -> int:
    return summarization.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write descriptions of 40 projects with two packages each, and one line without a text."""
    rng = np.random.default_rng(0)
    rows = [{"package": "empty", "text": "", "summary": "nothing"}]
    for number in range(40):
        words = " ".join(rng.choice(NOUNS, 12))
        for part in ("", "-doc"):
            text = f"A {words}{part} of number {number}. It has {words}.\n\nSecond paragraph."
            rows.append(
                {
                    "package": f"{NOUNS[number // 8]}-{NOUNS[number % 8]}{part}",
                    "text": text,
                    "summary": f"{words[:20]}{part}",
                }
            )
    path = tmp_path_factory.mktemp("data") / "descriptions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished_run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the copy mechanism. Tests must not change it."""
    run: Path = tmp_path_factory.mktemp("summarization") / "run"
    model = ("--model.set", *SIZES, "attention=luong", "score=general", "copy=True")
    assert main("--preset", "copy", *TINY, *model, "--data.file", file, "--output", run) == 0
    return run


@pytest.mark.thorough
def test_files_of_a_run(finished_run: Path) -> None:
    results = read_results(finished_run)
    names = [f"ROUGE-{kind}{of}" for of in ("", " of the first sentence") for kind in ("1", "2", "L")]
    assert [score.name for score in results["scores"]] == names
    assert all(0.0 <= score.value <= 1.0 for score in results["scores"])
    assert results["rejected lines"] == 1
    assert sum(results["truncated texts"]) > 0
    assert set(read_samples(finished_run)[0]) == {"source", "reference", "output"}
    assert "ROUGE-1" in (finished_run / "report.html").read_text()
    assert read_metrics(finished_run / "metrics.jsonl")


@pytest.mark.thorough
def test_the_exported_model_generates_summaries(finished_run: Path) -> None:
    model, params = jaxlm.load_pretrained(finished_run / "model")
    tokenizer = load_tokenizer(finished_run / "model")
    assert model.config.copy
    outputs = generate_text(model, params, tokenizer, ["A box of number 7."], GenerationConfig(max_new_tokens=4))
    assert len(outputs) == 1


@pytest.mark.thorough
def test_t5_trains_on_the_same_data(file: Path, tmp_path: Path) -> None:
    model = ("--model.set", "num_layers=1", "num_heads=2", "head_dim=4", "embed_dim=8", "mlp_dim=16")
    assert main("--preset", "t5", *TINY, *model, "--data.file", file, "--output", tmp_path / "run") == 0
    assert read_results(tmp_path / "run")["family"] == "t5"


def test_packages_of_a_project_and_similar_texts_are_in_one_split(file: Path) -> None:
    data = Data(file=file, test_fraction=0.2, validation_fraction=0.1)
    splits = parts(data, read(data))
    assert sum(map(len, splits)) == 80
    groups = [set(subset.column("group")) for subset in splits]
    assert [len(numbers) for numbers in groups] == [28, 4, 8]
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]
    assert all(len(subset) == 2 * len(numbers) for subset, numbers in zip(splits, groups, strict=True))


def test_large_groups_are_in_the_training_split() -> None:
    rows = [{"group": number if number > 30 else 0} for number in range(100)]
    training, validation, test = parts(Data(largest_group=5, test_fraction=0.3), Examples(rows))
    assert len(training) + len(validation) + len(test) == 100
    assert 0 not in set(test.column("group")) | set(validation.column("group"))
    with pytest.raises(ValueError, match="all groups have more than data.largest_group=5 texts, .*key 'package'"):
        parts(Data(largest_group=5), Examples(rows[:20]))


def test_docstrings_are_the_default_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "box.py").write_text(
        '"""Boxes and lids.\n\nA box has a lid. The lid has a handle, and a box a floor."""\n'
    )
    examples = summarization.docstrings([tmp_path])
    monkeypatch.setattr(summarization, "docstrings", lambda: examples)
    (example,) = read(Experiment().data)
    text = "A box has a lid. The lid has a handle, and a box a floor."
    assert example == {"source": f"module: {text}", "target": "Boxes and lids.", "text": text, "group": 0}


def test_long_sources_are_truncated_and_counted() -> None:
    texts = ["one two three four", "one two three four five six"]
    tokenizer = train_tokenizer(texts, "word", 50, template="eos")
    examples, num_truncated = shorten(Examples([{"source": text} for text in texts]), tokenizer, 5)
    assert (examples.column("source"), num_truncated) == ([texts[0], "one two three four"], 1)
    tokenizer = train_tokenizer(texts, "bpe", 300, template="eos")
    examples, _ = shorten(Examples([{"source": text} for text in ("\u2603" * 3, "\ufffd" * 3)]), tokenizer, 6)
    assert examples.column("source") == ["\u2603", "\ufffd\ufffd"], "a source is never empty"


def test_a_test_source_without_tokens_is_found_before_the_training(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        summarization, "shorten", lambda part, *_: (Examples([{**row, "source": ""} for row in part], "test"), 0)
    )
    assert main(*TINY, "--data.file", file, "--output", tmp_path / "run") == 2
    assert "example 0 of test has the source '', which has no tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_invalid_input_prints_one_line(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--data.file", tmp_path / "none.jsonl"), "none.jsonl is not a file"),
        (
            ("--data.file", file, "--vocab-size", "320", "--model.set", "source_vocab_size=9"),
            "copy=True needs source_vocab_size=None",
        ),
    ):
        assert main(*arguments, "--output", tmp_path / "run") == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

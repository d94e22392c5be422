"""The benchmark of translation and classification: its errors, and the results that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import harness, report, texts, texts_baselines
from jaxlm.interop.huggingface import save_pretrained
from jaxlm.testing.helpers import add_noise, initial_params, tiny_model
from tests.tasks.test_predict import words_tokenizer

SENTENCES = ["ann sings", "ann playing sings .", "sings .", "playing"]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """The directory of a BERT classifier without label names, and a file of texts.

    The parameters are so large that the texts have different labels.
    """
    model = tiny_model("bert-tiny", task="classification", num_labels=3)
    params = jax.tree.map(lambda x: 2 * x, add_noise(initial_params(model)))
    save_pretrained(tmp_path / "model", model, params, words_tokenizer())
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    return {"directory": str(tmp_path / "model"), "file": str(tmp_path / "texts.txt")}


def test_wrong_paths_and_missing_packages_print_an_error(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, file = paths.values()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    for classifier, sentences, message in (
        (tmp_path / "none", file, f"{tmp_path / 'none'} has no config.json: give the directory of a model"),
        (directory, tmp_path, f"{tmp_path} is not a file: give a file with one text per line"),
        (directory, file, "torch needs torch: pip install -e '.[reference]' in the clone of jaxlm, or leave torch out"),
    ):
        assert texts.main(["--classifier", str(classifier), "--texts", str(sentences)]) == 2
        assert message in capsys.readouterr().err


def test_implementations_on_different_devices_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    class FakeWorker:
        def __init__(self, name: str, target: str, log: Path, environment: dict[str, str], **arguments: Any) -> None:
            self.platform = "gpu" if name == "jaxlm" else "cpu"
            environments.append(environment)

        def facts(self) -> dict[str, Any]:
            return {"platform": self.platform}

        def close(self) -> None:
            pass

    monkeypatch.setattr(harness, "Worker", FakeWorker)
    with pytest.raises(harness.Failure, match="different devices, {'jaxlm': 'gpu', 'torch': 'cpu', 'pipeline': 'cpu'}"):
        texts.compare("classification", texts.CLASSIFIERS, 1, "cpu")
    assert environments == [harness.DEVICES["cpu"]] * 3


def test_jaxlm_returns_label_ids(paths: dict[str, str]) -> None:
    labels = texts_baselines.JaxlmClassifier(**paths, batch=2).run()
    assert [type(label) for label in labels] == [int] * 4


@pytest.mark.thorough
def test_quick_trains_and_measures_a_tiny_translator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--rounds", "1", "--against", "", "--json", str(tmp_path / "texts.json")]
    assert texts.main(arguments) == 0
    output = capsys.readouterr().out
    assert "classification is not measured: give --classifier DIRECTORY and --texts FILE" in output
    assert "jaxlm is" not in output
    (row,) = report.read(tmp_path)
    assert row.label == f"translation, 2 beams, {texts.QUICK_NUM_VERSES} sentences"


def test_quick_measures_no_other_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert texts.main(["--quick", "--translator", "model", "--sources", "file"]) == 2
    assert "--quick trains a tiny translator: leave out --translator model" in capsys.readouterr().err


@pytest.mark.live
def test_torch_returns_the_same_label_ids(paths: dict[str, str]) -> None:
    names = ("JaxlmClassifier", "TorchClassifier", "PipelineClassifier")
    labels = [getattr(texts_baselines, name)(**paths, batch=2).run() for name in names]
    assert labels[0] == labels[1] == labels[2]
    assert len(set(labels[0])) > 1

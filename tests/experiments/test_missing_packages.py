"""An experiment whose tests need a package checks before it reads data that the package is installed."""

import sys

import pytest

from experiments import chess, summarization, translation


@pytest.mark.parametrize(
    ("experiment", "package", "arguments", "extra"),
    [
        (chess, "chess", ["--data", "none.txt"], "chess"),
        (summarization, "rouge_score.rouge_scorer", ["--data.file", "none.jsonl"], "metrics"),
        (translation, "sacrebleu.metrics", ["--data.directory", "none"], "metrics"),
    ],
)
def test_a_missing_package_is_an_error_before_the_training(experiment, package, arguments, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert experiment.main(arguments) == 2
    assert f"pip install -e '.[{extra}]' in" in capsys.readouterr().err

"""The option ``--recipe`` selects the published optimizer of a family in every task module."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from jaxlm import config as config_lib
from jaxlm.training.checks import PRETRAINED_PRESETS
from jaxlm.training.loop import Result
from jaxlm.training.recipes import RECIPES, recipe
from jaxlm.training.report import metric_curve, read_metrics
from tests.faults.mistakes import EXPERIMENTS


@pytest.fixture(params=EXPERIMENTS)
def captured(request, monkeypatch):
    """The main function of a task module, and a list of the experiments that it would run."""
    module, experiments = importlib.import_module(f"experiments.{request.param}"), []

    def run(experiment, resume=None):
        experiments.append(experiment)
        return Result(None, None, 0, None, None, 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(module, "run", run)
    return module.main, experiments


def test_a_recipe_replaces_the_optimizer_and_nothing_else(captured):
    main, experiments = captured
    for family in RECIPES:
        assert main(["--recipe", family]) == 0
        assert experiments[-1].optimizer == recipe(family)
    assert main([]) == 0
    assert dataclasses.replace(experiments[0], optimizer=experiments[-1].optimizer) == experiments[-1]


def test_an_optimizer_option_changes_one_value_of_a_recipe(captured, capsys):
    main, experiments = captured
    assert main(["--optimizer.learning-rate", "0.003", "--recipe", "bert", "--optimizer.warmup-steps", "7"]) == 0
    assert experiments[0].optimizer == dataclasses.replace(recipe("bert"), learning_rate=0.003, warmup_steps=7)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("optimizer: recipe of bert (Devlin et al. 2019, appendix A.2;")
    assert line.endswith("), changed: learning_rate=0.003 warmup_steps=7")


def test_a_recipe_replaces_the_optimizer_of_a_preset(captured):
    main, experiments = captured
    presets = importlib.import_module(main.__module__).PRESETS
    for name, preset in presets.items():
        files = ["--model.pretrained", "files"] if name in PRETRAINED_PRESETS else []
        assert main(["--preset", name, "--recipe", "gru", *files]) == 0
        model = dataclasses.replace(preset.model, pretrained=Path("files")) if files else preset.model
        assert experiments[-1] == dataclasses.replace(preset, model=model, optimizer=recipe("gru"))


@pytest.mark.thorough
@pytest.mark.usefixtures("no_svg")
def test_a_resumed_run_keeps_its_recipe(tmp_path, capsys):
    sentiment, run = importlib.import_module("experiments.sentiment"), tmp_path / "run"
    lines = [f"{label} it is {word} number {n}\n" for label, word in enumerate(("dull", "great")) for n in range(40)]
    (tmp_path / "lines.all").write_text("".join(lines))
    sizes = ("--model.set", "embed_dim=16", "hidden_dim=16", "--training.batch-size", "8", "--training.log-every", "1")
    data = ("--data.train", str(tmp_path / "lines.all"), "--data.validation-fraction", "0.1")
    options = ("--preset", "gru", "--recipe", "mamba2", "--epochs", "3", "--training.checkpoint-every", "30")
    assert sentiment.main([*options, *sizes, *data, "--output", str(run)]) == 0
    saved = config_lib.read(sentiment.Experiment, run / "config.json").optimizer
    assert saved == recipe("mamba2")
    steps, rates = metric_curve(read_metrics(run / "metrics.jsonl"), "learning_rate")
    warmup = round(saved.warmup_steps * len(steps))
    assert (len(steps), warmup) == (27, 3)  # 10 % of the steps
    assert rates[:warmup] == pytest.approx([saved.learning_rate * (n + 1) / (warmup + 1) for n in range(warmup)])
    assert rates[warmup] == pytest.approx(saved.learning_rate)
    (run / "report.html").unlink()
    assert sentiment.main(["--resume", str(run)]) == 0
    assert (run / "report.html").exists()
    assert config_lib.read(sentiment.Experiment, run / "config.json").optimizer == saved
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sentiment.main(["--resume", str(run), "--recipe", "mamba2"])
    assert "--recipe and --resume exclude each other: a resumed run keeps its optimizer" in capsys.readouterr().err

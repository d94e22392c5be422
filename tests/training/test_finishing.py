"""A run that is killed in any phase after the training can be resumed and completed."""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text_generation
from jaxlm import load_pretrained
from jaxlm.training import checks
from jaxlm.training import experiment as lib
from jaxlm.training.loop import Result
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.report import metric_curve, read_metrics, read_results, read_samples

STEPS = 3
PHASES = [  # functions that are called after the training, in this order
    (lib, "save_pretrained"),
    (lib, "save_png"),
    (text_generation, "print_passage"),
    (text_generation, "write_sample"),
    (text_generation, "scores"),
    (lib, "write_results"),
    (lib, "write_report"),
]


class Killed(BaseException):
    """A simulated kill. ``except Exception`` does not catch it."""


def small_experiment(directory: Path) -> text_generation.Experiment:
    text = directory / "text.txt"
    text.write_text("to be, or not to be: that is the question. " * 40)
    return text_generation.Experiment(
        model=lib.ModelConfig("gpt", ("num_layers=1", "num_heads=1", "embed_dim=8", "mlp_dim=8")),
        training=lib.ExperimentTraining(STEPS, 2, sequence_length=8, evaluation_batches=1),
        optimizer=OptimizerConfig(warmup_steps=1), data=text, output=directory / "run", prompt="to", sample_tokens=3,
    )  # fmt: skip


class CompletedRun(NamedTuple):
    experiment: text_generation.Experiment
    directory: Path
    result: Result
    printed: str
    """The output of the last call."""


def complete(experiment: text_generation.Experiment, resume: Path | None) -> CompletedRun:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = text_generation.run(experiment, resume)
    return CompletedRun(experiment, experiment.output, result, printed.getvalue())


@pytest.fixture(scope="module")
def completed_run(tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """A run that was not interrupted. Tests must not change it."""
    return complete(small_experiment(tmp_path_factory.mktemp("finishing")), None)


@pytest.mark.thorough
def test_a_run_killed_in_any_phase_after_the_training_can_be_completed(tmp_path):
    """The run is killed once in each phase after the training and then completed."""
    experiment, directory = small_experiment(tmp_path), tmp_path / "run"
    exports: list[dict[str, np.ndarray]] = []  # the exported parameters after each call that ran the export

    def raise_killed(*arguments: object, **options: object) -> None:
        raise Killed

    for module, name in PHASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, raise_killed)
            with pytest.raises(Killed):
                text_generation.run(experiment, directory if directory.exists() else None)
        if name != "save_pretrained":  # the other phases run after the export
            exports.append(exported_params(directory))
    _, _, result, printed = complete(experiment, directory)
    assert "no metrics" not in printed
    exports.append(exported_params(directory))
    expected = jax.tree.leaves(jax.tree.map(np.asarray, result.params))
    for params in exports:
        assert all(np.array_equal(actual, want) for actual, want in zip(jax.tree.leaves(params), expected, strict=True))
    assert result.step == STEPS
    records = read_metrics(directory / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]  # no step was made twice
    assert metric_curve(records, "validation_loss")[0] == [STEPS]
    assert sum(record.get("event") == "resumed" for record in records) == len(PHASES)
    assert read_results(directory)["steps"] == STEPS
    assert len(read_samples(directory)) == 1
    assert {"loss.png", "report.html", "sample.txt"} <= {path.name for path in directory.iterdir()}
    assert jnp.isfinite(result.validation_loss)


def exported_params(directory: Path) -> dict[str, np.ndarray]:
    """Return the parameters in ``model/``. Loading verifies their checksums."""
    return jax.tree.map(np.asarray, load_pretrained(directory / "model")[1])


def test_a_run_killed_before_it_wrote_its_configuration_can_be_started_again(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "jaxlm_tokenizer.json").write_text("{}")
    (tmp_path / ".config.json").write_text('{"seed"')  # the temporary file of config.json
    checks.check_output(tmp_path, resume=False)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).write_text("{}")
        with pytest.raises(FileExistsError, match="is not empty"):
            checks.check_output(tmp_path, resume=False)
        (tmp_path / "model" / name).unlink()
    (tmp_path / "notes").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        checks.check_output(tmp_path, resume=False)


def test_the_report_has_the_last_step_and_the_step_of_the_best_weights(completed_run, tmp_path):
    for step, expected in ((STEPS, {}), (2, {"best_step": 2})):
        result = dataclasses.replace(completed_run.result, step=step)
        model, _ = load_pretrained(completed_run.directory / "model")
        lib.report(tmp_path, task="t", model=model, start_time=0.0, scores=[], result=result)
        results = read_results(tmp_path)
        assert results["steps"] == STEPS
        assert {name: results[name] for name in results if name == "best_step"} == expected


def test_a_finished_run_without_metrics_can_be_completed(completed_run, tmp_path, capsys, monkeypatch):
    assert "no metrics" not in completed_run.printed
    directory = shutil.copytree(completed_run.directory, tmp_path / "run")
    for name in ("metrics.jsonl", "loss.png", "results.json", "report.html"):
        (directory / name).unlink()
    monkeypatch.setattr(text_generation, "write_sample", lambda *arguments: None)
    text_generation.run(completed_run.experiment, directory)
    for name in ("samples.jsonl", "attention.json", "attention.png"):  # of an earlier end of the run
        assert (completed_run.directory / name).exists()
        assert not (directory / name).exists()
    assert f"{directory / 'metrics.jsonl'} has no metrics: there are no loss curves" in capsys.readouterr().out
    assert not (directory / "loss.png").exists()
    assert read_results(directory)["steps"] == STEPS
    assert (directory / "report.html").exists()

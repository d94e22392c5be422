"""Trackers with fake services; live tests also read the event files of TensorBoard."""

import atexit
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from experiments import sentiment
from jaxlm.training.experiment import ExperimentTraining, make_run
from jaxlm.training.trackers import TensorBoardTracker, TrackioTracker, WandbTracker, check_tracker, make_tracker


class FakeRun:
    """A fake run of wandb or trackio. It records the arguments of its calls."""

    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(("service", "tracker_class"), [("wandb", WandbTracker), ("trackio", TrackioTracker)])
def test_wandb_and_trackio_receive_config_values_and_finish(monkeypatch, service, tracker_class):
    runs = []

    def init(**options):
        runs.append(FakeRun(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, service, types.SimpleNamespace(init=init))
    tracker = tracker_class("translation", name="t5", config={"steps": 100})
    tracker.log(10, {"loss": 2.5, "learning_rate": 1e-3})
    tracker.log(20, {"validation_loss": 2.0})
    (run,) = runs
    assert run.options == {"project": "translation", "name": "t5", "config": {"steps": 100}}
    assert run.logged == [(10, {"loss": 2.5, "learning_rate": 1e-3}), (20, {"validation_loss": 2.0})]
    assert not run.finished
    tracker.close()
    assert run.finished


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_run_in_the_working_directory_has_its_name(monkeypatch, tmp_path, service):
    monkeypatch.setitem(sys.modules, service, types.SimpleNamespace(init=lambda **options: FakeRun(**options)))
    monkeypatch.chdir(tmp_path)
    assert make_tracker(service, Path("."), {})._run.options["name"] == tmp_path.name


def test_tensorboard_receives_one_scalar_per_metric(monkeypatch, tmp_path):
    calls = []

    class Writer:
        def __init__(self, directory):
            calls.append(directory)

        def add_scalar(self, tag, data, step):
            calls.append((tag, data, step))

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", types.SimpleNamespace(Writer=Writer))
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(10, {"loss": 2.5, "learning_rate": 1e-3})
    tracker.close()
    assert calls == [str(tmp_path), ("loss", 2.5, 10), ("learning_rate", 1e-3, 10), "closed"]


@pytest.mark.parametrize("name", [None, "trackio"])
def test_an_experiment_logs_to_the_tracker_of_its_config(monkeypatch, tmp_path, name):
    runs = []

    def init(**options):
        runs.append(FakeRun(**options))
        return runs[-1]

    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    experiment = sentiment.Experiment(training=ExperimentTraining(tracker=name))
    trackers = make_run(tmp_path / "first", experiment, None).trackers
    assert len(trackers) == len(runs) == (name is not None)
    assert at_exit == [tracker.close for tracker in trackers]
    for run in runs:
        assert (run.options["project"], run.options["name"]) == ("jaxlm", "first")
        assert run.options["config"]["training"]["tracker"] == "trackio"


def test_a_missing_package_of_a_tracker_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tracker(None)
    with pytest.raises(ImportError, match="--training.tracker wandb needs the package wandb: pip install wandb"):
        check_tracker("wandb")


@pytest.mark.live
def test_tensorboard_event_files_contain_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    tracker = TensorBoardTracker(tmp_path / "events")
    tracker.log(10, {"loss": 2.5, "validation_accuracy": 0.75})
    tracker.log(20, {"loss": 2.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["loss", "validation_accuracy"]
    points = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors("loss")]
    assert points == [(10, 2.5), (20, 2.25)]


@pytest.mark.parametrize(
    ("module", "package", "make"),
    [
        ("tensorboard.summary", "tensorboard", lambda: TensorBoardTracker("events")),
        ("wandb", "wandb", lambda: WandbTracker("project")),
        ("trackio", "trackio", lambda: TrackioTracker("project")),
    ],
)
def test_a_missing_package_raises_an_error_with_the_install_command(monkeypatch, module, package, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make()

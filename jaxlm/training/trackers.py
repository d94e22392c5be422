"""A protocol for experiment trackers, and adapters for TensorBoard, Weights & Biases and Trackio.

The training loop passes the numbers of each record in ``metrics.jsonl`` to the trackers of the run, except numbers that
are not finite. With several processes, only the trackers of the first process receive numbers, so create trackers only
in the first process. Any object with the methods ``log`` and ``close`` is a tracker. So an adapter for another service
needs no base class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """The interface of an object that receives the metrics of a training run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step.

        Several calls may have the same step. Their metrics have different names, for example those of the training
        and those of the validation. The step decreases only after a rollback, when the run repeats steps. If a metric
        of a step is recorded again, only its newest value is valid.

        Args:
            step: number of training steps so far.
            values: ``{name: value}`` with finite values; empty for an event without numbers, such as a resume.
        """

    def close(self) -> None:
        """Write buffered values and release the resources of the tracker.

        ``jaxlm.training.loop.train`` does not call this method. Call it after the run.
        """


class TensorBoardTracker:
    """Writes TensorBoard event files, which ``tensorboard --logdir DIRECTORY`` displays.

    It needs the package ``tensorboard``, but neither torch nor TensorFlow.

    Args:
        directory: the directory of the event files, which is created if it does not exist.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        self._writer = _import("tensorboard.summary", self).Writer(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write buffered values and close the file."""
        self._writer.close()


class _RunTracker:
    """Base class of the trackers for Weights & Biases and Trackio.

    The function ``init`` of both packages returns a run with the methods ``log`` and ``finish``.
    """

    _package: str

    def __init__(self, project: str, name: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        self._run = _import(self._package, self).init(project=project, name=name, config=dict(config or {}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send buffered values and end the run."""
        self._run.finish()


class WandbTracker(_RunTracker):
    """Logs to Weights & Biases. The environment variables of this service also apply (``WANDB_MODE=offline``, ...).

    After a rollback, the run repeats steps. Weights & Biases does not show the metrics of the repetition, because it
    ignores metrics of a step that is lower than its newest step.

    Args:
        project: name of the project.
        name: name of the run; None lets the service choose one.
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: wandb is not installed.
    """

    _package = "wandb"


class TrackioTracker(_RunTracker):
    """Logs to Trackio, which stores the metrics in a database on this machine. ``trackio show`` displays them.

    Args:
        project: name of the project.
        name: name of the run; None lets the service choose one.
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: trackio is not installed.
    """

    _package = "trackio"


def _import(module: str, tracker: Tracker) -> Any:
    """The module of the package that ``tracker`` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{type(tracker).__name__} needs {package}: pip install {package}") from error


def check_tracker(name: TrackerName | None) -> None:
    """Raise ``ImportError`` if the package of the tracker ``name`` is not installed. None needs no package."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ImportError(f"--training.tracker {name} needs the package {name}: pip install {name}")


def make_tracker(name: TrackerName, directory: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker ``name`` for the run directory ``directory``.

    TensorBoard files are in ``directory/tensorboard``. In Weights & Biases and Trackio, the project is ``jaxlm``, and
    the name of the run is the name of the directory.

    Args:
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: the package of the service is not installed.
    """
    if name == "tensorboard":
        return TensorBoardTracker(directory / "tensorboard")
    return {"wandb": WandbTracker, "trackio": TrackioTracker}[name]("jaxlm", directory.resolve().name, config)

"""A protocol for experiment trackers, and adapters for TensorBoard, Weights & Biases and Trackio.

A tracker receives the numbers in ``metrics.jsonl``. Names of events and values that are not finite are left out. With
several processes, only the first process should create a tracker. Any object with the methods ``log`` and ``close`` is
a tracker; an adapter for another service needs no base class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """An object that receives the metrics of training."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step. Calls for the same step have metrics of different names.

        Steps decrease only after a rollback, when the run repeats steps. Then only the newest metrics of a step
        are valid.
        """

    def close(self) -> None:
        """Write buffered values and release the resources of the tracker."""


class TensorBoardTracker:
    """Writes TensorBoard event files, which ``tensorboard --logdir DIRECTORY`` displays.

    It needs the package ``tensorboard``, but not torch or TensorFlow.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from tensorboard.summary import Writer  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("TensorBoardTracker needs tensorboard: pip install tensorboard") from error
        self._writer = Writer(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write buffered values and close the file."""
        self._writer.close()


class _RunTracker:
    """Base class for Weights & Biases and Trackio. Their ``init`` returns a run with ``log`` and ``finish``."""

    _package: str

    def __init__(self, project: str, name: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        try:
            service = importlib.import_module(self._package)
        except ImportError as error:
            raise ImportError(f"{type(self).__name__} needs {self._package}: pip install {self._package}") from error
        self._run = service.init(project=project, name=name, config=dict(config or {}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send buffered values and end the run."""
        self._run.finish()


class WandbTracker(_RunTracker):
    """Logs to Weights & Biases. Its environment variables (``WANDB_MODE=offline``, ``WANDB_DIR``, ...) also apply.

    Weights & Biases ignores metrics of a step below its newest step, so it does not show the steps that are repeated
    after a rollback.

    Args:
        project: name of the project.
        name: name of the run; None lets the service choose one.
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: wandb is not installed.
    """

    _package = "wandb"


class TrackioTracker(_RunTracker):
    """Logs to Trackio, whose database is on this machine. ``trackio show`` displays it.

    Args:
        project: name of the project.
        name: name of the run; None lets the service choose one.
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: trackio is not installed.
    """

    _package = "trackio"


def check_tracker(name: TrackerName | None) -> None:
    """Raise ``ImportError`` if the package of the service is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ImportError(f"--training.tracker {name} needs the package {name}: pip install {name}")


def make_tracker(name: TrackerName, directory: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker for a run directory.

    TensorBoard files are in ``directory/tensorboard``. In the other services, the project is ``jaxlm`` and the run has
    the name of the directory.

    Args:
        config: the configuration of the run, as JSON values.

    Raises:
        ImportError: the package of the service is not installed.
    """
    if name == "tensorboard":
        return TensorBoardTracker(directory / "tensorboard")
    return {"wandb": WandbTracker, "trackio": TrackioTracker}[name]("jaxlm", directory.resolve().name, config)

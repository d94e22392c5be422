"""Trackers: a protocol for logging metrics to TensorBoard, Weights & Biases or Trackio, and its three adapters.

A tracker receives the same values as ``metrics.jsonl``. In a run of several processes, only the first should make one.
Any object with ``log`` and ``close`` is a tracker, so another service needs a class of a few lines and no base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """An object that training gives its metrics to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step. Steps do not decrease; one step may come twice, with different names."""

    def close(self) -> None:
        """Write what is buffered and end the record."""


class TensorBoardTracker:
    """Writes TensorBoard event files; ``tensorboard --logdir DIRECTORY`` shows them.

    It needs the package ``tensorboard``, but neither torch nor TensorFlow.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from tensorboard.summary import Writer  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("TensorBoardTracker needs tensorboard: pip install tensorboard") from error
        self._writer = Writer(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar for each metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()


class _RunTracker:
    """What Weights & Biases and Trackio have in common: ``init`` returns a run that logs and finishes."""

    def __init__(self, service: Any, project: str, name: str | None, config: Mapping[str, Any] | None) -> None:
        self._run = service.init(project=project, name=name, config=dict(config or {}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is buffered and end the run."""
        self._run.finish()


class WandbTracker(_RunTracker):
    """Logs to Weights & Biases. Its variables (``WANDB_MODE=offline``, ``WANDB_DIR``, ...) configure the rest.

    Args:
        project: the project that the run is listed in.
        name: the run's name; None lets the service choose one.
        config: the run's configuration, JSON values.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, name: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("WandbTracker needs wandb: pip install wandb") from error
        super().__init__(wandb, project, name, config)


class TrackioTracker(_RunTracker):
    """Logs to Trackio, whose database is on this machine; ``trackio show`` displays it.

    Args:
        project: the project that the run is listed in.
        name: the run's name; None lets the service choose one.
        config: the run's configuration, JSON values.

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(self, project: str, name: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        try:
            import trackio  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("TrackioTracker needs trackio: pip install trackio") from error
        super().__init__(trackio, project, name, config)

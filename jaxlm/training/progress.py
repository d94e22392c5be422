"""The progress of a run on the terminal: a live bar where there is one, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


def device_name() -> str:
    """All devices in words, e.g. ``8 x NVIDIA H100 80GB HBM3``."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


class Bar:
    """Loss, tokens per second, remaining time and device of a run of ``steps`` steps, ``start`` of which are done."""

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._steps, self._start = steps, start
        self._begun = self._printed = time.perf_counter()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[rate]} · {task.fields[device]} · left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=False,
        )
        self._task = self._progress.add_task(
            "training", total=steps, completed=start, loss="-", rate="-", device=device_name()
        )

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """Show the state after ``step`` steps."""
        rate = "-" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
        now = time.perf_counter()
        if not self.console.is_terminal and (now - self._printed >= SECONDS_BETWEEN_LINES or step in (1, self._steps)):
            self._printed = now
            left = (now - self._begun) / max(step - self._start, 1) * (self._steps - step)
            self.say(f"step {step}/{self._steps} · loss {loss:.3f} · {rate} · {device_name()} · {left:.0f} s left")

    def say(self, text: Any) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

"""Progress of a training run: a progress bar on a terminal, one live line in a notebook, plain lines in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm import processes, sharding

SECONDS_BETWEEN_LINES = 10.0  # minimum time between two lines in a log file
SECONDS_BETWEEN_UPDATES = 0.25
"""Minimum time between two updates of the live line in a notebook."""


class ProgressBar:
    """Shows the loss, the tokens per second, the remaining time and the device of a run.

    On a terminal, it is a progress bar. Otherwise, :meth:`update` prints a line after step 1, after step ``steps``, and
    when :data:`SECONDS_BETWEEN_LINES` seconds have passed since the last line. In a notebook, each line replaces the
    line before it, and the interval is :data:`SECONDS_BETWEEN_UPDATES` seconds. With several processes, only the first
    process prints, unless ``console`` is given.

    Args:
        steps: number of steps of the run.
        start: number of steps that were done before a resume.
        devices: number of devices of the run.
        console: where to print. None: standard error.
    """

    def __init__(self, steps: int, start: int = 0, devices: int = 1, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=not processes.is_first())
        kind = sharding.device_kind()
        self._steps, self._device = steps, kind if devices == 1 else f"{devices} x {kind}"
        # Step and time of the first update of this process, or of the first update after the last rollback. The
        # remaining time is estimated from the steps since then.
        self._first_update: tuple[int, float] | None = None
        self._last_step = start
        self._last_print = time.perf_counter()
        self._live_line: Any = None  # the handle of the output in a notebook
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[rate]} · {task.fields[device]} · left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=steps, completed=start, loss="-", rate="-", device=self._device
        )

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """Show the progress after ``step`` steps. If ``tokens_per_second`` is None, a dash is shown."""
        rate = "-" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
        now = time.perf_counter()
        if step <= self._last_step:  # after a rollback
            self._first_update = None
        self._last_step = step
        first_step, first_time = self._first_update = self._first_update or (step, now)
        seconds = SECONDS_BETWEEN_UPDATES if self.console.is_jupyter else SECONDS_BETWEEN_LINES
        is_due = now - self._last_print >= seconds or step in (1, self._steps)
        if is_due and not self.console.is_terminal:
            self._last_print = now
            remaining = ""
            if step > first_step:
                remaining = f" · {(now - first_time) / (step - first_step) * (self._steps - step):.0f} s left"
            line = f"step {step}/{self._steps} · loss {loss:.3f} · {rate} · {self._device}{remaining}"
            if self.console.is_jupyter:
                self._show_live(line)
            else:
                self.say(line)

    def _show_live(self, line: str) -> None:
        """Show the line in a notebook, in the place of the last line."""
        from IPython.display import display  # a notebook has IPython

        if self.console.quiet:
            return
        data = {"text/plain": line}
        if self._live_line is None:
            self._live_line = display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
        else:
            self._live_line.update(data, raw=True)

    def say(self, text: Any) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

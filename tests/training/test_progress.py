"""The lines that show the progress of a run."""

import io

from rich.console import Console

from jaxlm.training import progress
from jaxlm.training.progress import ProgressBar


def test_the_remaining_time_does_not_count_the_steps_before_a_rollback(monkeypatch):
    seconds, output = iter(range(100)), io.StringIO()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    bar = ProgressBar(10, console=Console(file=output, width=200))
    for step in (1, 2, 3, 4, 3, 4):  # one second per step; a rollback to step 2 after step 4
        bar.update(step, 1.0, None)
    left = [line.rpartition(" · ")[2] for line in output.getvalue().splitlines()]
    assert left[1:4] == ["8 s left", "7 s left", "6 s left"]
    assert not left[4].endswith("left")
    assert left[5] == "6 s left"

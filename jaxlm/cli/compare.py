"""``jaxlm compare``: a table of finished or running training runs, and a plot of their validation curves."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from jaxlm.command_line import check_output_file
from jaxlm.training.compare import compare_runs, draw_comparison
from jaxlm.training.report import check_run, is_run


@dataclasses.dataclass(frozen=True)
class Compare:
    """Print a table of training runs: family, parameters, steps, minutes, validation metrics and scores."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, for example runs/*. An existing path that is not a run directory is left out with a message. It
    is an error if a path does not exist, or if no path is a run directory."""
    plot: Path | None = None
    """Plot the validation curves of all runs to this PNG file."""

    def run(self) -> int:
        """Print the table and return the exit status."""
        if not self.runs:
            raise ValueError("there are no runs to compare: name at least one run directory")
        check_output_file("plot", self.plot)
        skipped = [path for path in self.runs if path.exists() and not is_run(path)]
        runs = [path for path in self.runs if path not in skipped]
        if not runs:
            check_run(skipped[0])  # raises the error of a directory that is not a run
        print(compare_runs(runs))
        for path in skipped:
            print(f"jaxlm compare: {path} is left out: it is not a run directory", file=sys.stderr)
        if self.plot is not None:
            draw_comparison(runs, self.plot)
        return 0

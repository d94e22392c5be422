"""``jaxlm compare``: a table of finished or running training runs, and a plot of their validation curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from jaxlm.command_line import check_output_file
from jaxlm.training.compare import compare_runs, draw_comparison


@dataclasses.dataclass(frozen=True)
class Compare:
    """Print a table of training runs: family, parameters, steps, minutes, validation metrics and scores."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    plot: Path | None = None
    """Plot the validation curves of all runs to this PNG file."""

    def run(self) -> int:
        """Print the table and return the exit status."""
        if not self.runs:
            raise ValueError("there are no runs to compare: name at least one run directory")
        check_output_file("plot", self.plot)
        print(compare_runs(self.runs))
        if self.plot is not None:
            draw_comparison(self.runs, self.plot)
        return 0

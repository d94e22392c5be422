"""A bar chart of the speed of jaxlm relative to its baselines, with one bar per processor.

    python -m benchmarks.chart --output speed.png "Zen 4"=zen4/training_gpt2.json zen4/training_t5.json "Xeon"=xeon.json

An argument is ``NAME=FILE``: the name of a processor, and a file that a benchmark wrote with ``--json``. A file without
a name belongs to the previous processor. A bar is the median over rounds of the time of a baseline divided by the time
of jaxlm. Above 1, jaxlm is faster.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import harness, report
from benchmarks.harness import OURS, UserError


@dataclasses.dataclass(frozen=True)
class Chart:
    """Draw the chart."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """NAME=FILE, or FILE for the previous NAME."""
    operations: tuple[str, ...] = ("training step",)
    """Operations to plot."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("speed.png")
    """Output file: .png or .svg."""


def read(arguments: Sequence[str], operations: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the baselines, by processor.

    Raises:
        UserError: the first file has no processor name, or the files have no rows of the operations.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    name = ""
    for argument in arguments:
        prefix, equals, file = argument.rpartition("=")
        name = prefix if equals else name
        if not name:
            raise UserError(f"{argument} has no processor name: write NAME={argument}")
        measured = report.read([Path(file)])
        baselines = [row for row in measured if row["peer"] != OURS and row["op"] in operations]
        rows.setdefault(name, []).extend(baselines)
    if not any(rows.values()):
        raise UserError(f"no file has rows of the operations {', '.join(operations)}: choose other --operations")
    return rows


def draw(rows: dict[str, list[dict[str, Any]]]) -> Any:
    """The figure: one group of bars per shape and baseline, with one bar per processor."""
    all_rows = [row for processor_rows in rows.values() for row in processor_rows]
    groups = list(dict.fromkeys((row["shape"], row["peer"]) for row in all_rows))
    groups.sort(key=lambda group: (group[1], group[0]))
    height = 0.8 / len(rows)
    figure, axes = report.new_figure(0.24 * len(groups) * len(rows) + 0.9)
    for number, (name, processor_rows) in enumerate(rows.items()):
        ratios = {(row["shape"], row["peer"]): row["ratio"] for row in processor_rows}
        points = [
            (position - 0.4 + height * (number + 0.5), ratios[group])
            for position, group in enumerate(groups)
            if group in ratios
        ]
        bars = axes.barh([y for y, _ in points], [ratio for _, ratio in points], height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{shape} / {baseline}" for shape, baseline in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#444", linewidth=0.8)
    axes.set_xlabel("times as fast as the baseline (median of interleaved rounds)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def run(options: Chart) -> None:
    """Read the files and write the chart."""
    draw(read(options.files, options.operations)).savefig(options.output, dpi=120)
    print(f"wrote {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Draw the chart and return the exit status."""
    return harness.main(Chart, run, arguments, name="chart", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

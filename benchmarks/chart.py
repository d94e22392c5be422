"""A bar chart of the speed of jaxlm relative to its peers, with one bar per processor.

    python -m benchmarks.chart --output speed.png "Zen 4"=zen4/training_gpt2.json zen4/training_t5.json "Xeon"=xeon.json

An argument is the name of a processor, ``=``, and a file that a benchmark wrote with ``--json``. A file without a name
belongs to the previous name. A bar is the median time of a peer divided by the median time of jaxlm in the same rounds;
above 1, jaxlm is faster.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import harness, report
from benchmarks.harness import OURS, Mistake


@dataclasses.dataclass(frozen=True)
class Chart:
    """Draw the chart."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """NAME=FILE, or FILE for the previous name."""
    operations: tuple[str, ...] = ("training step",)
    """Operations to plot."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("speed.png")
    """Output file: .png or .svg."""


def read(arguments: Sequence[str], operations: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the peers, by processor.

    Raises:
        Mistake: the first file has no processor name, or the files have no rows of the operations.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    name = ""
    for argument in arguments:
        before, equals, file = argument.rpartition("=")
        name = before if equals else name
        if not name:
            raise Mistake(f"{argument} has no processor name: write NAME={argument}")
        found = [row for row in report.read([Path(file)]) if row["peer"] != OURS and row["op"] in operations]
        rows.setdefault(name, []).extend(found)
    if not any(rows.values()):
        raise Mistake(f"no file has rows of the operations {', '.join(operations)}: choose other --operations")
    return rows


def draw(rows: dict[str, list[dict[str, Any]]]) -> Any:
    """The figure, with one group per shape and peer and one bar per processor."""
    groups = list(dict.fromkeys((row["shape"], row["peer"]) for own_rows in rows.values() for row in own_rows))
    groups.sort(key=lambda group: (group[1], group[0]))
    height = 0.8 / len(rows)
    figure, axes = report.new_figure(0.24 * len(groups) * len(rows) + 0.9)
    for number, (name, own_rows) in enumerate(rows.items()):
        ratios = {(row["shape"], row["peer"]): row["ratio"] for row in own_rows}
        points = [
            (at - 0.4 + height * (number + 0.5), ratios[group]) for at, group in enumerate(groups) if group in ratios
        ]
        bars = axes.barh([y for y, _ in points], [ratio for _, ratio in points], height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{shape} / {peer}" for shape, peer in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#444", linewidth=0.8)
    axes.set_xlabel("times as fast as the peer (median of interleaved runs)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def run(options: Chart) -> None:
    """Read the files and write the chart."""
    draw(read(options.files, options.operations)).savefig(options.output, dpi=120)
    print(f"wrote {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """The exit status of the command line."""
    return harness.main(Chart, run, arguments, name="chart", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

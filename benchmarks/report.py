"""An HTML page from result files of benchmarks: tables, plots, and the rows in which jaxlm is slower than a baseline.

    python -m benchmarks.report benchmarks/results/*.json --output report.html

The page is one file with inline plots and without scripts. All its content comes from the result files.
"""

from __future__ import annotations

import dataclasses
import html
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import harness
from benchmarks.harness import OURS, UserError


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the page."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files that benchmarks wrote with --json."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """Output file."""


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The measured rows of all files, each with its ``file``, ``program`` and ``machine``.

    Raises:
        UserError: there is no file, or a file was not written by a benchmark.
    """
    if not files:
        raise UserError("there are no result files: give files that benchmarks wrote with --json")
    rows = []
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            for row in record["rows"]:
                if "median" in row and "work" in row:  # fidelity and nanogpt write rows without times
                    rows.append({**row, "file": file.name, "program": record["program"], "machine": record["machine"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a file that a benchmark wrote with --json: {error!r}") from error
    if not rows:
        raise UserError(
            "the files have no timed rows: give files of the benchmarks training, decoding, attention, recurrence or "
            "scans"
        )
    return rows


def sizes(shape: str) -> dict[str, int]:
    """The sizes in the description of a shape, by name.

    Example:
        >>> sizes("gpt2 B2 T512 heads=8")
        {'B': 2, 'T': 512, 'heads': 8}
    """
    return {name.rstrip("="): int(size) for name, size in re.findall(r"\b([A-Z]|[a-z]+=)(\d+)\b", shape)}


def slower_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of baselines that took less time than jaxlm in the same rounds. The lowest ratio comes first."""
    return sorted((row for row in rows if row["peer"] != OURS and row["ratio"] < 1.0), key=lambda row: row["ratio"])


def rows_by_size(
    rows: Sequence[dict[str, Any]],
) -> dict[tuple[str, str, str], dict[str, list[tuple[int, dict[str, Any]]]]]:
    """Groups of two or more rows that differ in one size: (file, operation, size name) -> name -> [(size, row)]."""
    groups: dict[tuple[str, str, str], dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    for row in rows:
        for name, size in sizes(row["shape"]).items():
            rest = re.sub(rf"\b{name}=?{size}\b", f"{name} ...", row["shape"])
            lines = groups.setdefault((row["file"], f"{row['op']}, {rest}", name), {})
            lines.setdefault(row["peer"], []).append((size, row))
    return {
        key: {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}
        for key, lines in groups.items()
        if any(len(line) > 1 for line in lines.values())
    }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page as HTML."""
    parts = ["<h1>jaxlm: measured</h1>"]
    for file, group in itertools.groupby(rows, key=lambda row: row["file"]):
        file_rows = list(group)
        machine = file_rows[0]["machine"]
        description = " · ".join(f"{name} {value}" for name, value in machine.items() if name != "flags")
        parts += [
            f"<h2>{html.escape(file_rows[0]['program'])}</h2>",
            f"<p class=machine>{html.escape(f'{file}: {description}')}</p>",
        ]
        parts.append(_table(file_rows))
    slower = slower_rows(rows)
    parts.append("<h2>Where jaxlm is slower</h2>")
    if slower:
        parts.append("<p>Every row in which a baseline took less time than jaxlm in the same rounds.</p>")
        parts.append(_table(slower))
    else:
        parts.append("<p>In none of these rows is a baseline faster.</p>")
    parts += [
        "<h2>Share of the peak</h2>",
        "<p>The peak is that of a matrix product or a copy in the same rounds.</p>",
        _peak_plot(rows),
    ]
    groups = rows_by_size(rows)
    if groups:
        parts.append("<h2>Time as a function of size</h2>")
        parts += [_curve(operation, name, lines) for (_, operation, name), lines in groups.items()]
    body = "\n".join(parts)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>jaxlm: measured</title>\n<style>{_STYLE}</style>\n{body}\n"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}td,th{padding:.2rem .7rem;"
    "border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,th:first-child,td:nth-child(2),"
    "td:nth-child(3){text-align:left}.slower{color:#b3261e;font-weight:600}.machine{color:#666;font-size:13px}"
    "svg{max-width:100%;height:auto}"
)
_HEADER = (
    "operation", "shape", "implementation", "ms", "p10", "p90", "tokens/s", "% of peak", "compile s",
    "time / jaxlm's time",
)  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{name}</th>" for name in _HEADER) + "</tr>"]
    for row in rows:
        times = [f"{1e3 * row[name]:,.4g}" for name in ("median", "p10", "p90")]
        ratio = "" if row["peer"] == OURS else f"{row['ratio']:.2f}"
        css_class = " class=slower" if ratio and row["ratio"] < 1.0 else ""
        cells = [row["op"], row["shape"], row["peer"], *times, f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['roof_percent']:.1f}", f"{row['compile_seconds']:.1f}"]
        text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr>{text}<td{css_class}>{ratio}</td></tr>")
    return "\n".join([*lines, "</table>"])


def _peak_plot(rows: Sequence[dict[str, Any]]) -> str:
    names = [(row["file"], f"{row['op']}, {row['shape']}") for row in rows]
    positions = {name: index for index, name in enumerate(dict.fromkeys(reversed(names)))}
    implementations = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = new_figure(0.34 * len(positions) + 1.2)
    height = 0.8 / len(implementations)
    for index, implementation in enumerate(implementations):
        bars = [
            (positions[name] + 0.4 - height * (index + 0.5), row)
            for name, row in zip(names, rows)
            if row["peer"] == implementation
        ]
        axes.barh(
            [y for y, _ in bars],
            [row["roof_percent"] for _, row in bars],
            height,
            label=implementation,
            color=COLORS.get(implementation, _OTHER_COLOR),
        )
    axes.set_yticks(list(positions.values()), [name for _, name in positions], fontsize=8)
    axes.axvline(100, color="#888", linewidth=0.8)
    axes.set_xlabel("% of the peak")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _curve(operation: str, name: str, lines: dict[str, list[tuple[int, dict[str, Any]]]]) -> str:
    """A plot of milliseconds over one size. Both axes are logarithmic, so that equal slopes mean equal growth."""
    figure, axes = new_figure(3.2)
    for implementation, line in lines.items():
        points = [size for size, _ in line]
        low, high = ([1e3 * row[percentile] for _, row in line] for percentile in ("p10", "p90"))
        color = COLORS.get(implementation, _OTHER_COLOR)
        axes.plot(points, [1e3 * row["median"] for _, row in line], marker="o", label=implementation, color=color)
        axes.fill_between(points, low, high, alpha=0.15, color=color)
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms", title=operation)
    ticks = sorted({size for line in lines.values() for size, _ in line})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


COLORS = {OURS: "C0", "torch": "C1", "flax": "C2", "torch-compile": "C3", "lax.scan": "C4", "lax.conv": "C5"}
_OTHER_COLOR = "C7"


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure of this height in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def run(options: Report) -> None:
    """Read the files and write the page."""
    options.output.write_text(page(read(options.files)), encoding="utf-8")
    print(f"wrote {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit status."""
    return harness.main(Report, run, arguments, name="report", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

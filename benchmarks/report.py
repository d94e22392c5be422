"""Write the tables and charts of docs/benchmarks.md from the result files of the benchmarks.

    python -m benchmarks.report --page docs/benchmarks.md

The result files are ``benchmarks/results/PROCESSOR/*.json``, which benchmarks wrote with ``--json``. The page gets one
section for each directory PROCESSOR. If several files of a processor contain the same operation and shape, the section
shows the results of the newest file. The command replaces the measured part of the page, which is between two comment
lines.

If the page also has the comment lines of an estimated part, the command replaces this part too. The part gets one
section for each file ``benchmarks/estimates/PROCESSOR.json``. Such a file has no measurements, but estimates of a
compiler: a ``title``, and ``runs`` with the fields ``command``, ``time``, ``commit``, ``versions`` and ``plans``.
An entry of ``plans`` is a dict that ``jaxlm plan --json`` writes. It may lack fields that the section does not show.

The bar charts show the speed of jaxlm / the speed of a baseline. In each round, the time of the baseline is divided by
the time of jaxlm; the charts show the median of these ratios. Above 1, jaxlm is faster. Some charts also show the speed
of jaxlm in percent of the peak of the machine. In charts and tables of the page, this percentage is called "% of the
limit". The line charts show the time as a function of the length.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, shapes
from benchmarks.harness import JAXLM, UserError

BEGIN = "<!-- measured: python -m benchmarks.report writes the lines below -->"
END = "<!-- end of measured -->"
BEGIN_ESTIMATES = "<!-- estimated: python -m benchmarks.report writes the lines below -->"
END_ESTIMATES = "<!-- end of estimated -->"
PICTURES = "pictures/benchmarks"
"""Directory of the charts, relative to the page."""
TITLES_FILE = "processors.json"
"""JSON file in the results directory. It maps the directory name of a processor to the title of its section."""
SECTIONS = {
    "training": "Training steps of whole models",
    "decoding": "Decoding of whole models",
    "speculative": "Speculative decoding",
    "texts": "Texts",
    "attention": "Attention",
    "recurrence": "Recurrent layers",
    "scans": "Linear recurrences and convolution",
}
"""Headings of the page in their order, by the name of a benchmark. Results of other benchmarks are ignored."""

ROOFLINES = ("attention", "recurrence", "scans")
"""Benchmarks that have roofline charts: ``shapes.work_of`` knows the FLOPs and the bytes of their operations."""
PEAKS = {"FLOP": r"([\d,.]+) GFLOP/s float32 GEMM", "B": r"([\d,.]+) GB/s copy"}
"""By unit of work: a regular expression that finds the peak in the description of the machine. The peak was measured at
the start of the run, in billions of units per second."""
GENERATE = "generate"
"""The baseline of speculative decoding: ``jaxlm.decoding.generate``. The summary of a section does not count it."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Replace the measured part of a page, and write its charts."""

    results: Path = Path("benchmarks/results")
    """Directory that contains one directory of result files for each processor."""
    estimates: Path = Path("benchmarks/estimates")
    """Directory that contains one JSON file of estimates for each processor."""
    page: Path = Path("docs/benchmarks.md")
    """Page whose measured part is replaced, and its estimated part, if it has one. The charts are written to
    pictures/benchmarks in its directory."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement of one implementation for one operation and shape, from one result file."""

    program: str
    """Name of the benchmark, a key of :data:`SECTIONS`."""
    operation: str
    shape: str
    implementation: str
    seconds: float
    """Median time of a repetition."""
    ratio: float
    """Median over rounds of the time of this implementation / the time of jaxlm."""
    peak_percent: float | None
    """Speed in percent of the peak of the machine, which was measured in the same rounds. None: not measured."""
    gigabytes: float | None
    """Peak memory of the process. None: not measured."""
    peaks: dict[str, float]
    """Measured peaks of the machine in the same run, by unit of work: units per second."""
    file: str
    """Name of the result file."""
    machine: dict[str, Any]
    """Properties of the machine (``harness.describe_machine``)."""

    @property
    def label(self) -> str:
        """Operation and shape."""
        return f"{self.operation}, {self.shape}" if self.shape else self.operation


def read(directory: Path) -> list[Measurement]:
    """The measurements in the result files of a processor; for each operation and shape, only those of the newest file.

    The files are read in the order of their names. Operations and shapes have the order in which they first occur.

    Raises:
        UserError: the directory has no results of the benchmarks in :data:`SECTIONS`, or a file was not written by a
            benchmark.
    """
    files = sorted(directory.glob("*.json"))
    if not files:
        raise UserError(f"{directory} has no result files: run benchmarks with --json {directory}/NAME.json")
    newest: dict[tuple[str, str, str], tuple[str, list[Measurement]]] = {}
    for file in files:
        groups: dict[tuple[str, str, str], list[Measurement]] = {}
        for row in _measurements(file):
            groups.setdefault((row.program, row.operation, row.shape), []).append(row)
        for key, group in groups.items():
            time = str(group[0].machine["time"])
            if key not in newest or newest[key][0] < time:
                newest[key] = time, group
    if not newest:
        raise UserError(
            f"{directory} has no results of {', '.join(SECTIONS)}: run one of these benchmarks with --json "
            f"{directory}/NAME.json, or remove the directory"
        )
    return [row for _, group in newest.values() for row in group]


def _measurements(file: Path) -> list[Measurement]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in record["rows"] if isinstance(row, dict) and "seconds" in row]
        rows = [row for row in rows if "ratio" in row or "ratios" in row]
        if record.get("program") not in SECTIONS:
            return []
        common = {"program": record["program"], "file": file.name, "machine": record["machine"]}
        return [measurement for row in rows for measurement in _row_measurements(row, common)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a file that a benchmark wrote with --json: {error!r}") from error


def _row_measurements(row: dict[str, Any], common: dict[str, Any]) -> Iterable[Measurement]:
    if "task" in row:  # benchmarks.texts: one row for all implementations
        for name, seconds in row["seconds"].items():
            ratio = 1.0 if name == JAXLM else row["ratios"][name]
            shape = f"{row['sentences']} sentences"
            yield Measurement(
                operation=row["task"], shape=shape, implementation=name, seconds=statistics.median(seconds),
                ratio=ratio, peak_percent=None, gigabytes=None, peaks={}, **common,
            )  # fmt: skip
        return
    if common["program"] == "speculative":  # one row for each number of proposals, and one for decoding without them
        if row["accepted"] is not None:
            operation = f"{row['implementation']}, {row['accepted']:.0%} accepted"
            for name, seconds, ratio in ((JAXLM, row["median"], 1.0), (GENERATE, row["plain_median"], row["ratio"])):
                yield Measurement(
                    operation=operation, shape=row["shape"], implementation=name, seconds=seconds, ratio=ratio,
                    peak_percent=None, gigabytes=None, peaks={}, **common,
                )  # fmt: skip
        return
    memory = row.get("facts", {}).get("peak_process_bytes")
    yield Measurement(
        operation=row["op"], shape=row["shape"], implementation=row["implementation"], seconds=row["median"],
        ratio=row["ratio"], peak_percent=row["peak_percent"], gigabytes=memory and memory / 1e9,
        peaks=_peaks(row, common["machine"]), **common,
    )  # fmt: skip


def _peaks(row: dict[str, Any], machine: dict[str, Any]) -> dict[str, float]:
    """The peaks of the machine by unit of work.

    For the unit of the row's work, the peak was measured in the rounds of the row; for the other units, at the start of
    the run.
    """
    found = {unit: re.search(pattern, str(machine.get("peaks"))) for unit, pattern in PEAKS.items()}
    peaks = {unit: 1e9 * float(match[1].replace(",", "")) for unit, match in found.items() if match}
    return peaks | ({row["work"]["unit"]: row["peak"]} if "peak" in row else {})


# ------------------------------------------------------------------------------------------------------- page


def section(name: str, title: str, measurements: Sequence[Measurement], pictures: Path) -> str:
    """The section of a processor as Markdown. Writes its charts.

    Benchmarks for which no baseline was measured have no bar chart.

    Args:
        name: name of the directory of the processor, with which the names of the charts begin.
        title: title of the section.
        measurements: all measurements of the processor.
        pictures: directory of the charts.
    """
    baselines = [row for row in measurements if row.implementation not in (JAXLM, GENERATE)]
    slower = sorted((row for row in baselines if row.ratio < 1.0), key=lambda row: row.ratio)
    parts = [f"### {title}", _summary(baselines, slower)]
    for program, heading in SECTIONS.items():
        rows = [row for row in measurements if row.program == program]
        if not rows:
            continue
        parts.append(f"#### {heading}: {title}")
        if any(row.implementation != JAXLM for row in rows):
            draw(rows).savefig(pictures / f"{name}_{program}.svg", metadata={"Date": None})
            parts.append(f"![{heading}: speed and share of the limit]({PICTURES}/{name}_{program}.svg)")
        if program in ROOFLINES and (points := [row for row in rows if PEAKS.keys() <= row.peaks.keys()]):
            draw_rooflines(points).savefig(pictures / f"{name}_{program}_roofline.svg", metadata={"Date": None})
            parts.append(f"![{heading}: roofline]({PICTURES}/{name}_{program}_roofline.svg)")
        parts.append(_details("All numbers", _table(rows)))
    if groups := curves(measurements):
        draw_curves(groups).savefig(pictures / f"{name}_lengths.svg", metadata={"Date": None})
        parts.append(f"#### Time as a function of length: {title}")
        parts.append(f"![Time as a function of length]({PICTURES}/{name}_lengths.svg)")
    parts.append(_details("Conditions of the measurements", _conditions(measurements)))
    return "\n\n".join(parts)


def _summary(baselines: Sequence[Measurement], slower: Sequence[Measurement]) -> str:
    if not baselines:
        return "No baseline was measured."
    text = f"jaxlm is faster in {len(baselines) - len(slower)} of {len(baselines)} comparisons with baselines."
    if not slower:
        return text
    names = [f"{row.label}: {row.ratio:.2f} times as fast as {row.implementation}" for row in slower]
    return f"{text}\n\n" + _details("Comparisons in which jaxlm is slower", "\n".join(f"- {name}" for name in names))


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def _table(rows: Sequence[Measurement]) -> str:
    has_memory = any(row.gigabytes for row in rows)
    header = ["operation", "shape", "implementation", "ms", "jaxlm is ... times as fast", "% of the limit"]
    lines = [header + ["peak memory, GB"] * has_memory]
    for row in rows:
        ratio = "" if row.implementation == JAXLM else f"{row.ratio:.2f}"
        percent = "" if row.peak_percent is None else f"{row.peak_percent:.1f}"
        memory = "" if row.gigabytes is None else f"{row.gigabytes:.2f}"
        cells = [row.operation, row.shape, row.implementation, f"{1e3 * row.seconds:,.4g}", ratio, percent]
        lines.append(cells + [memory] * has_memory)
    return _markdown_table(lines, num_text_columns=3)


def _conditions(measurements: Sequence[Measurement]) -> str:
    header = ["file", "time", "load before the run", "limits", "versions", "commit"]
    lines = [header]
    machines = {row.file: row.machine for row in measurements}
    for file, machine in sorted(machines.items(), key=lambda item: str(item[1]["time"]), reverse=True):
        commit = str(machine.get("commit") or "").replace("+changes", " with changes")
        short_commit = re.sub(r"^(\w{10})\w+", r"\1", commit)
        values = (str(machine.get(name, "")) for name in ("time", "load", "peaks", "versions"))
        lines.append([file, *values, short_commit])
    return _markdown_table(lines, num_text_columns=len(header))


def _markdown_table(lines: Sequence[Sequence[str]], num_text_columns: int) -> str:
    width = len(lines[0])
    rule = ["---"] * num_text_columns + ["---:"] * (width - num_text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def estimate_section(file: Path, pictures: Path) -> str:
    """The section of a processor whose steps a compiler estimated, as Markdown. Writes its chart.

    Args:
        file: the estimates.
        pictures: directory of the chart.

    Raises:
        UserError: the file does not have the expected fields.
    """
    header = ["model", "devices", "mesh", "rows x tokens", "memory of a device, GiB", "step, ms", "MFU, %"]
    lines = [[*header, "MFU, communication does not overlap, %"]]
    conditions = [["models", "command", "time", "versions", "commit"]]
    bars: Bars = {"MFU": {}, "MFU, communication does not overlap": {}}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        title = record["title"]
        for run in record["runs"]:
            for plan in run["plans"]:
                shares = [100 * plan["mfu"], 100 * plan["mfu_with_communication"]]
                memory = f"{plan['memory']['total'] / 2**30:.2f}" + ("" if plan["fits"] else " (does not fit)")
                rows = f"{plan['batch']} x {plan['sequence']:,}"
                cells = [plan["model"], plan["topology"], plan["mesh"], rows, memory, f"{1e3 * plan['seconds']:,.0f}"]
                lines.append([*cells, *(f"{share:.1f}" for share in shares)])
                for values, share in zip(bars.values(), shares, strict=True):
                    values[f"{plan['model']}, {plan['topology']}"] = share
            models = ", ".join(plan["model"] for plan in run["plans"])
            conditions.append([models, f"`{run['command']}`", run["time"], run["versions"], run["commit"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a file of estimates: {error!r}") from error
    groups = list(bars["MFU"])
    figure, (axes,) = _new_figure(0.68 * len(groups) + 1.3)
    _draw_bars(axes, groups, bars, "%.1f")
    xlabel = f"% of the peak of a {title}, estimated by the compiler, not measured"
    axes.set(xscale="linear", xlim=(0, 100), xlabel=xlabel)
    picture = f"{file.stem}_estimates.svg"
    figure.savefig(pictures / picture, metadata={"Date": None})
    return "\n\n".join(
        [
            f"### {title}: estimated by the compiler, not measured",
            f"![{title}: MFU of training steps, estimated by the compiler, not measured]({PICTURES}/{picture})",
            _details("All estimates", _markdown_table(lines, num_text_columns=4)),
            _details("Conditions of the estimates", _markdown_table(conditions, num_text_columns=5)),
        ]
    )


# ----------------------------------------------------------------------------------------------------- charts

COLORS = {
    JAXLM: "C0",
    "torch": "C1",
    "flax": "C2",
    "torch-compile": "C3",
    "jax.nn": "C7",
    "lax.scan": "C4",
    "lax.conv": "C5",
    "associative_scan": "C6",
    "fla": "C8",
    "jla": "C9",
}


Bars = dict[str, dict[str, float]]
"""The values of a grouped bar chart: ``bars[name][group label]``. Bars of the same name have the same color."""


def draw(rows: Sequence[Measurement]) -> Any:
    """A figure with bar charts: the speed of jaxlm relative to each baseline, and in percent of the peak.

    Without measured peaks, the figure has only the first chart.

    Args:
        rows: measurements of one benchmark, with a baseline among them.
    """
    same_operation = len({row.operation for row in rows}) == 1
    labels = {row.label: row.shape if same_operation else row.label for row in rows}
    names = list(dict.fromkeys(row.implementation for row in rows if row.implementation != JAXLM))
    ratios = {name: {labels[row.label]: row.ratio for row in rows if row.implementation == name} for name in names}
    shares = {
        labels[row.label]: row.peak_percent
        for row in rows
        if row.implementation == JAXLM and row.peak_percent is not None
    }
    groups = list(dict.fromkeys(labels.values()))
    bars_per_group = [max(1, sum(label in bars for bars in ratios.values())) for label in groups]
    figure, (left, *rest) = _new_figure(0.26 * sum(bars_per_group) + 0.16 * len(groups) + 1.3, 1, 2 if shares else 1)
    positions = _draw_bars(left, groups, ratios, "%.2f")
    left.axvline(1.0, color="#444", linewidth=0.8)
    left.set_xlabel("times as fast as the baseline")
    for right in rest:
        right.barh([positions[label] for label in shares], list(shares.values()), 0.9, color=COLORS[JAXLM])
        for label, share in shares.items():
            right.text(share + 2.0, positions[label], f"{share:.0f}", va="center", fontsize=8)
        limit = 1.15 * max([100.0, *shares.values()])
        right.set(ylim=left.get_ylim(), xlim=(0, limit), yticks=[], xlabel="% of the limit")
        right.axvline(100.0, color="#444", linewidth=0.8)
    return figure


def draw_processors(rows: dict[str, list[Measurement]]) -> Any:
    """A figure with the speed of jaxlm relative to baselines: one group of bars for each shape and baseline.

    A group has one bar for each processor.

    Args:
        rows: by title of the processor, the measurements of baselines.
    """
    ratios = {
        processor: {f"{row.shape}, {row.implementation}": row.ratio for row in measured}
        for processor, measured in rows.items()
    }
    groups = sorted({label for bars in ratios.values() for label in bars}, key=lambda label: label.split(", ")[::-1])
    figure, (axes,) = _new_figure(0.26 * sum(map(len, ratios.values())) + 0.16 * len(groups) + 1.3)
    _draw_bars(axes, groups, ratios, "%.2f")
    axes.axvline(1.0, color="#444", linewidth=0.8)
    axes.set_xlabel("times as fast as the baseline")
    return figure


def _draw_bars(axes: Any, groups: Sequence[str], bars: Bars, number_format: str) -> dict[str, float]:
    """Draw grouped bars, the first group at the top, and return the y coordinate of the center of each group."""
    start, positions, centers = 0.0, {}, {}
    for label in groups:
        names = [name for name, values in bars.items() if label in values]
        for number, name in enumerate(names):
            positions[name, label] = start + number
        size = max(1, len(names))
        centers[label] = start + (size - 1) / 2
        start += size + 0.6
    for number, (name, values) in enumerate(bars.items()):
        drawn = axes.barh(
            [positions[name, label] for label in values], list(values.values()), 0.9, label=name,
            color=COLORS.get(name, f"C{number}"),
        )  # fmt: skip
        axes.bar_label(drawn, fmt=number_format, padding=3, fontsize=8)
    axes.set_yticks(list(centers.values()), list(centers), fontsize=8)
    axes.set_ylim(start - 0.6, -0.9)
    axes.margins(x=0.12)
    if max(value for values in bars.values() for value in values.values()) > 20:
        axes.set_xscale("log")
    axes.figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=4)
    return centers


Lines = dict[str, list[tuple[int, float]]]
"""The points (length, milliseconds) of the line of each implementation."""


def curves(rows: Sequence[Measurement]) -> dict[str, Lines]:
    """The line charts: ``{"operation, shape": lines}``, where the shape has T... instead of the length.

    A chart has all measurements that differ only in the length T and the implementation. Measurements that exist for
    only one length have no chart.
    """
    groups: dict[str, Lines] = {}
    for row in rows:
        if length := re.search(r"\bT(\d+)\b", row.shape):
            group = f"{row.operation}, {row.shape.replace(length[0], 'T...')}"
            line = groups.setdefault(group, {}).setdefault(row.implementation, [])
            line.append((int(length[1]), 1e3 * row.seconds))
    return {
        group: {implementation: sorted(line) for implementation, line in lines.items()}
        for group, lines in groups.items()
        if any(len(line) > 1 for line in lines.values())
    }


def draw_curves(groups: dict[str, Lines]) -> Any:
    """A figure with one chart for each group of :func:`curves`.

    Both axes are logarithmic, so a line of slope p shows that the time grows as length ** p.
    """
    num_rows = -(-len(groups) // 2)
    figure, all_axes = _new_figure(2.8 * num_rows, num_rows, 2)
    for axes in all_axes[len(groups) :]:
        axes.remove()
    for axes, (group, lines) in zip(all_axes, groups.items()):
        for implementation, line in lines.items():
            color = COLORS.get(implementation)
            axes.plot(*zip(*line), marker="o", label=implementation, color=color)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        axes.set_title(group, fontsize=8)
        ticks = sorted({size for line in lines.values() for size, _ in line})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_rooflines(rows: Sequence[Measurement]) -> Any:
    """A figure with one roofline chart (Williams et al. 2009) for each operation of a benchmark.

    x: FLOPs / bytes of the operation (``shapes.Work``). y: FLOPs / measured time. Each result file has a line, the
    roof: the smaller of the peak FLOP/s, and x times the bandwidth of a copy. Both peaks were measured in the same run.

    Args:
        rows: measurements of one of :data:`ROOFLINES` with both peaks.
    """
    operations: dict[str, list[Measurement]] = {}
    for row in rows:
        operations.setdefault(re.split("[ ,]", row.operation)[0], []).append(row)
    num_rows = -(-len(operations) // 2)
    figure, all_axes = _new_figure(3.9 * num_rows, num_rows, 2)
    for axes in all_axes[len(operations) :]:
        axes.remove()
    drawn: dict[str, Any] = {}
    for axes, (operation, points) in zip(all_axes, operations.items()):
        drawn |= _draw_roofline(axes, operation, points)
    figure.legend(drawn.values(), drawn, frameon=False, fontsize=8, loc="outside upper left", ncols=5)
    return figure


def _draw_roofline(axes: Any, operation: str, points: Sequence[Measurement]) -> dict[str, Any]:
    """Draw the roofs and the points of an operation, and return one point of each implementation."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(row.label for row in points), 1)}
    drawn: dict[str, Any] = {}
    offsets = ((4, 1), (-8, 1), (4, -6), (-8, -6))  # from a point to its number; several points may coincide
    xs, ys = [], []
    for row in points:
        work = shapes.work_of(row.program, row.operation, row.shape)
        assert work.flops is not None
        assert work.bytes is not None
        x, y = work.flops / work.bytes, work.flops / row.seconds / 1e9
        xs.append(x)
        ys.append(y)
        number, color = numbers[row.label], COLORS.get(row.implementation, "C9")
        (drawn[row.implementation],) = axes.plot(x, y, "o", markersize=4, color=color)
        offset = offsets[(number - 1) % 4]
        axes.annotate(str(number), (x, y), offset, textcoords="offset points", fontsize=7, color=color)
    runs: dict[str, list[dict[str, float]]] = {}
    for row in points:
        runs.setdefault(row.file, []).append(row.peaks)
    roofs = [[statistics.median(peaks[unit] for peaks in run) / 1e9 for unit in PEAKS] for run in runs.values()]
    low, high = _limits([*xs, *(flops / bandwidth for flops, bandwidth in roofs)])
    for flops, bandwidth in roofs:
        roof = [low * bandwidth, flops, flops]
        axes.plot([low, flops / bandwidth, high], roof, color="#888", linewidth=0.8, zorder=0)
    limits = {"xlim": (low, high), "ylim": _limits([*ys, *(flops for flops, _ in roofs)])}
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", **limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(subs=(1, 2, 5), numticks=99)
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    names = [f"{number}  {label.removeprefix(operation).lstrip(', ')}" for label, number in numbers.items()]
    axes.set_title("\n".join([operation, *names]), fontsize=7, loc="left")
    return drawn


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The limits of a logarithmic axis with space around the values."""
    return min(values) / 2, 2 * max(values)


def _new_figure(height: float, num_rows: int = 1, num_columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of this height in inches, and its axes. The same plot always gives the same SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    mpl.rcParams |= {"svg.hashsalt": "jaxlm", "svg.fonttype": "none"}
    # The SVG file contains texts, not glyphs. The padding leaves room for browsers with a wider font.
    figure = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


# ------------------------------------------------------------------------------------------------ command line


def split_page(page: Path) -> tuple[str, str]:
    """The parts of the page before and after its measured part.

    Raises:
        UserError: the page is not a file, or has no marks around its measured part.
    """
    if not page.is_file():
        raise UserError(f"--page {page} is not a file")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} has no lines {BEGIN!r} and {END!r}: add both")
    return before, after


def run(options: Report) -> None:
    """Read the results, write the charts and replace the measured part of the page.

    Raises:
        UserError: a file or directory is missing or has unexpected contents.
    """
    if not options.results.is_dir():
        raise UserError(f"--results {options.results} is not a directory")
    before, after = split_page(options.page)
    directories = sorted(path for path in options.results.iterdir() if path.is_dir())
    if not directories:
        raise UserError(f"{options.results} has no directories: write results to {options.results}/PROCESSOR/NAME.json")
    titles_file = options.results / TITLES_FILE
    titles = json.loads(titles_file.read_text(encoding="utf-8")) if titles_file.exists() else {}
    measured = {directory.name: read(directory) for directory in directories}
    newest_first = sorted(
        measured, key=lambda name: max(str(row.machine["time"]) for row in measured[name]), reverse=True
    )
    pictures = options.page.parent / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    training = {
        titles.get(name, name): [
            row for row in measured[name] if row.operation == "training step" and row.implementation != JAXLM
        ]
        for name in newest_first
    }
    if training := {title: rows for title, rows in training.items() if rows}:
        draw_processors(training).savefig(pictures / "training.svg", metadata={"Date": None})
    sections = [section(name, titles.get(name, name), measured[name], pictures) for name in newest_first]
    text = before + "\n\n".join([BEGIN, *sections, END]) + after
    start, begin, rest = text.partition(BEGIN_ESTIMATES)
    _, end, rest = rest.partition(END_ESTIMATES)
    if begin and end:
        estimated = [estimate_section(file, pictures) for file in sorted(options.estimates.glob("*.json"))]
        text = start + "\n\n".join([begin, *estimated, end]) + rest
    options.page.write_text(text, encoding="utf-8")
    print(f"wrote {options.page} and the charts in {pictures}")


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit status."""
    return harness.main(Report, run, arguments, name="report", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

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
limit". If a ratio is above 8, its chart has a logarithmic axis. The line charts show the time as a function of the
length.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, plans, shapes
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
    "plans": "Plans",
}
"""Headings of the page in their order, by the name of a benchmark. Results of other benchmarks are ignored."""

ROOFLINES = ("attention", "recurrence", "scans")
"""Benchmarks that have roofline charts: ``shapes.work_of`` knows the FLOPs and the bytes of their operations."""
PEAKS = {"FLOP": r"([\d,.]+) GFLOP/s float32 GEMM", "B": r"([\d,.]+) GB/s copy"}
"""By unit of work: a regular expression that finds the peak in the description of the machine. The peak was measured at
the start of the run, in billions of units per second."""
VERSION = r"jaxlm ([\d.]+)"
"""A regular expression that finds the version of jaxlm in the versions of a result file."""
FIRST_VERSION = "0.1.0"
"""The version of result files that name no version of jaxlm: the first benchmarks did not record it."""
GENERATE = "generate"
"""The baseline of speculative decoding: ``jaxlm.decoding.generate``. The summary of a section does not count it."""
TRAINING_STEP = "training step"
"""The operation of the optimizer steps of ``benchmarks.training``."""
JAX_BASELINES = ("flax", "jax.nn", "lax.scan", "lax.conv", "associative_scan", "jla")
"""The baselines that run on JAX. If jaxlm is slower than one of them, this is a defect."""
NOISE_RATIO = 0.97
"""A row counts as slower than a JAX baseline if its ratio is below this value."""


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
    plan_cells: Sequence[str] = ()
    """The columns ``plans.HEADER``; empty for other benchmarks than ``plans``."""

    @property
    def label(self) -> str:
        """Operation and shape."""
        return f"{self.operation}, {self.shape}" if self.shape else self.operation

    @property
    def version(self) -> str:
        """Version of jaxlm."""
        version = re.search(VERSION, str(self.machine.get("versions")))
        return version[1] if version else FIRST_VERSION


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
        rows = [row for row in rows if {"ratio", "ratios", "planned_bytes"} & row.keys()]
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
    if common["program"] == "plans":  # one row for each step, without baselines
        yield Measurement(
            operation="plan", shape=row["case"], implementation=JAXLM, seconds=row["seconds"], ratio=1.0,
            peak_percent=None, gigabytes=None, peaks={}, plan_cells=plans.cells(row), **common,
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
    parts = [f"### {title}", _summary(baselines, slower), *_jax_summary(baselines), _circumstances(measurements)]
    for program, heading in SECTIONS.items():
        rows = [row for row in measurements if row.program == program]
        if not rows:
            continue
        parts.append(f"#### {heading}: {title}")
        if any(row.implementation != JAXLM for row in rows):
            figure = draw(rows)
            figure.savefig(pictures / f"{name}_{program}.svg", metadata={"Date": None})
            content = "speed and share of the limit" if len(figure.axes) > 1 else "speed"
            parts.append(f"![{heading}: {content}]({PICTURES}/{name}_{program}.svg)")
            if memory := [row for row in rows if row.operation == TRAINING_STEP and row.gigabytes is not None]:
                draw_memory(memory).savefig(pictures / f"{name}_memory.svg", metadata={"Date": None})
                parts.append(f"![{heading}: peak memory]({PICTURES}/{name}_memory.svg)")
        if program in ROOFLINES and (points := [row for row in rows if PEAKS.keys() <= row.peaks.keys()]):
            draw_rooflines(points).savefig(pictures / f"{name}_{program}_roofline.svg", metadata={"Date": None})
            parts.append(f"![{heading}: roofline]({PICTURES}/{name}_{program}_roofline.svg)")
        parts.append(_plan_table(rows) if program == "plans" else _details("All numbers", _table(rows)))
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
    return f"{text}\n\n" + _details("Comparisons in which jaxlm is slower", _list(slower))


def slower_than_jax(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows of JAX baselines with a ratio below :data:`NOISE_RATIO`, the lowest ratio first."""
    slower = [row for row in rows if row.implementation in JAX_BASELINES and row.ratio < NOISE_RATIO]
    return sorted(slower, key=lambda row: row.ratio)


def _jax_summary(baselines: Sequence[Measurement]) -> list[str]:
    """The paragraphs about :func:`slower_than_jax`; none if no JAX baseline was measured."""
    total = sum(row.implementation in JAX_BASELINES for row in baselines)
    if not total:
        return []
    slower = slower_than_jax(baselines)
    text = f"Slower than a JAX baseline: {len(slower)} of {total} rows (a row counts as slower if its ratio is below "
    return [f"{text}{NOISE_RATIO}; a smaller difference is noise).", *([_list(slower)] if slower else [])]


def _list(rows: Sequence[Measurement]) -> str:
    return "\n".join(f"- {row.label}: {row.ratio:.2f} times as fast as {row.implementation}" for row in rows)


def _plan_table(rows: Sequence[Measurement]) -> str:
    text = "Steps that `jaxlm plan` planned for this processor (see [tpu.md](tpu.md#how-exact-plans-are))."
    lines = [plans.HEADER, *(row.plan_cells for row in rows)]
    return f'{text} "bound" is a lower bound of the time.\n\n{_markdown_table(lines, num_text_columns=1)}'


def _circumstances(measurements: Sequence[Measurement]) -> str:
    """Sentences about the versions of jaxlm and the speed of matmuls. The text after the tables has all conditions."""
    counts = collections.Counter(row.version for row in measurements)
    text = f"Rows of the tables: {', '.join(f'{n} from jaxlm {v}' for v, n in sorted(counts.items()))}."
    peaks = [row.peaks["FLOP"] / 1e9 for row in measurements if "FLOP" in row.peaks]
    if peaks:
        text += f" XLA's float32 matmuls ran at {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s during these measurements"
        text += f" (median {statistics.median(peaks):.0f})."
    return text


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
    from jaxlm.plan.planning import ACCURACY  # imported here, because jaxlm imports jax

    header = ["model", "devices", "mesh", "rows x tokens", "memory of a device, GiB", "step, ms", "MFU, %"]
    lines = [[*header, "MFU, communication does not overlap, %"]]
    conditions = [["models", "command", "time", "versions", "commit"]]
    bars: Bars = {"MFU": {}, "MFU, communication does not overlap": {}}
    notes: dict[str, str] = {}
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
                label = f"{plan['model']}, {plan['topology']}"
                for values, share in zip(bars.values(), shares, strict=True):
                    values[label] = share
                if not plan["fits"]:
                    notes[label] = "does not fit into memory"
            models = ", ".join(plan["model"] for plan in run["plans"])
            conditions.append([models, f"`{run['command']}`", run["time"], run["versions"], run["commit"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a file of estimates: {error!r}") from error
    groups = list(bars["MFU"])
    figure, (axes,) = _new_figure(0.68 * len(groups) + 1.3)
    _draw_bars(axes, groups, bars, "{:.1f}", notes=dict.fromkeys(bars, notes))
    xlabel = f"% of the peak of a {title}, estimated by the compiler, not measured"
    axes.set(xlim=(0, 100), xlabel=xlabel)
    picture = f"{file.stem}_estimates.svg"
    figure.savefig(pictures / picture, metadata={"Date": None})
    return "\n\n".join(
        [
            f"### {title}: estimated by the compiler, not measured",
            f"![{title}: MFU of training steps, estimated by the compiler, not measured]({PICTURES}/{picture})",
            f"Accuracy: {ACCURACY['tpu']}.",
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
    "pipeline": "C8",
    GENERATE: "C9",
    "fla": "#aec7e8",
    "jla": "#ffbb78",
}
MARKERS = "osD^v<>PX*"
"""Markers of the shapes in a roofline chart."""


Bars = dict[str, dict[str, float]]
"""The values of a grouped bar chart: ``bars[name][group label]``. Bars of the same name have the same color."""
Notes = dict[str, dict[str, str]]
"""Texts about bars of a grouped bar chart: ``notes[name][group label]``."""


def draw(rows: Sequence[Measurement]) -> Any:
    """A figure with bar charts: the speed of jaxlm relative to each baseline, and in percent of the peak.

    Without measured peaks, the figure has only the first chart. Operations and shapes without a baseline are left out.

    Args:
        rows: measurements of one benchmark, with a baseline among them.
    """
    compared = {row.label for row in rows if row.implementation != JAXLM}
    rows = [row for row in rows if row.label in compared]
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
    num_bars = sum(map(len, ratios.values()))
    figure, (left, *rest) = _new_figure(0.26 * num_bars + 0.16 * len(groups) + 1.3, 1, 2 if shares else 1)
    left.get_gridspec().set_width_ratios([3, 2] if shares else [1])
    positions = _draw_ratios(left, groups, ratios)
    for right in rest:
        right.barh([positions[label] for label in shares], list(shares.values()), 0.9, color=COLORS[JAXLM])
        for label, share in shares.items():
            at = max(share, 100.0) if share > 85 else share  # the line at 100 must not cross the number
            right.text(at + 2.0, positions[label], f"{share:.0f}", va="center", fontsize=8)
        limit = 1.15 * max([100.0, *shares.values()])
        right.set(ylim=left.get_ylim(), xlim=(0, limit), yticks=[], xlabel="% of the limit")
        right.axvline(100.0, color="#444", linewidth=0.8)
        right.tick_params(axis="x", labelsize=8)
    return figure


def draw_memory(rows: Sequence[Measurement]) -> Any:
    """A figure with the peak memory of the process of each implementation: one group of bars for each shape.

    Args:
        rows: measurements of one operation, all with ``gigabytes``.
    """
    names = dict.fromkeys(row.implementation for row in rows)
    bars = {name: {row.shape: row.gigabytes or 0.0 for row in rows if row.implementation == name} for name in names}
    groups = list(dict.fromkeys(row.shape for row in rows))
    figure, (axes,) = _new_figure(0.26 * len(rows) + 0.16 * len(groups) + 1.3)
    _draw_bars(axes, groups, bars, "{:.1f}", notes={})
    axes.set_xlabel("peak memory of the process, GB (with loading and compilation)")
    return figure


def draw_processors(rows: dict[str, list[Measurement]]) -> Any:
    """A figure with the speed of jaxlm relative to baselines: one group of bars for each shape and baseline.

    A group has one bar for each processor. A bar that an earlier version measured is labelled with this version.

    Args:
        rows: by title of the processor, the measurements of baselines.
    """
    ratios = {
        processor: {f"{row.shape}, {row.implementation}": row.ratio for row in measured}
        for processor, measured in rows.items()
    }
    groups = sorted({label for bars in ratios.values() for label in bars}, key=lambda label: label.split(", ")[::-1])
    newest = max(
        (row for measured in rows.values() for row in measured), key=lambda row: str(row.machine["time"])
    ).version
    notes = {
        processor: {
            f"{row.shape}, {row.implementation}": f"jaxlm {row.version}" for row in measured if row.version != newest
        }
        for processor, measured in rows.items()
    }
    figure, (axes,) = _new_figure(0.26 * sum(map(len, ratios.values())) + 0.16 * len(groups) + 1.3)
    _draw_ratios(axes, groups, ratios, notes)
    return figure


def _draw_ratios(axes: Any, groups: Sequence[str], ratios: Bars, notes: Notes | None = None) -> dict[str, float]:
    """Draw grouped bars of ratios with a line at 1, and return the y coordinate of the center of each group.

    If a ratio is above 8, the axis is logarithmic and the bars start at 1.
    """
    logarithmic = max(value for values in ratios.values() for value in values.values()) > 8
    centers = _draw_bars(axes, groups, ratios, "{:.2f}", notes or {}, base=float(logarithmic), line=1.0)
    axes.set_xlabel("times as fast as the baseline")
    if logarithmic:
        axes.set(xscale="log", xlabel="times as fast as the baseline (logarithmic)")
        axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    return centers


def _draw_bars(
    axes: Any, groups: Sequence[str], bars: Bars, number_format: str, notes: Notes, base: float = 0.0, line: float = 0.0
) -> dict[str, float]:
    """Draw grouped bars, the first group at the top, and return the y coordinate of the center of each group.

    Args:
        notes: text after the number of a bar.
        base: where the bars start.
        line: where a vertical line is. No number is to the left of it.
    """
    start, positions, centers = 0.0, {}, {}
    for label in groups:
        names = [name for name, values in bars.items() if label in values]
        for number, name in enumerate(names):
            positions[name, label] = start + number
        size = len(names)
        centers[label] = start + (size - 1) / 2
        start += size + 0.6
    for number, (name, values) in enumerate(bars.items()):
        axes.barh(
            [positions[name, label] for label in values], [value - base for value in values.values()], 0.9, left=base,
            label=name, color=COLORS.get(name, f"C{number}"),
        )  # fmt: skip
        for label, value in values.items():
            note = f" ({notes[name][label]})" if label in notes.get(name, {}) else ""
            axes.annotate(
                number_format.format(value) + note, (max(value, line), positions[name, label]), (3, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
    axes.axvline(line, color="#444", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(list(centers.values()), list(centers), fontsize=8)
    axes.set_ylim(start - 0.6, -0.9)
    axes.margins(x=0.12)
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
    figure, all_axes = _new_figure(5.0 * num_rows, num_rows, 2)
    for axes in all_axes[len(operations) :]:
        axes.remove()
    drawn: dict[str, Any] = {}
    for axes, (operation, points) in zip(all_axes, operations.items()):
        drawn |= _draw_roofline(axes, operation, points)
    figure.legend(drawn.values(), drawn, frameon=False, fontsize=8, loc="outside upper left", ncols=5)
    return figure


def _draw_roofline(axes: Any, operation: str, points: Sequence[Measurement]) -> dict[str, Any]:
    """Draw the roofs and the points of an operation, and return one line of each implementation for the legend.

    Colors are implementations, and markers are shapes. The markers are hollow because several points may coincide.
    """
    from matplotlib.lines import Line2D

    markers = dict(zip(dict.fromkeys(row.label for row in points), itertools.cycle(MARKERS)))
    drawn: dict[str, Any] = {}
    xs, ys = [], []
    for row in points:
        work = shapes.work_of(row.program, row.operation, row.shape)
        assert work.flops is not None
        assert work.bytes is not None
        x, y = work.flops / work.bytes, work.flops / row.seconds / 1e9
        xs.append(x)
        ys.append(y)
        color = COLORS.get(row.implementation, "black")
        axes.plot(x, y, markers[row.label], markersize=7, markerfacecolor="none", color=color)
        drawn[row.implementation] = Line2D([], [], color=color, linewidth=3)
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
    names = [label.removeprefix(operation).lstrip(", ") for label in markers]
    shown = [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", color="#444") for marker in markers.values()
    ]
    axes.legend(
        shown, names, title=operation, alignment="left", frameon=False, fontsize=8, loc="lower left",
        bbox_to_anchor=(0, 1),
    )  # fmt: skip
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
            row for row in measured[name] if row.operation == TRAINING_STEP and row.implementation != JAXLM
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
    for name in newest_first:
        if slower := slower_than_jax(measured[name]):
            print(f"{titles.get(name, name)}: slower than a JAX baseline:\n{_list(slower)}")


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit status."""
    return harness.main(Report, run, arguments, name="report", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Compare runs in a table and a plot (``jaxlm compare RUN RUN ...``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.training import plots, report

NO_VALUE = "-"


def compare_runs(runs: Sequence[str | Path]) -> str:
    """A Markdown table with one row per run. Spaces align the columns, so that the table is readable in a terminal.

    The first columns are run, family, parameters, steps and minutes. Then follow one column per validation metric (the
    last value, and the best value in parentheses) and one column per score (the value and its 95 % interval). A dash
    marks a missing value.

    Raises:
        FileNotFoundError: a directory does not exist.
        ValueError: ``runs`` is empty, a directory is not a run directory, or a file of a run is damaged.
    """
    paths = _check_runs(runs)
    records = [_read_records(path) for path in paths]
    results = [report.read_if_exists(report.read_results, path, {}) for path in paths]
    metrics = report.validation_metrics(*records)
    scores = list(dict.fromkeys(score.name for result in results for score in result.get("scores", [])))
    header = ["run", "family", "parameters", "steps", "minutes"]
    header += [f"{plots.readable_name(metric)} (best)" for metric in metrics] + scores
    cells = [header]
    for name, run_records, result in zip(_run_names(paths), records, results, strict=True):
        texts = {score.name: f"{score.value_text} {score.interval_text}".strip() for score in result.get("scores", [])}
        score_cells = [texts.get(key, NO_VALUE) for key in scores]
        cells.append([*_run_cells(name, run_records, result), *_metric_cells(run_records, metrics), *score_cells])
    return aligned_table(cells)


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the header. Spaces align the columns, for a reader at a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def draw_comparison(runs: Sequence[str | Path], path: str | Path) -> None:
    """Plot the validation metrics of runs over steps to a PNG file, with one panel per metric and one line per run.

    Raises:
        FileNotFoundError: a directory does not exist.
        ValueError: ``runs`` is empty, a directory is not a run directory, ``metrics.jsonl`` of a run is damaged, or no
            run has a validation metric.
    """
    paths = _check_runs(runs)
    records = {name: _read_records(run) for name, run in zip(_run_names(paths), paths, strict=True)}
    panels = []
    for metric in report.validation_metrics(*records.values()):
        series = []
        for index, (name, run_records) in enumerate(records.items()):
            steps, values = report.metric_curve(run_records, metric)
            if steps:
                series.append(plots.Series(name, steps, values, color=index, markers=True))
        panels.append(plots.Panel(plots.readable_name(metric), tuple(series)))
    plots.save_png(panels, path)


def _check_runs(runs: Sequence[str | Path]) -> list[Path]:
    if not runs:
        raise ValueError("there are no runs to compare: give at least one run directory")
    paths = [report.check_run(run) for run in runs]
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise ValueError(f"the run {path} is given more than once: give each run once")
    return paths


def _run_names(paths: Sequence[Path]) -> list[str]:
    """The names of the directories, or the paths as given if two directories have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _read_records(path: Path) -> list[dict[str, Any]]:
    return report.read_if_exists(report.read_metrics, path / report.METRICS, [])


def _run_cells(name: str, records: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    """The cells of the columns run, family, parameters, steps and minutes."""
    steps = [record["step"] for record in report.valid_records(records) if "step" in record]
    family, parameters, minutes = (results.get(key) for key in ("family", "parameters", "minutes"))
    return [
        name.replace("|", r"\|"),
        NO_VALUE if family is None else family,
        NO_VALUE if parameters is None else f"{parameters:,}",
        f"{max(steps):,}" if steps else NO_VALUE,
        NO_VALUE if minutes is None else f"{minutes:,.1f}",
    ]


def _metric_cells(records: list[dict[str, Any]], metrics: Sequence[str]) -> list[str]:
    """One cell per metric: the last value, with the best value in parentheses."""
    cells = []
    for metric in metrics:
        values = report.metric_curve(records, metric)[1]
        cells.append(f"{values[-1]:.4g} ({report.best_value(records, metric):.4g})" if values else NO_VALUE)
    return cells

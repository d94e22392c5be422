"""Writers and readers for the result files of a run directory, and a plot of the losses.

    metrics.jsonl    one record per line: metrics of a step, or an event          MetricsFile, read_metrics
    results.json     task, family, size, time and scores of a finished run        write_results, read_results
    samples.jsonl    outputs of the model with sources and references             write_samples, read_samples
    confusion.json   counts of labels and predictions                             write_confusion, read_confusion
    attention.json   attention weights with the tokens of both axes               write_attention, read_attention
    boards.json      chess positions                                              write_boards, read_boards

``jaxlm.training.html_report.write_report`` makes an HTML page from these files, and ``jaxlm.training.compare`` makes a
table of several runs. With several processes, only the first process writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import numpy.typing as npt

from jaxlm import config, host, integrity, json_files, processes
from jaxlm.metrics import Score
from jaxlm.nn.cpu_choices import CpuChoices, cpu_choices

T = TypeVar("T")

METRICS = "metrics.jsonl"
RESULTS = "results.json"
SAMPLES = "samples.jsonl"
CONFUSION = "confusion.json"
ATTENTION = "attention.json"
BOARDS = "boards.json"

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "nats", "error")
"""Lower values are better for metrics whose name contains one of these words. For all others, higher is better.

For ``TrainingConfig.best_metric``, :func:`best_value` uses ``TrainingConfig.best_mode`` instead."""

# --------------------------------------------------------------------------------------------- metrics.jsonl


class MetricsFile:
    """Appends records to a JSONL file. When :meth:`write` returns, the line is completely written.

    With several processes, only the first process writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._checked_last_line = False

    def write(self, **record: Any) -> None:
        """Append one record."""
        if not processes.is_first():
            return
        if not self._checked_last_line:
            _remove_incomplete_line(self.path)
            self._checked_last_line = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def is_empty(self) -> bool:
        """Whether the file does not exist or has no content."""
        return not self.path.exists() or self.path.stat().st_size == 0

    def sync(self) -> None:
        """Flush the records to the disk (fsync). With several processes, only the first process does this."""
        if processes.is_first() and self.path.exists():
            integrity.sync(self.path)


def _remove_incomplete_line(path: Path) -> None:
    """Remove a last line without a line break, which a killed run may leave.

    A record that is appended to such a line would give invalid JSON.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)


NON_METRIC_FIELDS: dict[str, Any] = {
    "step": int, "to_step": int, "event": str, "rollbacks": int, "batches_left_out": int, "best_metric": str,
    "best_mode": Literal["min", "max"],
}  # fmt: skip
"""Types of the fields of ``metrics.jsonl`` that are not metrics."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file. An incomplete last line, which a killed run may leave, is ignored.

    After a resume or a rollback, some steps are run again. The file then has their old and their new records.
    :func:`valid_records` selects the new records.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a complete line is not a JSON object; a loss, a validation metric or one of
            :data:`NON_METRIC_FIELDS` has the wrong type; or a rollback has no ``to_step``. The message names the line.
    """

    def type_of(name: str) -> Any:
        is_metric = name == "loss" or name.startswith("validation_")
        return float | None if is_metric else NON_METRIC_FIELDS.get(name, Any)

    rows = _read_lines(Path(path), type_of)
    for number, row in rows.items():
        if row.get("event") == "rollback" and "to_step" not in row:
            raise ValueError(f"{path}, line {number}: a rollback needs the value to_step")
    return list(rows.values())


def valid_records(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records that are still valid at the end of a file.

    - A rollback discards all earlier records of steps after its ``to_step``. Its own record is left out, too.
    - A resume discards all earlier records of steps after its ``step``.
    - The event ``started`` discards all earlier records. It marks a new run in the directory of an earlier run.
    """
    valid: list[Mapping[str, Any]] = []
    for record in records:
        event = record.get("event")
        last = record.get("to_step" if event == "rollback" else "step")
        if event == "started":
            valid = []
        if event in ("rollback", "resumed") and last is not None:
            valid = [earlier for earlier in valid if earlier.get("step", 0) <= last]
        if event != "rollback":
            valid.append(record)
    return valid


def metric_curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps, in ascending order, and the values of one metric in the :func:`valid_records`.

    If a step has several values, the last value is used. A value that was not finite is NaN.
    """
    points = {record["step"]: record[name] for record in valid_records(records) if name in record and "step" in record}
    return sorted(points), [math.nan if points[step] is None else points[step] for step in sorted(points)]


def validation_metrics(*runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the validation metrics in the :func:`valid_records` of all runs, with ``validation_loss`` first.

    Args:
        runs: for each run, its records (:func:`read_metrics`).
    """
    valid = [record for records in runs for record in valid_records(records)]
    names = dict.fromkeys(name for record in valid for name in record if name.startswith("validation_"))
    return sorted(names, key=lambda name: name != "validation_loss")


def best_value(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The best finite value of a metric in the :func:`valid_records`; NaN if no value is finite.

    The record of an evaluation has the fields ``best_metric`` and ``best_mode``. For this metric, ``best_mode`` decides
    whether the lowest or the highest value is the best. For other metrics, and in files of early versions of jaxlm,
    :data:`LOWER_IS_BETTER` decides.
    """
    finite = [value for value in metric_curve(records, name)[1] if math.isfinite(value)]
    evaluations = [record for record in valid_records(records) if "best_mode" in record]
    modes = {f"validation_{record.get('best_metric')}": record["best_mode"] for record in evaluations}
    default = "min" if any(part in name for part in LOWER_IS_BETTER) else "max"
    best = min if modes.get(name, default) == "min" else max
    return best(finite, default=math.nan)


def draw_losses(metrics: str | Path, path: str | Path) -> None:
    """Plot the training loss and all validation metrics over steps to a PNG file.

    The training loss and the validation loss are in one panel. Each other validation metric has its own panel.

    Args:
        metrics: path of ``metrics.jsonl``.
        path: path of the PNG file.

    Raises:
        FileNotFoundError: the file ``metrics`` does not exist.
        ValueError: the file is damaged, or has neither a loss nor a validation metric.
    """
    from jaxlm.training import plots

    plots.save_png(plots.training_panels(read_metrics(metrics)), path)


# --------------------------------------------------------------------------------------------- results.json


def write_results(
    run: str | Path,
    *,
    task: str,
    family: str,
    parameters: int,
    minutes: float,
    scores: Sequence[Score],
    **details: Any,
) -> None:
    """Write ``results.json`` of a finished run.

    The file also has the values of :func:`machine_info`.

    Args:
        task: name of the task, for example ``translation``.
        family: name of the family, for example ``t5``.
        parameters: number of trained and frozen parameters.
        minutes: duration of the run in minutes.
        scores: metrics of the final model.
        details: additional JSON values, such as ``data`` (a description of the data). If ``processor`` or ``versions``
            is given, it replaces the value of :func:`machine_info`.

    Raises:
        TypeError: a value or a key has a type that JSON does not have.
        ValueError: a number is not finite.
    """
    content = {
        "task": task,
        "family": family,
        "parameters": parameters,
        "minutes": round(minutes, 2),
        "scores": [dataclasses.asdict(score) for score in scores],
    }
    _write_json(Path(run) / RESULTS, {**content, **machine_info(), **details})


def read_results(run: str | Path) -> dict[str, Any]:
    """The content of ``results.json``, with ``scores`` as a list of :class:`Score`.

    The content has the values that were passed to :func:`write_results` and the values of :func:`machine_info`.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: the file is not a JSON object, or a value has the wrong type.
    """
    path = Path(run) / RESULTS
    content = json_files.read_object(path)
    hints = {"task": str, "family": str, "parameters": int, "minutes": float, "versions": dict, "processor": str}
    for name, hint in hints.items():
        if name in content:
            config.check_value(hint, content[name], f"{path}: {name}")
    return {**content, "scores": _make_entries(Score, content.get("scores", []), f"{path}: scores")}


def machine_info() -> dict[str, Any]:
    """``{"processor": description, "versions": {...}}``, with the versions of jaxlm, JAX and Python on this machine."""
    import jaxlm

    versions = {"jaxlm": jaxlm.__version__, "jax": jax.__version__, "python": platform.python_version()}
    return {"processor": _describe_processor(), "versions": versions}


def _describe_processor() -> str:
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    cores, values = host.num_cores(), cpu_choices()
    calibrated = "" if values == CpuChoices() else f", calibrated: {values.changes()}"
    return f"{host.processor_name()}, {cores} {'core' if cores == 1 else 'cores'}{calibrated}"


# --------------------------------------------------------------------------------------------- samples.jsonl


def write_samples(run: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write ``samples.jsonl``, with one JSON object per line.

    Args:
        rows: one dict of strings per sample. The report has one column per key: ``source``, ``reference``, ``output``,
            ``label`` and ``score`` in this order, and then all other keys. If a row has a ``label`` and its ``output``
            differs from the label, the output is marked as wrong.

    Raises:
        TypeError: a value is not a string.
    """
    lines = []
    for index, row in enumerate(rows):
        for name, value in row.items():
            if not isinstance(value, str):
                raise TypeError(f"sample {index}: {name} is {type(value).__name__}: it must be a string")
        lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
    _write_text(Path(run) / SAMPLES, "".join(lines))


def read_samples(run: str | Path) -> list[dict[str, str]]:
    """The rows of ``samples.jsonl``.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: a line is not a JSON object, or a value is not a string.
    """
    return list(_read_lines(Path(run) / SAMPLES, lambda name: str).values())


# --------------------------------------------------------------------------------------------- confusion.json


def write_confusion(run: str | Path, labels: Sequence[str], counts: npt.ArrayLike) -> None:
    """Write ``confusion.json``: names of the labels [L] and counts [L, L] (rows: labels, columns: predictions).

    Raises:
        ValueError: a label is not a string, or ``counts`` is not an array [L, L] of integers >= 0.
    """
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels={list(labels)} must be strings: convert each label with str")
    _write_json(Path(run) / CONFUSION, {"labels": list(labels), "counts": _check_counts(labels, counts).tolist()})


def read_confusion(run: str | Path) -> tuple[list[str], np.ndarray]:
    """Labels [L] and counts [L, L] of ``confusion.json``.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: the file is not a JSON object with exactly the keys ``labels`` and ``counts``, a label is not a
            string, or the counts are not integers >= 0 of shape [L, L].
    """
    path = Path(run) / CONFUSION
    content = json_files.read_object(path)
    if set(content) != {"labels", "counts"}:
        raise ValueError(f"{path}: its keys must be labels and counts, got {', '.join(content)}")
    labels = tuple(content["labels"]) if isinstance(content["labels"], list) else content["labels"]
    config.check_value(tuple[str, ...], labels, f"{path}: labels")
    try:
        return list(labels), _check_counts(labels, content["counts"])
    except (TypeError, ValueError) as error:  # NumPy rejects, for example, rows of different lengths
        raise ValueError(f"{path}: {error}") from error


def _check_counts(labels: Sequence[str], counts: npt.ArrayLike) -> np.ndarray:
    array = np.asarray(counts)
    if array.shape != (len(labels), len(labels)) or array.dtype.kind not in "iu" or np.any(array < 0):
        raise ValueError(
            f"counts {list(array.shape)} of {array.dtype} must be integers >= 0 of shape [{len(labels)}, {len(labels)}]"
            f", one row and one column for each label"
        )
    return array


# --------------------------------------------------------------------------------------------- attention.json


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Attention weights of one example.

    Attributes:
        title: heading in the report.
        rows: [R] query tokens, for example the output of a translation.
        columns: [C] key tokens.
        weights: [R, C] numbers from 0 to 1.001, which allows rounding errors above 1.

    Raises:
        ValueError: ``rows`` or ``columns`` is empty or not a list or tuple of strings, or the weights have another
            shape or are out of range.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    weights: npt.ArrayLike

    def __post_init__(self) -> None:
        for name, tokens in (("rows", self.rows), ("columns", self.columns)):
            config.check_value(tuple[str, ...] | list[str], tokens, f"attention map {self.title!r}: {name}")
            if not tokens:
                raise ValueError(f"attention map {self.title!r}: {name} is empty: leave out maps without tokens")
        weights = np.asarray(self.weights, np.float64)
        if weights.shape != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"attention map {self.title!r}: weights {list(weights.shape)} must be [{len(self.rows)} rows, "
                f"{len(self.columns)} columns]"
            )
        if not np.all((weights >= 0) & (weights <= 1.001)):
            raise ValueError(f"attention map {self.title!r}: weights must be in [0, 1]")


def write_attention(run: str | Path, maps: Iterable[AttentionMap]) -> None:
    """Write ``attention.json``; weights are rounded to 4 decimals."""
    rounded = [np.round(np.asarray(item.weights, np.float64), 4).tolist() for item in maps]
    content = [{**vars(item), "weights": weights} for item, weights in zip(maps, rounded, strict=True)]
    _write_json(Path(run) / ATTENTION, content)


def read_attention(run: str | Path) -> list[AttentionMap]:
    """The maps of ``attention.json``.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: the file is not JSON; a field of a map is missing, unknown or of the wrong type; or
            :class:`AttentionMap` rejects the tokens or weights of a map.
    """
    path = Path(run) / ATTENTION
    return _make_entries(AttentionMap, json_files.read_value(path), str(path))


# --------------------------------------------------------------------------------------------- boards.json


@dataclasses.dataclass(frozen=True)
class Board:
    """A chess position.

    Attributes:
        title: heading in the report.
        fen: the position in Forsyth-Edwards notation.
        last_move: the move that led to this position, in UCI notation such as ``e2e4``. The report highlights it.
        text: a line of text that the report shows below the board.
    """

    title: str
    fen: str
    last_move: str | None = None
    text: str = ""


def write_boards(run: str | Path, boards: Iterable[Board]) -> None:
    """Write ``boards.json``."""
    _write_json(Path(run) / BOARDS, [dataclasses.asdict(board) for board in boards])


def read_boards(run: str | Path) -> list[Board]:
    """The positions of ``boards.json``.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: the file is not JSON, or a field of a board is missing, unknown or of the wrong type.
    """
    path = Path(run) / BOARDS
    return _make_entries(Board, json_files.read_value(path), str(path))


# --------------------------------------------------------------------------------------------- common functions


def check_run(run: str | Path) -> Path:
    """Check that ``run`` is a run directory, and return it as a path.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory is not a run directory (:func:`is_run`), or its ``results.json`` is damaged.
    """
    path = Path(run)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory: give the directory of a run")
    if not is_run(path):
        raise ValueError(f"{path} is not a run directory: it has neither {METRICS} nor {RESULTS} of one run")
    return path


def is_run(path: Path) -> bool:
    """Whether a directory has ``metrics.jsonl``, or a ``results.json`` of one run.

    ``experiments.families`` writes a ``results.json`` of several runs. Its content is a list instead of an object.

    Raises:
        ValueError: there is no ``metrics.jsonl``, and ``results.json`` is damaged.
    """
    if (path / METRICS).exists():
        return True
    return (path / RESULTS).exists() and not isinstance(json_files.read_value(path / RESULTS), list)


def read_if_exists(read: Callable[[Path], Any], path: Path, default: Any) -> Any:
    """``read(path)``, or ``default`` if this raises ``FileNotFoundError``."""
    try:
        return read(path)
    except FileNotFoundError:
        return default


def _read_lines(path: Path, type_of: Callable[[str], Any]) -> dict[int, dict[str, Any]]:
    """``{line number: JSON object}`` of a file with one JSON object per line. An incomplete last line is ignored.

    Args:
        type_of: a function from the name of a value to its type (``config.check_value``).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], start=1):  # text after the last line break is incomplete, or empty
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__} instead of a JSON object")
        for name, value in row.items():
            config.check_value(type_of(name), value, f"{path}, line {number}: {name}")
        rows[number] = row
    return rows


def _make_entries(entry_class: type[T], items: Any, where: str) -> list[T]:
    """Objects of the dataclass ``entry_class``, made from a list of JSON objects."""
    if not isinstance(items, list):
        raise ValueError(f"{where} must be a list, got {type(items).__name__}")
    entries = []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{where}, entry {index}: {type(item).__name__} instead of a JSON object")
        try:
            entries.append(config.from_json(entry_class, item, f"{where}, entry {index}"))
        except (TypeError, ValueError, OverflowError) as error:  # errors of the class do not name the file
            text = str(error)
            raise ValueError(text if text.startswith(where) else f"{where}, entry {index}: {text}") from error
    return entries


def _write_json(path: Path, content: Any) -> None:
    json_files.require_json(content, path.name, allow_nan=False)
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a file, from the first process only. A killed process leaves either the old file or the new file."""
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    integrity.replace_text(path, text)

"""What a run leaves to read: ``metrics.jsonl`` (append-only, one JSON object a line) and a picture of its losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxlm import processes


class MetricsFile:
    """Appends records to a JSONL file, each line whole on disk before the call returns. Of several processes, the first
    writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, **record: Any) -> None:
        """Append one record."""
        if not processes.is_first():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file. A last line cut short by a killed run is left out.

    After a resume, steps that were run again appear twice: the later record counts.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, the last record of a step counting."""
    points = {record["step"]: record[name] for record in records if name in record and "step" in record}
    return sorted(points), [points[step] for step in sorted(points)]


def draw_losses(metrics: str | Path, picture: str | Path) -> None:
    """Draw training and validation loss over steps into a PNG (needs matplotlib, which is imported here)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, colour, marker in (
        ("loss", "training", "#9db8d2", ""),
        ("validation_loss", "validation", "#b03a2e", "o"),
    ):
        steps, values = curve(records, name)
        if steps:
            axes.plot(steps, values, color=colour, marker=marker, label=f"{label} (last {values[-1]:.3f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=130)

"""Plots of metrics over steps, as PNG files and as inline SVG, and of attention maps, as PNG files.

matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.training import report

MIN_SMOOTHED_LOSSES = 60
"""If there are at least this many training losses, their running mean is plotted too."""

UNPLOTTED_METRICS = ("step", "time", "weight", "skipped", "skipped_in_a_row")
"""Entries of the records in ``metrics.jsonl`` that are not plotted."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        label: name in the legend. If it is empty, the legend has no entry for the line.
        steps: [N] x values.
        values: [N] y values; NaN leaves a gap.
        color: index into ``Theme.palette``.
        markers: whether each point has a marker.
        faint: whether the line is thin and transparent.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int = 0
    markers: bool = False
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot, with the label of its y axis and its lines."""

    ylabel: str
    series: tuple[Series, ...]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colors of a figure: text, grid lines, and a palette for the lines."""

    text: str
    grid: str
    palette: tuple[str, ...]


# The palette of Okabe and Ito for color-blind readers, without yellow, and with dark gray instead of black.
PNG_THEME = Theme("#222222", "#dddddd", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555"))

# `svg` replaces these colors with CSS variables, so that one figure works in the light and the dark theme of a page.
_CSS_VARIABLES = {
    "#010101": "var(--text)",
    "#020202": "var(--line)",
    **{f"#0303{index:02x}": f"var(--series-{index})" for index in range(len(PNG_THEME.palette))},
}
SVG_THEME = Theme("#010101", "#020202", tuple(color for color in _CSS_VARIABLES if color.startswith("#0303")))


def training_panels(records: list[dict[str, Any]]) -> list[Panel]:
    """One panel for training and validation loss, and one panel for each other validation metric.

    Args:
        records: the records of ``metrics.jsonl``. The list of panels is empty if no record has such a metric.
    """
    steps, losses = report.metric_curve(records, "loss")
    lines, panels = _training_loss(steps, losses) if steps else [], []
    for name in report.validation_metrics(records):
        steps, values = report.metric_curve(records, name)
        if not steps:
            continue
        last, best = values[-1], report.best_value(records, name)
        if name == "validation_loss":
            label = f"validation (last {last:.3f}, best {best:.3f})"
            lines.append(Series(label, steps, values, color=1, markers=True))
        else:
            series = Series(f"last {last:.4g}, best {best:.4g}", steps, values, color=1, markers=True)
            panels.append(Panel(readable_name(name), (series,)))
    return [Panel("loss (nats)", tuple(lines)), *panels] if lines else panels


def optimization_panels(records: list[dict[str, Any]]) -> list[Panel]:
    """One panel for each metric of the training steps: learning rate, gradient norm, ...

    The loss, the entries of :data:`UNPLOTTED_METRICS`, and metrics without a finite number are left out.

    Args:
        records: the records of ``metrics.jsonl``.
    """
    names = dict.fromkeys(name for record in records if "step" in record for name in record)
    panels = []
    for name in names:
        if name == "loss" or name in UNPLOTTED_METRICS or name.startswith("validation_"):
            continue
        steps, values = report.metric_curve(records, name)
        is_numeric = all(isinstance(value, int | float) for value in values)
        if is_numeric and np.any(np.isfinite(np.asarray(values, np.float64))):
            panels.append(Panel(readable_name(name), (Series("", steps, values),)))
    return panels


def readable_name(name: str) -> str:
    """The name of a metric with spaces: ``validation_accuracy`` becomes ``validation accuracy``."""
    return name.replace("_", " ")


def _training_loss(steps: list[int], values: list[float]) -> list[Series]:
    """The line of the training losses.

    With at least :data:`MIN_SMOOTHED_LOSSES` losses, also the line of their running mean.
    """
    label = f"training (last {values[-1]:.3f})"
    if len(values) < MIN_SMOOTHED_LOSSES:
        return [Series(label, steps, values)]
    width = max(5, len(values) // 40 | 1)  # odd, so that the window has a center
    array = np.asarray(values, np.float64)
    means = []
    for index, value in enumerate(array):
        window = array[max(0, index - width // 2) : index + width // 2 + 1]  # centered, because a trailing mean lags
        means.append(float(np.nanmean(window)) if np.isfinite(value) else np.nan)
    return [Series("", steps, values, faint=True), Series(f"training (mean of {width} records)", steps, means)]


def save_png(panels: Sequence[Panel], path: str | Path) -> None:
    """Plot panels to a PNG file, in rows of at most two panels.

    Raises:
        ValueError: ``panels`` is empty.
    """
    if not panels:
        raise ValueError(f"{path}: there are no metrics to draw")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (7.0, 4.2) if len(panels) == 1 else (5.2 * columns, 3.6 * rows)
    _save(panels, PNG_THEME, size, (rows, columns), path, format="png", dpi=130)


def save_attention(maps: Sequence[report.AttentionMap], path: str | Path) -> None:
    """Plot attention maps side by side to a PNG file. Rows are queries and columns are keys. Larger weights are darker.

    Raises:
        ValueError: ``maps`` is empty.
    """
    if not maps:
        raise ValueError(f"{path}: there are no attention maps to draw")
    from matplotlib.figure import Figure

    widths = [len(item.columns) for item in maps]
    figure = Figure(
        figsize=(0.3 * sum(widths) + 1.6 * len(maps), 0.3 * max(len(item.rows) for item in maps) + 1.4),
        layout="constrained", facecolor="white",
    )  # fmt: skip
    for item, axes in zip(maps, figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0], strict=True):
        axes.imshow(np.asarray(item.weights, np.float64), cmap="Blues", vmin=0.0, vmax=1.0)
        columns, rows = ([_token_label(token) for token in tokens] for tokens in (item.columns, item.rows))
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_color(PNG_THEME.grid)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # matplotlib draws a box instead
        figure.savefig(path, format="png", dpi=110)


def _token_label(token: str) -> str:
    """The axis label of a token, on one line. Dollar signs are escaped, because matplotlib would draw a formula."""
    return token.replace("\n", "\\n").replace("$", r"\$")


def svg(panel: Panel, identifier: str) -> str:
    """One panel as an ``<svg>`` element without a fixed size.

    The page must define the CSS variables of the colors: ``--text``, ``--line`` and ``--series-0`` to ``--series-6``.
    Text remains text in the element, so the page can set its font.

    Args:
        identifier: prefix of the ids in the element; it must be unique in the page.
    """
    buffer = io.BytesIO()
    _save([panel], SVG_THEME, (4.6, 2.9), (1, 1), buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    for color, variable in _CSS_VARIABLES.items():
        text = text.replace(color, variable)
    return inline_svg(text, identifier, label=f"{panel.ylabel} over steps")


def inline_svg(text: str, identifier: str, *, label: str) -> str:
    """The text of an SVG file as an HTML element, without the XML header and without a fixed size.

    Args:
        identifier: prefix of the ids in the element; it must be unique in the page.
        label: the ARIA label of the element.
    """
    text = text[text.index("<svg") :].strip()
    start_tag, rest = text.split(">", 1)
    start_tag = re.sub(r' (?:width|height)="[^"]*"', "", start_tag)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'\bid="', f'id="{identifier}-', rest)
    rest = re.sub(r'href="#', f'href="#{identifier}-', rest)
    rest = re.sub(r"url\(#", f"url(#{identifier}-", rest)
    return f'{start_tag} role="img" aria-label="{escape(label)}">{rest}'


def _save(
    panels: Sequence[Panel],
    theme: Theme,
    size: tuple[float, float],
    grid: tuple[int, int],
    target: Any,
    **options: Any,
) -> None:
    """Plot panels in a grid (rows, columns) of ``size`` inches to a file or buffer. ``options`` are for ``savefig``."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxlm",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor="none" if theme is SVG_THEME else "white")
        for index, panel in enumerate(panels):
            _draw(figure.add_subplot(*grid, index + 1), panel, theme)
        figure.savefig(target, **options)


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    for series in panel.series:
        axes.plot(
            series.steps,
            series.values,
            color=theme.palette[series.color % len(theme.palette)],
            linewidth=0.8 if series.faint else 1.6,
            alpha=0.35 if series.faint else 1.0,
            marker="o" if series.markers else "",
            markersize=3.5,
            label=series.label or None,
        )
    axes.set_facecolor("none")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.ylabel)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=theme.grid)
    if any(series.label for series in panel.series):
        axes.legend(frameon=False, fontsize="small", loc="best")  # without loc, a slow machine gives a warning

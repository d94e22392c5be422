"""Power laws between the validation loss of a model and its training FLOPs or its number of parameters.

For each model, a line is fitted to the logarithms of the loss and of the FLOPs (or of the number of parameters), by
least squares over the runs of all widths and seeds. The lines give the loss of each model at equal FLOPs and at an
equal number of parameters, with 95 % intervals of the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from experiments.laboratory.runs import Result


class Measure(NamedTuple):
    """The quantity x of a power law: its name, its value for a run, and its format specification in tables."""

    name: str
    value: Callable[[Result], float]
    format: str


MEASURES = (
    Measure("training FLOPs", lambda run: run.flops or math.nan, ".1e"),
    Measure("parameters", lambda run: float(run.parameters), ",.0f"),
)


class PowerLaw:
    """loss = factor * x ** exponent, fitted to runs.

    Args:
        x: FLOPs or numbers of parameters, one per run, with at least two different values.
        loss: validation losses of the runs, in nats.
    """

    def __init__(self, x: Sequence[float], loss: Sequence[float]) -> None:
        self._center = float(np.log(x).mean())
        # With centered x, the errors of the intercept and the slope are uncorrelated, so `loss` adds their variances.
        self._fit = scipy.stats.linregress(np.log(x) - self._center, np.log(loss))
        degrees_of_freedom = len(x) - 2
        self._t_quantile = float(scipy.stats.t.ppf(0.975, degrees_of_freedom)) if degrees_of_freedom else math.nan

    @property
    def exponent(self) -> tuple[float, float]:
        """The exponent, and the half width of its 95 % interval (NaN for two runs)."""
        return float(self._fit.slope), self._t_quantile * float(self._fit.stderr)

    def loss(self, x: float) -> tuple[float, float, float]:
        """The fitted loss at ``x``, and the ends of its 95 % interval (NaN for two runs)."""
        distance = math.log(x) - self._center
        log_loss = float(self._fit.intercept) + float(self._fit.slope) * distance
        half_width = self._t_quantile * math.hypot(self._fit.intercept_stderr, self._fit.stderr * distance)
        return math.exp(log_loss), math.exp(log_loss - half_width), math.exp(log_loss + half_width)


def runs_by_model(groups: Iterable[Sequence[Result]]) -> dict[str, list[Result]]:
    """The runs with a measured validation loss, by model.

    A model is left out if all its runs with a measured validation loss have the same width.

    Args:
        groups: the runs of each case, model and width.
    """
    runs: dict[str, list[Result]] = {}
    for group in groups:
        for run in group:
            if run.validation_loss is not None:
                runs.setdefault(run.model, []).append(run)
    return {model: model_runs for model, model_runs in runs.items() if len({run.width for run in model_runs}) > 1}


def fit(runs: Sequence[Result], measure: Measure) -> PowerLaw:
    """The power law between ``measure`` and the validation loss, fitted to the runs of one model."""
    return PowerLaw([measure.value(run) for run in runs], [run.validation_loss or math.nan for run in runs])


def common_value(runs: Mapping[str, Sequence[Result]], measure: Measure) -> float:
    """A value of ``measure`` at which the models are compared.

    It is the geometric mean of both ends of the range in which all models have runs. If the ranges of the models do not
    overlap, it is the geometric mean of both ends of the gap.
    """
    values = [[measure.value(run) for run in model_runs] for model_runs in runs.values()]
    return math.sqrt(max(map(min, values)) * min(map(max, values)))


def table(groups: Iterable[Sequence[Result]]) -> list[str]:
    """Lines of a Markdown table: exponents, and losses at equal FLOPs and at an equal number of parameters.

    The list is empty if no model has runs of two widths with a measured validation loss.
    """
    runs = runs_by_model(groups)
    if not runs:
        return []
    common = {measure: common_value(runs, measure) for measure in MEASURES}
    header = [text for m in MEASURES for text in (f"exponent of {m.name}", f"loss at {common[m]:{m.format}} {m.name}")]
    lines = [f"| model | runs | {' | '.join(header)} |", "|" + "---|" * (len(header) + 2)]
    for model, model_runs in runs.items():
        cells = [model, str(len(model_runs))]
        for measure in MEASURES:
            law = fit(model_runs, measure)
            (exponent, half_width), (loss, low, high) = law.exponent, law.loss(common[measure])
            cells += [f"{exponent:.3f} ± {half_width:.3f}", f"{loss:.3f} [{low:.3f}, {high:.3f}]"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(title: str, groups: Iterable[Sequence[Result]], path: Path) -> None:
    """Draw the losses of all runs with the fitted lines: one panel against FLOPs, one against parameters.

    Args:
        groups: the runs of each case, model and width.
        path: the file of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    runs = runs_by_model(groups)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        for number, (model, model_runs) in enumerate(runs.items()):
            color, law = colormaps["tab20"](number % 20), fit(model_runs, measure)
            values = [measure.value(run) for run in model_runs]
            axes.scatter(values, [run.validation_loss for run in model_runs], color=color, s=12)
            ends = [min(values), max(values)]
            axes.plot(ends, [law.loss(end)[0] for end in ends], color=color, label=model)
        axes.set(xscale="log", yscale="log", xlabel=measure.name)
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # more labels would overlap
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.legend(frameon=False, fontsize=8)
    figure.supylabel("validation loss, nats per character", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)

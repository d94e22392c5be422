"""The page of the laboratory: one section per experiment, with its claims, its results and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import scipy.stats

from experiments.laboratory import scaling
from experiments.laboratory.catalogue import EXPERIMENTS, Claim, Experiment
from experiments.laboratory.runs import VALIDATION, Result, num_layers

Group = tuple[str, str, int]
"""Case, model and width."""


def results_of_plan(experiment: Experiment, results: Iterable[Result]) -> list[Result]:
    """The results with a case of the experiment, and with the widths, layers and steps of its plan."""
    plan = experiment.plan
    return [
        result
        for result in results
        if result.planned_steps == plan.steps
        and result.width in plan.widths
        and result.case in experiment.cases
        and result.layers == num_layers(experiment.cases[result.case], plan)
    ]


def best_runs(experiment: Experiment, results: Iterable[Result]) -> dict[Group, list[Result]]:
    """For each case, model and width, the runs with the learning rate that has the most runs.

    Only the results of :func:`results_of_plan` are used. If several learning rates have equally many runs, the one with
    the highest validation accuracy is used. When all runs of the experiment are done, this is the learning rate that
    validation selected (``runs.run_model``).
    """
    groups: dict[Group, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results_of_plan(experiment, results):
        groups[result.case, result.model, result.width][result.learning_rate].append(result)

    def preference(runs: list[Result]) -> tuple[int, float]:
        return len(runs), max(run.accuracy[VALIDATION] for run in runs)

    return {group: max(rates.values(), key=preference) for group, rates in groups.items()}


def models_of(experiment: Experiment, groups: Iterable[Group]) -> list[str]:
    """The names of the models of the groups: first those of the experiment, then those that ``--model`` added."""
    names = {group[1] for group in groups}
    return [*(name for name in experiment.models if name in names), *sorted(names.difference(experiment.models))]


def minutes_of_groups(experiment: Experiment, results: Iterable[Result]) -> dict[Group, float]:
    """For each case, model and width, the minutes of all its runs, including those that select the learning rate.

    This is the median duration times the number of runs, because a run may have been suspended.
    """
    seconds: dict[Group, list[float]] = defaultdict(list)
    for result in results_of_plan(experiment, results):
        seconds[result.case, result.model, result.width].append(result.seconds)
    return {group: len(values) * statistics.median(values) / 60 for group, values in seconds.items()}


def half_width(values: Sequence[float]) -> float | None:
    """The half width of the 95 % interval of the mean (Student's t); None for a single value."""
    if len(values) == 1:
        return None
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def mean_and_interval(values: Sequence[float]) -> str:
    """The mean as text. With several values, also the half width of its 95 % interval."""
    width = half_width(values)
    return f"{statistics.mean(values):.3f}" + ("" if width is None else f" ± {width:.3f}")


def agreement(claim: Claim, runs: Mapping[Group, Sequence[Result]]) -> tuple[str, str, str]:
    """The range of the measured accuracies, the intervals of its ends, and whether it agrees with the claim, as texts.

    An accuracy is the mean over the runs of one case, model and width. With ``Claim.compared_case``, it is the mean
    difference to the accuracy on that case with the same seed. The last text is yes, no or "not measured".
    """
    accuracies = [_claimed_accuracies(claim, group, runs) for group in runs if claim.covers(*group)]
    accuracies = [values for values in accuracies if values]
    if not accuracies:
        return "", "", "not measured"
    accuracies.sort(key=statistics.mean)
    ends = accuracies[:1] if len(accuracies) == 1 else [accuracies[0], accuracies[-1]]
    low, high = statistics.mean(ends[0]), statistics.mean(ends[-1])
    widths = [half_width(values) for values in ends]
    intervals = ", ".join("one seed" if width is None else f"± {width:.2f}" for width in widths)
    agrees = (claim.minimum is None or low >= claim.minimum) and (claim.maximum is None or high <= claim.maximum)
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}", intervals, "yes" if agrees else "no"


def _claimed_accuracies(claim: Claim, group: Group, runs: Mapping[Group, Sequence[Result]]) -> list[float]:
    """The accuracies of the runs of a group, or their differences to the runs of ``Claim.compared_case``.

    Runs without a run of the same seed on that case are left out.
    """
    if claim.compared_case is None:
        return [run.accuracy[claim.test] for run in runs[group]]
    compared = {run.seed: run.accuracy[claim.test] for run in runs.get((claim.compared_case, *group[1:]), ())}
    return [run.accuracy[claim.test] - compared[run.seed] for run in runs[group] if run.seed in compared]


def claim_command(name: str, experiment: Experiment, groups: Collection[Group]) -> str:
    """The arguments of ``python -m experiments.laboratory`` that run these cases, models and widths.

    Args:
        name: name of the experiment on the command line.
    """
    arguments, plan = [name, *experiment.command_options], experiment.plan
    all_values = {"model": experiment.models, "case": experiment.cases, "width": plan.widths}
    for option, position in (("model", 1), ("case", 0), ("width", 2)):
        chosen = [value for value in all_values[option] if any(group[position] == value for group in groups)]
        if len(chosen) < len(all_values[option]):
            arguments += [f"--{option}", *map(str, chosen)]
    return shlex.join(arguments)


def claims_table(
    name: str, experiment: Experiment, runs: Mapping[Group, Sequence[Result]], minutes: Mapping[Group, float]
) -> list[str]:
    """The lines of the Markdown table of the claims.

    Args:
        name: name of the experiment on the command line.
        runs: the result of :func:`best_runs`.
        minutes: the result of :func:`minutes_of_groups`.
    """
    lines = [
        "| claim | source | published | ours | interval | agrees | command | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in experiment.claims:
        ours, intervals, agrees = agreement(claim, runs)
        value = (
            claim.test if claim.compared_case is None else f"{claim.test} minus {claim.test} of {claim.compared_case}"
        )
        limit = f"{value} ≥ {claim.minimum:g}" if claim.minimum is not None else f"{value} ≤ {claim.maximum:g}"
        groups = claim_groups(claim, experiment)
        measured = [group for group in groups if group in runs]
        missing = "" if len(measured) in (0, len(groups)) else f"; {len(measured)} of {len(groups)} rows measured"
        # If nothing is measured, the command runs all rows of the claim.
        command = claim_command(name, experiment, measured or groups)
        duration = f"{sum(minutes[group] for group in measured):.1f}" if measured else ""
        lines.append(
            f"| {claim.text} | {claim.source} | {claim.published or 'no number'} | {ours} | {intervals} | "
            f"{agrees} ({limit}){missing} | `{command}` | {duration} |"
        )
    return lines


def claim_groups(claim: Claim, experiment: Experiment) -> list[Group]:
    """The cases, models and widths that the claim is about, and those of ``Claim.compared_case``."""
    groups = itertools.product(experiment.cases, experiment.models, experiment.plan.widths)
    compared = dataclasses.replace(claim, cases=() if claim.compared_case is None else (claim.compared_case,))
    return [group for group in groups if claim.covers(*group) or compared.covers(*group)]


def section(name: str, experiment: Experiment, results: Iterable[Result], picture: str | None) -> str:
    """The section of an experiment as Markdown.

    Args:
        name: name of the experiment on the command line.
        results: the results of the experiment.
        picture: path of the picture, relative to the page; None: no picture.
    """
    command = shlex.join(["python", "-m", "experiments.laboratory", name, *experiment.command_options])
    lines = [f"## {experiment.title}", "", experiment.description, "", f"    {command}", ""]
    plan = experiment.plan
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    fewer = "" if plan.stop_at is None else f" (fewer if the validation accuracy reaches {plan.stop_at:g} earlier)"
    *others, most = sorted({num_layers(case, plan) for case in experiment.cases.values()})
    layers = f"{', '.join(map(str, others))} or {most}" if others else str(most)
    lines += [
        f"{layers} layers; {plan.steps:,} steps{fewer}; learning rates {rates}, of which validation selects one "
        f"for each {'model' if plan.share_learning_rate else 'row of the table'}; seeds: {plan.seeds}. Accuracies are "
        "means over the seeds with 95 % intervals (Student's t). If a row has fewer seeds, some of its runs are "
        "missing, and its learning rate may not be the best one. Minutes are the median duration of a run.",
    ]
    runs = best_runs(experiment, results)
    if experiment.claims:
        lines += ["", *claims_table(name, experiment, runs, minutes_of_groups(experiment, results))]
    if picture is not None:
        lines += ["", f"![{experiment.title}]({picture})"]
    if experiment.chart == "scaling":
        lines += ["", *scaling.table(runs.values())]
    tests = list(next(iter(experiment.cases.values())).tests)
    # A result has the validation loss if ``Case.measures_loss`` is set.
    has_loss = any(run.validation_loss is not None for group_runs in runs.values() for run in group_runs)
    columns = [*tests, *(["validation loss in nats"] if has_loss else [])]
    lines += [
        "",
        f"| case | model | width | parameters | {' | '.join(columns)} | learning rate | seeds | minutes |",
        "|" + "---|" * (len(columns) + 7),
    ]
    for case in experiment.cases:
        for model in models_of(experiment, runs):
            for width in plan.widths:
                group_runs = runs.get((case, model, width))
                if group_runs is None:
                    continue
                values = [[run.accuracy[test] for run in group_runs] for test in tests]
                if has_loss:
                    values.append(
                        [math.nan if run.validation_loss is None else run.validation_loss for run in group_runs]
                    )
                numbers = " | ".join(map(mean_and_interval, values))
                minutes = statistics.median(run.seconds for run in group_runs) / 60  # a run may have been suspended
                lines.append(
                    f"| {case} | {model} | {width} | {group_runs[0].parameters:,} | {numbers} | "
                    f"{group_runs[0].learning_rate:g} | {len(group_runs)} | {minutes:.1f} |"
                )
        if any(key[0] == case for key in runs):
            numbers = " | ".join([f"{experiment.chance[case]:.3f}"] * len(tests) + [""] * has_loss)
            lines.append(f"| {case} | guessing | | | {numbers} | | | |")
    machines = sorted({run.machine for group_runs in runs.values() for run in group_runs})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}."]) + "\n"


def draw(experiment: Experiment, runs: Mapping[Group, Sequence[Result]], path: Path) -> None:
    """Draw a table of colored cells: the accuracy of each model (row) on each case, width and test (column).

    Args:
        runs: the result of :func:`best_runs`.
        path: the file of the picture.
    """
    from matplotlib.figure import Figure

    plan = experiment.plan
    tests = list(next(iter(experiment.cases.values())).tests)
    columns = [(case, width, test) for case in experiment.cases for width in plan.widths for test in tests]
    measured = {(case, width) for case, _, width in runs}
    columns = [column for column in columns if column[:2] in measured]
    models = models_of(experiment, runs)

    def accuracy(model: str, column: tuple[str, int, str]) -> float:
        case, width, test = column
        group_runs = runs.get((case, model, width), [])
        return statistics.mean(run.accuracy[test] for run in group_runs) if group_runs else math.nan

    values = [[accuracy(model, column) for column in columns] for model in models]
    figure = Figure(figsize=(2.2 + 0.75 * len(columns), 2.2 + 0.36 * len(models)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for row, accuracies in enumerate(values):
        for column, value in enumerate(accuracies):
            text, color = ("", "black") if math.isnan(value) else (f"{value:.2f}", "white" if value > 0.6 else "black")
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    labels = [
        "\n".join([case, *([f"width {width}"] if len(plan.widths) > 1 else []), *([test] if len(tests) > 1 else [])])
        for case, width, test in columns
    ]
    axes.set_xticks(range(len(columns)), labels, fontsize=7, rotation=90)
    axes.set_yticks(range(len(models)), models, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_title(f"{experiment.title}: accuracy", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_learning_rates(experiment: Experiment, results: Iterable[Result], path: Path) -> None:
    """Draw the validation accuracy (seed 0) against the learning rate: a panel per model and case, a curve per width.

    Args:
        results: all results of the experiment.
        path: the file of the picture.
    """
    from matplotlib.figure import Figure

    curves: dict[Group, dict[float, float]] = defaultdict(dict)
    for result in results_of_plan(experiment, results):
        if result.seed == 0:
            curves[result.case, result.model, result.width][result.learning_rate] = result.accuracy[VALIDATION]
    models = models_of(experiment, curves)
    cases = [case for case in experiment.cases if any(group[0] == case for group in curves)]
    figure = Figure(figsize=(3.6 * len(cases), 2.7 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(cases), squeeze=False, sharex=True, sharey="row")
    for axes, (model, case) in zip(panels.flat, itertools.product(models, cases), strict=True):
        for width in experiment.plan.widths:
            points = sorted(curves.get((case, model, width), {}).items())
            if not points:
                continue
            rates, accuracies = zip(*points, strict=True)
            (line,) = axes.plot(rates, accuracies, marker="o", markersize=3, label=f"width {width}")
            best = max(points, key=lambda point: point[1])
            axes.plot(*best, marker="*", markersize=11, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(experiment.plan.learning_rates, [f"{rate:g}" for rate in experiment.plan.learning_rates])
        axes.tick_params(labelsize=7)
        axes.set_title(f"{model}, {case}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.supxlabel("peak learning rate (star: best)", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    figure.savefig(path, dpi=130)


def write(
    results: Mapping[str, Iterable[Result]],
    directory: Path,
    experiments: Mapping[str, Experiment] = EXPERIMENTS,
) -> Path:
    """Write ``laboratory.md`` and its pictures to a directory, and return the path of the page.

    Args:
        results: the results of each experiment that was run, by name.
        experiments: the experiments of the page, by name. The page has only their results of :func:`results_of_plan`.
    """
    pictures = directory / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Laboratory\n\nThis page compares models of many families on the tasks of published experiments.\n"
        "All results are in `docs/laboratory/`.\n"
        "`python -m experiments.laboratory --output docs/laboratory --page` writes this page; do not edit it.\n\n"
        "A table of claims compares published statements with our runs:\n\n"
        '- published: the number in the source, as an accuracy. "no number": the source has only the statement.\n'
        "- ours: the smallest and the largest accuracy (mean over the seeds) of the rows of the claim.\n"
        "- interval: the 95 % intervals (Student's t) of these two accuracies.\n"
        "- agrees: whether all rows satisfy the limit in parentheses. We chose the limits. A claim with ≤ also agrees\n"
        '  if a model has not learned the training lengths; see "validation" in the second table.\n'
        "- command: the arguments after `python -m experiments.laboratory` that run the measured rows of the claim.\n"
        "- minutes: the duration of all runs of these rows, including those that select the learning rate.\n\n"
        "The models have no dropout. They are trained with AdamW,\n"
        "a warm-up of 5 % of the steps and a cosine schedule. The batches of a seed are the same for all models.\n"
        "`griffin` alternates recurrent layers and local attention. `hawk` has only recurrent layers.\n"
        "`mlstm` and `slstm` are `xlstm` with one kind of layer.\n"
        "`[-1, 1]` means that the state transition of a time step may have negative eigenvalues.\n"
    ]
    for name, experiment in experiments.items():
        runs = best_runs(experiment, results.get(name, ()))
        if not runs:
            continue
        path = pictures / f"laboratory_{name}.png"
        picture: str | None = f"pictures/{path.name}"
        if experiment.chart == "learning rates":
            draw_learning_rates(experiment, results[name], path)
        elif experiment.chart == "cases":
            draw(experiment, runs, path)
        elif scaling.runs_by_model(runs.values()):
            scaling.draw(experiment.title, runs.values(), path)
        else:  # no model has runs of two widths, so there is no power law
            picture = None
        parts.append(section(name, experiment, results[name], picture))
    page = directory / "laboratory.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page

"""Repeat published experiments with models of many families, and compare the results with published claims.

    python -m experiments.laboratory state_tracking               one experiment, all models: 3 hours of one CPU core
    python -m experiments.laboratory recall --model gpt mamba2    some models, or other families by name
    python -m experiments.laboratory formal_languages --case parity
    python -m experiments.laboratory --quick                      all experiments with 30 steps, about 10 minutes
    python -m experiments.laboratory --page                       train nothing; write docs/laboratory.md

Experiments: recall (associative recall), formal_languages (length generalization), state_tracking (group products),
war_and_peace (LSTMs and GRUs with one to three layers; only with --war-and-peace FILE), copying (copying, induction
heads, a needle in a text), pronunciation (letters to phonemes; needs ``pip install -e '.[laboratory]'``), learning_rate
(the best learning rate of each width, with and without muP), scaling (power laws between loss and FLOPs, and between
loss and number of parameters, from three widths).

The results of an experiment are in OUTPUT/EXPERIMENT.jsonl, one line per run. --output sets OUTPUT (default:
runs/laboratory). With --quick, the files are in OUTPUT/quick. A run that already has a line in its file is skipped. So
an interrupted command continues if you start it again. --page reads these files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.laboratory import page, war_and_peace
from experiments.laboratory.catalogue import EXPERIMENTS, Experiment
from experiments.laboratory.models import ENCODER_DECODERS, MODELS
from experiments.laboratory.runs import Result, Results, model_of_case, run_model
from jaxlm import host
from jaxlm.command_line import Parser, end_process, exit_status, split_debug
from jaxlm.models import family_names
from jaxlm.training.checks import check_output

DOCS = Path("docs")
QUICK_STEPS = 30
ALL_MODELS = [*MODELS, *ENCODER_DECODERS]


def quick(experiment: Experiment) -> Experiment:
    """The experiment with :data:`QUICK_STEPS` steps, one learning rate, one seed, one width, and 2 batches per test."""
    plan = experiment.plan
    plan = dataclasses.replace(
        plan, steps=QUICK_STEPS, widths=plan.widths[:1], learning_rates=plan.learning_rates[:1], seeds=1, test_batches=2
    )
    return dataclasses.replace(experiment, plan=plan)


def choose(
    experiment: Experiment, models: list[str] | None, cases: list[str] | None, widths: list[int] | None
) -> Experiment:
    """The experiment with only these models, cases and widths; None: all.

    Names of families that are not in :data:`ALL_MODELS` are added to its models. With ``Plan.share_learning_rate``, the
    first width is added to the chosen widths, because the other widths use its learning rate. The result has no models,
    cases or widths if the experiment has none of those that were chosen.

    Raises:
        ValueError: a family has no model for the experiment.
        ImportError: the package of a family cannot be loaded.
    """
    plan = experiment.plan
    chosen_widths = tuple(width for width in plan.widths if widths is None or width in widths)
    if plan.share_learning_rate and chosen_widths:
        chosen_widths = tuple(dict.fromkeys((plan.widths[0], *chosen_widths)))
    plan = dataclasses.replace(plan, widths=chosen_widths)
    chosen_cases = {name: case for name, case in experiment.cases.items() if cases is None or name in cases}
    chosen = dataclasses.replace(experiment, plan=plan, cases=chosen_cases)
    chosen_models = [name for name in experiment.models if models is None or name in models]
    chosen_models += [name for name in models or () if name not in ALL_MODELS and _fits(name, chosen)]
    return dataclasses.replace(chosen, models=tuple(chosen_models))


def _fits(family: str, experiment: Experiment) -> bool:
    """Whether the experiment can train a family. An encoder-decoder needs batches with a source."""
    plan = experiment.plan
    # Building a model for every case and width raises the errors of invalid sizes before the first run.
    models = [model_of_case(family, case, plan, width) for case in experiment.cases.values() for width in plan.widths]
    has_source = not set(experiment.models).isdisjoint(ENCODER_DECODERS)
    return all(has_source or not model.reads_source for model in models)


def run(experiments: dict[str, Experiment], directory: Path) -> None:
    """Run the experiments, and append the results to ``directory/EXPERIMENT.jsonl``."""
    check_output(directory, resume=True)  # report an unusable directory before the first run
    for name, experiment in experiments.items():
        results = Results(directory / f"{name}.jsonl")
        for model in experiment.models:
            for case_name, case in experiment.cases.items():
                plan = experiment.plan
                for width in plan.widths:
                    learning_rate = run_model(name, case_name, case, plan, model, width, results, _report)
                    if plan.share_learning_rate:
                        plan = dataclasses.replace(plan, learning_rates=(learning_rate,))


def _with_text(experiments: dict[str, Experiment], path: Path | None) -> dict[str, Experiment]:
    """The experiments, with the text at ``path`` for ``war_and_peace``. For errors, see ``war_and_peace.read``."""
    if path is None or "war_and_peace" not in experiments:
        return experiments
    experiment, cases = experiments["war_and_peace"], war_and_peace.cases(war_and_peace.read(path))
    cases = {name: case for name, case in cases.items() if name in experiment.cases}
    return {**experiments, "war_and_peace": dataclasses.replace(experiment, cases=cases)}


def _report(result: Result) -> None:
    accuracies = ", ".join(f"{test} {accuracy:.3f}" for test, accuracy in result.accuracy.items())
    print(
        f"{result.experiment} · {result.case} · {result.model} · width {result.width} · "
        f"rate {result.learning_rate:g} · seed {result.seed} · {result.steps} steps · {result.seconds:.0f} s · "
        f"{accuracies}",
        flush=True,
    )


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m experiments.laboratory", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "experiment", nargs="*", choices=[*EXPERIMENTS, []], metavar="EXPERIMENT",
        help=f"experiments: {', '.join(EXPERIMENTS)} (default: all)",
    )  # fmt: skip
    others = [name for name in family_names() if name not in ALL_MODELS]
    parser.add_argument(
        "--model", nargs="+", choices=[*ALL_MODELS, *others], metavar="MODEL",
        help=f"models: {', '.join(map(repr, ALL_MODELS))} (default: all of these), or the name of another family",
    )  # fmt: skip
    all_cases = list(dict.fromkeys(case for experiment in EXPERIMENTS.values() for case in experiment.cases))
    parser.add_argument(
        "--case", nargs="+", choices=all_cases, metavar="CASE",
        help=f"cases of the experiments: {', '.join(map(repr, all_cases))} (default: all)",
    )  # fmt: skip
    all_widths = sorted({width for experiment in EXPERIMENTS.values() for width in experiment.plan.widths})
    parser.add_argument(
        "--width", nargs="+", type=int, choices=all_widths, metavar="WIDTH",
        help=f"widths of the models: {', '.join(map(str, all_widths))} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--war-and-peace",
        type=Path,
        metavar="FILE",
        help=f"the text of the experiment war_and_peace: {war_and_peace.URL}",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/laboratory"), help="directory of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps, one learning rate, seed and width, in OUTPUT/quick"
    )
    parser.add_argument(
        "--page", type=Path, nargs="?", const=DOCS,
        help="train nothing; write laboratory.md, from the results in OUTPUT, to this directory (default: docs)",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments, debug = split_debug(arguments)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.page is not None and (parsed.experiment or parsed.model or parsed.case or parsed.width):
        parser.error("--page writes all results: omit the experiments, --model, --case and --width")
    all_names = [name for name in EXPERIMENTS if name != "war_and_peace" or parsed.war_and_peace or parsed.page]
    names = parsed.experiment or all_names
    if not set(names) <= set(all_names):
        parser.error(f"war_and_peace needs a text: download {war_and_peace.URL}, and add --war-and-peace FILE")
    directory = parsed.output / "quick" if parsed.quick else parsed.output
    experiments = {name: quick(experiment) for name, experiment in EXPERIMENTS.items()} if parsed.quick else EXPERIMENTS

    try:
        chosen = {name: choose(experiments[name], parsed.model, parsed.case, parsed.width) for name in names}
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    chosen = {
        name: experiment
        for name, experiment in chosen.items()
        if experiment.models and experiment.cases and experiment.plan.widths
    }
    if not chosen:
        parser.error(f"{', '.join(names)}: no experiment has the cases, widths and models that you chose")
    if parsed.quick and parsed.page == DOCS:
        parser.error("--quick --page needs another directory than docs, because docs/laboratory.md has complete runs")

    def command() -> int:
        if parsed.page is None:
            run(_with_text(chosen, parsed.war_and_peace), directory)
            return 0
        results = {name: Results(directory / f"{name}.jsonl") for name in EXPERIMENTS}
        if not any(page.results_of_plan(experiment, results[name]) for name, experiment in experiments.items()):
            raise ValueError(
                f"{directory} has no results for a page: choose the directory of the results with --output, such as "
                "--output docs/laboratory"
            )
        print(page.write(results, parsed.page, experiments))
        return 0

    return exit_status(command, "experiments.laboratory", debug=debug)


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

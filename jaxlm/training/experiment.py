"""What experiment modules share: the model from options, the command line, the run directory and its contents."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

import jaxlm
from jaxlm import config as config_lib
from jaxlm import processes
from jaxlm.command_line import exit_status, parse_experiment, split_debug
from jaxlm.data import Tokenizer
from jaxlm.decoding import GenerationConfig
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import Model, get_model
from jaxlm.training import checks
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.html_report import write_report
from jaxlm.training.loop import Result, Run
from jaxlm.training.plots import save_attention
from jaxlm.training.report import ATTENTION, draw_losses, read_attention, write_results
from jaxlm.training.trainer import Trainer

E = TypeVar("E")

STATUS = {None: 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status by the signal that ended a run."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model of an experiment: a family or variant with some fields changed, or a directory of weights."""

    name: str = "gpt2"
    """A family or variant, such as lstm or t5-small."""
    set: tuple[str, ...] = ()
    """Fields of the family's config that differ, as num_layers=2 hidden_dim=256."""
    pretrained: Path | None = None
    """A directory of weights in Hugging Face layout to start from, instead of name."""

    def build(self, seed: int = 0, **fixed: Any) -> tuple[Model, Any]:
        """The model, and the parameters to start from (None: random ones).

        Args:
            seed: of parameters that the directory lacks, such as a new head.
            fixed: fields that follow from the data, such as ``vocab_size`` or ``num_labels``; ``set`` may not change
                them.

        Raises:
            ValueError: an unknown name or field, or a field of ``fixed`` in ``set``.
        """
        changes = config_lib.assignments("model.set", self.set)
        for field in changes:
            if field in fixed:
                raise ValueError(f"--model.set {field}={changes[field]}: the data decide {field}, leave it out")
        if self.pretrained is not None:
            return load_pretrained(self.pretrained, param_dtype="float32", seed=seed, **fixed, **changes)
        return get_model(self.name, **fixed, **changes), None


def say(text: str) -> None:
    """Print a line at once; of several processes, the first does."""
    if processes.is_first():
        print(text, flush=True)


def command_line(
    default: E,
    presets: Mapping[str, E],
    run: Callable[[E, Path | None], Result],
    *,
    name: str,
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Exit status of the experiment ``name`` (``jaxlm.command_line``). Before ``run`` reads any data, the settings and
    the output directory are checked (``jaxlm.training.checks``).

    Args:
        run: trains with a configuration, or goes on with the run of a directory.
        description: the docstring of the module; its first line is shown by ``--help``.
    """
    given, debug = split_debug(arguments)

    def command() -> int:
        experiment, start, resume = parse_experiment(
            default, presets, given, program=f"python -m experiments.{name}", description=description.split("\n")[0]
        )
        checks.check_settings(experiment, start)
        output = resume or experiment.output  # type: ignore[attr-defined]

        def check() -> str:
            if output is not None:
                checks.check_output(output, resume=resume is not None)
            return ""

        processes.from_first(check)
        return STATUS[run(experiment, resume).interrupted]

    return exit_status(command, f"experiments.{name}", debug=debug)


def prepare_run(
    name: str, experiment: Any, resume: Path | None, trainer: Trainer, tokenizer: Tokenizer, evaluate: Evaluator,
    request: GenerationConfig | None = None,
) -> Path:  # fmt: skip
    """The directory of a run: that of ``resume``, or a new one with ``config.json`` and the tokenizer in ``model/``.

    ``experiment.output`` names a new directory; None makes ``runs/<name>-<time>``. Everything about the run that can be
    checked before the training is checked first, and nothing is written if a check fails.

    Args:
        request: for the text that is generated after the training.

    Raises:
        FileExistsError: the directory is not empty.
        OSError: the directory cannot be written, or its disk has no room for a checkpoint and the exported model.
        ValueError: the tokenizer does not belong to the model, ``request`` asks for what the model cannot do, or
            ``evaluate`` has no ``training.best_metric``.
    """
    checks.check_task(trainer)
    checks.check_best_metric(experiment.training, evaluate)
    checks.check_tokenizer(trainer.model, tokenizer)
    if request is not None:
        checks.check_request(trainer.model, tokenizer, request)
    checkpoints = experiment.training.checkpoint_every is not None

    def make() -> str:
        directory = resume or experiment.output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        checks.check_output(directory, resume=resume is not None)
        checks.check_space(directory, trainer, checkpoints=checkpoints)
        if resume is None:
            (directory / "model").mkdir(parents=True, exist_ok=True)
            tokenizer.save(directory / "model")
            config_lib.write(experiment, directory / "config.json")
        return str(directory)

    return Path(processes.from_first(make))


def check_unchanged(experiment: Any, resume: Path | None, fields: Sequence[str]) -> None:
    """Raise ``ValueError`` if a resumed run got another value of one of ``fields``, such as ``data.train``."""
    if resume is None:
        return
    saved = config_lib.read(type(experiment), resume / "config.json")
    for field in fields:
        asked, was = experiment, saved
        for part in field.split("."):
            asked, was = getattr(asked, part), getattr(was, part)
        if asked != was:
            raise ValueError(f"{field}={asked} cannot change when a run goes on (it is {was}): leave it out")


def make_run(directory: Path, experiment: Any, resume: Path | None) -> Run:
    """The ``Run`` of a directory, with the configuration and versions in each checkpoint."""
    meta = {"experiment": config_lib.to_json(experiment), "jaxlm": jaxlm.__version__, "jax": jax.__version__}
    return Run(directory, meta, resume=resume is not None)


def export(directory: Path, experiment: Any, model: Model, result: Result, tokenizer: Tokenizer | None = None) -> bool:
    """Whether the run finished; then ``model/`` (Hugging Face layout) and the curves are written.

    The configuration is written only now, also after an interruption: a run that cannot go on as asked keeps the
    configuration that it had, and the next ``--resume`` keeps changed options.
    """
    if processes.is_first():
        config_lib.write(experiment, directory / "config.json")
    if result.interrupted is not None:
        return False
    save_pretrained(directory / "model", model, result.params, tokenizer=tokenizer)
    if processes.is_first():
        draw_losses(directory / "metrics.jsonl", directory / "loss.png")
    return True


def report(
    directory: Path, *, task: str, model: Model, begun: float, scores: Sequence[Any], result: Result, **details: Any
) -> Path:
    """Write ``results.json``, ``report.html`` and, where there are attention maps, ``attention.png``; print the scores.

    Args:
        begun: ``time.perf_counter()`` at the start of the run.
        result: of the training; its step, compilations and speed are written, too.
        scores: of ``jaxlm.metrics.Score``.
        details: further facts, for the record.
    """
    minutes = (time.perf_counter() - begun + result.earlier_seconds) / 60
    speed = {
        "training_examples_per_second": result.examples_per_second,
        "training_tokens_per_second": result.tokens_per_second,
        "seconds_to_first_loss": result.seconds_to_first_loss,
    }
    trained = {name: round(value, 1) for name, value in speed.items() if math.isfinite(value)}  # NaN without a step
    write_results(
        directory, task=task, family=model.family, parameters=model.num_parameters, minutes=minutes, scores=scores,
        steps=result.step, compilations=result.compilations, **trained, **details,
    )  # fmt: skip
    if (directory / ATTENTION).exists():
        save_attention(read_attention(directory)[:2], directory / "attention.png")
    page = write_report(directory)
    for score in scores:
        say(str(score))
    say(f"{minutes:.1f} minutes in all · {page}")
    return page

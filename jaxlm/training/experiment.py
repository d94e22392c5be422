"""Functions shared by the experiment modules: build the model, run the command line, write the run directory."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import itertools
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

import jaxlm
from jaxlm import config as config_lib
from jaxlm import integrity, processes
from jaxlm.command_line import exit_status, parse_experiment, split_debug
from jaxlm.data import Tokenizer, load_tokenizer, train_tokenizer
from jaxlm.data.examples import Examples, InvalidLineError
from jaxlm.decoding import GenerationConfig
from jaxlm.interop.config_json import model_config_json
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import Model, get_model
from jaxlm.training import checks
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.html_report import REPORT, write_report
from jaxlm.training.loop import Result, Run, TrainingConfig
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.plots import save_attention, training_panels
from jaxlm.training.recipes import RECIPES, recipe
from jaxlm.training.report import (
    ATTENTION,
    BOARDS,
    CONFUSION,
    METRICS,
    RESULTS,
    SAMPLES,
    draw_losses,
    read_attention,
    read_metrics,
    write_results,
)
from jaxlm.training.trackers import check_tracker, make_tracker
from jaxlm.training.trainer import Trainer

E = TypeVar("E")

EXIT_STATUS = {None: 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status of a run for each signal that can end it. None: the run finished."""

RESULT_FILES = (
    RESULTS, REPORT, SAMPLES, CONFUSION, ATTENTION, "attention.png", BOARDS, "sample.txt", "translations.txt",
)  # fmt: skip
"""Files of a run that describe its final weights."""

RUNS = Path("runs")
"""The directory that contains a new run if ``--output`` is not given."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model of an experiment: a family or variant with changed fields, or pretrained weights."""

    name: str = "gpt2"
    """Family or variant, for example lstm or t5-small."""
    set: tuple[str, ...] = ()
    """Fields of the family's config, for example num_layers=2 hidden_dim=256. They are added to the fields of the
    preset. If the preset sets the same field, the value given here is used. Without any field, the option removes all
    fields of the preset. If name or pretrained differs from the preset, the fields of the preset are not used."""
    pretrained: Path | None = None
    """Directory of initial weights in Hugging Face layout, used instead of name."""

    def merge(self, preset: ModelConfig, *, set_is_given: bool) -> ModelConfig:
        """The model of the command line: this config, with the fields of the preset that ``set`` does not name.

        If ``name`` or ``pretrained`` differs from the preset, the model may have other fields, so the preset's fields
        are not used. A message says so if the preset has fields and the command line has no ``--model.set``.

        Args:
            set_is_given: whether the command line has ``--model.set``. Otherwise, ``self.set`` comes from the preset.
        """
        if (self.name, self.pretrained) != (preset.name, preset.pretrained):
            if self.set and not set_is_given:
                print_once(f"the preset's fields of {preset.name} are not used: {' '.join(preset.set)}")
                return dataclasses.replace(self, set=())
            return self
        if not self.set:
            return self
        fields, changes = (config_lib.parse_assignments_as_text("model.set", config.set) for config in (preset, self))
        return dataclasses.replace(self, set=tuple(f"{name}={value}" for name, value in (fields | changes).items()))

    def tokenizer(self, resume: Path | None, train: Callable[[], Tokenizer]) -> Tokenizer:
        """The tokenizer of the run ``resume``, otherwise that of ``pretrained`` if it is set, otherwise ``train()``."""
        saved = resume / "model" if resume is not None else self.pretrained
        return train() if saved is None else load_tokenizer(saved)

    def build(
        self, seed: int = 0, tokenizer_fields: Mapping[str, Any] | None = None, **fixed: Any
    ) -> tuple[Model, Any]:
        """The model and its initial parameters (None: random initialization).

        Args:
            seed: seed for initializing parameters that ``pretrained`` does not contain, such as a new head.
            tokenizer_fields: config fields that follow from the tokenizer, such as ``vocab_size``. They are not used
                with ``pretrained``, because its config has these fields.
            fixed: config fields that follow from the data, such as ``num_labels``. ``set`` may change neither these nor
                ``tokenizer_fields``.

        Raises:
            ValueError: a name or field is unknown, or ``set`` changes a field that follows from the data.
        """
        tokenizer_fields = tokenizer_fields or {}
        changes = config_lib.assignments("model.set", self.set)
        for field in changes:
            if field in fixed or field in tokenizer_fields:
                raise ValueError(f"--model.set {field}={changes[field]}: {field} follows from the data, leave it out")
        if self.pretrained is not None:
            for field, value in changes.items():
                if field in inspect.signature(load_pretrained).parameters:
                    raise ValueError(f"--model.set {field}={value}: {field} is not a config field, leave it out")
            return load_pretrained(self.pretrained, param_dtype="float32", seed=seed, **fixed, **changes)
        return get_model(self.name, **fixed, **tokenizer_fields, **changes), None


def build_encoder_decoder(
    config: ModelConfig, training: Examples, vocab_size: int, seed: int, resume: Path | None
) -> tuple[Model, Any, Tokenizer]:
    """The model, its initial parameters (None: random), and the tokenizer, which is trained on sources and targets."""
    texts = training.column("source") + training.column("target")
    tokenizer = config.tokenizer(resume, lambda: train_tokenizer(texts, "bpe", vocab_size, template="eos"))
    fields = {"vocab_size": tokenizer.vocab_size, "decoder_start_id": tokenizer.special_ids.pad}
    return *config.build(seed, fields), tokenizer


def read_examples(read: Callable[..., Examples], *paths: Path, **options: Any) -> Examples:
    """The examples that ``read(*paths, **options)`` returns. Prints the lines that were left out.

    Raises:
        ValueError: a line is invalid; the error names the option that leaves it out.
    """
    try:
        examples = read(*paths, **options)
    except InvalidLineError as error:
        raise ValueError(f"{error}; --data.on-error report leaves such lines out") from error
    for line in examples.rejected:
        print_once(f"{examples.name}, line {line.line} is left out: {line.reason}")
    return examples


def print_once(text: str) -> None:
    """Print a line and flush; with several processes, only the first one prints."""
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
    """Run the experiment ``name`` and return its exit status (``jaxlm.command_line`` lists the values).

    The settings and the output directory are checked before ``run`` reads data (``jaxlm.training.checks``).

    Args:
        run: a function of a configuration and the directory of the run to resume; None starts a new run.
        description: the docstring of the module; ``--help`` shows its first line.
    """
    options, debug = split_debug(arguments)

    def command() -> int:
        parsed = parse_experiment(
            default, presets, options, program=f"python -m experiments.{name}", description=description.split("\n")[0],
            recipes={family: recipe(family) for family in RECIPES},
        )  # fmt: skip
        experiment, initial, resume = parsed.config, parsed.initial, parsed.resume
        model, preset = experiment.model, initial.model  # type: ignore[attr-defined]
        if resume is not None:  # the fields of the preset stay valid if the path of ``pretrained`` changes
            preset = dataclasses.replace(preset, pretrained=model.pretrained)
        model = model.merge(preset, set_is_given="--model.set" in parsed.given)
        experiment = dataclasses.replace(experiment, model=model)  # type: ignore[type-var]
        checks.check_settings(experiment, initial)
        if parsed.recipe is not None:
            print_once(_describe_recipe(parsed.recipe, experiment.optimizer))  # type: ignore[attr-defined]
        output = resume or experiment.output  # type: ignore[attr-defined]

        if output is not None:
            processes.call_in_first_process(lambda: checks.check_output(output, resume=resume is not None))
        result = run(experiment, resume)
        return EXIT_STATUS[result.interrupted or result.signal]

    return exit_status(command, f"experiments.{name}", debug=debug)


def _describe_recipe(family: str, optimizer: OptimizerConfig) -> str:
    """One line with the source of a recipe and the values of ``optimizer`` that differ from the recipe."""
    published = dataclasses.asdict(recipe(family))
    changes = [f"{name}={value}" for name, value in dataclasses.asdict(optimizer).items() if value != published[name]]
    changed = f", changed: {' '.join(changes)}" if changes else ""
    return f"optimizer: recipe of {family} ({RECIPES[family].source}){changed}"


def prepare_run(
    name: str, experiment: Any, resume: Path | None, trainer: Trainer, tokenizer: Tokenizer, evaluate: Evaluator,
    request: GenerationConfig | None = None, parent: Any = None,
) -> Path:  # fmt: skip
    """The directory of a run: ``resume``, or a new directory with ``config.json`` and the tokenizer in ``model/``.

    ``experiment.output`` is the path of a new directory; None means ``runs/<name>-<time>``. All checks run first, and
    nothing is written if one of them fails. If several new runs start in one directory, only one gets it.

    Args:
        request: settings for generating text after the training.
        parent: if the directory is one of several runs of an experiment, such as a fold of a cross-validation, the
            configuration of the experiment. It is written to the parent directory first, so that ``--resume`` accepts
            this directory even if the run is killed at its start.

    Raises:
        BlockingIOError: another process uses the directory of a new run.
        FileExistsError: the directory of a new run is not empty.
        ImportError: the package of ``training.tracker`` is not installed.
        OSError: the directory is not writable, or its disk has no space for a checkpoint and the exported model.
        ValueError: the model cannot be exported; the tokenizer does not belong to the model; the model has no
            next-token head for a next-token loss; the model does not support ``request``; or ``evaluate`` does not
            return ``training.best_metric``.
    """
    checks.check_task(trainer)
    check_tracker(experiment.training.tracker)
    checks.check_best_metric(experiment.training, evaluate)
    checks.check_tokenizer(trainer.model, tokenizer)
    model_config_json(trainer.model, "float32", tokenizer)  # raises if the model cannot be exported
    if request is not None:
        request.resolve(trainer.model, tokenizer)  # raises if an option is invalid
    has_checkpoints = experiment.training.checkpoint_every is not None

    def create() -> str:
        checks.check_space(resume or experiment.output or RUNS, trainer, checkpoints=has_checkpoints)
        directory = resume or experiment.output or _create_directory(name)
        checks.check_output(directory, resume=resume is not None)
        if resume is None:
            directory.mkdir(parents=True, exist_ok=True)
            with integrity.lock_directory(directory):
                checks.check_output(directory, resume=False)  # another run may have started here since the last check
                if parent is not None:
                    config_lib.write(parent, directory.parent / "config.json")
                (directory / "model").mkdir(exist_ok=True)
                tokenizer.save(directory / "model")
                config_lib.write(experiment, directory / "config.json")
        return str(directory)

    return Path(processes.call_in_first_process(create))


def new_directory(name: str) -> Path:
    """Create the directory of a new run without ``--output``, and return its path (the same in all processes).

    It is ``runs/<name>-<time>``. If it exists, because another run started in the same second, -2, -3, ... is added.

    Raises:
        NotADirectoryError: ``runs`` is not a directory.
    """
    return Path(processes.call_in_first_process(lambda: str(_create_directory(name))))


def _create_directory(name: str) -> Path:
    checks.check_output(RUNS, resume=True)
    RUNS.mkdir(exist_ok=True)
    path = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        directory = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            break
    return directory


def check_unchanged(experiment: Any, resume: Path | None, fields: Sequence[str]) -> None:
    """Raise ``ValueError`` if an option changes one of ``fields``, such as ``data.train``, in a resumed run.

    The name of the model, the name of the optimizer and the seed must not change either. A file or directory of data
    may have been moved: the path may change if its last part stays the same. A message says so.
    """
    if resume is None:
        return
    saved_experiment = config_lib.read(type(experiment), resume / "config.json")

    def check(field: str) -> None:
        value, saved = map(operator.attrgetter(field), (experiment, saved_experiment))
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                check(f"{field}.{inner.name}")
        elif value != saved:
            is_moved = isinstance(value, Path) and isinstance(saved, Path) and value.name == saved.name
            if field == "output" or not is_moved:
                raise ValueError(f"{field}={value} cannot change in a resumed run (saved value: {saved}): leave it out")
            print_once(f"{field}={value} is used instead of {saved}: it must have the same content")

    for field in ("model.name", "optimizer.name", "training.seed", *fields):
        check(field)


def make_run(directory: Path, experiment: Any, resume: Path | None, parent: Any = None) -> Run:
    """The ``Run`` of a directory. Its checkpoints contain the configuration and the versions of jaxlm and JAX.

    A resumed run writes ``config.json`` as soon as it has restored its state. So the next ``--resume`` uses the changed
    options even if this run is killed. A start that fails before this does not change the file.

    If a resumed run trains further, its result files describe other weights than those at its end. So they are renamed
    to ``NAME.step-N``, where N is the step from which the run continues.

    The tracker that ``training.tracker`` names is closed when the process ends.

    Args:
        parent: as in :func:`prepare_run`. A resumed run writes it too, and renames the result files of the parent
            directory too.
    """
    config, name = config_lib.to_json(experiment), experiment.training.tracker
    meta = {"experiment": config, "jaxlm": jaxlm.__version__, "jax": jax.__version__}
    trackers = () if name is None or not processes.is_first() else (make_tracker(name, directory, config),)
    for tracker in trackers:
        atexit.register(tracker.close)  # even after an error: services write buffered values when they are closed

    def on_start(step: int, trains: bool) -> None:
        configs = {directory: experiment} if parent is None else {directory: experiment, directory.parent: parent}
        for path, config in configs.items():
            config_lib.write(config, path / "config.json")
            for name in RESULT_FILES if trains else ():
                if (path / name).exists():
                    (path / name).rename(path / f"{name}.step-{step}")

    is_resumed = resume is not None
    return Run(directory, meta, is_resumed, trackers, on_start=on_start if is_resumed else None)


def export(directory: Path, model: Model, result: Result, tokenizer: Tokenizer | None = None) -> bool:
    """Write ``model/`` (Hugging Face layout) and the loss curves, if the run finished. Returns whether it finished.

    Samples and attention maps of an earlier end of the run are deleted, because the next tests may not write new ones.
    """
    if result.interrupted is not None:
        return False
    save_pretrained(directory / "model", model, result.params, tokenizer=tokenizer)
    if processes.is_first():
        for name in (SAMPLES, ATTENTION, "attention.png"):
            (directory / name).unlink(missing_ok=True)
        metrics = directory / METRICS
        if metrics.exists() and training_panels(read_metrics(metrics)):
            draw_losses(metrics, directory / "loss.png")
        else:
            print_once(f"{metrics} has no metrics: there are no loss curves")
    return True


def with_epochs(config: TrainingConfig, epochs: float | None, steps_per_epoch: int) -> TrainingConfig:
    """The config with the steps of ``epochs`` passes over the training split. None: the config is not changed.

    Raises:
        ValueError: the number of steps is less than 1.
    """
    if epochs is None:
        return config
    steps = round(epochs * steps_per_epoch)
    if steps < 1:
        raise ValueError(f"epochs={epochs:g} of {steps_per_epoch} steps are less than one step: increase epochs")
    return dataclasses.replace(config, steps=steps)


def report(
    directory: Path,
    *,
    task: str,
    model: Model,
    start_time: float,
    scores: Sequence[Any],
    result: Result,
    **details: Any,
) -> Path:
    """Write ``report.html`` and ``results.json``, print the scores, and return the path of ``report.html``.

    If the run has attention maps, ``attention.png`` is written too.

    Args:
        start_time: ``time.perf_counter()`` at the start of the run.
        result: result of the training. ``results.json`` contains its last step, the step of its weights if this is
            another one (``best_step``), its number of compilations and its speed.
        scores: a sequence of ``jaxlm.metrics.Score``.
        details: additional values for ``results.json``.
    """
    minutes = (time.perf_counter() - start_time + result.earlier_seconds) / 60
    speed = {
        "training_examples_per_second": result.examples_per_second,
        "training_tokens_per_second": result.tokens_per_second,
        "seconds_to_first_loss": result.seconds_to_first_loss,
    }
    if result.step != result.last_step:
        details["best_step"] = result.step
    measured = {name: round(value, 1) for name, value in speed.items() if math.isfinite(value)}  # NaN: no step was run
    write_results(
        directory, task=task, family=model.family, parameters=model.num_parameters, minutes=minutes, scores=scores,
        steps=result.last_step, compilations=result.compilations, **measured, **details,
    )  # fmt: skip
    if (directory / ATTENTION).exists():
        save_attention(read_attention(directory)[:2], directory / "attention.png")
    page = write_report(directory)
    for score in scores:
        print_once(str(score))
    print_once(f"{minutes:.1f} minutes in total · {page}")
    return page

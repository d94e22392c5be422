"""Functions shared by the modules in ``experiments/``: build a model, run a command line, write a run directory."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import itertools
import math
import operator
import os
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
from jaxlm.training.loop import Result, Run, TrainingConfig, check_rows_or_batches
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.plots import save_attention, save_png, training_panels
from jaxlm.training.recipes import RECIPES, recipe
from jaxlm.training.report import (
    ATTENTION,
    BOARDS,
    CONFUSION,
    METRICS,
    RESULTS,
    SAMPLES,
    read_attention,
    read_if_exists,
    read_metrics,
    write_results,
)
from jaxlm.training.trackers import TrackerName, check_tracker, make_tracker
from jaxlm.training.trainer import Trainer

E = TypeVar("E")
T = TypeVar("T", bound=TrainingConfig)

EXIT_STATUS = {None: 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status of a run for each signal that can end it. None: the run finished."""

RESULT_FILES = (
    RESULTS, REPORT, SAMPLES, CONFUSION, ATTENTION, "attention.png", BOARDS, "sample.txt", "translations.txt",
)  # fmt: skip
"""Files of a run that describe its final weights."""

RUNS = Path("runs")
"""The directory that contains a new run if ``--output`` is not given."""


@dataclasses.dataclass(frozen=True)
class ExperimentTraining(TrainingConfig):
    """The training of an experiment: the settings of ``train``, and the settings that only the experiment uses."""

    sequence_length: int = 128
    """Tokens per sequence. Experiments with a setting named buckets do not use it."""
    evaluation_batches: int = 20
    """Maximum number of batches per evaluation. Experiments with a setting named buckets do not use it: they evaluate
    on the complete validation split."""
    tracker: TrackerName | None = None
    """Also log the metrics to this service: TensorBoard (in the run directory), Weights & Biases, or Trackio.
    Weights & Biases and Trackio show a resumed run as a new run. In Python, pass trackers to ``Run``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows_or_batches(evaluation_batches=self.evaluation_batches)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model of an experiment: a family or variant with changed fields, or pretrained weights."""

    name: str = "gpt2"
    """Name of a family, for example lstm, or of a predefined variant of a family, for example t5-small."""
    set: tuple[str, ...] = ()
    """Fields of the family's config, for example num_layers=2 hidden_dim=256. They are added to the fields of the
    preset. If the preset sets the same field, the value given here is used. The option without any field removes all
    fields of the preset. If name or pretrained differs from the preset, the fields of the preset are not used."""
    pretrained: Path | None = None
    """Directory of initial weights in Hugging Face layout, used instead of name."""

    def merge(self, preset: ModelConfig, *, set_is_given: bool) -> ModelConfig:
        """This config with a new ``set``: the fields of the preset, updated with the fields of ``self.set``.

        The preset's fields are not used in two cases:

        - ``self.set`` is empty.
        - ``name`` or ``pretrained`` differs from the preset, because the model may then have other fields. A message
          is printed if the preset has fields and the command line has no ``--model.set``.

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
        """The saved tokenizer of the run ``resume`` or of ``pretrained``. If both are None, the result of ``train()``.

        If both are set, the tokenizer of the run is used."""
        saved = resume / "model" if resume is not None else self.pretrained
        return train() if saved is None else load_tokenizer(saved)

    def build(
        self, seed: int = 0, tokenizer_fields: Mapping[str, Any] | None = None, **data_fields: Any
    ) -> tuple[Model, Any]:
        """The model and its initial parameters (None: random initialization).

        Args:
            seed: seed for initializing parameters that ``pretrained`` does not contain, such as a new head.
            tokenizer_fields: config fields that follow from the tokenizer, such as ``vocab_size``. With
                ``pretrained``, the config in that directory determines these fields.
            data_fields: config fields that follow from the data, such as ``num_labels``.

        Raises:
            ValueError: ``name`` is unknown; a field in ``set`` is unknown; ``set`` has a field that is also in
                ``tokenizer_fields`` or ``data_fields``; or ``pretrained`` is set, and ``set`` has the name of a
                parameter of ``load_pretrained``, such as ``seed``.
        """
        tokenizer_fields = tokenizer_fields or {}
        changes = config_lib.assignments("model.set", self.set)
        options = () if self.pretrained is None else inspect.signature(load_pretrained).parameters
        for field, value in changes.items():
            if field in data_fields or field in tokenizer_fields:
                raise ValueError(
                    f"--model.set {field}={value}: {field} follows from the data, the tokenizer or the "
                    "pretrained weights, leave it out"
                )
            if field in options:
                raise ValueError(f"--model.set {field}={value}: {field} is not a config field, leave it out")
        if self.pretrained is not None:
            return load_pretrained(self.pretrained, param_dtype="float32", seed=seed, **data_fields, **changes)
        return get_model(self.name, **data_fields, **tokenizer_fields, **changes), None


def build_encoder_decoder(
    config: ModelConfig, training: Examples, vocab_size: int, seed: int, resume: Path | None
) -> tuple[Model, Any, Tokenizer]:
    """The model, its initial parameters (None: random initialization), and the tokenizer.

    Without ``resume`` and ``config.pretrained``, a BPE tokenizer is trained on the sources and targets of ``training``.

    Args:
        vocab_size: maximum size of the vocabulary of a new tokenizer.
        resume: the directory of the run to resume; None for a new run.
    """
    texts = training.column("source") + training.column("target")
    tokenizer = config.tokenizer(resume, lambda: train_tokenizer(texts, "bpe", vocab_size, template="eos"))
    fields = {"vocab_size": tokenizer.vocab_size, "decoder_start_id": tokenizer.special_ids.pad}
    return *config.build(seed, fields), tokenizer


def read_examples(read: Callable[..., Examples], *paths: Path, **options: Any) -> Examples:
    """The examples that ``read(*paths, **options)`` returns. For each line that was left out, the reason is printed.

    Raises:
        ValueError: a line is invalid. The message names the option that leaves out invalid lines.
    """
    try:
        examples = read(*paths, **options)
    except InvalidLineError as error:
        raise ValueError(f"{error}; --data.on-error report leaves such lines out") from error
    for line in examples.rejected:
        print_once(f"{examples.name}, line {line.line} is left out: {line.reason}")
    return examples


def print_once(text: str) -> None:
    """Print a line and flush. With several processes, only the first process prints."""
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

    The settings and, if ``--output`` or ``--resume`` is given, the directory are checked before ``run`` reads data
    (``jaxlm.training.checks``).

    Args:
        default: the configuration without ``--preset`` and ``--resume``.
        presets: the configurations that ``--preset`` selects by name.
        run: a function of two arguments: a configuration, and the directory of the run to resume (None: a new run).
        description: the docstring of the module. ``--help`` shows its first line.
        arguments: the command-line arguments; None uses those of the process.
    """
    options, debug = split_debug(arguments)

    def command() -> int:
        parsed = parse_experiment(
            default, presets, options, program=f"python -m experiments.{name}", description=description.split("\n")[0],
            recipes={family: recipe(family) for family in RECIPES},
        )  # fmt: skip
        experiment: Any = parsed.config
        initial: Any = parsed.initial
        resume = parsed.resume
        _make_cpu_devices(experiment.training.cpu_devices)
        model, preset = experiment.model, initial.model
        if resume is not None:  # the saved fields stay valid if a resumed run changes the path of ``pretrained``
            preset = dataclasses.replace(preset, pretrained=model.pretrained)
        model = model.merge(preset, set_is_given="--model.set" in parsed.given)
        experiment = dataclasses.replace(experiment, model=model)
        checks.check_settings(experiment, initial, parsed.preset)
        checks.check_cpu_choices()
        if parsed.recipe is not None:
            print_once(_describe_recipe(parsed.recipe, experiment.optimizer))
        output = resume or experiment.output
        if output is not None:
            processes.call_in_first_process(lambda: checks.check_output(output, resume=resume is not None))
        result = run(experiment, resume)
        return EXIT_STATUS[result.interrupted or result.signal]

    return exit_status(command, f"experiments.{name}", debug=debug)


def _make_cpu_devices(count: int) -> None:
    """Divide the CPU into ``count`` devices, if JAX has no devices yet and ``XLA_FLAGS`` does not set their number.

    Otherwise, nothing changes. ``TrainingConfig.trainer`` later raises an error if there are too few devices
    (``jaxlm.sharding.cpu_sharding``).
    """
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX already has its devices
            jax.config.update("jax_num_cpu_devices", count)


def _describe_recipe(family: str, optimizer: OptimizerConfig) -> str:
    """A line with the source of the recipe of ``family`` and the values of ``optimizer`` that differ from it."""
    published = dataclasses.asdict(recipe(family))
    changes = [f"{name}={value}" for name, value in dataclasses.asdict(optimizer).items() if value != published[name]]
    changed = f", changed: {' '.join(changes)}" if changes else ""
    return f"optimizer: recipe of {family} ({RECIPES[family].source}){changed}"


def prepare_run(
    name: str, experiment: Any, resume: Path | None, trainer: Trainer, tokenizer: Tokenizer, evaluate: Evaluator,
    request: GenerationConfig | None = None, parent: Any = None,
) -> Path:  # fmt: skip
    """Check a run before its training, create its directory, and return the path of the directory.

    For a resumed run, the directory is ``resume``, and no file is written. For a new run, it is ``experiment.output``
    or, if this is None, ``runs/<name>-<time>``. The function writes ``config.json`` and the files of the tokenizer (in
    ``model/``) to a new directory. All checks run before these files are written. If several new runs are started with
    the same directory, only one of them gets the directory. The others raise an error.

    Args:
        request: settings for generating text after the training, which are checked too.
        parent: the configuration of a larger experiment if this run is a part of it, such as a fold of a
            cross-validation; otherwise None. It is written to the ``config.json`` of the parent directory before the
            files of the run. So ``--resume`` accepts the parent directory even if the run is killed at its start.

    Raises:
        BlockingIOError: another process uses the directory of a new run.
        FileExistsError: the directory of a new run is not empty.
        ImportError: the package of ``training.tracker`` is not installed.
        OSError: the directory is not writable, or its disk has no space for the exported model and, if checkpoints are
            saved, one checkpoint.
        ValueError: the model cannot be exported; the vocabulary sizes of tokenizer and model do not match; the loss
            needs a next-token head that the model does not have; the model or the tokenizer does not support
            ``request``; or ``evaluate`` does not return ``training.best_metric``.
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
    """Create the directory of a new run without ``--output``, and return its path, which is equal in all processes.

    The path is ``runs/<name>-<time>``. If another run started in the same second, the path exists. Then -2, -3, ... is
    added to its name.

    Raises:
        NotADirectoryError: ``runs`` is a file.
        OSError: the directory cannot be created.
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

    ``model.name``, ``optimizer.name`` and ``training.seed`` are checked too. The name of a nested config, such as
    ``data``, stands for all its fields. A path other than ``output`` may change if its last part stays the same,
    because a file or directory may have been moved. In this case, a message is printed. For a new run
    (``resume`` is None), nothing is checked.
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
    """The ``Run`` of a directory, for ``jaxlm.training.loop.train``.

    Its checkpoints contain the configuration and the versions of jaxlm and JAX. If ``training.tracker`` is set, the run
    has this tracker, which is closed when the process ends.

    A resumed run writes ``config.json`` after it has restored its state. So the next ``--resume`` uses the changed
    options even if this run is killed. If the run fails before it has restored its state, the file does not change.

    If a resumed run has further steps, the result files in the directory (:data:`RESULT_FILES`) do not describe its
    final weights. They are renamed to ``NAME.step-N``, where N is the step from which the run continues.

    Args:
        parent: as in :func:`prepare_run`. A resumed run also writes the ``config.json`` of the parent directory, and
            also renames the result files of the parent directory.
    """
    config, tracker_name = config_lib.to_json(experiment), experiment.training.tracker
    meta = {"experiment": config, "jaxlm": jaxlm.__version__, "jax": jax.__version__}
    has_tracker = tracker_name is not None and processes.is_first()
    trackers = (make_tracker(tracker_name, directory, config),) if has_tracker else ()
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
    resume_directory = None if parent is None else directory.parent
    return Run(directory, meta, is_resumed, trackers, on_start if is_resumed else None, resume_directory)


def export(directory: Path, model: Model, result: Result, tokenizer: Tokenizer | None = None) -> bool:
    """If the run finished, write ``model/`` (Hugging Face layout) and ``loss.png``. Returns whether the run finished.

    If a finished run is resumed without further steps, the directory has old files with samples and attention maps.
    They are deleted, because the caller may not write all of these files again.
    """
    if result.interrupted is not None:
        return False
    save_pretrained(directory / "model", model, result.params, tokenizer=tokenizer)
    if processes.is_first():
        for name in (SAMPLES, ATTENTION, "attention.png"):
            (directory / name).unlink(missing_ok=True)
        metrics = directory / METRICS
        if panels := training_panels(read_if_exists(read_metrics, metrics, [])):
            save_png(panels, directory / "loss.png")
        else:
            print_once(f"{metrics} has no metrics: there are no loss curves")
    return True


def with_steps_of_epochs(config: T, epochs: float | None, steps_per_epoch: int) -> T:
    """``config`` with the number of steps of ``epochs`` passes over the training split, rounded to whole steps.

    Args:
        epochs: number of passes, which may be a fraction; None returns ``config`` unchanged.

    Raises:
        ValueError: the rounded number of steps is 0.
    """
    if epochs is None:
        return config
    steps = round(epochs * steps_per_epoch)
    if steps < 1:
        raise ValueError(
            f"epochs={epochs:g} with {steps_per_epoch} steps per epoch gives less than one step: increase epochs"
        )
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

    If the run has attention maps, ``attention.png`` shows the first two of them.

    Args:
        task: name of the task, for example ``translation``.
        start_time: ``time.perf_counter()`` at the start of the run in this process. The reported duration also contains
            ``result.earlier_seconds``.
        scores: a sequence of ``jaxlm.metrics.Score``.
        result: result of the training. ``results.json`` contains its last step (``steps``), its number of compilations
            and its speed. If the weights are those of an earlier step (``restore_best``), it also contains this step
            (``best_step``).
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
    measured = {name: round(value, 1) for name, value in speed.items() if math.isfinite(value)}  # NaN: not measured
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

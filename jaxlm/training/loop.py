"""The training loop: it runs steps and evaluations, writes metrics and checkpoints, and handles signals.

The training step itself is a pure function (``jaxlm.training.trainer``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import config as config_lib
from jaxlm import integrity, json_files, processes, spec
from jaxlm.checkpoint import Checkpointer, CorruptCheckpointError
from jaxlm.data import Batches
from jaxlm.models import Model
from jaxlm.objectives.batch import Loss, count_examples_and_tokens
from jaxlm.sharding import cpu_sharding
from jaxlm.spec import Params
from jaxlm.training import nt_asgd
from jaxlm.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxlm.training.progress import ProgressBar
from jaxlm.training.report import MetricsFile
from jaxlm.training.trackers import Tracker
from jaxlm.training.trainer import SPIKE_WINDOW, Metrics, Trainer, TrainState, check_step_settings, to_global_batch

METRICS_DELAY_STEPS = 2
"""The host reads metrics this many steps late, so that it does not wait for a step that it has just dispatched.

It reads the metrics of all dispatched steps only after the first step, before each evaluation and checkpoint, and at
the end.
"""

EARLY_STEPS = 10
"""Metrics of this many steps after the start or a resume are always written, regardless of ``log_every``."""

EvaluateFunction = Callable[[Any], Mapping[str, float]]
"""A function from the parameters of a model to its validation metrics, for example an ``Evaluator``.

The metrics must include ``loss`` (for :attr:`Result.validation_loss`) and ``TrainingConfig.best_metric``.
"""


MAX_ROWS_OR_BATCHES = 2**20
"""Maximum of ``batch_size``, and of ``evaluation_batches`` in experiments. With larger numbers, the host could run out
of memory."""


def check_rows_or_batches(**counts: int) -> None:
    """Raise ``ValueError`` if one of the named numbers exceeds :data:`MAX_ROWS_OR_BATCHES`."""
    for name, count in counts.items():
        if count > MAX_ROWS_OR_BATCHES:
            raise ValueError(f"{name}={count} is too large: the largest number is {MAX_ROWS_OR_BATCHES}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Number of steps, batch size, evaluations and checkpoints of a training run.

    The data determine the batch size, and the trainer determines ``grad_accum_steps``, ``cpu_devices``, ``ema_decay``
    and ``spike_deviations``. If one of these fields does not have its default value, :func:`train` requires that the
    data or the trainer has the same value. :meth:`trainer` makes a trainer with the values of the config.
    """

    steps: int = 1000
    """Number of training steps."""
    batch_size: int = 32
    """Sequences per batch, over all devices. With length buckets, batches of short sequences may have more
    sequences."""
    grad_accum_steps: int = 1
    """Number of micro-batches per batch. They are computed one after the other to save memory, and their gradients are
    summed."""
    cpu_devices: int = 1
    """On a CPU: number of devices into which JAX divides the processor. More devices than cores are not useful. Each
    device computes the loss and the gradients of its rows of a batch. With one device per core, some models train
    faster than with one device that uses all cores (chess on two cores: 1.4 times as fast), and others do not. Dropout,
    batch normalization and router losses are computed for the rows of each device."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights. The average is evaluated and exported instead of the
    weights. None: no average."""
    evaluate_every: int = 250
    """Steps between evaluations. The last step is evaluated too."""
    best_metric: str = "loss"
    """Validation metric by which the best checkpoint is selected."""
    best_mode: Literal["min", "max"] = "min"
    """min: lower values of best_metric are better. max: higher values are better."""
    restore_best: bool = False
    """At the end, use the weights of the best evaluation instead of the last weights. Each new best evaluation saves a
    checkpoint."""
    patience: int | None = None
    """Stop after this many evaluations in a row without an improvement of best_metric; None never stops early."""
    checkpoint_every: int | None = 250
    """Steps between checkpoints. The last step is saved too. None: no checkpoints are saved."""
    keep_last: int = 2
    """Number of newest checkpoints to keep, in addition to the best checkpoint."""
    on_corrupt: Literal["stop", "previous"] = "stop"
    """Action if the newest checkpoint of a resumed run is damaged. stop: end with an error. previous: rename it and
    continue from the newest intact checkpoint before it."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    spike_deviations: float | None = None
    """Skip the update of a step whose loss is more than this many standard deviations above the mean of the last 128
    losses of steps that were not skipped. The rule applies when at least 64 such losses exist. OLMo-core uses 6. None:
    an update is skipped only if the loss or the gradient is not finite."""
    max_skipped_in_a_row: int = 10
    """After this many skipped steps in a row, go back to a checkpoint (max_rollbacks), or stop with an error."""
    max_rollbacks: int = 0
    """Maximum number of rollbacks. After max_skipped_in_a_row skipped steps, or if the weights are not finite, the run
    goes back to its newest scheduled checkpoint and leaves out the batches since then, as in PaLM (Chowdhery et al.
    2022, section 5.1). A carried model state is then reset. A checkpoint does not count as scheduled if only a signal
    caused it, or if the update of its step was skipped. 0: the run stops with an error instead."""
    seed: int = 0
    """Seed of the initial weights and of dropout. In the modules in ``experiments/``, also of the order of the data."""

    def __post_init__(self) -> None:
        config_lib.check_choices(self)
        for name, value in config_lib.numbers_of(self):
            if isinstance(value, int) and name not in ("ema_decay", "spike_deviations", "seed"):
                config_lib.check_min(0 if name == "max_rollbacks" else 1, **{name: value})
        check_rows_or_batches(batch_size=self.batch_size)
        check_step_settings(self.grad_accum_steps, self.ema_decay, self.spike_deviations)
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps} does not divide batch_size={self.batch_size}")
        if self.batch_size % (self.cpu_devices * self.grad_accum_steps):
            raise ValueError(
                f"cpu_devices={self.cpu_devices} does not divide the {self.batch_size // self.grad_accum_steps} rows "
                "of a micro-batch (batch_size / grad_accum_steps): change one of them"
            )
        for name in ("restore_best", "max_rollbacks"):
            if getattr(self, name) and self.checkpoint_every is None:
                raise ValueError(f"{name}={getattr(self, name)} needs checkpoints: set checkpoint_every")
        config_lib.check_numbers(self)

    def trainer(
        self, model: Model, optimizer: OptimizerConfig | optax.GradientTransformation, loss: Loss, **options: Any
    ) -> Trainer:
        """The ``Trainer`` with the settings of this config.

        Args:
            optimizer: any Optax optimizer, or a config. With a config, ``make_optimizer`` makes the optimizer for
                ``steps`` updates, and the metrics contain the learning rate.
            options: further fields of ``Trainer``, for example ``sharding`` or ``adaptation``.

        Raises:
            ValueError: ``make_optimizer`` does not accept the config; ``Trainer`` does not accept the loss; or with
                ``cpu_devices`` above 1: a ``sharding`` is given, there are several processes, or JAX does not have
                this number of CPU devices (``cpu_sharding``).
        """
        if self.cpu_devices > 1:
            if options.get("sharding") is not None or jax.process_count() > 1:
                raise ValueError(
                    f"cpu_devices={self.cpu_devices} has its own mesh over the CPU devices of one process: set it to "
                    "1, or train in one process without another mesh"
                )
            options |= {"sharding": cpu_sharding(self.cpu_devices), "shard_map": True}
        if isinstance(optimizer, OptimizerConfig):
            adaptation = options.get("adaptation")
            specs = model.specs if adaptation is None else adaptation.specs(model.specs)
            options = {"learning_rate": learning_rate(optimizer, self.steps), **options}
            optimizer = make_optimizer(optimizer, specs, self.steps)
        return Trainer(
            model, optimizer, loss, grad_accum_steps=self.grad_accum_steps, ema_decay=self.ema_decay,
            spike_deviations=self.spike_deviations, **options,
        )  # fmt: skip


def _check_config(config: TrainingConfig, trainer: Trainer, data: Batches) -> None:
    """Raise ``ValueError`` if a field has neither its default value nor the value of ``trainer`` or ``data``."""

    def check(name: str, actual: Any, explanation: str) -> None:
        value = getattr(config, name)
        if value not in (getattr(TrainingConfig, name), actual):
            raise ValueError(f"the config has {name}={value}, but {explanation}")

    for name in ("grad_accum_steps", "ema_decay", "spike_deviations"):
        actual = getattr(trainer, name)
        check(name, actual, f"the trainer has {name}={actual}: make the trainer with config.trainer(...)")
    devices = trainer.sharding.mesh.size if trainer.sharding is not None and trainer.shard_map else 1
    check(
        "cpu_devices", devices,
        f"the trainer uses {devices} device(s) with shard_map: make the trainer with config.trainer(...)",
    )  # fmt: skip
    rows = data.source.batch_size
    check("batch_size", rows, f"the data have batches of {rows} rows: set batch_size={rows}, or make other batches")


RESERVED_KEYS = ("data", "training", "model", "evaluation", "validation")
"""Keys of the values that the training loop saves in a checkpoint, in addition to the values in ``Run.meta``."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The directory of a training run, and whether to resume it.

    Attributes:
        directory: the directory of ``metrics.jsonl`` and ``checkpoints/``. A string is converted to a path.
        meta: JSON values that are saved in every checkpoint. No key may be in :data:`RESERVED_KEYS`.
        resume: whether to continue from the newest checkpoint in the directory, if there is one. With the same settings
            on the same number of devices, the result is bitwise the same as without the interruption.
        trackers: loggers that also receive the metrics.
        on_start: ``on_start(step, trains)``, which the first process calls once, after the directory has been locked
            and the state has been initialized or restored. It is not called if the start fails. ``step`` is the step of
            the state. ``trains`` is True if further steps follow.
        resume_directory: the directory that messages tell the user to pass to ``--resume``. It differs from
            ``directory`` if the run is a part of a larger experiment, such as a fold of a cross-validation. None:
            ``directory``.

    Raises:
        ValueError: a key of ``meta`` is reserved.
        TypeError: a value of ``meta`` is not a JSON value.
    """

    directory: Path
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resume: bool = False
    trackers: tuple[Tracker, ...] = ()
    on_start: Callable[[int, bool], None] | None = None
    resume_directory: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))
        object.__setattr__(self, "resume_directory", Path(self.resume_directory or self.directory))
        if reserved := [key for key in RESERVED_KEYS if key in self.meta]:
            raise ValueError(
                f"meta has the key {reserved[0]!r}, which is reserved for values of the training loop: rename it"
            )
        json_files.require_json(dict(self.meta), "meta")


class DivergedError(RuntimeError):
    """Training stopped because too many steps in a row were skipped, or because the weights were not finite.

    ``step`` is the step whose metrics show the divergence.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of :func:`train`.

    Attributes:
        state: the last state, or the state of the best evaluation (``restore_best``).
        params: the parameters of the model for evaluation and export (``Trainer.model_params``).
        step: the step of ``state``.
        validation: metrics of the last evaluation, or of the best evaluation (``restore_best``); None if interrupted.
        interrupted: the signal that ended the run (``SIGINT``, ``SIGTERM``), or None.
        seconds_to_first_loss: seconds from the call of :func:`train` until the first loss is on the host, including
            compilation; NaN if no step was run.
        tokens_per_second: tokens that the model read per second. The first step and the first step after each
            evaluation or rollback are excluded. The time of saving checkpoints is included. NaN if no step remains.
        examples_per_second: examples per second, measured over the same steps; NaN if no step remains.
        compilations: number of distinct batch shapes in this process. The step was compiled once for each shape.
        tokens: number of tokens that the model has read up to the last step, including the tokens before a resume.
        earlier_seconds: seconds that earlier processes of a resumed run spent in :func:`train`, up to the checkpoint
            from which this process continued.
        rollbacks: how often the run went back to a checkpoint (``TrainingConfig.max_rollbacks``).
        last_step: the last step of the run. ``step`` may be an earlier step (``restore_best``).
        signal: a signal that arrived during or after the last step of a run without checkpoints, or None. Such a run
            finishes, because otherwise its result would be lost. The caller should save the result and then end.
    """

    state: TrainState = dataclasses.field(repr=False)
    params: Any = dataclasses.field(repr=False)
    step: int
    validation: Mapping[str, float] | None
    interrupted: str | None
    seconds_to_first_loss: float
    tokens_per_second: float
    examples_per_second: float
    compilations: int
    tokens: int = 0
    earlier_seconds: float = 0.0
    rollbacks: int = 0
    last_step: int = 0
    signal: str | None = None

    @property
    def validation_loss(self) -> float | None:
        """The metric ``loss`` of :attr:`validation` (a mean in nats), or None if ``validation`` is None."""
        return None if self.validation is None else self.validation["loss"]


def train(
    trainer: Trainer,
    data: Batches,
    evaluate: EvaluateFunction,
    config: TrainingConfig,
    run: Run,
    params: Params | None = None,
) -> Result:
    """Train a model, write ``metrics.jsonl`` and ``checkpoints/`` to the directory of the run, and return the result.

    Only one run at a time may train in a directory. If a resumed run has reached its last step or has stopped early
    (``config.patience``), the function returns the result in the run's checkpoint without further steps. If this
    checkpoint has no validation metrics, it is evaluated.

    With several processes, every process calls this function with its own rows in ``data``. The mesh must contain the
    devices of all processes. If the run saves checkpoints, all processes must use the same directory on a shared file
    system. The first process writes ``metrics.jsonl``. A signal to one process ends all processes.

    Args:
        trainer: model, optimizer and loss (``config.trainer(...)`` creates a trainer).
        data: iterator over the batches of the objective.
        evaluate: a function that computes validation metrics from the model's parameters.
        config: steps, evaluations, checkpoints and the reaction to divergence.
        run: the directory, and whether to resume.
        params: initial parameters; None initializes them at random.

    Raises:
        DivergedError: training diverged (:class:`DivergedError`), and the run could not go back to a checkpoint: it has
            no scheduled checkpoint, or has already gone back ``config.max_rollbacks`` times.
        FileExistsError: the directory has checkpoints, ``run.resume`` is False, and ``config.checkpoint_every`` is set.
        BlockingIOError: another process trains in the directory.
        CorruptCheckpointError: the newest checkpoint of a resumed run (with ``config.on_corrupt="previous"``: each of
            its checkpoints) is damaged.
        OSError: the disk is full, or the directory is not writable.
        ValueError: the trainer or the data contradict a field of the config (:class:`TrainingConfig`).
        ValueError: the checkpoint of a resumed run is beyond ``config.steps``; its data, its model, the arrays of its
            optimizer, ``best_metric`` or ``best_mode`` differ from those of this call; or either the checkpoint or this
            call has an average of the weights (``ema_decay``), but not both.
        ValueError: ``evaluate`` does not return ``config.best_metric``.
        ValueError: there are several processes without ``trainer.sharding``, or several processes that save
            checkpoints without a shared directory.
        TypeError: ``evaluate`` does not return a dict of numbers.
    """
    if trainer.sharding is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes without a mesh would each train a separate model: pass a sharding "
            f"over all {jax.device_count()} devices"
        )
    _check_config(config, trainer, data)
    directory = run.directory
    directory.mkdir(parents=True, exist_ok=True)
    if config.checkpoint_every is not None:
        assert run.resume_directory is not None  # set by __post_init__
        processes.require_shared_directory(directory, run.resume_directory)
    checkpointer = Checkpointer(directory / "checkpoints", keep_last=config.keep_last)
    lock = integrity.lock_directory(directory) if processes.is_first() else contextlib.nullcontext()
    with lock, checkpointer as checkpoints, _Signals() as signals:
        loop = _Loop(trainer, data, evaluate, config, run, checkpoints, signals)
        loop.start(params)
        devices = 1 if trainer.sharding is None else trainer.sharding.mesh.size
        with ProgressBar(config.steps, loop.step, devices) as bar:
            return loop.run(bar)


@dataclasses.dataclass
class _History:
    """The evaluations of a run up to a step. A checkpoint has these values as ``evaluation``."""

    best_metric: str
    best_mode: str
    best: float | None = None  # of best_metric; negated if higher values are better
    without_improvement: int = 0  # number of evaluations since the best
    # The validation losses until NT-ASGD starts to average; empty with other optimizers.
    losses: list[float] = dataclasses.field(default_factory=list)


class _Loop:
    """The state of a running :func:`train`."""

    def __init__(
        self, trainer: Trainer, data: Batches, evaluate: EvaluateFunction, config: TrainingConfig, run: Run,
        checkpoints: Checkpointer, signals: _Signals,
    ) -> None:  # fmt: skip
        self._start_time = time.perf_counter()
        self._trainer, self._data, self._evaluate, self._config = trainer, data, evaluate, config
        self._run, self._checkpoints, self._signals = run, checkpoints, signals
        self._jitted_model_params = jax.jit(trainer.model_params)
        self._jit_step = trainer.jit_step()
        self._batch_shapes: set[Any] = set()
        self._metrics_file = MetricsFile(run.directory / "metrics.jsonl")
        self._trackers = run.trackers if processes.is_first() else ()
        self._validation: Mapping[str, float] | None = None  # None: this step has not been evaluated
        self._history = _History(config.best_metric, config.best_mode)
        self._batch_offset = data.state()["next"]  # step i reads batch i - 1 + this number
        self._tokens = 0
        self._rollbacks = 0
        self._earlier_seconds = 0.0
        self._checkpoint_postponed = False  # whether a checkpoint was due while steps were skipped
        self._schedule_notice: str | None = None
        self.step = 0

    def start(self, params: Params | None) -> None:
        """Initialize the state, or restore it from a checkpoint."""
        self._abstract_state = self._checkpoint_state(self._trainer.abstract(params))
        self._checkpoints.remove_leftovers()
        existing = [*self._checkpoints.steps(), *self._checkpoints.damaged()]
        if self._run.resume and existing:
            self._restore()
        else:
            if existing and self._config.checkpoint_every is not None:
                raise FileExistsError(
                    f"{self._checkpoints.directory} has checkpoints of another run: choose another directory, or "
                    "resume that run"
                )
            self._state = self._trainer.init(jax.random.key(self._config.seed), params)
        if self.step > self._config.steps:
            raise ValueError(
                f"the checkpoint is of step {self.step}, beyond training.steps={self._config.steps}: set "
                f"training.steps to at least {self.step}"
            )
        if self._run.on_start is not None and processes.is_first():
            self._run.on_start(self.step, not self._is_complete())
        # Readers of the file ignore records before "started", and records of steps after `self.step` before "resumed".
        if self._run.resume or not self._metrics_file.is_empty():
            self._write_record(self.step, event="resumed" if self._run.resume else "started")

    def _restore(self) -> None:
        """Restore the state of the newest checkpoint. The errors are those of :func:`train`."""
        try:
            state, saved = self._checkpoints.restore(self._abstract_state, on_corrupt=self._config.on_corrupt)
        except CorruptCheckpointError:
            raise
        except ValueError:
            # The arrays do not match the target. If a setting has changed, raise the error of this setting instead.
            meta = self._checkpoints.meta()
            self._require_same_run(meta)
            self._data.restore(meta["data"])
            raise
        self._require_same_run(saved)
        self._data.restore(saved["data"])
        training = saved["training"]
        self._batch_offset, self._rollbacks = training["batches_left_out"], training["rollbacks"]
        self._earlier_seconds = training["seconds"]
        self._resume_from(state, saved)
        saved_rate, rate = training["learning_rate"], self._learning_rate()
        if saved_rate is not None and rate is not None and not math.isclose(saved_rate, rate, rel_tol=1e-5):
            self._schedule_notice = (
                f"step {self.step}: the next learning rate is {rate:.6g}, and it was {saved_rate:.6g} when this "
                "checkpoint was saved: the schedule or its number of steps has changed"
            )

    def _model_params(self, state: TrainState) -> Any:
        """The parameters for evaluation and export. With ``shard_map``, these are the copies on one device."""
        params = self._jitted_model_params(state)
        return jax.tree.map(lambda x: x.addressable_data(0), params) if self._trainer.shard_map else params

    def _is_complete(self) -> bool:
        """Whether no further step follows, because this is the last step or the run has stopped early (patience)."""
        return self.step == self._config.steps or self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        return self._config.patience is not None and self._history.without_improvement >= self._config.patience

    def _require_same_run(self, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a setting that must not change in a resumed run differs from its saved value."""
        for name in ("best_metric", "best_mode"):
            _require_same(name, getattr(self._config, name), saved["evaluation"][name])
        decay = self._trainer.ema_decay
        saved_decay = saved["training"].get("ema_decay", decay)  # earlier versions did not save it
        if (decay is None) != (saved_decay is None):
            _require_same("ema_decay", decay, saved_decay)
        saved_model, model = saved["model"], self._model_metadata()
        for name in ("family", "adaptation"):
            _require_same(name, model[name], saved_model[name])
        carries_state = self._trainer.carry_size is not None
        for name, value in saved_model["config"].items():
            may_change = _MAY_CHANGE.fullmatch(name) and not (name == "dtype" and carries_state)
            if name in model["config"] and not may_change:
                _require_same(name, model["config"][name], value)

    def _learning_rate(self) -> float | None:
        """The learning rate of the next update, or None if the trainer has no schedule."""
        schedule = self._trainer.learning_rate
        return None if schedule is None else float(schedule(self.step - int(self._state.skipped)))

    def _model_metadata(self) -> dict[str, Any]:
        model, adaptation = self._trainer.model, self._trainer.adaptation
        return {
            "family": model.family,
            "config": config_lib.to_json(model.config),
            "adaptation": None if adaptation is None else repr(adaptation),
        }

    def _resume_from(self, state: TrainState, saved: Mapping[str, Any]) -> None:
        """Set the training state and the evaluation history to the values in a checkpoint."""
        self.step = int(state.step)
        self._validation, self._history = saved.get("validation"), _History(**saved["evaluation"])
        self._tokens = saved["training"]["tokens"]
        every, skipped = self._config.checkpoint_every, int(state.skipped_in_a_row)
        # Whether a scheduled checkpoint was due at one of the skipped steps directly before this checkpoint.
        self._checkpoint_postponed = every is not None and self.step // every > (self.step - skipped) // every
        self._state = self._restored_state(state, saved)

    def _restored_state(self, state: TrainState, saved: Mapping[str, Any]) -> TrainState:
        """The training state from the state and the metadata of a checkpoint (the inverse of `_checkpoint_state`)."""
        if self._trainer.spike_deviations is None:
            return state
        losses = saved["training"].get("recent_losses", [math.nan] * SPIKE_WINDOW)
        return dataclasses.replace(state, recent_losses=np.array(losses, np.float32))

    @staticmethod
    def _checkpoint_state(state: TrainState) -> TrainState:
        """The state without ``recent_losses``, as it is saved in a checkpoint.

        ``recent_losses`` are saved in the JSON metadata, so that a resumed run may enable or disable the detection of
        spikes."""
        return dataclasses.replace(state, recent_losses=None)

    def run(self, bar: ProgressBar) -> Result:
        """Run all remaining steps and return the result."""
        config, self._bar = self._config, bar
        self._reader = _MetricsReader(self._write_record, bar, config, self._trainer, self.step)
        if self._schedule_notice is not None and self.step < config.steps:
            bar.say(self._schedule_notice)
        if self._run.resume and self.step == 0:
            position = f", with batch {self._batch_offset} of the data" if self._batch_offset else ""
            bar.say(f"there is no checkpoint yet: the run starts from its first step{position}")
        stop: str | None = "complete" if self._is_complete() else None
        if self._run.resume and stop is not None:
            bar.say(f"step {self.step}: the training is complete; its result is read from the checkpoint")
        while self.step < config.steps and stop is None:
            try:
                stop = self._advance()
            except DivergedError as error:
                self._roll_back(error)
        self._reader.flush()
        if (stop == "signal" and self.step < config.steps) or self._result_is_interrupted():
            return self._interrupt()
        return self._finish()

    def _write_record(self, step: int, **record: Any) -> None:
        """Write a record to ``metrics.jsonl``, and its numbers to the trackers."""
        # JSON has no NaN and no infinity, so a value that is not finite is written as null.
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._metrics_file.write(step=step, **record)
        numbers = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def _result_is_interrupted(self) -> bool:
        """Whether the run counts as interrupted because of a signal during or after its last step.

        A run without checkpoints finishes instead, because otherwise its result would be lost.
        """
        return self._config.checkpoint_every is not None and self._signals.stop_now()

    def _interrupt(self) -> Result:
        """Print what is saved, and return the result of the interrupted run."""
        message, directory = "nothing is saved, because checkpoint_every=None", self._run.directory
        if self._config.checkpoint_every is not None:
            message = (
                f"saved step {self.step} in {directory / 'checkpoints'}; --resume "
                f"{self._run.resume_directory} continues from there"
            )
        self._bar.say(f"{self._signals.caught}: {message}")
        return self._result(None, self._signals.caught)

    def _advance(self) -> str | None:
        """Run one step, and the evaluation and the checkpoint that are due after it.

        Returns "signal" or "patience" if the run must end after this step, otherwise None."""
        config, reader = self._config, self._reader
        self._train_step()
        is_last = self.step == config.steps
        evaluated, improved = self.step % config.evaluate_every == 0 or is_last, False
        if evaluated:
            reader.flush()
            improved = self._evaluate_now()
            reader.restart_clock()
        stop = "signal" if self._signals.stop_now() else None
        if stop is None and evaluated and self._is_out_of_patience():
            stop = "patience"
            self._bar.say(
                f"step {self.step}: {config.best_metric} has not improved in {config.patience} evaluations: training "
                "stops"
            )
        if config.checkpoint_every is not None:
            due = self._checkpoint_postponed or self.step % config.checkpoint_every == 0
            scheduled = due or is_last or stop == "patience" or (config.restore_best and improved)
            if scheduled or stop is not None:
                reader.flush()  # raises DivergedError if training has diverged
                # While steps are skipped, the weights do not change, and a checkpoint with the same weights would
                # replace an older checkpoint (keep_last).
                skipping = reader.skipped_in_a_row > 0
                self._checkpoint_postponed = due and skipping
                if not skipping or is_last or stop is not None or (config.restore_best and improved):
                    self._save(unscheduled=skipping or not scheduled, wait=is_last or stop is not None)
        return stop

    def _roll_back(self, error: DivergedError) -> None:
        """Restore the newest scheduled checkpoint, and leave out the batches since then.

        Raises:
            DivergedError: no rollback is left, or there is no scheduled checkpoint.
        """
        allowed = self._config.max_rollbacks
        self._checkpoints.wait()
        # Without checkpoint_every, the directory may have checkpoints of another run.
        saves = self._config.checkpoint_every is not None
        latest = self._checkpoints.latest_scheduled if saves else None
        hint = f"The last scheduled checkpoint is of step {latest}"
        if not saves:
            hint = "The run cannot go back to a checkpoint, because checkpoint_every=None"
        elif latest is None:
            hint = "There is no scheduled checkpoint yet"
        elif allowed == 0:
            hint += "; max_rollbacks=1 would go back to it and leave out the batches since then"
        elif self._rollbacks >= allowed:
            hint += f"; the run has already gone back max_rollbacks={allowed} times"
        if latest is None or self._rollbacks >= allowed:
            raise DivergedError(f"{error}. {hint}", error.step) from error
        del self._state  # two states may not fit in memory
        state, saved = self._checkpoints.roll_back(self._abstract_state)
        # Training continues with the batch that follows the batch of the failed step (`error.step`). `self.step` may be
        # a later step, because metrics are read late.
        next_batch = self._batch_offset + error.step
        self._data.restore({**self._data.state(), "next": next_batch})
        carry_size = self._trainer.carry_size
        if carry_size is not None:  # the next batch does not continue the batches of the checkpoint
            specs, all_rows = self._trainer.model.state_specs(*carry_size), jnp.ones(carry_size[0], bool)
            state = state.replace(model_state=spec.reset(specs, state.model_state, all_rows))
        self._resume_from(state, saved)
        self._batch_offset = next_batch - self.step
        self._rollbacks += 1
        self._reader.forget()
        self._write_record(
            error.step, event="rollback", to_step=self.step, rollbacks=self._rollbacks,
            batches_left_out=self._batch_offset,
        )  # fmt: skip
        self._bar.say(
            f"{error}. Rollback {self._rollbacks} of {allowed}: training continues from step {self.step}, without the "
            f"batches of steps {self.step + 1} to {error.step}"
        )

    def _train_step(self) -> None:
        batch = next(self._data)
        global_batch = to_global_batch(batch, self._trainer.sharding)
        shape = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(global_batch))
        if shape not in self._batch_shapes:
            self._batch_shapes.add(shape)
            if len(self._batch_shapes) > 1:
                count = len(self._batch_shapes)
                self._bar.say(f"step {self.step + 1}: compiling for a new batch shape, number {count}")
        examples, tokens = count_examples_and_tokens(batch)
        # This process has this fraction of the rows of the global batch.
        fraction = jax.tree.leaves(batch)[0].shape[0] / jax.tree.leaves(global_batch)[0].shape[0]
        self._state, metrics = self._jit_step(self._state, global_batch)
        self.step += 1
        self._validation = None
        self._tokens += round(tokens / fraction)
        self._reader.add(self.step, metrics, round(examples / fraction), round(tokens / fraction))

    def _evaluate_now(self) -> bool:
        """Evaluate, log the metrics, and return whether ``best_metric`` has improved."""
        config, history = self._config, self._history
        with self._signals.announce_during(self._bar, f"the evaluation of step {self.step}"):
            values = _as_numbers(self._evaluate(self._model_params(self._state)))
        if config.best_metric not in values:
            raise ValueError(
                f"best_metric={config.best_metric!r} is not among the validation metrics {', '.join(values)}: "
                "choose one of them"
            )
        self._validation = values
        self._write_record(
            self.step, **{f"validation_{name}": value for name, value in values.items()},
            best_metric=config.best_metric, best_mode=config.best_mode,
        )  # fmt: skip
        text = " · ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._bar.say(f"step {self.step}: validation {text}")
        value = self._to_minimize(values[config.best_metric])
        improved = not math.isnan(value) and (history.best is None or value < history.best)
        history.best = value if improved else history.best
        history.without_improvement = 0 if improved else history.without_improvement + 1
        self._start_averaging(values.get("loss", value))
        return improved

    def _start_averaging(self, loss: float) -> None:
        """Start the averaging of NT-ASGD if the validation loss has stopped improving."""
        optimizer = self._state.optimizer
        if not nt_asgd.has_averaging(optimizer) or nt_asgd.has_started(optimizer):
            return
        self._history.losses.append(loss)
        if nt_asgd.should_start_averaging(self._history.losses):
            self._state = dataclasses.replace(self._state, optimizer=nt_asgd.start_averaging(optimizer))
            self._write_record(self.step, event="averaging started")
            self._bar.say(f"step {self.step}: validation has stopped improving, averaging of the parameters starts")

    def _to_minimize(self, value: float) -> float:
        """``value`` of ``best_metric``, negated if higher values are better, so that lower is always better."""
        return value if self._config.best_mode == "min" else -value

    def _save(self, *, unscheduled: bool, wait: bool) -> None:
        """Save a checkpoint; the arguments are ``extra`` and ``wait`` of :meth:`Checkpointer.save`."""
        training: dict[str, Any] = {
            "step": self.step,
            "batches_left_out": self._batch_offset,
            "tokens": self._tokens,
            "rollbacks": self._rollbacks,
            "seconds": self._earlier_seconds + time.perf_counter() - self._start_time,
            "learning_rate": self._learning_rate(),
            "ema_decay": self._trainer.ema_decay,
        }
        if self._state.recent_losses is not None:
            training["recent_losses"] = jax.device_get(self._state.recent_losses).tolist()
        content = {
            **self._run.meta,
            "data": self._data.state(),
            "training": training,
            "model": self._model_metadata(),
            "evaluation": dataclasses.asdict(self._history),
        }
        metric = None
        if self._validation is not None:
            content["validation"] = dict(self._validation)
            metric = self._to_minimize(self._validation[self._config.best_metric])
        state = self._checkpoint_state(self._state)
        # Flush the metrics to the disk before the checkpoint. A run that resumes from the checkpoint does not write the
        # metrics of earlier steps again.
        self._metrics_file.sync()
        self._checkpoints.save(self.step, state, content, metric=metric, extra=unscheduled, wait=wait)

    def _finish(self) -> Result:
        metric, improved = self._config.best_metric, False
        if self._validation is None:  # a resumed run without further steps, whose checkpoint was not evaluated
            improved = self._evaluate_now()
            if self._result_is_interrupted():
                return self._interrupt()
        if self._config.restore_best and not improved:
            reasons = [] if self._checkpoints.best in (None, self.step) else self._restore_best()
            assert self._validation is not None
            value = self._to_minimize(self._validation[metric])
            best = self._history.best
            if best is not None and not value <= best:  # `value` is worse than the best, or NaN
                damaged = "; ".join([*self._checkpoints.damaged().values(), *reasons])
                reason = f"were not saved, or are damaged: {damaged}" if damaged else "were not saved"
                self._bar.say(f"an earlier evaluation had a better {metric}, but its weights {reason}")
        if self._result_is_interrupted():
            return self._interrupt()
        return self._result(self._validation, None, self._signals.caught if self._signals.stop_now() else None)

    def _restore_best(self) -> list[str]:
        """Restore the state of the best saved evaluation. If its arrays are damaged, restore the last state.

        The result is a list with the reason why the best state is damaged; it is empty if this state is not damaged.
        """
        reasons = []
        del self._state  # two states may not fit in memory
        try:
            state, saved = self._checkpoints.restore(self._abstract_state, best=True)
        except CorruptCheckpointError as error:
            reasons.append(str(error))
        if reasons:  # not in the except clause, where the error keeps the damaged arrays in memory
            state, saved = self._checkpoints.restore(self._abstract_state, self.step)
        else:
            self._validation = saved["validation"]
            self._bar.say(
                f"using the weights of step {int(state.step)}, which has the best {self._config.best_metric} of all "
                "saved steps"
            )
        self._state = self._restored_state(state, saved)
        return reasons

    def _result(
        self, validation: Mapping[str, float] | None, interrupted: str | None, late_signal: str | None = None
    ) -> Result:
        state, reader = self._state, self._reader
        return Result(
            state, self._model_params(state), int(state.step), validation, interrupted,
            reader.first_loss_at - self._start_time, reader.tokens_per_second, reader.examples_per_second,
            len(self._batch_shapes), self._tokens, self._earlier_seconds, self._rollbacks, self.step, late_signal,
        )  # fmt: skip


def _as_numbers(metrics: Any) -> dict[str, float]:
    """The metrics of an evaluation, with NumPy and JAX scalars as Python numbers.

    Raises:
        TypeError: ``metrics`` is not a dict of numbers.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"evaluate returned {metrics!r}: return a dict from metric names to numbers")
    for name, value in metrics.items():
        dtype = np.asarray(value).dtype
        is_number = any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))  # also bfloat16
        if np.ndim(value) or not is_number:
            raise TypeError(f"evaluate returned {name}={value!r}: return one number for each metric")
    return {name: float(value) for name, value in metrics.items()}


_MAY_CHANGE = re.compile(r".*dropout.*|(.*_)?init_.*|norm_momentum|dtype|remat|scan_layers|.*_implementation")
"""Fields of a model's config that a resumed run may change, because the trained weights stay valid.

``dtype`` must not change if the trainer carries a model state, because the saved model state may have this dtype.
"""


def _require_same(name: str, value: Any, saved: Any) -> None:
    if value != saved:
        raise ValueError(f"{name}={value} cannot change in a resumed run (saved value: {saved}): set it to {saved}")


class _MetricsReader:
    """Reads metrics :data:`METRICS_DELAY_STEPS` steps late, writes them to records, and detects divergence.

    It writes the metrics of the steps that are multiples of ``log_every``, of the first :data:`EARLY_STEPS` steps, of
    skipped steps and of step ``TrainingConfig.steps``.
    """

    def __init__(
        self, write_record: Callable[..., None], bar: ProgressBar, config: TrainingConfig, trainer: Trainer,
        start_step: int,
    ) -> None:  # fmt: skip
        self._write_record, self._bar, self._start_step = write_record, bar, start_step
        self._config, self._trainer = config, trainer
        self._unread: collections.deque[tuple[int, Metrics, int, int]] = collections.deque()
        self._last_loss = math.nan  # the loss of the last step that was not skipped
        self._last_read: float | None = None  # the time at which metrics were last read
        self._seconds, self._tokens, self._examples = 0.0, 0, 0
        self.first_loss_at = math.nan
        self.skipped_in_a_row = 0  # the value at the last step whose metrics were read

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else math.nan

    @property
    def examples_per_second(self) -> float:
        return self._examples / self._seconds if self._seconds else math.nan

    def add(self, step: int, metrics: Metrics, examples: int, tokens: int) -> None:
        """Add the metrics of a step that was just dispatched, and read metrics that are old enough.

        Args:
            examples: number of examples in the batch of the step.
            tokens: number of tokens in the batch of the step.

        Raises:
            DivergedError: training has diverged.
        """
        self._unread.append((step, metrics, examples, tokens))
        while len(self._unread) > (METRICS_DELAY_STEPS if step > self._start_step + 1 else 0):
            self._read(*self._unread.popleft())

    def flush(self) -> None:
        """Read all metrics that have not been read yet, which waits for the last step. Raises as :meth:`add`."""
        while self._unread:
            self._read(*self._unread.popleft())

    def forget(self) -> None:
        """Discard the metrics that have not been read, because the run goes back to a checkpoint."""
        self._unread.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last read, for example the time of an evaluation, from the measured speed."""
        self._last_read = None

    def _read(self, step: int, metrics: Metrics, examples: int, tokens: int) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if math.isnan(self.first_loss_at):
            self.first_loss_at = now
        if self._last_read is not None:
            self._seconds += now - self._last_read
            self._tokens += tokens
            self._examples += examples
        self._last_read = now
        self.skipped_in_a_row = int(values["skipped_in_a_row"])
        is_early, is_last = step <= self._start_step + EARLY_STEPS, step == self._config.steps
        is_due = step % self._config.log_every == 0 or is_early or is_last
        if is_due or self.skipped_in_a_row:
            if self._trainer.learning_rate is not None:
                updates_before = step - 1 - int(values["skipped"]) + (self.skipped_in_a_row > 0)
                values["learning_rate"] = float(self._trainer.learning_rate(updates_before))
            self._write_record(
                step, **values, tokens=tokens, examples=examples, tokens_per_second=self.tokens_per_second,
                examples_per_second=self.examples_per_second, time=round(time.time(), 3),
            )  # fmt: skip
        rate = self.tokens_per_second
        self._bar.update(step, values["loss"], None if math.isnan(rate) else rate)
        self._check_divergence(step, values)

    def _check_divergence(self, step: int, values: dict[str, float]) -> None:
        details = f"loss {values['loss']}, gradient norm {values['gradient_norm']}, last loss {self._last_loss:.4f}"
        if self.skipped_in_a_row == 1:
            is_finite = math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
            reason = "a loss spike" if is_finite else "a loss or gradient that is not finite"
            self._bar.say(f"step {step}: {reason} ({details}); the update is skipped")
        if self.skipped_in_a_row >= self._config.max_skipped_in_a_row:
            cause = "that is not finite" if self._trainer.spike_deviations is None else "that is not finite, or a spike"
            raise DivergedError(
                f"step {step}: {self.skipped_in_a_row} steps in a row had a loss or gradient {cause} ({details}). "
                "Their updates were skipped, so the weights are those before these steps. Lower the learning rate, "
                "decrease clip_norm, use more warm-up steps, or look at the data of these steps",
                step,
            )
        if not math.isfinite(values["parameter_norm"]):
            problem = "are not finite, although the loss and the gradient were finite"
            hint = "Lower the learning rate, or check the optimizer"
            if self.skipped_in_a_row:  # a skipped step does not change the weights
                problem, hint = "were not finite before this step", "Check the initial parameters"
            raise DivergedError(f"step {step}: the weights {problem} ({details}). {hint}", step)
        if not self.skipped_in_a_row:
            self._last_loss = values["loss"]


class _Signals(contextlib.ExitStack):
    """A context manager that catches the first SIGINT or SIGTERM, so that the loop ends after a complete step.

    The previous handlers handle a second signal. With several processes, a signal to one process ends all processes
    after the same step (``processes.request_end``). If the caller connected the processes without ``processes.run``,
    JAX handles SIGTERM, and this class catches only SIGINT.
    """

    def __init__(self) -> None:
        super().__init__()  # the stack restores the previous handlers
        self.caught: str | None = None
        self._single_process, self._all_must_end = jax.process_count() == 1, False
        self._announce: Callable[[str], None] | None = None

    @contextlib.contextmanager
    def announce_during(self, bar: ProgressBar, task: str) -> Iterator[None]:
        """A context manager for a long task.

        If a signal has arrived before the task or arrives during the task, a message says at once that the run ends
        after the task.

        Args:
            task: a description for the message, for example "the evaluation of step 3".
        """

        def announce(name: str) -> None:
            bar.say(f"{name}: the run ends after {task}; a second signal ends it now, without saving")

        if self.caught is not None:
            announce(self.caught)
        else:
            self._announce = announce
        try:
            yield
        finally:
            self._announce = None

    def stop_now(self) -> bool:
        """Whether to end now. All processes get the same result. The loop must call it after every step."""
        if self._single_process:
            return self.caught is not None
        # must_end_now returns True in only one call. This value is stored, because the loop does not use the result of
        # `stop_now` if the step ends with a rollback. The run then ends after the next step.
        self._all_must_end = self._all_must_end or processes.must_end_now()
        if self._all_must_end and self.caught is None:
            self.caught = signal.SIGTERM.name
        return self._all_must_end

    def __enter__(self) -> _Signals:
        handles_sigterm = self._single_process or processes.is_joined()
        for number in (signal.SIGINT, signal.SIGTERM) if handles_sigterm else (signal.SIGINT,):
            try:
                self.callback(signal.signal, number, signal.signal(number, self._catch))
            except ValueError:  # only the main thread may set signal handlers
                break
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        if not self._single_process:
            processes.request_end()
        self.close()
        if self._announce is not None:
            self._announce(self.caught)

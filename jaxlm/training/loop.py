"""The outer loop: batches in, steps, metrics, evaluations, checkpoints, signals. All effects of training are here."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import processes, spec
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Batches, Window
from jaxlm.models import Model
from jaxlm.sharding import Sharding
from jaxlm.training import step as step_lib
from jaxlm.training.optimizer import Entrywise
from jaxlm.training.progress import Bar
from jaxlm.training.report import MetricsFile

LAG = 2
"""Steps by which metrics are read late, so that the host never waits for a step that it has just started."""

EARLY_STEPS = 10
"""First steps whose metrics are all written, however seldom the rest are."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, on what batches, and what to keep."""

    steps: int = 1000
    """Updates to make."""
    batch_size: int = 32
    """Sequences of a step, over all devices."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    accumulate: int = 1
    """Parts that a batch is cut into, whose gradients are summed one after the other to save memory."""
    average_decay: float | None = None
    """Decay of a moving average of the weights, evaluated and exported instead of them; None keeps none."""
    evaluate_every: int = 250
    """Steps between evaluations."""
    evaluation_batches: int = 20
    """Batches of an evaluation."""
    checkpoint_every: int | None = 250
    """Steps between checkpoints, the last step having one, too; None keeps none: for a run that is only measured."""
    keep_last: int = 2
    """Checkpoints to keep, besides the best one."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    max_skipped_in_a_row: int = 10
    """Stop after this many steps in a row without a finite loss and gradient."""
    layers_apart: bool | None = None
    """Train each layer's parameters as arrays of their own and unroll the loop over layers: a step takes less time, but
    compiling twice as long or more, and on a CPU more memory. None does so on one CPU device (a tenth less time),
    unless remat="full" asks for little memory or the optimizer is not known to be entrywise."""
    seed: int = 0
    """Seed of initial weights, dropout and the order of the data."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = field.default is None or (field.name == "checkpoint_every" and value is None)
            if not optional and field.name != "seed" and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
        if self.average_decay is not None and not 0.0 < self.average_decay < 1.0:
            raise ValueError(f"average_decay={self.average_decay} must be between 0 and 1, or None")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")


class DivergedError(RuntimeError):
    """Training stopped because too many steps in a row had a loss or gradient that was not finite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        state: the last state.
        validation_loss: nats per token after the last step; None when the run was interrupted.
        interrupted: the signal that ended the run (``SIGINT``, ``SIGTERM``), or None.
        seconds_to_first_loss: from the call to the first loss on the host, compilation included.
        tokens_per_second: over the steps after the first.
    """

    state: step_lib.TrainState
    validation_loss: float | None
    interrupted: str | None
    seconds_to_first_loss: float
    tokens_per_second: float


def train(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: step_lib.Loss,
    to_batch: Callable[[Window], Any],
    data: Batches,
    evaluate: Callable[[Any], float],
    config: TrainingConfig,
    run: Path,
    *,
    meta: dict[str, Any],
    resume: bool = False,
    sharding: Sharding | None = None,
    initial: Any = None,
    stream: step_lib.Stream | None = None,
) -> Result:
    """Train and leave ``metrics.jsonl`` and ``checkpoints/`` in ``run``.

    Args:
        loss: an objective's ``loss``.
        to_batch: a window of tokens (host) to the objective's batch.
        evaluate: parameters to validation loss.
        meta: JSON to keep inside every checkpoint, beside the state of ``data``.
        resume: go on from the newest checkpoint in ``run``: bit for bit what would have come without the break, when
            the devices are as many.
        initial: parameters to start from instead of random ones.
        stream: batch rows and tokens remembered, when the batches are consecutive parts of streams
            (``jaxlm.data.Columns``) along which the model carries its state; rows whose window says ``reset``
            start anew.

    In a run of several processes all of them call this, each with its own rows in ``data``, over a mesh of all devices
    and with one directory that all see (without checkpoints, each may have its own). The first writes
    ``metrics.jsonl``; a signal to any ends all.

    Raises:
        DivergedError: ``config.max_skipped_in_a_row`` steps in a row were not finite.
        ValueError: ``config.layers_apart`` is True, and the optimizer not known to be entrywise; or there are several
            processes, and no ``sharding`` or no directory for checkpoints that all of them see.
    """
    begun = time.perf_counter()
    if sharding is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes without a mesh would each train a model of their own: give a sharding "
            f"over all {jax.device_count()} devices"
        )
    averaged = config.average_decay is not None
    apart = _takes_apart(model, optimizer, config, sharding)
    step = step_lib.jit_step(
        model, optimizer, loss, accumulate=config.accumulate, average_decay=config.average_decay, stream=stream,
        sharding=sharding, layers_apart=apart,
    )  # fmt: skip

    def placed(change: Callable[[Any], Any], layers_apart: bool) -> Callable[[Any], Any]:
        place = None
        if sharding is not None:
            place = step_lib.state_sharding(
                model, optimizer, sharding, average=averaged, stream=stream, layers_apart=layers_apart
            )
        return jax.jit(change, out_shardings=place)

    # As checkpoints and callers know a state, however it was trained.
    stacked = placed(spec.restack, layers_apart=False) if apart else lambda state: state

    run.mkdir(parents=True, exist_ok=True)
    if config.checkpoint_every is not None:
        processes.require_shared(run)
    metrics_file = MetricsFile(run / "metrics.jsonl")
    with Checkpointer(run / "checkpoints", keep_last=config.keep_last) as checkpoints, _Signals() as signals:
        if resume:
            target = step_lib.abstract_state(model, optimizer, average=averaged, stream=stream, sharding=sharding)
            state, saved = checkpoints.restore(target)
            data.restore(saved["data"])
            metrics_file.write(event="resumed", step=int(state.step))
        elif initial is not None:
            state = _start_from(model, optimizer, initial, config, stream, sharding)
        else:
            key = jax.random.key(config.seed)
            state = step_lib.init_state(model, optimizer, key, average=averaged, stream=stream, sharding=sharding)
        if apart:
            state = placed(spec.unstack, layers_apart=True)(state)
        start = int(state.step)
        if start >= config.steps:
            raise ValueError(f"nothing to do: step {start} of {config.steps} is reached. Ask for more training.steps")

        with Bar(config.steps, start, 1 if sharding is None else sharding.mesh.size) as bar:
            log = _Log(metrics_file, bar, config, start)
            validation = None
            for number in range(start + 1, config.steps + 1):
                window = next(data)
                state, metrics = step(state, step_lib.place_batch(to_batch(window), sharding))
                log.add(number, metrics)
                stopped = signals.stop_after(number)
                last = number == config.steps or stopped
                if number % config.evaluate_every == 0 or number == config.steps:
                    log.flush()
                    validation = evaluate(state.average if averaged else state.params)
                    metrics_file.write(step=number, validation_loss=validation)
                    bar.say(f"step {number}: validation loss {validation:.4f}")
                    log.restart_clock()
                if config.checkpoint_every is not None and (number % config.checkpoint_every == 0 or last):
                    content = {**meta, "data": data.state()}
                    fresh = validation if number % config.evaluate_every == 0 or number == config.steps else None
                    checkpoints.save(number, stacked(state), content, metric=fresh, wait=last)
                if last:
                    break
            log.flush()
            if stopped and number < config.steps:
                kept = "nothing is saved, as checkpoint_every=None asks"
                if config.checkpoint_every is not None:
                    kept = f"saved step {number} in {run / 'checkpoints'}; --resume {run} goes on from there"
                bar.say(f"{signals.caught}: {kept}")
                return Result(stacked(state), None, signals.caught, log.first_loss_at - begun, log.tokens_per_second)
    return Result(stacked(state), validation, None, log.first_loss_at - begun, log.tokens_per_second)


def _takes_apart(
    model: Model, optimizer: optax.GradientTransformation, config: TrainingConfig, sharding: Sharding | None
) -> bool:
    """Whether the run trains layers apart, as ``config.layers_apart`` says."""
    entrywise = isinstance(optimizer, Entrywise)
    if config.layers_apart is None:
        saves_memory = getattr(model.config, "remat", None) == "full"  # which on a CPU only a loop does
        return entrywise and not saves_memory and sharding is None and jax.default_backend() == "cpu"
    if config.layers_apart and not entrywise:
        raise ValueError(
            "layers_apart=True needs an optimizer to which it is all the same how parameters are gathered in arrays: "
            "take make_optimizer's, wrap yours in jaxlm.training.optimizer.Entrywise, or leave layers_apart at None"
        )
    return config.layers_apart


def _start_from(
    model: Model,
    optimizer: optax.GradientTransformation,
    params: Any,
    config: TrainingConfig,
    stream: step_lib.Stream | None,
    sharding: Sharding | None,
) -> step_lib.TrainState:
    averaged, several = config.average_decay is not None, jax.process_count() > 1

    def copied(x: Any) -> Any:
        local = not isinstance(x, jax.Array) or x.is_fully_addressable
        return np.array(x) if several and local else jnp.array(x, copy=True)

    # The step donates its buffers: the caller's parameters must survive.
    params = jax.tree.map(copied, params)
    carried = None if stream is None else model.init_state(*stream)
    state = step_lib.fresh_state(params, optimizer, jax.random.key(config.seed), average=averaged, carried=carried)
    if sharding is None:
        return state
    place = step_lib.state_sharding(model, optimizer, sharding, average=averaged, stream=stream)
    if several:  # device_put brings typed keys to no device of another process
        return jax.jit(lambda state: state, out_shardings=place)(state)
    return jax.device_put(state, place)


class _Log:
    """Metrics on their way from the device: read :data:`LAG` steps late, written now and then, watched always."""

    def __init__(self, file: MetricsFile, bar: Bar, config: TrainingConfig, start: int) -> None:
        self._file, self._bar, self._config, self._start = file, bar, config, start
        self._waiting: collections.deque[tuple[int, step_lib.Metrics]] = collections.deque()
        self._last_finite = math.nan
        self._clock: tuple[float, int] | None = None
        self._seconds, self._counted = 0.0, 0
        self.first_loss_at = math.nan
        self.tokens_per_second = math.nan

    def add(self, step: int, metrics: step_lib.Metrics) -> None:
        self._waiting.append((step, metrics))
        while len(self._waiting) > (LAG if step > self._start + 1 else 0):
            self._read(*self._waiting.popleft())

    def flush(self) -> None:
        while self._waiting:
            self._read(*self._waiting.popleft())

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation) is not training time."""
        self._clock = None

    def _read(self, step: int, metrics: step_lib.Metrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if math.isnan(self.first_loss_at):
            self.first_loss_at = now
        if self._clock is not None:
            self._seconds += now - self._clock[0]
            self._counted += int(values["weight"])
            self.tokens_per_second = self._counted / self._seconds
        self._clock = (now, step)
        rate = None if math.isnan(self.tokens_per_second) else self.tokens_per_second
        if step % self._config.log_every == 0 or step <= self._start + EARLY_STEPS or step == self._config.steps:
            # JSON has no NaN: a loss that is not finite is written as null, and `skipped` says so.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(step=step, **finite, tokens_per_second=rate, time=round(time.time(), 3))
        self._bar.update(step, values["loss"], rate)
        if values["skipped_in_a_row"] >= self._config.max_skipped_in_a_row:
            raise DivergedError(
                f"step {step}: {values['skipped_in_a_row']:.0f} steps in a row had a loss or gradient that is not "
                f"finite (loss {values['loss']}, gradient norm {values['gradient_norm']}, last finite loss "
                f"{self._last_finite:.4f}). Their updates were skipped, the weights are those before them. Lower the "
                f"learning rate, clip harder, warm up longer, or look at the data of these steps"
            )
        if math.isfinite(values["loss"]):
            self._last_finite = values["loss"]


class _Signals:
    """Catches the first SIGINT or SIGTERM so that the loop can end after a whole step; a second one acts as ever.

    Of several processes, all end after the same step when any of them is signalled (``processes.end_after``): SIGTERM
    is handled there, and SIGINT passed on to it.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._alone = jax.process_count() == 1
        self._before: dict[int, Any] = {}

    def stop_after(self, step: int) -> bool:
        """Whether to end after ``step``: to be asked after every step, and the same in all processes."""
        if self._alone:
            return self.caught is not None
        stop = processes.end_after(step)
        if stop and self.caught is None:
            self.caught = signal.SIGTERM.name
        return stop

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            try:
                self._before[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        self._restore()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

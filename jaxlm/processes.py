"""What the processes of one run tell each other. A run of one process pays nothing for it.

In a run of several, as on a slice of several hosts, all processes execute one program and must make the same calls of
these functions in the same order. What a run leaves on the disk is written by the first process.

:func:`run` joins the processes and makes sure that they end together. Three mechanisms share the work:

- A process that is killed, stopped or unreachable is found by the heartbeats of ``jax.distributed``, which then abort
  every other process from C++ (SIGABRT). ``jaxlm.stderr_relay`` replaces the report of that abort by one line.
- A process that fails, or is told to end at once by a signal, writes the cause to the key-value store of
  ``jax.distributed``. A thread of every process (:class:`_Watch`) reads it once a second and ends its process, also
  where the main thread waits for the others inside a collective operation.
- A process that is done waits for the others, so that a failure of theirs still ends it with an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np

from jaxlm import stderr_relay

LOST_AFTER = 30
"""Seconds without a sign of life after which a process counts as lost."""
JOIN_WITHIN = 300
"""Seconds that a process waits for all others at the start."""

_ENDED = "jaxlm/ended/"  # + number of the process: _DONE, or the cause of its failure
_DONE = "done"
_MISTAKE = 2  # exit status after a mistake of the user
_POLL = 1.0
_GRACE = 1.0  # seconds for the main thread to end by itself after a signal
_ACKNOWLEDGE = 5.0  # seconds that process 0, which has the key-value store, waits for the others to read it
# Errors of a process because another one is gone: what JAX, Gloo and NCCL say.
_CONSEQUENCE = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (closed|reset|refused)|Broken pipe")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _multihost_utils() -> Any:
    """Imported by who needs it: ``import jaxlm`` does not."""
    from jax.experimental import multihost_utils

    return multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What ``make()`` returns in the first process, in every process; nowhere else is it called.

    For what must happen once (a directory is made) or be the same everywhere (a name with the time in it).

    Raises:
        Exception: what ``make`` raised, in the first process.
        RuntimeError: with its message, in the others.
    """
    if jax.process_count() == 1:
        return make()
    multihost_utils = _multihost_utils()
    made, error = "", None
    if is_first():
        try:
            made = make()
        except Exception as raised:  # the others wait: they must hear of it first
            made, error = str(raised), raised
    told = np.frombuffer(made.encode(), np.uint8)
    failed, length = multihost_utils.broadcast_one_to_all(np.array([error is not None, len(told)], np.int32))
    text = np.zeros(length, np.uint8)
    text[: len(told)] = told
    made = bytes(multihost_utils.broadcast_one_to_all(text).astype(np.uint8)).decode()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"the first process failed: {made}")
    return made


def wait(why: str) -> None:
    """Return when every process has called this. ``why`` is in the error, should they call it for different reasons."""
    if jax.process_count() > 1:
        _multihost_utils().sync_global_devices(why)


def request_end() -> None:
    """Make all processes of several end after the same step (:func:`end_after`). For a handler of a first signal."""
    if _watch is None:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it
    else:
        _watch.request_end()


def end_after(step: int) -> bool:
    """Whether all processes of several end after ``step``, because one of them has called :func:`request_end`, or was
    sent SIGTERM: JAX's service against preemption makes them agree. To be asked after every step."""
    end = bool(_multihost_utils().reached_preemption_sync_point(step))
    if end and _watch is not None:
        _watch.agreed = True
    return end


def require_shared(directory: Path) -> None:
    """Make sure that all processes see the first one's ``directory``, which is there.

    Raises:
        ValueError: some do not.
    """
    if jax.process_count() == 1:
        return
    if _watch is not None:
        _watch.resume_from(directory)

    def leave() -> str:
        file, path = tempfile.mkstemp(prefix=".shared-", dir=directory)
        os.close(file)
        return Path(path).name

    left = directory / from_first(leave)
    seen = _multihost_utils().process_allgather(np.array(left.exists())).reshape(-1)
    if is_first():
        left.unlink()
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise ValueError(
            f"process {blind} of {len(seen)} does not see what the first writes to {directory}: name a directory that "
            "all hosts mount, or keep no checkpoints (checkpoint_every=None)"
        )


def on_host(array: Any) -> np.ndarray:
    """The whole array as numpy, in every process, also where its parts are on devices of several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(_multihost_utils().process_allgather(array, tiled=True))
    return np.asarray(array)


# ----------------------------------------------------------------------------------------- ending together


def run(
    program: Callable[[], None],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    lost_after: int = LOST_AFTER,
    join_within: int = JOIN_WITHIN,
) -> None:
    """Join the processes of a run (``jax.distributed``), call ``program``, and return when all processes are done.

    If a process fails, all end with a non-zero status and one line that names the process and the cause. This process
    then ends by ``os._exit``, because the main thread may wait for a process that is gone.

    Args:
        coordinator: ``host:port`` of process 0, the same in all processes. None: JAX finds it, the number of processes
            and the number of this process (TPU, Slurm, Kubernetes, Open MPI).
        lost_after: seconds without a sign of life after which a process counts as lost, and the others end.
        join_within: seconds to wait for all processes at the start.

    Raises:
        SystemExit: the processes could not be joined (status 2), or ended together after a signal.
    """
    global _watch
    me = "this process" if index is None else f"process {index} of {count}"
    where = "of this cluster" if coordinator is None else coordinator
    if coordinator is not None:
        _check_coordinator(coordinator, serve=index == 0)
    relay = _Relay()
    sys.stderr = relay.stderr
    logging.getLogger("absl").addFilter(_is_news)
    relay.after_abort(
        f"{me}: the coordinator {where} did not answer, or not all processes joined, within {join_within} s: check the "
        "address, and that all processes run"
    )
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=lost_after, initialization_timeout=join_within,
            shutdown_timeout_seconds=max(lost_after, 10),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        hint = "" if coordinator else ": give --coordinator, --processes and --process"
        print(f"{me} cannot join the run: {_first_line(error).rstrip('.')}{hint}", file=sys.stderr)
        raise SystemExit(_MISTAKE) from error
    from jax._src import distributed  # its client and counts have no public name; jax.process_count() starts a backend

    state = distributed.global_state
    if state.num_processes == 1:
        program()
        return
    _watch = watch = _Watch(state.client, state.process_id, state.num_processes, lost_after, relay)
    status, cause = 0, ""
    try:
        program()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        cause = f"failed with status {status}: {relay.stderr.last_line}"
        if _CONSEQUENCE.search(cause):
            watch.wait_for_cause()
    except KeyboardInterrupt:
        status, cause = 128 + signal.SIGINT, "got SIGINT"
    except BaseException as error:
        cause, status = f"failed: {type(error).__name__}: {_first_line(error)}", 1
        if _is_consequence(error):
            watch.wait_for_cause()
        traceback.print_exc()
    if status == 0 or watch.ended_by_agreement(status):
        watch.wait_for_all()
        jax.distributed.shutdown()
        if status:
            raise SystemExit(status)
        return
    watch.fail_here(cause, status)


def _check_coordinator(coordinator: str, *, serve: bool) -> None:
    """End with status 2 and one line if ``coordinator`` is no address, or if process 0 cannot serve at its port. JAX
    would crash."""
    host, _, port = coordinator.rpartition(":")
    problem = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problem = f"coordinator {coordinator!r} must be HOST:PORT, with a port from 1 to 65535"
    elif serve:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            problem = f"process 0 cannot serve at port {port} ({reason}): choose another port for all processes"
    if problem:
        print(f"jaxlm.launch: {problem}", file=sys.stderr)
        raise SystemExit(_MISTAKE)


def watched() -> bool:
    """Whether this is one of several processes that :func:`run` has joined."""
    return _watch is not None


def _is_consequence(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, may be due to the end of another process."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and _CONSEQUENCE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is no such error, of which orbax logs a traceback while JAX ends the process."""
    return record.exc_info is None or not _is_consequence(record.exc_info[1])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


class _Stderr(io.TextIOWrapper):
    """Standard error that remembers its last line: the cause, where a program prints an error and returns a status."""

    last_line = ""

    def write(self, text: str) -> int:
        for line in _ESCAPES.sub("", text).splitlines():
            self.last_line = line.strip() or self.last_line
        return super().write(text)


class _Relay:
    """``jaxlm.stderr_relay`` between file descriptor 2 and standard error; Python's own messages go past it."""

    def __init__(self) -> None:
        sys.stderr.flush()
        direct = os.dup(2)
        program = [sys.executable, "-S", "-E", stderr_relay.__file__]
        # A session of its own, so that Ctrl-C does not end it before the process whose last words it prints.
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=direct, start_new_session=True)
        assert process.stdin is not None
        os.dup2(process.stdin.fileno(), 2)
        process.stdin.close()
        self._process = process
        self.stderr = _Stderr(os.fdopen(direct, "wb"), encoding="utf-8", errors="replace", write_through=True)

    def after_abort(self, line: str) -> None:
        """What to print if JAX aborts this process: a line, or nothing."""
        os.write(2, f"\0{line}\n".encode())


class _Watch:
    """A thread that ends this process when another one has failed, or when a signal asks for it.

    Signals are read from a file descriptor: Python's handlers run only in the main thread, which may wait in C++.
    """

    def __init__(self, client: Any, index: int, count: int, lost_after: int, relay: _Relay) -> None:
        self.agreed = False
        self._client, self._index, self._count, self._lost_after = client, index, count, lost_after
        self._relay, self._hint = relay, "start all processes again"
        self._requested = False
        self._ended: dict[int, str] = {}
        self._signals: list[signal.Signals] = []
        self._end_at: float | None = None
        self._ending, self._stopped = threading.Lock(), threading.Event()
        self._announce_lost()
        self._notify_jax = _take_signal_from_jax(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _terminate)
        self._wakeup, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="jaxlm-processes", daemon=True)
        self._thread.start()

    def resume_from(self, directory: Path) -> None:
        """Name the directory of the run in the lines that say how to go on."""
        self._hint = f"start all processes again, with --resume {directory}"
        self._announce_lost()

    def request_end(self) -> None:
        """Tell JAX's service against preemption, which does so for every process."""
        self._requested = True
        self._notify_jax(signal.SIGTERM)

    def ended_by_agreement(self, status: int) -> bool:
        """Whether ``status`` is that of a run that one signal has ended, in all processes after the same step."""
        return self.agreed and len(self._signals) < 2 and status in (128 + signal.SIGINT, 128 + signal.SIGTERM)

    def wait_for_all(self) -> None:
        """Return when all processes are done. If one fails or is lost meanwhile, this process ends."""
        self._tell(_DONE)
        while len(self._ended) < self._count:
            time.sleep(_POLL / 10)
        self._stopped.set()
        self._thread.join()
        self._relay.after_abort("")

    def wait_for_cause(self) -> None:
        """Another process may be gone: the watch, or JAX, ends this one as soon as it knows. Returns if none is."""
        if not self._signals:
            time.sleep(self._lost_after + 2 * _POLL)

    def fail_here(self, cause: str, status: int) -> NoReturn:
        """End this process, whose program has failed, and the others."""
        if self._signals:
            cause, status = self._signalled(), 128 + self._signals[-1]
        self._end(f"process {self._index} {cause}", status)

    def _announce_lost(self) -> None:
        silent = f"was lost (killed, stopped, or not heard of for {self._lost_after} s)"
        me = f"process {self._index} of {self._count}"
        self._relay.after_abort(f"{me} ends: process {{lost}} {silent}; {self._hint}")

    def _watch(self) -> None:
        while not self._stopped.is_set():
            # Every process of a run that is done polls faster: they wait for each other.
            wait = _POLL / 10 if self._index in self._ended else _POLL
            if select.select([self._wakeup], [], [], wait)[0]:
                for number in os.read(self._wakeup, 64):
                    self._signal(number)
            self._read()
            for rank, cause in sorted(self._ended.items()):
                if cause != _DONE and rank != self._index:
                    self._end(cause, 1)
            if self._end_at is not None and time.monotonic() > self._end_at:
                self._end(f"process {self._index} {self._signalled()}", 128 + self._signals[-1])

    def _signal(self, number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        self._signals.append(signal.Signals(number))
        # The training loop has a handler, which requests the end of all and then takes itself away. It has not been
        # called yet if the main thread waits in C++.
        handled = signal.getsignal(number) not in (signal.default_int_handler, _terminate) or self._requested
        if len(self._signals) == 1 and handled:
            self.request_end()
        elif self._end_at is None:
            self._end_at = time.monotonic() + _GRACE

    def _signalled(self) -> str:
        second = " as a second signal, and saved nothing" if len(self._signals) > 1 else ""
        return f"got {self._signals[-1].name}{second}"

    def _read(self) -> None:
        try:
            entries = self._client.key_value_dir_get(_ENDED)
        except jax.errors.JaxRuntimeError:  # process 0 is gone, or stopped: JAX ends this process
            return
        self._ended = {int(key.rpartition("/")[2]): value for key, value in entries}

    def _tell(self, how: str) -> None:
        def tell() -> None:
            try:
                self._client.key_value_set(f"{_ENDED}{self._index}", how, allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                return  # as in _read

        telling = threading.Thread(target=tell, daemon=True)  # no answer comes if process 0 is stopped
        telling.start()
        telling.join(timeout=_ACKNOWLEDGE)

    def _end(self, cause: str, status: int) -> NoReturn:
        self._ending.acquire()  # for ever: one thread ends the process
        self._relay.after_abort("")
        self._tell(cause)
        own = f"process {self._index} "
        what = cause.removeprefix(own) if cause.startswith(own) else f"ends: {cause}"
        with contextlib.suppress(OSError, ValueError):  # a reader that is gone must not keep this process alive
            print(f"process {self._index} of {self._count} {what}; {self._hint}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        until = time.monotonic() + _ACKNOWLEDGE
        while self._index == 0 and time.monotonic() < until and len(self._ended) < self._count:
            self._read()
            time.sleep(_POLL / 10)
        os._exit(status)


_watch: _Watch | None = None


def _take_signal_from_jax(number: int) -> Callable[[int], Any]:
    """JAX's C handler of a signal, which tells its service against preemption of it; the signal itself has its default
    effect again. Python cannot name a handler that was set from C."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    address = libc.signal(number, None)
    if address in (None, 0, 1, ctypes.c_void_p(-1).value):
        raise RuntimeError("jax.distributed handles no SIGTERM: set jax_enable_preemption_service to True")
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

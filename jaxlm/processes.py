"""Communication between the processes of a multi-process run. With one process, these functions do not communicate.

In a run with several processes, for example on a TPU slice with several hosts, all processes run the same program and
must call these functions in the same order. Only :func:`is_first`, :func:`is_joined` and :func:`request_end` may be
called by any process at any time. The first process writes the files of the run, but all processes write the arrays of
checkpoints.

:func:`run` joins the processes and ensures that they end together. There are three cases:

- If a process is killed, stopped or unreachable, ``jax.distributed`` misses its heartbeats and aborts every other
  process from C++ (SIGABRT). ``jaxlm.stderr_relay`` replaces the report of this abort with one line.
- If a process fails, or if a signal ends it before the end of a step, it first writes the cause to the key-value store
  of ``jax.distributed``. A thread in every process (:class:`_Watch`) reads the store once a second. The thread ends its
  process if another process has failed, even while the main thread waits in a collective operation.
- A process that is done waits for the others. If another process fails meanwhile, the waiting process also ends with
  an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
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

USER_ERROR = 2
"""Exit status of a process after a user error."""
LOST_AFTER = 30
"""Seconds without a heartbeat after which a process counts as lost."""
JOIN_WITHIN = 300
"""Seconds that a process waits for all other processes at the start."""

_OUTCOME_PREFIX = "jaxlm/ended/"  # the key ends with the process index; the value is _DONE or the cause of a failure
_DONE = "done"
_POLL_SECONDS = 1.0  # seconds between two reads of the key-value store
_GRACE_SECONDS = 1.0  # seconds that the main thread has to end by itself after a signal
# Process 0 serves the key-value store. After a failure, process 0 waits up to this number of seconds before it ends, so
# that the other processes can read the store. The same limit applies to a write to the store.
_ACKNOWLEDGE_SECONDS = 5.0
# Words in the error messages that JAX, Gloo and NCCL print after another process has ended.
_CONSEQUENCE = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (closed|reset|refused)|Broken pipe")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _multihost_utils() -> Any:
    """The module ``multihost_utils``. It is imported here, so that ``import jaxlm`` does not load this module."""
    from jax.experimental import multihost_utils

    return multihost_utils


def is_first() -> bool:
    """Whether this is the first process (index 0). It prints, and writes all files except the arrays of checkpoints."""
    return jax.process_index() == 0


def call_in_first_process(make: Callable[[], str | None]) -> str:
    """Call ``make`` in the first process only, and return its result in every process ("" for None).

    Use it for an action that must happen once, such as the creation of a directory. Also use it for a value that must
    be equal in all processes, such as a file name that contains the time.

    Raises:
        Exception: in the first process, the error that ``make`` raised.
        RuntimeError: in the other processes, with the message of that error.
    """
    if jax.process_count() == 1:
        return make() or ""
    multihost_utils = _multihost_utils()
    message, error = "", None
    if is_first():
        try:
            message = make() or ""
        except Exception as raised:  # the other processes are waiting, so they must get the message first
            message, error = str(raised), raised
    encoded = np.frombuffer(message.encode(), np.uint8)
    failed, length = multihost_utils.broadcast_one_to_all(np.array([error is not None, len(encoded)], np.int32))
    buffer = np.zeros(length, np.uint8)
    buffer[: len(encoded)] = encoded
    message = bytes(multihost_utils.broadcast_one_to_all(buffer).astype(np.uint8)).decode()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"the first process failed: {message}")
    return message


def barrier(name: str) -> None:
    """Wait until every process has called this function.

    ``name`` must be equal in all processes. It appears in error messages.
    """
    if jax.process_count() > 1:
        _multihost_utils().sync_global_devices(name)


def request_end() -> None:
    """Request that all processes end after the same step: :func:`must_end_now` then returns True in all processes.

    Signal handlers call this function.

    Raises:
        RuntimeError: there is only one process.
    """
    if jax.process_count() == 1:
        raise RuntimeError("request_end needs several processes: with one process, end the loop of your program")
    if _watch is None:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's signal handler makes the request
    else:
        _watch.request_end()


_sync_points = itertools.count(1)


def must_end_now() -> bool:
    """Whether all processes must end now, because one process called :func:`request_end` or received SIGTERM.

    In a run with several processes, call this function after every step. JAX's preemption service chooses one call, the
    same in all processes. Only this call returns True. JAX needs a number that increases with every call. This function
    counts its calls for this purpose, because the step number decreases after a rollback.
    """
    end = bool(_multihost_utils().reached_preemption_sync_point(next(_sync_points)))
    if end and _watch is not None:
        _watch.end_agreed = True
    return end


def require_shared_directory(directory: Path, resume_directory: Path) -> None:
    """Check that all processes see the same ``directory``. It must exist on the host of the first process.

    Later messages about lost or failed processes propose to resume from ``resume_directory``.

    Raises:
        ValueError: a process does not see the files of the first process in ``directory``.
    """
    if jax.process_count() == 1:
        return
    if _watch is not None:
        _watch.set_restart_directory(resume_directory)

    def create_file() -> str:
        file, path = tempfile.mkstemp(prefix=".shared-", dir=directory)
        os.close(file)
        return Path(path).name

    path = directory / call_in_first_process(create_file)
    exists = _multihost_utils().process_allgather(np.array(path.exists())).reshape(-1)
    if is_first():
        path.unlink()
    if not exists.all():
        indices = ", ".join(map(str, np.flatnonzero(~exists)))
        raise ValueError(
            f"process {indices} of {len(exists)} does not see the files of the first process in {directory}: use a "
            "directory that all hosts mount, or save no checkpoints (checkpoint_every=None)"
        )


def gather_to_host(array: Any) -> np.ndarray:
    """The complete array as a NumPy array in every process, even if it is sharded over devices of several processes."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
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

    If a process fails, all processes end with a non-zero status and print one line that names the process and the
    cause. They end with ``os._exit``, because the main thread may wait for a process that has ended. If a process is
    lost, JAX aborts the others, and ``jaxlm.stderr_relay`` prints the line. With one process, the function
    calls ``program``, and an error of ``program`` is raised.

    Args:
        coordinator: ``host:port`` of process 0, equal in all processes. None: JAX detects the coordinator, ``count``
            and ``index`` (on TPU, Slurm, Kubernetes, Open MPI).
        count: number of processes. None: JAX detects it.
        index: index of this process, from 0. None: JAX detects it.
        lost_after: seconds without a heartbeat after which a process counts as lost and the others end.
        join_within: seconds to wait for all processes at the start.

    Raises:
        SystemExit: with status 2, if ``coordinator`` is not an address, process 0 cannot open its port, or JAX raises
            an error when it joins the processes. With status 128 + the signal number, if all processes ended after
            the same step because of a signal.
    """
    global _watch
    process_name = "this process" if index is None else f"process {index} of {count}"
    address = "of this cluster" if coordinator is None else coordinator
    if coordinator is not None:
        _check_coordinator(coordinator, serve=index == 0)
    relay = _Relay()
    sys.stderr = relay.stderr
    logging.getLogger("absl").addFilter(_keep_log_record)
    relay.set_abort_line(
        f"{process_name}: the coordinator {address} did not answer, or not all processes joined, within {join_within} "
        "s: check the address, and that all processes run"
    )
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=lost_after, initialization_timeout=join_within,
            shutdown_timeout_seconds=max(lost_after, 10),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        hint = "" if coordinator else ": give --coordinator, --processes and --process"
        print(f"{process_name} cannot join the run: {_first_line(error).rstrip('.')}{hint}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from error
    # JAX has no public API for the client, and jax.process_count() would initialize a backend.
    from jax._src import distributed

    state = distributed.global_state
    if state.num_processes == 1:
        program()
        return
    _watch = watch = _Watch(state.client, state.process_id, state.num_processes, lost_after, relay)
    status, cause = 0, ""
    try:
        program()
    except SystemExit as exit_error:
        if isinstance(exit_error.code, str):
            print(exit_error.code, file=sys.stderr)
        status = exit_error.code if isinstance(exit_error.code, int) else int(exit_error.code is not None)
        cause = f"failed with status {status}: {relay.stderr.last_line}"
        if status and _CONSEQUENCE.search(cause):
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
    """Print a line and exit with status 2 if ``coordinator`` is not an address, or if its port cannot be opened.

    Without this check, JAX would crash. ``serve``: whether this is process 0, which opens the port.
    """
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
        raise SystemExit(USER_ERROR)


def is_joined() -> bool:
    """Whether :func:`run` has joined this process with others."""
    return _watch is not None


def _is_consequence(error: BaseException | None) -> bool:
    """Whether the end of another process may have caused this error or one of its causes."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and _CONSEQUENCE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Whether to log a record: False for an error that the end of another process may have caused.

    Without this filter, orbax would log the traceback of such an error while JAX ends this process.
    """
    return not record.exc_info or not _is_consequence(record.exc_info[1])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


class _Stderr(io.TextIOWrapper):
    """Standard error that remembers its last line. If a program prints an error and exits, this line is the cause."""

    _complete_line = _begun_line = ""

    @property
    def last_line(self) -> str:
        """The last line that is not empty, without escape sequences. The line may be incomplete."""
        return _ESCAPES.sub("", self._begun_line).strip() or self._complete_line

    def write(self, text: str) -> int:
        *complete, self._begun_line = re.split(r"[\r\n]", self._begun_line + text)
        for line in complete:
            self._complete_line = _ESCAPES.sub("", line).strip() or self._complete_line
        return super().write(text)


class _Relay:
    """Runs ``jaxlm.stderr_relay`` between file descriptor 2 and the original standard error.

    The attribute ``stderr`` writes to the original standard error directly, without the relay.
    """

    def __init__(self) -> None:
        sys.stderr.flush()
        direct = os.dup(2)
        program = [sys.executable, "-S", "-E", stderr_relay.__file__]
        # A new session, so that Ctrl-C does not end the relay before it has printed the last messages of this process.
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=direct, start_new_session=True)
        assert process.stdin is not None
        os.dup2(process.stdin.fileno(), 2)
        process.stdin.close()
        self._process = process
        self.stderr = _Stderr(os.fdopen(direct, "wb"), encoding="utf-8", errors="replace", write_through=True)

    def set_abort_line(self, line: str) -> None:
        """Set the line that the relay prints if JAX aborts this process. If it is empty, the relay prints nothing."""
        os.write(2, f"\0{line}\n".encode())


class _Watch:
    """A thread that ends this process when another process has failed, or after a signal.

    The thread reads signals from a file descriptor. Python's signal handlers are not sufficient, because they run only
    in the main thread, which may be waiting in C++.
    """

    def __init__(self, client: Any, index: int, count: int, lost_after: int, relay: _Relay) -> None:
        self.end_agreed = False
        self._client, self._index, self._count, self._lost_after = client, index, count, lost_after
        self._relay, self._restart_hint = relay, "start all processes again"
        self._end_requested = False
        self._outcomes: dict[int, str] = {}
        self._received_signals: list[signal.Signals] = []
        self._end_deadline: float | None = None
        self._end_lock = threading.Lock()
        self._set_abort_message()
        self._notify_jax = _take_signal_from_jax(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _terminate)
        self._wakeup_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch_loop, name="jaxlm-processes", daemon=True)
        self._thread.start()

    def set_restart_directory(self, directory: Path) -> None:
        """Set the run directory for the message that says how to start all processes again."""
        self._restart_hint = f"start all processes again, with --resume {directory}"
        self._set_abort_message()

    def request_end(self) -> None:
        """Notify JAX's preemption service that all processes must end after the same step."""
        self._end_requested = True
        self._notify_jax(signal.SIGTERM)

    def ended_by_agreement(self, status: int) -> bool:
        """Whether all processes agreed to end after the same step, and ``status`` is that of SIGINT or SIGTERM.

        False after a second signal to this process.
        """
        one_signal = len(self._received_signals) < 2
        return self.end_agreed and one_signal and status in (128 + signal.SIGINT, 128 + signal.SIGTERM)

    def wait_for_all(self) -> None:
        """Wait until all processes are done.

        If another process fails or is lost meanwhile, the watch thread or JAX ends this process.
        """
        self._publish_outcome(_DONE)
        self._thread.join()
        self._relay.set_abort_line("")

    def wait_for_cause(self) -> None:
        """Sleep, so that the watch thread or JAX can end this process if another process has failed or is lost.

        If neither ends this process, return after the time in which a lost process is detected. After a signal, return
        at once.
        """
        if not self._received_signals:
            time.sleep(self._lost_after + 2 * _POLL_SECONDS)

    def fail_here(self, cause: str, status: int) -> NoReturn:
        """End this process because its program has failed. The other processes then end too."""
        if self._received_signals:
            cause, status = self._signal_text(), 128 + self._received_signals[-1]
        self._end_process(f"process {self._index} {cause}", status)

    def _set_abort_message(self) -> None:
        description = f"was lost (killed, stopped, or without a heartbeat for {self._lost_after} s)"
        process_name = f"process {self._index} of {self._count}"
        self._relay.set_abort_line(f"{process_name} ends: process {{lost}} {description}; {self._restart_hint}")

    def _watch_loop(self) -> None:
        while len(self._outcomes) < self._count:
            # A process that is done polls faster, because it only waits for the others.
            wait = _POLL_SECONDS / 10 if self._index in self._outcomes else _POLL_SECONDS
            if select.select([self._wakeup_fd], [], [], wait)[0]:
                for number in os.read(self._wakeup_fd, 64):
                    self._handle_signal(number)
            self._read_outcomes()
            for rank, cause in sorted(self._outcomes.items()):
                if cause != _DONE and rank != self._index:
                    self._end_process(cause, 1)
            if self._end_deadline is not None and time.monotonic() > self._end_deadline:
                self._end_process(f"process {self._index} {self._signal_text()}", 128 + self._received_signals[-1])

    def _handle_signal(self, number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        self._received_signals.append(signal.Signals(number))
        # The signal handler of the training loop calls request_end and then removes itself. While the main thread waits
        # in C++, Python cannot call this handler. So for a first signal, this thread makes the request, too, if the
        # handler is installed, or has already run (a second request has no effect). Otherwise, this thread sets a
        # deadline for the main thread.
        handled = signal.getsignal(number) not in (signal.default_int_handler, _terminate) or self._end_requested
        if len(self._received_signals) == 1 and handled:
            self.request_end()
        elif self._end_deadline is None:
            self._end_deadline = time.monotonic() + _GRACE_SECONDS

    def _signal_text(self) -> str:
        second = " as a second signal, so nothing was saved" if len(self._received_signals) > 1 else ""
        return f"got {self._received_signals[-1].name}{second}"

    def _read_outcomes(self) -> None:
        try:
            entries = self._client.key_value_dir_get(_OUTCOME_PREFIX)
        except jax.errors.JaxRuntimeError:
            return  # process 0, which serves the store, has ended or is stopped, so JAX will end this process
        self._outcomes = {int(key.rpartition("/")[2]): value for key, value in entries}

    def _publish_outcome(self, value: str) -> None:
        """Write the outcome of this process to the key-value store: ``_DONE`` or the cause of its failure."""

        def set_value() -> None:
            try:
                self._client.key_value_set(f"{_OUTCOME_PREFIX}{self._index}", value, allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                return  # process 0 has ended or is stopped, so JAX will end this process

        # Use a thread, because key_value_set never returns if process 0 is stopped (SIGSTOP).
        thread = threading.Thread(target=set_value, daemon=True)
        thread.start()
        thread.join(timeout=_ACKNOWLEDGE_SECONDS)

    def _end_process(self, cause: str, status: int) -> NoReturn:
        self._end_lock.acquire()  # never released, so that only one thread ends the process
        self._relay.set_abort_line("")
        self._publish_outcome(cause)
        prefix = f"process {self._index} "
        message = cause.removeprefix(prefix) if cause.startswith(prefix) else f"ends: {cause}"
        with contextlib.suppress(OSError, ValueError):  # this process must end even if standard error is closed
            line = f"process {self._index} of {self._count} {message}; {self._restart_hint}"
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
        deadline = time.monotonic() + _ACKNOWLEDGE_SECONDS
        while self._index == 0 and time.monotonic() < deadline and len(self._outcomes) < self._count:
            self._read_outcomes()
            time.sleep(_POLL_SECONDS / 10)
        os._exit(status)


_watch: _Watch | None = None


def _take_signal_from_jax(number: int) -> Callable[[int], Any]:
    """Replace JAX's C handler of a signal with the default handler, and return JAX's handler.

    A call of the returned handler notifies JAX's preemption service. ctypes reads the handler, because
    ``signal.getsignal`` returns None for a handler that was set from C.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    address = libc.signal(number, None)
    if address in (None, 0, 1, ctypes.c_void_p(-1).value):
        raise RuntimeError("jax.distributed has no SIGTERM handler: set jax_enable_preemption_service to True")
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

"""Faults in one of several processes: how, when and with which message the other processes end.

Also restarts, and resuming with another number of processes. The processes run this file as their program:
``python -m jaxlm.launch ... tests.faults.test_processes_faults WORK ...``.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import processes
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Batches
from jaxlm.testing.helpers import assert_trees_close
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.report import metric_curve, read_metrics
from tests.test_processes import MESHES, initial_lstm_params, program

pytestmark = pytest.mark.thorough

LOST_AFTER = 6
"""Option ``--lost-after`` of ``jaxlm.launch``, in seconds."""
TIMEOUT = 600
ROOT = Path(__file__).parents[2]
MODULE = "tests.faults.test_processes_faults"


def send_twice(*numbers):
    """Send signals to this process from a thread, while the main thread waits for the other process."""

    def send():
        for number in numbers:
            time.sleep(1.5)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def fail():
    raise OSError("the disk is gone")


def send(number):
    os.kill(os.getpid(), number)


LOST = r"was lost \(killed, stopped, or without a heartbeat for 6 s\)"
# name -> (action of one process at its third batch, exit status of the other processes, maximum seconds until all end,
# cause in their error lines). Status None: JAX aborts the other processes. Signals are sent after 1.5 and 3 seconds.
FAULTS = {
    "error": (fail, 1, 10, "failed: OSError: the disk is gone"),
    "exit status": (lambda: sys.exit("prog: no file x"), 1, 10, "failed with status 1: prog: no file x"),
    "second SIGTERM": (
        lambda: send_twice(signal.SIGTERM, signal.SIGTERM), 1, 13,
        "got SIGTERM as a second signal, so nothing was saved",
    ),
    "second SIGINT": (
        lambda: send_twice(signal.SIGINT, signal.SIGINT), 1, 13, "got SIGINT as a second signal, so nothing was saved",
    ),
    "SIGKILL": (lambda: send(signal.SIGKILL), None, LOST_AFTER + 6, LOST),
    "SIGSTOP": (lambda: send(signal.SIGSTOP), None, LOST_AFTER + 6, LOST),
}  # fmt: skip
CASES = [
    ("error", 0), ("error", 1), ("exit status", 1), ("second SIGTERM", 0), ("second SIGINT", 1), ("SIGKILL", 0),
    ("SIGKILL", 1), ("SIGSTOP", 0), ("SIGSTOP", 1),
]  # fmt: skip


class FaultyBatches(Batches):
    """Batches that cause a fault of one process at the third batch. For a second signal, the other processes wait."""

    def __next__(self):
        name, rank, directory = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
        if self.state()["next"] == 2:
            if jax.process_index() == rank:
                (directory / "fault").touch()
                FAULTS[name][0]()
            elif name.startswith("second"):
                time.sleep(TIMEOUT)
        return super().__next__()


def work_with_fault(name, rank, directory):
    program("fsdp", Path(directory), MESHES["fsdp"], steps=1_000_000, batches=FaultyBatches)


def environment(devices):
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(arguments, count, devices, directory, *options):
    """Start the processes of a run. Their standard error is written to files."""
    command = [sys.executable, "-m", "jaxlm.launch", "--lost-after", str(LOST_AFTER), *options]
    coordinator = f"localhost:{free_port()}"
    started = []
    for index in range(count):
        join_options = ["--coordinator", coordinator, "--processes", str(count), "--process", str(index)]
        with (directory / f"stderr-{index}").open("w") as stderr:
            started.append(
                subprocess.Popen(
                    [*command, *join_options, MODULE, *arguments], cwd=ROOT, env=environment(devices), stderr=stderr
                )
            )
    return started


def end_times(running, indices):
    """Wait for the processes ``indices``. Return their exit statuses and the time when the last one ended."""
    statuses = {}
    until = time.time() + TIMEOUT
    while len(statuses) < len(indices) and time.time() < until:
        for index in indices:
            if running[index].poll() is not None:
                statuses.setdefault(index, running[index].returncode)
        time.sleep(0.05)
    return statuses, time.time()


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_fault_of_one_process_ends_all_processes(name, rank, tmp_path):
    _, status, seconds, cause = FAULTS[name]
    is_lost = name in ("SIGKILL", "SIGSTOP")
    running = start(["fault", name, str(rank), str(tmp_path)], 2, 2, tmp_path)
    ending_indices = [1 - rank] if is_lost else [0, 1]
    try:
        statuses, end_time = end_times(running, ending_indices)
        if name == "SIGSTOP":  # a process that continues after the others have ended must also end
            running[rank].send_signal(signal.SIGCONT)
            assert running[rank].wait(TIMEOUT) != 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    stderr_of = {index: (tmp_path / f"stderr-{index}").read_text() for index in ending_indices}
    all_stderr = "\n\n".join(stderr_of.values())
    assert (tmp_path / "fault").exists(), all_stderr
    seconds_until_end = end_time - (tmp_path / "fault").stat().st_mtime
    hint = f"start all processes again, with --resume {re.escape(str(tmp_path))}"
    for index in ending_indices:
        (line,) = [line for line in stderr_of[index].splitlines() if line.startswith(f"process {index} of 2 ")]
        subject = f"process {index} of 2" if index == rank else f"process {index} of 2 ends: process {rank}"
        assert re.fullmatch(f"{subject} {cause}; {hint}", line)
        assert statuses[index] != 0
        assert index == rank or status in (None, statuses[index])
        assert "stack trace" not in stderr_of[index], all_stderr
        assert "Traceback" not in stderr_of[index] or (name == "error" and index == rank), all_stderr
    if name.startswith("second"):
        assert statuses[rank] == 128 + signal.Signals[name.split()[1]]
    print(f"{name} of process {rank}: statuses {statuses} after {seconds_until_end:.1f} s")
    assert seconds_until_end < seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_join_prints_an_error(rank, tmp_path):
    port = free_port()
    options = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(rank), "--join-within", "3"]
    command = [sys.executable, "-m", "jaxlm.launch", *options, "json.tool"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert process.returncode != 0
    assert process.stderr == (
        f"process {rank} of 2: the coordinator localhost:{port} did not answer, or not all processes joined, within 3 "
        "s: check the address, and that all processes run\n"
    )


# ------------------------------------------------------------------------------ other numbers of processes


SGD = OptimizerConfig(name="sgd", warmup_steps=2, learning_rate=0.5)
"""SGD, because Adam would amplify rounding errors of small gradients."""
KINDS = ("packed", "stream")
PHASES = [(2, 2, "data=2,fsdp=2"), (1, 4, "fsdp=4"), (1, 1, "data=1"), (4, 1, "data=4")]
"""(number of processes, devices per process, mesh). Each phase trains two more steps."""


def work_elastic(phase, directory):
    count, devices, mesh = PHASES[int(phase)]
    for kind in KINDS:
        train_phase(kind, Path(directory) / kind, int(phase), count * devices, mesh)


def train_phase(kind, directory, phase, devices, mesh, *, steps=None):
    steps = steps or 2 * (phase + 1)
    options = {"resume": phase > 0, "devices": devices, "optimizer": SGD, "steps": steps, "evaluate_every": 2}
    return program(kind, directory, mesh, initial=initial_lstm_params() if kind == "stream" else None, **options)[1]


def test_a_run_can_be_resumed_with_other_numbers_of_processes(tmp_path):
    """Change processes and mesh three times, in runs with an EMA and packed documents or a carried state.

    The restored state is bitwise equal to the saved one, because ``Checkpointer.restore`` compares the checksums of
    arrays on their new devices. The following steps are only close, because sums over devices have another order.
    """
    elastic_directory, single_directory = tmp_path / "together", tmp_path / "alone"
    elastic_directory.mkdir()
    steps = 2 * len(PHASES)
    for phase, (count, devices, mesh) in enumerate(PHASES):
        if count == 1:
            for kind in KINDS:
                train_phase(kind, elastic_directory / kind, phase, devices, mesh)
        else:
            started = start(["elastic", str(phase), str(elastic_directory)], count, devices, tmp_path)
            statuses, _ = end_times(started, range(count))
            assert statuses == dict.fromkeys(range(count), 0), (tmp_path / "stderr-0").read_text()
    for kind in KINDS:
        result = train_phase(kind, single_directory / kind, 0, 1, "data=1", steps=steps)
        records = [
            read_metrics(directory / kind / "metrics.jsonl") for directory in (single_directory, elastic_directory)
        ]
        for name in ("weight", "loss", "validation_loss", "gradient_norm"):
            (expected_steps, expected), (actual_steps, actual) = (metric_curve(record, name) for record in records)
            assert actual_steps == expected_steps
            np.testing.assert_allclose(actual, expected, rtol=0.0 if name == "weight" else 1e-6)
        with Checkpointer(elastic_directory / kind / "checkpoints") as checkpoints:
            state, meta = checkpoints.restore(result.state)
        assert (int(state.step), meta["data"]["next"]) == (steps, steps)
        actual, expected = ((state.params, state.ema, state.model_state) for state in (state, result.state))
        differences = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), actual, expected)
        print(f"{kind}: largest difference {max(jax.tree.leaves(differences)):.1e}")
        assert max(jax.tree.leaves(differences)) <= 1e-6


# ------------------------------------------------------------------------------------------------ restarts

KILLS = int(os.environ.get("JAXLM_KILLS", "3"))
"""Number of kills in the test of restarts. 20 kills take half an hour on two cores."""


class SlowBatches(Batches):
    """Batches that take 0.2 seconds, so that a kill can occur between any two steps."""

    def __next__(self):
        time.sleep(0.2)
        return super().__next__()


def work_restarted(steps, option, directory):
    directory = Path(directory)
    if processes.is_first() and option == "--output":
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    processes.barrier("there is a directory")
    program(
        "packed", directory, MESHES["fsdp"], resume=option == "--resume", steps=int(steps), batches=SlowBatches,
        optimizer=SGD, evaluate_every=1000, log_every=1,
    )  # fmt: skip


def running_pids(supervisor):
    """Return a dict from the index of each running process of ``jaxlm launch`` to its process id."""
    pid_of_rank = {}
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if "--process" in words:
                pid_of_rank[int(words[words.index("--process") + 1])] = int(child)
    return pid_of_rank


def wait_for_steps(metrics, supervisor):
    """Wait until the run has written two more metric records, or the supervisor has ended."""

    def num_lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    initial_count = num_lines()
    while num_lines() < initial_count + 2 and supervisor.poll() is None:
        time.sleep(0.1)


def test_restarts_complete_a_run_despite_random_kills(tmp_path):
    """Kill random processes at random times. The run must end with the weights of a run without kills."""
    directory, random = tmp_path / "run", np.random.default_rng(KILLS)
    steps = 20 + 10 * KILLS
    command = f"python -m {MODULE} restarted {steps} --output {directory}"
    with (tmp_path / "stderr").open("w") as stderr:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", "import sys; from jaxlm.cli import main; sys.exit(main())", "launch", "--topology",
             "local:2", "--restarts", str(KILLS), "--lost-after", str(LOST_AFTER), "--command", command],
            cwd=ROOT, env=environment(2), stderr=stderr,
        )  # fmt: skip
    killed = []
    try:
        while len(killed) < KILLS:
            running = running_pids(supervisor.pid)
            assert supervisor.poll() is None, (tmp_path / "stderr").read_text()
            if len(running) == 2 and not set(running.values()) & {process for _, process in killed}:
                if len(killed) % 3:  # without waiting, the kill is during the start or the compilation
                    wait_for_steps(directory / "metrics.jsonl", supervisor)
                time.sleep(random.uniform(0, 6))
                rank = int(random.integers(2))
                os.kill(running[rank], signal.SIGKILL)
                killed.append((rank, running[rank]))
            time.sleep(0.1)
        assert supervisor.wait(TIMEOUT) == 0, (tmp_path / "stderr").read_text()
    finally:
        supervisor.terminate()
        supervisor.wait()
    stderr_text = (tmp_path / "stderr").read_text()
    reported = re.findall(r"jaxlm launch: process (\d) of 2 was ended by SIGKILL; restart (\d+) of", stderr_text)
    assert reported == [(str(rank), str(number)) for number, (rank, _) in enumerate(killed, start=1)]
    _, result = program(
        "packed", tmp_path / "alone", MESHES["fsdp"], steps=steps, optimizer=SGD, evaluate_every=1000, log_every=1
    )
    losses = [
        dict(zip(*metric_curve(read_metrics(path / "metrics.jsonl"), "loss")))
        for path in (directory, tmp_path / "alone")
    ]
    assert list(losses[0]) == list(losses[1]) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-4)
    with Checkpointer(directory / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(result.state)
    assert int(state.step) == steps
    assert_trees_close((state.params, state.ema), (result.state.params, result.state.ema), 1e-4)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    {"fault": work_with_fault, "elastic": work_elastic, "restarted": work_restarted}[sys.argv[1]](*sys.argv[2:])

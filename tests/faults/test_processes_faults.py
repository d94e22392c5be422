"""Faults in one of several processes: how, when and with which message the others end; restarts; other numbers of
processes.

This file is also the program that they run: ``python -m jaxlm.launch ... tests.faults.test_processes_faults WORK ...``.
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
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.report import curve, read_metrics
from tests.helpers import assert_trees_close
from tests.test_processes import MESHES, initial_lstm_params, program

pytestmark = pytest.mark.thorough

LOST_AFTER = 6
"""Seconds, as given to ``jaxlm.launch``."""
PATIENCE = 600
ROOT = Path(__file__).parents[2]
MODULE = "tests.faults.test_processes_faults"


def send_twice(*numbers):
    """Signals to this process from a thread, while the main thread waits for the other process."""

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
# Name -> what one process does at its third batch, the status of the others (None: they are aborted by JAX), seconds
# after which all have ended, and the cause in their lines. Signals come 1.5 and 3 seconds after the third batch.
FAULTS = {
    "error": (fail, 1, 10, "failed: OSError: the disk is gone"),
    "exit status": (lambda: sys.exit("prog: no file x"), 1, 10, "failed with status 1: prog: no file x"),
    "second SIGTERM": (
        lambda: send_twice(signal.SIGTERM, signal.SIGTERM), 1, 13, "got SIGTERM as a second signal, and saved nothing",
    ),
    "second SIGINT": (
        lambda: send_twice(signal.SIGINT, signal.SIGINT), 1, 13, "got SIGINT as a second signal, and saved nothing",
    ),
    "SIGKILL": (lambda: send(signal.SIGKILL), None, LOST_AFTER + 6, LOST),
    "SIGSTOP": (lambda: send(signal.SIGSTOP), None, LOST_AFTER + 6, LOST),
}  # fmt: skip
CASES = [
    ("error", 0), ("error", 1), ("exit status", 1), ("second SIGTERM", 0), ("second SIGINT", 1), ("SIGKILL", 0),
    ("SIGKILL", 1), ("SIGSTOP", 0), ("SIGSTOP", 1),
]  # fmt: skip


class Faulty(Batches):
    """Batches at whose third one process has a fault. The others stop reading if it is a second signal."""

    def __next__(self):
        name, rank, directory = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
        if self.state()["next"] == 2:
            if jax.process_index() == rank:
                (directory / "fault").touch()
                FAULTS[name][0]()
            elif name.startswith("second"):
                time.sleep(PATIENCE)
        return super().__next__()


def work_with_fault(name, rank, directory):
    program("fsdp", Path(directory), MESHES["fsdp"], steps=1_000_000, batches=Faulty)


def environment(devices):
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(arguments, count, devices, directory, *options):
    """Processes of a run, whose standard error goes to files."""
    command = [sys.executable, "-m", "jaxlm.launch", "--lost-after", str(LOST_AFTER), *options]
    coordinator = f"localhost:{free_port()}"
    running = []
    for index in range(count):
        joining = ["--coordinator", coordinator, "--processes", str(count), "--process", str(index)]
        with (directory / f"stderr-{index}").open("w") as stderr:
            running.append(
                subprocess.Popen(
                    [*command, *joining, MODULE, *arguments], cwd=ROOT, env=environment(devices), stderr=stderr
                )
            )
    return running


def end_times(running, indices):
    """Status of each of these processes, and when the last of them ended."""
    statuses = {}
    until = time.time() + PATIENCE
    while len(statuses) < len(indices) and time.time() < until:
        for index in indices:
            if running[index].poll() is not None:
                statuses.setdefault(index, running[index].returncode)
        time.sleep(0.05)
    return statuses, time.time()


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_fault_of_one_process_ends_all(name, rank, tmp_path):
    _, status, seconds, cause = FAULTS[name]
    lost = name in ("SIGKILL", "SIGSTOP")
    running = start(["fault", name, str(rank), str(tmp_path)], 2, 2, tmp_path)
    ending = [1 - rank] if lost else [0, 1]
    try:
        statuses, ended = end_times(running, ending)
        if name == "SIGSTOP":  # what continues after the others have ended does not go on alone
            running[rank].send_signal(signal.SIGCONT)
            assert running[rank].wait(PATIENCE) != 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    said = {index: (tmp_path / f"stderr-{index}").read_text() for index in ending}
    everything = "\n\n".join(said.values())
    assert (tmp_path / "fault").exists(), everything
    took = ended - (tmp_path / "fault").stat().st_mtime
    hint = f"start all processes again, with --resume {re.escape(str(tmp_path))}"
    for index in ending:
        (line,) = [line for line in said[index].splitlines() if line.startswith(f"process {index} of 2 ")]
        who = f"process {index} of 2" if index == rank else f"process {index} of 2 ends: process {rank}"
        assert re.fullmatch(f"{who} {cause}; {hint}", line)
        assert statuses[index] != 0
        assert index == rank or status in (None, statuses[index])
        assert "stack trace" not in said[index], everything
        assert "Traceback" not in said[index] or (name == "error" and index == rank), everything
    if name.startswith("second"):
        assert statuses[rank] == 128 + signal.Signals[name.split()[1]]
    print(f"{name} of process {rank}: statuses {statuses} after {took:.1f} s")
    assert took < seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_others_in_vain_says_so(rank, tmp_path):
    port = free_port()
    joining = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(rank), "--join-within", "3"]
    command = [sys.executable, "-m", "jaxlm.launch", *joining, "json.tool"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode != 0
    assert ended.stderr == (
        f"process {rank} of 2: the coordinator localhost:{port} did not answer, or not all processes joined, within 3 "
        "s: check the address, and that all processes run\n"
    )


# ------------------------------------------------------------------------------ other numbers of processes


PLAIN = OptimizerConfig(name="sgd", warmup_steps=2, learning_rate=0.5)
"""Adam would divide the rounding of small gradients by their size."""
KINDS = ("packed", "stream")
PHASES = [(2, 2, "data=2,fsdp=2"), (1, 4, "fsdp=4"), (1, 1, "data=1"), (4, 1, "data=4")]
"""Processes, devices of each, and the mesh of two more steps."""


def work_elastic(phase, directory):
    count, devices, mesh = PHASES[int(phase)]
    for what in KINDS:
        elastic(what, Path(directory) / what, int(phase), count * devices, mesh)


def elastic(what, directory, phase, devices, mesh, *, steps=None):
    steps = steps or 2 * (phase + 1)
    options = {"resume": phase > 0, "devices": devices, "optimizer": PLAIN, "steps": steps, "evaluate_every": 2}
    return program(what, directory, mesh, initial=initial_lstm_params() if what == "stream" else None, **options)[1]


def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    """Runs with a moving average, packed documents or a carried state change processes and meshes three times.

    A restored state is bit for bit the one that was saved: ``Checkpointer.restore`` compares the checksums of its
    arrays on their new devices. Sums over devices are rounded in another order, so the steps after it are only close.
    """
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    steps = 2 * len(PHASES)
    for phase, (count, devices, mesh) in enumerate(PHASES):
        if count == 1:
            for what in KINDS:
                elastic(what, together / what, phase, devices, mesh)
        else:
            running = start(["elastic", str(phase), str(together)], count, devices, tmp_path)
            statuses, _ = end_times(running, range(count))
            assert statuses == dict.fromkeys(range(count), 0), (tmp_path / "stderr-0").read_text()
    for what in KINDS:
        result = elastic(what, alone / what, 0, 1, "data=1", steps=steps)
        records = [read_metrics(directory / what / "metrics.jsonl") for directory in (alone, together)]
        for name in ("weight", "loss", "validation_loss", "gradient_norm"):
            (at, want), (also, got) = (curve(record, name) for record in records)
            assert also == at
            np.testing.assert_allclose(got, want, rtol=0.0 if name == "weight" else 1e-6)
        with Checkpointer(together / what / "checkpoints") as checkpoints:
            state, meta = checkpoints.restore(result.state)
        assert (int(state.step), meta["data"]["next"]) == (steps, steps)
        got, want = ((state.params, state.ema, state.model_state) for state in (state, result.state))
        differences = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), got, want)
        print(f"{what}: largest difference {max(jax.tree.leaves(differences)):.1e}")
        assert max(jax.tree.leaves(differences)) <= 1e-6


# ------------------------------------------------------------------------------------------------ restarts

KILLS = int(os.environ.get("JAXLM_KILLS", "3"))
"""Kills in the test of restarts; 20 take half an hour on two cores."""


class Slow(Batches):
    """Batches that take a while, so that a kill can fall between any two steps."""

    def __next__(self):
        time.sleep(0.2)
        return super().__next__()


def work_restarted(steps, option, directory):
    directory = Path(directory)
    if processes.is_first() and option == "--output":
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    processes.wait("there is a directory")
    program(
        "packed", directory, MESHES["fsdp"], resume=option == "--resume", steps=int(steps), batches=Slow,
        optimizer=PLAIN, evaluate_every=1000, log_every=1,
    )  # fmt: skip


def ranks_of(supervisor):
    """Number of each process of ``jaxlm launch`` that runs -> its process id."""
    found = {}
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if "--process" in words:
                found[int(words[words.index("--process") + 1])] = int(child)
    return found


def wait_for_steps(metrics, supervisor):
    """Return when the run has written two more lines."""

    def lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    before = lines()
    while lines() < before + 2 and supervisor.poll() is None:
        time.sleep(0.1)


def test_restarts_survive_kills_at_random_moments(tmp_path):
    """Random processes are killed at random moments. The run ends, with the weights of a run that nobody disturbed."""
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
            running = ranks_of(supervisor.pid)
            assert supervisor.poll() is None, (tmp_path / "stderr").read_text()
            if len(running) == 2 and not set(running.values()) & {process for _, process in killed}:
                if len(killed) % 3:  # else the kill falls into the start or the compilation
                    wait_for_steps(directory / "metrics.jsonl", supervisor)
                time.sleep(random.uniform(0, 6))
                rank = int(random.integers(2))
                os.kill(running[rank], signal.SIGKILL)
                killed.append((rank, running[rank]))
            time.sleep(0.1)
        assert supervisor.wait(PATIENCE) == 0, (tmp_path / "stderr").read_text()
    finally:
        supervisor.terminate()
        supervisor.wait()
    said = (tmp_path / "stderr").read_text()
    announced = re.findall(r"jaxlm launch: process (\d) of 2 was ended by SIGKILL; restart (\d+) of", said)
    assert announced == [(str(rank), str(number)) for number, (rank, _) in enumerate(killed, start=1)]
    _, result = program(
        "packed", tmp_path / "alone", MESHES["fsdp"], steps=steps, optimizer=PLAIN, evaluate_every=1000, log_every=1
    )
    losses = [
        dict(zip(*curve(read_metrics(path / "metrics.jsonl"), "loss"))) for path in (directory, tmp_path / "alone")
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

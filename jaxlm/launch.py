"""Scripts that run a command on rented machines, and multi-process runs on this machine.

:func:`script` returns a bash script for the user to read and run. The script installs the last commit of this
checkout (without uncommitted changes), runs a command on every host, and fetches the results of the first host, even
if the command fails. The script creates a TPU at its start, and deletes it at its end, even after a failure. A GPU node
must already exist. jaxlm never executes the script.

:func:`run_local` runs a command in several processes on this machine, and can restart them after a failure.

    python -m jaxlm.launch [--coordinator HOST:PORT --processes N --process I] MODULE ARGUMENTS

This command is one process of a run with several processes. It joins the other processes (``jax.distributed``), runs
the module, and ends together with them (``processes.run``). The script for several hosts runs this command on each
host. :func:`run_local` starts it once per process. On TPU, Slurm, Kubernetes and Open MPI, JAX finds the other
processes. On other systems, the three options are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jaxlm import host, processes
from jaxlm.command_line import Parser
from jaxlm.config import check_min
from jaxlm.devices import TPU_SHAPES


@dataclasses.dataclass(frozen=True)
class _TpuGeneration:
    """A TPU generation: its names in the ``gcloud`` command line, and the sizes of its slices."""

    type_prefix: str
    """Prefix of the accelerator type, for example v5litepod."""
    type_units_per_chip: int
    """Factor from chips to the number in an accelerator type: 1 if the type counts chips, 2 if it counts cores."""
    runtime_version: str
    """Version of the TPU software on the hosts (``--version`` of ``gcloud``)."""
    num_dimensions: int
    """Number of dimensions of a topology, for example 2 for 4x4."""
    max_single_host_chips: int
    """Number of chips in the largest slice that has only one host."""


_TPUS = {
    "v4": _TpuGeneration("v4", 2, "tpu-ubuntu2204-base", 3, 4),
    "v5e": _TpuGeneration("v5litepod", 1, "v2-alpha-tpuv5-lite", 2, 8),
    "v5p": _TpuGeneration("v5p", 2, "v2-alpha-tpuv5", 3, 4),
    "v6e": _TpuGeneration("v6e", 1, "v2-alpha-tpuv6e", 2, 8),
}
_RESULTS = "results"
_TPU_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def script(
    topology: str,
    command: Sequence[str] | None = None,
    *,
    zone: str | None = None,
    name: str = "jaxlm",
    host: str | None = None,
    spot: bool = False,
) -> str:
    """A bash script that runs ``command`` (``python -m MODULE ...``) on ``topology``.

    At the end, even if the command fails, the script copies the directory ``results`` from the first host to this
    machine. If all other steps succeed, the exit status of the script is that of the command.

    Args:
        topology: generation and shape of a new TPU slice, such as ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2`` or
            ``v4:2x2x1``; or ``gpu``, an existing machine. ``jaxlm.devices.TPU_SHAPES`` lists the shapes of v5e and
            v6e. The script passes only the number of chips to Google Cloud, which chooses the shape of the slice.
        command: the words of the command. None: the training benchmark on one host. On several hosts, None trains a
            model as large as GPT-2, because the benchmarks run only on one host.
        zone: Google Cloud zone of the TPU. Required for a TPU, and not allowed for ``gpu``.
        name: name of the new TPU.
        host: ``user@machine`` of a GPU node. Required for ``gpu``, and not allowed for a TPU.
        spot: whether to use a spot TPU, which costs less and may be stopped at any time.

    Raises:
        ValueError: the topology is unknown or has a shape that does not exist, the command does not start with
            ``python -m`` and a module, the command is a benchmark on several hosts, the name is not valid for a TPU, or
            an argument is missing or has no effect.
    """
    is_default = command is None
    if command is None:
        command = ["python", "-m", "benchmarks.training", "--against", "", "--json", f"{_RESULTS}/training.json"]
    _check_command(command)
    if topology == "gpu":
        if host is None or zone is not None or spot or name != "jaxlm":
            raise ValueError(
                "topology 'gpu' is an existing node: it needs --host user@machine, and no zone, name or spot"
            )
        return _gpu_script(host, command)
    kind, _, shape = topology.partition(":")
    if kind not in _TPUS or not re.fullmatch("x".join([r"[1-9]\d*"] * _TPUS[kind].num_dimensions), shape):
        examples = ", ".join(f"{kind}:{'x'.join('2' * tpu.num_dimensions)}" for kind, tpu in _TPUS.items())
        raise ValueError(f"unknown topology {topology!r}: choose one such as {examples}, or gpu")
    if shape not in TPU_SHAPES.get(kind, [shape]):
        raise ValueError(f"topology {topology!r}: a {kind} has one of the shapes {', '.join(TPU_SHAPES[kind])}")
    if zone is None or host is not None:
        raise ValueError(f"topology {topology!r} is a new TPU: it needs --zone, such as us-central1-a, and no host")
    if not _TPU_NAME.fullmatch(name):
        raise ValueError(
            f"name={name!r} must have only a-z, 0-9 and hyphens, start with a letter, and not end with a hyphen"
        )
    chips = math.prod(int(size) for size in shape.split("x"))
    multi_host = chips > _TPUS[kind].max_single_host_chips
    if multi_host and command[2].startswith("benchmarks."):
        if not is_default:
            raise ValueError(
                f"{command[2]} measures the devices of one process, and {topology} has several hosts: train a model on "
                f"all of its {chips} chips (python -m experiments.text_generation --mesh data={chips} ...)"
            )
        command = _gpt2_command(chips)
    return _tpu_script(_TPUS[kind], chips, multi_host, command, zone, name, spot)


def _check_command(command: Sequence[str]) -> None:
    if list(command[:2]) != ["python", "-m"] or len(command) < 3:
        raise ValueError(f"the command must be python -m MODULE ..., got {shlex.join(command) or 'nothing'}")


def _gpt2_command(chips: int) -> list[str]:
    """A command that trains a model as large as GPT-2 with 8 x 1024 tokens per chip and step.

    The padded vocabulary has about the size of GPT-2's. The run saves no checkpoints, so the hosts need no shared
    directory.
    """
    return shlex.split(
        f"python -m experiments.text_generation --mesh data={chips} --output {_RESULTS}/gpt2 --tokenizer byte "
        "--model.set num_layers=12 num_heads=12 embed_dim=768 vocab_multiple=50304 dtype=bfloat16 "
        "embedding_dropout=0.0 attention_dropout=0.0 residual_dropout=0.0 "
        f"--training.sequence-length 1024 --training.batch-size {8 * chips} "
        "--training.steps 200 --training.evaluation-batches 2 "
        "--training.checkpoint-every None --optimizer.learning-rate 6e-4"
    )


def _tpu_script(
    tpu: _TpuGeneration, chips: int, multi_host: bool, command: Sequence[str], zone: str, name: str, spot: bool
) -> str:
    is_wrapped = command[2] == "jaxlm.launch"
    wrapped_command = ["python", "-m", "jaxlm.launch", *command[2:]] if multi_host and not is_wrapped else command
    quoted_zone = shlex.quote(zone)
    ssh = f"gcloud compute tpus tpu-vm ssh {name} --zone={quoted_zone} --worker=all --command"
    spot_option = " --spot" if spot else ""
    accelerator_type = f"{tpu.type_prefix}-{chips * tpu.type_units_per_chip}"
    # These commands are quoted below, so that the local shell passes each one to the hosts as one argument.
    # The images of Google Cloud with Ubuntu 22.04 have Python 3.10, which is too old for jaxlm.
    install_command = (
        "if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python3 -m venv venv; "
        "else python3 -m pip install -q --user uv && python3 -m uv venv -q --seed --python 3.12 venv; fi && "
        "venv/bin/pip install -q -e './jaxlm[tpu,test]'"
    )
    run_command = f"cd jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/venv/bin:$PATH {shlex.join(wrapped_command)}"
    return f"""#!/usr/bin/env bash
# {chips} chips on {"several hosts" if multi_host else "one host"}, charged until this script ends. Run it in a checkout
# of jaxlm. The Google Cloud command line must be logged in to a project that has quota for these chips.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
if gcloud compute tpus tpu-vm describe {name} --zone={quoted_zone} >/dev/null 2>&1; then
    echo "the TPU {name} already exists: delete it, or choose another --name" >&2
    exit 1
fi
trap 'rm -f jaxlm.tar; gcloud compute tpus tpu-vm delete {name} --zone={quoted_zone} --quiet' EXIT
gcloud compute tpus tpu-vm create {name} --zone={quoted_zone} --accelerator-type={accelerator_type} \\
    --version={tpu.runtime_version}{spot_option}
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
gcloud compute tpus tpu-vm scp jaxlm.tar {name}: --zone={quoted_zone} --worker=all
{ssh} 'tar xf jaxlm.tar'
{ssh} {shlex.quote(install_command)}
status=0
{ssh} {shlex.quote(run_command)} || status=$?
gcloud compute tpus tpu-vm scp --recurse {name}:jaxlm/{_RESULTS} . --zone={quoted_zone} --worker=0 || [ $status -ne 0 ]
exit $status
"""


def _gpu_script(host: str, command: Sequence[str]) -> str:
    quoted_host = shlex.quote(host)
    install_command = (
        "rm -rf jaxlm-run/jaxlm && mkdir -p jaxlm-run && tar xf jaxlm-run.tar -C jaxlm-run && "
        "python3 -m venv jaxlm-run/venv && jaxlm-run/venv/bin/pip install -q -e './jaxlm-run/jaxlm[cuda13,test]'"
    )
    run_command = (
        f"cd jaxlm-run/jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/jaxlm-run/venv/bin:$PATH {shlex.join(command)}"
    )
    return f"""#!/usr/bin/env bash
# One node with NVIDIA GPUs, a driver for CUDA 13 and Python 3.11 or newer. Run it in a checkout of jaxlm. The script
# replaces ~/jaxlm-run/jaxlm on the node.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
trap 'rm -f jaxlm.tar' EXIT
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
scp jaxlm.tar {quoted_host}:jaxlm-run.tar
ssh {quoted_host} {shlex.quote(install_command)}
status=0
ssh {quoted_host} {shlex.quote(run_command)} || status=$?
scp -r {quoted_host}:jaxlm-run/jaxlm/{_RESULTS} . || [ $status -ne 0 ]
exit $status
"""


# ----------------------------------------------------------------------------------------- processes on this machine


def run_local(command: Sequence[str], count: int, *, restarts: int = 0, lost_after: int = processes.LOST_AFTER) -> int:
    """Run ``command`` (``python -m MODULE ...``) in ``count`` processes on this machine and return the exit status.

    If a process ends with an error, is killed or is lost, all processes are ended. They are then started again with
    ``--resume``, up to ``restarts`` times. If the run has not written its ``config.json`` yet, the same command is
    started again, without ``--resume``. There is no restart after a user error (status 2) or after a signal to this
    process. SIGINT and SIGTERM are forwarded to the processes, and SIGHUP is forwarded as SIGTERM.

    Args:
        restarts: maximum number of restarts.
        lost_after: seconds without a heartbeat after which a process counts as lost. No effect if ``count`` is 1,
            because a single process is started without ``jax.distributed``.

    Raises:
        ValueError: a number is too small, or the command does not start with ``python -m`` and a module. If
            ``restarts`` is not 0, also: the command has no run directory (``--output`` or ``--resume``), the directory
            of a new run is not empty, or the directory of a resumed run has no ``config.json``.
    """
    _check_command(command)
    check_min(1, processes=count, lost_after=lost_after)
    check_min(0, restarts=restarts)
    module, arguments = command[2], list(command[3:])
    directory = None
    if restarts:
        options, _ = _run_options(arguments)
        if (name := options.resume or options.output) is None:
            raise ValueError("--restarts needs a run directory: add --output DIRECTORY to the command")
        directory = Path(name)
        if options.resume is not None:
            if not (directory / "config.json").exists():
                raise ValueError(f"--resume {directory}: there is no config.json, so this is not a run: choose a run")
        elif directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty: choose another --output, or use --resume {directory}")
    received_signals: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):  # SIGHUP
            # The shell and the kernel may both send SIGHUP, and a second signal would end the run without saving.
            signal.signal(number, signal.SIG_IGN)
            if received_signals:  # the run is already ending
                return
            number = signal.SIGTERM
        received_signals.append(number)

    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signals.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, receive) for number in signals}
    try:
        for attempt in range(restarts + 1):
            status, cause = _run_once(module, arguments, count, lost_after, received_signals)
            if status in (0, processes.USER_ERROR) or received_signals:
                break
            next_action = "no restarts are left"
            if directory is not None and attempt < restarts:
                arguments = _resume_arguments(arguments, directory)
                next_action = (
                    f"restart {attempt + 1} of {restarts}, from the last checkpoint in {directory} "
                    "(from the beginning if there is none)"
                )
            print(f"jaxlm launch: {cause}; {next_action}", file=sys.stderr, flush=True)
        return status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_GRACE_SECONDS = 10.0  # seconds after the first failure in which the other processes may end by themselves


def _run_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options ``--preset``, ``--recipe``, ``--output`` and ``--resume`` of a command, and its other arguments.

    An option is None if it is not given or has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "recipe", "output", "resume"):
        parser.add_argument(f"--{name}", nargs="?")  # without nargs, a missing value would end the process
    return parser.parse_known_args(arguments)


def _resume_arguments(arguments: Sequence[str], directory: Path) -> list[str]:
    """The arguments that resume the run in ``directory``. Without ``config.json``, they start the run again."""
    # config.json is missing if the run was killed early, or if the command never writes this file. A command that never
    # writes it must resume its run when it is started again with the same arguments.
    if not (directory / "config.json").exists():
        return list(arguments)
    _, others = _run_options(arguments)  # config.json already contains the preset and the recipe
    return [*others, "--resume", str(directory)]


def _run_once(
    module: str, arguments: Sequence[str], count: int, lost_after: int, received_signals: list[int]
) -> tuple[int, str]:
    """Run all processes once. Return the exit status and a description of the first failure."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        coordinator = f"localhost:{free_port.getsockname()[1]}"
    options = f"--coordinator {coordinator} --processes {count} --lost-after {lost_after} --process".split()
    children = []
    for index in range(count):
        join = ["jaxlm.launch", *options, str(index)] if count > 1 else []
        # Each child has its own session, so that Ctrl-C sends SIGINT only to the parent, which forwards it once.
        command = [sys.executable, "-m", *join, module, *arguments]
        children.append(subprocess.Popen(command, start_new_session=True))
    first_failure: tuple[int, str] | None = None
    num_forwarded = 0  # number of received signals that were forwarded to the children
    deadline = math.inf
    try:
        while True:
            for number in received_signals[num_forwarded:]:
                for process in children:
                    process.send_signal(number)
            num_forwarded = len(received_signals)
            statuses = [process.poll() for process in children]
            if first_failure is None and any(statuses):
                first_failure = _first_failure(statuses)
                deadline = time.monotonic() + _GRACE_SECONDS
            if None not in statuses or time.monotonic() > deadline:
                if processes.USER_ERROR in statuses:  # the other processes failed because of this user error
                    index = statuses.index(processes.USER_ERROR)
                    return processes.USER_ERROR, f"process {index} of {count} ended with status {processes.USER_ERROR}"
                return first_failure or (0, "")
            time.sleep(0.1)
    finally:
        for process in children:
            process.kill()
            process.wait()


def _first_failure(statuses: Sequence[int | None]) -> tuple[int, str]:
    """The exit status and a description of one failed process.

    A process that a signal ended is chosen first, because its end makes the other processes fail. For this process, the
    exit status is 128 + the signal number.
    """
    status, index = min((status, index) for index, status in enumerate(statuses) if status)
    process = f"process {index} of {len(statuses)}"
    if status < 0:
        return 128 - status, f"{process} was ended by {signal.Signals(-status).name}"
    return status, f"{process} ended with status {status}"


def main(arguments: Sequence[str]) -> None:
    """Join the processes of a run, then run a module as ``python -m`` does."""
    parser = Parser("python -m jaxlm.launch", allow_abbrev=False)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, equal in all processes")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    parser.add_argument(
        "--lost-after", type=int, metavar="SECONDS", default=processes.LOST_AFTER,
        help="time without a heartbeat after which a process counts as lost (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--join-within", type=int, metavar="SECONDS", default=processes.JOIN_WITHIN,
        help="time in which all processes must have started (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("module", help="module to run, as for python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the module")
    options = parser.parse_args(arguments)
    cluster = (options.coordinator, options.processes, options.process)
    if None in cluster and cluster != (None, None, None):
        parser.error("--coordinator, --processes and --process must be given together or not at all")
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    if options.process is not None and not 0 <= options.process < options.processes:
        parser.error(f"--process {options.process} must be from 0 to {options.processes - 1} (--processes - 1)")
    for name in ("lost_after", "join_within"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least one second")
    try:
        # A relative module name cannot be resolved, because it has no package here.
        exists = not options.module.startswith(".") and importlib.util.find_spec(options.module) is not None
    except ModuleNotFoundError as error:  # a package of the module is missing, or imports a missing module
        exists = error.name is None or not f"{options.module}.".startswith(f"{error.name}.")
    except ValueError:  # an empty name
        exists = False
    if not exists:
        parser.error(f"no module is called {options.module!r}: write it as for python -m, e.g. experiments.chess")

    host.select_cpu_without_accelerators()  # before the processes join

    def program() -> None:
        sys.argv = [options.module, *options.arguments]
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)

    processes.run(program, *cluster, lost_after=options.lost_after, join_within=options.join_within)


if __name__ == "__main__":
    main(sys.argv[1:])

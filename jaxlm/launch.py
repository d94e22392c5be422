"""Scripts that run a command on rented machines, and multi-process runs on this machine.

:func:`script` returns a bash script for the user to read and run. The script creates the machine, installs this
checkout, runs a command on every host, fetches the results, and deletes the machine even after a failure. jaxlm never
executes it. :func:`run_local` runs a command in several processes on this machine, and restarts them after a failure.

    python -m jaxlm.launch [--coordinator HOST:PORT --processes N --process I] MODULE ARGUMENTS

The script runs this command on each host of a slice. It joins the hosts (``jax.distributed``), runs the module, and
ends all processes together (``processes.run``). On TPU, Slurm and Kubernetes, JAX finds the other processes. On other
systems, the three options are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from jaxlm import processes


@dataclasses.dataclass(frozen=True)
class _Generation:
    """A TPU generation in the terms of Google's command line."""

    type: str
    """Prefix of the accelerator type."""
    per_chip: int
    """Units per chip in an accelerator type: 1 for types that count chips, 2 for types that count cores."""
    runtime: str
    """Name of the runtime version."""
    dimensions: int
    """Number of dimensions of a topology."""
    largest_host: int
    """Chips of the largest slice with one host."""


_TPUS = {
    "v4": _Generation("v4", 2, "tpu-ubuntu2204-base", 3, 4),
    "v5e": _Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", 2, 8),
    "v5p": _Generation("v5p", 2, "v2-alpha-tpuv5", 3, 4),
    "v6e": _Generation("v6e", 1, "v2-alpha-tpuv6e", 2, 8),
}
_RESULTS = "results"
_SAFE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


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

    The script copies the files that the command writes to ``results/`` into ``results/`` on this machine.

    Args:
        topology: ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2``, ``v4:2x2x1``; or ``gpu``, an existing machine.
        command: None measures training. On one host it runs the training benchmark. On several hosts it trains a GPT
            of the size of GPT-2, because the benchmarks run on one host only.
        zone: Google Cloud zone of the TPU.
        name: name of the new TPU.
        host: ``user@machine`` of a GPU node.
        spot: whether to use a spot machine, which costs less and may be stopped at any time.

    Raises:
        ValueError: the topology is unknown, the command is not a module or is a benchmark on several hosts, or an
            argument is missing or has no effect.
    """
    default = command is None
    if command is None:
        command = ["python", "-m", "benchmarks.training", "--against", "", "--json", f"{_RESULTS}/training.json"]
    if list(command[:2]) != ["python", "-m"] or len(command) < 3:
        raise ValueError(f"the command must be python -m MODULE ..., got {shlex.join(command) or 'nothing'}")
    if topology == "gpu":
        if host is None or zone is not None or spot:
            raise ValueError("topology 'gpu' is an existing node: it needs --host user@machine, and no zone or spot")
        return _node(host, shlex.join(command))
    kind, _, shape = topology.partition(":")
    if kind not in _TPUS or not re.fullmatch("x".join([r"[1-9]\d*"] * _TPUS[kind].dimensions), shape):
        examples = ", ".join(f"{kind}:{'x'.join('2' * tpu.dimensions)}" for kind, tpu in _TPUS.items())
        raise ValueError(f"unknown topology {topology!r}: choose one such as {examples}, or gpu")
    if zone is None or host is not None:
        raise ValueError(f"topology {topology!r} is a new TPU: it needs --zone, such as us-central1-a, and no host")
    if not _SAFE.fullmatch(name):
        raise ValueError(f"name={name!r} must have only a-z, 0-9 and hyphens, and start with a letter")
    chips = math.prod(int(size) for size in shape.split("x"))
    multi_host = chips > _TPUS[kind].largest_host
    if multi_host and command[2].startswith("benchmarks."):
        if not default:
            raise ValueError(
                f"{command[2]} measures the devices of one process, and {topology} has several hosts: train a model on "
                f"all of its {chips} chips (python -m experiments.text_generation --mesh data={chips} ...)"
            )
        command = _gpt2(chips)
    return _slice(_TPUS[kind], chips, multi_host, command, zone, name, spot)


def _gpt2(chips: int) -> list[str]:
    """The command that trains a GPT of the size of GPT-2 on 8 x 1024 tokens per chip. It needs no shared directory."""
    return shlex.split(
        f"python -m experiments.text_generation --mesh data={chips} --output {_RESULTS}/gpt2 --tokenizer byte "
        "--model.set num_layers=12 num_heads=12 embed_dim=768 vocab_multiple=50304 dtype=bfloat16 "
        "embedding_dropout=0.0 attention_dropout=0.0 residual_dropout=0.0 "
        f"--training.sequence-length 1024 --training.batch-size {8 * chips} "
        "--training.steps 200 --training.evaluation-batches 2 "
        "--training.checkpoint-every None --optimizer.learning-rate 6e-4"
    )


def _slice(
    tpu: _Generation, chips: int, multi_host: bool, command: Sequence[str], zone: str, name: str, spot: bool
) -> str:
    run = shlex.join(["python", "-m", "jaxlm.launch", *command[2:]] if multi_host else command)
    quoted_zone = shlex.quote(zone)
    ssh = f"gcloud compute tpus tpu-vm ssh {name} --zone={quoted_zone} --worker=all --command"
    spot_option = " --spot" if spot else ""
    # The commands for the hosts are quoted below, so that each of them is one word for the local shell.
    install = "python3 -m venv venv && venv/bin/pip install -q -e './jaxlm[tpu,test]'"
    work = f"cd jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/venv/bin:$PATH {run}"
    return f"""#!/usr/bin/env bash
# {chips} chips on {"several hosts" if multi_host else "one host"}, which are charged until the script ends. Run it from
# a checkout of jaxlm, with the Google Cloud command line logged in to a project that has quota for these chips.
set -euo pipefail
gcloud compute tpus tpu-vm create {name} --zone={quoted_zone} --accelerator-type={tpu.type}-{chips * tpu.per_chip} \\
    --version={tpu.runtime}{spot_option}
trap 'gcloud compute tpus tpu-vm delete {name} --zone={quoted_zone} --quiet' EXIT
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
gcloud compute tpus tpu-vm scp jaxlm.tar {name}: --zone={quoted_zone} --worker=all
{ssh} 'tar xf jaxlm.tar'
{ssh} {shlex.quote(install)}
{ssh} {shlex.quote(work)}
gcloud compute tpus tpu-vm scp --recurse {name}:jaxlm/{_RESULTS} . --zone={quoted_zone} --worker=0
"""


def _node(host: str, run: str) -> str:
    quoted_host = shlex.quote(host)
    install = "tar xf jaxlm.tar && python3 -m venv venv && venv/bin/pip install -q -e './jaxlm[cuda13,test]'"
    work = f"cd jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/venv/bin:$PATH {run}"
    return f"""#!/usr/bin/env bash
# One node with NVIDIA GPUs, a driver for CUDA 13 and Python 3.11 or newer. Run it from a checkout of jaxlm.
set -euo pipefail
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
scp jaxlm.tar {quoted_host}:
ssh {quoted_host} {shlex.quote(install)}
ssh {quoted_host} {shlex.quote(work)}
scp -r {quoted_host}:jaxlm/{_RESULTS} .
"""


# ----------------------------------------------------------------------------------------- processes on this machine


def run_local(command: Sequence[str], count: int, *, restarts: int = 0, lost_after: int = processes.LOST_AFTER) -> int:
    """The exit status of ``command`` (``python -m MODULE ...``), run in ``count`` processes on this machine.

    If a process ends with an error, is killed or is stopped, all processes are ended. They are then started again with
    ``--resume``, up to ``restarts`` times, unless the error is a user error (status 2). Signals are forwarded to the
    processes, and there is no restart after a signal. A single process is started without ``jax.distributed``.

    Args:
        lost_after: seconds without a heartbeat after which a process counts as lost.

    Raises:
        ValueError: the command is not a module, or has no run directory (``--output`` or ``--resume``) to restart from.
    """
    if list(command[:2]) != ["python", "-m"] or len(command) < 3:
        raise ValueError(f"the command must be python -m MODULE ..., got {shlex.join(command) or 'nothing'}")
    for name, value, minimum in (("processes", count, 1), ("restarts", restarts, 0), ("lost_after", lost_after, 1)):
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")
    module, arguments = command[2], list(command[3:])
    directory = None
    if restarts:
        directory = _run_directory(arguments)
        if _option(arguments, "resume") is None and directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty: choose another --output, or use --resume {directory}")
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _SIGNALS}
    try:
        for attempt in range(restarts + 1):
            if attempt:
                assert directory is not None
                arguments = _resumed(arguments, directory)
            status, cause = _attempt(module, arguments, count, lost_after, received)
            if status in (0, _USER_ERROR) or received:
                break
            consequence = "no restart is left"
            if attempt < restarts:
                consequence = f"restart {attempt + 1} of {restarts}, from the last checkpoint in {directory}"
            print(f"jaxlm launch: {cause}; {consequence}", file=sys.stderr, flush=True)
        return status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_USER_ERROR = 2  # exit status of a command after a user error
_GRACE = 10.0  # seconds in which processes may end by themselves after the first one has failed


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, or None."""
    for number, argument in enumerate(arguments):
        if argument == f"--{name}" and number + 1 < len(arguments):
            return arguments[number + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """``arguments`` without ``--name VALUE`` and ``--name=VALUE``."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == f"--{name}":
            next(words, None)
        elif not word.startswith(f"--{name}="):
            kept.append(word)
    return kept


def _run_directory(arguments: Sequence[str]) -> Path:
    named = _option(arguments, "resume") or _option(arguments, "output")
    if named is None:
        raise ValueError("--restarts needs a run directory: add --output DIRECTORY to the command")
    return Path(named)


def _resumed(arguments: Sequence[str], directory: Path) -> list[str]:
    """The arguments that resume the run of ``directory``, or start it again if ``config.json`` was not yet written."""
    if not (directory / "config.json").exists():
        if directory.exists():  # its files are of the first attempt, before which it was empty
            directory.rename(f"{directory}.incomplete-{time.time_ns()}")
        return list(arguments)
    for name in ("preset", "output", "resume"):  # config.json has the preset
        arguments = _without(arguments, name)
    return [*arguments, "--resume", str(directory)]


def _attempt(
    module: str, arguments: Sequence[str], count: int, lost_after: int, received: list[int]
) -> tuple[int, str]:
    """The common exit status of the processes, and a text about the first failure."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    commands = [
        ["jaxlm.launch", "--coordinator", coordinator, "--processes", str(count), "--process", str(index),
         "--lost-after", str(lost_after), module]
        for index in range(count)
    ]  # fmt: skip
    # Each process has its own session, so that Ctrl-C reaches only this process, which forwards it once.
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *(words if count > 1 else [module]), *arguments], start_new_session=True
        )
        for words in commands
    ]
    first: tuple[int, str] | None = None
    forwarded, deadline = len(received), math.inf
    try:
        while True:
            for number in received[forwarded:]:
                for process in running:
                    process.send_signal(number)
            forwarded = len(received)
            statuses = [process.poll() for process in running]
            if first is None and any(statuses):
                first = _first_failure(statuses)
                deadline = time.monotonic() + _GRACE
            if None not in statuses or time.monotonic() > deadline:
                return first or (0, "")
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _first_failure(statuses: Sequence[int | None]) -> tuple[int, str]:
    """The exit status of a failed process and a text about it; first a killed one, which causes other failures."""
    status, index = min((status, index) for index, status in enumerate(statuses) if status)
    process = f"process {index} of {len(statuses)}"
    if status < 0:
        return 128 - status, f"{process} was ended by {signal.Signals(-status).name}"
    return status, f"{process} ended with status {status}"


def main(arguments: Sequence[str]) -> None:
    """Join the processes of a run, then run a module like ``python -m``."""
    parser = argparse.ArgumentParser("python -m jaxlm.launch", allow_abbrev=False)
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
    if options.process is not None and not 0 <= options.process < options.processes:
        parser.error(f"--process {options.process} must be from 0 to {options.processes - 1} (--processes - 1)")
    for name in ("lost_after", "join_within"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least one second")

    def program() -> None:
        sys.argv = [options.module, *options.arguments]
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)

    processes.run(program, *cluster, lost_after=options.lost_after, join_within=options.join_within)


if __name__ == "__main__":
    main(sys.argv[1:])

"""From nothing to numbers on machines that one rents: scripts, to be read and then run by whoever pays for them.

A script creates the machine, installs this checkout, runs a command on every host, fetches what it left, and gives the
machine back even if something failed on the way. :func:`script` returns text, and executes nothing. :func:`run_local`
runs a command in several processes of this machine, and restarts them.

    python -m jaxlm.launch [--coordinator HOST:PORT --processes N --process I] MODULE ARGUMENTS

is what the script runs on each host of a slice: it joins the hosts (``jax.distributed``), then runs the module, and all
end together (``processes.run``). On a TPU, under Slurm or Kubernetes, JAX finds the other processes itself; elsewhere
they are told of each other.
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
    """How Google's command line names a TPU generation. A type counts chips, or cores of which a chip has two."""

    type: str
    per_chip: int
    runtime: str
    sides: int
    """Numbers in a shape."""
    largest_host: int
    """Chips of the largest slice that is one host."""


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
    """The script that runs ``command`` (``python -m MODULE ...``) on ``topology``, as bash.

    What the command writes to ``results/`` is fetched into ``results/`` here.

    Args:
        topology: ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2``, ``v4:2x2x1``; or ``gpu``, a machine that is there already.
        command: None measures training: by the benchmark, or on several hosts, as all of which no benchmark runs, by
            training a GPT as large as GPT-2.
        zone: where the TPU is to be.
        name: what the TPU is to be called.
        host: ``user@machine`` of a GPU node.
        spot: take a machine that may be taken away again, for less.

    Raises:
        ValueError: an unknown topology, a command that is no module or a benchmark on several hosts, or something
            missing or of no use.
    """
    default = command is None
    if command is None:
        command = ["python", "-m", "benchmarks.training", "--against", "", "--json", f"{_RESULTS}/training.json"]
    if list(command[:2]) != ["python", "-m"] or len(command) < 3:
        raise ValueError(f"the command must be python -m MODULE ..., got {shlex.join(command) or 'nothing'}")
    if topology == "gpu":
        if host is None or zone is not None or spot:
            raise ValueError(
                "topology 'gpu' is a node that is there: it needs --host user@machine, and no zone or spot"
            )
        return _node(host, shlex.join(command))
    kind, _, shape = topology.partition(":")
    if kind not in _TPUS or not re.fullmatch("x".join([r"[1-9]\d*"] * _TPUS[kind].sides), shape):
        shapes = ", ".join(f"{kind}:{'x'.join('2' * one.sides)}" for kind, one in _TPUS.items())
        raise ValueError(f"no topology is called {topology!r}: such as {shapes}, or gpu")
    if zone is None or host is not None:
        raise ValueError(f"topology {topology!r} is created: it needs --zone, such as us-central1-a, and no host")
    if not _SAFE.fullmatch(name):
        raise ValueError(f"name={name!r} must be of small letters, digits and hyphens, and begin with a letter")
    chips = math.prod(int(side) for side in shape.split("x"))
    several = chips > _TPUS[kind].largest_host
    if several and command[2].startswith("benchmarks."):
        if not default:
            raise ValueError(
                f"{command[2]} measures the devices of one process, and {topology} is several hosts: train something "
                f"over all of its {chips} chips (python -m experiments.text_generation --mesh data={chips} ...)"
            )
        command = _gpt2(chips)
    return _slice(_TPUS[kind], chips, several, command, zone, name, spot)


def _gpt2(chips: int) -> list[str]:
    """Training a GPT as large as GPT-2 on 8 x 1024 tokens a chip, with nothing that takes a directory that all see."""
    return shlex.split(
        f"python -m experiments.text_generation --mesh data={chips} --output {_RESULTS}/gpt2 --tokenizer byte "
        "--model.set num_layers=12 num_heads=12 embed_dim=768 vocab_multiple=50304 dtype=bfloat16 "
        "embedding_dropout=0.0 attention_dropout=0.0 residual_dropout=0.0 "
        f"--training.sequence-length 1024 --training.batch-size {8 * chips} "
        "--training.layers-apart True --training.steps 200 --training.evaluation-batches 2 "
        "--training.checkpoint-every None --optimizer.learning-rate 6e-4"
    )


def _slice(
    tpu: _Generation, chips: int, several: bool, command: Sequence[str], zone: str, name: str, spot: bool
) -> str:
    run = shlex.join(["python", "-m", "jaxlm.launch", *command[2:]] if several else command)
    where = shlex.quote(zone)
    there = f"gcloud compute tpus tpu-vm ssh {name} --zone={where} --worker=all --command"
    spot_word = " --spot" if spot else ""
    # What each host does before, and the command, are one word each for the shell here.
    install = "python3 -m venv venv && venv/bin/pip install -q -e './jaxlm[tpu,test]'"
    work = f"cd jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/venv/bin:$PATH {run}"
    return f"""#!/usr/bin/env bash
# {chips} chips on {"several hosts" if several else "one host"}, paid from the first command to the last. Run it from a
# checkout of jaxlm, where the Google Cloud command line is logged in to a project that has quota for these chips.
set -euo pipefail
gcloud compute tpus tpu-vm create {name} --zone={where} --accelerator-type={tpu.type}-{chips * tpu.per_chip} \\
    --version={tpu.runtime}{spot_word}
trap 'gcloud compute tpus tpu-vm delete {name} --zone={where} --quiet' EXIT
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
gcloud compute tpus tpu-vm scp jaxlm.tar {name}: --zone={where} --worker=all
{there} 'tar xf jaxlm.tar'
{there} {shlex.quote(install)}
{there} {shlex.quote(work)}
gcloud compute tpus tpu-vm scp --recurse {name}:jaxlm/{_RESULTS} . --zone={where} --worker=0
"""


def _node(host: str, run: str) -> str:
    where = shlex.quote(host)
    install = "tar xf jaxlm.tar && python3 -m venv venv && venv/bin/pip install -q -e './jaxlm[cuda13,test]'"
    work = f"cd jaxlm && mkdir -p {_RESULTS} && PATH=$HOME/venv/bin:$PATH {run}"
    return f"""#!/usr/bin/env bash
# One node with NVIDIA GPUs, a driver for CUDA 13 and Python 3.11 or newer. Run it from a checkout of jaxlm.
set -euo pipefail
git archive --prefix=jaxlm/ -o jaxlm.tar HEAD
scp jaxlm.tar {where}:
ssh {where} {shlex.quote(install)}
ssh {where} {shlex.quote(work)}
scp -r {where}:jaxlm/{_RESULTS} .
"""


# ----------------------------------------------------------------------------------------- processes of this machine


def run_local(command: Sequence[str], count: int, *, restarts: int = 0, lost_after: int = processes.LOST_AFTER) -> int:
    """Run ``command`` (``python -m MODULE ...``) in ``count`` processes of this machine; returns the exit status.

    If a process ends with an error, or is killed or stopped, all are ended. They are then started again with
    ``--resume``, up to ``restarts`` times, unless the error is a mistake of the user (status 2). A signal is passed on
    to the processes, and there is no restart after it. One process alone is not joined with ``jax.distributed``.

    Args:
        lost_after: seconds without a sign of life after which a process counts as lost.

    Raises:
        ValueError: a command that is no module, or that has no run directory (``--output`` or ``--resume``) to restart
            from.
    """
    if list(command[:2]) != ["python", "-m"] or len(command) < 3:
        raise ValueError(f"the command must be python -m MODULE ..., got {shlex.join(command) or 'nothing'}")
    for name, value, least in (("processes", count, 1), ("restarts", restarts, 0), ("lost_after", lost_after, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    module, arguments = command[2], list(command[3:])
    directory = None
    if restarts:
        directory = _run_directory(arguments)
        if _option(arguments, "resume") is None and directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty: choose another --output, or use --resume {directory}")
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _SIGNALS}
    try:
        for attempt in range(restarts + 1):
            if attempt:
                assert directory is not None
                arguments = _resumed(arguments, directory)
            status, cause = _attempt(module, arguments, count, lost_after, received)
            if status in (0, _MISTAKE) or received:
                break
            after = "no restart is left"
            if attempt < restarts:
                after = f"restart {attempt + 1} of {restarts}, from the last checkpoint in {directory}"
            print(f"jaxlm launch: {cause}; {after}", file=sys.stderr, flush=True)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MISTAKE = 2  # the status of a command after a mistake of the user
_TO_END = 10.0  # seconds that processes have to end by themselves after the first one has failed


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
        raise ValueError("a run that is restarted needs a directory: add --output DIRECTORY to the command")
    return Path(named)


def _resumed(arguments: Sequence[str], directory: Path) -> list[str]:
    """The arguments that go on with the run of ``directory``, or start it again if it was ended before it was made."""
    if not (directory / "config.json").exists():
        if directory.exists():  # it was empty before the first attempt
            directory.rename(f"{directory}.incomplete-{time.time_ns()}")
        return list(arguments)
    for name in ("preset", "output", "resume"):  # config.json has the preset
        arguments = _without(arguments, name)
    return [*arguments, "--resume", str(directory)]


def _attempt(
    module: str, arguments: Sequence[str], count: int, lost_after: int, received: list[int]
) -> tuple[int, str]:
    """The status of the processes together, and what ended the first one that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined = [
        ["jaxlm.launch", "--coordinator", coordinator, "--processes", str(count), "--process", str(index),
         "--lost-after", str(lost_after), module]
        for index in range(count)
    ]  # fmt: skip
    # Sessions of their own: Ctrl-C reaches this process, which passes it on once.
    running = [
        subprocess.Popen([sys.executable, "-m", *(one if count > 1 else [module]), *arguments], start_new_session=True)
        for one in joined
    ]
    first: tuple[int, str] | None = None
    passed_on, deadline = len(received), math.inf
    try:
        while True:
            for number in received[passed_on:]:
                for process in running:
                    process.send_signal(number)
            passed_on = len(received)
            statuses = [process.poll() for process in running]
            if first is None and any(statuses):
                first = _first_failure(statuses)
                deadline = time.monotonic() + _TO_END
            if None not in statuses or time.monotonic() > deadline:
                return first or (0, "")
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _first_failure(statuses: Sequence[int | None]) -> tuple[int, str]:
    """Exit status of one that failed, and a text about it. One that was killed explains the failure of the others."""
    status, index = min((status, index) for index, status in enumerate(statuses) if status)
    process = f"process {index} of {len(statuses)}"
    if status < 0:
        return 128 - status, f"{process} was ended by {signal.Signals(-status).name}"
    return status, f"{process} ended with status {status}"


def main(arguments: Sequence[str]) -> None:
    """Join the processes of a run, then run a module as ``python -m`` would."""
    parser = argparse.ArgumentParser("python -m jaxlm.launch", allow_abbrev=False)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="an address of the first process, the same for all")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--lost-after", type=int, metavar="SECONDS", default=processes.LOST_AFTER,
        help="without a sign of life after which a process counts as lost (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--join-within", type=int, metavar="SECONDS", default=processes.JOIN_WITHIN,
        help="in which all processes must have started (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("module", help="what to run, as after python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    asked = parser.parse_args(arguments)
    told = (asked.coordinator, asked.processes, asked.process)
    if None in told and told != (None, None, None):
        parser.error("--coordinator, --processes and --process are given together or not at all")
    if asked.process is not None and not 0 <= asked.process < asked.processes:
        parser.error(f"--process {asked.process} of {asked.processes}: they are counted from 0")
    for name in ("lost_after", "join_within"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(asked, name)}: give at least one second")

    def program() -> None:
        sys.argv = [asked.module, *asked.arguments]
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)

    processes.run(program, *told, lost_after=asked.lost_after, join_within=asked.join_within)


if __name__ == "__main__":
    main(sys.argv[1:])

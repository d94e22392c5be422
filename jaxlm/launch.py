"""From nothing to numbers on machines that one rents: scripts, to be read and then run by whoever pays for them.

A script creates the machine, installs this checkout, runs a command on every host, fetches what it left, and gives the
machine back even if something failed on the way. Nothing here is executed: :func:`script` returns text.

    python -m jaxlm.launch [--coordinator HOST:PORT --processes N --process I] MODULE ARGUMENTS

is what the script runs on each host of a slice: it joins the hosts (``jax.distributed``), then runs the module. On a
TPU, under Slurm or Kubernetes, JAX finds the other processes itself; elsewhere they are told of each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import runpy
import shlex
import sys
from collections.abc import Sequence

import jax


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


def main(arguments: Sequence[str]) -> None:
    """Join the processes of a run, then run a module as ``python -m`` would."""
    parser = argparse.ArgumentParser("python -m jaxlm.launch", allow_abbrev=False)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="an address of the first process, the same for all")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument("module", help="what to run, as after python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    asked = parser.parse_args(arguments)
    told = (asked.coordinator, asked.processes, asked.process)
    if None in told and told != (None, None, None):
        parser.error("--coordinator, --processes and --process are given together or not at all")
    if asked.process is not None and not 0 <= asked.process < asked.processes:
        parser.error(f"--process {asked.process} of {asked.processes}: they are counted from 0")
    jax.distributed.initialize(*told)
    sys.argv = [asked.module, *asked.arguments]
    runpy.run_module(asked.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

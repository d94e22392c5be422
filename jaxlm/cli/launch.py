"""``jaxlm launch``: scripts for rented machines, and multi-process runs on this machine."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex

from jaxlm import processes
from jaxlm.launch import run_local, script

MAX_CHIPS = 8960
"""Number of chips of a TPU v5p pod, the largest pod of the supported generations."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Print a script that runs a command on a new TPU or an existing GPU node and copies the results to this machine.

    With --topology local:N, run a command in N processes on this machine instead.
    """

    topology: str
    """v5e:4x4, v5p:2x2x1, v6e:2x2, v4:2x2x1, ... (a new TPU); gpu (an existing GPU node); or local:N (N processes on
    this machine)."""
    command: str | None = None
    """Command to run: python -m MODULE ... For a TPU or a GPU node, the command must write its results to results/,
    because the script copies only this directory. None (not allowed for local:N): the training benchmark on one host,
    or the training of a model as large as GPT-2 on several hosts."""
    zone: str | None = None
    """Google Cloud zone of the TPU, for example us-central1-a. Required for a TPU."""
    name: str = "jaxlm"
    """Name of the new TPU."""
    host: str | None = None
    """Address of the GPU node, such as user@machine. Required for gpu."""
    spot: bool = False
    """Use a spot TPU, which costs less and may be stopped at any time."""
    dry_run: bool = False
    """Required for a TPU or a GPU node, and not allowed for local:N. jaxlm only prints the script and never executes
    it."""
    restarts: int = 0
    """For local:N: maximum number of restarts. After a failure, all processes end and start again, with --resume if the
    run has a config.json. There is no restart after a user error (status 2) or a signal to jaxlm launch. With restarts,
    the command to run must have --output or --resume."""
    lost_after: int = processes.LOST_AFTER
    """For local:N: seconds without a heartbeat after which a process counts as lost."""

    def run(self) -> int:
        """Print the script or run the processes, and return the exit status."""
        kind, _, size = self.topology.partition(":")
        if kind == "local":
            return self._run_local(size)
        if self.restarts or self.lost_after != processes.LOST_AFTER:
            raise ValueError("--restarts and --lost-after apply only to --topology local:N: remove them for a script")
        if not self.dry_run:
            raise ValueError(
                "jaxlm does not rent machines: add --dry-run, read the script that it prints, and run the script"
            )
        for option, value in (("zone", self.zone), ("host", self.host)):
            if value is not None and not re.fullmatch(r"[\w.@:-]+", value):
                raise ValueError(f"--{option} {value!r} must have only letters, digits and . @ : _ -")
        chips = math.prod(map(int, re.findall(r"\d+", size)))
        if chips > MAX_CHIPS:
            raise ValueError(f"--topology {self.topology} has {chips:,} chips: the largest pod has {MAX_CHIPS:,}")
        command = None if self.command is None else _words(self.command)
        print(script(self.topology, command, zone=self.zone, name=self.name, host=self.host, spot=self.spot), end="")
        return 0

    def _run_local(self, number: str) -> int:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"topology {self.topology!r} must be local:N, with a number of processes such as local:2")
        if self.command is None:
            raise ValueError("--topology local:N needs --command 'python -m MODULE ...'")
        if self.dry_run or self.spot or self.name != "jaxlm" or (self.zone, self.host) != (None, None):
            raise ValueError(
                "--topology local:N runs on this machine: remove --dry-run, --zone, --name, --host and --spot"
            )
        return run_local(_words(self.command), int(number), restarts=self.restarts, lost_after=self.lost_after)


def _words(command: str) -> list[str]:
    """The words of a shell command."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(
            f"--command {command!r} has an open quotation or a final backslash ({error}): close or remove it"
        ) from error

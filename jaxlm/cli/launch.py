"""``jaxlm launch``: scripts for rented machines, and several processes on this one."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex

from jaxlm import processes
from jaxlm.launch import run_local, script

LARGEST = 8960
"""Chips of a whole pod of TPU v5p, the largest one."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Print the script that creates a cloud machine, runs a command there and fetches the results; or run a command in
    several processes of this machine (--topology local:2), and restart them."""

    topology: str
    """v5e:4x4, v5p:2x2x1, v6e:2x2, v4:2x2x1; gpu, a node that is there already; or local:N, N processes here."""
    command: str | None = None
    """What to run there, python -m MODULE ...; what it writes to results/ is fetched. None: the training benchmark, or
    on several hosts the training of a GPT as large as GPT-2. Needed for local:N."""
    zone: str | None = None
    """Where a TPU is to be, as us-central1-a."""
    name: str = "jaxlm"
    """What a TPU is to be called."""
    host: str | None = None
    """user@machine of a GPU node."""
    spot: bool = False
    """Take a TPU that may be taken away again, for less."""
    dry_run: bool = False
    """Needed, except for local:N: scripts are printed, and never executed by jaxlm."""
    restarts: int = 0
    """For local:N: how often to end all processes after a failure and to start them again with --resume. The command
    must name a run directory (--output or --resume)."""
    lost_after: int = processes.LOST_AFTER
    """For local:N: seconds without a sign of life after which a process counts as lost."""

    def run(self) -> int:
        """Print the script, or run the processes."""
        kind, _, number = self.topology.partition(":")
        if kind == "local":
            return self._run_local(number)
        if self.restarts or self.lost_after != processes.LOST_AFTER:
            raise ValueError("--restarts and --lost-after are for --topology local:N: a script starts a command once")
        if not self.dry_run:
            raise ValueError(
                "jaxlm rents no machines: say --dry-run, read the script that it prints, and run it yourself"
            )
        for option, value in (("zone", self.zone), ("host", self.host)):
            if value is not None and not re.fullmatch(r"[\w.@:-]+", value):
                raise ValueError(f"--{option} {value!r} must be of letters, digits and . @ : _ -")
        chips = math.prod(map(int, re.findall(r"\d+", self.topology.partition(":")[2])))
        if chips > LARGEST:
            raise ValueError(f"--topology {self.topology} has {chips:,} chips: there is no slice above {LARGEST:,}")
        command = None if self.command is None else shlex.split(self.command)
        print(
            script(self.topology, command, zone=self.zone, name=self.name, host=self.host, spot=self.spot), end=""
        )  # fmt: skip
        return 0

    def _run_local(self, number: str) -> int:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"topology {self.topology!r} must be local:N, with a number of processes such as local:2")
        if self.command is None:
            raise ValueError("--topology local:N needs --command 'python -m MODULE ...'")
        if self.dry_run or self.zone is not None or self.host is not None or self.spot:
            raise ValueError("--topology local:N runs on this machine: leave --dry-run, --zone, --host and --spot out")
        command = shlex.split(self.command)
        return run_local(command, int(number), restarts=self.restarts, lost_after=self.lost_after)

"""``jaxlm launch``: scripts for rented machines."""

from __future__ import annotations

import dataclasses
import shlex

from jaxlm.launch import script


@dataclasses.dataclass(frozen=True)
class Launch:
    """Print the script that creates a cloud machine, runs a command there and fetches the results."""

    topology: str
    """v5e:4x4, v5p:2x2x1, v6e:2x2, v4:2x2x1; or gpu, a node that is there already."""
    command: str | None = None
    """What to run there, python -m MODULE ...; what it writes to results/ is fetched. None: the training benchmark, or
    on several hosts the training of a GPT as large as GPT-2."""
    zone: str | None = None
    """Where a TPU is to be, as us-central1-a."""
    name: str = "jaxlm"
    """What a TPU is to be called."""
    host: str | None = None
    """user@machine of a GPU node."""
    spot: bool = False
    """Take a TPU that may be taken away again, for less."""
    dry_run: bool = False
    """Needed: scripts are printed, and never executed by jaxlm."""

    def run(self) -> int:
        """Print the script."""
        if not self.dry_run:
            raise ValueError(
                "jaxlm rents no machines: say --dry-run, read the script that it prints, and run it yourself"
            )
        command = None if self.command is None else shlex.split(self.command)
        print(
            script(self.topology, command, zone=self.zone, name=self.name, host=self.host, spot=self.spot), end=""
        )  # fmt: skip
        return 0

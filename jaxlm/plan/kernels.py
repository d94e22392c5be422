"""The static schedule of Pallas kernels on TPU, which carry no estimate: VLIW bundles, counted in libtpu's dump.

A bundle takes a cycle unless it waits. The body of the loop over the grid is all that one grid step may execute: parts
behind a predicate (``pl.when``) are told apart by their ``PF`` marks but not by how often they are taken, so that
bundles times steps is an upper bound; waiting for memory is not in it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT))?:\s*((?:> *)*)\{")
_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
_DUMP = re.compile(r"--xla_jf_dump_to=(\S+)")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of a kernel by the depth of the loop that they are in: 0 once a call, 1 once a grid step, 2 in loops of
    the kernel's own, whose rounds are not known here."""

    bundles: tuple[int, ...]

    def cycles(self, steps: int) -> int:
        """Bundles of a call with ``steps`` grid steps, all predicated parts taken and inner loops counted once."""
        once, *inside = self.bundles
        return once + steps * sum(inside)


def dump_schedules() -> None:
    """Ask libtpu to write the schedules down; it must be said before it is loaded. The files go with the process."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _DUMP.search(flags):
        return
    directory = tempfile.TemporaryDirectory(prefix="jaxlm-plan-")
    _kept.append(directory)
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_FLAGS.format(directory.name)}".strip()


_kept: list[tempfile.TemporaryDirectory[str]] = []


def schedule_of(kernel: str) -> Schedule | None:
    """The schedule of the custom call of this name in the program compiled last, or None when nothing was dumped."""
    flags = _DUMP.search(os.environ.get("LIBTPU_INIT_ARGS", ""))
    if flags is None:
        return None
    named = re.compile(rf"^(\d+)-{re.escape(kernel)}-\d+-final_bundles\.txt$")
    found = [
        (int(match[1]), path) for path in Path(flags[1]).glob("*final_bundles.txt") if (match := named.match(path.name))
    ]
    return parse(max(found)[1].read_text(errors="replace")) if found else None


def parse(text: str) -> Schedule:
    """Count the bundles of a ``final_bundles.txt``."""
    counts: dict[int, int] = {}
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            depth = match[2].count(">")
            counts[depth] = counts.get(depth, 0) + 1
    return Schedule(tuple(counts.get(depth, 0) for depth in range(max(counts, default=0) + 1)))

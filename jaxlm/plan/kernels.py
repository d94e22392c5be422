"""Static schedules of Pallas kernels on TPUs: the numbers of VLIW bundles, counted in libtpu's dumps of the kernels.

The compiler estimates no cycles for Pallas kernels. A VLIW bundle is a group of instructions that start in the same
cycle. It takes one cycle, plus the cycles in which it waits for memory. The body of the loop over the grid contains all
bundles that one grid step may execute. The dump marks the bundles of ``pl.when`` (predicated bundles) with ``PF``, but
does not say how often they run. So the number of bundles times the number of grid steps is an upper bound of the
cycles without waiting. This holds for kernels without inner loops.
"""

from __future__ import annotations

import collections
import os
import re
import tempfile
from pathlib import Path

# A bundle has an address, an optional flag such as PF, one ">" per loop depth, and its instructions in braces.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT))?:\s*((?:> *)*)\{")
_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
_DUMP_FLAG = re.compile(r"--xla_jf_dump_to=(\S+)")


Schedule = tuple[int, ...]
"""The number of bundles of a kernel at each loop depth: entry d is the number at depth d.

Bundles of depth 0 run once per call, and those of depth 1 once per grid step. Deeper bundles are in loops inside the
kernel. The dump does not contain the numbers of iterations of these loops.
"""


def cycles(schedule: Schedule, steps: int) -> int:
    """Cycles of a call with ``steps`` grid steps, with one cycle per bundle.

    All predicated bundles count in each grid step, and inner loops count as one iteration.
    """
    per_call, *per_step = schedule
    return per_call + steps * sum(per_step)


def dump_schedules() -> None:
    """Set the libtpu flags that dump the schedules to a temporary directory, which is deleted when the process ends.

    Call this function before libtpu is loaded. If ``LIBTPU_INIT_ARGS`` already names a directory for dumps, the
    function does nothing.
    """
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _DUMP_FLAG.search(flags):
        return
    directory = tempfile.TemporaryDirectory(prefix="jaxlm-plan-")
    _dump_directories.append(directory)
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_FLAGS.format(directory.name)}".strip()


_dump_directories: list[tempfile.TemporaryDirectory[str]] = []  # keeps the directory until the process ends


def schedule_of(kernel: str, since: int) -> Schedule | None:
    """The schedule in the newest dump of a custom call with this name; None if there is no such dump.

    Args:
        since: ``time.time_ns()`` before the compilation of the program. Older dumps, which belong to other programs,
            are ignored.
    """
    flags = _DUMP_FLAG.search(os.environ.get("LIBTPU_INIT_ARGS", ""))
    if flags is None:
        return None
    file_name = re.compile(rf"^(\d+)-{re.escape(kernel)}-\d+-final_bundles\.txt$")
    found = [
        (int(match[1]), path)  # the number is the time of the dump in nanoseconds
        for path in Path(flags[1]).glob("*final_bundles.txt")
        if (match := file_name.match(path.name)) and int(match[1]) >= since
    ]
    return parse(max(found)[1].read_text(errors="replace")) if found else None


def parse(text: str) -> Schedule:
    """The schedule in the text of a ``final_bundles.txt``."""
    bundles = filter(None, map(_BUNDLE.match, text.splitlines()))
    counts = collections.Counter(bundle[2].count(">") for bundle in bundles)
    return tuple(counts[depth] for depth in range(max(counts, default=0) + 1))

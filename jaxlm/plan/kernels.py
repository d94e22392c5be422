"""Static schedules of Pallas kernels on TPU: the number of VLIW bundles, counted in libtpu's dump of the kernel.

The compiler gives no cycle estimate for Pallas kernels. A bundle takes one cycle, plus the time for which it waits. The
body of the loop over the grid contains all bundles that one grid step may execute. The dump marks predicated bundles
(``pl.when``) with ``PF`` but does not say how often they run. So for a kernel without inner loops, the product of
bundles and grid steps is an upper bound of the cycles, apart from the cycles in which bundles wait for memory.
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
    """The number of bundles of a kernel at each loop depth.

    Depth 0 runs once per call and depth 1 once per grid step. Deeper bundles are in loops inside the kernel, whose trip
    counts are unknown here.
    """

    bundles: tuple[int, ...]

    def cycles(self, steps: int) -> int:
        """Cycles of a call with ``steps`` grid steps: one per bundle, if all predicated bundles run and inner loops run
        once."""
        per_call, *per_step = self.bundles
        return per_call + steps * sum(per_step)


def dump_schedules() -> None:
    """Set the libtpu flags that dump the schedules. Call this function before libtpu is loaded.

    The files are deleted when the process ends. If ``LIBTPU_INIT_ARGS`` already names a directory for dumps, nothing
    changes.
    """
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _DUMP.search(flags):
        return
    directory = tempfile.TemporaryDirectory(prefix="jaxlm-plan-")
    _dump_directories.append(directory)
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_FLAGS.format(directory.name)}".strip()


_dump_directories: list[tempfile.TemporaryDirectory[str]] = []


def schedule_of(kernel: str) -> Schedule | None:
    """The schedule of the custom call with this name in the last compiled program; None if there is no dump of it."""
    flags = _DUMP.search(os.environ.get("LIBTPU_INIT_ARGS", ""))
    if flags is None:
        return None
    file_name = re.compile(rf"^(\d+)-{re.escape(kernel)}-\d+-final_bundles\.txt$")
    found = [
        (int(match[1]), path)
        for path in Path(flags[1]).glob("*final_bundles.txt")
        if (match := file_name.match(path.name))
    ]
    return parse(max(found)[1].read_text(errors="replace")) if found else None


def parse(text: str) -> Schedule:
    """The schedule in the text of a ``final_bundles.txt``."""
    counts: dict[int, int] = {}
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            depth = match[2].count(">")
            counts[depth] = counts.get(depth, 0) + 1
    return Schedule(tuple(counts.get(depth, 0) for depth in range(max(counts, default=0) + 1)))

"""Functions for the host machine: the name of its processor, and how malloc handles freed memory."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_enabled = False


def keep_freed_memory() -> bool:
    """Configure malloc to keep freed memory for the next step, and return whether malloc accepted all settings.

    On a CPU, XLA frees the buffers of a step when the step ends. By default, glibc returns large blocks to the
    operating system at once, and the system clears each page again when the next step touches it. Returning and
    clearing the pages takes 5 to 35 % of the time of a training step (docs/labbook.md). After a call of this function,
    the process holds its peak memory, and somewhat more, until it ends.

    The experiments call this function at their start. In your own program, call it before JAX computes anything,
    because a thread that is already running may keep a heap of its own. Fragmentation can make the process use twice
    the memory that it needs. So do not call this function in a job that fills the memory of the machine. The function
    has an effect only on Linux with glibc; otherwise, it returns False.
    """
    global _enabled
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Use one heap for all threads, because additional heaps are too small for large blocks. Do not use mmap for large
    # blocks. Do not trim the heap.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    successes = [library.mallopt(option, value) for option, value in settings]
    _enabled = all(successes)
    return _enabled


def is_freed_memory_kept() -> bool:
    """Whether :func:`keep_freed_memory` took effect in this process.

    If it took effect, a large block that is allocated again causes no page faults.
    """
    return _enabled


def processor_name() -> str:
    """The name of the processor, for example "AMD EPYC 9354". If it is unknown, the architecture, such as "x86_64"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""The host: the name of its processor, and how malloc handles freed memory when JAX runs on the CPU."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_enabled = False


def keep_freed_memory() -> bool:
    """Configure malloc to keep freed memory for the next step; return whether this took effect.

    On a CPU, XLA frees the buffers of a step when the step ends. glibc returns large blocks to the operating system at
    once, and the system clears each page again when the next step touches it. Returning and clearing the pages takes 5
    to 35 % of a training step (docs/labbook.md). After a call of this function, the process holds its peak memory, and
    somewhat more, until it ends.

    Call this function before JAX computes anything, because it does not affect threads that are already running. The
    experiments call it at their start; call it in your own programs too. Fragmentation may let the process grow to
    twice the memory that it needs, so do not call this function in a job that fills the memory of the machine. The
    function has an effect only on Linux with glibc.
    """
    global _enabled
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Use one heap, because other heaps are too small for large blocks. Do not use mmap for large blocks. Do not trim
    # the heap.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    successes = [library.mallopt(option, value) for option, value in settings]
    _enabled = all(successes)
    return _enabled


def is_freed_memory_kept() -> bool:
    """Whether :func:`keep_freed_memory` took effect in this process.

    If it took effect, the allocation of a large block is as cheap as that of a small block.
    """
    return _enabled


def processor_name() -> str:
    """The name of the processor, for example "AMD EPYC 9354"; the architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

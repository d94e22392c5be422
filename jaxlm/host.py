"""Settings of the host process: how malloc handles freed memory when JAX runs on the CPU."""

from __future__ import annotations

import ctypes
import sys

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_kept = False


def keep_freed_memory() -> bool:
    """Configure malloc to keep freed memory for the next step; return whether this took effect.

    On a CPU, XLA frees the buffers of a step when the step ends. glibc returns large blocks to the operating system at
    once, and the system clears each page again when the next step touches it. This takes 5 to 30 % of a training step
    (docs/labbook.md). After this call the process keeps its peak memory, and somewhat more, until it ends.

    Call it before JAX computes anything, because the allocators of threads that already run do not change. The
    experiments call it at their start, and your own program should too. Fragmentation may let the process grow to twice
    the memory that it needs, so do not use it for a job that fills the memory of the machine. It does nothing on
    systems without glibc (Linux).
    """
    global _kept
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # One heap (the others are too small for large blocks), no mmap for large blocks, and no trimming of the heap's end.
    _kept = all([library.mallopt(_ARENA_MAX, 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_TRIM_THRESHOLD, -1)])
    return _kept


def keeps_freed_memory() -> bool:
    """Whether :func:`keep_freed_memory` took effect in this process. If so, large blocks are as cheap as small ones."""
    return _kept

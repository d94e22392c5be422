"""The process on the host: how it deals with memory where the CPU is the device."""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3) and glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_kept = False


def keep_freed_memory() -> bool:
    """Keep memory that is freed, so that the next step need not have it from the system anew: whether this took effect.

    On a CPU, XLA frees what a step computed with when the step ends. glibc gives large blocks back to the system at
    once, which then clears each page again when the next step touches it: of a training step that takes 5 to 30 %
    (docs/labbook.md). From here on the process keeps them, at its peak and somewhat above, until it ends.

    To be called before JAX computes anything: allocators of threads that run already stay as they are. The experiments
    call it when they are run; a program of one's own does so where it starts. As blocks come to lie apart, the process
    may grow to twice the memory that it needs, so it is not for what fills the machine. Elsewhere than under glibc
    (Linux) it does nothing.
    """
    global _kept
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # One heap (others are too small for large blocks), no blocks outside of it, and nothing cut off its end.
    _kept = all([library.mallopt(_ARENA_MAX, 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_TRIM_THRESHOLD, -1)])
    return _kept


def keeps_freed_memory() -> bool:
    """Whether :func:`keep_freed_memory` took effect in this process: large blocks then cost no more than small ones."""
    return _kept

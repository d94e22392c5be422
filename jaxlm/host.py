"""Functions for the host machine: its processor, its accelerators, and how malloc handles freed memory."""

from __future__ import annotations

import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
"""Patterns of the device files of TPUs (the first two) and of GPUs."""

_ACCELERATOR_VARIABLES = (
    "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "CLOUD_TPU_TASK_ID",
    "JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS",
)  # fmt: skip
"""Environment variables that JAX or libtpu reads. On a Cloud TPU VM, at least one of them is set. A user sets
``JAX_FORCE_TPU_INIT`` to force the use of a TPU, or ``PJRT_NAMES_AND_LIBRARY_PATHS`` to load a plugin.
``TPU_LIBRARY_PATH`` is not in this tuple, because ``import jax`` sets it if libtpu is installed."""

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


def select_cpu() -> None:
    """Select the CPU as the platform of JAX in this process and its child processes.

    This has no effect in this process if JAX has already initialized its backends.
    """
    import jax  # so that a process without JAX can import this module

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def select_cpu_without_accelerators() -> None:
    """Call :func:`select_cpu` if libtpu is installed and the machine has neither a TPU nor another accelerator.

    Without a TPU, JAX uses the CPU in any case, but libtpu then prints several lines of errors when JAX initializes its
    backends. If ``JAX_PLATFORMS`` or ``jax_platforms`` is set, if a JAX plugin of an accelerator is installed, or if
    the machine might have an accelerator, this function has no effect. All programs of jaxlm call it at their start.
    ``import jaxlm`` does not, because a library must not change the platform of a program.
    """
    import jax

    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms is not None or importlib.util.find_spec("libtpu") is None:
        return
    has_device = any(glob.glob(pattern) for pattern in _DEVICE_FILES)
    if has_device or any(name in os.environ for name in _ACCELERATOR_VARIABLES):
        return
    if importlib.util.find_spec("jax_plugins") is None and not importlib.metadata.entry_points(group="jax_plugins"):
        select_cpu()


def processor_name() -> str:
    """The name of the processor, for example "AMD EPYC 9354". If it is unknown, the architecture, such as "x86_64"."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def processor_model() -> str:
    """The name of the processor with its model numbers, for example "AMD EPYC (cpu family 25, model 17)".

    A virtual machine may give different processors the same name. The model numbers are known only on Linux.
    """
    info = _cpu_info()
    keys = ("cpu family", "model", "CPU implementer", "CPU part")
    numbers = ", ".join(f"{key} {info[key]}" for key in keys if key in info)
    return f"{processor_name()} ({numbers})" if numbers else processor_name()


def _cpu_info() -> dict[str, str]:
    """The entries of the first processor in ``/proc/cpuinfo``. Empty if there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    entries = (line.partition(":") for line in text.strip().partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""What the processes of one run tell each other. A run of one process pays nothing for it.

In a run of several, as on a slice of several hosts, all processes execute one program and must make the same calls of
these functions in the same order. What a run leaves on the disk is written by the first process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def _multihost_utils() -> Any:
    """Imported by who needs it: ``import jaxlm`` does not."""
    from jax.experimental import multihost_utils

    return multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What ``make()`` returns in the first process, in every process; nowhere else is it called.

    For what must happen once (a directory is made) or be the same everywhere (a name with the time in it).

    Raises:
        Exception: what ``make`` raised, in the first process.
        RuntimeError: with its message, in the others.
    """
    if jax.process_count() == 1:
        return make()
    multihost_utils = _multihost_utils()
    made, error = "", None
    if is_first():
        try:
            made = make()
        except Exception as raised:  # the others wait: they must hear of it first
            made, error = str(raised), raised
    told = np.frombuffer(made.encode(), np.uint8)
    failed, length = multihost_utils.broadcast_one_to_all(np.array([error is not None, len(told)], np.int32))
    text = np.zeros(length, np.uint8)
    text[: len(told)] = told
    made = bytes(multihost_utils.broadcast_one_to_all(text).astype(np.uint8)).decode()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"the first process failed: {made}")
    return made


def wait(why: str) -> None:
    """Return when every process has called this. ``why`` is in the error, should they call it for different reasons."""
    if jax.process_count() > 1:
        _multihost_utils().sync_global_devices(why)


def end_after(step: int) -> bool:
    """Whether all processes of several end after ``step``, because one of them was sent SIGTERM: JAX's service against
    preemption, which handles that signal, makes them agree. To be asked after every step."""
    return bool(_multihost_utils().reached_preemption_sync_point(step))


def require_shared(directory: Path) -> None:
    """Make sure that all processes see the first one's ``directory``, which is there.

    Raises:
        ValueError: some do not.
    """
    if jax.process_count() == 1:
        return

    def leave() -> str:
        file, path = tempfile.mkstemp(prefix=".shared-", dir=directory)
        os.close(file)
        return Path(path).name

    left = directory / from_first(leave)
    seen = _multihost_utils().process_allgather(np.array(left.exists())).reshape(-1)
    if is_first():
        left.unlink()
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise ValueError(
            f"process {blind} of {len(seen)} does not see what the first writes to {directory}: name a directory that "
            "all hosts mount, or keep no checkpoints (checkpoint_every=None)"
        )


def on_host(array: Any) -> np.ndarray:
    """The whole array as numpy, in every process, also where its parts are on devices of several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(_multihost_utils().process_allgather(array, tiled=True))
    return np.asarray(array)

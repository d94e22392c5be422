"""Checkpoints: a tree of arrays and a JSON dict, saved atomically. Only this module imports orbax.

The checkpoint of a step is the directory ``<directory>/<step>``. It is written under a temporary name and renamed when
it is complete:

    state/    the arrays, by path name (``params/embed/weight``), in orbax's format
    record/   one JSON file: the step, ``extra`` of the save, the shape, dtype and checksum of each array, the metric,
              the caller's ``meta``, the version of this format, and a checksum of all of these

A killed process leaves only complete steps and the directories of interrupted saves and deletions. No function reads
such a directory, and :meth:`Checkpointer.remove_leftovers` removes it after the next complete save. Older steps are
deleted only after a newer step has been written to the disk (fsync). :meth:`Checkpointer.restore` never skips a damaged
step silently, whereas ``steps``, ``latest``, ``best`` and ``roll_back`` use only the steps with an intact record.
Arrays are stored with their complete (unsharded) shapes, so that they can be restored onto another mesh. Layers that
were saved stacked or per-layer can be restored into either layout (``spec.layers``).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import integrity, json_files, processes, spec
from jaxlm.config import check_min

FORMAT = 1
"""Version of the record format. Reading a record of another version raises an error."""
OnCorrupt = Literal["stop", "previous"]

_STEP = re.compile(r"0|[1-9]\d*")
_LEFTOVER = re.compile(r"\d+\.(deleted|orbax-checkpoint-tmp.*)")


class CorruptCheckpointError(ValueError):
    """A checkpoint is damaged: its files differ from the saved files, are incomplete, or have another format."""


# --------------------------------------------------------------------------------------------- checksums

# Odd multipliers (the primes of xxHash), one pair for each of the two 32-bit sums.
_MULTIPLIERS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def _uint32_words(array: jax.Array) -> jax.Array:
    """The bits of ``array`` as uint32 words. A 64-bit or complex entry has several words, along new last axes."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jnp.stack([_uint32_words(array.real), _uint32_words(array.imag)], axis=-1)
    if array.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return array.astype(jnp.uint32)


@jax.jit
def _hash_sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two hash sums of an array. Each sum adds, modulo 2**32, a hash of every word together with its position.

    For a fixed position, the hash is a one-to-one function of the word. So a change of one word changes both sums. The
    hash includes the position, so a swap of two different entries almost always changes the sums. Integer sums do not
    depend on the order of summation, so they do not depend on the sharding.
    """
    words = _uint32_words(array)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    def hash_sum(multiplier_1: int, multiplier_2: int) -> jax.Array:
        mixed = words ^ (position * jnp.uint32(multiplier_1) + jnp.uint32(multiplier_2))
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(multiplier_2)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(multiplier_1)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return hash_sum(*_MULTIPLIERS[0]), hash_sum(*_MULTIPLIERS[1])


def checksums(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """The 64-bit checksum of each array in hexadecimal, computed on the devices of the array.

    Arrays with equal bits have equal checksums, for any number of devices and processes and any sharding. The checksum
    is not cryptographic.
    """
    # The programs run one after the other, because concurrent programs with collectives can deadlock on virtual CPU
    # devices.
    sums = {name: jax.device_get(_hash_sums(array)) for name, array in arrays.items()}
    return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in sums.items()}


# ------------------------------------------------------------------------------------- trees as flat dicts


@dataclasses.dataclass(frozen=True)
class _ShapeDtype:
    """Shape and dtype of an array in the record. For a typed random key, the dtype is the key dtype (``key<fry>``)."""

    shape: tuple[int, ...]
    dtype: str


def _flatten(tree: spec.Tree) -> dict[str, Any]:
    """The result of ``spec.flatten``, after a check: leaves have a shape and a dtype, and their path names differ."""
    flat = spec.flatten(tree)
    if len(flat) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the tree have the same path name: use keys without '/'")
    for name, leaf in flat.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{name!r} is {leaf!r}: a checkpoint holds arrays; use jnp.asarray, or put it into meta")
    return flat


def _shapes_and_dtypes(flat: dict[str, Any]) -> dict[str, _ShapeDtype]:
    return {name: _ShapeDtype(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flat.items()}


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding of a leaf; None if it has no sharding or is an uncommitted array."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _orbax_target(name: str, leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """The target with which orbax restores a leaf: a ``ShapeDtypeStruct`` with the sharding of the leaf.

    Without a sharding (:func:`_sharding_of`), the target is an array on the host.
    """
    raw = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    raw = jax.eval_shape(jax.random.key_data, raw) if _is_key(leaf) else raw
    if jax.dtypes.canonicalize_dtype(raw.dtype) != raw.dtype:
        raise ValueError(f"{name!r} is {raw.dtype}: set jax_enable_x64 to restore it")
    sharding = _sharding_of(leaf)
    if sharding is None:
        return np.empty(raw.shape, raw.dtype)
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise ValueError(
            f"{name!r} has the sharding {sharding}, which has no devices: use NamedSharding on a real mesh"
        )
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _wrap_key(raw: jax.Array, leaf: Any) -> jax.Array:
    """``raw`` as a typed random key if ``leaf`` is a typed random key, otherwise ``raw``."""
    if not _is_key(leaf):
        return raw
    impl: list[Any] = []  # key_impl needs a key and does not accept its dtype, so it is called with a traced key
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), leaf.dtype))
    return jax.random.wrap_key_data(raw, impl=impl[0])


# ------------------------------------------------------------------------------------------ the checkpointer


class Checkpointer:
    """Saves and restores checkpoints (a tree of arrays and a JSON dict) of training steps in one directory.

    The last ``keep_last`` steps and the step with the lowest metric are kept. All other steps are deleted after a newer
    step is complete. A step saved with ``extra=True`` does not count toward ``keep_last``. When a newer step is
    complete, the extra step is deleted unless it is the best step.

    Only one ``Checkpointer`` at a time may save to a directory or delete steps. Other ``Checkpointer`` objects may read
    at the same time. With several processes, all processes make the same calls on a shared directory. ``meta`` is saved
    from process 0.

    A save runs in the background. The next ``save``, ``wait``, ``restore``, ``roll_back`` or ``close`` waits for the
    save, raises the errors of the save and deletes old steps. So a program must make one of these calls before it ends.

    Example:
        >>> with Checkpointer("runs/small") as checkpointer:
        ...     if checkpointer.latest is not None:
        ...         state, meta = checkpointer.restore(state)
        ...     checkpointer.save(100, state, {"data": iterator_state}, metric=validation_loss)
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 3) -> None:
        """Create the object without writing to the disk. The first save creates the directory.

        Raises:
            ValueError: ``keep_last`` is less than 1, or ``directory`` is a URL.
            NotADirectoryError: ``directory`` is a file.
        """
        check_min(1, keep_last=keep_last)
        if "://" in str(directory):
            raise ValueError(f"directory={str(directory)!r} is a URL: checkpoints need a path on a mounted file system")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{self.directory} is a file: checkpoints need a directory")
        self.keep_last = keep_last
        self._last_saved: int | None = None
        self._needs_sync = False
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_keep_log_record)  # a second call with the same filter has no effect
        _ignore_closed_event_loop()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), record=ocp.JsonCheckpointHandler())
        )

    # ------------------------------------------------------------------------------------------------- saving

    def save(
        self, step: int, tree: spec.Tree, meta: dict[str, Any], metric: float | None = None, *, extra: bool = False,
        wait: bool = False,
    ) -> None:  # fmt: skip
        """Save ``tree`` and ``meta`` as the checkpoint of ``step``.

        When the method returns, everything has been copied: the arrays may be donated and ``meta`` may be changed.

        Args:
            tree: a pytree of ``jax.Array``, including typed random keys.
            meta: JSON values, such as config, state of the data iterator and versions. Tuples are restored as lists.
            metric: a value to minimize, e.g. the validation loss. A step with the metric None or NaN is never the best
                step.
            extra: whether this save is outside the regular schedule, e.g. because a signal ends the run. An extra step
                does not count toward ``keep_last``, and :meth:`roll_back` does not return to it.
            wait: whether to return only after the checkpoint is complete. Set it for the last checkpoint of a run.

        Raises:
            ValueError: ``step`` is not an integer of at least 0, or two leaves have the same name.
            FileExistsError: ``step`` exists. If its record is damaged, the old directory is renamed and nothing is
                raised.
            TypeError: a leaf is not a ``jax.Array``, or ``meta`` has a key that is not a string or a value that is not
                a JSON type.
            OSError: the disk is full or the directory is not writable, in this save or the previous one.
            Exception: any other error of the previous save.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an int >= 0, got {step!r}")
        json_files.require_json(meta, "meta")
        flat = _flatten(tree)
        for name, leaf in flat.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name!r} is a {type(leaf).__name__}: a checkpoint holds jax arrays; use jnp.asarray")
        self.wait()
        path = self._path(step)
        records, damaged = self._scan()
        if step in records:
            raise FileExistsError(
                f"{path} exists, and checkpoints are never overwritten: move it, or save to another directory"
            )
        if step in damaged and processes.is_first():
            self._rename_damaged(step, damaged[step])

        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in flat.items()}
        sums = checksums(arrays)
        record = {
            "format": FORMAT,
            "step": step,
            "extra": extra,
            "arrays": {
                name: {**dataclasses.asdict(shape_dtype), "checksum": sums[name]}
                for name, shape_dtype in _shapes_and_dtypes(flat).items()
            },
            "metric": None if metric is None else float(metric),
            "meta": meta,
        }
        arrays = {name: array for name, array in arrays.items() if array.size}  # orbax cannot save empty arrays
        record = json.loads(json.dumps(record))  # a copy, because orbax writes it later in another thread
        record["checksum"] = _digest(record)
        self._last_saved, self._needs_sync = step, True
        with integrity.explain_disk_errors(self.directory, "the earlier checkpoints are unchanged"):
            self._orbax.save(
                path, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete, then delete old steps. Raises the errors of the save."""
        with integrity.explain_disk_errors(self.directory, "the earlier checkpoints are unchanged"):
            self._orbax.wait_until_finished()
            # A failed save leaves no directory of its step. Then no older step is deleted.
            if self._last_saved is not None and processes.is_first() and self._path(self._last_saved).is_dir():
                if self._needs_sync:
                    integrity.sync_tree(self._path(self._last_saved))
                    self._needs_sync = False
                self._prune(self._last_saved)

    def close(self) -> None:
        """Wait for the last save and release orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prune(self, last_saved: int) -> None:
        """Delete the steps that are not kept, and the leftovers of killed processes. No save may be running."""
        records = self._scan()[0]
        scheduled = [step for step in records if not records[step]["extra"]]
        steps_to_keep = {*scheduled[-self.keep_last :], last_saved, self.best}
        self._mark_deleted(step for step in records if step not in steps_to_keep)
        self.remove_leftovers()

    def _mark_deleted(self, steps: Iterable[int]) -> None:
        """Rename steps, so that :meth:`remove_leftovers` deletes them.

        A rename is atomic, so a process that is killed here leaves no partly deleted step.
        """
        for step in steps:
            self._path(step).rename(self.directory / f"{step}.deleted")

    def remove_leftovers(self) -> None:
        """Remove what interrupted saves and deletions have left. No save to the directory may be running."""
        if processes.is_first() and self.directory.is_dir():
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ------------------------------------------------------------------------------------------------ listing

    def steps(self) -> list[int]:
        """The steps with an intact record, in ascending order. A step that is still being saved is not included."""
        return list(self._scan()[0])

    def damaged(self) -> dict[int, str]:
        """``{step: reason}`` for the steps whose record is damaged. The arrays are not checked."""
        return self._scan()[1]

    @property
    def latest(self) -> int | None:
        """The largest step with an intact record, or None."""
        return max(self.steps(), default=None)

    @property
    def latest_scheduled(self) -> int | None:
        """The largest step with an intact record that is not ``extra``, or None."""
        records = self._scan()[0]
        return max((step for step in records if not records[step]["extra"]), default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest metric (on ties, the earliest of them), or None if no metric is a number.

        Steps with a damaged record are left out.
        """
        metrics = {step: record["metric"] for step, record in self._scan()[0].items()}
        ranked = {step: metric for step, metric in metrics.items() if metric is not None and not math.isnan(metric)}
        return min(ranked, key=lambda step: ranked[step], default=None)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The ``meta`` saved with ``step`` (None: the newest step). No array is read.

        If the newest step is damaged, no earlier step is used.

        Raises:
            FileNotFoundError: there is no such step.
            CorruptCheckpointError: the record of the step is damaged.
        """
        return self._find(step)[1]["meta"]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _scan(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """``{step: record}`` of the intact steps, and ``{step: reason}`` of the damaged steps, in ascending order."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        records: dict[int, dict[str, Any]] = {}
        damaged: dict[int, str] = {}
        for step in sorted(int(name) for name in names if _STEP.fullmatch(name)):
            try:
                records[step] = self._read_record(step)
            except CorruptCheckpointError as error:
                damaged[step] = str(error)
        return records, damaged

    def _read_record(self, step: int) -> dict[str, Any]:
        """The record of a step. Raises ``CorruptCheckpointError`` if it is damaged."""
        path = self._path(step)
        try:
            is_complete = ocp.utils.is_checkpoint_finalized(path)
            record = ocp.JsonCheckpointHandler().restore(path / "record") if is_complete else None
        except OSError as error:
            raise CorruptCheckpointError(f"{path / 'record'} cannot be read: {error}") from error
        except ValueError as error:  # not JSON, or not UTF-8
            raise CorruptCheckpointError(f"{path / 'record'} is damaged: {error}") from error
        if not is_complete:
            raise CorruptCheckpointError(f"{path} was not saved completely")
        if not isinstance(record, dict) or "checksum" not in record:
            raise CorruptCheckpointError(
                f"{path / 'record'} has no checksum: it is damaged, or jaxlm 0.1 wrote it (then restore it with 0.1)"
            )
        checksum = record.pop("checksum")
        if checksum != _digest(record):
            raise CorruptCheckpointError(f"{path / 'record'} is damaged: its checksum does not match its content")
        if record["format"] != FORMAT:
            raise CorruptCheckpointError(
                f"{path / 'record'} has format {record['format']}, this jaxlm reads {FORMAT}: update jaxlm"
            )
        record = {"step": step, "extra": False, **record}  # the oldest records of this format lack these entries
        if record["step"] != step:
            raise CorruptCheckpointError(f"{path} is the checkpoint of step {record['step']}: it was renamed")
        if not (path / "state").is_dir():
            raise CorruptCheckpointError(f"{path / 'state'}, the directory of the arrays, is missing")
        return record

    def _find(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """``step`` (None: the newest step) and its record.

        If the newest step is damaged, no earlier step is used. The error for a missing step names the intact steps.
        """
        records, damaged = self._scan()
        step = max([*records, *damaged], default=None) if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step in damaged:
            raise CorruptCheckpointError(damaged[step])
        if step not in records:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}: the steps are {list(records)}")
        return step, records[step]

    def _alternatives(self, step: int) -> str:
        """The part of an error message that lists the intact steps to use instead of the damaged ``step``."""
        intact = [other for other in self.steps() if other != step]
        if not intact:
            return "no other step is intact"
        earlier = [other for other in intact if other < step]
        if not earlier:
            return f"the intact steps are {intact}: restore one of them"
        fix = f"the newest intact step before it is {max(earlier)}: restore this step"
        if step > max(intact):
            fix += ', or use on_corrupt="previous" (--training.on-corrupt previous)'
        return f"{fix}; the intact steps are {intact}"

    def _rename_damaged(self, step: int, reason: str) -> None:
        """Rename a damaged step, so that the step can be saved again."""
        path = self._path(step)
        new_path = path.with_name(f"{step}.corrupt-{time.time_ns()}")
        logging.getLogger(__name__).warning("%s; it is kept as %s", reason, new_path)
        path.rename(new_path)

    # ---------------------------------------------------------------------------------------------- restoring

    def restore(
        self, target: spec.Tree, step: int | None = None, *, best: bool = False, on_corrupt: OnCorrupt = "stop"
    ) -> tuple[spec.Tree, dict[str, Any]]:
        """``(tree, meta)`` of ``step``, bitwise as saved.

        If ``step`` is None, the method restores the best step (``best=True``) or the newest step. If the newest step is
        damaged, ``on_corrupt`` determines what happens.

        Args:
            target: a tree of arrays, ``jax.ShapeDtypeStruct`` or ``ArraySpec`` with the structure, shapes, dtypes and
                optional shardings of the result. For a leaf without sharding, for example from ``jax.eval_shape``, the
                restored array is not committed to a device.
            on_corrupt: "stop" raises an error if the step is damaged. "previous" restores the newest intact step, and
                renames the damaged steps after it to ``<step>.corrupt-<time>`` with a warning. If no intact step
                precedes the damaged newest step, "previous" raises an error too. "previous" is only allowed if
                ``step`` is None and ``best`` is False.

        Raises:
            FileNotFoundError: there is no such step, or ``best`` is True and no step has a metric.
            ValueError: names, shapes or dtypes of the saved tree differ from ``target``; an array of ``target`` has 64
                bits without ``jax_enable_x64``, or a sharding without devices; ``on_corrupt`` is unknown, or is
                "previous" with ``step`` or ``best``; or both ``step`` and ``best`` are given. In all these cases, no
                array is read.
            CorruptCheckpointError: the record or an array is damaged. The error names the directory or file, and the
                intact steps.
        """
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"on_corrupt={on_corrupt!r} is unknown: choose from {', '.join(get_args(OnCorrupt))}")
        if best and step is not None:
            raise ValueError(f"step={step} and best=True exclude each other: pass only one of them")
        if on_corrupt == "previous" and (best or step is not None):
            raise ValueError('on_corrupt="previous" is only for the latest step: leave step and best out')
        self.wait()
        if best:
            step = self.best
            for damaged_step, reason in self.damaged().items():
                logging.getLogger(__name__).warning("step %d may have been the best step: %s", damaged_step, reason)
            if step is None and self.steps():
                raise FileNotFoundError(f"none of the checkpoints in {self.directory} has a metric: {self.steps()}")
        while True:
            intact, damaged = self._scan()
            newest = max([*intact, *damaged], default=0) if step is None else step
            try:
                return self._restore(target, step)
            except CorruptCheckpointError as error:
                reason = str(error)
                if on_corrupt == "stop" or not any(other < newest for other in intact):
                    raise CorruptCheckpointError(f"{reason}; {self._alternatives(newest)}") from error
            processes.call_in_first_process(functools.partial(self._rename_damaged, newest, reason))

    def roll_back(self, target: spec.Tree) -> tuple[spec.Tree, dict[str, Any]]:
        """``(tree, meta)`` of the newest step that has an intact record and is not ``extra``. Newer steps are deleted.

        The result does not depend on whether extra steps were saved. Which scheduled steps remain does not depend on
        that either, unless an extra step had the lowest metric: then, the best scheduled step may have been deleted.
        A newer step with a damaged record is not deleted. It is renamed to ``<step>.corrupt-<time>`` with a warning, so
        that :meth:`restore` does not try to read it.

        Raises:
            FileNotFoundError: no step has an intact record and is not ``extra``.
            ValueError: as in :meth:`restore`, names, shapes or dtypes differ from ``target``.
            CorruptCheckpointError: an array of the restored step is damaged. No step is deleted.
        """
        self.wait()
        processes.barrier("checkpoint saved")  # so that no process reads old steps while the first process deletes them
        step = self.latest_scheduled
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory} to go back to")
        restored = self._restore(target, step)
        if processes.is_first():
            intact, damaged = self._scan()
            self._mark_deleted(later for later in intact if later > step)
            for later in damaged:
                if later > step:
                    self._rename_damaged(later, damaged[later])
            self.remove_leftovers()
        processes.barrier("newer checkpoints deleted")
        self._last_saved = None
        return restored

    def _restore(self, target: spec.Tree, step: int | None) -> tuple[spec.Tree, dict[str, Any]]:
        step, record = self._find(step)
        path = self._path(step)
        saved = {name: _ShapeDtype(tuple(entry["shape"]), entry["dtype"]) for name, entry in record["arrays"].items()}
        flat = _flatten(target)
        abstract, to_target_layout = _in_saved_layout(target, saved.keys())
        saved_layout = {name: flat.get(name, leaf) for name, leaf in spec.flatten(abstract).items()}
        spec.require_same(_shapes_and_dtypes(saved_layout), saved, f"the target and the checkpoint {path}")
        orbax_targets = {name: _orbax_target(name, leaf) for name, leaf in saved_layout.items()}
        empty = {
            name: jax.device_put(np.empty(leaf.shape, leaf.dtype), getattr(leaf, "sharding", None))
            for name, leaf in orbax_targets.items()
            if 0 in leaf.shape
        }
        orbax_targets = {name: leaf for name, leaf in orbax_targets.items() if name not in empty}
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(orbax_targets))
            restored = self._orbax.restore(path, args=arguments).state
        except Exception as error:  # orbax and tensorstore errors have no common base class
            reason = str(error).split(" [tensorstore_spec")[0]
            raise CorruptCheckpointError(f"the arrays of {path} cannot be read: {reason}") from error
        # Arrays stay uncommitted unless the target was committed, so that a jitted step may use them on any mesh.
        arrays = {
            name: array if isinstance(array, jax.Array) else jax.device_put(array)
            for name, array in {**restored, **empty}.items()
        }
        sums = checksums(arrays)
        wrong = [name for name in saved_layout if sums[name] != record["arrays"][name]["checksum"]]
        if wrong:
            raise CorruptCheckpointError(f"{path} is damaged: wrong checksum of {', '.join(wrong)}")
        tree = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in saved_layout])
        leaves = []
        for (name, leaf), array in zip(flat.items(), jax.tree.leaves(to_target_layout(tree)), strict=True):
            sharding = _sharding_of(leaf)
            if name not in saved_layout and sharding is not None:  # orbax restored the array in the saved layout
                array = jax.device_put(np.asarray(array) if jax.process_count() > 1 else array, sharding)
            leaves.append(_wrap_key(array, leaf))
        return jax.tree.unflatten(jax.tree.structure(target), leaves), record["meta"]


def _in_saved_layout(target: spec.Tree, saved: Collection[str]) -> tuple[spec.Tree, Callable[[spec.Tree], spec.Tree]]:
    """``target`` as shapes in the layer layout of the saved arrays (``spec.layers``), and a function that undoes this.

    The function converts a tree in the layout of the saved arrays to the layout of ``target``.

    Args:
        saved: the names of the saved arrays.
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), target)
    names, saved_names = set(spec.flatten(target)), set(saved)
    if names != saved_names:
        if _without_layer_numbers(names) == saved_names:
            stacked = jax.eval_shape(spec.restack, abstract)
            _check_layer_axes(stacked, scan_layers=True)
            return stacked, spec.unstack
        if names == _without_layer_numbers(saved_names):
            _check_layer_axes(abstract, scan_layers=False)
            return jax.eval_shape(spec.unstack, abstract), spec.restack
    return abstract, lambda tree: tree


def _check_layer_axes(stacked: spec.Tree, *, scan_layers: bool) -> None:
    """Raise ``ValueError`` if an optimizer array of stacked layers does not begin with the axis ``layers``.

    Only the number of axes is checked. An array without axes (NovoGrad: one number per weight), or with more axes than
    its parameter (L-BFGS: the last gradients of each weight), raises the error. All other arrays, such as the moments
    of Adam, are assumed to begin with the axis ``layers``.

    Args:
        scan_layers: the value of the config field in the checkpoint, for the message.
    """
    flat = spec.flatten(stacked)
    num_axes = {name.removeprefix("params/"): leaf.ndim for name, leaf in flat.items() if name.startswith("params/")}
    for name, leaf in flat.items():
        keys = name.split("/")
        suffixes = ("/".join(keys[start:]) for start in range(1, len(keys)))
        max_axes = next((num_axes[suffix] for suffix in suffixes if suffix in num_axes), leaf.ndim)
        if spec.LAYERS in keys and not 0 < leaf.ndim <= max_axes:
            raise ValueError(
                f"{name} {list(leaf.shape)}: the optimizer state cannot be converted between stacked and per-layer, "
                f"because this array does not begin with the layer axis: use scan_layers={scan_layers}, as in the "
                "checkpoint"
            )


def _without_layer_numbers(names: Iterable[str]) -> set[str]:
    return {spec.split_layer(name)[0] for name in names}


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Whether to keep a log record.

    Errors with a traceback from orbax's threads or tasks are not logged, because orbax raises the first of these errors
    in the caller. The caller does not get the errors of other damaged arrays.
    """
    if not record.exc_info or record.levelno < logging.ERROR:
        return True
    from_orbax = "orbax" in Path(record.pathname).parts
    # If several arrays are damaged, orbax raises the first error, and asyncio logs the others.
    from_tensorstore = record.name == "asyncio" and "tensorstore_spec" in str(record.exc_info[1])
    return not (from_orbax or from_tensorstore)


@functools.cache  # the hook is installed once
def _ignore_closed_event_loop() -> None:
    """Hide the errors "Event loop is closed" that follow in other threads after orbax failed to read an array.

    orbax raises the error of the first unreadable array and closes its event loop. The reads of other unreadable arrays
    then fail in tensorstore's threads, and Python would print each of these errors on standard error.
    """
    previous_hook = sys.unraisablehook

    def hook(error: Any) -> None:
        # tensorstore's threads have no Python frame, so the first frame of the traceback is in asyncio.
        frame = None if error.exc_traceback is None else error.exc_traceback.tb_frame
        from_thread = frame is not None and Path(frame.f_code.co_filename).parent.name == "asyncio"
        if not (from_thread and str(error.exc_value) == "Event loop is closed"):
            previous_hook(error)

    sys.unraisablehook = hook


def _digest(record: dict[str, Any]) -> str:
    """The SHA-256 of a record without its checksum, in hexadecimal."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

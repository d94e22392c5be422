"""Checkpoints: any tree of arrays and a JSON dict, saved together or not at all.  The only file that knows orbax.

A step is one directory, ``<directory>/<step>``, that appears by a rename when everything in it is written:

    state/    the arrays, by path name (``params/embed/weight``), in orbax's format
    record/   one JSON file: the step, shape, dtype and checksum of each array, the metric, the caller's ``meta``, the
              version of this format, and a checksum of all of these

A process that is killed leaves at most a temporary directory, which nobody reads and the next save removes
(:meth:`Checkpointer.remove_leftovers`). Older steps are deleted only when a newer one has been written to the disk
(fsync). A step whose record is damaged is never passed over in silence: see :meth:`Checkpointer.restore`.
Arrays are stored whole, whatever their sharding was, so that they can be restored onto another mesh.
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
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import integrity, processes, spec

FORMAT = 1
"""Version of the record. A record of another version is refused."""
ON_CORRUPT = Literal["stop", "previous"]

_STEP = re.compile(r"0|[1-9]\d*")
_LEFTOVER = re.compile(r"\d+\.(deleted|orbax-checkpoint-tmp.*)")


class CorruptCheckpointError(ValueError):
    """What is on the disk is not what was saved."""


# --------------------------------------------------------------------------------------------- checksums

# Odd multipliers (the primes of xxHash), one pair for each of the two sums.
_MULTIPLIERS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def _words(array: jax.Array) -> jax.Array:
    """The bits of ``array`` as uint32: one word per entry, or two along a new last axis when entries are wider."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jnp.stack([_words(array.real), _words(array.imag)], axis=-1)
    if array.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return array.astype(jnp.uint32)


@jax.jit
def _sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums, modulo 2**32, of each word mixed with its position.

    For a given position the mixing is one-to-one, so that a change of any one entry changes both sums; the position
    makes it notice entries that changed places. Integer sums do not depend on their order, hence not on the sharding.
    """
    words = _words(array)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    def one(first: int, second: int) -> jax.Array:
        mixed = words ^ (position * jnp.uint32(first) + jnp.uint32(second))
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(second)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(first)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return one(*_MULTIPLIERS[0]), one(*_MULTIPLIERS[1])


def checksums(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """64 bits in hexadecimal for each array, computed where the array lives: equal bits, equal checksum.

    The same on any number of devices and processes, for any sharding. No protection against an adversary.
    """
    # One after the other: on several virtual CPU devices, independent programs with collectives can deadlock.
    sums = {name: jax.device_get(_sums(array)) for name, array in arrays.items()}
    return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in sums.items()}


# ------------------------------------------------------------------------------------- trees as flat dicts


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Shape and dtype as the record has them: a typed key is ``key<fry>[]``, not the uint32 behind it."""

    shape: tuple[int, ...]
    dtype: str


def _flatten(tree: spec.Tree) -> dict[str, Any]:
    """``spec.flatten``, refusing leaves that are not arrays and names that are not unique."""
    flat = spec.flatten(tree)
    if len(flat) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the tree have the same path name: use keys without '/'")
    for name, leaf in flat.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{name!r} is {leaf!r}: a checkpoint holds arrays, use jnp.asarray or put it into meta")
        if 0 in leaf.shape:
            raise ValueError(f"{name!r} has shape {tuple(leaf.shape)}: an array without entries cannot be saved")
    return flat


def _described(flat: dict[str, Any]) -> dict[str, _Stored]:
    return {name: _Stored(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flat.items()}


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _to_read(name: str, leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """What orbax is asked for: an array on the devices of the target's leaf, or on the host if it names none."""
    raw = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    raw = jax.eval_shape(jax.random.key_data, raw) if _is_key(leaf) else raw
    if jax.dtypes.canonicalize_dtype(raw.dtype) != raw.dtype:
        raise ValueError(f"{name!r} is {raw.dtype}: set jax_enable_x64 to restore it")
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return np.empty(raw.shape, raw.dtype)
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise ValueError(f"{name!r} is to go to {sharding}, which has no devices: use NamedSharding on a real mesh")
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _as_target(raw: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return raw
    impl: list[Any] = []  # key_impl reads it off a key, not off its dtype: show it a traced one
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), leaf.dtype))
    return jax.random.wrap_key_data(raw, impl=impl[0])


def _require_json(value: Any, where: str) -> None:
    """JSON would turn a key 3 into "3" without a word, and knows no numpy scalars."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON has only strings as keys, use {str(key)!r}")
            _require_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise TypeError(f"{where} is {value!r} of type {type(value).__name__}: JSON cannot hold it")


# ------------------------------------------------------------------------------------------ the checkpointer


class Checkpointer:
    """Saves and restores trees of arrays, each with a JSON dict, in the steps of one directory.

    The last ``keep_last`` steps are kept, and the one with the lowest metric if ``keep_best``; older ones are deleted
    once a newer one is complete. A step that is saved as ``extra`` does not count: it is deleted once a newer one is
    complete. Only an object that saves deletes anything: others may read beside it.
    One object at a time may save into a directory. In a run of several processes all of them make the same calls,
    on a directory that they share; ``meta`` is that of process 0.

    A save goes on in the background. It is complete, and its errors are raised, at the next ``save``, ``wait``,
    ``restore`` or ``close``: a program must not end before that.

    Example:
        >>> with Checkpointer("runs/small") as checkpointer:
        ...     if checkpointer.latest is not None:
        ...         state, meta = checkpointer.restore(state)
        ...     checkpointer.save(100, state, {"data": iterator_state}, metric=validation_loss)
    """

    def __init__(
        self, directory: str | Path, *, keep_last: int = 3, keep_best: bool = True, asynchronous: bool = True
    ) -> None:
        """Touches nothing on the disk: the directory appears with the first save.

        Raises:
            ValueError: ``keep_last`` is less than 1, or ``directory`` is a URL.
            NotADirectoryError: ``directory`` is a file.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if "://" in str(directory):
            raise ValueError(f"checkpoints go to a mounted file system, got the URL {str(directory)!r}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{self.directory} is a file: checkpoints need a directory")
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        self._last_saved: int | None = None
        self._unsynced = False
        logging.getLogger("absl").addFilter(_is_news)  # once, however many objects there are
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), record=ocp.JsonCheckpointHandler())
        )

    # ------------------------------------------------------------------------------------------------- saving

    def save(
        self, step: int, tree: spec.Tree, meta: dict[str, Any], metric: float | None = None, *, extra: bool = False,
        wait: bool = False,
    ) -> None:  # fmt: skip
        """Save ``tree`` and ``meta`` as ``step``.

        When it returns, everything has been copied: arrays may be donated and ``meta`` changed at once.

        Args:
            tree: any pytree of ``jax.Array``, typed random keys too.
            meta: what JSON can hold (tuples come back as lists): config, state of the data iterator, versions.
            metric: the lower the better, e.g. the validation loss. NaN is never the best.
            extra: the step is outside of the schedule, e.g. because a signal ends the run. No other step is deleted for
                it, and :meth:`roll_back` passes over it.
            wait: return only when the checkpoint is complete, as for the last one of a run.

        Raises:
            FileExistsError: ``step`` is there already.
            TypeError: a leaf is not a ``jax.Array``, or ``meta`` holds what JSON cannot.
            OSError: the disk is full or the directory cannot be written, at this save or the one before it.
            Exception: whatever else stopped the save before this one.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an int >= 0, got {step!r}")
        _require_json(meta, "meta")
        flat = _flatten(tree)
        for name, leaf in flat.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name!r} is a {type(leaf).__name__}: a checkpoint holds jax arrays, use jnp.asarray")
        self.wait()
        path = self._path(step)
        records, damaged = self._look()
        if step in records:
            raise FileExistsError(f"{path} exists, and nothing saved is overwritten: move it away, or save elsewhere")
        if step in damaged and processes.is_first():
            self._move_aside(step, damaged[step])

        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in flat.items()}
        sums = checksums(arrays)
        record = {
            "format": FORMAT,
            "step": step,
            "extra": extra,
            "arrays": {
                name: {**dataclasses.asdict(stored), "checksum": sums[name]}
                for name, stored in _described(flat).items()
            },
            "metric": None if metric is None else float(metric),
            "meta": meta,
        }
        record = json.loads(json.dumps(record))  # a copy: orbax writes it later, in another thread
        record["checksum"] = _digest(record)
        self._last_saved, self._unsynced = step, True
        with integrity.explained(self.directory, "the earlier checkpoints are unchanged"):
            self._orbax.save(
                path, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            )
        if wait or not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is complete and what it superseded is deleted; raise what went wrong with it."""
        with integrity.explained(self.directory, "the earlier checkpoints are unchanged"):
            self._orbax.wait_until_finished()
            if self._last_saved is not None and processes.is_first():
                if self._unsynced:
                    integrity.sync_tree(self._path(self._last_saved))
                    self._unsynced = False
                self._prune(self._last_saved)

    def close(self) -> None:
        """Wait for the last save and release orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prune(self, last_saved: int) -> None:
        """Delete what the policy does not keep, and what killed processes left. Only while no save is going on."""
        records = self._look()[0]
        counted = [step for step in records if not _is_extra(records[step])]
        kept = {*counted[-self.keep_last :], last_saved, self.best if self.keep_best else None}
        self._delete(step for step in records if step not in kept)
        self.remove_leftovers()

    def _delete(self, steps: Iterable[int]) -> None:
        """Rename first: a step is whole or gone, even if this process is killed here. ``remove_leftovers`` deletes."""
        for step in steps:
            self._path(step).rename(self.directory / f"{step}.deleted")

    def remove_leftovers(self) -> None:
        """Remove what interrupted saves and deletions left. No other object may be saving into the directory."""
        if processes.is_first() and self.directory.is_dir():
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)

    # ------------------------------------------------------------------------------------------------ looking

    def steps(self) -> list[int]:
        """The intact steps on the disk, in order. A save still going on is not among them."""
        return list(self._look()[0])

    def damaged(self) -> dict[int, str]:
        """``{step: reason}`` of the steps whose record cannot be trusted. Their arrays are not read."""
        return self._look()[1]

    @property
    def latest(self) -> int | None:
        """The last intact step, or None."""
        return max(self.steps(), default=None)

    @property
    def best(self) -> int | None:
        """The intact step with the lowest metric (the earliest of equals), or None if no step has one."""
        metrics = {step: record["metric"] for step, record in self._look()[0].items()}
        ranked = {step: metric for step, metric in metrics.items() if metric is not None and not math.isnan(metric)}
        return min(ranked, key=lambda step: ranked[step], default=None)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The ``meta`` saved with ``step`` (None: the latest), without reading an array.

        Raises:
            FileNotFoundError: there is no such step.
        """
        return self._find(step)[1]["meta"]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _look(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """``{step: record}`` of the intact steps, and ``{step: reason}`` of the damaged ones, both in order."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        records: dict[int, dict[str, Any]] = {}
        damaged: dict[int, str] = {}
        for step in sorted(int(name) for name in names if _STEP.fullmatch(name)):
            try:
                records[step] = self._read(step)
            except CorruptCheckpointError as error:
                damaged[step] = str(error)
        return records, damaged

    def _read(self, step: int) -> dict[str, Any]:
        """The record of a step; ``CorruptCheckpointError`` says what is wrong with it."""
        path = self._path(step)
        try:
            if not ocp.utils.is_checkpoint_finalized(path):
                raise CorruptCheckpointError(f"{path} was not saved completely")
            record = ocp.JsonCheckpointHandler().restore(path / "record")
        except OSError as error:
            raise CorruptCheckpointError(f"{path / 'record'} cannot be read: {error}") from error
        except CorruptCheckpointError:
            raise
        except ValueError as error:  # not JSON, or not UTF-8
            raise CorruptCheckpointError(f"{path / 'record'} is damaged: {error}") from error
        if not isinstance(record, dict) or "checksum" not in record:
            raise CorruptCheckpointError(
                f"{path / 'record'} has no checksum: it is damaged, or of jaxlm 0.1, with which it can be read"
            )
        found = record.pop("checksum")
        if found != _digest(record):
            raise CorruptCheckpointError(f"{path / 'record'} is damaged: it has another checksum than its content")
        if record["format"] != FORMAT:
            raise CorruptCheckpointError(
                f"{path / 'record'} has format {record['format']}, this jaxlm reads {FORMAT}: update jaxlm"
            )
        if record.get("step", step) != step:  # the first records of this format have no step
            raise CorruptCheckpointError(f"{path} is the checkpoint of step {record['step']}: it was renamed")
        if not (path / "state").is_dir():
            raise CorruptCheckpointError(f"{path / 'state'}, the directory of the arrays, is missing")
        return record

    def _find(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """A step (None: the latest) and its record, or the error that says what there is instead."""
        records, damaged = self._look()
        wanted = max([*records, *damaged], default=None) if step is None else step
        if wanted is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if wanted in damaged:
            raise CorruptCheckpointError(damaged[wanted])
        if wanted not in records:
            raise FileNotFoundError(f"no checkpoint of step {wanted} in {self.directory}: there are {list(records)}")
        return wanted, records[wanted]

    def _instead(self, step: int) -> str:
        """What to do where a step is damaged."""
        intact = [other for other in self.steps() if other != step]
        if not intact:
            return "no other step is intact"
        return (
            f"the newest intact step before it is {max([s for s in intact if s < step], default=max(intact))}: restore "
            f'that one, or use on_corrupt="previous"; intact are {intact}'
        )

    def _move_aside(self, step: int, reason: str) -> str:
        """Rename a damaged step, so that another one of that number can be saved. Returns the new path."""
        path = self._path(step)
        aside = path.with_name(f"{step}.corrupt-{time.time_ns()}")
        logging.getLogger(__name__).warning("%s; it is kept as %s", reason, aside)
        path.rename(aside)
        return str(aside)

    # ---------------------------------------------------------------------------------------------- restoring

    def restore(
        self, target: spec.Tree, step: int | None = None, *, best: bool = False, on_corrupt: ON_CORRUPT = "stop"
    ) -> tuple[spec.Tree, dict[str, Any]]:
        """``(tree, meta)`` of ``step`` (None: the latest, or the best if ``best``), as they were saved, bit by bit.

        Args:
            target: the tree wanted, of arrays, ``jax.ShapeDtypeStruct`` or ``ArraySpec``: gives structure, shapes,
                dtypes and, where it has them, shardings. A leaf without one, as of ``jax.eval_shape``, is
                committed to no device, like a fresh ``jnp.zeros``.
            on_corrupt: "stop" raises an error if the step is damaged. "previous" takes the newest intact step before
                it; the damaged ones are renamed to ``<step>.corrupt-<time>`` with a warning. Only for the latest step.

        Raises:
            FileNotFoundError: there is no such step.
            ValueError: the tree stored is not the tree wanted (names, shapes, dtypes); nothing has been read then.
            CorruptCheckpointError: the record or an array is damaged. The error names the file and the newest intact
                step.
        """
        if best and step is not None:
            raise ValueError(f"ask for step={step} or for best=True, not for both")
        if on_corrupt == "previous" and (best or step is not None):
            raise ValueError('on_corrupt="previous" is for the latest step: leave step and best out')
        self.wait()
        if best:
            step = self.best
            for number, reason in self.damaged().items():
                logging.getLogger(__name__).warning("step %d may have been the best: %s", number, reason)
            if step is None and self.steps():
                raise FileNotFoundError(f"none of the checkpoints in {self.directory} has a metric: {self.steps()}")
        while True:
            intact, damaged = self._look()
            newest = max([*intact, *damaged], default=0) if step is None else step
            try:
                return self._restore(target, step)
            except CorruptCheckpointError as error:
                reason = str(error)
                if on_corrupt == "stop" or not any(other < newest for other in intact):
                    raise CorruptCheckpointError(f"{reason}; {self._instead(newest)}") from error
            processes.from_first(functools.partial(self._move_aside, newest, reason))

    def roll_back(self, target: spec.Tree) -> tuple[spec.Tree, dict[str, Any]]:
        """``(tree, meta)`` of the newest intact step that is not ``extra``. Newer steps are deleted.

        So the same steps are there as if the extra ones had never been saved.

        Raises:
            FileNotFoundError: there is no such step.
            CorruptCheckpointError: an array of it is damaged.
        """
        self.wait()
        processes.wait("checkpoint saved")  # the first process deletes superseded ones, which the others must not read
        records = self._look()[0]
        step = max((step for step in records if not _is_extra(records[step])), default=None)
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory} to go back to")
        restored = self._restore(target, step)
        if processes.is_first():
            self._delete(later for later in records if later > step)
            self.remove_leftovers()
        processes.wait("newer checkpoints deleted")
        self._last_saved = None
        return restored

    def _restore(self, target: spec.Tree, step: int | None) -> tuple[spec.Tree, dict[str, Any]]:
        step, record = self._find(step)
        path, flat = self._path(step), _flatten(target)
        stored = {name: _Stored(tuple(entry["shape"]), entry["dtype"]) for name, entry in record["arrays"].items()}
        spec.require_same(_described(flat), stored, f"the target and the checkpoint {path}")
        wanted = {name: _to_read(name, leaf) for name, leaf in flat.items()}
        try:
            read = self._orbax.restore(path, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))).state
        except Exception as error:  # orbax and tensorstore have no common class of errors
            what = str(error).split(" [tensorstore_spec")[0]
            raise CorruptCheckpointError(f"the arrays of {path} cannot be read: {what}") from error
        # Not committed to a device unless the target was: a jitted step may then use it on any mesh.
        arrays = {
            name: array if isinstance(array, jax.Array) else jax.device_put(array) for name, array in read.items()
        }
        sums = checksums(arrays)
        wrong = [name for name in flat if sums[name] != record["arrays"][name]["checksum"]]
        if wrong:
            raise CorruptCheckpointError(f"{path} is damaged: wrong checksum of {', '.join(wrong)}")
        leaves = [_as_target(arrays[name], leaf) for name, leaf in flat.items()]
        return jax.tree.unflatten(jax.tree.structure(target), leaves), record["meta"]


def _is_news(record: logging.LogRecord) -> bool:
    """False for what orbax logs, with a traceback, about an error in its threads: ``wait`` raises the same error."""
    of_orbax = "orbax" in Path(record.pathname).parts
    return not (of_orbax and record.levelno >= logging.ERROR and record.exc_info)


def _is_extra(record: dict[str, Any]) -> bool:
    return bool(record.get("extra", False))


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its checksum, in hexadecimal."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

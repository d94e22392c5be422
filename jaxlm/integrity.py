"""Files that can be trusted: checksums beside them, and writing them to the disk before older ones are deleted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

CHECKSUMS = "checksums.json"
"""Name of the file with the SHA-256 of the other files of a directory: ``{"sha256": {name: hexadecimal}}``."""


def write_checksums(directory: Path, names: Iterable[str]) -> None:
    """Write the checksums of these files of the directory; those of other files are forgotten."""
    _write(directory, {name: _sha256(directory / name) for name in sorted(names)})


def verify_checksums(directory: Path, names: Collection[str] | None = None) -> None:
    """Check the files that ``checksums.json`` lists (only those of ``names``, if given). Without that file nothing is.

    Raises:
        ValueError: a file is missing or has changed, or ``checksums.json`` is damaged.
    """
    for name, expected in _read(directory).items():
        if names is not None and name not in names:
            continue
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {CHECKSUMS} lists it")
        if _sha256(path) != expected:
            raise ValueError(
                f"{path} is not as it was saved (its SHA-256 differs from {CHECKSUMS}): it is damaged or edited; if "
                f"the change is meant, delete {directory / CHECKSUMS}"
            )


def forget_checksums(directory: Path, names: Collection[str]) -> None:
    """Remove these files from ``checksums.json``, because they are about to change."""
    known = _read(directory)
    if any(name in known for name in names):
        _write(directory, {name: value for name, value in known.items() if name not in names})


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A context in which no other process can enter ``locked`` for the same directory. It ends with the process.

    Raises:
        BlockingIOError: another process is inside.
    """
    import fcntl  # not on Windows

    number = os.open(directory, os.O_RDONLY)  # the directory itself, so that no file is left
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{directory} is in use by another process: wait for its end, or take another directory"
            ) from None
        yield
    finally:
        os.close(number)


def sync(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(directory: Path) -> None:
    """Write all files of a directory to the disk, then the directories from the inside out, then its name."""
    for parent, _, names in os.walk(directory, topdown=False):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            sync(path)
    sync(directory.parent)


def _read(directory: Path) -> dict[str, str]:
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        if not all(isinstance(value, str) and len(value) == 64 for value in known.values()):
            raise ValueError("a value is no SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it if you trust the other files") from error
    return known


def _write(directory: Path, known: dict[str, str]) -> None:
    temporary = directory / f".{CHECKSUMS}"
    temporary.write_text(json.dumps({"sha256": known}, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, directory / CHECKSUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

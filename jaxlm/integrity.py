"""Reliable files: checksums, atomic replacement, directory locks, and clear errors for a full or read-only disk.

Several files of a directory are replaced in two steps. First, the new files are written to a temporary directory inside
the directory (:func:`staging_directory`). When all new files are complete, they are moved to their final names
(:func:`install_files`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

CHECKSUMS = "checksums.json"
"""Name of the JSON file that contains the SHA-256 of other files of its directory, as ``{"sha256": {name: hex}}``."""

_STAGING = ".saving-"


def write_checksums(directory: Path, names: Iterable[str]) -> None:
    """Write ``checksums.json`` for these files of the directory. It replaces an older ``checksums.json``."""
    _write_checksums(directory, {name: _sha256(directory / name) for name in sorted(names)})


def verify_checksums(directory: Path, names: Collection[str] | None = None) -> None:
    """Compare the files that ``checksums.json`` lists with their checksums. Without ``checksums.json``, do nothing.

    Args:
        names: check only files with these names; None: check all listed files.

    Raises:
        ValueError: a file is missing or has changed, or ``checksums.json`` is damaged.
    """
    for name, expected in _read_checksums(directory).items():
        if names is not None and name not in names:
            continue
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {CHECKSUMS} lists it")
        if _sha256(path) != expected:
            raise ValueError(
                f"{path} has changed since it was saved (its SHA-256 differs from {CHECKSUMS}): it is damaged or "
                f"edited; if the change is intended, delete {directory / CHECKSUMS}"
            )


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file. An existing file is replaced atomically.

    The text is first written to a temporary file in the same directory and flushed to the disk (fsync). The temporary
    file is then renamed to ``path``.
    """
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def remove_checksums(directory: Path, names: Collection[str]) -> None:
    """Remove these files from ``checksums.json``. Without ``checksums.json``, do nothing.

    Call this function before you change the files; otherwise, :func:`verify_checksums` would reject them.

    Raises:
        ValueError: ``checksums.json`` is damaged.
    """
    checksums = _read_checksums(directory)
    if any(name in checksums for name in names):
        _write_checksums(directory, {name: value for name, value in checksums.items() if name not in names})


@contextlib.contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """A context manager that creates a temporary directory inside ``directory``.

    Write new files to the temporary directory. Then call :func:`install_files` inside the context.
    ``directory`` is created if it does not exist. The temporary directory is removed at the end, even after an error.
    Temporary directories that killed processes left are removed at the start. So only one process at a time may write
    to ``directory``.

    Raises:
        OSError: the disk is full, a file is larger than the limit of the system, or the directory is not writable.
    """
    with explain_disk_errors(directory, _UNCHANGED):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=directory) as temporary:
            yield Path(temporary)


def install_files(temporary: Path, directory: Path, names: Sequence[str], *, delete_first: Sequence[str] = ()) -> None:
    """Move files from ``temporary`` to ``directory``, together with a new ``checksums.json`` that lists these files.

    All files are flushed to the disk (fsync) before the first file is moved. ``checksums.json`` is moved first. So if
    the process is killed before the last move, :func:`verify_checksums` detects the mixture of old and new files.

    Args:
        names: names of the files in ``temporary``. They keep their names.
        delete_first: names of old files in ``directory`` that are deleted before the first move, if they exist.

    Raises:
        OSError: the disk is full, or a file cannot be replaced. If files were already replaced or deleted, the message
            names them.
    """
    write_checksums(temporary, names)
    for name in names:
        sync(temporary / name)
    changed: list[str] = []
    try:
        for name in delete_first:
            if (directory / name).exists():
                (directory / name).unlink()
                changed.append(name)
        for name in (CHECKSUMS, *names):
            os.replace(temporary / name, directory / name)
            changed.append(name)
        sync(directory)
    except OSError:
        state = f"already replaced, created or deleted: {', '.join(changed)}; all other files are unchanged"
        with explain_disk_errors(directory, state if changed else _UNCHANGED):
            raise


@contextlib.contextmanager
def explain_disk_errors(directory: Path, state_of_files: str) -> Iterator[None]:
    """A context manager that re-raises errors of a full or read-only disk with a message that contains the fix.

    The same holds for errors of missing permissions and of files above a size limit. All other errors are raised
    unchanged. If this context manager is nested, the outer one does not change the message of the inner one.

    Args:
        state_of_files: the part of the message that says which files changed and which did not, such as "the previous
            files are unchanged".

    Raises:
        OSError: an error with the same ``errno`` (a ``PermissionError`` if a permission is missing). Its message is one
            line that names ``directory``.
    """
    try:
        yield
    except Exception as error:
        error_number = getattr(error, "errno", None)
        if isinstance(error, OSError) and error_number is not None and error.strerror is None:
            raise  # an inner context manager of this function has already written the message
        if error_number is None:  # safetensors and orbax raise errors without errno that contain the system's message
            codes = (*_DISK_FULL, *_NOT_WRITABLE, errno.EFBIG)
            error_number = next((code for code in codes if os.strerror(code) in str(error)), None)
        if error_number in _DISK_FULL:
            free = shutil.disk_usage(nearest_existing(directory)).free
            free_text = f"{free / 1e9:.1f} GB" if free >= 1e8 else f"{free / 1e6:.1f} MB"
            reason = f"{os.strerror(error_number)}, {free_text} free"
            message = f"the disk of {directory} is full ({reason}): {state_of_files}. Free some space and try again"
        elif error_number in _NOT_WRITABLE:
            message = f"{directory} is not writable ({error}): {state_of_files}. Change its permissions and try again"
        elif error_number == errno.EFBIG:
            message = (
                f"a file in {directory} would be larger than the limit ({os.strerror(error_number)}): {state_of_files}"
                ". Raise the limit (ulimit -f, or the limit of the file system) and try again"
            )
        else:
            raise
        explained = (PermissionError if error_number in (errno.EACCES, errno.EPERM) else OSError)(message)
        explained.errno = error_number  # set afterwards, so that the text of the error is only the message
        raise explained from error


_UNCHANGED = "the previous files are unchanged"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def nearest_existing(directory: Path) -> Path:
    """``directory``, or its nearest parent that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """A context manager that locks an existing directory. The lock also ends when the process ends.

    The lock is advisory (flock): it stops only processes that also call this function.

    Raises:
        BlockingIOError: another process has the lock, or has replaced or deleted the directory.
    """
    import fcntl  # not on Windows

    descriptor = os.open(directory, os.O_RDONLY)  # the directory itself is locked, so there is no lock file to delete
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{directory} is in use by another process: wait until it ends, or choose another directory"
            ) from None
        if not directory.is_dir() or not os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            raise BlockingIOError(f"{directory} was replaced by another process: choose another directory")
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush a directory tree to the disk, bottom-up.

    The files of a directory are flushed before the directory itself. The parent of ``directory`` is flushed last.
    """
    for parent, _, names in os.walk(directory, topdown=False):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            sync(path)
    sync(directory.parent)


def _read_checksums(directory: Path) -> dict[str, str]:
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "sha256" not in content:
            raise ValueError("it has no entry sha256")
        checksums = content["sha256"]
        if not all(isinstance(value, str) and len(value) == 64 for value in checksums.values()):
            raise ValueError("a value is not a SHA-256")
        if outside := [name for name in checksums if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is not the name of a file in the directory")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it if you trust the other files") from error
    return checksums


def _write_checksums(directory: Path, checksums: dict[str, str]) -> None:
    replace_text(directory / CHECKSUMS, json.dumps({"sha256": checksums}, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

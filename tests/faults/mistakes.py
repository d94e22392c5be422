"""Run the commands of ``mistakes.txt``. Each must print one line with the reason and exit before it computes anything.

The rows are ``status | command | words of the message``. Commands are those of ``jaxlm``, or begin with
``experiments.NAME`` or ``benchmarks.NAME``. ``{name}`` is a directory or file of ``directories.py``. Rows below
``# live`` need the packages of ``pytest -m live``, and rows below ``# thorough`` take long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import harness
from jaxlm import cli
from tests.faults.directories import Directories
from tests.faults.faults import Fault

EXPERIMENTS = ("chess", "question_answering", "sentiment", "summarization", "text_generation", "translation")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A row of ``mistakes.txt``."""

    command: str
    status: int
    words: str
    mark: str


def _read_mistakes() -> Iterator[Mistake]:
    mark = ""
    for line in (Path(__file__).parent / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        if line in ("# live", "# thorough"):
            mark = line.removeprefix("# ")
        elif line and not line.startswith("#"):
            status, command, words = line.split(" | ", 2)
            yield Mistake(command, int(status), words, mark)


MISTAKES = list(_read_mistakes())


class WorkStartedError(BaseException):
    """A command accepted a mistake and started to work. ``except Exception`` does not catch it."""


@contextlib.contextmanager
def rejecting_work(directories: Directories) -> Iterator[None]:
    """A context in the root of ``directories``, in which a command fails if it starts to train or to measure."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise WorkStartedError

    with contextlib.ExitStack() as stack:
        for name in (*EXPERIMENTS, "families"):
            stack.enter_context(mock.patch.object(importlib.import_module(f"experiments.{name}"), "train", fail))
        stack.enter_context(mock.patch.object(harness, "session", fail))
        stack.enter_context(mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO())))
        stack.enter_context(contextlib.chdir(directories.root))
        yield


def outcome(command: str, directories: Directories) -> tuple[int, str]:
    """Run a command. Return its exit status and standard error."""
    words = [word.format_map(directories) if "{" in word else word for word in shlex.split(command)]
    main: Callable[[list[str]], int] = cli.main
    if words[0].startswith(("experiments.", "benchmarks.")):
        main = importlib.import_module(words.pop(0)).main
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: Any = main(words)
        except SystemExit as error:
            status = error.code
    return status, stderr.getvalue()


def failure(mistake: Mistake, directories: Directories) -> str | None:
    """The difference between the outcome of a row and its expected outcome; None if they agree."""
    try:
        status, error = outcome(mistake.command, directories)
    except WorkStartedError:
        return "the command accepted the mistake and started to work"
    except Exception as unexpected:
        return f"a traceback of {unexpected!r}"
    is_one_line = len(error.splitlines()) == 1 and "unexpected" not in error
    if status == mistake.status and is_one_line and mistake.words in error:
        return None
    return f"expected status {mistake.status} and {mistake.words!r}, got status {status} and {error!r}"


def mistakes(directory: Path) -> Iterator[Fault]:
    """Run all rows whose packages are installed."""
    directory.mkdir(parents=True)
    directories = Directories(directory)
    with rejecting_work(directories):
        for mistake in MISTAKES:
            if mistake.mark == "live":
                continue
            reason = failure(mistake, directories)
            status = "status 2" if mistake.status == 2 else f"status {mistake.status}"
            expected = f"one line with the reason, {status}, before anything is computed"
            yield Fault(
                "user error", mistake.command, expected, "as expected" if reason is None else reason, not reason
            )

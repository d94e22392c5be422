"""Every mistake of a user ends in one line that says what is wrong, with exit status 2, before anything is computed.

The rows are in ``mistakes.txt``: ``status | command | words of the message``. Commands are those of ``jaxlm``, or begin
with ``experiments.NAME`` or ``benchmarks.NAME``. ``{name}`` is a directory or file of ``directories.py``. A row below
``# thorough`` is tried by ``pytest -m thorough`` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from benchmarks import harness
from jaxlm import cli, command_line
from jaxlm.checkpoint import CorruptCheckpointError
from jaxlm.training import checks
from jaxlm.training.loop import DivergedError
from tests.faults.directories import Directories

EXPERIMENTS = ("chess", "question_answering", "sentiment", "summarization", "text_generation", "translation")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A row of the catalogue."""

    command: str
    status: int
    words: str
    thorough: bool


def _catalogue() -> Iterator[Mistake]:
    thorough = False
    for line in (Path(__file__).parent / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        thorough |= line == "# thorough"
        if line and not line.startswith("#"):
            status, command, words = line.split(" | ", 2)
            yield Mistake(command, int(status), words, thorough)


MISTAKES = list(_catalogue())


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    return Directories(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch, directories: Directories) -> None:
    """A command that gets as far as the training or the measurement has accepted the mistake."""

    def accepted(*arguments: Any, **options: Any) -> Any:
        pytest.fail("the mistake was accepted: the work begins")

    for name in (*EXPERIMENTS, "families"):
        monkeypatch.setattr(importlib.import_module(f"experiments.{name}"), "train", accepted)
    monkeypatch.setattr(harness, "session", accepted)
    monkeypatch.chdir(directories.root)


def outcome(command: str, directories: Directories) -> tuple[int, str]:
    """Exit status and standard error of a command line."""
    words = [word.format_map(directories) if "{" in word else word for word in shlex.split(command)]
    main: Callable[[list[str]], int] = cli.main
    if words[0].startswith(("experiments.", "benchmarks.")):
        main = importlib.import_module(words.pop(0)).main
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: Any = main(words)
        except SystemExit as leaving:
            status = leaving.code
    return status, said.getvalue()


def _check(group: str, directories: Directories, monkeypatch: pytest.MonkeyPatch, thorough: bool) -> None:
    wrong = []
    rows = [one for one in MISTAKES if one.command.split()[0] == group and one.thorough == thorough]
    for one in rows:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        status, error = outcome(one.command, directories)
        lines = error.splitlines()
        if status != one.status or len(lines) != 1 or one.words not in error or "unexpected" in error:
            wrong.append(f"{one.command}: status {status} instead of {one.status}, {one.words!r} expected in {error!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("group", sorted({one.command.split()[0] for one in MISTAKES if not one.thorough}))
def test_a_mistake_is_one_line(group: str, directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(group, directories, monkeypatch, thorough=False)


@pytest.mark.thorough
@pytest.mark.parametrize("group", sorted({one.command.split()[0] for one in MISTAKES if one.thorough}))
def test_a_mistake_that_takes_longer_is_one_line(
    group: str, directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(group, directories, monkeypatch, thorough=True)


def _named(path: str, number: int) -> OSError:
    return OSError(number, "words", path)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("a\n b"), 2, "a b"),
        (_named("x", errno.ENOENT), 2, "words: 'x' (check the path)"),
        (_named("x", errno.EACCES), 2, "change the permissions"),
        (_named("x", errno.ENAMETOOLONG), 2, "words: 'x'"),
        (_named("x", errno.ENOSPC), 1, "free some disk space"),
        (_named("x", errno.EADDRINUSE), 1, "another program uses this port"),
        (_named("x", errno.ECONNREFUSED), 1, "no program answers at this address"),
        (BlockingIOError("x is in use by another process"), 1, "x is in use by another process"),
        (CorruptCheckpointError("step 3 is damaged"), 2, "step 3 is damaged"),
        (DivergedError("step 3: lower the learning rate", step=3), 1, "step 3: lower the learning rate"),
        (SafetensorError("header too large"), 2, "a file of weights is damaged (header too large)"),
        (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
        (OverflowError("int too big"), 2, "a number is too large (int too big)"),
        (EOFError("Compressed file ended"), 2, "a compressed file is damaged or truncated"),
        (LookupError("unknown encoding: x"), 2, "unknown encoding: x: choose an encoding that Python supports"),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "there is not enough memory"),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier"), 1, "does not answer: check that all processes are running"),
        (ImportError("pip install x"), 2, "pip install x"),
        (TypeError("x"), 1, "unexpected TypeError: x: a bug in jaxlm or in a library (--debug shows where)"),
    ],
)
def test_every_error_has_a_status_and_one_line(
    error: Exception, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert command_line.exit_status(fail, "program") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("program: ")
    assert words in line
    assert command_line.exit_status(fail, "program", debug=True) == status
    assert "Traceback" in capsys.readouterr().err


def test_a_runtime_error_of_jaxlm_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for module, shown in (("jaxlm.x", "no peer"), ("numpy", "unexpected RuntimeError: no peer")):
        namespace: dict[str, Any] = {"__name__": module}
        exec("def fail():\n    raise RuntimeError('no peer')", namespace)
        assert command_line.exit_status(namespace["fail"], "program") == 1
        assert capsys.readouterr().err.startswith(f"program: {shown}")


def test_a_closed_pipe_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise BrokenPipeError

    assert command_line.exit_status(fail, "program") == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command", ["score {none} x", "experiments.text_generation --data {none}", "benchmarks.report"]
)
def test_debug_adds_the_traceback(command: str, directories: Directories) -> None:
    status, plain = outcome(command, directories)
    assert outcome(f"{command} --debug", directories)[0] == status == 2
    error = outcome(f"{command} --debug", directories)[1]
    assert error.startswith("Traceback")
    assert error.splitlines()[-1:] == plain.splitlines()


# ------------------------------------------------------------------------------------------- before the training


TINY = (
    "experiments.text_generation --data {text} --output {out} --model.set num_layers=1 num_heads=2 embed_dim=16 "
    "--training.steps 8 --optimizer.warmup-steps 2 "
)


def test_a_full_disk_is_found_before_the_training(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    status, error = outcome(TINY, directories)
    assert status == 1
    assert "bytes for one checkpoint and the exported model, and 1,000 bytes are free on its disk" in error
    assert not (directories.root / f"out{directories.count}").exists()
    without = int(
        outcome(f"{TINY} --training.checkpoint-every None", directories)[1]
        .split("needs ")[1]
        .split()[0]
        .replace(",", "")
    )
    both = int(error.split("needs ")[1].split()[0].replace(",", ""))
    assert both == pytest.approx(4 * without, rel=0.1), "weights and two moments of AdamW, and the export"


def test_a_directory_that_cannot_be_written_is_found_before_the_data_are_read(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr("experiments.text_generation.read_text", lambda path: pytest.fail("the data are read"))
    status, error = outcome(TINY, directories)
    assert (status, error) == (
        2, "experiments.text_generation: Permission denied: 'x' (change the permissions, or choose another path)\n",
    )  # fmt: skip
    assert not (directories.root / f"out{directories.count}").exists()


def test_every_setting_that_is_checked_exists() -> None:
    modules = [importlib.import_module(f"experiments.{name}") for name in EXPERIMENTS]
    names = {name.rpartition(".")[2] for module in modules for name, _ in _fields(module.Experiment())}
    assert set(checks.LEAST) <= names
    assert names >= checks.FRACTIONS
    dotted = {name for module in modules for name, _ in _fields(module.Experiment())}
    assert {name for names, _, _ in checks.RULES for name in names.split()} <= dotted


def _fields(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}", value

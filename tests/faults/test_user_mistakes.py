"""Each mistake of a user prints one line with the reason and exits with status 2 before the computation starts.

``mistakes.py`` describes the rows. Only ``pytest -m live`` runs the rows below ``# live``, and only
``pytest -m thorough`` runs the rows below ``# thorough``.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from safetensors import SafetensorError

from jaxlm import command_line
from jaxlm.checkpoint import CorruptCheckpointError
from jaxlm.training import checks
from jaxlm.training.loop import DivergedError
from tests.faults.directories import Directories
from tests.faults.mistakes import EXPERIMENTS, MISTAKES, failure, outcome, rejecting_work


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    return Directories(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(autouse=True)
def fail_if_work_starts(directories: Directories) -> Iterator[None]:
    with rejecting_work(directories):
        yield


def _groups() -> Iterator[Any]:
    """Yield the command and the mark of each group of rows that have the same command and the same mark."""
    for command, mark in sorted({(mistake.command.split()[0], mistake.mark) for mistake in MISTAKES}):
        marks = [getattr(pytest.mark, mark)] if mark else []
        yield pytest.param(command, mark, id=f"{command}-{mark}" if mark else command, marks=marks)


@pytest.mark.plain_cases(8)
@pytest.mark.parametrize(("command", "mark"), list(_groups()))
def test_a_mistake_prints_one_line(command: str, mark: str, directories: Directories) -> None:
    rows = [row for row in MISTAKES if (row.command.split()[0], row.mark) == (command, mark)]
    failures = {row.command: failure(row, directories) for row in rows}
    assert not {name: reason for name, reason in failures.items() if reason is not None}


def _os_error(path: str, number: int) -> OSError:
    return OSError(number, "words", path)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("a\n b"), 2, "a b"),
        (_os_error("x", errno.ENOENT), 2, "words: 'x' (check the path)"),
        (_os_error("x", errno.EACCES), 2, "change the permissions"),
        (_os_error("x", errno.ENAMETOOLONG), 2, "words: 'x'"),
        (_os_error("x", errno.ENOSPC), 1, "free some disk space"),
        (_os_error("x", errno.EFBIG), 1, "raise the limit of the file size"),
        (_os_error("x", errno.EADDRINUSE), 1, "another program uses this port"),
        (_os_error("x", errno.ECONNREFUSED), 1, "no program answers at this address"),
        (BlockingIOError("x is in use by another process"), 1, "x is in use by another process"),
        (CorruptCheckpointError("step 3 is damaged"), 2, "step 3 is damaged"),
        (DivergedError("step 3: lower the learning rate", step=3), 1, "step 3: lower the learning rate"),
        (SafetensorError("header too large"), 2, "a file of weights is damaged (header too large)"),
        (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
        (OverflowError("int too big"), 2, "a number is too large (int too big)"),
        (EOFError("Compressed file ended"), 2, "a compressed file is damaged or truncated"),
        (LookupError("unknown encoding: x"), 2, "unknown encoding: x: choose an encoding that Python supports"),
        (LookupError("encoding='hex' is not an encoding of text: choose one"), 2, "is not an encoding of text"),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "there is not enough memory"),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier"), 1, "does not answer: check that all processes are running"),
        (ImportError("pip install x"), 2, "pip install x"),
        (TypeError("x"), 1, "unexpected TypeError: x: a bug in jaxlm or in a library (--debug shows where)"),
    ],
)
def test_every_error_has_a_status_and_prints_one_line(
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


def test_a_runtime_error_of_jaxlm_is_not_unexpected(capsys: pytest.CaptureFixture[str]) -> None:
    for module, message in (("jaxlm.x", "no peer"), ("numpy", "unexpected RuntimeError: no peer")):
        namespace: dict[str, Any] = {"__name__": module}
        exec("def fail():\n    raise RuntimeError('no peer')", namespace)
        assert command_line.exit_status(namespace["fail"], "program") == 1
        assert capsys.readouterr().err.startswith(f"program: {message}")


def test_a_closed_pipe_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise BrokenPipeError

    assert command_line.exit_status(fail, "program") == 141
    assert capsys.readouterr().err == ""


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--help"]])
@pytest.mark.parametrize(("reader", "status"), [("full", 1), ("closed", 141)])
def test_output_that_cannot_be_written_has_a_status(arguments: list[str], reader: str, status: int) -> None:
    if reader == "closed":
        receiver, sender = os.pipe()
        os.close(receiver)
    else:
        sender = os.open("/dev/full", os.O_WRONLY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        [sys.executable, "-m", "jaxlm", *arguments], stdout=sender, stderr=subprocess.PIPE, text=True, env=environment,
        check=False,
    )  # fmt: skip
    os.close(sender)
    assert process.returncode == status
    lines = ["jaxlm: No space left on device"] if reader == "full" else []
    assert [line[: len("jaxlm: No space left on device")] for line in process.stderr.splitlines()] == lines


@pytest.mark.parametrize(
    "command", ["score {none} x", "experiments.text_generation --data {none}", "benchmarks.report --results {none}"]
)
def test_debug_prints_the_traceback(command: str, directories: Directories) -> None:
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


def test_a_full_disk_is_reported_before_the_training(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    status, error = outcome(TINY, directories)
    assert status == 1
    assert "bytes for one checkpoint and the exported model, and 1,000 bytes are free on its disk" in error
    assert not (directories.root / f"out{directories.count}").exists()
    export_bytes = int(
        outcome(f"{TINY} --training.checkpoint-every None", directories)[1]
        .split("needs ")[1]
        .split()[0]
        .replace(",", "")
    )
    total_bytes = int(error.split("needs ")[1].split()[0].replace(",", ""))
    assert total_bytes == pytest.approx(4 * export_bytes, rel=0.1), (
        "the checkpoint has weights and two moments of AdamW, and the export has weights"
    )


def test_an_unwritable_directory_is_reported_before_the_data_are_read(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_permission_error(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", raise_permission_error)
    monkeypatch.setattr("experiments.text_generation.read_text", lambda path: pytest.fail("the data are read"))
    status, error = outcome(TINY, directories)
    assert (status, error) == (
        2, "experiments.text_generation: Permission denied: 'x' (change the permissions, or choose another path)\n",
    )  # fmt: skip
    assert not (directories.root / f"out{directories.count}").exists()


def test_every_checked_setting_exists() -> None:
    """Every setting that ``checks`` names is a field of an experiment."""
    modules = [importlib.import_module(f"experiments.{name}") for name in EXPERIMENTS]
    names = {name.rpartition(".")[2] for module in modules for name, _ in _fields(module.Experiment())}
    assert set(checks.MINIMUMS) <= names
    assert names >= checks.FRACTION_SETTINGS
    dotted = {name for module in modules for name, _ in _fields(module.Experiment())}
    assert {name for names, _, _ in checks.NO_EFFECT_RULES for name in names.split()} <= dotted


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value

"""Option parsing and error reporting of ``jaxlm``, ``python -m experiments.NAME`` and ``python -m benchmarks.NAME``.

An error is printed as one line on standard error. The line of a user error names the option or file, the value and the
fix. Every command accepts ``--debug``, which also prints the traceback of an error that occurs after the options have
been parsed. The exit status is

- 0 on success,
- 1 after a failed run (a full disk, training that diverged, not enough memory) or an unexpected error,
- 2 after a user error (an invalid option, configuration or file),
- 128 + the number of the signal after an interrupt (SIGINT, SIGTERM), and 141 if the reader of the output has ended.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import tyro
from safetensors import SafetensorError

from jaxlm import host, processes
from jaxlm.config import check_numbers, read

T = TypeVar("T")

DEBUG = "--debug"
INTERRUPTED, BROKEN_PIPE = 130, 141
MAX_MESSAGE_LENGTH = 2000
"""A message with more characters than this number is printed without its middle."""

_USER_ERRORS = (
    ValueError, ImportError, RecursionError, OverflowError, SafetensorError, EOFError, zlib.error, FileNotFoundError,
    FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError,
)  # fmt: skip
_USER_ERROR_NUMBERS = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EROFS, None}
_FIXES: dict[int | None, str] = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "change the permissions, or choose another path",
    errno.EROFS: "choose another path",
    errno.ENOSPC: "free some disk space, then continue from the last checkpoint or start again",
    errno.EDQUOT: "free some disk space, then continue from the last checkpoint or start again",
    errno.EFBIG: "raise the limit of the file size (ulimit -f), then continue from the last checkpoint or start again",
    errno.EADDRINUSE: "another program uses this port: end it, or choose another port",
    errno.ECONNREFUSED: "no program answers at this address: start the other program first, and check host and port",
    errno.ETIMEDOUT: "no program answers at this address: start the other program first, and check host and port",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}


def split_debug(arguments: Sequence[str] | None) -> tuple[list[str], bool]:
    """The arguments (None: the arguments of the process) without ``--debug``, and whether ``--debug`` was given."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return [word for word in words if word != DEBUG], DEBUG in words


def parse(kind: Any, arguments: Sequence[str], *, program: str, description: str | None = None, **default: Any) -> Any:
    """An instance of ``kind`` from command-line arguments.

    Args:
        kind: a dataclass, or a union of dataclasses (subcommands).
        program: name of the command in messages.
        description: text at the start of ``--help``.
        default: ``default=INSTANCE`` sets the initial config. The options change its fields.

    Raises:
        SystemExit: status 0 after ``--help``. Status 2, with one line on standard error, after an unknown or missing
            option, a value of the wrong type, a number that :func:`jaxlm.config.check_numbers` rejects, or a value that
            ``kind`` rejects with a ``ValueError``.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = tyro.cli(kind, args=list(arguments), prog=program, description=description, **default)
            check_numbers(config)
    except SystemExit as error:
        if error.code == 2:
            exit_with_error(program, _parse_error_box(stderr.getvalue(), program))
        raise
    except ValueError as error:
        exit_with_error(program, str(error))
    sys.stderr.write(stderr.getvalue())
    return config


@dataclasses.dataclass(frozen=True)
class ExperimentOptions(Generic[T]):
    """The options of an experiment.

    Attributes:
        config: the config of the experiment: ``initial``, changed by the options in ``given``.
        initial: the default config, or the config that ``--preset`` or ``--resume`` selects. ``--recipe`` replaces its
            optimizer.
        preset: the value of ``--preset``, or None.
        recipe: the value of ``--recipe``, or None.
        resume: the value of ``--resume`` (a run directory), or None.
        given: the names of all options on the command line except ``--preset``, ``--recipe`` and ``--resume``, such as
            ``--model.set``.
    """

    config: T
    initial: T
    preset: str | None
    recipe: str | None
    resume: Path | None
    given: frozenset[str]


def parse_experiment(
    default: T,
    presets: Mapping[str, T],
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    recipes: Mapping[str, Any],
) -> ExperimentOptions[T]:
    """The options of an experiment, from the command line.

    ``--preset NAME`` or ``--resume RUN_DIR`` selects the initial config. ``--recipe FAMILY`` replaces the optimizer of
    this config. Then options such as ``--optimizer.learning-rate 5e-4`` change single fields. ``--seed N`` is the same
    as ``--training.seed N``. ``--help`` lists all options.

    Args:
        default: the initial config without ``--preset`` and ``--resume``.
        presets: the configs that ``--preset`` selects by name.
        recipes: the optimizer configs that ``--recipe`` selects by name of the family.

    Raises:
        SystemExit: as in :func:`parse`; also status 2 for an unknown preset or recipe, for ``--resume`` together with
            ``--preset`` or ``--recipe``, and for ``--seed`` together with ``--training.seed``.
        FileNotFoundError: ``RUN_DIR`` has no ``config.json``.
        ValueError: ``config.json`` is damaged, or has a field that is unknown or has the wrong type.
    """
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    preset_names = "{" + ",".join(presets) + "}"
    parser.add_argument(
        "--preset", choices=sorted(presets), metavar=preset_names, help="start from a named configuration"
    )
    parser.add_argument(
        "--recipe", choices=sorted(recipes), metavar="FAMILY",
        help="use the published optimizer settings of a family instead of the optimizer settings of the preset; "
        f"--optimizer options change single values of the recipe. Families: {', '.join(recipes)}",
    )  # fmt: skip
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue a run with its configuration")
    parser.add_argument("--seed", metavar="N", help="the same as --training.seed N")
    known, rest = parser.parse_known_args(arguments)
    if known.seed is not None:
        if any(word.startswith("--training.seed") for word in rest):
            parser.error("--seed and --training.seed exclude each other")
        rest += ["--training.seed", known.seed]
    initial = default if known.preset is None else presets[known.preset]
    if known.resume is not None:
        for name, kept in (("preset", "configuration"), ("recipe", "optimizer")):
            if getattr(known, name) is not None:
                parser.error(f"--{name} and --resume exclude each other: a resumed run keeps its {kept}")
        initial = read(type(default), known.resume / "config.json")
    if known.recipe is not None:
        initial = dataclasses.replace(initial, optimizer=recipes[known.recipe])  # type: ignore[type-var]
    options = "".join(f"  {' '.join(a.option_strings)} {a.metavar}: {a.help}\n" for a in parser._actions)
    config = parse(type(default), rest, program=program, description=f"{description}\n\n{options}", default=initial)
    given = frozenset(word.partition("=")[0] for word in rest if word.startswith("--"))
    return ExperimentOptions(config, initial, known.preset, known.recipe, known.resume, given)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        exit_with_error(self.prog, f"{message}; {self.prog} --help lists the options")


def exit_with_error(program: str, message: str) -> NoReturn:
    """Print one line and raise ``SystemExit(2)``."""
    print(f"{program.removeprefix('python -m ')}: {_one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def exit_status(command: Callable[[], int], program: str, *, debug: bool = False) -> int:
    """Run ``command()`` and return the exit status. An error is printed as one line that begins with ``program``.

    On a machine without accelerators, ``command`` runs on the CPU (``jaxlm.host.select_cpu_without_accelerators``).
    After Ctrl-C, the status is 130; after a broken pipe, it is 141. In both cases, no error is printed.

    Args:
        debug: whether to print the traceback too.
    """
    try:
        try:
            host.select_cpu_without_accelerators()
            status = command()
        except SystemExit:  # after --help or a wrong option
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # if this failed only when Python exits, the exit status would be 120
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the process that reads the output has ended, as in `jaxlm score ... | head`
        _discard_output()
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{program}: {describe(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        return 2 if is_user_error(error) else 1


def _discard_output() -> None:
    """Redirect stdout to ``os.devnull``. Otherwise, Python would flush it at exit, which would raise the same error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_process(status: int) -> NoReturn:
    """End the process with ``status``. For 130 (Ctrl-C), SIGINT ends the process, so ``subprocess`` reports -2.

    A shell ends a loop over commands only if SIGINT ended a command. An exit status of 130 is not enough. In a run with
    several processes, each process ends with the exit status 130 instead.
    """
    if status == INTERRUPTED and not processes.is_joined():
        atexit._run_exitfuncs()  # private; Python does not call the exit functions if a signal ends the process
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)


def is_user_error(error: BaseException) -> bool:
    """Whether an error is a user error (exit status 2), whose cause the user must fix before a retry."""
    if isinstance(error, BlockingIOError):
        return False
    if isinstance(error, OSError) and not isinstance(error, _USER_ERRORS):
        return error.errno in _USER_ERROR_NUMBERS
    return isinstance(error, _USER_ERRORS) or _is_encoding_error(error)


def describe(error: BaseException) -> str:
    """One line that describes an error and, if it is known, the fix."""
    message = _one_line(str(error))
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        path = f": {str(error.filename)!r}" if error.filename is not None else ""
        fix = _FIXES.get(error.errno)
        return _one_line(f"{error.strerror}{path}{f' ({fix})' if fix else ''}")
    if isinstance(error, RecursionError):
        return f"a file or a value is nested too deeply to be read: is it damaged? ({message})"
    if isinstance(error, SafetensorError):
        return f"a file of weights is damaged ({message}): copy or export it again"
    if isinstance(error, EOFError | zlib.error):
        return f"a compressed file is damaged or truncated ({message or type(error).__name__}): copy it again"
    if _is_encoding_error(error):
        fix = ": choose an encoding that Python supports, such as utf-8 or latin-1"
        return message + (fix if "unknown encoding" in message else "")
    if isinstance(error, OverflowError):
        return f"a number is too large ({message}): choose a smaller number"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "Out of memory" in message:
        return (
            f"there is not enough memory: use a smaller batch, shorter sequences or a smaller model "
            f"({message or type(error).__name__})"
        )
    if "DEADLINE_EXCEEDED" in message or "UNAVAILABLE" in message:
        return (
            f"another process of the run does not answer: check that all processes are running, and the coordinator's "
            f"address ({message})"
        )
    if isinstance(error, ValueError | ImportError | OSError) or _message_has_fix(error):
        return message or type(error).__name__
    return f"unexpected {type(error).__name__}: {message}: a bug in jaxlm or in a library ({DEBUG} shows where)"


def _is_encoding_error(error: BaseException) -> bool:
    return type(error) is LookupError and "encoding" in str(error)


def check_output_file(option: str, path: Path | None) -> None:
    """Check that ``path`` is not a directory and that its parent directory exists. None is valid.

    Permissions are not checked. Call this function before the content of the file is computed.

    Raises:
        ValueError: ``path`` is a directory, or its parent directory does not exist.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--{option} {path} is a directory: give the path of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{option} {path}: there is no directory {path.parent}")


def _message_has_fix(error: BaseException) -> bool:
    """Whether the message of an error contains the fix.

    The result is True for the exception classes of jaxlm, the experiments and the benchmarks, such as
    ``DivergedError``, and for a ``RuntimeError`` that code of these packages raised.
    """
    traceback_entry = error.__traceback__
    while traceback_entry is not None and traceback_entry.tb_next is not None:
        traceback_entry = traceback_entry.tb_next
    modules = [type(error).__module__]
    if traceback_entry is not None and type(error) is RuntimeError:
        modules.append(traceback_entry.tb_frame.f_globals.get("__name__", ""))
    return any(name.partition(".")[0] in ("jaxlm", "experiments", "benchmarks") for name in modules)


def _one_line(text: str) -> str:
    line = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return (
        line
        if len(line) <= MAX_MESSAGE_LENGTH
        else f"{line[: MAX_MESSAGE_LENGTH // 2]} ... {line[-MAX_MESSAGE_LENGTH // 2 :]}"
    )


_REPLACEMENTS = (
    (r"^Error parsing ", ""),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"no type matching (.*) could be instantiated from \[(.*)\]", r"\2 is not \1"),
    (r"is not INT\|FLOAT", "is not a number"),
    (r"Expected 1 values", "Give one"),
)
"""Regular expressions for messages of tyro and Python, and their replacements."""


def _simplify(text: str) -> str:
    for pattern, replacement in _REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    return text


def _parse_error_box(box: str, program: str) -> str:
    """The error message in the box that tyro prints, as one line."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:] if not row.startswith("╰")]  # the first row is a title
    sections: list[list[str]] = [[]]
    for row in rows:
        if row and not row.strip("─-"):  # a separator; tyro prints hyphens if the terminal is not UTF-8
            sections.append([])
        elif row:
            sections[-1].append(row)
    parts: list[str] = []
    for section in sections:
        text = " ".join(section)
        if not section or text.startswith("For full helptext"):
            continue
        if section[0].startswith(("Perhaps you meant", "Arguments similar to")):
            # If another subcommand has the given option, tyro lists the given option too.
            given = " ".join(parts).replace(",", " ").split()
            options = dict.fromkeys(row.split()[0] for row in section if row.startswith("--"))
            if similar := [option for option in options if option not in given][:3]:
                parts.append(f"did you mean {' or '.join(similar)}?")
        elif section[0].startswith("Argument helptext"):
            parts.append(section[1])
        else:
            parts.append(_simplify(text.split(" Got errors:")[0]))
    return "; ".join(part.rstrip(".") for part in parts) + f"; {program} --help lists the options"

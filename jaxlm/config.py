"""Configs: frozen dataclasses, to and from JSON, and from the command line with tyro."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def to_json(config: Any) -> dict[str, Any]:
    """A config as JSON-able dicts; paths become strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """The config of class ``kind`` that :func:`to_json` wrote.

    Raises:
        ValueError: a field that ``kind`` does not have, or one that is missing and has no default.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where} has an unknown field {name!r}: {hint}the fields are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if isinstance(value, dict) and dataclasses.is_dataclass(option) and isinstance(option, type):
            return from_json(option, value, where)
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            return _tuple(value)
        if isinstance(value, str) and option is Path:
            return Path(value)
    return value


def _tuple(value: Any) -> Any:
    """JSON has lists only; configs are hashable and have tuples only."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def write(config: Any, path: Path) -> None:
    """Write a config as JSON."""
    path.write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")


def read(kind: type[C], path: Path) -> C:
    """Read what :func:`write` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: is {path.parent} the directory of a run?")
    return from_json(kind, json.loads(path.read_text(encoding="utf-8")), str(path))


def assignment(option: str, text: str) -> tuple[str, str]:
    """Name and value of a text such as ``num_layers=24``.

    Raises:
        ValueError: a text without ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"cannot read --{option} {text!r}: write name=value, for example num_layers=24")
    return name, value


def assignments(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """``{name: value}`` of texts such as ``num_layers=24``; a value that is no Python literal is a word.

    Raises:
        ValueError: a text without ``=``.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, value = assignment(option, text)
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value  # a word, as in remat=full
    return values


def exit_status(command: Callable[[], int], program: str) -> int:
    """Run a command line; what the user can mend is printed as a message and not as a traceback, with status 1."""
    try:
        return command()
    except (ValueError, OSError, ImportError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def parse(
    default: C, presets: Mapping[str, C], arguments: Sequence[str] | None = None, *, program: str, description: str
) -> tuple[C, Path | None]:
    """A config from the command line: ``--preset NAME`` or ``--resume RUN_DIR`` chooses where to start from, typed
    options of any field (``--model.num-layers 6``) change it. ``--help`` lists them all.

    Returns:
        The config and the run directory to resume, or None.
    """
    import tyro

    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(presets), help="start from a named configuration")
    first.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a run, with its configuration")
    known, rest = first.parse_known_args(arguments)
    if known.preset is not None and known.resume is not None:
        first.error("--preset and --resume exclude each other: a resumed run keeps its configuration")
    if known.preset is not None:
        default = presets[known.preset]
    if known.resume is not None:
        default = read(type(default), known.resume / "config.json")
    options = "".join(f"  {' '.join(a.option_strings)} {a.metavar or set(presets)}: {a.help}\n" for a in first._actions)
    return tyro.cli(
        type(default), default=default, args=rest, prog=program, description=f"{description}\n\n{options}"
    ), known.resume

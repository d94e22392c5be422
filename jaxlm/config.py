"""Conversion of configs (frozen dataclasses) to and from JSON. ``jaxlm.command_line`` parses them from options."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxlm import integrity
from jaxlm.json_files import read_object

C = TypeVar("C")


def to_json(config: Any) -> dict[str, Any]:
    """A config as a dict of JSON values; paths become strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """The config of class ``kind`` from the result of :func:`to_json`.

    Raises:
        ValueError: ``kind`` does not have a field, a field without default is missing, or a value does not have the
            type of its field.
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
    return kind(**{name: _parse_value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    for option in _union_members(hint):
        if isinstance(value, dict) and dataclasses.is_dataclass(option) and isinstance(option, type):
            return from_json(option, value, where)
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            value = _lists_to_tuples(value)
            if Path in typing.get_args(option):
                value = tuple(map(Path, value))
        elif isinstance(value, str) and option is Path:
            return Path(value)
    check_value(hint, value, where)
    return value


def check_value(hint: Any, value: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``value`` has the field type ``hint``.

    A float field accepts integers, and no number field accepts booleans. Numbers must be finite. For a ``Literal``
    field, only the type is checked, because the config class checks the value.
    """
    if not any(_has_type(option, value) for option in _union_members(hint)):
        names = " or ".join(_TYPE_NAMES.get(option, str(option)) for option in _union_members(hint))
        raise ValueError(f"{where}={value!r} must be {names}")


def check_finite(config: Any, where: str = "") -> None:
    """Raise ``ValueError`` if a number in a config or a nested config is not finite."""
    for name, value in numbers_of(config, where):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")


def check_numbers(config: Any) -> None:
    """Raise ``ValueError`` if a number in a config or a nested config is out of range.

    Numbers must be finite. Integers must fit in int32. Seeds must fit in uint32, because JAX generates
    the same random numbers for several seeds outside this range.
    """
    check_finite(config)
    for name, value in numbers_of(config):
        if name.rpartition(".")[2] == "seed" and not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must be from 0 to {2**32 - 1}")
        if isinstance(value, int) and name.rpartition(".")[2] != "seed" and not -(2**31) <= value < 2**31:
            raise ValueError(f"{name}={value} is too large: the largest number is {2**31 - 1}")


def numbers_of(config: Any, where: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the dotted name and the value of every number in a config and its nested configs."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from numbers_of(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


_TYPE_NAMES = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "a string", type(None): "None",
    Path: "a path",
}  # fmt: skip


def _union_members(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def _has_type(option: Any, value: Any) -> bool:
    if option is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if option is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if typing.get_origin(option) is typing.Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(option))
    if typing.get_origin(option) is tuple:
        return isinstance(value, tuple)
    return isinstance(value, option) if isinstance(option, type) else True


def _lists_to_tuples(value: Any) -> Any:
    """``value`` with lists replaced by tuples. JSON has no tuples, and a config with lists is not hashable."""
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def write(config: Any, path: Path) -> None:
    """Write a config as JSON. An existing file is replaced atomically by a rename."""
    integrity.replace_text(path, json.dumps(to_json(config), indent=2) + "\n")


def read(kind: type[C], path: Path) -> C:
    """The config of class ``kind`` in a file written by :func:`write`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: as in :func:`from_json`, or the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} the directory of a run?")
    return from_json(kind, read_object(path), str(path))


def assigned_texts(option: str, texts: Sequence[str], example: str = "num_layers=24") -> dict[str, str]:
    """``{name: value}`` from texts such as ``num_layers=24``.

    Raises:
        ValueError: a text has no ``=``, or a name occurs twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"cannot read --{option} {text!r}: write name=value, for example {example}")
        if name in values:
            raise ValueError(f"--{option} has {name} twice: {name}={values[name]} and {text}")
        values[name] = value
    return values


def assignments(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """``{name: value}`` from texts such as ``num_layers=24``. A value that is not a Python literal is a string.

    ``true`` and ``false`` are booleans.

    Raises:
        ValueError: a text has no ``=``, or a name occurs twice.
    """
    values: dict[str, Any] = {}
    for name, value in assigned_texts(option, texts).items():
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = {"true": True, "false": False}.get(value, value)  # otherwise a string, as in remat=full
    return values

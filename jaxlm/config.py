"""Configs (frozen dataclasses): conversion to and from JSON, checks of their values, and ``name=value`` texts.

``jaxlm.command_line`` parses configs from command-line options. :func:`check_value`, :func:`check_min` and
:func:`check_int32` also check values that are not fields of a config.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxlm import integrity
from jaxlm.json_files import read_object

C = TypeVar("C")


MAX_LAYERS = 10_000
"""Maximum number of layers. The parameter specs of a very large number of layers would fill the host memory."""


def field_types(kind: Any) -> Mapping[str, Any]:
    """``{field name: type}`` of a config class, computed once per class.

    Raises:
        TypeError: an annotation has an unknown name.
    """
    return _field_types(kind)


@functools.cache  # mypy rejects a class as an argument of a cached function, so field_types is not cached itself
def _field_types(kind: Any) -> Mapping[str, Any]:
    try:
        hints = typing.get_type_hints(kind)
    except NameError as error:
        raise TypeError(
            f"an annotation of {kind.__qualname__} has an unknown name ({error}): define the name at the top level of "
            "its module, before the first instance of the class"
        ) from error
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def to_json(config: Any) -> dict[str, Any]:
    """A config as a dict of JSON values.

    Nested configs become dicts, tuples become lists, NumPy scalars become numbers or booleans, and all other values
    that are not JSON values, such as paths, become strings.
    """
    return json.loads(json.dumps(dataclasses.asdict(config), default=_to_json_value))


def _to_json_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def from_json(kind: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """The config of class ``kind`` from the result of :func:`to_json`.

    Args:
        where: name of the config in error messages.

    Raises:
        ValueError: a name in ``values`` is not a field of ``kind``, a field without default is missing, a value does
            not have the type of its field, or ``kind`` itself rejects a value.
    """
    hints = field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{where} has an unknown field {name!r}: {suggest_name(name, fields)}the fields are {', '.join(fields)}"
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"{where} lacks the {'field' if len(missing) == 1 else 'fields'} {names}")
    return kind(**{name: _parse_value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def suggest_name(name: str, names: Iterable[str]) -> str:
    """A question that proposes the most similar of ``names`` for an unknown ``name``. Empty if none of them is similar.

    The text ends with a space, so that an error message can continue after it.

    Example:
        >>> suggest_name("num_layer", ["num_layers", "num_heads"])
        "did you mean 'num_layers'? "
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    """The value of a field with the type ``hint`` from a JSON ``value``, checked."""
    value = _convert_json(hint, value, where)
    check_value(hint, value, where)
    return value


def _convert_json(hint: Any, value: Any, where: str) -> Any:
    """``value`` with the types that JSON does not have: dataclasses, tuples and paths. Other values are not changed.

    JSON stores a tuple as a list, and a config with lists is not hashable. So a list that is an entry of a tuple also
    becomes a tuple if the type of the entry is ``Any``.
    """
    converted = value
    for option in _union_members(hint):
        if isinstance(value, dict) and dataclasses.is_dataclass(option) and isinstance(option, type):
            return from_json(option, value, where)
        if isinstance(value, str) and option is Path:
            return Path(value)
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            entries = _entry_types(option, len(value))
            entries += (Any,) * (len(value) - len(entries))
            entries = tuple(tuple[Any, ...] if entry is Any else entry for entry in entries)
            pairs = enumerate(zip(entries, value, strict=False))
            converted = tuple(_convert_json(entry, item, f"{where}[{number}]") for number, (entry, item) in pairs)
            if _has_type(option, converted):
                break
    return converted


def check_value(hint: Any, value: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``value`` has the field type ``hint``.

    The hint ``float`` accepts integers. Neither ``float`` nor ``int`` accepts booleans. A ``float`` must be finite. The
    entries of a tuple or list must have the types of its hint. ``Any`` accepts every value. All other generic
    types, such as ``dict[str, int]``, accept every value too.

    Args:
        where: name of the value in the error message.
    """
    if not _has_type(hint, value):
        raise ValueError(f"{where}={value!r} must be {_type_name(hint)}")


def check_choices(config: Any) -> None:
    """Raise ``ValueError`` if a config field with a ``Literal`` type has a value that the type does not list."""
    for name, hint in field_types(type(config)).items():
        literals = [option for option in _union_members(hint) if typing.get_origin(option) is typing.Literal]
        if literals and not _has_type(hint, value := getattr(config, name)):
            choices = ", ".join(repr(choice) for literal in literals for choice in typing.get_args(literal))
            raise ValueError(f"{name}={value!r} is unknown: choose from {choices}")


def check_finite(config: Any) -> None:
    """Raise ``ValueError`` if a number of a config or a nested config is not finite. Tuples are checked too."""
    for name, value in numbers_of(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")


def check_numbers(config: Any) -> None:
    """Raise ``ValueError`` if a number of a config or a nested config is out of range. Tuples are checked too.

    Numbers must be finite. Fields named ``seed`` must fit in uint32, because JAX generates the same random numbers for
    several seeds outside this range. All other integers must fit in int32.
    """
    check_finite(config)
    for name, value in numbers_of(config):
        if name.rpartition(".")[2] == "seed" and not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must be from 0 to {2**32 - 1}")
        if isinstance(value, int) and name.rpartition(".")[2] != "seed" and not -(2**31) <= value < 2**31:
            limit = f"large: the largest number is {2**31 - 1}" if value > 0 else f"small: the smallest is {-(2**31)}"
            raise ValueError(f"{name}={value} is too {limit}")


def check_min(minimum: float, **numbers: float | None) -> None:
    """Raise ``ValueError`` if one of ``numbers`` is below ``minimum``. None is accepted."""
    for name, value in numbers.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def check_same_number(**sequences: Sized) -> None:
    """Raise ``ValueError`` if the two sequences have different lengths.

    Args:
        sequences: two sequences. The argument names are nouns for one entry, for the message.
    """
    (first, values), (second, others) = sequences.items()
    if len(values) != len(others):
        raise ValueError(f"each {first} needs one {second}: got {len(values)} {first}s and {len(others)} {second}s")


def convert_numpy_scalars(config: Any) -> None:
    """Replace the NumPy scalars in the fields of a config by Python values, because JSON has no NumPy scalars."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())


def check_field_types(config: Any) -> None:
    """Raise ``ValueError`` if a field of a config has a value of the wrong type. NumPy scalars become Python values."""
    convert_numpy_scalars(config)
    for name, hint in field_types(type(config)).items():
        check_value(hint, getattr(config, name), name)


def check_num_layers(field: str, value: int | None, where: str) -> None:
    """Raise ``ValueError`` if ``field`` is a number of layers and ``value`` exceeds ``MAX_LAYERS``. None is accepted.

    Args:
        field: name of a field of a model config.
        where: name of the value in the error message.
    """
    if field in ("num_layers", "num_decoder_layers") and value is not None and value > MAX_LAYERS:
        raise ValueError(f"{where}={value} is too large: at most {MAX_LAYERS} are supported")


def check_int32(values: np.ndarray, what: str) -> None:
    """Raise ``ValueError`` unless the values are integers in the range of int32, the dtype of batches.

    Args:
        what: a description of the values, with which the message begins.
    """
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{what} has dtype {values.dtype}, but batches hold int32: convert it to integers")
    if values.size and not np.can_cast(values.dtype, np.int32):
        limits, lowest, highest = np.iinfo(np.int32), values.min(), values.max()
        if lowest < limits.min or highest > limits.max:
            raise ValueError(f"{what} has values outside int32: from {lowest} to {highest}")


def numbers_of(config: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the dotted name and the value of every number in a config and its nested configs, as a Python number.

    An entry of a tuple has a name such as ``pools[1]``. Booleans are left out.

    Args:
        config: a config, or the value of a field.
        name: the dotted name of ``config`` if it is the value of a field.
    """
    value = config.item() if isinstance(config, np.generic) else config
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers_of(getattr(value, field.name), f"{name}.{field.name}".removeprefix("."))
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from numbers_of(entry, f"{name}[{index}]")
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


def _type_name(hint: Any) -> str:
    """A description of a type for error messages, such as "a whole number or None"."""
    options = _union_members(hint)
    if len(options) > 1:
        # After "each entry is a string", the words "or None" would seem to describe the entries.
        options = tuple(sorted(options, key=lambda option: typing.get_origin(option) in (tuple, list)))
        return " or ".join(map(_type_name, options))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) is tuple:
        entries = [_type_name(argument) for argument in arguments if argument is not ...]
        if ... in arguments:
            return f"a tuple in which each entry is {entries[0]}"
        return f"a tuple of ({', '.join(entries)})"
    if typing.get_origin(hint) is list:
        return f"a list in which each entry is {_type_name(arguments[0])}"
    return _TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _has_type(hint: Any, value: Any) -> bool:
    options = _union_members(hint)
    if len(options) > 1:
        return any(_has_type(option, value) for option in options)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value)
    if hint is Any:
        return True
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        entries = _entry_types(hint, len(value))
        return len(entries) == len(value) and all(map(_has_type, entries, value))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_has_type(arguments[0], entry) for entry in value)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _entry_types(hint: Any, length: int) -> tuple[Any, ...]:
    """The types of the entries of a tuple with the type ``hint`` and ``length`` entries."""
    arguments = typing.get_args(hint)
    return arguments[:1] * length if ... in arguments else arguments


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


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


def parse_assignments_as_text(option: str, texts: Sequence[str], example: str = "num_layers=24") -> dict[str, str]:
    """``{name: value}`` from texts such as ``num_layers=24``. The values remain strings.

    Args:
        option: name of the command-line option, for error messages.
        example: a valid text, for error messages.

    Raises:
        ValueError: a text has no name or no ``=``, or a name occurs twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"cannot read --{option} {text!r}: write name=value, for example {example}")
        if name in values:
            raise ValueError(f"--{option} has {name} twice: {name}={values[name]} and {text}")
        values[name] = value
    return values


def assignments(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """``{name: value}`` from texts such as ``num_layers=24``, with parsed values.

    Python literals, ``true`` and ``false`` are converted to their values. Other values remain strings.

    Args:
        option: name of the command-line option, for error messages.

    Raises:
        ValueError: a text has no name or no ``=``, or a name occurs twice.
    """
    values: dict[str, Any] = {}
    for name, value in parse_assignments_as_text(option, texts).items():
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):  # TypeError: a literal with an unhashable key
            values[name] = {"true": True, "false": False}.get(value, value)  # otherwise a string, as in remat=full
    return values

"""Reading of JSON from files, and a check of values that are written as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Raises:
        ValueError: as in :func:`read_value`, or the value is not an object.
    """
    value = read_value(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_value(path: Path) -> Any:
    """The JSON value in a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8 or not JSON, is nested too deeply, or has an object with a key twice (``json``
            would silently use the last value). The message names the file.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path} is not JSON or is damaged: {error}") from error


def parse(text: str) -> Any:
    """The JSON value in a text, such as a line of a file.

    Raises:
        DuplicateKeyError: an object has a key twice.
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def require_json(value: Any, name: str, *, allow_nan: bool = True) -> None:
    """Check that ``value`` has only JSON types (tuples count as lists). ``json`` would silently write a key 3 as "3".

    Args:
        name: name of the value in error messages, such as ``meta['rows'][0]``.
        allow_nan: whether NaN and infinity are valid. Python reads and writes them, but they are not in the standard.

    Raises:
        TypeError: a value or a key has another type.
        ValueError: ``allow_nan`` is False, and a number is not finite.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}: JSON has only strings as keys, use {str(key)!r}")
            require_json(item, f"{name}[{key!r}]", allow_nan=allow_nan)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_json(item, f"{name}[{index}]", allow_nan=allow_nan)
    elif isinstance(value, float) and not allow_nan and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: JSON has no such number")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: JSON has no such type")


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DuplicateKeyError(f"the key {name!r} occurs twice")
    return values


# With a hook, json.loads would create a new decoder in each call, for example for each line of a file.
_DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicates)

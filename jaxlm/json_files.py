"""Reading of JSON from files."""

from __future__ import annotations

import json
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
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_reject_duplicates)
    except DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise ValueError(f"{path} is not JSON or is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply") from error


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


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DuplicateKeyError(f"the key {name!r} occurs twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicates)  # json.loads would create a decoder for each line

"""Tests of ``read_object``: which JSON text it accepts, and that each error names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxlm.json_files import read_object


@pytest.mark.parametrize("text", [b'{"a": [1, {"b": null}], "c": "\xc3\xa9"}', b'\xef\xbb\xbf{"a": 1}\r\n'])
def test_objects_are_read(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text)
    assert read_object(path)["a"] in ([1, {"b": None}], 1)
    assert read_object(path).get("c", "\xe9") == "\xe9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1', "is not JSON or is damaged"),
        (b"", "is not JSON or is damaged"),
        (b'{"a": "\xff"}', "is not JSON or is damaged"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "the key 'a' occurs twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_errors_name_the_file(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"file\.json.*{message}"):
        read_object(path)

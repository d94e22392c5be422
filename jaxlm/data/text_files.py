"""Text files: the one place where they are opened, with one set of rules for all readers.

- Encoding: UTF-8, unless a reader is told otherwise. A byte that is not text is an error with its offset and line.
- A byte order mark at the beginning is not text: it is dropped.
- Line ends: "\\n" ends a line. Readers of lines also drop one "\\r" before it, so a CRLF file gives the same lines; a
  "\\r" elsewhere is a character of the line. ``read_text`` keeps all characters, "\\r" included.
- ``.gz`` files are unpacked while they are read. They may unpack to 64 MiB, or to 50 times their size if that is more;
  a file that is unpacked on disk has no limit.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

ALWAYS_UNPACKED = 64 * 2**20
"""Bytes to which any ``.gz`` file may unpack."""
UNPACKED_RATIO = 50
"""Unpacked size over packed size that a larger ``.gz`` file may have: text has 3 to 10, a decompression bomb 1,000."""

_CHUNK = 2**20


def text_chunks(path: str | Path, encoding: str = "utf-8") -> Iterator[str]:
    """The text of a file in pieces of about 1 MiB, after the rules above. Every reader of this package uses it.

    Raises:
        FileNotFoundError: there is no such file.
        LookupError: an unknown encoding.
        ValueError: the file is not text of this encoding, or a ``.gz`` file is truncated, damaged or unpacks to too
            much. The message names the file, and the offset and the line if they are known.
    """
    path = Path(path)
    # A byte order mark is not text; "utf-8-sig" drops it.
    decoder = codecs.getincrementaldecoder("utf-8-sig" if _is_utf8(encoding) else encoding)()
    offset, line = 0, 1
    for data in _bytes(path):
        offset += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            start = offset - len(error.object) + error.start
            line += error.object.count(b"\n", 0, error.start)
            raise _not_text(path, encoding, error.object[error.start], start, line) from error
        # UTF-16 without a byte order mark is valid UTF-8 full of zeros.
        if _is_utf8(encoding) and (zero := data.find(0)) >= 0:
            raise _not_text(path, encoding, 0, offset - len(data) + zero, line + data.count(b"\n", 0, zero))
        line += text.count("\n")
        yield text


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file, ``.gz`` unpacked, with all line ends as they are; see ``jaxlm.data.text_files``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, unpacks to too much, or is not UTF-8; the message names the first
            offending byte.
    """
    text = "".join(text_chunks(path))
    if not text:
        raise ValueError(f"{path} is empty: nothing to train on")
    return text


def read_lines(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """The lines of a file, numbered from 1, without their ends ("\\n" or "\\r\\n").

    Raises:
        FileNotFoundError, LookupError, ValueError: as :func:`text_chunks`.
    """
    number = 1
    begun: list[str] = []  # pieces of a line that goes on in the next chunk
    for text in text_chunks(path, encoding):
        first, *others = text.split("\n")
        begun.append(first)
        for following in others:
            yield number, "".join(begun).removesuffix("\r")
            number, begun = number + 1, [following]
    if last := "".join(begun):
        yield number, last.removesuffix("\r")


def _bytes(path: Path) -> Iterator[bytes]:
    """The unpacked content in pieces, of which the last one is empty."""
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path} is not a file")
    if path.suffix != ".gz":
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                yield data
        yield b""
        return
    limit, size = max(ALWAYS_UNPACKED, UNPACKED_RATIO * path.stat().st_size), 0
    with gzip.open(path, "rb") as file:
        while True:
            try:
                data = file.read(_CHUNK)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{path}: the gzip file is truncated or damaged after {size} bytes: {error}"
                ) from error
            size += len(data)
            if size > limit:
                raise ValueError(
                    f"{path} unpacks to more than {limit} bytes ({UNPACKED_RATIO} times its size, but at least "
                    f"{ALWAYS_UNPACKED}), as a decompression bomb does. If it is none, run `gunzip -k {path}` and pass "
                    "the unpacked file, which has no limit"
                )
            yield data
            if not data:
                return


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


def _not_text(path: Path, encoding: str, value: int, offset: int, line: int) -> ValueError:
    name = "UTF-8" if _is_utf8(encoding) else encoding
    return ValueError(
        f"{path} is not {name} text: byte 0x{value:02x} at offset {offset}, line {line}. Re-encode it, e.g. `iconv -f "
        "LATIN1 -t UTF-8` (or `-f UTF-16`), or pass encoding='latin-1' to a reader that has an encoding"
    )

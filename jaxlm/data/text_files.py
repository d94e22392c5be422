"""Reading of text files. The readers of texts and data sets in jaxlm use this module, so they follow the same rules:

- Encoding: UTF-8, unless the caller passes another encoding. An invalid byte raises an error with its offset and line.
  In UTF-8, a zero byte is invalid too.
- A UTF-8 byte order mark at the beginning is removed.
- Line ends: "\\n" ends a line. Readers of lines also remove one "\\r" at the end of a line, so a CRLF file gives the
  same lines. Any other "\\r" is a character of the line. ``read_text`` keeps all characters, including "\\r".
- The case of a suffix, such as ``.GZ``, does not matter.
- ``.gz`` files are decompressed while they are read. The limit of their decompressed size is 64 MiB or 50 times
  the file size, whichever is larger. Uncompressed files have no limit.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_UNPACKED_LIMIT = 64 * 2**20
"""Decompressed size in bytes that is allowed for every ``.gz`` file."""
MAX_UNPACKED_RATIO = 50
"""Maximum ratio of decompressed size to file size, for ``.gz`` files that decompress to more than
:data:`MIN_UNPACKED_LIMIT`. The ratio is usually 3 to 10 for text, and up to about 1,000 for a decompression bomb."""

_CHUNK = 2**20


def text_chunks(path: str | Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of a file, in pieces of about 1 MiB, read with the rules of this module.

    Raises:
        FileNotFoundError: the file does not exist, or is a directory.
        LookupError: the encoding is unknown, or is not an encoding of text, such as "hex".
        ValueError: the file is not text in this encoding, or a ``.gz`` file is truncated, damaged or too large. The
            message names the file, and the offset and the line if they are known.
    """
    yield from decode_pieces(_read_bytes(Path(path)), str(path), encoding)


def decode_pieces(pieces: Iterable[bytes], name: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of each piece of bytes, decoded with the rules of this module.

    Args:
        pieces: the bytes. The last piece must be empty: it marks the end, where an incomplete character is an error.
        name: the name of the file or stream in messages.

    Raises:
        LookupError: the encoding is unknown, or is not an encoding of text, such as "hex".
        ValueError: the bytes are not text in this encoding. The message has the offset and the line if they are known.
    """
    codec = codecs.lookup(encoding)
    if not codec._is_text_encoding:  # private; the function open uses it, too
        raise LookupError(f"encoding={encoding!r} is not an encoding of text: choose one such as 'utf-8' or 'latin-1'")
    is_utf8 = codec.name in ("utf-8", "utf-8-sig")
    # "utf-8-sig" removes a byte order mark.
    decoder = codecs.getincrementaldecoder("utf-8-sig" if is_utf8 else encoding)()
    kind = "UTF-8" if is_utf8 else encoding
    offset, line = 0, 1
    for data in pieces:
        offset += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeError as error:
            # If UTF-16 has no byte order mark, Python 3.13 raises UnicodeDecodeError, and older versions UnicodeError.
            if not isinstance(error, UnicodeDecodeError) or "BOM" in error.reason:
                raise ValueError(f"{name} is not {encoding} text: it does not begin with a byte order mark") from error
            start = offset - len(error.object) + error.start
            line += error.object.count(b"\n", 0, error.start)
            raise _decoding_error(name, kind, error.object[error.start], start, line) from error
        # Reject zero bytes: an ASCII text in UTF-16 without a byte order mark is valid UTF-8 with zero bytes.
        if is_utf8 and (zero := data.find(0)) >= 0:
            raise _decoding_error(name, kind, 0, offset - len(data) + zero, line + data.count(b"\n", 0, zero))
        line += text.count("\n")
        yield text


def read_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file or a ``.gz`` file of UTF-8 text, with unchanged line ends.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, damaged, too large when decompressed, or not UTF-8. In the last case, the message
            has the first invalid byte and its offset.
    """
    text = "".join(text_chunks(path))
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def read_lines(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield (number, line) for each line of a file. Numbers begin at 1. Line ends ("\\n", "\\r\\n") are removed.

    Raises:
        FileNotFoundError, LookupError, ValueError: as in :func:`text_chunks`.
    """
    return split_lines(text_chunks(path, encoding))


def split_lines(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for each line of a text that is given in pieces, as in :func:`read_lines`."""
    number = 1
    pieces: list[str] = []  # the pieces of the current line, which may continue in the next text
    for text in texts:
        first, *others = text.split("\n")
        pieces.append(first)
        for next_piece in others:
            yield number, "".join(pieces).removesuffix("\r")
            number, pieces = number + 1, [next_piece]
    if last := "".join(pieces):
        yield number, last.removesuffix("\r")


def suffix_without_gz(path: str | Path) -> str:
    """The suffix of a file name in lower case, without ``.gz``. Empty if the name has no other suffix.

    Example:
        >>> suffix_without_gz("DATA.CSV.gz")
        '.csv'
    """
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def escape_line_breaks(text: str) -> str:
    """The text with backslashes and line breaks escaped as in JSON."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def escape_field(text: str) -> str:
    """The text as one field of a tab-separated line: the result of :func:`escape_line_breaks` with escaped tabs."""
    return escape_line_breaks(text).replace("\t", "\\t")


def has_surrogate(text: str) -> bool:
    """Whether the text has a surrogate (:func:`utf8_bytes`)."""
    return re.search("[\ud800-\udfff]", text) is not None


def check_no_surrogate(text: str, name: str) -> None:
    """Raise the ``ValueError`` of :func:`utf8_bytes` if the text has a surrogate."""
    utf8_bytes(text, name)


def utf8_bytes(text: str, name: str) -> bytes:
    """The UTF-8 bytes of a text.

    Args:
        name: the name of the text in the message.

    Raises:
        ValueError: the text has a surrogate. A surrogate is half of a pair of UTF-16 codes, and is not a character.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of {name}, {text[error.start]!r}, is a surrogate and has no UTF-8 bytes"
        ) from error


def _read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content of a file in pieces. The last piece is empty, to mark the end."""
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path} is not a file")
    is_compressed = path.suffix.lower() == ".gz"
    limit, size = max(MIN_UNPACKED_LIMIT, MAX_UNPACKED_RATIO * path.stat().st_size), 0
    with gzip.open(path, "rb") if is_compressed else path.open("rb") as file:
        while True:
            try:
                data = file.read(_CHUNK)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{path}: the gzip file is truncated or damaged after {size} decompressed bytes: {error}"
                ) from error
            size += len(data)
            if is_compressed and size > limit:
                raise ValueError(
                    f"{path} unpacks to more than {limit} bytes ({MAX_UNPACKED_RATIO} times its size, but at least "
                    f"{MIN_UNPACKED_LIMIT}), so it may be a decompression bomb. If you trust the file, run "
                    f"`gunzip -k {path}` and pass the unpacked file, which has no limit"
                )
            yield data
            if not data:
                return


def _decoding_error(name: str, kind: str, value: int, offset: int, line: int) -> ValueError:
    return ValueError(
        f"{name} is not {kind} text: byte 0x{value:02x} at offset {offset}, line {line}. Re-encode it, e.g. `iconv -f "
        "LATIN1 -t UTF-8` (or `-f UTF-16`), or pass encoding='latin-1' if the reader has that argument"
    )

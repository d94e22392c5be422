"""Text: the embedded corpus, and files read strictly."""

from __future__ import annotations

import gzip
import importlib.resources
import zlib
from pathlib import Path

from jaxlm.data.examples import Examples


def shakespeare() -> str:
    """Thirteen plays of Shakespeare, 1.56 MB of ASCII laid out as ``ROMEO:\\ntext\\n\\n``; public domain.

    Source, licence and what was normalised: ``SHAKESPEARE.md`` beside this file.
    """
    packed = importlib.resources.files(__package__).joinpath("shakespeare.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("ascii")


def verses() -> Examples:
    """5,833 verses of the Bible in English (``source``) and Spanish (``target``); public domain.

    Origin and licence: ``VERSES.md`` beside this file.
    """
    packed = importlib.resources.files(__package__).joinpath("verses_en_es.tsv.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    pairs = (line.split("\t") for line in lines)
    return Examples([{"source": source, "target": target} for source, target in pairs], "the embedded verses")


PLAYS = (
    "ROMEO AND JULIET", "MACBETH", "JULIUS CAESAR", "OTHELLO, THE MOOR OF VENICE",
    "THE TRAGEDY OF KING RICHARD THE SECOND", "THE MERCHANT OF VENICE", "THE TEMPEST", "AS YOU LIKE IT",
    "MUCH ADO ABOUT NOTHING", "MEASURE FOR MEASURE", "THE TAMING OF THE SHREW", "TWELFTH NIGHT; OR, WHAT YOU WILL",
    "THE TWO GENTLEMEN OF VERONA",
)  # fmt: skip
"""The titles of the plays of :func:`shakespeare`, in their order."""


def play_passages(words: int = 60) -> Examples:
    """Passages of about ``words`` words, labelled with the play that they are from: ``text``, ``label`` and ``play``.

    A passage is a run of consecutive lines. Lines that name a speaker are left out: the cast would give the play away.
    """
    text = shakespeare()
    starts = [text.index(f"{title}\n\n") for title in PLAYS]
    rows = []
    for title, start, stop in zip(PLAYS, starts, [*starts[1:], len(text)], strict=True):
        lines = [line for line in text[start + len(title) : stop].split("\n") if line and not line.endswith(":")]
        passage: list[str] = []
        for line in lines:
            passage += line.split()
            if len(passage) >= words:
                rows.append({"text": " ".join(passage), "label": title})
                passage = []
    return Examples(rows, "the passages of the embedded plays")


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file, ``.gz`` unpacked; characters and line ends exactly as they are there.

    Raises:
        ValueError: the file is empty, damaged, or not UTF-8; the message names the first offending byte.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if not data:
        raise ValueError(f"{path} is empty: nothing to train on")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, error.start, data[error.start]) from error
    if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8 full of zeros
        raise _not_text(path, data.index(0), 0)
    return text


def _not_text(path: Path, offset: int, value: int) -> ValueError:
    return ValueError(
        f"{path} is not UTF-8 text: byte 0x{value:02x} at offset {offset}. "
        f"Re-encode it, e.g. `iconv -f LATIN1 -t UTF-8` (or `-f UTF-16`)"
    )

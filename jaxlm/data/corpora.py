"""Text corpora that are included in the package: plays, their passages with labels, and verses in two languages."""

from __future__ import annotations

import importlib.resources

from jaxlm.data.examples import Examples
from jaxlm.data.text_files import read_text


def shakespeare() -> str:
    """The text of thirteen plays of Shakespeare, 1.56 MB of ASCII; public domain.

    A speech has the format ``ROMEO:\\ntext\\n\\n``. ``SHAKESPEARE.md`` in this directory describes the source, the
    license and the changes of the layout.
    """
    return _read_embedded("shakespeare.txt.gz")


def verses() -> Examples:
    """Examples ``{"source", "target"}``: 5,833 verses of the Bible in English and in Spanish; public domain.

    ``VERSES.md`` in this directory describes the source and the license.
    """
    pairs = (line.split("\t") for line in _read_embedded("verses_en_es.tsv.gz").splitlines())
    return Examples([{"source": source, "target": target} for source, target in pairs], "the included verses")


def _read_embedded(name: str) -> str:
    """The text of a file that is included in this package."""
    with importlib.resources.as_file(importlib.resources.files(__package__).joinpath(name)) as path:
        return read_text(path)


PLAYS = (
    "ROMEO AND JULIET", "MACBETH", "JULIUS CAESAR", "OTHELLO, THE MOOR OF VENICE",
    "THE TRAGEDY OF KING RICHARD THE SECOND", "THE MERCHANT OF VENICE", "THE TEMPEST", "AS YOU LIKE IT",
    "MUCH ADO ABOUT NOTHING", "MEASURE FOR MEASURE", "THE TAMING OF THE SHREW", "TWELFTH NIGHT; OR, WHAT YOU WILL",
    "THE TWO GENTLEMEN OF VERONA",
)  # fmt: skip
"""The titles of the plays of :func:`shakespeare`, in the order of the text."""


def play_passages() -> Examples:
    """Examples ``{"text", "label"}``: passages of at least 60 words, labeled with the title of their play.

    A passage consists of consecutive lines. It ends with the line that brings it to 60 words. Lines with the name of a
    speaker (in capitals, with a colon) are removed, because the names identify the play. The last lines of a play are
    dropped if they have fewer than 60 words.
    """
    text = shakespeare()
    starts = [text.index(f"{title}\n\n") for title in PLAYS]
    rows = []
    for title, start, stop in zip(PLAYS, starts, [*starts[1:], len(text)], strict=True):
        lines = text[start + len(title) : stop].split("\n")
        passage: list[str] = []
        for line in lines:
            if not (line.endswith(":") and line.isupper()):
                passage += line.split()
            if len(passage) >= 60:
                rows.append({"text": " ".join(passage), "label": title})
                passage = []
    return Examples(rows, "the passages of the included plays")

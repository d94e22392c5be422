"""Descriptions of Debian packages as a summarization task (description -> synopsis).

``apt-get update`` downloads the descriptions. In container images of Debian, it downloads only the synopses, because
these images set ``Acquire::Languages`` to "none": set it to "en" first. This command writes the descriptions and
synopses to a file:

    apt-cache show --no-all-versions $(apt-cache pkgnames) > packages.txt
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.examples import Example, Examples, Rejected, first_object_keys, read_jsonl
from jaxlm.data.text_files import read_lines, suffix_without_gz

_AFFIXES = frozenset((
    # words for the content of a package
    "all", "base", "bin", "cgi", "client", "common", "core", "daemon", "backend", "data", "dbg", "dbgsym", "demo",
    "dev", "devel", "doc", "docs", "example", "examples", "extra", "extras", "frontend", "full", "headers", "headless",
    "html", "i18n", "l10n", "lib", "libs", "man", "module", "modules", "nox", "pdf", "plugin", "plugins", "prof",
    "runtime", "server", "source", "src", "static", "test", "tests", "tool", "tools", "util", "utils", "abi", "cli",
    "gui",
    # programming languages, toolkits and archives
    "bioc", "cil", "com", "cran", "el", "elpa", "fonts", "ghc", "gir", "github", "golang", "gopkg", "gtk", "haskell",
    "in", "java", "lang", "librust", "lua", "node", "nodejs", "ocaml", "octave", "org", "perl", "php", "pypy", "python",
    "qml", "qt", "ruby", "rust",
))  # fmt: skip
"""Parts of package names that do not identify the project."""


def project_name(package: str) -> str:
    """The project of a package: the parts of its lower-case name that identify the project, joined by "-".

    The name is split at the characters ``-.+_``. From each part, the prefix "lib" and a version at the end are removed.
    Then numbers, single characters and the parts in ``_AFFIXES`` are removed. If no part is left, the project is the
    package name. Most packages of one source package have the same project.

    Example:
        >>> [project_name(name) for name in ("0ad-data", "libnss3-dev", "nss-doc", "python3-yaml")]
        ['0ad', 'nss', 'nss', 'yaml']
    """
    parts = [re.sub(r"^lib(?=..)", "", part) for part in re.split(r"[-.+_]", package.lower())]
    parts = [re.sub(r"(?<=[^\d])\d+[a-z]?$", "", part) for part in parts]
    remaining = [part for part in parts if len(part) > 1 and not part.isdigit() and part not in _AFFIXES]
    return "-".join(remaining) or package


def read_descriptions(path: str | Path) -> Examples:
    """Examples ``{"package", "project", "text", "summary"}`` from a file of package descriptions.

    ``text`` is the long description, and ``summary`` is the synopsis. ``project`` is the :func:`project_name` of
    the source package if the record names it, else of the package. Files may be compressed (``.gz``). There are two
    formats:

    - Control records of Debian, such as the output of ``apt-cache show`` or the file ``Translation-en`` of an archive.
      (The ``Packages`` files of Debian have only synopses.) ``rejected`` lists records without a name, synopsis or long
      description, and repeated packages, each with the number of its first line.
    - ``.jsonl``: one object per line with the keys ``text``, ``summary`` and, optionally, ``package``. If the first
      object has a ``package``, every object needs one. Otherwise, ``package`` is not read, and ``package`` and
      ``project`` of the example with index N are "text N". ``rejected`` lists invalid lines. Repeated packages are
      kept.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8 text, or no record is valid.
    """
    if suffix_without_gz(path) == ".jsonl":
        names = ["text", "summary"] + ["package"] * ("package" in first_object_keys(path))
        examples = read_jsonl(path, {name: name for name in names}, texts=names, on_error="report")
        rows = []
        for number, row in enumerate(examples):
            package = row.get("package", f"text {number}")
            rows.append({**row, "package": package, "project": project_name(package) if "package" in row else package})
        return Examples(rows, examples.name, examples.rejected)
    rows, rejected, seen = [], [], set()
    for line, record in _read_records(path):
        example = _make_example(record)
        if example is None:
            rejected.append(Rejected(line, "the record needs a package name, a synopsis and a description"))
        elif example["package"] in seen:
            rejected.append(Rejected(line, f"package {example['package']} is repeated"))
        else:
            seen.add(example["package"])
            rows.append(example)
    if not rows:
        raise ValueError(
            f"{path} has no description: use a .jsonl file with the keys text and summary, or Debian records from "
            "apt-cache show (the output of apt-cache dumpavail has only synopses)"
        )
    return Examples(rows, str(path), tuple(rejected))


def _read_records(path: str | Path) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """Yield the number of the first line and the fields of each control record.

    The value of a field is a list of lines. The leading space of continuation lines is removed.
    """
    for is_empty, numbered_lines in itertools.groupby(read_lines(path), lambda item: not item[1].strip()):
        if is_empty:
            continue
        (first_line, *_), lines = zip(*numbered_lines, strict=True)
        record: dict[str, list[str]] = {}
        field = ""
        for line in lines:
            if line.startswith((" ", "\t")):
                record.setdefault(field, []).append(line[1:].rstrip())
            else:
                field, _, value = line.partition(":")
                record[field] = [value.strip()]
        yield first_line, record


def _make_example(record: dict[str, list[str]]) -> Example | None:
    """The example of a control record, or None if the name, the synopsis or the long description is missing."""
    names = record.get("Package", [""])
    summary, *lines = record.get("Description-en") or record.get("Description") or [""]
    text = "\n".join("" if line == "." else line for line in lines).strip()
    if not (names[0] and summary and text):
        return None
    # The field Source may have a version in parentheses after the name. Without this field, the source package has the
    # name of the package.
    source = record.get("Source", names)[0].split(" ")[0]
    return {"package": names[0], "project": project_name(source), "text": text, "summary": summary}

"""Descriptions of Debian packages: a task of summarization that every Debian system has (description -> synopsis).

apt-cache show --no-all-versions $(apt-cache pkgnames) > packages.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.examples import Example, Examples, Rejected, read_jsonl
from jaxlm.data.text_files import read_lines

_AFFIXES = frozenset(
    {
        # what a package holds
        "all",
        "base",
        "bin",
        "cgi",
        "client",
        "common",
        "core",
        "daemon",
        "backend",
        "data",
        "dbg",
        "dbgsym",
        "demo",
        "dev",
        "devel",
        "doc",
        "docs",
        "example",
        "examples",
        "extra",
        "extras",
        "frontend",
        "full",
        "headers",
        "headless",
        "html",
        "i18n",
        "l10n",
        "lib",
        "libs",
        "man",
        "module",
        "modules",
        "nox",
        "pdf",
        "plugin",
        "plugins",
        "prof",
        "runtime",
        "server",
        "source",
        "src",
        "static",
        "test",
        "tests",
        "tool",
        "tools",
        "util",
        "utils",
        "abi",
        "cli",
        "gui",
        # its language, toolkit or archive
        "bioc",
        "cil",
        "com",
        "cran",
        "el",
        "elpa",
        "fonts",
        "ghc",
        "gir",
        "github",
        "golang",
        "gopkg",
        "gtk",
        "haskell",
        "in",
        "java",
        "lang",
        "librust",
        "lua",
        "node",
        "nodejs",
        "ocaml",
        "octave",
        "org",
        "perl",
        "php",
        "pypy",
        "python",
        "qml",
        "qt",
        "ruby",
        "rust",
    }
)
"""Parts of package names that say which part of a project a package holds, or for which language it is."""


def project(package: str) -> str:
    """The project of a package: its name without versions, "lib", and the parts that say what the package holds.

    Packages of one source package mostly have the same project; a name of nothing but such parts is its own project.

    Example:
        >>> [project(name) for name in ("0ad-data", "libnss3-dev", "nss-doc", "python3-yaml")]
        ['0ad', 'nss', 'nss', 'yaml']
    """
    parts = [re.sub(r"^lib(?=..)", "", part) for part in re.split(r"[-.+_]", package.lower())]
    parts = [re.sub(r"(?<=[^\d])\d+[a-z]?$", "", part) for part in parts]
    kept = [part for part in parts if len(part) > 1 and not part.isdigit() and part not in _AFFIXES]
    return "-".join(kept) or package


def read_descriptions(path: str | Path) -> Examples:
    """Examples ``{"package", "project", "text", "summary"}`` from a file of package descriptions (``.gz`` too).

    The file holds Debian's control records, as ``apt-cache show`` and the ``Packages`` and ``Translation-en`` files of
    an archive, or (``.jsonl``) one object a line with the keys ``package``, ``text`` and ``summary``. A record without
    a long description, or of a package that occurred before, is listed in ``rejected`` with its first line.

    Raises:
        ValueError: no record has a description.
    """
    if ".jsonl" in Path(path).name:
        found = read_jsonl(path, {name: name for name in ("package", "text", "summary")}, on_error="report")
        rows = [{**row, "project": project(row["package"])} for row in found]
        return Examples(rows, found.name, found.rejected)
    rows, rejected, seen = [], [], set()
    for line, record in _records(path):
        example = _example(record)
        if example is None:
            rejected.append(Rejected(line, "no package with a synopsis and a description"))
        elif example["package"] in seen:
            rejected.append(Rejected(line, f"package {example['package']} occurred before"))
        else:
            seen.add(example["package"])
            rows.append(example)
    if not rows:
        raise ValueError(
            f"{path} holds no package description: write it with apt-cache show, not with apt-cache dumpavail, which "
            "has only synopses"
        )
    return Examples(rows, str(path), tuple(rejected))


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """First line and fields of each control record; a field is its lines, without the space before continued ones."""
    record: dict[str, list[str]] = {}
    first, field = 1, ""
    for number, line in read_lines(path):
        if not line.strip():
            if record:
                yield first, record
            record = {}
        elif line.startswith((" ", "\t")):
            record.setdefault(field, []).append(line[1:].rstrip())
        else:
            first = first if record else number
            field, _, value = line.partition(":")
            record[field] = [value.strip()]
    if record:
        yield first, record


def _example(record: dict[str, list[str]]) -> Example | None:
    names = record.get("Package", [""])
    summary, *lines = record.get("Description-en") or record.get("Description") or [""]
    text = "\n".join("" if line == "." else line for line in lines).strip()
    if not (names[0] and summary and text):
        return None
    # A source package may have its version in parentheses.
    source = record.get("Source", names)[0].split(" ")[0]
    return {"package": names[0], "project": project(source), "text": text, "summary": summary}

"""Docstrings of the installed Python code as a summarization task. No download is needed.

The first paragraph of a docstring is its summary (PEP 257), which is the target. The text is the rest of the docstring,
up to the first section such as ``Args:``. Source files are parsed, not imported.
"""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from jaxlm.config import check_min
from jaxlm.data.examples import Example, Examples, Rejected
from jaxlm.data.text_files import has_surrogate

T = TypeVar("T")

_SKIPPED_DIRECTORIES = ("test", "tests", "testing", "_vendor", "vendor", "vendored", "__pycache__")
"""Names of directories that are not read, because they contain tests, copies of other packages or bytecode."""
_SECTION_NAMES = (
    "args|arguments|attributes|parameters|(other|keyword) (parameters|args|arguments)|returns|yields|raises|warns|"
    "warnings?|see also|notes?|todo|references|examples?"
)
_SECTION_START = re.compile(rf"^\s*([:@]\w|({_SECTION_NAMES})\s*:?\s*$|>>> |\.\. )", re.IGNORECASE)
_STATEMENT_NODES = (ast.stmt, ast.excepthandler, ast.match_case)
"""Types of nodes that are statements or contain statements."""


def docstrings(
    directories: Sequence[str | Path] | None = None,
    *,
    max_files: int = 50,
    max_per_package: int = 400,
    min_words: int = 12,
    max_words: int = 150,
    max_summary_words: int = 20,
) -> Examples:
    """Examples ``{"text", "summary", "package", "name"}`` from docstrings of modules, classes and functions.

    ``text`` and ``summary`` are the results of :func:`split_docstring`. ``package`` is the top-level package, or the
    module if it is in no package. ``name`` is the name of the class or function within its module, such as
    ``Box.open``; it is "module" for the docstring of a module. Examples are in the order of packages, files and lines.
    An example is removed if its text or its summary has a surrogate (an invalid character) or, ignoring case, equals an
    earlier text or summary. Directories of tests and of copied packages are skipped. ``rejected`` lists the files that
    cannot be read, or that this version of Python cannot parse, each with its number in reading order and the reason.

    Args:
        directories: directories whose entries are packages or modules. None: the standard library and the installed
            packages.
        max_files: maximum number of files that are read from one package. If a package has more files, files at equal
            distances in the list of its files are read.
        max_per_package: maximum number of examples from one package. If a package has more examples, those at equal
            distances in the list are kept.
        min_words: examples whose text has fewer words are removed.
        max_words: examples whose text has more words are removed.
        max_summary_words: examples whose summary has more words, or fewer than 3 words, are removed.

    Raises:
        FileNotFoundError: a directory does not exist, or is a file.
        TypeError: ``directories`` is a single path.
        ValueError: a limit is below 1, or no docstring satisfies the limits.
    """
    check_min(1, max_files=max_files, max_per_package=max_per_package)
    check_min(1, min_words=min_words, max_words=max_words, max_summary_words=max_summary_words)
    if isinstance(directories, str | Path):
        raise TypeError(f"directories must be a sequence of directories: pass [{str(directories)!r}]")
    rejected: list[Rejected] = []
    rows: list[Example] = []
    seen: set[str] = set()
    numbers = itertools.count(1)
    for package, paths in _package_files(directories).items():
        package_rows: list[Example] = []
        for path, number in zip(_evenly_spaced(paths, max_files), numbers, strict=False):
            try:
                tree = _parse(path)
            except (OSError, SyntaxError, ValueError, RecursionError) as error:
                rejected.append(Rejected(number, f"{path}: {error}"))
                continue
            for name, text, summary in _texts_and_summaries(tree):
                fits = min_words <= len(text.split()) <= max_words and 3 <= len(summary.split()) <= max_summary_words
                fits &= not has_surrogate(text + summary)
                if fits and not seen & {text.lower(), summary.lower()}:
                    seen |= {text.lower(), summary.lower()}
                    package_rows.append({"text": text, "summary": summary, "package": package, "name": name})
        rows += _evenly_spaced(package_rows, max_per_package)
    if not rows:
        raise ValueError("no docstring with a summary and a text was found: pass other directories or wider limits")
    return Examples(rows, "the docstrings", tuple(rejected))


def _package_files(directories: Sequence[str | Path] | None) -> dict[str, list[Path]]:
    """Package name -> its Python files, in a fixed order."""
    if directories is None:
        directories = list(dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    packages: dict[str, list[Path]] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory")
        for entry in sorted(directory.iterdir()):
            if entry.suffix == ".py":
                packages.setdefault(entry.stem, []).append(entry)
            elif entry.is_dir() and entry.name not in ("site-packages", "dist-packages", *_SKIPPED_DIRECTORIES):
                packages.setdefault(entry.name, []).extend(
                    path
                    for path in sorted(entry.rglob("*.py"))
                    if not set(path.relative_to(directory).parts[:-1]) & set(_SKIPPED_DIRECTORIES)
                )
    return packages


def _parse(path: Path) -> ast.Module:
    """The syntax tree of a file, parsed without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example, about invalid escape sequences in strings
        return ast.parse(path.read_bytes())


def _texts_and_summaries(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """The (qualified name, text, summary) of each docstring that has a text and a summary, in the order of the file."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = split_docstring(ast.get_docstring(node) or "")
            if parts is not None:
                yield prefix or "module", *parts
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENT_NODES)]
        for child in reversed(children):
            is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            name = getattr(child, "name", "") if is_named else ""  # the name of an except clause is a variable
            stack.append((".".join(part for part in (prefix, name) if part), child))


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """The (text, summary) of a docstring, or None.

    The summary is the first paragraph, joined into one line (PEP 257 requires one line). The text consists of the
    paragraphs after the summary, one line each, up to the first section (``Args:``, or ``Parameters`` with a line of
    dashes), field list (``:param``), directive (``.. note::``) or doctest.

    The result is None if the text is empty. It is also None if the first paragraph begins like one of these blocks, has
    three or more of the characters ``-=~^*`` in a row (a heading or a table), or begins with a character that is
    neither an ASCII letter nor a backquote.

    Example:
        >>> split_docstring("Return the sum.\\n\\nBoth numbers are added\\nas integers.\\n\\nArgs:\\n    x: one")
        ('Both numbers are added as integers.', 'Return the sum.')
    """
    summary, *rest = re.split(r"\n\s*\n", docstring.strip())
    paragraphs = []
    for paragraph in rest:
        lines = paragraph.strip("\n").split("\n")
        underlined = len(lines) > 1 and re.fullmatch(r"\s*[-=~^*]{3,}\s*", lines[1])
        if _SECTION_START.match(lines[0]) or underlined or any(line.lstrip().startswith(">>> ") for line in lines):
            break
        paragraphs.append(" ".join(paragraph.split()))
    text = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    is_section = _SECTION_START.match(summary) or re.search(r"[-=~^*]{3,}", summary)
    if not text or is_section or not re.match(r"[A-Za-z`]", summary):
        return None
    return text, " ".join(summary.split())


def _evenly_spaced(values: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of the values, evenly spaced."""
    count = min(limit, len(values))
    return [values[index * len(values) // count] for index in range(count)]

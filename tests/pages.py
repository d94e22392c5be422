"""Functions that run the Python blocks of a page of docs/ and parse its command lines."""

import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxlm import cli

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TASKS = sorted(path.stem for path in (ROOT / "docs/tasks").glob("*.md"))
"""Tasks with a page in docs/tasks. Each also has an experiment and a notebook with the same name."""
FOR_LOOP = re.compile(r"\bfor (\w+) in ([^;]+);")


def run_page(
    name: str, min_blocks: int = 1, replacements: Mapping[str, str] | None = None, not_run: str | None = None
) -> dict[str, Any]:
    """Run the Python blocks of a page in order, in the current directory, and return their common namespace.

    Args:
        min_blocks: the number of blocks that the page must have at least.
        replacements: text in the blocks -> replacement, to make a test short. Each text must occur in a block.
        not_run: blocks with this text are not run.
    """
    path = ROOT / name
    page = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python") >= min_blocks
    replaced = dict(replacements or {})
    for text in replaced:
        assert any(text in block[1] for block in blocks), f"{name} has no {text!r} any more: change the test"
    namespace = {"__name__": path.stem}
    for block in blocks:
        code = block[1]
        if not_run is not None and not_run in code:
            continue
        for text, replacement in replaced.items():
            code = code.replace(text, replacement)
        # With these blank lines, a traceback shows the line numbers of the page.
        blank_lines = "\n" * page.count("\n", 0, block.start(1))
        exec(compile(blank_lines + code, str(path), "exec"), namespace)
    return namespace


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of each ``python -m experiments.NAME ...`` and ``jaxlm NAME ...`` of a page.

    Commands are in indented lines outside fenced blocks, and after "$ " in fenced blocks of the language console. A
    shell loop yields one command for each value. Comments, the word "..." and assigned variables are dropped.
    """
    text = text.replace("\\\n", " ")
    consoles = "".join(match[2] for match in FENCED.finditer(text) if match[1] == "console")
    lines = [line[2:] for line in consoles.splitlines() if line.startswith("$ ")]
    for line in [*lines, *(line for line in FENCED.sub("", text).splitlines() if line.startswith("    "))]:
        loop = FOR_LOOP.search(line)
        for value in loop[2].split() if loop else [""]:
            expanded = line.replace(f"${loop[1]}", value) if loop else line
            lexer = shlex.shlex(expanded, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word and not set(word) <= set("();<>|&"):
                    words += [] if word == "..." else [word]
                    continue
                while words and (words[0] == "do" or re.match(r"[A-Z_]+=", words[0])):
                    words = words[1:]
                if words[:1] == ["jaxlm"] or [re.sub(r"\.\w+$", "", word) for word in words[:3]] == [
                    "python", "-m", "experiments",
                ]:  # fmt: skip
                    yield words
                words = []


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Parse a command line without running its program; returns the exit status. A wrong option raises SystemExit."""
    if words[0] == "jaxlm":
        for command in cli.COMMANDS.values():
            monkeypatch.setattr(command, "run", lambda self: 0)
        return cli.main(words[1:])
    package = (ROOT / "experiments" / words[2].removeprefix("experiments.")).is_dir()
    module = importlib.import_module(f"{words[2]}.__main__" if package else words[2])
    if hasattr(module, "exit_status"):  # the module does not use jaxlm.training.experiment.main
        monkeypatch.setattr(module, "exit_status", lambda command, name, *, debug: 0)
    else:
        monkeypatch.setattr(module, "run", lambda experiment, resume: SimpleNamespace(interrupted=None, signal=None))
    return module.main(words[3:])


def check_links(name: str) -> None:
    """Check that the internal links of a page point to its headings, and that the files it names exist."""
    page = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert links
    assert set(links) <= anchors
    for path in re.findall(r"`((?:jaxlm|tests|docs|experiments)/[\w/.]*)`", page):
        assert (ROOT / path).exists(), path

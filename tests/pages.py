"""Pages of docs/ are code: their blocks run in order, in one namespace, as a reader would type them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(name: str, least: int = 1) -> dict[str, Any]:
    """Run every block of a page (at least so many), from the current directory; returns the namespace."""
    path = ROOT / name
    page = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python") >= least
    namespace = {"__name__": path.stem}
    for block in blocks:
        # Blank lines in front make the line numbers of a failure those of the page.
        above = "\n" * page.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(path), "exec"), namespace)
    return namespace


def check_links(name: str) -> None:
    """Links within a page lead to its headings, and the files that it names exist."""
    page = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert links
    assert set(links) <= anchors
    for path in re.findall(r"`((?:jaxlm|tests|docs|experiments)/[\w/.]*)`", page):
        assert (ROOT / path).exists(), path

"""docs/tour.md is code: its blocks run in order, in one namespace, as a reader would type them."""

import re
from pathlib import Path

TOUR = Path(__file__).parents[1] / "docs" / "tour.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_of_the_tour_runs(tmp_path, monkeypatch):
    page = TOUR.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python") > 20
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "tour"}
    for block in blocks:
        # Blank lines in front make the line numbers of a failure those of the page.
        above = "\n" * page.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(TOUR), "exec"), namespace)


def test_links_within_the_tour_lead_somewhere():
    page = TOUR.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert links
    assert set(links) <= anchors
    for path in re.findall(r"`((?:jaxlm|tests|docs|experiments)/[\w/.]*)`", page):
        assert (TOUR.parents[1] / path).exists(), path


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    page = (TOUR.parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = BLOCK.finditer(page)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec(compile(block[1], "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (1, 19, 77)
    assert len(namespace["text"]) == 40

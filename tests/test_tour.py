import re

import pytest

from tests.pages import ROOT, check_links, run_page

DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_generated" not in path.parts]  # see docs/conf.py
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


@pytest.mark.thorough
def test_every_block_of_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/tour.md", min_blocks=20)


def test_internal_links_of_the_tour_are_valid():
    check_links("docs/tour.md")


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_page("README.md")
    assert namespace["logits"].shape == (1, 19, 77)
    assert len(namespace["text"]) == 40


def test_the_examples_of_getting_started_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_page("docs/getting_started.md")
    assert namespace["scores"].shape == (2, 1, 3)
    assert namespace["translation"].shape == (2, 8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_exist(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith(("https://", "http://")) or (page.parent / link).exists(), link

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import text_generation
from jaxlm import config as config_lib
from tests.pages import BLOCK, ROOT, check_links, command_lines, parse, run_page

DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_generated" not in path.parts]  # see docs/conf.py
TOUR = ROOT / "docs/tour.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
COMMANDS = {
    page: commands
    for page in PAGES
    if page.name != "labbook.md"  # its commands are those of their dates
    and page.parent.name != "tasks"  # see test_task_pages.py
    and (commands := list(command_lines(page.read_text(encoding="utf-8"))))
}


@pytest.mark.thorough
def test_every_block_of_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_page("docs/tour.md", min_blocks=20, not_run="my_package")
    # This block is a module of its own, in a package that has the family of the page.
    (contract,) = (block[1] for block in BLOCK.finditer(TOUR.read_text(encoding="utf-8")) if "my_package" in block[1])
    monkeypatch.setitem(sys.modules, "my_package", SimpleNamespace(bigram=namespace["bigram"]))
    module = {"__name__": "test_bigram"}
    exec(contract, module)
    assert module["FAMILIES"] == ("bigram",)
    assert sum(name.startswith("test_") for name in module) > 20


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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_pages_with_commands_are_found():
    names = {page.name for page in COMMANDS}
    assert {"README.md", "index.md", "getting_started.md", "tpu.md", "benchmarks.md", "evaluation.md"} <= names


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("RUN_DIR").mkdir()
    config_lib.write(text_generation.PRESETS["gpt"], Path("RUN_DIR", "config.json"))  # for --resume
    assert [parse(words, monkeypatch) for words in COMMANDS[page]] == [0] * len(COMMANDS[page])

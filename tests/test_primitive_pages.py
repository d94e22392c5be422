"""Tests of the pages of docs/primitives: their examples run, and the names and constants in them are right."""

import pkgutil
import re

import pytest

from jaxlm.nn import choices
from jaxlm.nn.cpu_choices import CpuChoices
from tests.pages import ROOT, run_page

PAGES = sorted(path.stem for path in (ROOT / "docs/primitives").glob("*.md") if path.stem != "index")
CONSTANT = re.compile(r"`(CpuChoices\.\w+|[A-Z][A-Z_]+)` \(([\d,]+)\)")
NAME = re.compile(r"`(jaxlm(?:\.\w+)+)`")


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page):
    run_page(f"docs/primitives/{page}.md")


@pytest.mark.parametrize("page", ["index", *PAGES])
def test_the_names_and_constants_of_a_page_exist(page):
    text = (ROOT / f"docs/primitives/{page}.md").read_text(encoding="utf-8")
    for name, value in CONSTANT.findall(text):
        holder = CpuChoices if "." in name else choices
        assert getattr(holder, name.rpartition(".")[2]) == int(value.replace(",", "")), name
    names = NAME.findall(text)
    assert names
    for name in names:
        pkgutil.resolve_name(name)  # raises an error if there is no such module or object


def test_the_index_lists_every_page():
    index = (ROOT / "docs/primitives/index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"]({page}.md)" in index
        assert f"\n{page}\n" in index, "the navigation of the site"

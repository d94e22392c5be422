"""Tests of the pages in docs/families: generated parts, formulas of costs, and examples."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import spec
from jaxlm.models import FAMILIES, get_model
from jaxlm.models.registry import family
from jaxlm.plan.flops import counted_flops
from tests.pages import ROOT, run_page

PAGES = ROOT / "docs/families"
SIZES = {"T": 12, "S": 16, "R": 7}
"""Values in formulas: tokens of a call, length of the state, tokens of the source."""
SEGMENTS = ("xlnet", "transformer_xl")
"""The formulas of these families are for a call of T tokens. Those of other families with a state are for one token."""
FUNCTIONS = {
    **{f.__name__: f for f in (enumerate, len, list, max, min, range, round, sum, zip)},
    "accumulate": itertools.accumulate,
    "prod": math.prod,
}


def program(path: str) -> Any:
    """The module of a program in docs/, which is not a package."""
    location = importlib.util.spec_from_file_location(path.split("/")[-1], ROOT / f"docs/{path}.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*FAMILIES, "index"])
def test_generated_parts_are_up_to_date(name):
    module = program("make_family_pages")
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert set(module.PART.findall(page)) == ({"shared"} if name == "index" else set(module.WRITERS) - {"shared"})
    assert module.updated(name, page) == page, f"run `{module.COMMAND}`"


def test_every_family_has_a_page_and_a_picture_and_a_link():
    assert {path.stem for path in PAGES.glob("*.md")} == {*FAMILIES, "index"}
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    for name in FAMILIES:
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert f"(../pictures/families/{name}.svg)" in page
        assert index.count(f"[`{name}`]({name}.md)") == 2  # in the tables of families and of differences


def test_pictures_are_up_to_date():
    module = program("pictures/draw_blocks")
    assert set(module.PICTURES) == set(FAMILIES)
    for name in FAMILIES:
        assert module.draw(name) == (module.FOLDER / f"{name}.svg").read_text(encoding="utf-8"), (
            f"run `python docs/pictures/draw_blocks.py {name}`"
        )


def test_links_to_headings_of_family_pages_are_valid():
    def anchors(page: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    links = [link for text in texts.values() for link in re.findall(r"\]\((\w+\.md)#([\w-]+)\)", text)]
    assert links
    for page, anchor in links:
        assert anchor in anchors(texts[page]), (page, anchor)


# ------------------------------------------------------------------------------------------------------ formulas


def cost_tables(name: str) -> list[tuple[list[str], bool, dict[str, str], dict[str, str]]]:
    """For each table of costs: its variants, whether it holds for all variants, its symbols and its formulas."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    tables, symbols = [], {}
    for text, rows in re.findall(
        r"^(Formulas for .*?):\n\n\| quantity.*?\n\| --- .*?\n(.*?)\n\n", page, re.MULTILINE | re.DOTALL
    ):
        subject, definitions = " ".join(text.split()).split(", with ", 1)
        variants = [word for word in re.findall(r"`([^`]+)`", subject) if word in family(name).VARIANTS]
        symbols = symbols | dict(re.findall(r"`(\w+)` = `([^`]+)`", definitions))
        formulas = dict(re.findall(r"^\| (\w+)[^|]* \| `([^`]+)` \|$", rows, re.MULTILINE))
        assert len(formulas) == rows.count("\n") + 1
        tables.append((variants, subject.endswith("all other variants"), symbols, formulas))
    return tables


def evaluate(config: Any, symbols: dict[str, str], formula: str) -> Any:
    """The value of a formula for a config."""
    values = FUNCTIONS | vars(config) | SIZES | {"b": jnp.dtype(config.dtype).itemsize}
    for symbol, expression in symbols.items():
        values[symbol] = eval(expression, values)
    return eval(formula, values)


def state_specs(model: Any) -> Any:
    return model.state_specs(1, SIZES["S"], **({"source_length": SIZES["R"]} if model.reads_source else {}))


def forward_flops(model: Any, tokens: int, state: Any) -> float:
    """FLOPs of the hidden states and the head of one row."""

    def forward(params: Any, ids: jax.Array, state: Any) -> jax.Array:
        hidden, _ = model.apply(params, ids, **({} if state is None else {"state": state}))
        return model.logits(params, model.pool(params, hidden) if model.task == "classification" else hidden)

    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return counted_flops(
        forward, spec.abstract(model.specs), ids, None if state is None else spec.abstract(state)
    ).amount


@pytest.mark.parametrize("name", FAMILIES)
def test_formulas_of_costs_agree_with_the_library(name):
    tables = cost_tables(name)
    assert tables
    for variants, holds_for_all, symbols, formulas in tables:
        assert any(variant.endswith("tiny") for variant in variants)
        for variant in family(name).VARIANTS if holds_for_all else variants:
            model = get_model(variant)
            assert evaluate(model.config, symbols, formulas["parameters"]) == model.num_parameters, variant
        for variant in variants:
            model = get_model(variant)
            has_state = "bytes" in formulas
            if has_state:
                size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_specs(model)))
                assert evaluate(model.config, symbols, formulas["bytes"]) == size, variant
            if "FLOPs" in formulas:
                state = state_specs(model) if has_state else None
                tokens = SIZES["T"] if name in SEGMENTS or not has_state else 1
                flops = forward_flops(model, tokens, state)
                assert evaluate(model.config, symbols, formulas["FLOPs"]) == flops, variant
    assert any("FLOPs" in formulas for *_, formulas in tables)


# ------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gpt", "gated_deltanet") else pytest.param(name, marks=pytest.mark.thorough)
        for name in FAMILIES
    ],
)
def test_the_example_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(f"docs/families/{name}.md", not_run="import torch")

"""The included Shakespeare text matches its description."""

import hashlib
import importlib.resources
import re

from jaxlm.data import shakespeare


def test_shakespeare_matches_its_description():
    text = shakespeare()
    note = importlib.resources.files("jaxlm.data").joinpath("SHAKESPEARE.md").read_text(encoding="utf-8")
    data = text.encode("ascii")
    assert hashlib.sha256(data).hexdigest() in note
    assert f"{len(data):,} bytes" in note
    assert f"{len(set(text))} distinct characters" in note
    assert 1_000_000 < len(data) < 2_000_000
    assert not re.search("gutenberg|etext|copyright", text, re.IGNORECASE)


def test_shakespeare_is_formatted_as_speeches():
    text = shakespeare()
    assert text.count("\nROMEO:\n") > 150
    assert "\r" not in text
    assert "\t" not in text
    speeches = re.findall(r"\n\n[A-Z][A-Z' ,-]+:\n(?=[^\n])", text)
    assert len(speeches) > 10_000
    assert not re.search(r"\n\n[A-Z]{4,}\.\n[A-Z]", text.replace("SONG.", "")), "a speaker name that ends with a period"
    assert all(line == line.strip() for line in text.split("\n"))

"""The embedded corpus is what its note says; text files are read strictly."""

import gzip
import hashlib
import importlib.resources
import re

import pytest

from jaxlm.data import read_text, shakespeare


def test_shakespeare_is_the_text_its_note_describes():
    text = shakespeare()
    note = importlib.resources.files("jaxlm.data").joinpath("SHAKESPEARE.md").read_text(encoding="utf-8")
    data = text.encode("ascii")
    assert hashlib.sha256(data).hexdigest() in note
    assert f"{len(data):,}".replace(",", " ") + " bytes" in note
    assert f"{len(set(text))} distinct characters" in note
    assert 1_000_000 < len(data) < 2_000_000
    assert not re.search("gutenberg|etext|copyright", text, re.IGNORECASE)


def test_shakespeare_is_laid_out_as_speeches():
    text = shakespeare()
    assert text.count("\nROMEO:\n") > 150
    assert "\r" not in text
    assert "\t" not in text
    speeches = re.findall(r"\n\n[A-Z][A-Z' ,-]+:\n(?=[^\n])", text)
    assert len(speeches) > 10_000
    assert not re.search(r"\n\n[A-Z]{4,}\.\n[A-Z]", text.replace("SONG.", "")), "a speaker that kept its full stop"
    assert all(line == line.strip() for line in text.split("\n"))


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_read_text_keeps_every_character(tmp_path, name):
    text = "né\r\nŝ\t☃ 𝄞\n"
    data = text.encode("utf-8")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_text(tmp_path / name) == text


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r"a\.txt is not UTF-8 text: byte 0xe9 at offset 3.*iconv"),
        ("utf-16", r"byte 0xff at offset 0.*UTF-16"),
        ("utf-16-le", r"byte 0x00 at offset 1.*UTF-16"),
    ],
)
def test_read_text_names_the_first_byte_of_a_wrong_encoding(tmp_path, encoding, message):
    (tmp_path / "a.txt").write_bytes(("caf\u00e9" if encoding == "latin-1" else "cafe").encode(encoding))
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a.txt")


def test_read_text_refuses_empty_and_damaged_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a text of some length")[:-9])
    with pytest.raises(ValueError, match=r"a\.gz is not a whole gzip file"):
        read_text(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"b\.gz is not a whole gzip file"):
        read_text(tmp_path / "b.gz")

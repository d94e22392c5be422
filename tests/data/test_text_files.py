"""Text files are read by one set of rules: byte order marks, line ends, encodings, gzip files and their size."""

import gzip
import json
import re
from pathlib import Path

import pytest

import jaxlm.data
from jaxlm.data import read_games, read_text, text_files
from jaxlm.data.debian import read_descriptions
from jaxlm.data.examples import read_jsonl, read_labelled_lines, read_pairs, read_table
from jaxlm.data.squad import read_squad
from jaxlm.data.text_files import read_lines, text_chunks
from jaxlm.data.tokenizers import load_tokenizer

READERS = {
    "text": read_text,
    "lines": lambda path: list(read_lines(path)),
    "labelled_lines": read_labelled_lines,
    "table": lambda path: read_table(path, {"text": "text"}, delimiter="\t"),
    "jsonl": lambda path: read_jsonl(path, {"text": "text"}),
    "pairs": lambda path: read_pairs(path, path),
    "squad": read_squad,
    "debian": read_descriptions,
    "games": lambda path: read_games(path, check="syntax"),
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def write(path, text, encoding="utf-8"):
    data = text if isinstance(text, bytes) else text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_whole_texts_keep_every_character_but_the_byte_order_mark(tmp_path, name, mark):
    text = "né\r\nŝ\t☃ 𝄞\r\r\n\n \ufeffx\n"  # the second one is a character
    assert read_text(write(tmp_path / name, mark + text)) == text


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_lines_are_those_of_both_line_ends(tmp_path, name, end):
    path = write(tmp_path / name, "\ufeffé one\r\n\nb\rc\r\r\nlonger than a chunk\u2028" + end)
    assert list(read_lines(path)) == [
        (1, "é one"), (2, ""), (3, "b\rc\r"), (4, "longer than a chunk\u2028"),
    ]  # fmt: skip


def test_an_empty_file_has_no_lines_and_is_no_text(tmp_path):
    for data in (b"", "\ufeff".encode()):
        path = write(tmp_path / "a.txt", data)
        assert list(read_lines(path)) == []
        with pytest.raises(ValueError, match=r"a\.txt is empty"):
            read_text(path)


def test_other_encodings(tmp_path):
    for encoding in ("latin-1", "utf-16", "utf-16-le", "UTF8"):
        assert list(read_lines(write(tmp_path / "a", "é\nb\r\n", encoding), encoding)) == [(1, "é"), (2, "b")]
    with pytest.raises(ValueError, match=r"a is not ascii text: byte 0xc3 at offset 0, line 1"):
        list(read_lines(tmp_path / "a", "ascii"))
    with pytest.raises(LookupError, match="unknown encoding: utf-9"):
        list(read_lines(tmp_path / "a", "utf-9"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("one\ntwo\ncafé\n", "latin-1", r"is not UTF-8 text: byte 0xe9 at offset 11, line 3\..*iconv"),
        ("cafe", "utf-16", r"byte 0xff at offset 0, line 1\..*UTF-16"),
        ("\n\ncafe", "utf-16-be", r"byte 0x00 at offset 0, line 1\..*UTF-16"),
        (b"a\nb\n\x00", None, r"byte 0x00 at offset 4, line 3\."),
        (b"\xef\xbb\xbfab\nc\xc3", None, r"byte 0xc3 at offset 7, line 2\."),
        ("é".encode() * 9 + b"\xc3\n", None, r"byte 0xc3 at offset 18, line 1\."),
    ],
)
def test_the_first_byte_that_is_no_text_is_named_with_its_line(tmp_path, name, text, encoding, message):
    path = write(tmp_path / name, text, encoding)
    with pytest.raises(ValueError, match=re.escape(str(path)) + r" .*" + message):
        read_text(path)


def packed(text="1 line\n"):
    return gzip.compress("".join(f"{n} {text}" for n in range(3000)).encode())


@every_reader
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed()[:-9], "the gzip file is truncated or damaged after"),
        (packed()[:5], "the gzip file is truncated or damaged after 0 bytes"),
        (b"plain", "the gzip file is truncated or damaged after 0 bytes: Not a gzipped file"),
        (packed()[:200] + b"\x00" * 50 + packed()[250:], "the gzip file is truncated or damaged"),
        (gzip.compress(b"1 caf\xe9"), "is not UTF-8 text: byte 0xe9 at offset 5, line 1"),
        (None, "is not a file"),
    ],
    ids=["truncated", "header", "plain", "damaged", "latin-1", "missing"],
)
def test_every_reader_names_a_bad_file(tmp_path, reader, data, message):
    path = tmp_path / "bad.gz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FileNotFoundError if data is None else ValueError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value)


@every_reader
def test_every_reader_refuses_a_decompression_bomb(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(text_files, "ALWAYS_UNPACKED", 2**20)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"1" * (2**20 + 1)))
    with pytest.raises(ValueError, match=r"bomb\.gz unpacks to more than 1048576 bytes.*gunzip -k .*bomb\.gz"):
        reader(path)


def test_the_limit_of_gzip_files_is_a_ratio_and_unpacked_files_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "ALWAYS_UNPACKED", 100)
    for ratio, allowed in ((50, False), (2000, True)):
        monkeypatch.setattr(text_files, "UNPACKED_RATIO", ratio)
        path = write(tmp_path / "a.gz", "1" * 100_000)
        if allowed:
            assert read_text(path) == "1" * 100_000
        else:
            with pytest.raises(ValueError, match="unpacks to more than"):
                read_text(path)
    assert len(read_text(write(tmp_path / "a.txt", "1" * 100_000))) == 100_000


def test_a_bomb_is_refused_in_bounded_memory(tmp_path):
    """Not more than a piece is unpacked beyond the limit."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"1" * 2**20) * 80)  # 80 members of 1 MiB
    sizes = []
    with pytest.raises(ValueError, match="unpacks to more than 67108864 bytes"):
        sizes.extend(len(text) for text in text_chunks(path))
    assert max(sizes) <= 2**20
    assert sum(sizes) == text_files.ALWAYS_UNPACKED


def test_one_function_opens_the_text_files_of_the_package():
    folder = Path(jaxlm.data.__file__).parent
    opening = re.compile(r"\.read_text\(|(?<!\w)open\(|gzip\.|\.read_bytes\(|TextIOWrapper")
    found = {
        path.name: opening.findall(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.py")
        if path.name != "text_files.py" and opening.search(path.read_text(encoding="utf-8"))
    }
    assert found == {
        "tokens.py": ["open("],  # binary
        "docstrings.py": [".read_bytes("],  # Python source, which declares its own encoding
        "tokenizers.py": [".read_bytes("],  # kept as they are, unread
    }


def test_json_of_a_tokenizer_may_have_a_byte_order_mark(tmp_path):
    content = json.dumps({"type": "character", "characters": "ab"})
    write(tmp_path / "jaxlm_tokenizer.json", "\ufeff" + content)
    assert load_tokenizer(tmp_path).encode("ba").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ('{"a": 0, "b": 1, "c": 1}', r"vocab\.json: the tokens 'b' and 'c' have the same id 1"),
        ('{"a": 0, "b": 1, "a": 2}', r"vocab\.json: the key 'a' occurs twice"),
        ('{"a": 0, ', r"vocab\.json is not JSON"),
    ],
)
def test_a_vocabulary_with_duplicates_is_refused(tmp_path, vocab, message):
    write(tmp_path / "vocab.json", vocab)
    write(tmp_path / "merges.txt", "#version: 0.2\n")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_with_duplicate_ids_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "to": 1, "be": 1}, "unk_token": "[UNK]"}
    write(tmp_path / "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokens 'be' and 'to' have the same id 1"):
        load_tokenizer(tmp_path)

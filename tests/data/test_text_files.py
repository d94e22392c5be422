"""All readers treat byte order marks, line ends, encodings, gzip files and their size in the same way."""

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
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "TEXT.GZ"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_read_text_keeps_every_character_except_the_byte_order_mark(tmp_path, name, mark):
    text = "né\r\nŝ\t☃ 𝄞\r\r\n\n \ufeffx\n"  # the byte order mark inside the text is a character
    assert read_text(write(tmp_path / name, mark + text)) == text


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_lines_end_with_lf_or_crlf(tmp_path, name, end):
    path = write(tmp_path / name, "\ufeffé one\r\n\nb\rc\r\r\nlonger than a chunk\u2028" + end)
    assert list(read_lines(path)) == [
        (1, "é one"), (2, ""), (3, "b\rc\r"), (4, "longer than a chunk\u2028"),
    ]  # fmt: skip


def test_an_empty_file_has_no_lines_and_read_text_rejects_it(tmp_path):
    for data in (b"", "\ufeff".encode()):
        path = write(tmp_path / "a.txt", data)
        assert list(read_lines(path)) == []
        with pytest.raises(ValueError, match=r"a\.txt is empty"):
            read_text(path)


def test_lines_are_read_in_the_given_encoding(tmp_path):
    """Lines are read in a given encoding. Wrong bytes and unknown encodings are errors."""
    for encoding in ("latin-1", "utf-16", "utf-16-le", "UTF8"):
        assert list(read_lines(write(tmp_path / "a", "é\nb\r\n", encoding), encoding)) == [(1, "é"), (2, "b")]
    with pytest.raises(ValueError, match=r"a is not ascii text: byte 0xc3 at offset 0, line 1"):
        list(read_lines(tmp_path / "a", "ascii"))
    with pytest.raises(LookupError, match="unknown encoding: utf-9"):
        list(read_lines(tmp_path / "a", "utf-9"))


def test_a_file_without_a_byte_order_mark_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "cafe", "utf-16-le")
    with pytest.raises(
        ValueError, match=re.escape(f"{path} is not utf-16 text: it does not begin with a byte order mark")
    ):
        "".join(text_chunks(path, "utf-16"))


@pytest.mark.parametrize("encoding", ["rot13", "hex", "zlib", "no-such-encoding"])
def test_an_encoding_that_is_not_for_texts_raises_an_error(tmp_path, encoding):
    with pytest.raises(LookupError, match=encoding):
        "".join(text_chunks(write(tmp_path / "a.txt", "cafe"), encoding))


def test_a_zero_byte_is_invalid_in_utf_8_with_a_byte_order_mark(tmp_path):
    with pytest.raises(ValueError, match="byte 0x00 at offset 1, line 1"):
        "".join(text_chunks(write(tmp_path / "a.txt", b"a\x00"), "utf-8-sig"))


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
def test_the_error_names_the_first_invalid_byte_and_its_line(tmp_path, name, text, encoding, message):
    path = write(tmp_path / name, text, encoding)
    with pytest.raises(ValueError, match=re.escape(str(path)) + r" .*" + message):
        read_text(path)


def compressed_lines(text="1 line\n"):
    return gzip.compress("".join(f"{n} {text}" for n in range(3000)).encode())


@every_reader
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (compressed_lines()[:-9], "the gzip file is truncated or damaged after"),
        (compressed_lines()[:5], "the gzip file is truncated or damaged after 0 decompressed bytes"),
        (b"plain", "the gzip file is truncated or damaged after 0 decompressed bytes: Not a gzipped file"),
        (compressed_lines()[:200] + b"\x00" * 50 + compressed_lines()[250:], "the gzip file is truncated or damaged"),
        (gzip.compress(b"1 caf\xe9"), "is not UTF-8 text: byte 0xe9 at offset 5, line 1"),
        (None, "is not a file"),
    ],
    ids=["truncated", "header", "plain", "damaged", "latin-1", "missing"],
)
def test_every_reader_raises_an_error_with_the_path_of_a_bad_file(tmp_path, reader, data, message):
    path = tmp_path / "bad.gz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FileNotFoundError if data is None else ValueError, match=message) as error:
        reader(path)
    assert str(path) in str(error.value)


@every_reader
def test_every_reader_rejects_a_decompression_bomb(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_UNPACKED_LIMIT", 2**20)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"1" * (2**20 + 1)))
    with pytest.raises(ValueError, match=r"bomb\.gz unpacks to more than 1048576 bytes.*gunzip -k .*bomb\.gz"):
        reader(path)


def test_the_size_limit_of_gzip_files_is_a_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_UNPACKED_LIMIT", 100)
    for ratio, allowed in ((50, False), (2000, True)):
        monkeypatch.setattr(text_files, "MAX_UNPACKED_RATIO", ratio)
        path = write(tmp_path / "a.gz", "1" * 100_000)
        if allowed:
            assert read_text(path) == "1" * 100_000
        else:
            with pytest.raises(ValueError, match="unpacks to more than"):
                read_text(path)
    assert len(read_text(write(tmp_path / "a.txt", "1" * 100_000))) == 100_000


def test_a_decompression_bomb_is_rejected_with_limited_memory(tmp_path):
    """Reading stops at the limit, and each chunk has at most 1 MiB."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"1" * 2**20) * 80)  # 80 members of 1 MiB
    sizes = []
    with pytest.raises(ValueError, match="unpacks to more than 67108864 bytes"):
        sizes.extend(len(text) for text in text_chunks(path))
    assert max(sizes) <= 2**20
    assert sum(sizes) == text_files.MIN_UNPACKED_LIMIT


def test_only_text_files_opens_text_files_of_the_package():
    folder = Path(jaxlm.data.__file__).parent
    open_call = re.compile(r"\.read_text\(|(?<!\w)open\(|gzip\.|\.read_bytes\(|TextIOWrapper")
    calls = {
        path.name: open_call.findall(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.py")
        if path.name != "text_files.py" and open_call.search(path.read_text(encoding="utf-8"))
    }
    assert calls == {
        "tokens.py": ["open(", "open("],  # reads binary files
        "docstrings.py": [".read_bytes("],  # Python source, which declares its own encoding
        "tokenizers.py": [".read_bytes("],  # copies files without decoding them
    }


def test_tokenizer_json_can_have_a_byte_order_mark(tmp_path):
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
def test_a_vocabulary_with_duplicates_is_rejected(tmp_path, vocab, message):
    write(tmp_path / "vocab.json", vocab)
    write(tmp_path / "merges.txt", "#version: 0.2\n")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_with_duplicate_ids_is_rejected(tmp_path):
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "to": 1, "be": 1}, "unk_token": "[UNK]"}
    write(tmp_path / "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokens 'be' and 'to' have the same id 1"):
        load_tokenizer(tmp_path)

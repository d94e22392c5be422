"""Tests of reading and splitting pronunciation dictionaries."""

import gzip

import pytest

from jaxlm.data.pronunciations import read_pronunciations, split_pronunciations

TEXT = """;;; an old comment
data D EY1 T AH0
data(2) D AE1 T AH0 # the second one
data(3) D EY2 T AH0
'em AH0 M

a.m. EY2 EH1 M
"""


def test_pronunciations_of_a_word_are_collected(tmp_path):
    path = tmp_path / "dictionary.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert read_pronunciations(path) == {
        "data": [("D", "EY", "T", "AH"), ("D", "AE", "T", "AH")],  # without stress, two of three are equal
        "'em": [("AH", "M")],
        "a.m.": [("EY", "EH", "M")],
    }
    assert read_pronunciations(path, stress=True)["data"][2] == ("D", "EY2", "T", "AH0")


def test_a_file_may_have_another_encoding(tmp_path):
    path = tmp_path / "cmudict-0.7b"
    path.write_bytes("D\u00c9J\u00c0  D EY2 ZH AA1\n".encode("latin-1"))
    assert read_pronunciations(str(path), encoding="latin-1") == {"D\u00c9J\u00c0": [("D", "EY", "ZH", "AA")]}
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 0xc9 at offset 1, line 1"):
        read_pronunciations(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("data D\nword # text\n", "line 2: the word 'word' has no phonemes"), ("# text", "has no words")],
)
def test_bad_files_are_named(tmp_path, text, message):
    (tmp_path / "words.dict").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pronunciations(tmp_path / "words.dict")


def test_words_are_split_by_their_number():
    words = {str(number): [("A",)] for number in range(41)}
    training, validation, test = split_pronunciations(words)
    assert list(validation) == ["19", "39"]
    assert list(test) == ["17", "18", "37", "38"]
    assert sorted([*training, *validation, *test], key=int) == list(words)

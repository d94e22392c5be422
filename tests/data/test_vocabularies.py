"""Trained tokenizers: exact decoding, reproducible vocabularies, and equal results in transformers (live)."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest

from jaxlm.data import load_tokenizer, shakespeare, train_tokenizer
from jaxlm.data.vocabularies import Kind, TemplateName

TEXTS = shakespeare()[:60_000].split("\n")
KINDS: tuple[Any, ...] = get_args(Kind)
TEMPLATES: tuple[Any, ...] = get_args(TemplateName)
UNUSUAL_TEXTS = ["", " ", "  two  spaces\n\n", "é\n\nü ☃ 日本", " a ", "\ttab", "don't", "\x00\u200b", "</ s>"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subwords_decode_any_text_exactly(kind):
    tokenizer = train_tokenizer(TEXTS, kind, 500)
    assert tokenizer.vocab_size == 500
    for text in [*TEXTS[:50], *UNUSUAL_TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    word, text_with_word = tokenizer.encode("all"), tokenizer.encode("for all")
    assert text_with_word.tolist()[-len(word) :] == word.tolist()
    assert len(tokenizer.encode(" ".join(TEXTS))) < 0.6 * len(" ".join(TEXTS))


def test_offsets_of_subwords_refer_to_the_original_text():
    tokenizer = train_tokenizer(TEXTS, "bpe", 500)
    text, pair = "FirstCitizen", "éspeak"
    encoding = tokenizer.encode_inputs(text, pair)
    for number, original in enumerate((text, pair)):
        spans = encoding.offsets[encoding.sequence_ids == number]
        assert spans[0, 0] == 0
        covered = {position for start, stop in spans for position in range(start, stop)}
        assert covered == set(range(len(original)))
    word_tokenizer = train_tokenizer(["Citizen of"] * 9, "bpe", 300)
    # The second offset does not include the space.
    assert word_tokenizer.encode_inputs("Citizen of").offsets.tolist() == [[0, 7], [8, 10]]


def test_offsets_exclude_exactly_the_spaces_of_the_text(tmp_path):
    """The package ``tokenizers`` gives wrong offsets after a special token, and if a text begins with a space."""
    train_tokenizer(["to be or not to be", "\n\nbe"] * 5, "bpe", 300, template="cls_sep").save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text, tokens in [
        ("to[SEP]be", ["to", "[SEP]", "be"]),
        ("to [SEP] be", ["to", "", "[SEP]", "", "be"]),
        (" to be", ["", "to", "be"]),
        ("[SEP]é be", ["[SEP]", "", "é", "é", "be"]),  # two bytes of é
        ("[SEP]\n\nbe", ["[SEP]", "\n", "\n", "be"]),  # the first line break and the added space are one token
    ]:
        encoding = tokenizer.encode_inputs("be", text)
        spans = encoding.offsets[encoding.sequence_ids == 1]
        assert [text[start:stop] for start, stop in spans] == tokens


def test_lowercase_changes_only_the_case():
    for kind in ("bpe", "unigram"):
        tokenizer = train_tokenizer(TEXTS, kind, 400, lowercase=True)
        assert tokenizer.decode(tokenizer.encode("  First CITIZEN\n")) == "  first citizen\n"


def test_word_tokenizer():
    """Rare words become the unknown token; ids are sorted by frequency."""
    tokenizer = train_tokenizer(["to be or not to be", "to  be\nTo rare"], "word", 100, min_frequency=2)
    assert tokenizer.vocab_size == 3 + 2
    assert tokenizer.decode(tokenizer.encode(" to\nbe   rare To")) == "to be <unk> <unk>"
    lower = train_tokenizer(["to be or not to be", "to  be\nTo rare"], "word", 5, lowercase=True)
    assert lower.encode("To be").tolist() == [3, 4]  # the most frequent first
    assert lower.encode("rare").tolist() == [lower.special_ids.unk]


def test_character_tokenizer():
    """White space is kept, and unknown characters become the unknown token."""
    tokenizer = train_tokenizer(["ab\n a", "b c"], "character", 7)
    assert tokenizer.decode(tokenizer.encode("b a\na ab")) == "b a\na ab"
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode(tokenizer.encode("a☃")) == "a<unk>"
    assert tokenizer.encode_inputs("ab").offsets.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_equal_vocabularies(kind):
    first, second = (train_tokenizer(iter(TEXTS[:800]), kind, 400, template="eos") for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()


@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_have_the_first_ids_followed_by_extra_tokens(template):
    tokenizer = train_tokenizer(TEXTS[:100], "word", 60, template=template, extra_tokens=["<extra_id_0>", "<b>"])
    ids = {i for i in vars(tokenizer.special_ids).values() if i is not None}
    assert ids == set(range(len(ids)))
    assert tokenizer.encode("<extra_id_0> <b>").tolist() == [len(ids), len(ids) + 1]
    # RoBERTa's position ids need pad_id=1. T5 starts targets with id 0.
    assert tokenizer.special_ids.pad == {"none": 0, "eos": 0, "bos_eos": 1, "cls_sep": 0, "sep_cls": 5}[template]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_texts_keep_their_ids(kind):
    tokenizer = train_tokenizer(["the cat <unk> sat on </s> mat", "a<pad>b c"] * 3, kind, 400, template="eos")
    assert (tokenizer.special_ids.pad, tokenizer.special_ids.eos, tokenizer.special_ids.unk) == (0, 1, 2)
    vocab = tokenizer.backend.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert tokenizer.encode("a</s>b").tolist().count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_tokenizer_equals_the_saved_one(kind, tmp_path):
    tokenizer = train_tokenizer(TEXTS[:500], kind, 300, template="cls_sep", lowercase=True, extra_tokens=["<b>"])
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_ids == tokenizer.special_ids
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    for text in [*TEXTS[:20], *UNUSUAL_TEXTS, "a <b> [SEP]"]:
        ids = tokenizer.encode_inputs(text, "to be").ids
        assert loaded.encode_inputs(text, "to be").ids.tolist() == ids.tolist()
        assert loaded.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "wordpiece"}, ValueError, "kind='wordpiece' is unknown: choose from bpe, unigram, word, character"),
        ({"template": "t5"}, ValueError, "template='t5' is unknown: choose from none, eos, "),
        ({"vocab_size": 258}, ValueError, "vocab_size=258 is too small: 3 special tokens and at least 256 bytes need"),
        ({"vocab_size": 3, "kind": "word"}, ValueError, "at least 1 entry need 4"),
        ({"texts": "one text"}, TypeError, "texts must be an iterable of strings, got one string"),
        ({"texts": ["a", 3]}, TypeError, "text 1 must be a string, got int: 3"),
        ({"texts": ["a", "b\ud800"]}, ValueError, "character 1 of text 1, .* is a surrogate"),
        ({"texts": []}, ValueError, "no texts to train a tokenizer on"),
        ({"texts": ["", " "], "kind": "unigram"}, ValueError, "all texts have only white space and special tokens"),
        ({"extra_tokens": "<b>"}, TypeError, r"got one string: pass \['<b>'\]"),
        ({"extra_tokens": ["<b>", ""]}, ValueError, r"extra_tokens=\['<b>', ''\] has an empty string: remove it"),
        ({"min_frequency": 0}, ValueError, "min_frequency=0 must be at least 1"),
        ({"min_frequency": 2, "kind": "unigram"}, ValueError, "min_frequency=2 has no effect for kind='unigram'"),
    ],
)
def test_invalid_arguments_raise_errors(changes, error, message):
    request = {"texts": ["to be"], "kind": "bpe", "vocab_size": 300, **changes}
    with pytest.raises(error, match=message):
        train_tokenizer(request.pop("texts"), request.pop("kind"), request.pop("vocab_size"), **request)


def test_a_missing_package_raises_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tokenizers\]' in"):
        train_tokenizer(["a"], "word", 10)


@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_loads_an_equal_tokenizer(kind, template, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(
        TEXTS[:1000], kind, 300, template=template, lowercase=kind == "word", extra_tokens=["<b>"]
    )
    tokenizer.save(tmp_path)
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(hf_tokenizer).__name__ == "PreTrainedTokenizerFast"
    assert len(hf_tokenizer) == tokenizer.vocab_size
    assert {role: getattr(hf_tokenizer, f"{role}_token_id") for role in vars(tokenizer.special_ids)} == vars(
        tokenizer.special_ids
    )
    for texts in [("Before we <b> proceed  any\nfurther é",), ("hear me</s> speak .", "[MASK] n't")]:
        encoding, reference = tokenizer.encode_inputs(*texts), hf_tokenizer(*texts, return_offsets_mapping=True)
        assert encoding.ids.tolist() == reference["input_ids"]
        assert encoding.offsets.tolist() == [list(span) for span in reference["offset_mapping"]]
        if template.startswith(("cls", "sep")):
            assert encoding.token_types.tolist() == reference["token_type_ids"]
        else:  # T5 and Llama have no token types
            assert "token_type_ids" not in reference
        for skip in (False, True):
            expected = hf_tokenizer.decode(reference["input_ids"], skip_special_tokens=skip)
            assert tokenizer.decode(encoding.ids, skip_special_tokens=skip) == expected

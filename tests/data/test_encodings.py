"""Inputs of a model: templates, truncation and windows. Offsets must select the right substrings of the texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxlm.data import ByteTokenizer, CharTokenizer, PretrainedTokenizer, SpecialIds, load_tokenizer, train_tokenizer
from jaxlm.data.tokenizers import encode_truncated

TEXT = "It was the best of times, it was the worst of times."
WORDS = TEXT.replace(",", "").replace(".", "").split()


def word_tokenizer(template: str = "cls_sep") -> PretrainedTokenizer:
    return train_tokenizer([" ".join(WORDS), "who is it"], "word", 50, template=template)  # type: ignore[arg-type]


def token_texts(encoding, texts) -> list[list[str]]:
    """Return a list for each text: the substring of each of its tokens."""
    return [
        [
            text[start:stop]
            for (start, stop), text_index in zip(encoding.offsets, encoding.sequence_ids, strict=True)
            if text_index == number
        ]
        for number, text in enumerate(texts)
    ]


def test_byte_and_char_encodings_have_no_special_tokens():
    encoding = ByteTokenizer().encode_inputs("aé", "b")
    assert encoding.ids.tolist() == [97, 195, 169, 98]
    assert encoding.sequence_ids.tolist() == encoding.token_types.tolist() == [0, 0, 0, 1]
    assert encoding.offsets.tolist() == [[0, 1], [1, 2], [1, 2], [0, 1]]
    encoding = CharTokenizer("abc").encode_inputs("ab", "c")
    assert encoding.ids.tolist() == [0, 1, 2]
    assert encoding.offsets.tolist() == [[0, 1], [1, 2], [0, 1]]
    assert CharTokenizer("abc").encode_inputs("").offsets.shape == (0, 2)
    assert (ByteTokenizer().special_ids, CharTokenizer("a").special_ids) == (SpecialIds(eos=256), SpecialIds())


@pytest.mark.parametrize("template", ["none", "eos", "cls_sep"])
def test_special_tokens_are_not_text(template):
    tokenizer = word_tokenizer(template)
    texts, pairs = ["who", "who", "", " ", " "], ["", "it", "it", "", "\t"]
    assert [encoding.has_text for encoding in tokenizer.encode_inputs_batch(texts)] == [True, True, False, False, False]
    has_text = [encoding.has_text for encoding in tokenizer.encode_inputs_batch(texts, pairs)]
    assert has_text == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("template", "expected", "types"),
    [
        ("none", "who is it it was", [0, 0, 0, 1, 1]),
        ("eos", "who is it </s> it was </s>", [0] * 7),
        ("bos_eos", "<s> who is it </s> </s> it was </s>", [0] * 9),
        ("cls_sep", "[CLS] who is it [SEP] it was [SEP]", [0, 0, 0, 0, 0, 1, 1, 1]),
        ("sep_cls", "who is it <sep> it was <sep> <cls>", [0, 0, 0, 0, 1, 1, 1, 2]),
    ],
)
def test_templates_add_special_tokens_and_token_types(template, expected, types):
    tokenizer = word_tokenizer(template)
    encoding = tokenizer.encode_inputs("who is it", "it was")
    assert tokenizer.decode(encoding.ids) == expected
    assert encoding.token_types.tolist() == types
    assert token_texts(encoding, ["who is it", "it was"]) == [["who", "is", "it"], ["it", "was"]]
    assert not encoding.offsets[encoding.sequence_ids == -1].any()
    assert all(field.dtype == np.int32 for field in encoding)
    (batched,) = tokenizer.encode_inputs_batch(["who is it"], ["it was"])
    for expected_field, field in zip(encoding, batched, strict=True):
        np.testing.assert_array_equal(expected_field, field)


def test_max_length_truncates_the_longer_text_first():
    tokenizer = word_tokenizer()
    lengths = {}
    for max_length in range(5, 16):
        encoding = tokenizer.encode_inputs("who is it", "it was the best of times it was", max_length=max_length)
        first, second = (int(np.sum(encoding.sequence_ids == number)) for number in (0, 1))
        assert len(encoding.ids) == min(max_length, 14)
        lengths[max_length] = (first, second)
    assert lengths[15] == lengths[14] == (3, 8)
    assert [lengths[n] for n in (10, 9, 8, 7, 5)] == [(3, 4), (3, 3), (2, 3), (2, 2), (1, 1)]
    swapped_texts = tokenizer.encode_inputs("it was the best of times it was", "who is it", max_length=8)
    assert [int(np.sum(swapped_texts.sequence_ids == number)) for number in (0, 1)] == [3, 2]
    assert tokenizer.decode(tokenizer.encode_inputs("who is it", max_length=4).ids) == "[CLS] who is [SEP]"
    with pytest.raises(ValueError, match="max_length=4 is too short: 3 special tokens leave room for 1 tokens of two"):
        tokenizer.encode_inputs("who is it", "it was", max_length=4)
    with pytest.raises(ValueError, match="max_length=0 is too short"):
        ByteTokenizer().encode_inputs("a", max_length=0)


def set_truncation_side(directory: Path, side: object) -> None:
    """Change ``truncation_side`` in ``tokenizer_config.json``."""
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": side}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_equals_that_of_the_tokenizers_package(side, tmp_path):
    word_tokenizer().save(tmp_path)
    set_truncation_side(tmp_path, side)
    load_tokenizer(tmp_path).save(tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    for first, second in [(1, 9), (4, 5), (5, 4), (9, 1), (6, 6), (3, 8)]:
        texts = (" ".join(WORDS[:first]), " ".join(WORDS[:second]))
        for max_length in range(6, 16):
            backend.enable_truncation(max_length, strategy="longest_first", direction=side)
            for row in (texts, texts[:1]):
                expected = backend.encode(*row)
                actual = tokenizer.encode_inputs(*row, max_length=max_length)
                assert (actual.ids.tolist(), actual.token_types.tolist()) == (expected.ids, expected.type_ids)


def test_texts_for_training_are_truncated_from_the_side_in_the_files(tmp_path, caplog):
    word_tokenizer().save(tmp_path)
    set_truncation_side(tmp_path, "left")
    tokenizer = load_tokenizer(tmp_path)
    texts = ["who is it", "is it the best of times", "it"]
    encodings = encode_truncated(tokenizer, texts, None, 5, "texts of a.txt")
    assert [tokenizer.decode(encoding.ids[1:-1]) for encoding in encodings] == ["who is it", "best of times", "it"]
    pairs = ["it was", "it was the best", "it"]
    encodings = encode_truncated(tokenizer, texts, pairs, 8, "texts of a.txt")
    assert [tokenizer.decode(encoding.ids[1:-1]) for encoding in encodings] == [
        "who is it [SEP] it was", "best of times [SEP] the best", "it [SEP] it",
    ]  # fmt: skip
    assert caplog.messages == [f"1 of 3 texts of a.txt are truncated to {limit} tokens" for limit in (5, 8)]
    set_truncation_side(tmp_path, "start")
    with pytest.raises(ValueError, match="tokenizer_config.json: truncation_side='start' must be 'right' or 'left'"):
        load_tokenizer(tmp_path)


@pytest.mark.live
@pytest.mark.parametrize(("setting", "direction"), [(None, "left"), ("left", "right"), ("right", "left"), (None, None)])
def test_the_truncation_side_equals_that_of_transformers(setting, direction, tmp_path):
    from transformers import AutoTokenizer

    word_tokenizer().save(tmp_path)
    if setting is not None:
        set_truncation_side(tmp_path, setting)
    if direction is not None:
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.enable_truncation(9, direction=direction)
        backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for texts in [(" ".join(WORDS),), (" ".join(WORDS), "who is it"), ("who is it", " ".join(WORDS))]:
        expected = reference(*texts, truncation=True, max_length=8)["input_ids"]
        assert tokenizer.encode_inputs(*texts, max_length=8).ids.tolist() == expected


@pytest.mark.parametrize("template", ["none", "eos", "bos_eos", "cls_sep", "sep_cls"])
@pytest.mark.parametrize("stride", [0, 2])
def test_windows_cover_the_context_and_overlap_by_stride(template, stride):
    tokenizer = word_tokenizer(template)
    question, context = "who is it", " ".join(WORDS)
    untruncated = tokenizer.encode_inputs(question, context)
    max_length = len(untruncated.ids) - len(WORDS) + 5
    windows = tokenizer.encode_windows(question, context, max_length=max_length, stride=stride)
    texts_of_windows = [token_texts(window, [question, context]) for window in windows]
    assert all(question_tokens == question.split() for question_tokens, _ in texts_of_windows)
    assert [len(context_tokens) for _, context_tokens in texts_of_windows[:-1]] == [5] * (len(windows) - 1)
    for (_, context_tokens), (_, next_tokens) in zip(texts_of_windows[:-1], texts_of_windows[1:], strict=True):
        assert context_tokens[5 - stride :] == next_tokens[:stride]
        assert len(next_tokens) > stride
    assert (
        texts_of_windows[0][1]
        + [word for _, context_tokens in texts_of_windows[1:] for word in context_tokens[stride:]]
        == WORDS
    )
    (single_window,) = tokenizer.encode_windows(question, context, max_length=len(untruncated.ids), stride=stride)
    assert len(single_window.ids) == len(untruncated.ids)


def test_the_context_is_first_if_the_cls_token_is_last():
    windows = word_tokenizer("sep_cls").encode_windows("who is it", "it was the best", max_length=8, stride=1)
    assert [word_tokenizer("sep_cls").decode(window.ids) for window in windows] == [
        "it was <sep> who is it <sep> <cls>",
        "was the <sep> who is it <sep> <cls>",
        "the best <sep> who is it <sep> <cls>",
    ]
    assert windows[0].sequence_ids.tolist() == [1, 1, -1, 0, 0, 0, -1, -1]
    assert windows[0].token_types.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]


def test_impossible_windows_raise_errors():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="leaves 2 tokens for the context beside 6 tokens .* more than stride=2"):
        tokenizer.encode_windows("who is it", TEXT, max_length=8, stride=2)
    with pytest.raises(ValueError, match="stride=-1 must be at least 0"):
        tokenizer.encode_windows("who is it", TEXT, max_length=9, stride=-1)
    with pytest.raises(ValueError, match="the question has no tokens: ' '"):
        tokenizer.encode_windows(" ", TEXT, max_length=9, stride=1)
    with pytest.raises(ValueError, match="the context has no tokens: ''"):
        tokenizer.encode_windows("who", "", max_length=9, stride=1)


def test_invalid_batches_of_texts_raise_errors():
    tokenizer = ByteTokenizer()
    with pytest.raises(TypeError, match=r"texts must be a sequence of strings, got one string: pass \['ab'\]"):
        tokenizer.encode_inputs_batch("ab")
    with pytest.raises(TypeError, match=r"pairs\[1\] must be a string, got int: 3"):
        tokenizer.encode_inputs_batch(["a", "b"], ["c", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got 2 texts and 1 pairs"):
        tokenizer.encode_inputs_batch(["a", "b"], ["c"])
    assert tokenizer.encode_inputs_batch([]) == []


def save_tokenizer(directory: Path, **files: dict) -> PretrainedTokenizer:
    """Write a tokenizer.json of words with RoBERTa's template, and further files. Return the loaded tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<x>", "to", "be"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<x>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return PretrainedTokenizer.from_directory(directory)


def test_special_ids_are_read_from_template_config_and_tokenizer_files(tmp_path):
    # Without other files, the ids come from the template and from well-known token names.
    assert save_tokenizer(tmp_path).special_ids == SpecialIds(pad=1, unk=3, bos=0, eos=2, cls=0, sep=2, mask=4)
    # config.json has priority, except for the ids 6 (not a special token) and 900 (not in the vocabulary).
    config = {"bos_token_id": 5, "eos_token_id": [5, 2], "pad_token_id": 6, "mask_token_id": 900}
    assert save_tokenizer(tmp_path, config=config).special_ids == SpecialIds(1, 3, bos=5, eos=5, cls=0, sep=2, mask=4)
    names = {"bos_token": "</s>", "mask_token": {"content": "<x>"}}
    ids = save_tokenizer(tmp_path, special_tokens_map=names).special_ids
    assert ids == SpecialIds(1, 3, bos=2, eos=5, cls=0, sep=2, mask=5)
    tokenizer = save_tokenizer(tmp_path, tokenizer_config={"bos_token": "<unk>", "pad_token": None, "extra": [1]})
    assert tokenizer.special_ids == SpecialIds(None, 3, bos=2, eos=5, cls=0, sep=2, mask=5)
    assert tokenizer.end_id == 5


def test_all_files_of_a_tokenizer_are_copied_unchanged(tmp_path):
    token = {"content": "<s>", "lstrip": True}
    config = {"tokenizer_class": "RobertaTokenizer", "bos_token": token, "add_prefix_space": True, "other": 5}
    save_tokenizer(tmp_path, tokenizer_config=config)
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens":   ["<x>"]}')
    (tmp_path / "merges.txt").write_text("x")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_padding(length=4, pad_id=1, pad_token="<pad>")
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "weights").write_text("not of the tokenizer")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "out")
    tokenizer.save(tmp_path / "out")
    original_files = {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "weights"
    }
    saved_files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert json.loads(saved_files.pop("tokenizer.json")) == json.loads(original_files.pop("tokenizer.json"))
    assert saved_files == original_files
    assert tokenizer.encode_inputs("to be to be to").ids.tolist() == [0, 6, 7, 6, 7, 6, 2]


def test_invalid_special_tokens_are_rejected():
    backend = word_tokenizer().backend
    with pytest.raises(ValueError, match="'start' is not a role of special tokens: choose from pad, unk, "):
        PretrainedTokenizer(backend, {"start": "[CLS]"})
    with pytest.raises(ValueError, match="pad token '<none>' is not in the vocabulary"):
        PretrainedTokenizer(backend, {"pad": "<none>"})
    assert PretrainedTokenizer(backend, {"pad": None}).special_ids.pad is None


def test_decode_can_skip_special_tokens():
    ids = word_tokenizer().encode_inputs("it was").ids
    assert word_tokenizer().decode(ids) == "[CLS] it was [SEP]"
    assert word_tokenizer().decode(ids, skip_special_tokens=True) == "it was"
    assert ByteTokenizer().decode([97, 256], skip_special_tokens=True) == "a"
    assert CharTokenizer("ab").decode([0, 1], skip_special_tokens=True) == "ab"

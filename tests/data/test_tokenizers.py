"""Tokenizers: encoding and decoding, saving and loading, and errors."""

import json
import sys

import numpy as np
import pytest
import tokenizers

from jaxlm.data import ByteTokenizer, CharTokenizer, PretrainedTokenizer, load_tokenizer

END = "<|endoftext|>"


def random_texts(count=50):
    """Return texts of random characters except surrogates, which UTF-8 cannot encode."""
    rng = np.random.default_rng(0)
    points = rng.integers(0, 0x110000 - 0x800, (count, 40))
    return ["".join(chr(p if p < 0xD800 else p + 0x800) for p in row) for row in points]


def byte_level_files(directory):
    """Write GPT-2 style vocab.json and merges.txt with 256 bytes, two merges and an end token. Return the tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "Ġhe", END]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    return tokens


def words_file(directory, **special):
    """Write a tokenizer.json with one id per word. Return the backend."""
    vocabulary = {"[UNK]": 0, "to": 1, "be": 2, **special}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(directory / "tokenizer.json"))
    return backend


def test_a_surrogate_has_no_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"character 1 of the text, '\\ud800', is a surrogate"):
        ByteTokenizer().encode_inputs("a\ud800")
    words_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"character 1 of the text, '\\ud800', is a surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=r"character 0 of pairs\[1\], '\\ud800', is a surrogate"):
        tokenizer.encode_inputs_batch(["a", "a"], ["a", "\ud800"])


def test_byte_tokenizer_decodes_any_text():
    tokenizer = ByteTokenizer()
    for text in ["", "To be", *random_texts()]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == list(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text


def test_byte_decode_replaces_incomplete_characters_and_removes_end_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0x61, 0xC3]) == "a\ufffd"
    assert tokenizer.decode([0x61, tokenizer.end_id, 0x62]) == "ab"
    assert tokenizer.vocab_size == tokenizer.end_id + 1 == 257


def test_char_tokenizer_decodes_any_text():
    for text in ["To be", *random_texts()]:
        tokenizer = CharTokenizer.from_text(text)
        ids = tokenizer.encode(text)
        assert tokenizer.vocab_size == len(set(text))
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
    assert CharTokenizer.from_text("banana").characters == "abn"
    assert CharTokenizer.from_text("a").encode("").shape == (0,)


def test_the_order_of_characters_is_the_order_of_ids():
    tokenizer = CharTokenizer("zax")
    assert tokenizer.encode("axz").tolist() == [1, 2, 0]
    assert tokenizer.decode([0, 1, 2]) == "zax"


@pytest.mark.parametrize("unknown", ["b", "~", "\0", "☃"])  # between, above and below the known characters
def test_an_unknown_character_raises_an_error(unknown):
    with pytest.raises(ValueError, match=r"\(U\+[0-9A-F]{4}\) at position 2 is not among the 2 characters") as error:
        CharTokenizer("ac").encode("ac" + unknown)
    assert repr(unknown) in str(error.value)


def test_invalid_character_sets_are_rejected():
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer.from_text("")
    with pytest.raises(ValueError, match="'a' more than once"):
        CharTokenizer("aba")
    with pytest.raises(ValueError, match=r"character 0 of the characters, '\\ud83d', is a surrogate"):
        CharTokenizer("\ud83d\ude00")  # in a file, the two would become one character


@pytest.mark.parametrize("bad", [-1, 257, 70000])
def test_decode_rejects_an_id_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=f"id {bad} at position 1 is outside the vocabulary of 257 ids"):
        ByteTokenizer().decode([0, bad])
    with pytest.raises(ValueError, match=f"id {bad} at position 0 is outside the vocabulary of 2 ids"):
        CharTokenizer("ab").decode(np.asarray([bad]))


def test_decode_accepts_only_1d_integers():
    with pytest.raises(ValueError, match=r"float64\[2\]"):
        ByteTokenizer().decode([0.5, 1.0])
    with pytest.raises(ValueError, match=r"int64\[1, 2\]"):
        ByteTokenizer().decode(np.asarray([[1, 2]], np.int64))
    assert ByteTokenizer().decode([]) == ""


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer('a"\\☃\n')])
def test_loaded_built_in_tokenizers_equal_the_saved_ones(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new") == tokenizer


def test_vocab_and_merges_are_loaded_as_byte_level_bpe(tmp_path):
    tokens = byte_level_files(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.end_id == len(tokens) - 1
    ids = tokenizer.encode("he he é" + END)
    assert ids.dtype == np.int32
    assert [tokens[i] for i in ids] == ["he", "Ġhe", "Ġ", "Ã", "©", END]
    for text in ["  two  spaces\n\n", *random_texts(10)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match=f"id {len(tokens)} at position 0"):
        tokenizer.decode([len(tokens)])


def test_a_tokenizer_json_is_loaded(tmp_path):
    words_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (3, None)
    assert tokenizer.encode("to be or").tolist() == [1, 2, 0]


def test_the_vocabulary_size_covers_gaps_between_ids(tmp_path):
    words_file(tmp_path, far=9)
    assert load_tokenizer(tmp_path).vocab_size == 10


def test_padding_and_truncation_in_tokenizer_json_are_ignored(tmp_path):
    backend = words_file(tmp_path)
    backend.enable_padding(length=4)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("to be to be to").tolist() == [1, 2, 1, 2, 1]
    assert load_tokenizer(tmp_path).encode("to").tolist() == [1]


@pytest.mark.parametrize("eos", ["be", {"content": "be"}])
def test_the_end_token_is_read_from_tokenizer_config(tmp_path, eos):
    words_file(tmp_path, **{END: 3})
    assert load_tokenizer(tmp_path).end_id == 3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path).end_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nowhere"}))
    with pytest.raises(ValueError, match="end token 'nowhere' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_a_special_token_of_the_wrong_type_is_named(tmp_path):
    words_file(tmp_path, **{END: 3})
    for token in (3, {}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        with pytest.raises(ValueError, match=rf"tokenizer_config.json: eos_token={token!r} must be a string"):
            load_tokenizer(tmp_path)


def test_loaded_pretrained_tokenizers_equal_the_saved_ones(tmp_path):
    byte_level_files(tmp_path)
    tokenizer = PretrainedTokenizer(PretrainedTokenizer.from_directory(tmp_path).backend, {"eos": "he"})
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    assert loaded.encode(" he is é").tolist() == tokenizer.encode(" he is é").tolist()
    # END is in the vocabulary, but the tokenizer has no end token.
    PretrainedTokenizer(tokenizer.backend, {"eos": None}).save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").end_id is None


@pytest.mark.parametrize(
    ("config", "eos", "bos"), [({"eos_token_id": 1}, 1, None), ({"eos_token_id": 0, "bos_token_id": 0}, 0, 0)]
)
def test_special_tokens_of_config_json_are_saved(tmp_path, config, eos, bos):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({END: 0, "<|im_end|>": 1, "to": 2}, unk_token=END))
    backend.add_special_tokens([END, "<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.end_id, tokenizer.special_ids.bos) == (eos, bos)
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert (loaded.end_id, loaded.special_ids) == (eos, tokenizer.special_ids)
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["model_max_length"] == 1024


def bpe_backend(**components):
    """A BPE backend without merges. No token is an added token."""
    tokens = ["<s>", "</s>", "[UNK]", "a", "b", "A", "Ġa", "Ġ", "<", "x", ">", "/", "s"]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [("Ġ", "a")], unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    for name, component in components.items():
        setattr(backend, name, component)
    return backend


def test_special_tokens_are_not_split():
    tokenizer = PretrainedTokenizer(bpe_backend(), {"eos": "</s>"})
    assert tokenizer.encode("a</s>b").tolist() == [3, 1, 4]
    assert tokenizer.decode([3, 1, 4], skip_special_tokens=True).split() == ["a", "b"]
    # The options of an added token stay.
    backend = bpe_backend()
    backend.add_tokens([tokenizers.AddedToken("</s>", lstrip=True)])
    assert PretrainedTokenizer(backend, {"eos": "</s>"}).encode("a  </s>b").tolist() == [3, 1, 4]


def test_special_tokens_map_overrides_tokenizer_config_without_added_tokens_decoder(tmp_path):
    """As in transformers."""
    bpe_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "a", "pad_token": "b"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert load_tokenizer(tmp_path).special_tokens["eos"] == "a"
    # The tokens of the constructor are saved where a reader finds them.
    files = {name: (tmp_path / name).read_bytes() for name in ("special_tokens_map.json", "tokenizer_config.json")}
    PretrainedTokenizer(bpe_backend(), {"eos": "A"}, files=files).save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").special_tokens["eos"] == "A"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b", "added_tokens_decoder": {}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_tokens["eos"], tokenizer.special_ids.pad) == ("b", None)


def test_additional_special_tokens_of_two_files_are_all_added(tmp_path):
    bpe_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"additional_special_tokens": ["<x>"]}')
    for tokens in ([], ["<y>"]):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": tokens}))
        assert load_tokenizer(tmp_path).encode("<x><y>")[0] == 13
    assert load_tokenizer(tmp_path).encode("<x><y>").tolist() == [13, 14]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<x>": 13, "<y>": 13}, "the tokens '<x>' and '<y>' have the same id 13"),
        ({"<x>": [13]}, r"\[13\] must be the id of a token, an integer"),
    ],
)
def test_bad_ids_in_added_tokens_json_raise_errors(tmp_path, tokens, message):
    bpe_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=rf"added_tokens\.json: {message}"):
        load_tokenizer(tmp_path)


BYTE_LEVEL, BERT_NORMALIZER = tokenizers.pre_tokenizers.ByteLevel, tokenizers.normalizers.BertNormalizer
BOS_TEMPLATE = tokenizers.processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
SETTINGS = [  # components of tokenizer.json, tokenizer_config.json, text, ids
    ({}, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, "ab", [0, 3, 4, 1]),
    ({"post_processor": BOS_TEMPLATE}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "ab", [3, 4]),
    ({}, {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>"}, "ab", [0, 3, 4]),
    ({}, {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}, "ab", [0, 3, 4]),
    ({"pre_tokenizer": BYTE_LEVEL(False)}, {"add_prefix_space": True}, "ab", [6, 4]),
    ({"pre_tokenizer": BYTE_LEVEL(True)}, {"add_prefix_space": False}, "ab", [3, 4]),
    ({"normalizer": BERT_NORMALIZER()}, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}, "A", [5]),
    ({"normalizer": BERT_NORMALIZER()}, {"do_lower_case": False}, "A", [3]),  # not a setting of this class
    ({}, {"added_tokens_decoder": {"13": {"content": "<x>"}}}, "a<x>b", [3, 13, 4]),
    ({}, {"additional_special_tokens": ["<x>"]}, "a<x>b", [3, 13, 4]),
    ({}, {"split_special_tokens": True}, "<s>", [8, 12, 10]),
]


def settings_files(directory, components, config):
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    bpe_backend(**components).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "[UNK]"}))


@pytest.mark.parametrize(("components", "config", "text", "ids"), SETTINGS)
def test_settings_override_tokenizer_json(tmp_path, components, config, text, ids):
    settings_files(tmp_path, components, config)
    load_tokenizer(tmp_path).save(tmp_path / "new")
    for directory in (tmp_path, tmp_path / "new"):
        assert load_tokenizer(directory).encode_inputs(text).ids.tolist() == ids


@pytest.mark.live
@pytest.mark.parametrize(("components", "config", "text", "ids"), SETTINGS)
def test_settings_have_the_same_effect_in_transformers(tmp_path, components, config, text, ids):
    from transformers import AutoTokenizer

    settings_files(tmp_path, components, config)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize(
    ("components", "config", "message"),
    [
        ({}, {"add_prefix_space": "yes"}, "tokenizer_config.json: add_prefix_space='yes' must be true, false or null"),
        (
            {"pre_tokenizer": BYTE_LEVEL(True)},
            {},
            "has no add_prefix_space, so transformers would use False: write add_",
        ),
        (
            {"normalizer": tokenizers.normalizers.Prepend("▁")},
            {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
            "add_prefix_space=False, but tokenizer.json adds a space before a text: write tokenizer.json again",
        ),
        (
            {},
            {"tokenizer_class": "LlamaTokenizer", "bos_token": None},
            "no such token: set bos_token, or add_bos_token",
        ),
        ({}, {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "'x' must be the id of a token, an integer"),
        ({}, {"added_tokens_decoder": {"13": {"content": "<x>", "lstrip": 1}}}, "lstrip=1 of the token '<x>' must be"),
        ({}, {"additional_special_tokens": [None]}, "the token None must be a string"),
    ],
)
def test_settings_without_a_possible_effect_raise_errors(tmp_path, components, config, message):
    settings_files(tmp_path, components, config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.live
def test_models_without_a_tokenizer_class_have_the_class_of_transformers():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from jaxlm.data import tokenizer_files as module
    from jaxlm.interop.formats import of
    from jaxlm.models.registry import FAMILIES

    special_classes = {*module._ADD_BOS_TOKEN, *module._BERT_CLASSES, *module._ROBERTA_CLASSES, "T5Tokenizer"}
    model_types = {table.model_type for family in FAMILIES for table in of(family)} & TOKENIZER_MAPPING_NAMES.keys()
    classes = {name: TOKENIZER_MAPPING_NAMES[name][1] for name in model_types}
    classes = {name: (fast or "").removesuffix("Fast") for name, fast in classes.items()}
    assert {name: c for name, c in classes.items() if c in special_classes} == module._CLASS_OF_MODEL


def prefix_space_tokenizer():
    """A tokenizer whose pre-tokenizer adds a space, which transformers does not do by default."""
    return PretrainedTokenizer(bpe_backend(pre_tokenizer=BYTE_LEVEL()))


def test_settings_of_the_backend_are_saved(tmp_path):
    tokenizer = prefix_space_tokenizer()
    tokenizer.backend.encode_special_tokens = True
    tokenizer.save(tmp_path)
    assert tokenizer.encode("ab<s>").tolist() == load_tokenizer(tmp_path).encode("ab<s>").tolist() == [6, 4, 8, 12, 10]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["add_prefix_space"], config["split_special_tokens"]) == (True, True)


@pytest.mark.live
def test_transformers_adds_the_same_space_before_a_text(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = prefix_space_tokenizer()
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == tokenizer.encode("ab").tolist() == [6, 4]


NO_TYPES = ["input_ids", "attention_mask"]
TEMPLATES = {  # name -> processor, model_input_names and padding_side of transformers
    "gpt2": (tokenizers.processors.ByteLevel(trim_offsets=False), NO_TYPES, None),
    "roberta": (tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), NO_TYPES, None),
    "bert": (tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), None, None),
    "llama": (
        tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
        ),
        NO_TYPES,
        None,
    ),
    "xlnet": (
        tokenizers.processors.TemplateProcessing(
            single="$A </s> [CLS]:2",
            pair="$A </s> $B:1 </s>:1 [CLS]:2",
            special_tokens=[("</s>", 1), ("[CLS]", 2)],
        ),
        None,
        "left",
    ),
}


def template_files(directory, name, config=None):
    """Write ``tokenizer.json`` with a template, and ``tokenizer_config.json`` with the content ``config``."""
    ids = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3, "to": 4, "be": 5, "?": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = TEMPLATES[name][0]
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config", [None, {"model_max_length": 512}, {"tokenizer_class": None}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_missing_fields_of_tokenizer_config_are_saved(tmp_path, name, config):
    """Without a class, transformers chooses one by the type of the model, and may add other special tokens."""
    template_files(tmp_path, name, config)
    load_tokenizer(tmp_path).save(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (saved.get("model_input_names"), saved.get("padding_side")) == TEMPLATES[name][1:]
    assert saved.get("model_max_length") == (config or {}).get("model_max_length")
    assert saved["bos_token"] == "<s>"


def test_a_tokenizer_config_with_a_class_is_copied(tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "model_input_names": ["input_ids"]}
    template_files(tmp_path, "llama", config)
    load_tokenizer(tmp_path).save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text()) == config


@pytest.mark.live
@pytest.mark.parametrize("config", [None, {"model_max_length": 512}])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_adds_the_same_tokens_for_every_type_of_model(tmp_path, name, model_type, config):
    from transformers import AutoTokenizer

    template_files(tmp_path, name, config)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps({"model_type": model_type}))
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    encoding, reference = tokenizer.encode_inputs("to be", "be"), hf_tokenizer("to be", "be")
    assert reference["input_ids"] == encoding.ids.tolist()
    assert reference.get("token_type_ids") == (None if TEMPLATES[name][1] else encoding.token_types.tolist())
    assert len(hf_tokenizer) == tokenizer.vocab_size
    assert hf_tokenizer.padding_side == (TEMPLATES[name][2] or "right")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config", {"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class='RobertaTokenizer'"),
        ("config", {"model_type": "roberta"}, "model_type='roberta'"),
        ("tokenizer_config", {"add_prefix_space": True}, "add_prefix_space=True"),
        ("added_tokens", {"<x>": 259}, "the further token '<x>' in added_tokens.json"),
    ],
)
def test_vocab_and_merges_of_other_tokenizers_are_rejected(tmp_path, name, content, reason):
    tokens = byte_level_files(tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"with {reason}, but .* with transformers\.AutoTokenizer\.from_pretrained"):
        load_tokenizer(tmp_path)
    # These are files of GPT-2.
    for file, gpt2 in [
        ("tokenizer_config", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}),
        ("config", {"model_type": "gpt2"}),
        ("added_tokens", {END: len(tokens) - 1}),
    ]:
        (tmp_path / f"{file}.json").write_text(json.dumps(gpt2))
    assert load_tokenizer(tmp_path).end_id == len(tokens) - 1


@pytest.mark.parametrize(
    ("name", "content", "tokens", "text"),
    [
        ("special_tokens_map", {"pad_token": "he"}, ["he", " ", "he", "i", END], " i"),
        ("special_tokens_map", {"pad_token": {"content": "he", "lstrip": True}}, ["he", "he", "i", END], "i"),
        ("tokenizer_config", {"additional_special_tokens": ["he"]}, ["he", " ", "he", "i", END], " i"),
        ("added_tokens", {"he": 256}, ["he", " ", "he", "i", END], "he hei"),
        ("tokenizer_config", {"added_tokens_decoder": {"0": {"content": "he"}}}, ["he", " ", "he", "i", END], "he hei"),
        ("special_tokens_map", {"bos_token": END}, ["he", " he", "i", END], "he hei"),
    ],
)
def test_declared_tokens_of_vocab_and_merges_are_not_split(tmp_path, name, content, tokens, text):
    """As in ``transformers.GPT2TokenizerFast``."""
    byte_level_files(tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(f"he hei{END}")
    assert [tokenizer.decode([number]) for number in ids] == tokens
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)  # with added_tokens_decoder, the next file is ignored
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<x>"]}))
    with pytest.raises(ValueError, match=r"the further token '<x>' in special_tokens_map\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": "<x>"}))
    with pytest.raises(ValueError, match=r"additional_special_tokens='<x>' must be a list"):
        load_tokenizer(tmp_path)


def test_a_missing_package_raises_an_error_with_the_install_command(tmp_path, monkeypatch):
    words_file(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tokenizers\]' in"):
        load_tokenizer(tmp_path)


def test_unreadable_tokenizer_directories_raise_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"looked for .*merges\.txt; found \['vocab\.json'\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"{tmp_path}: the vocabulary of the tokenizer is empty: train the tokenizer"):
        load_tokenizer(tmp_path)
    for content, message in [("{", "is not JSON"), ("[]", "JSON object"), ('{"type": "x"}', "\"type\" is 'x'")]:
        (tmp_path / "jaxlm_tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)

"""The files of a published tokenizer, read as transformers reads them: backend, special tokens and settings.

A backend is a ``tokenizers.Tokenizer``. ``jaxlm.data.tokenizers.PretrainedTokenizer`` uses this module to load and save
tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import extras
from jaxlm.json_files import read_object

_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_END_OF_TEXT = "<|endoftext|>"
ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
"""The roles of special tokens: the fields of :class:`SpecialIds`."""
_KNOWN_TOKENS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": (_END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
"""The tokens that published vocabularies use for each role. If neither the caller nor a file names the token of a role,
the first of these tokens that is in the vocabulary is used."""

# Classes of transformers that change what ``tokenizer.json`` says. Names are without the suffix "Fast".
_ADD_BOS_TOKEN = {
    "LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True, "GPTNeoXTokenizer": False,
}  # fmt: skip
"""Class -> default of ``add_bos_token``. For these classes, transformers replaces the post-processor by a template that
adds the bos and eos tokens."""
_BERT_CLASSES = (
    "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "FunnelTokenizer",
    "LayoutLMTokenizer", "LxmertTokenizer", "MobileBertTokenizer", "SqueezeBertTokenizer",
)  # fmt: skip
_ROBERTA_CLASSES = (
    "RobertaTokenizer", "BartTokenizer", "BlenderbotTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer",
)  # fmt: skip
_CLASSES_THAT_CONVERT_SENTENCEPIECE = ("LlamaTokenizer", "T5Tokenizer")
"""Classes that do not read ``tokenizer.json`` if ``add_prefix_space`` is set: they convert the SentencePiece model."""
_CLASS_OF_MODEL = {
    "bert": "BertTokenizer", "gemma3_text": "GemmaTokenizer", "llama": "LlamaTokenizer",
    "mamba2": "GPTNeoXTokenizer", "mistral": "LlamaTokenizer", "mixtral": "LlamaTokenizer",
    "recurrent_gemma": "GemmaTokenizer", "roberta": "RobertaTokenizer", "t5": "T5Tokenizer", "umt5": "T5Tokenizer",
    "xlstm": "GPTNeoXTokenizer",
}  # fmt: skip
"""``model_type`` -> class, if no file names a class. Other types have classes that do not change ``tokenizer.json``."""
_SETTINGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens", "strip_accents",
    "tokenize_chinese_chars", "trim_offsets",
)  # fmt: skip
"""The settings of ``tokenizer_config.json`` that may change ``tokenizer.json``."""


def find_special_tokens(backend: Any, given: Mapping[str, str | None]) -> dict[str, str]:
    """Role -> token: the given token, or else the first token of ``_KNOWN_TOKENS`` that is in the vocabulary.

    A role that has no token, or whose given token is None, is left out.

    Raises:
        ValueError: a given role is unknown, or a given token is not in the vocabulary.
    """
    unknown = [role for role in given if role not in ROLES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a role of special tokens: choose from {', '.join(ROLES)}")
    tokens = {}
    for role in ROLES:
        token = find_special_token(backend, role, given)
        if token is None:
            continue
        if backend.token_to_id(token) is None:
            name = "end" if role == "eos" else role
            raise ValueError(f"{name} token {token!r} is not in the vocabulary of the tokenizer")
        tokens[role] = token
    return tokens


def find_special_token(backend: Any, role: str, given: Mapping[str, str | None]) -> str | None:
    """The given token of a role, or else its first token of ``_KNOWN_TOKENS`` that is in the vocabulary, or None."""
    known = (token for token in _KNOWN_TOKENS[role] if backend.token_to_id(token) is not None)
    return given[role] if role in given else next(known, None)


def read_backend(directory: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a directory, with the tokens that its other files declare."""
    tokenizers = extras.import_optional(
        "tokenizers", "tokenizers", f"the tokenizer in {directory} needs the package `tokenizers`"
    )
    file, vocab_file = directory / "tokenizer.json", directory / "tokenizer.json"
    is_gpt2 = not file.exists()
    if is_gpt2:
        file, vocab_file = directory / "merges.txt", directory / "vocab.json"
        _require_gpt2(directory, read_object(vocab_file))  # read_object raises if a token occurs twice
    try:
        if is_gpt2:
            backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(file)))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = tokenizers.decoders.ByteLevel()
        else:
            backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"cannot read the tokenizer {file}: {error}") from error
    declared = _added_tokens(directory, backend.get_added_tokens_decoder().values())
    backend.add_tokens(
        [
            tokenizers.AddedToken(text, **token.options)
            for text, token in declared.items()
            if token.may_be_new or backend.token_to_id(text) is not None
        ]
    )
    if is_gpt2 and backend.token_to_id(_END_OF_TEXT) is not None:
        mark_special(backend, [_END_OF_TEXT])
    # Sorted, because the order of get_vocab varies, and the message of the error depends on it.
    _tokens_by_id(((number, token) for token, number in sorted(backend.get_vocab().items())), vocab_file)
    return backend


def _require_gpt2(directory: Path, vocabulary: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``vocab.json`` and ``merges.txt`` describe the whole tokenizer, as they do for GPT-2.

    Tokenizers of other classes have a post-processor template, other special tokens, or another rule that splits a text
    into words.
    """
    settings, config = (read_if_exists(directory / name) for name in ("tokenizer_config.json", "config.json"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    model_type = config.get("model_type") or "gpt2"
    if name not in (None, *_GPT2_CLASSES):
        reason = f"tokenizer_class={name!r}"
    # A model_type "jaxlm-..." names no published tokenizer class, so it does not rule out GPT-2's tokenizer.
    elif name is None and model_type != "gpt2" and not str(model_type).startswith("jaxlm-"):
        reason = f"model_type={model_type!r}"
    elif setting := next((name for name in ("add_prefix_space", "add_bos_token") if settings.get(name)), None):
        reason = f"{setting}={settings[setting]!r}"
    elif added := [(text, token) for text, token in _added_tokens(directory, ()).items() if text not in vocabulary]:
        reason = f"the further token {added[0][0]!r} in {added[0][1].file}"
    else:
        return
    raise ValueError(
        f"{directory} has vocab.json and merges.txt with {reason}, but these two files are read as GPT-2's tokenizer: "
        "write tokenizer.json once, with transformers.AutoTokenizer.from_pretrained(directory, use_fast=True)"
        '.save_pretrained(directory). If it is GPT-2\'s tokenizer, write {"tokenizer_class": "GPT2Tokenizer"} to '
        "tokenizer_config.json"
    )


_ADDED_TOKEN_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class _AddedToken(NamedTuple):
    """A token that a file declares.

    Attributes:
        file: the name of the file.
        options: the options of ``tokenizers.AddedToken``.
        may_be_new: whether the token gets a new id if it is not in the vocabulary. False: the files declare the token
            only as the token of a role, such as ``eos_token``. Such a token is used only if it is in the vocabulary.
    """

    file: str
    options: dict[str, bool]
    may_be_new: bool


def _added_tokens(directory: Path, backend_tokens: Iterable[Any]) -> dict[str, _AddedToken]:
    """Token -> its declaration, for the added tokens. ``encode`` does not split added tokens.

    The order is that in which transformers adds them.

    Args:
        backend_tokens: the added tokens of the backend. Only ``added_tokens_decoder`` overrides their options. The
            tokens of roles and of ``additional_special_tokens`` are always special.
    """
    fields = _token_fields(directory)
    role_tokens = [fields[f"{role}_token"] for role in ROLES if f"{role}_token" in fields]
    special = [(file, token, False) for file, token in role_tokens if token is not None]
    file, tokens = fields.get("additional_special_tokens", ("", None))
    special += [(file, token, True) for token in tokens or []]
    special_texts = {_token_text(directory / name, token) for name, token, _ in special}
    file, decoder = fields.get("added_tokens_decoder", ("", None))
    declared = [(file, token, True) for token in _tokens_by_id((decoder or {}).items(), directory / file).values()]
    declared += [
        ("tokenizer.json", {"content": t.content, **{name: getattr(t, name) for name in _ADDED_TOKEN_OPTIONS}}, True)
        for t in backend_tokens
    ]
    if decoder is None:
        file = "added_tokens.json"
        pairs = ((number, token) for token, number in read_if_exists(directory / file).items())
        declared += [(file, token, True) for token in _tokens_by_id(pairs, directory / file).values()]
    found: dict[str, _AddedToken] = {}
    # For each option of a token, the first declaration that sets this option decides. But tokens in special_texts are
    # always special.
    for name, token, may_be_new in [*declared, *special]:
        text = _token_text(directory / name, token)
        options = {o: token[o] for o in _ADDED_TOKEN_OPTIONS if o in token} if isinstance(token, dict) else {}
        for option, value in options.items():
            if not isinstance(value, bool):
                raise ValueError(f"{directory / name}: {option}={value!r} of the token {text!r} must be true or false")
        first = found.get(text, _AddedToken(name, {"special": True} if text in special_texts else {}, may_be_new))
        found[text] = _AddedToken(first.file, {**options, **first.options}, first.may_be_new or may_be_new)
    return found


def _token_fields(directory: Path) -> dict[str, tuple[str, Any]]:
    """Field -> (name of its file, value), for the fields of the files that declare special tokens.

    As in transformers, ``special_tokens_map.json`` overrides ``tokenizer_config.json``, and is not read if the latter
    has ``added_tokens_decoder``. The lists ``additional_special_tokens`` of the two files are concatenated.

    Raises:
        ValueError: a field that declares tokens has a wrong type.
    """
    fields: dict[str, tuple[str, Any]] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_if_exists(directory / name)
        for key, kind in (("additional_special_tokens", list), ("added_tokens_decoder", dict)):
            if not isinstance(content.get(key) or kind(), kind):
                raise ValueError(f"{directory / name}: {key}={content[key]!r} must be a {kind.__name__}")
        for key in (f"{role}_token" for role in ROLES):
            if content.get(key) is not None:
                _token_text(directory / name, content[key], f"{key}=")
        if isinstance(content.get("additional_special_tokens"), list):
            _, earlier = fields.get("additional_special_tokens", ("", None))
            content["additional_special_tokens"] = [*(earlier or []), *content["additional_special_tokens"]]
        fields |= {key: (name, value) for key, value in content.items()}
        if content.get("added_tokens_decoder") is not None:
            break
    return fields


def _token_text(file: Path, token: Any, what: str = "the token ") -> str:
    """The text of a token, which is a string or an object with the field ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{file}: {what}{token!r} must be a string")
    return text


def _tokens_by_id(pairs: Iterable[tuple[Any, Any]], file: Path) -> dict[int, Any]:
    """Id -> token, in the order of the ids, for pairs (id, token) of a file.

    Raises:
        ValueError: an id is not an integer, or two tokens have the same id, so that decoding would be ambiguous.
    """
    tokens: dict[int, Any] = {}
    for key, token in pairs:
        if not str(key).isdecimal():
            raise ValueError(f"{file}: {key!r} must be the id of a token, an integer")
        number = int(key)
        if number in tokens:
            raise ValueError(
                f"{file}: the tokens {tokens[number]!r} and {token!r} have the same id {number}: ids must be distinct"
            )
        tokens[number] = token
    return dict(sorted(tokens.items()))


def mark_special(backend: Any, tokens: Iterable[str]) -> None:
    """Make tokens of the vocabulary special: ``encode`` does not split them. An added token keeps its options."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([added.get(token, token) for token in tokens])


def apply_settings(
    backend: Any, settings: Mapping[str, Any], config: Mapping[str, Any], tokens: Mapping[str, str | None]
) -> None:
    """Change the backend as transformers does after it has read ``tokenizer.json``.

    Args:
        settings: the content of ``tokenizer_config.json``.
        config: the content of ``config.json``.
        tokens: role -> special token, as the files declare it.

    Raises:
        ValueError: a setting is neither a boolean nor null; or ``add_prefix_space`` contradicts ``tokenizer.json``. For
            the classes in ``_ADD_BOS_TOKEN``: a special token is not in the vocabulary; or the bos or eos token is to
            be added to each text, but there is no such token.
    """
    for name in _SETTINGS:
        if not isinstance(settings.get(name), bool | None):
            raise ValueError(f"tokenizer_config.json: {name}={settings[name]!r} must be true, false or null")
    model_class = _CLASS_OF_MODEL.get(str(config.get("model_type")), "")
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or model_class).removesuffix("Fast")
    add_space = settings.get("add_prefix_space")
    if name in _CLASSES_THAT_CONVERT_SENTENCEPIECE:
        if add_space is not None and add_space != _adds_space(backend):
            raise ValueError(
                f"tokenizer_config.json: add_prefix_space={add_space}, but tokenizer.json "
                f"{'adds no' if add_space else 'adds a'} space before a text: write tokenizer.json again, with "
                "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
    elif add_space is not None:
        _set_fields(backend, "pre_tokenizer", {"add_prefix_space": add_space})
    elif "add_prefix_space" not in settings and component_state(backend.pre_tokenizer).get("add_prefix_space"):
        raise ValueError(
            "tokenizer.json has add_prefix_space=True, but tokenizer_config.json has no add_prefix_space, so "
            "transformers would use False: write add_prefix_space to tokenizer_config.json"
        )
    if name in _BERT_CLASSES:
        setting_of = {"lowercase": "do_lower_case", "handle_chinese_chars": "tokenize_chinese_chars"}
        fields = {field: settings.get(setting) is not False for field, setting in setting_of.items()}
        _set_fields(backend, "normalizer", {**fields, "strip_accents": settings.get("strip_accents")})
    if name in _ROBERTA_CLASSES:
        fields = {"add_prefix_space": bool(add_space), "trim_offsets": settings.get("trim_offsets") is not False}
        _set_fields(backend, "post_processor", fields)
    if name in _ADD_BOS_TOKEN:
        added = {"bos": settings.get("add_bos_token", _ADD_BOS_TOKEN[name]), "eos": settings.get("add_eos_token")}
        _set_template(backend, tokens, [role for role, is_added in added.items() if is_added])
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))


def _set_template(backend: Any, tokens: Mapping[str, str | None], roles: Sequence[str]) -> None:
    """Set the post-processor template that adds the tokens of ``roles`` to each text.

    ``roles`` contains "bos", "eos", both, or neither.
    """
    import tokenizers

    special_tokens = find_special_tokens(backend, tokens)
    for role in roles:
        if role not in special_tokens:
            raise ValueError(
                f"tokenizer_config.json: the tokenizer adds the {role} token to each text, but there is no such token: "
                f"set {role}_token, or add_{role}_token to false"
            )
    bos, eos = ([special_tokens[role]] if role in roles else [] for role in ("bos", "eos"))
    single, second = (
        [f"{piece}:{type_id}" for piece in [*bos, text, *eos]] for type_id, text in enumerate(("$A", "$B"))
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single,
        pair=[*single, *second],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*bos, *eos])],
    )


def settings_to_save(backend: Any, settings: Mapping[str, Any]) -> dict[str, bool]:
    """``split_special_tokens`` and ``add_prefix_space`` of the backend, if they differ from ``tokenizer_config.json``.

    ``add_prefix_space`` is left out for the classes in ``_CLASSES_THAT_CONVERT_SENTENCEPIECE``.

    Args:
        settings: the content of ``tokenizer_config.json``. A missing setting counts as false.
    """
    stored = {"split_special_tokens": backend.encode_special_tokens}
    add_space = component_state(backend.pre_tokenizer).get("add_prefix_space")
    name = str(settings["tokenizer_class"]).removesuffix("Fast")
    if add_space is not None and name not in _CLASSES_THAT_CONVERT_SENTENCEPIECE:
        stored["add_prefix_space"] = add_space
    return {name: value for name, value in stored.items() if value != bool(settings.get(name))}


def component_state(component: Any) -> dict[str, Any]:
    """The fields of a component of a backend, such as its normalizer, or ``{}`` if there is no such component."""
    return {} if component is None else json.loads(component.__getstate__())


def _set_fields(backend: Any, component: str, fields: Mapping[str, Any]) -> None:
    """Set fields of a component of the backend, such as "normalizer". Ignore fields that the component lacks."""
    import tokenizers

    state = component_state(getattr(backend, component))
    new_state = {**state, **{name: value for name, value in fields.items() if name in state}}
    if new_state != state:
        module = getattr(tokenizers, "processors" if component == "post_processor" else f"{component}s")
        component_class = getattr(module, new_state.pop("type"))
        # The state has a pair of a token and its id as a list; the class needs a tuple.
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in new_state.items()}
        setattr(backend, component, component_class(**options))


def _adds_space(backend: Any) -> bool:
    """Whether the backend adds a space, or the character for a space, before a text."""
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    words = [] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    return not (words[0][0] if words else text).startswith("a")


def read_if_exists(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or ``{}`` if the file does not exist."""
    return read_object(file) if file.exists() else {}


def declared_tokens(directory: Path, backend: Any, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Role -> special token, as declared in the files of a directory. None: a file declares that there is no token.

    Args:
        config: the content of ``config.json``, or an empty mapping.
    """
    declared: dict[str, str | None] = {}
    fields = _token_fields(directory)
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    processor = component_state(backend.post_processor)
    for role in ROLES:
        ids = config.get(f"{role}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if f"{role}_token" in fields:
            name, token = fields[f"{role}_token"]
            declared[role] = None if token is None else _token_text(directory / name, token)
        # An id in config.json may be only a default of the config class in transformers. So use the id only if a
        # special token has this id.
        elif isinstance(first, int) and first in added:
            declared[role] = added[first]
        elif role in processor and processor["type"] in ("BertProcessing", "RobertaProcessing"):
            declared[role], _ = processor[role]
    return declared

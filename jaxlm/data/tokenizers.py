"""Tokenizers convert text to ids and back.

This module defines their interface, the byte, character and pretrained tokenizers, and :func:`load_tokenizer`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxlm import integrity
from jaxlm.config import check_same_number, check_value
from jaxlm.data import encodings
from jaxlm.data.encodings import Encoding
from jaxlm.data.text_files import check_no_surrogate, utf8_bytes
from jaxlm.data.tokenizer_files import (
    ROLES,
    apply_settings,
    component_state,
    declared_tokens,
    find_special_token,
    find_special_tokens,
    mark_special,
    read_backend,
    read_if_exists,
    settings_to_save,
)
from jaxlm.data.tokens import check_tokens
from jaxlm.json_files import read_object

_LOG = logging.getLogger("jaxlm")

JAXLM_TOKENIZER_FILE = "jaxlm_tokenizer.json"
_COPIED_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
"""Files that ``save`` copies from a published tokenizer. ``save`` adds fields only to ``tokenizer_config.json`` and
``special_tokens_map.json``."""
TOKENIZER_FILES = (JAXLM_TOKENIZER_FILE, "tokenizer.json", *_COPIED_FILES)
"""Names of the files of a saved tokenizer. ``save`` first removes the files with these names from the directory."""
NO_TOKEN_TYPES = {"model_input_names": ["input_ids", "attention_mask"]}
"""The entry of ``tokenizer_config.json`` for models without token types."""


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids of the special tokens of a tokenizer. None: the tokenizer has no token for the role.

    Attributes:
        pad: padding of batch rows.
        unk: replaces a word or character that is not in the vocabulary.
        bos, eos: begin and end a document, or the target text of a sequence-to-sequence model.
        cls: the token whose hidden state a classifier reads.
        sep: ends a text, or each text of a pair.
        mask: replaces a token that the model must predict.
    """

    pad: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None


class Tokenizer(Protocol):
    """The interface of a tokenizer. All methods except ``save`` are pure.

    Attributes:
        vocab_size: ids are ``0 <= id < vocab_size``.
        special_ids: the ids of the special tokens.
        end_id: the id that ends a document: ``special_ids.eos``, or ``special_ids.sep`` if the vocabulary has no eos
            token (BERT). None: the tokenizer has no such id. ``encode`` does not add ``end_id``.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> SpecialIds: ...

    @property
    def end_id(self) -> int | None: ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 ``[tokens]``. No special tokens are added."""
        ...

    def encode_inputs(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> Encoding:
        """The encoding of the text, or of the pair, with the special tokens of the tokenizer's template."""
        ...

    def encode_inputs_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> list[Encoding]:
        """The result of ``encode_inputs`` for each text (and its pair). This is faster than one call per text."""
        ...

    def encode_windows(self, question: str, context: str, *, max_length: int, stride: int) -> list[Encoding]:
        """The encodings of overlapping windows of the context, each with the whole question."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text of ids ``[tokens]``. Raises ``ValueError`` as :func:`check_ids`."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write the files that :func:`load_tokenizer` reads. The directory is created if it does not exist."""
        ...


def check_strings(name: str, values: Sequence[str]) -> None:
    """Raise ``TypeError`` if the argument ``name`` is a single string, or has an element that is not a string."""
    if isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of strings, got one string: pass [{values[:40]!r}]")
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{position}] must be a string, got {type(value).__name__}: {value!r}")


class EncodeInputsMixin:
    """Mixin that implements ``encode_inputs``, ``encode_inputs_batch`` and ``encode_windows``.

    A subclass defines ``encode``. It also defines ``_offsets``, or overrides ``_encodings``.
    """

    _context_first = False
    """Whether ``encode_windows`` puts the context before the question."""
    _truncation_side: Literal["right", "left"] = "right"
    """The side of a text from which ``encode_inputs`` and ``encode_inputs_batch`` remove tokens."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 ``[tokens]``. No special tokens are added."""

    def _offsets(self, text: str) -> np.ndarray:
        """The offsets of each token of ``encode(text)``, int ``[tokens, 2]``, as in :class:`Encoding`."""
        raise NotImplementedError

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        """The encoding of each text (and its pair), without truncation. This default adds no special tokens."""
        return [
            encodings.concatenate_texts([(self.encode(text), self._offsets(text)) for text in row])
            for row in input_rows(texts, pairs)
        ]

    def encode_inputs(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> Encoding:
        """The encoding of the text, or of the pair, with the special tokens of the tokenizer's template.

        BERT: ``[CLS] text [SEP] pair [SEP]``. T5: ``text </s>``. Chess moves: ``<bos> text``. GPT-2, bytes and
        characters: no special tokens.

        Args:
            max_length: maximum number of tokens, including special tokens. Tokens are removed from the end of a text,
                or from its start if the files of the tokenizer set ``truncation_side`` to "left". In a pair, tokens are
                first removed from the longer text. None: the texts are not truncated.

        Raises:
            TypeError: ``text`` or ``pair`` is not a string.
            ValueError: ``max_length`` is too small for the special tokens and one token of each text, or a text cannot
                be encoded, as in ``encode``.
        """
        return self.encode_inputs_batch([text], None if pair is None else [pair], max_length=max_length)[0]

    def encode_inputs_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> list[Encoding]:
        """The result of ``encode_inputs`` for each text (and its pair). This is faster than one call per text.

        Raises:
            TypeError: ``texts`` or ``pairs`` is a single string, or has an element that is not a string.
            ValueError: the numbers of texts and pairs differ, or as in ``encode_inputs``.
        """
        check_strings("texts", texts)
        if pairs is not None:
            check_strings("pairs", pairs)
            check_same_number(text=texts, pair=pairs)
        encoded = self._encodings(texts, pairs)
        if max_length is None:
            return encoded
        return [encodings.truncate(encoding, max_length, self._truncation_side) for encoding in encoded]

    def encode_windows(self, question: str, context: str, *, max_length: int, stride: int) -> list[Encoding]:
        """The encodings of overlapping windows of the context, each with the whole question, as for SQuAD.

        In every window, ``sequence_ids`` is 0 for the question and 1 for the context. The ``offsets`` of context tokens
        are positions in the whole context. If the template ends with the classifier token (XLNet), the context is
        before the question. ``truncation_side`` in the files of the tokenizer has no effect. If the question and the
        whole context fit into ``max_length`` tokens, there is one window.

        Args:
            max_length: maximum number of tokens of a window, including special tokens.
            stride: number of context tokens that two consecutive windows share.

        Raises:
            TypeError: the question or the context is not a string.
            ValueError: the question or the context has no tokens, or cannot be encoded. ``stride`` is negative. The
                context does not fit, and ``max_length`` leaves at most ``stride`` tokens for it.

        Example:
            >>> [w.ids.tolist() for w in ByteTokenizer().encode_windows("a", "bcdef", max_length=4, stride=1)]
            [[97, 98, 99, 100], [97, 100, 101, 102]]
        """
        if self._context_first:
            encoding = encodings.swap_sequence_ids(self.encode_inputs(context, question))
        else:
            encoding = self.encode_inputs(question, context)
        for number, (name, text) in enumerate((("question", question), ("context", context))):
            if not np.any(encoding.sequence_ids == number):
                raise ValueError(f"the {name} has no tokens: {text!r}")
        return encodings.split_windows(encoding, max_length, stride)


def input_rows(texts: Sequence[str], pairs: Sequence[str] | None) -> list[tuple[str, ...]]:
    """The texts of each row: one text, or the two texts of a pair."""
    return list(zip(texts, strict=True) if pairs is None else zip(texts, pairs, strict=True))


def encode_truncated(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None, name: str
) -> list[Encoding]:
    """The encoding of each text (and its pair), truncated to ``max_length`` tokens.

    Long texts are encoded twice, the second time with ``max_length``, because only the tokenizer knows from which side
    to remove tokens. The logger "jaxlm" warns with the number of truncated encodings.

    Args:
        max_length: maximum number of tokens. None: no truncation.
        name: what the texts are, for the warning, for example ``texts of train.tsv``.
    """
    encoded = tokenizer.encode_inputs_batch(texts, pairs)
    if max_length is None:
        return encoded
    long = [number for number, encoding in enumerate(encoded) if len(encoding.ids) > max_length]
    if long:
        _LOG.warning("%d of %d %s are truncated to %d tokens", len(long), len(encoded), name, max_length)
        long_pairs = None if pairs is None else [pairs[number] for number in long]
        shorter = tokenizer.encode_inputs_batch([texts[number] for number in long], long_pairs, max_length=max_length)
        for number, encoding in zip(long, shorter, strict=True):
            encoded[number] = encoding
    return encoded


def num_required_ids(tokenizer: Tokenizer) -> int:
    """The vocabulary size that a model needs for this tokenizer: the largest id that a model must have, plus 1.

    A model need not have the ids of added special tokens without a role, such as ``<image_soft_token>`` of Gemma 3:
    text models have no embedding for this token. Only the encoding of a text that contains such a token has its id.
    """
    if not isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.vocab_size
    added = tokenizer.backend.get_added_tokens_decoder()
    roles = tokenizer.special_tokens.values()
    unused = {number for number, token in added.items() if token.special and token.content not in roles}
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return max((number for number in vocabulary.values() if number not in unused), default=-1) + 1


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as an array [tokens]. Raises ``ValueError`` unless they are a 1-D array of ids of the vocabulary.

    An empty array of any shape and dtype is valid.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    check_tokens(array, vocab_size, name="ids to decode")
    return array


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(EncodeInputsMixin):
    """A tokenizer of UTF-8 bytes: ids 0-255 are bytes, and id 256 is the end of a document.

    ``encode`` raises ``ValueError`` for a surrogate, which has no UTF-8 bytes. ``decode`` replaces bytes that are not
    valid UTF-8 by U+FFFD.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
    """

    vocab_size = 257
    end_id = 256
    special_ids = SpecialIds(eos=256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8_bytes(text, "the text"), np.uint8).astype(np.int32)

    def _offsets(self, text: str) -> np.ndarray:
        first = np.repeat(np.arange(len(text)), [len(character.encode("utf-8")) for character in text])
        return np.stack([first, first + 1], axis=-1)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text. Id 256 has no text, so ``skip_special_tokens`` changes nothing."""
        array = check_ids(ids, self.vocab_size)
        return array[array != self.end_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        save_jaxlm_file(directory, {"type": "byte"})


@dataclasses.dataclass(frozen=True)
class CharTokenizer(EncodeInputsMixin):
    """A tokenizer of characters: id ``i`` is ``characters[i]``. There is no id for the end of a document.

    Raises:
        ValueError: ``characters`` is empty, or has a surrogate or a character twice.

    Example:
        >>> CharTokenizer.from_text("to be").encode("bet").tolist()
        [1, 2, 4]
    """

    characters: str
    end_id = None
    special_ids = SpecialIds()

    def __post_init__(self) -> None:
        if not self.characters:
            raise ValueError("a character tokenizer needs at least one character, got an empty text")
        # In a JSON file, two surrogates would become one character.
        check_no_surrogate(self.characters, "the characters")
        if len(set(self.characters)) != len(self.characters):
            repeated = next(c for i, c in enumerate(self.characters) if c in self.characters[:i])
            raise ValueError(
                f"characters must be distinct, got {repeated!r} more than once; try CharTokenizer.from_text"
            )

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of the distinct characters of a non-empty ``text``, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 ``[tokens]``. Raises ``ValueError`` if a character is not in ``characters``."""
        known, points = _code_points(self.characters), _code_points(text)
        order = np.argsort(known)
        ranks = np.searchsorted(known, points, sorter=order)
        ids = order[np.minimum(ranks, len(known) - 1)]
        unknown = np.flatnonzero(known[ids] != points)
        if unknown.size:
            index = int(unknown[0])
            raise ValueError(
                f"character {text[index]!r} (U+{ord(text[index]):04X}) at position {index} is not among the "
                f"{self.vocab_size} characters of this tokenizer: build the tokenizer from text with this character, "
                "or use ByteTokenizer"
            )
        return ids.astype(np.int32)

    def _offsets(self, text: str) -> np.ndarray:
        first = np.arange(len(text))
        return np.stack([first, first + 1], axis=-1)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text. There are no special tokens, so ``skip_special_tokens`` changes nothing."""
        return "".join(self.characters[i] for i in check_ids(ids, self.vocab_size))

    def save(self, directory: str | Path) -> None:
        save_jaxlm_file(directory, {"type": "character", "characters": self.characters})


def _code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


class PretrainedTokenizer(EncodeInputsMixin):
    """A tokenizer of the package ``tokenizers`` (extra ``tokenizers``), published with a checkpoint or trained.

    ``encode`` adds no special tokens. If the text contains a special token, ``encode`` returns the id of this token,
    unless ``split_special_tokens`` in ``tokenizer_config.json`` is true. ``encode`` raises ``ValueError`` for a
    surrogate, which has no UTF-8 bytes. ``decode`` writes special tokens as text, unless ``skip_special_tokens`` is
    True.

    Args:
        backend: the ``tokenizers.Tokenizer``. The constructor turns off padding and truncation in this object, and
            makes the tokens of roles special. If the class in ``tokenizer_config.json`` is ``PreTrainedTokenizerFast``,
            the constructor makes only the tokens in ``special_tokens`` special. ``save`` writes the original padding
            and truncation.
        special_tokens: role in ``ROLES`` -> token. The token None means that the role has no token. For a role that is
            not in the mapping, the usual tokens of published vocabularies are looked up in the vocabulary.
        files: name -> content of further files that ``save`` writes. Tokens of long texts are removed from the side
            that ``truncation_side`` in ``tokenizer_config.json`` names ("right" or "left"). If this field is missing,
            the side is the direction of the backend's truncation, or "right" if the backend has no truncation.

    Raises:
        ValueError: the vocabulary is empty, a role or the ``truncation_side`` is unknown, or a token is not in the
            vocabulary.

    Attributes:
        backend: the ``tokenizers.Tokenizer``, without padding and truncation.
        special_tokens: role -> special token, for the roles that have a token.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str | None] | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("the vocabulary of the tokenizer is empty: train the tokenizer, or load another one")
        self.backend = backend
        self.vocab_size: int = max(vocabulary.values()) + 1
        given = special_tokens or {}
        self.special_tokens = find_special_tokens(backend, given)
        self.special_ids = SpecialIds(**{role: backend.token_to_id(t) for role, t in self.special_tokens.items()})
        # BERT's vocabularies have no eos token, so [SEP] ends a document.
        end_token = self.special_tokens.get("eos", self.special_tokens.get("sep"))
        self.end_id: int | None = None if end_token is None else backend.token_to_id(end_token)
        self._files = dict(files or {})
        settings = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        # In transformers, PreTrainedTokenizerFast has only the tokens that a file declares. Other classes have default
        # tokens.
        only_declared = settings.get("tokenizer_class") == "PreTrainedTokenizerFast"
        mark_special(backend, [t for role, t in self.special_tokens.items() if role in given or not only_declared])
        side = settings.get("truncation_side", (backend.truncation or {}).get("direction", "right"))
        check_value(Literal["right", "left"], side, "tokenizer_config.json: truncation_side")
        self._truncation_side = side
        # The padding and truncation of tokenizer.json would change the number of ids. So keep their settings for
        # ``save``, and turn them off.
        self._padding_and_truncation: dict[str, Any] = {"padding": None, "truncation": None}
        if backend.padding is not None or backend.truncation is not None:
            content = json.loads(backend.to_str())
            self._padding_and_truncation = {name: content[name] for name in self._padding_and_truncation}
        backend.no_padding()
        backend.no_truncation()
        template = backend.encode("").ids
        self._context_first = len(template) > 1 and template[-1] == self.special_ids.cls
        self._trims_added_space = _trims_added_space(component_state(backend.post_processor))

    @classmethod
    def from_directory(cls, directory: str | Path) -> PretrainedTokenizer:
        """The tokenizer of ``tokenizer.json``, or of GPT-2's ``vocab.json`` and ``merges.txt`` (byte-level BPE).

        The special token of a role comes from the first of these sources that has the role:

        1. ``special_tokens_map.json`` (not if ``tokenizer_config.json`` has ``added_tokens_decoder``), then
           ``tokenizer_config.json``. Null means that the role has no token.
        2. The ids in ``config.json``, such as ``eos_token_id``, if they are ids of special tokens in the backend.
        3. A BERT or RoBERTa template in ``tokenizer.json`` (only cls and sep).
        4. The tokens that published vocabularies use.

        As in transformers, the tokens that these files and ``added_tokens.json`` declare are not split. Tokens of
        ``added_tokens_decoder``, ``additional_special_tokens`` and ``added_tokens.json`` that are not in the vocabulary
        get new ids. If there is a ``tokenizer_config.json``, its settings and the defaults of its ``tokenizer_class``
        override ``tokenizer.json``: ``add_bos_token``, ``add_eos_token``, ``add_prefix_space``, ``do_lower_case``,
        ``strip_accents``, ``tokenize_chinese_chars``, ``trim_offsets`` and ``split_special_tokens``, each for the
        classes that use it in transformers. ``save`` copies the other files of the tokenizer.

        Raises:
            ImportError: the package ``tokenizers`` is not installed.
            FileNotFoundError: there is neither ``tokenizer.json`` nor ``vocab.json``.
            ValueError: a file cannot be parsed, has an empty vocabulary or an unknown ``truncation_side``, names a
                role's token that is not in the vocabulary, or gives two tokens the same id. There is no
                ``tokenizer.json``, and the other files are not those of GPT-2. A setting has a wrong type, or
                contradicts ``tokenizer.json`` in a way that needs another ``tokenizer.json``.
        """
        directory = Path(directory)
        backend = read_backend(directory)
        files = {name: (directory / name).read_bytes() for name in _COPIED_FILES if (directory / name).is_file()}
        config = read_if_exists(directory / "config.json")
        tokens = declared_tokens(directory, backend, config)
        try:
            if "tokenizer_config.json" in files:
                apply_settings(backend, json.loads(files["tokenizer_config.json"]), config, tokens)
            return cls(backend, tokens, files=files)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error

    def encode(self, text: str) -> np.ndarray:
        check_no_surrogate(text, "the text")
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        for name, values in (("texts", texts), ("pairs", pairs or ())):
            for position, text in enumerate(values):
                check_no_surrogate(text, f"{name}[{position}]")
        encoded = self.backend.encode_batch(list(texts) if pairs is None else list(zip(texts, pairs, strict=True)))
        offsets = [encoding.offsets for encoding in encoded]
        if self._trims_added_space:
            offsets = [_trimmed_offsets(*row) for row in zip(encoded, input_rows(texts, pairs), strict=True)]
        return [_as_encoding(*row) for row in zip(encoded, offsets, strict=True)]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text of ids ``[tokens]``. Raises ``ValueError`` as :func:`check_ids`.

        Only the decoder in ``tokenizer.json`` changes spaces. For example, WordPiece with ``cleanup`` removes spaces
        before punctuation and in contractions. ``clean_up_tokenization_spaces`` in ``tokenizer_config.json`` has no
        effect here, unlike in transformers.

        Args:
            skip_special_tokens: True removes special tokens. False writes them as text.
        """
        return self.backend.decode(check_ids(ids, self.vocab_size).tolist(), skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and the copied files of a published tokenizer.

        transformers and ``load_tokenizer`` read these files. Files of an earlier tokenizer in the directory are
        removed. A special token that cannot be read from the written files, such as the token of an id in
        ``config.json``, is added to ``special_tokens_map.json`` if this file exists and overrides
        ``tokenizer_config.json``, and otherwise to ``tokenizer_config.json``. If ``tokenizer_config.json`` has no
        ``tokenizer_class``, the class ``PreTrainedTokenizerFast`` and further missing fields are added. Without a
        class, transformers would choose one by the ``model_type`` in ``config.json``. The chosen class may add special
        tokens that this tokenizer does not add. ``add_prefix_space`` and ``split_special_tokens`` are written to
        ``tokenizer_config.json`` if the backend has other values (a missing field counts as false). All other copied
        files are unchanged.
        """
        directory = _empty_directory(directory)
        for name, data in self._files.items():
            (directory / name).write_bytes(data)
        copied = read_if_exists(directory / "tokenizer_config.json")
        config = copied
        if not config.get("tokenizer_class"):
            default = self._default_config()
            config = {**default, **config, "tokenizer_class": default["tokenizer_class"]}
        config = {**config, **settings_to_save(self.backend, config)}
        if config != copied:
            _write_json(directory / "tokenizer_config.json", config)
        content = {**json.loads(self.backend.to_str()), **self._padding_and_truncation}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        # Do not read config.json: the directory may contain that of another model.
        declared = declared_tokens(directory, self.backend, {})
        found = {role: find_special_token(self.backend, role, declared) for role in ROLES}
        lost = {f"{r}_token": self.special_tokens.get(r) for r in ROLES if found[r] != self.special_tokens.get(r)}
        if lost:
            file, override = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
            if override.exists() and config.get("added_tokens_decoder") is None:
                file = override
            _write_json(file, {**read_object(file), **lost})

    def _default_config(self) -> dict[str, Any]:
        """The fields of ``tokenizer_config.json`` for a tokenizer that has no such file, or a file without a class."""
        template = self.backend.encode("", "")
        # BERT and XLNet end the second text with a special token of type 1 or 2. In the template of Llama, the first
        # special token of type 1 is the BOS token of the second text, but Llama models have no token types.
        later = (number for number, kind in zip(template.ids, template.type_ids, strict=True) if kind > 0)
        has_token_types = next(later, self.special_ids.bos) != self.special_ids.bos
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **({} if has_token_types else NO_TOKEN_TYPES),
            **({"padding_side": "left"} if self._context_first else {}),  # XLNet classifies by the last token
            # Null says that a role has no token. For a missing role, a reader would look up the usual tokens.
            **{f"{role}_token": self.special_tokens.get(role) for role in ROLES},
        }


def _as_encoding(encoding: Any, offsets: Sequence[tuple[int, int]]) -> Encoding:
    """The :class:`Encoding` with the content of a ``tokenizers.Encoding``, and with these offsets."""
    sequence_ids = [encodings.SPECIAL_TOKEN if number is None else number for number in encoding.sequence_ids]
    return Encoding(
        ids=np.asarray(encoding.ids, np.int32),
        token_types=np.asarray(encoding.type_ids, np.int32),
        offsets=np.asarray(offsets, np.int32).reshape(-1, 2),
        sequence_ids=np.asarray(sequence_ids, np.int32),
    )


def _trims_added_space(processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor with this state excludes spaces from offsets, and assumes a space before each text."""
    return bool(processor.get("add_prefix_space") and processor.get("trim_offsets")) or any(
        _trims_added_space(part) for part in processor.get("processors", ())
    )


def _trimmed_offsets(encoding: Any, texts: Sequence[str]) -> list[tuple[int, int]]:
    """The offsets of a ``tokenizers.Encoding`` whose post-processor trims offsets, without the errors of the package.

    At position 0, the package treats the space of a token as the added space, even if the text begins with a space. At
    other positions, the package treats the space as a part of the text, even if the package added this space after a
    special token in the text.
    """
    offsets = list(encoding.offsets)
    for number, (token, sequence) in enumerate(zip(encoding.tokens, encoding.sequence_ids, strict=True)):
        if sequence is None or not token.startswith("Ġ"):  # the character that byte-level tokens have for a space
            continue
        text, (start, stop) = texts[sequence], offsets[number]
        if start > 0 and text[start - 1] != " ":
            offsets[number] = (start - 1, stop if token.strip("Ġ") else start - 1)
        elif start < stop and text[start] == " ":
            offsets[number] = (start + 1, stop)
    return offsets


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory: ``jaxlm_tokenizer.json``, ``tokenizer.json``, or ``vocab.json`` + ``merges.txt``.

    Raises:
        FileNotFoundError: the directory has none of these files.
        ImportError: the files need the package ``tokenizers``, which is not installed.
        ValueError: a file is invalid, or differs from its checksum in ``checksums.json``.
    """
    directory = Path(directory)
    jaxlm_file = directory / JAXLM_TOKENIZER_FILE
    integrity.verify_checksums(directory, TOKENIZER_FILES)
    if jaxlm_file.exists():
        content = read_object(jaxlm_file)
        match content:
            case {"type": "byte"}:
                return ByteTokenizer()
            case {"type": "character", "characters": str(characters)}:
                return CharTokenizer(characters)
            case {"type": "moves"}:
                from jaxlm.data.moves import MoveTokenizer  # imported here, because moves.py imports this module

                return MoveTokenizer.from_json(content)
        raise ValueError(
            f'{jaxlm_file} does not describe a tokenizer of this version of jaxlm: "type" is {content.get("type")!r}, '
            f"with the fields {', '.join(content)}"
        )
    if (directory / "tokenizer.json").exists() or all(
        (directory / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        return PretrainedTokenizer.from_directory(directory)
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
    raise FileNotFoundError(
        f"no tokenizer in {directory}: looked for {JAXLM_TOKENIZER_FILE}, tokenizer.json, "
        f"vocab.json + merges.txt; found {found}"
    )


def save_jaxlm_file(directory: str | Path, content: dict[str, Any]) -> None:
    """Write ``jaxlm_tokenizer.json``, the only file of a tokenizer, and remove the files of an earlier tokenizer."""
    _write_json(_empty_directory(directory) / JAXLM_TOKENIZER_FILE, content)


def _empty_directory(directory: str | Path) -> Path:
    """The directory without files of an earlier tokenizer. It is created if it does not exist.

    The files are removed, because :func:`load_tokenizer` might read them instead of the new files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    integrity.remove_checksums(directory, TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    return directory


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Tokenizers: text to integer ids and back. Bytes and characters are built in; the others are loaded or trained."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm import integrity
from jaxlm.data import encodings
from jaxlm.data.encodings import Encoding
from jaxlm.json_files import read_object

_OWN_FILE = "jaxlm_tokenizer.json"
ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
"""The roles of special tokens: the fields of :class:`SpecialIds`."""
_KNOWN_TOKENS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
"""What published vocabularies call each role, tried in this order when no file of the directory names the token."""
_KEPT_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
"""Files of a published tokenizer that are saved as they were loaded."""
TOKENIZER_FILES = (_OWN_FILE, "tokenizer.json", *_KEPT_FILES)
"""Names of all files that :func:`load_tokenizer` or transformers read a tokenizer from."""


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids of the special tokens of a tokenizer; None for a role that it does not have.

    Attributes:
        pad: fills up rows of a batch.
        unk: stands for a word or character that is not in the vocabulary.
        bos, eos: begins and ends a document or a target.
        cls: the token whose hidden state a classifier reads.
        sep: ends a text of a pair.
        mask: replaces a token that a model is to predict.
    """

    pad: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None


class Tokenizer(Protocol):
    """What the rest of the library needs from a tokenizer. All methods but ``save`` are pure.

    Attributes:
        vocab_size: ids are ``0 <= id < vocab_size``.
        special_ids: the ids of the special tokens.
        end_id: the id that ends a document, None where there is none. ``encode`` never adds it. It is
            ``special_ids.eos``, or for BERT's vocabularies, which have none, the id of ``[SEP]``.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> SpecialIds: ...

    @property
    def end_id(self) -> int | None: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 ``[tokens]``, without special tokens."""
        ...

    def encode_inputs(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> Encoding:
        """The text, or the pair, with the special tokens of the tokenizer's template."""
        ...

    def encode_inputs_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> list[Encoding]:
        """``encode_inputs`` of each text (and its pair), faster than one by one."""
        ...

    def encode_windows(self, question: str, context: str, *, max_length: int, stride: int) -> list[Encoding]:
        """The question with overlapping windows of the context."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Text of ids ``[tokens]``. Raises ValueError for an id outside the vocabulary."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write what :func:`load_tokenizer` reads, into a directory that is made if missing."""
        ...


class _Inputs:
    """The methods that make inputs of a model, from one method that encodes without truncation."""

    _context_first = False
    """Whether ``encode_windows`` puts the context before the question."""

    @abstractmethod
    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        """Each text (and its pair) in the template, whole."""

    def encode_inputs(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> Encoding:
        """The text, or the pair, with the special tokens of the tokenizer's template.

        BERT: ``[CLS] text [SEP] pair [SEP]``; T5: ``text </s>``; GPT-2, bytes and characters have none.

        Args:
            max_length: the most tokens, special tokens included. Of a pair, the longer text is shortened first, at its
                end. None: the texts stay whole, however long.

        Raises:
            TypeError: ``text`` or ``pair`` is not a string.
            ValueError: ``max_length`` leaves no room for a token of each text.
        """
        return self.encode_inputs_batch([text], None if pair is None else [pair], max_length=max_length)[0]

    def encode_inputs_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> list[Encoding]:
        """``encode_inputs`` of each text (and its pair), faster than one by one.

        Raises:
            TypeError: ``texts`` or ``pairs`` is one string, or holds what is not a string.
            ValueError: another number of pairs than of texts; ``max_length`` as in ``encode_inputs``.
        """
        for name, values in (("texts", texts), ("pairs", pairs or ())):
            if isinstance(values, str):
                raise TypeError(f"{name} must be a sequence of strings, got one string: pass [{values[:20]!r}]")
            for position, value in enumerate(values):
                if not isinstance(value, str):
                    raise TypeError(f"{name}[{position}] must be a string, got {type(value).__name__}: {value!r}")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"each text needs one pair: got {len(texts)} texts and {len(pairs)} pairs")
        encoded = self._encodings(texts, pairs)
        return encoded if max_length is None else [encodings.truncated(one, max_length) for one in encoded]

    def encode_windows(self, question: str, context: str, *, max_length: int, stride: int) -> list[Encoding]:
        """The whole question with overlapping windows of the context, as readers of SQuAD make them.

        In every window, ``sequence`` is 0 for the question and 1 for the context, and ``offsets`` count characters of
        the whole context. Templates whose classifier token comes last (XLNet) have the context before the question.

        Args:
            max_length: the most tokens of one window, special tokens included.
            stride: how many tokens of the context two neighbouring windows share.

        Raises:
            ValueError: a question or context without tokens; ``max_length`` leaves at most ``stride`` tokens for the
                context.

        Example:
            >>> [w.ids.tolist() for w in ByteTokenizer().encode_windows("a", "bcdef", max_length=4, stride=1)]
            [[97, 98, 99, 100], [97, 100, 101, 102]]
        """
        if self._context_first:
            encoding = encodings.swapped(self.encode_inputs(context, question))
        else:
            encoding = self.encode_inputs(question, context)
        for number, (name, text) in enumerate((("question", question), ("context", context))):
            if not np.any(encoding.sequence == number):
                raise ValueError(f"the {name} has no tokens: {text!r}")
        return encodings.windows(encoding, max_length, stride)


def _checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"decode takes a row of integer ids, got {array.dtype}{list(array.shape)}")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        at = bad[0]
        raise ValueError(f"id {array[at]} at position {at} is outside the vocabulary of {vocab_size} ids")
    return array


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Inputs):
    """UTF-8 bytes as ids 0-255, and 256 for the end of a document.

    ``decode`` shows bytes that are no whole character (a sequence cut in the middle) as U+FFFD; id 256 has no text.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
    """

    vocab_size = 257
    end_id = 256
    special_ids = SpecialIds(eos=256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        def part(text: str) -> tuple[np.ndarray, np.ndarray]:
            sizes = [len(character.encode("utf-8")) for character in text]
            first = np.repeat(np.arange(len(text)), sizes)
            return self.encode(text), np.stack([first, first + 1], axis=-1)

        return _without_template(part, texts, pairs)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text. Id 256 has no text, so ``skip_special_tokens`` changes nothing."""
        array = _checked(ids, self.vocab_size)
        return array[array != self.end_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        _write_json(Path(directory) / _OWN_FILE, {"type": "byte"})


@dataclasses.dataclass(frozen=True)
class CharTokenizer(_Inputs):
    """One id per character: id ``i`` is ``characters[i]``. It has no end of a document.

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
        if len(set(self.characters)) != len(self.characters):
            twice = next(c for i, c in enumerate(self.characters) if c in self.characters[:i])
            raise ValueError(f"characters must be distinct, got {twice!r} more than once; try CharTokenizer.from_text")

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The distinct characters of ``text``, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32. Raises ValueError naming the first character that is not among ``characters``."""
        known, points = _code_points(self.characters), _code_points(text)
        order = np.argsort(known)
        places = np.searchsorted(known, points, sorter=order)
        ids = order[np.minimum(places, len(known) - 1)]
        unknown = np.flatnonzero(known[ids] != points)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the {self.vocab_size} "
                f"characters of this tokenizer: build it from text that has it, or use ByteTokenizer"
            )
        return ids.astype(np.int32)

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        def part(text: str) -> tuple[np.ndarray, np.ndarray]:
            first = np.arange(len(text))
            return self.encode(text), np.stack([first, first + 1], axis=-1)

        return _without_template(part, texts, pairs)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text. There are no special tokens, so ``skip_special_tokens`` changes nothing."""
        return "".join(self.characters[i] for i in _checked(ids, self.vocab_size))

    def save(self, directory: str | Path) -> None:
        _write_json(Path(directory) / _OWN_FILE, {"type": "character", "characters": self.characters})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


class PretrainedTokenizer(_Inputs):
    """A ``tokenizers.Tokenizer``, as published beside a checkpoint or trained (needs the extra ``tokenizers``).

    ``encode`` adds no special tokens, but those spelled in the text become their ids; ``decode`` spells them.

    Args:
        backend: the ``tokenizers.Tokenizer``. Its padding and truncation are switched off, and saved again.
        special_tokens: the token of each role in ``ROLES``; None: there is none. A role that is not named has the
            first token that published vocabularies use for it and this vocabulary has.
        files: contents of the files that ``save`` writes beside ``tokenizer.json``, by name.

    Raises:
        ValueError: an unknown role, or a token that is not in the vocabulary.

    Attributes:
        special_tokens: the token of each role, as text; only roles that the tokenizer has.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str | None] | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.backend = backend
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens = _special_tokens(backend, special_tokens or {})
        self.special_ids = SpecialIds(**{role: backend.token_to_id(t) for role, t in self.special_tokens.items()})
        # BERT's vocabularies have no token for the end of a document: [SEP] ends each of its texts.
        end_token = self.special_tokens.get("eos", self.special_tokens.get("sep"))
        self.end_id: int | None = None if end_token is None else backend.token_to_id(end_token)
        self._files = dict(files or {})
        # A padding or truncating tokenizer.json would lengthen or cut every text.
        self._lengths: dict[str, Any] = {"padding": None, "truncation": None}
        if backend.padding is not None or backend.truncation is not None:
            content = json.loads(backend.to_str())
            self._lengths = {name: content[name] for name in self._lengths}
        backend.no_padding()
        backend.no_truncation()
        template = backend.encode("").ids
        self._context_first = bool(template) and template[-1] == self.special_ids.cls

    @classmethod
    def from_directory(cls, directory: str | Path) -> PretrainedTokenizer:
        """From ``tokenizer.json``, or from the ``vocab.json`` and ``merges.txt`` of GPT-2's byte-level BPE.

        The special tokens are those of ``tokenizer_config.json``, then of ``special_tokens_map.json``, then of the
        ids in ``config.json``, then of the template in ``tokenizer.json``; a role that no file names has a well-known
        token of the vocabulary. ``save`` writes all the files of the tokenizer back unchanged.

        Raises:
            ImportError: the package ``tokenizers`` is not installed.
            ValueError: a file cannot be parsed, or names a token that is not in the vocabulary.
        """
        directory = Path(directory)
        backend = _read_backend(directory)
        files = {name: (directory / name).read_bytes() for name in _KEPT_FILES if (directory / name).is_file()}
        return cls(backend, _declared_tokens(directory, backend), files=files)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return [_as_encoding(encoding) for encoding in self.backend.encode_batch(inputs)]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text of ids ``[tokens]``, with the special tokens spelled.

        Args:
            skip_special_tokens: leave them out.
        """
        return self.backend.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers and ``load_tokenizer`` open."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        integrity.forget_checksums(directory, TOKENIZER_FILES)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)
        if "tokenizer_config.json" not in self._files:
            _write_json(directory / "tokenizer_config.json", self._fresh_config())
        whole = {**json.loads(self.backend.to_str()), **self._lengths}
        text = json.dumps(whole, indent=2, ensure_ascii=False)
        (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")

    def _fresh_config(self) -> dict[str, Any]:
        """``tokenizer_config.json`` of a tokenizer that came without one."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": token for role, token in self.special_tokens.items()},
        }


def _special_tokens(backend: Any, given: Mapping[str, str | None]) -> dict[str, str]:
    """The token of each role that the tokenizer has: the given one, or else a well-known one."""
    unknown = [role for role in given if role not in ROLES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a role of special tokens: choose from {', '.join(ROLES)}")
    tokens = {}
    for role in ROLES:
        known = (token for token in _KNOWN_TOKENS[role] if backend.token_to_id(token) is not None)
        token = given[role] if role in given else next(known, None)
        if token is None:
            continue
        if backend.token_to_id(token) is None:
            name = "end" if role == "eos" else role
            raise ValueError(f"{name} token {token!r} is not in the vocabulary of the tokenizer")
        tokens[role] = token
    return tokens


def _read_backend(directory: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a directory."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"the tokenizer in {directory} needs the package `tokenizers`: pip install 'jaxlm[tokenizers]'"
        ) from error
    file, vocab = directory / "tokenizer.json", directory / "tokenizer.json"
    if not file.exists():
        file, vocab = directory / "merges.txt", directory / "vocab.json"
        read_object(vocab)  # refuses a token that occurs twice
    try:
        if file.name == "tokenizer.json":
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:
            backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(file)))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = tokenizers.decoders.ByteLevel()
            if backend.token_to_id("<|endoftext|>") is not None:
                backend.add_special_tokens(["<|endoftext|>"])
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"cannot read the tokenizer {file}: {error}") from error
    _check_distinct(backend.get_vocab(), vocab)
    return backend


def _check_distinct(vocab: Mapping[str, int], file: Path) -> None:
    """Raise ``ValueError`` for two tokens with one id: only one of them could be decoded."""
    tokens: dict[int, str] = {}
    for token, number in sorted(vocab.items()):
        if number in tokens:
            raise ValueError(
                f"{file}: the tokens {tokens[number]!r} and {token!r} have the same id {number}: give each its own"
            )
        tokens[number] = token


def _declared_tokens(directory: Path, backend: Any) -> dict[str, str | None]:
    """The special tokens that the files of a directory name, by role; a role that no file names is left out."""
    declared: dict[str, str | None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_object(directory / name) if (directory / name).exists() else {}
        for role in ROLES:
            if f"{role}_token" in content and role not in declared:
                token = content[f"{role}_token"]
                declared[role] = token["content"] if isinstance(token, dict) else token
    config = read_object(directory / "config.json") if (directory / "config.json").exists() else {}
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    processor = {} if backend.post_processor is None else json.loads(backend.post_processor.__getstate__())
    for role in ROLES:
        ids = config.get(f"{role}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if role not in declared and isinstance(first, int) and first in added:  # class defaults may be no special token
            declared[role] = added[first]
        if role not in declared and processor.get("type") in ("BertProcessing", "RobertaProcessing"):
            token, _ = processor.get(role, (None, None))
            declared |= {} if token is None else {role: token}
    return declared


def _as_encoding(encoding: Any) -> Encoding:
    """Arrays of a ``tokenizers.Encoding``."""
    sequence = [encodings.SPECIAL if number is None else number for number in encoding.sequence_ids]
    return Encoding(
        ids=np.asarray(encoding.ids, np.int32),
        token_types=np.asarray(encoding.type_ids, np.int32),
        offsets=np.asarray(encoding.offsets, np.int32).reshape(-1, 2),
        sequence=np.asarray(sequence, np.int32),
    )


def _without_template(
    part: Callable[[str], tuple[np.ndarray, np.ndarray]], texts: Sequence[str], pairs: Sequence[str] | None
) -> list[Encoding]:
    """Texts, or pairs one after the other, of a tokenizer without special tokens."""
    rows = [(text,) for text in texts] if pairs is None else list(zip(texts, pairs, strict=True))
    return [encodings.joined([part(text) for text in row]) for row in rows]


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory: ``jaxlm_tokenizer.json``, ``tokenizer.json``, or ``vocab.json`` + ``merges.txt``.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: the file cannot be understood.
    """
    directory = Path(directory)
    own = directory / _OWN_FILE
    integrity.verify_checksums(directory, TOKENIZER_FILES)
    if own.exists():
        content = read_object(own)
        match content:
            case {"type": "byte"}:
                return ByteTokenizer()
            case {"type": "character", "characters": str(characters)}:
                return CharTokenizer(characters)
            case {"type": "moves"}:
                from jaxlm.data.moves import MoveTokenizer  # it imports this module

                return MoveTokenizer.from_json(content)
        raise ValueError(f'{own} describes no known tokenizer: "type" is {content.get("type")!r}')
    if (directory / "tokenizer.json").exists() or all(
        (directory / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        return PretrainedTokenizer.from_directory(directory)
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
    raise FileNotFoundError(
        f"no tokenizer in {directory}: looked for {_OWN_FILE}, tokenizer.json, vocab.json + merges.txt; found {there}"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    integrity.forget_checksums(path.parent, (path.name,))
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

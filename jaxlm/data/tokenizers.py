"""Tokenizers: text to integer ids and back. Bytes and characters are built in; the others are loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_OWN_FILE = "jaxlm_tokenizer.json"
_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""What published vocabularies call the end of a document, tried in this order when no configuration says it."""


class Tokenizer(Protocol):
    """What the rest of the library needs from a tokenizer. Both directions are pure.

    Attributes:
        vocab_size: ids are ``0 <= id < vocab_size``.
        end_id: the id that ends a document, None where there is none. ``encode`` never adds it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_id(self) -> int | None: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 ``[tokens]``."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids ``[tokens]``. Raises ValueError for an id outside the vocabulary."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write what :func:`load_tokenizer` reads, into a directory that is made if missing."""
        ...


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
class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 for the end of a document.

    ``decode`` shows bytes that are no whole character (a sequence cut in the middle) as U+FFFD; id 256 has no text.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
    """

    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = _checked(ids, self.vocab_size)
        return array[array != self.end_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        _write_json(Path(directory) / _OWN_FILE, {"type": "byte"})


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One id per character: id ``i`` is ``characters[i]``. It has no end of a document.

    Example:
        >>> CharTokenizer.from_text("to be").encode("bet").tolist()
        [1, 2, 4]
    """

    characters: str
    end_id = None

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

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(self.characters[i] for i in _checked(ids, self.vocab_size))

    def save(self, directory: str | Path) -> None:
        _write_json(Path(directory) / _OWN_FILE, {"type": "character", "characters": self.characters})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


class PretrainedTokenizer:
    """A ``tokenizers.Tokenizer``, as published beside a checkpoint (needs the extra ``jaxlm[tokenizers]``).

    ``encode`` adds no special tokens, but those spelled in the text become their ids; ``decode`` spells them.

    Args:
        backend: the ``tokenizers.Tokenizer``.
        end_token: the token that ends a document; None: the first known name that the vocabulary has, if any.
    """

    def __init__(self, backend: Any, end_token: str | None = None) -> None:
        if end_token is None:
            end_token = next((token for token in _END_TOKENS if backend.token_to_id(token) is not None), None)
        elif backend.token_to_id(end_token) is None:
            raise ValueError(f"end token {end_token!r} is not in the vocabulary of the tokenizer")
        self.backend = backend
        self.end_token = end_token
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_id: int | None = None if end_token is None else backend.token_to_id(end_token)

    @classmethod
    def from_directory(cls, directory: str | Path) -> PretrainedTokenizer:
        """From ``tokenizer.json``, or from the ``vocab.json`` and ``merges.txt`` of GPT-2's byte-level BPE.

        Raises:
            ImportError: the package ``tokenizers`` is not installed.
            ValueError: a file cannot be parsed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"the tokenizer in {directory} needs the package `tokenizers`: pip install 'jaxlm[tokenizers]'"
            ) from error
        directory = Path(directory)
        file = directory / "tokenizer.json"
        try:
            if file.exists():
                backend = tokenizers.Tokenizer.from_file(str(file))
            else:
                file = directory / "merges.txt"
                backend = tokenizers.Tokenizer(
                    tokenizers.models.BPE.from_file(str(directory / "vocab.json"), str(file))
                )
                backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
                backend.decoder = tokenizers.decoders.ByteLevel()
                if backend.token_to_id("<|endoftext|>") is not None:
                    backend.add_special_tokens(["<|endoftext|>"])
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"cannot read the tokenizer {file}: {error}") from error
        # A padded or truncating tokenizer.json would lengthen or cut every text.
        backend.no_padding()
        backend.no_truncation()
        config = directory / "tokenizer_config.json"
        end = _read_json(config).get("eos_token") if config.exists() else None
        return cls(backend, end["content"] if isinstance(end, dict) else end)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.backend.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.end_token is not None:
            config["eos_token"] = self.end_token
        _write_json(Path(directory) / "tokenizer_config.json", config)
        self.backend.save(str(Path(directory) / "tokenizer.json"))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a directory: ``jaxlm_tokenizer.json``, ``tokenizer.json``, or ``vocab.json`` + ``merges.txt``.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: the file cannot be understood.
    """
    directory = Path(directory)
    own = directory / _OWN_FILE
    if own.exists():
        content = _read_json(own)
        match content:
            case {"type": "byte"}:
                return ByteTokenizer()
            case {"type": "character", "characters": str(characters)}:
                return CharTokenizer(characters)
        raise ValueError(f'{own} describes no known tokenizer: "type" is {content.get("type")!r}')
    if (directory / "tokenizer.json").exists() or all(
        (directory / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        return PretrainedTokenizer.from_directory(directory)
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
    raise FileNotFoundError(
        f"no tokenizer in {directory}: looked for {_OWN_FILE}, tokenizer.json, vocab.json + merges.txt; found {there}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Token files: one ``.npy`` array of ids, written as a stream, read as a memory map, checked before use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_CHUNK = 1 << 22  # ids looked at together: bounds the memory of a scan


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def check_row(ids: np.ndarray, needed: int = 1, what: str = "tokens") -> None:
    """Raise ``ValueError`` unless ``ids`` is one row of at least ``needed`` integers; ``what`` begins the message."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{what}: expected one row of integer ids, got {ids.dtype}{list(ids.shape)}")
    if len(ids) < needed:
        have = f"{len(ids)} tokens" if len(ids) else "no tokens at all"
        raise ValueError(f"{what}: {have}, at least {needed} needed; give more data, or a shorter length or batch")


def check_tokens(ids: np.ndarray, vocab_size: int, needed: int = 1, what: str = "tokens", first: int = 0) -> None:
    """:func:`check_row`, and every id must lie in the vocabulary. Reads all of ``ids``, a chunk at a time.

    Args:
        what: what the ids are, e.g. the name of a file.
        first: position of ``ids[0]`` in the whole, for the message.
    """
    check_row(ids, needed, what)
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            at = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
            raise ValueError(
                f"{what}: id {chunk[at]} at position {first + start + at} is outside the vocabulary of {vocab_size} "
                f"ids; use the tokenizer that wrote them, or a model with a larger vocab_size"
            )


def write_tokens(path: str | Path, ids: np.ndarray | Iterable[np.ndarray], vocab_size: int) -> int:
    """Write ids (one array, or many in turn: never more than one in memory) to ``path``; returns how many.

    The file appears when it is complete, and not at all when an id is bad or there are none (``ValueError``).

    Example:
        >>> write_tokens("train.npy", (tokenizer.encode(text) for text in texts), tokenizer.vocab_size)
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    dtype, total = token_dtype(vocab_size), 0
    try:
        with open(partial, "wb") as file:
            # The header leaves room for the count to grow, so the true one fits over this one.
            _write_header(file, dtype, 0)
            body = file.tell()
            for chunk in [ids] if isinstance(ids, np.ndarray) else ids:
                if not isinstance(chunk, np.ndarray):
                    raise ValueError(
                        f"ids for {path} must be an array or an iterable of arrays, got {type(chunk).__name__}"
                    )
                check_tokens(chunk, vocab_size, needed=0, what=f"ids for {path}", first=total)
                file.write(chunk.astype(dtype).tobytes())
                total += len(chunk)
            if not total:
                raise ValueError(f"ids for {path}: no tokens at all")
            file.seek(0)
            _write_header(file, dtype, total)
            assert file.tell() == body
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return total


def _write_header(file: object, dtype: np.dtype, count: int) -> None:
    np.lib.format.write_array_header_1_0(
        file,  # type: ignore[arg-type]
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)},
    )


def open_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """The ids ``[tokens]`` of a file, memory-mapped and read-only; every id is checked once, now.

    Raises:
        ValueError: not a whole ``.npy`` file, empty, not one row of integers, or an id outside the vocabulary.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole token file (.npy): {error}") from error
    check_tokens(ids, vocab_size, what=str(path))
    return ids


def split(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) views of ``tokens``: the last ``validation_fraction`` of them is for validation."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    border = int(len(tokens) * (1 - validation_fraction))
    if border in (0, len(tokens)):
        raise ValueError(
            f"{len(tokens)} tokens cannot be split with validation_fraction {validation_fraction}: one part is empty"
        )
    return tokens[:border], tokens[border:]


def split_documents(tokens: np.ndarray, end_id: int) -> list[np.ndarray]:
    """Views of the documents in ``tokens``, each with the ``end_id`` that ends it (the last may lack it)."""
    borders = np.flatnonzero(tokens == end_id) + 1
    return [document for document in np.split(tokens, borders) if len(document)]

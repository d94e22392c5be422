"""Token files: ``.npy`` files with one 1-D array of token ids, written in chunks and read as a memory map."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TOKEN_FIELDS = ("tokens", "source", "target")
"""The fields of encoded examples that contain token ids. Integers in other fields, such as labels, are not ids."""
_CHUNK = 1 << 22  # number of ids that are checked at a time, to limit the memory of a check


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a token file: uint16 if it can represent every id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def check_ids_1d(ids: np.ndarray, min_length: int = 1, name: str = "tokens") -> None:
    """Raise ``ValueError`` if ``ids`` is not a 1-D array of at least ``min_length`` integers.

    Args:
        name: the name of the ids. The message begins with this name.
    """
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"{name}: expected a 1-D array of integer ids, got a {type(ids).__name__}: use np.asarray")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected a 1-D array of integer ids, got {ids.dtype}{list(ids.shape)}")
    if len(ids) < min_length:
        count = f"{len(ids)} tokens" if len(ids) else "no tokens"
        fix = "remove it or use other data" if min_length == 1 else "use more data, or a smaller length or batch"
        raise ValueError(f"{name}: {count}, at least {min_length} needed; {fix}")


def check_tokens(
    ids: np.ndarray, vocab_size: int, min_length: int = 1, name: str = "tokens", first_position: int = 0
) -> None:
    """Raise ``ValueError`` if ``ids`` fails :func:`check_ids_1d`, or if an id is not in [0, ``vocab_size``).

    The function reads all ids, one chunk at a time.

    Args:
        name: the name of the ids in messages, for example the name of a file.
        first_position: the position of ``ids[0]`` in the data set. The message adds it to the index of the id.
    """
    check_ids_1d(ids, min_length, name)
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            index = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
            raise ValueError(
                f"{name}: id {chunk[index]} at position {first_position + start + index} is outside the vocabulary of "
                f"{vocab_size} ids; use ids of the model's tokenizer, or a larger vocabulary"
            )


def write_tokens(path: str | Path, ids: np.ndarray | Iterable[np.ndarray], vocab_size: int) -> int:
    """Write ids to a token file. Returns the number of ids.

    The function writes a temporary file in the directory of ``path`` and renames it to ``path`` at the end. So ``path``
    is never an incomplete file.

    Args:
        ids: one 1-D array, or an iterable of 1-D arrays. The file contains their concatenation. The function keeps
            only one of these arrays in memory.
        vocab_size: number of ids of the vocabulary. It selects the dtype of the file (:func:`token_dtype`).

    Raises:
        ValueError: an id is outside the vocabulary, there are no ids, or an element of ``ids`` is not a 1-D array of
            integers. Then no file is written, and an existing file stays as it is.

    Example:
        >>> write_tokens("train.npy", (tokenizer.encode(text) for text in texts), tokenizer.vocab_size)
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    dtype, total = token_dtype(vocab_size), 0
    try:
        with open(partial, "wb") as file:
            # At the end, a header with the final count replaces this header. NumPy pads both to the same size.
            _write_header(file, dtype, 0)
            header_size = file.tell()
            for chunk in [ids] if isinstance(ids, np.ndarray) else ids:
                check_tokens(chunk, vocab_size, min_length=0, name=f"ids for {path}", first_position=total)
                file.write(chunk.astype(dtype).tobytes())
                total += len(chunk)
            if not total:
                raise ValueError(f"ids for {path}: no tokens")
            file.seek(0)
            _write_header(file, dtype, total)
            assert file.tell() == header_size
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
    """The ids ``[tokens]`` of a token file, as a read-only memory map. The function checks every id.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete ``.npy`` file, has no ids, is not a 1-D array of integers, or has an id
            outside the vocabulary.
    """
    with open(path, "rb") as file:
        if file.read(2) == b"PK":  # the first bytes of a zip file; np.load would accept an .npz file
            raise ValueError(f"{path} is an archive of arrays (.npz), not a token file (.npy)")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a complete token file (.npy): {error}") from error
    check_tokens(ids, vocab_size, name=str(path))
    return ids


def split_tokens(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Two views of ``tokens``: the training tokens, and the last ``validation_fraction`` of the tokens for validation.

    Raises:
        ValueError: ``validation_fraction`` is not between 0 and 1 (both excluded), or a view would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    # Without 1e-15, a rounding error could make the boundary too small by 1: 10 * (1 - 0.9) is 0.9999999999999998.
    boundary = int(len(tokens) * (1 - validation_fraction + 1e-15))
    if boundary in (0, len(tokens)):
        raise ValueError(
            f"{len(tokens)} tokens cannot be split with validation_fraction {validation_fraction}, because one part "
            "would be empty: use more tokens or another fraction"
        )
    return tokens[:boundary], tokens[boundary:]


def split_documents(tokens: np.ndarray, end_id: int) -> list[np.ndarray]:
    """Views of the documents in ``tokens``. Each document ends with ``end_id``; only the last may end without it."""
    boundaries = np.flatnonzero(tokens == end_id) + 1
    return [document for document in np.split(tokens, boundaries) if len(document)]

"""Batches as pure functions of the step number.

``Source.batch(index, rows)`` returns the given rows of the batch of step ``index``. Calls may come in any order. So an
iterator only needs to save the step number, a resumed run reads the same batches, and each process reads only its own
rows of the global batch.

Shapes: B batch size, T sequence length. A row has T + 1 tokens: ``tokens[:, :-1]`` are the inputs, and
``tokens[:, 1:]`` are the targets.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.config import check_min
from jaxlm.data.tokens import check_ids_1d, check_tokens
from jaxlm.spec import State


class TokenBatch(NamedTuple):
    """A batch of token rows, as a pytree of numpy arrays.

    Attributes:
        tokens: ``[B, T+1]`` int32.
        segment_ids: ``[B, T+1]`` int32: 1, 2, ... for the documents (or pieces of documents) of a row, and 0 for
            padding. None: each row is one segment without padding.
        reset: ``[B]`` bool, True for rows whose model state must be reset. None: no state is carried between batches.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None = None
    reset: np.ndarray | None = None


class Source(Protocol):
    """The protocol of a data set whose batches are functions of the step number.

    ``batch_size`` is the number of rows of the global batch. The constructor of a source checks all arguments.
    """

    @property
    def batch_size(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows in one epoch. Step i begins in epoch ``i * batch_size // rows_per_epoch``."""
        ...

    def batch(self, index: int, rows: Sequence[int]) -> Any:
        """The given rows of the global batch of step ``index``, as a ``TokenBatch`` or the source's own batch type."""
        ...

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if a token id or the padding id is outside the vocabulary. Reads all data once."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """A JSON-compatible description of the source.

        A saved state of an iterator is valid only for a source with the same fingerprint.
        """
        ...


def permute(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The images of the indices ``[n]`` under a pseudo-random permutation of ``range(count)``.

    The permutation is not stored: each image is computed from its index. A Feistel network permutes the numbers below a
    power of four that is at least ``count``. The network is applied repeatedly until the value is below ``count``
    (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Each (seed, epoch) has its own
    permutation.
    """
    half_bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    value = index.astype(np.uint64)
    is_outside = np.ones(value.shape, bool)
    while is_outside.any():
        left, right = value[is_outside] >> half_bits, value[is_outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[is_outside] = (left << half_bits) | right
        is_outside = value >= count
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of ``x`` with the finalizer of SplitMix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled_indices(step: int, rows: Sequence[int], batch_size: int, count: int, seed: int) -> np.ndarray:
    """The item index of each given row of a step. Each epoch is another permutation of ``range(count)``."""
    position = step * batch_size + np.asarray(rows, np.int64)
    items = np.empty_like(position)
    for epoch in np.unique(position // count):
        in_epoch = position // count == epoch
        items[in_epoch] = permute(position[in_epoch] % count, count, seed, int(epoch))
    return items


def _checksum(tokens: np.ndarray) -> int:
    """CRC-32 of all tokens, independent of their dtype. The tokens are read once, in order."""
    checksum = 0
    for start in range(0, len(tokens), _CHECKSUM_CHUNK):
        chunk = np.asarray(tokens[start : start + _CHECKSUM_CHUNK]).astype("<u4")
        checksum = zlib.crc32(chunk.tobytes(), checksum)
    return checksum


_CHECKSUM_CHUNK = 1 << 20
"""Number of tokens that a checksum copies from a memory map into memory at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class _TokenWindows:
    """Base class of sources whose rows are windows of one token array. A subclass chooses the windows of a batch."""

    tokens: np.ndarray
    length: int
    batch_size: int

    def check(self, vocab_size: int) -> None:
        check_tokens(self.tokens, vocab_size)

    def fingerprint(self) -> dict[str, Any]:
        return source_fingerprint(self, tokens=len(self.tokens), checksum=_checksum(self.tokens))

    def _windows(self, starts: np.ndarray) -> np.ndarray:
        """The windows that begin at ``starts``, int32 [rows, T + 1]."""
        return np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows(_TokenWindows):
    """Windows of one token array, in random order. They start at 0, ``stride``, 2 ``stride``, ...

    All windows are complete, so with ``stride > 1``, the last tokens may be in no window. Each window
    occurs exactly once per epoch, and each epoch has a different order. A batch may contain the last windows of one
    epoch and the first windows of the next epoch. So no window is dropped at the end of an epoch.

    Args:
        tokens: ``[N]`` ids. If ``tokens`` is a memory map, a batch reads only its own windows.
        length: T.
        batch_size: B.
        seed: seed of the order.
        stride: distance between window starts. With ``stride=length`` the inputs of windows do not overlap. With
            a larger stride, some tokens are never inputs.

    Raises:
        ValueError: ``tokens`` is not a 1-D array of at least ``length + 1`` integers; ``length``, ``batch_size`` or
            ``stride`` is below 1; or ``seed`` is negative.
    """

    seed: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        check_min(1, length=self.length, batch_size=self.batch_size, stride=self.stride)
        check_min(0, seed=self.seed)
        check_ids_1d(self.tokens, self.length + 1, f"random windows of length {self.length} (plus 1 target)")

    @property
    def rows_per_epoch(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def batch(self, index: int, rows: Sequence[int]) -> TokenBatch:
        windows = shuffled_indices(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        return TokenBatch(self._windows(windows * self.stride))


@dataclasses.dataclass(frozen=True, eq=False)
class ContiguousStreams(_TokenWindows):
    """``batch_size`` contiguous streams of one token array. Each batch continues the rows of the previous batch.

    This is the order for truncated backpropagation through time. ``reset`` is True in the first batch of an epoch,
    because this batch begins at the start of every stream. Two kinds of targets are dropped: those at the end of a
    stream that do not fill a window, and those at the end of the array that no stream contains. ``num_dropped_tokens``
    counts both.

    Args:
        tokens: ``[N]`` ids.
        length: T.
        batch_size: B.

    Raises:
        ValueError: ``tokens`` is not a 1-D array of at least ``batch_size * length + 1`` integers, or ``length`` or
            ``batch_size`` is below 1.
    """

    def __post_init__(self) -> None:
        check_min(1, length=self.length, batch_size=self.batch_size)
        description = f"{self.batch_size} streams of length {self.length} (plus 1 target)"
        check_ids_1d(self.tokens, self.batch_size * self.length + 1, description)

    @property
    def steps_per_epoch(self) -> int:
        return (len(self.tokens) - 1) // self.batch_size // self.length

    @property
    def rows_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def num_dropped_tokens(self) -> int:
        """Number of tokens that are never a target. The first token, which cannot be a target, does not count."""
        return len(self.tokens) - 1 - self.rows_per_epoch * self.length

    def batch(self, index: int, rows: Sequence[int]) -> TokenBatch:
        step = index % self.steps_per_epoch
        width = (len(self.tokens) - 1) // self.batch_size
        starts = np.asarray(rows, np.int64) * width + step * self.length
        return TokenBatch(self._windows(starts), reset=np.full(len(rows), step == 0))


@dataclasses.dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Documents packed into rows. ``segment_ids`` distinguish the documents of a row.

    A document that is longer than a row is split into pieces, and each piece is a separate segment. A piece begins with
    the last token of the previous piece, so every token of a document except the first is a target exactly once. The
    pieces are shuffled with the seed. Each piece goes into the row in which it leaves the least free space (best fit),
    or into a new row if it fits into no row. Each epoch visits the rows in a different random order.

    Args:
        documents: 1-D arrays of ids. No document may be empty.
        length: T.
        batch_size: B.
        seed: seed of the order of pieces and rows.
        pad_id: the id of padding tokens. Their segment id is 0.

    Raises:
        ValueError: there is no document; a document is empty or not a 1-D array of integers; ``length`` or
            ``batch_size`` is below 1; or ``seed`` or ``pad_id`` is negative.
    """

    documents: Sequence[np.ndarray]
    length: int
    batch_size: int
    seed: int = 0
    pad_id: int = 0
    _pieces: np.ndarray = dataclasses.field(init=False, repr=False)  # [pieces, 3]: document, start, stop; sorted by row
    _row_starts: np.ndarray = dataclasses.field(init=False, repr=False)  # [rows + 1], indices into _pieces

    def __post_init__(self) -> None:
        check_min(1, length=self.length, batch_size=self.batch_size)
        check_min(0, seed=self.seed, pad_id=self.pad_id)
        if not len(self.documents):
            raise ValueError("no documents to pack")
        for number, document in enumerate(self.documents):
            check_ids_1d(document, name=f"document {number}")
        pieces = np.asarray(
            [
                (number, start, min(start + self.length + 1, len(document)))
                for number, document in enumerate(self.documents)
                for start in range(0, max(1, len(document) - 1), self.length)
            ]
        )
        pieces = pieces[np.random.default_rng(self.seed).permutation(len(pieces))]
        row_of_piece = _best_fit((pieces[:, 2] - pieces[:, 1]).tolist(), self.length + 1)
        object.__setattr__(self, "_pieces", pieces[np.argsort(row_of_piece, kind="stable")])
        object.__setattr__(self, "_row_starts", np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))]))

    @property
    def rows_per_epoch(self) -> int:
        return len(self._row_starts) - 1

    @property
    def efficiency(self) -> float:
        """Fraction of positions that are not padding."""
        return float((self._pieces[:, 2] - self._pieces[:, 1]).sum() / (self.rows_per_epoch * (self.length + 1)))

    def batch(self, index: int, rows: Sequence[int]) -> TokenBatch:
        tokens = np.full((len(rows), self.length + 1), self.pad_id, np.int32)
        segment_ids = np.zeros_like(tokens)
        packed = shuffled_indices(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        for batch_row, row in enumerate(packed):
            position = 0
            pieces = self._pieces[self._row_starts[row] : self._row_starts[row + 1]]
            for segment, (number, start, stop) in enumerate(pieces, start=1):
                end = position + stop - start
                tokens[batch_row, position:end] = self.documents[number][start:stop]
                segment_ids[batch_row, position:end] = segment
                position = end
        return TokenBatch(tokens, segment_ids)

    def check(self, vocab_size: int) -> None:
        check_tokens(np.asarray([self.pad_id]), vocab_size, name="pad_id")
        for number, document in enumerate(self.documents):
            check_tokens(document, vocab_size, name=f"document {number}")

    def fingerprint(self) -> dict[str, Any]:
        lengths = np.asarray([len(document) for document in self.documents])
        sums = np.asarray([_checksum(document) for document in self.documents])
        return source_fingerprint(
            self, documents=len(lengths), tokens=int(lengths.sum()), checksum=_checksum(np.concatenate([lengths, sums]))
        )


def _best_fit(sizes: Sequence[int], capacity: int) -> np.ndarray:
    """The row index of each item: the row with the smallest sufficient free space, or else a new row."""
    row_of_item, num_rows = [], 0
    free_sizes: list[int] = []  # distinct, ascending
    rows_by_free_size: dict[int, list[int]] = collections.defaultdict(list)
    for size in sizes:
        index = bisect.bisect_left(free_sizes, size)
        if index == len(free_sizes):
            row, space, num_rows = num_rows, capacity, num_rows + 1
        else:
            space = free_sizes[index]
            row = rows_by_free_size[space].pop()
            if not rows_by_free_size[space]:
                del free_sizes[index]
        row_of_item.append(row)
        if space > size:
            if not rows_by_free_size[space - size]:
                bisect.insort(free_sizes, space - size)
            rows_by_free_size[space - size].append(row)
    return np.asarray(row_of_item)


def source_fingerprint(source: Any, **data_summary: int) -> dict[str, Any]:
    """The fingerprint of a source: its class name, its integer and boolean fields, and ``data_summary``.

    Args:
        data_summary: numbers that describe the data, such as size and checksum.
    """
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    numbers = {name: int(value) for name, value in fields.items() if isinstance(value, int | np.integer)}
    return {"kind": type(source).__name__, **numbers, **data_summary}


class Batches(Iterator[Any]):
    """An infinite iterator over the batches of a source. Each batch has only the rows of this process.

    The state is ``{"next": step of the next batch, "source": fingerprint}``. It is the same in every process and for
    any number of processes. With ``prefetch``, a thread makes the next batches while the device computes. The state
    counts only the batches that the caller has received.

    Args:
        source: the data set.
        rows: the rows of this process. With several processes, pass ``sharding.local_rows(batch_size)``. None: all
            rows.
        to_batch: a pure function from the source's batch (for example a ``TokenBatch``) to the batch of an objective.
            None: the iterator yields the source's batch.
        prefetch: number of batches that a thread makes in advance. 0: each batch is made when it is requested.

    Raises:
        ValueError: ``rows`` is empty, has a row that is not in the batch or has a row twice, or ``prefetch`` is
            negative.

    Example:
        >>> batches = Batches(RandomWindows(tokens, length=256, batch_size=64), to_batch=to_batch)
        >>> batch = next(batches)
        >>> saved = json.dumps(batches.state())
    """

    def __init__(
        self,
        source: Source,
        rows: Sequence[int] | None = None,
        *,
        to_batch: Callable[[Any], Any] | None = None,
        prefetch: int = 0,
    ) -> None:
        size = source.batch_size
        self.source = source
        self.rows = range(size) if rows is None else np.asarray(rows).tolist()
        are_valid = all(type(row) is int and 0 <= row < size for row in self.rows)
        if not self.rows or not are_valid or len(set(self.rows)) < len(self.rows):
            raise ValueError(
                f"rows={self.rows} must be one or more of the rows 0 to {size - 1} of a batch of {size}, without "
                "duplicates"
            )
        check_min(0, prefetch=prefetch)
        self._to_batch = to_batch or (lambda batch: batch)
        self._next = 0
        self._fingerprint = source.fingerprint()
        self._prefetch = prefetch
        self._executor = concurrent.futures.ThreadPoolExecutor(1) if prefetch else None
        self._pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()

    def _make_batch(self, index: int) -> Any:
        return self._to_batch(self.source.batch(index, self.rows))

    def __next__(self) -> Any:
        if self._executor is None:
            batch = self._make_batch(self._next)
        else:
            while len(self._pending) <= self._prefetch:
                self._pending.append(self._executor.submit(self._make_batch, self._next + len(self._pending)))
            try:
                batch = self._pending[0].result()
            except Exception:
                self._pending.clear()  # so that the next call makes this batch again
                raise
            self._pending.popleft()
        self._next += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The JSON-compatible state of the iterator."""
        return {"next": self._next, "source": dict(self._fingerprint)}

    def restore(self, state: State) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: ``state`` is not the state of an iterator, or was saved for a different source. In the second
                case, the message lists all differences with both values.
        """
        match state:
            case {"next": int(step), "source": dict(saved)} if type(step) is int and step >= 0:
                pass
            case _:
                raise ValueError(f"not the state of an iterator: {state!r}")
        current = self._fingerprint
        differences = [
            f"{name}: saved {saved.get(name)!r}, now {current.get(name)!r}"
            for name in {**current, **saved}
            if saved.get(name) != current.get(name)
        ]
        if differences:
            raise ValueError("the saved iterator read other data:\n  " + "\n  ".join(differences))
        self._next = step
        self._pending.clear()

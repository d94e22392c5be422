"""Batches as pure functions of the step number.

A source returns ``batch(index, rows)`` for any step in any order. So the state of the iterator is one number, a run
resumes exactly, and each of P processes reads its own rows of the same global batch.

    B batch rows    T length: inputs are tokens[:, :-1], targets are tokens[:, 1:]
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

from jaxlm.data.tokens import check_row, check_tokens


class Window(NamedTuple):
    """Rows of one batch as numpy arrays; a pytree for JAX.

    Attributes:
        tokens: ``[B, T+1]`` int32.
        segment_ids: ``[B, T+1]`` int32, 1, 2, ... for the documents of a row and 0 for padding. None: each row is one
            document.
        reset: ``[B]`` bool, True for rows whose model state must be reset. None: no state is carried between batches.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None = None
    reset: np.ndarray | None = None


class Source(Protocol):
    """A data set with a fixed order of batches. The constructor checks all arguments."""

    @property
    def batch_size(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows in one epoch. Step i is in epoch ``i * batch_size // rows_per_epoch``."""
        ...

    def batch(self, index: int, rows: Sequence[int]) -> Any:
        """The given rows of the global batch of step ``index``: a ``Window``, or the batch type of the source."""
        ...

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if a token is outside the vocabulary. Reads all data once."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """A JSON-compatible description of the source. A saved state is valid only for a source with an equal one."""
        ...


def permute(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The images ``[n]`` of the indices ``[n]`` under a pseudo-random permutation of ``range(count)``, in O(1) memory.

    The permutation is a Feistel network on the next power of four. It is applied repeatedly until the value is below
    ``count`` (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Each (seed, epoch) has
    its own permutation.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    value = index.astype(np.uint64)
    is_outside = np.ones(value.shape, bool)
    while is_outside.any():
        left, right = value[is_outside] >> half, value[is_outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[is_outside] = (left << half) | right
        is_outside = value >= count
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(index: int, rows: Sequence[int], batch_size: int, count: int, seed: int) -> np.ndarray:
    """The items that the rows of step ``index`` read, if each epoch is a permutation of ``count`` items."""
    position = index * batch_size + np.asarray(rows, np.int64)
    items = np.empty_like(position)
    for epoch in np.unique(position // count):
        in_epoch = position // count == epoch
        items[in_epoch] = permute(position[in_epoch] % count, count, seed, int(epoch))
    return items


def _check_min(minimum: int, **numbers: int) -> None:
    """Raise ``ValueError`` if a number is below ``minimum``."""
    for name, value in numbers.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _slices(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``length + 1`` tokens from each start, int32 ``[rows, length + 1]``."""
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)


def _checksum(tokens: np.ndarray) -> int:
    """CRC-32 of all tokens, independent of their dtype. A memory map is read once, in order."""
    checksum = 0
    for start in range(0, len(tokens), _CHECKSUM_CHUNK):
        chunk = np.asarray(tokens[start : start + _CHECKSUM_CHUNK]).astype("<u4")
        checksum = zlib.crc32(chunk.tobytes(), checksum)
    return checksum


_CHECKSUM_CHUNK = 1 << 20
"""Number of tokens of a memory map that are copied into memory at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows:
    """Windows of one token array, in random order. Every multiple of ``stride`` is the start of a window.

    Each window occurs exactly once per epoch, and each epoch has another order. A batch may have the last windows of
    one epoch and the first windows of the next one, so no window is dropped.

    Args:
        tokens: ``[N]`` ids. If they are a memory map, a batch reads only its windows from it.
        length: T.
        batch_size: B.
        seed: seed of the order.
        stride: distance between window starts. With ``stride=length`` the inputs of windows do not overlap.

    Raises:
        ValueError: fewer than ``length + 1`` tokens, or a number is too small.
    """

    tokens: np.ndarray
    length: int
    batch_size: int
    seed: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        _check_min(1, length=self.length, batch_size=self.batch_size, stride=self.stride)
        _check_min(0, seed=self.seed)
        check_row(self.tokens, self.length + 1, f"random windows of length {self.length} (plus 1 target)")

    @property
    def rows_per_epoch(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def batch(self, index: int, rows: Sequence[int]) -> Window:
        windows = _shuffled(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        return Window(_slices(self.tokens, windows * self.stride, self.length))

    def check(self, vocab_size: int) -> None:
        check_tokens(self.tokens, vocab_size)

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self, tokens=len(self.tokens), checksum=_checksum(self.tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """``batch_size`` contiguous streams of one token array. Each batch continues the rows of the previous batch.

    This is the order for truncated backpropagation through time. Tokens that do not fill a last batch are dropped
    (``left_out`` counts them). ``reset`` is True in the first batch of an epoch, which starts again at the beginning of
    each column.

    Args:
        tokens: ``[N]`` ids.
        length: T.
        batch_size: B.

    Raises:
        ValueError: fewer than ``batch_size * length + 1`` tokens.
    """

    tokens: np.ndarray
    length: int
    batch_size: int

    def __post_init__(self) -> None:
        _check_min(1, length=self.length, batch_size=self.batch_size)
        what = f"{self.batch_size} columns of length {self.length} (plus 1 target)"
        check_row(self.tokens, self.batch_size * self.length + 1, what)

    @property
    def steps_per_epoch(self) -> int:
        return (len(self.tokens) - 1) // self.batch_size // self.length

    @property
    def rows_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def left_out(self) -> int:
        """Number of tokens that are not a target in any batch. The first token, which never is one, is not counted."""
        return len(self.tokens) - 1 - self.rows_per_epoch * self.length

    def batch(self, index: int, rows: Sequence[int]) -> Window:
        step = index % self.steps_per_epoch
        width = (len(self.tokens) - 1) // self.batch_size
        starts = np.asarray(rows, np.int64) * width + step * self.length
        return Window(_slices(self.tokens, starts, self.length), reset=np.full(len(rows), step == 0))

    def check(self, vocab_size: int) -> None:
        check_tokens(self.tokens, vocab_size)

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self, tokens=len(self.tokens), checksum=_checksum(self.tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Documents that are packed into rows. ``segment_ids`` distinguish the documents of a row.

    The documents are shuffled with the seed, and each is put into the row in which it leaves the least free space (best
    fit). Each epoch visits the rows in another random order. A document that is longer than a row is split into pieces.
    Each piece is its own segment and begins with the last token of the previous piece, so every token except the first
    is a target exactly once.

    Args:
        documents: ``[tokens]`` arrays, none empty.
        length: T.
        batch_size: B.
        seed: seed of the order of documents and rows.
        pad_id: the token of padding, which has segment id 0.

    Raises:
        ValueError: there is no document, or a document is empty or not a 1-D array of integers.
    """

    documents: Sequence[np.ndarray]
    length: int
    batch_size: int
    seed: int = 0
    pad_id: int = 0
    _pieces: np.ndarray = dataclasses.field(init=False, repr=False)  # [pieces, (document, start, stop)] row by row
    _row_starts: np.ndarray = dataclasses.field(init=False, repr=False)  # [rows + 1], indices into _pieces

    def __post_init__(self) -> None:
        _check_min(1, length=self.length, batch_size=self.batch_size)
        _check_min(0, seed=self.seed, pad_id=self.pad_id)
        if not len(self.documents):
            raise ValueError("no documents to pack")
        for number, document in enumerate(self.documents):
            check_row(document, what=f"document {number}")
        pieces = np.asarray(
            [
                (number, start, min(start + self.length + 1, len(document)))
                for number, document in enumerate(self.documents)
                for start in range(0, max(1, len(document) - 1), self.length)
            ]
        )
        pieces = pieces[np.random.default_rng(self.seed).permutation(len(pieces))]
        row_of = _best_fit((pieces[:, 2] - pieces[:, 1]).tolist(), self.length + 1)
        object.__setattr__(self, "_pieces", pieces[np.argsort(row_of, kind="stable")])
        object.__setattr__(self, "_row_starts", np.concatenate([[0], np.cumsum(np.bincount(row_of))]))

    @property
    def rows_per_epoch(self) -> int:
        return len(self._row_starts) - 1

    @property
    def efficiency(self) -> float:
        """Fraction of positions that are not padding."""
        return float((self._pieces[:, 2] - self._pieces[:, 1]).sum() / (self.rows_per_epoch * (self.length + 1)))

    def batch(self, index: int, rows: Sequence[int]) -> Window:
        tokens = np.full((len(rows), self.length + 1), self.pad_id, np.int32)
        segment_ids = np.zeros_like(tokens)
        packed = _shuffled(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        for batch_row, row in enumerate(packed):
            position = 0
            pieces = self._pieces[self._row_starts[row] : self._row_starts[row + 1]]
            for segment, (number, start, stop) in enumerate(pieces, start=1):
                end = position + stop - start
                tokens[batch_row, position:end] = self.documents[number][start:stop]
                segment_ids[batch_row, position:end] = segment
                position = end
        return Window(tokens, segment_ids)

    def check(self, vocab_size: int) -> None:
        check_tokens(np.asarray([self.pad_id]), vocab_size, what="pad_id")
        for number, document in enumerate(self.documents):
            check_tokens(document, vocab_size, what=f"document {number}")

    def fingerprint(self) -> dict[str, Any]:
        lengths = np.asarray([len(document) for document in self.documents])
        sums = np.asarray([_checksum(document) for document in self.documents])
        return _fingerprint(
            self, documents=len(lengths), tokens=int(lengths.sum()), checksum=_checksum(np.concatenate([lengths, sums]))
        )


def _best_fit(sizes: Sequence[int], capacity: int) -> np.ndarray:
    """The row of each item, in order: the row with the smallest sufficient free space, or else a new row."""
    rows, count = [], 0
    spaces: list[int] = []  # the distinct sizes of free space, ascending
    rows_by_space: dict[int, list[int]] = collections.defaultdict(list)
    for size in sizes:
        index = bisect.bisect_left(spaces, size)
        if index == len(spaces):
            row, space, count = count, capacity, count + 1
        else:
            space = spaces[index]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del spaces[index]
        rows.append(row)
        if space > size:
            if not rows_by_space[space - size]:
                bisect.insort(spaces, space - size)
            rows_by_space[space - size].append(row)
    return np.asarray(rows)


def _fingerprint(source: Any, **data_summary: int) -> dict[str, Any]:
    """The class name of a source, its integer fields, and a summary of its data, such as size and checksum."""
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    numbers = {name: int(value) for name, value in fields.items() if isinstance(value, int | np.integer)}
    return {"kind": type(source).__name__, **numbers, **data_summary}


class Batches(Iterator[Any]):
    """An infinite iterator over the batches of a source, with the rows of this process.

    The state is ``{"next": step, "source": fingerprint}``. It is the same in every process and for any number of
    processes. With ``prefetch``, a thread makes the next batches while the device computes. The state counts only the
    batches that the caller has taken.

    Args:
        source: the data set.
        rows: the rows of this process. With several processes, pass ``sharding.rows(batch_size)``. None: all rows.
        to_batch: a pure function from the source's batch (for example a ``Window``) to the batch of an objective. None:
            the iterator yields the source's batch.
        prefetch: number of batches that are made in advance.

    Raises:
        ValueError: ``rows`` is empty, or has a row that is not in the batch.

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
        self.rows = range(size) if rows is None else rows
        if not self.rows or not set(self.rows) <= set(range(size)):
            raise ValueError(
                f"rows={list(self.rows)} must be one or more of the rows 0 to {size - 1} of a batch of {size}"
            )
        _check_min(0, prefetch=prefetch)
        self._to_batch = to_batch or (lambda batch: batch)
        self._next = 0
        self._fingerprint = source.fingerprint()
        self._prefetch = prefetch
        self._thread = concurrent.futures.ThreadPoolExecutor(1) if prefetch else None
        self._waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()

    def _make(self, index: int) -> Any:
        return self._to_batch(self.source.batch(index, self.rows))

    def __next__(self) -> Any:
        if self._thread is None:
            batch = self._make(self._next)
        else:
            while len(self._waiting) <= self._prefetch:
                self._waiting.append(self._thread.submit(self._make, self._next + len(self._waiting)))
            # If this raises, the batch stays first in the queue, so that the queue still matches the step numbers.
            batch = self._waiting[0].result()
            self._waiting.popleft()
        self._next += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The JSON-compatible state of the iterator."""
        return {"next": self._next, "source": dict(self._fingerprint)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state was saved for another source. The message lists all differences with both values.
        """
        match state:
            case {"next": int(step), "source": dict(saved)} if step >= 0:
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
        self._waiting.clear()

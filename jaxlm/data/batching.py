"""Batches: which tokens each step sees, as pure functions of the step number.

A source answers ``batch(index, rows)`` for any step at any time. So the state of the iterator is one number, it
resumes exactly, and each of P processes asks for its own rows of the same global batch.

    B batch rows    T length: inputs are tokens[:, :-1], targets tokens[:, 1:]
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
    """Rows of one batch, in numpy; a pytree for JAX.

    Attributes:
        tokens: ``[B, T+1]`` int32.
        segment_ids: ``[B, T+1]`` int32, 1, 2, ... for the documents of a row and 0 for padding; None: all one text.
        reset: ``[B]`` bool, True where carried state must start anew; None: nothing is carried.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None = None
    reset: np.ndarray | None = None


class Source(Protocol):
    """A data set in the order in which it is visited. All checks are made when it is constructed."""

    @property
    def batch_size(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the data: step i is in epoch ``i * batch_size // rows_per_epoch``."""
        ...

    def batch(self, index: int, rows: Sequence[int]) -> Any:
        """The given rows of the global batch of step ``index``: a ``Window``, or what the source documents."""
        ...

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if a token is outside the vocabulary. Reads all the data once."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a saved state to mean the same batches; fit for JSON."""
        ...


def permute(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(count)`` sends ``index``: ``[n]`` to ``[n]``, in O(1) memory.

    A Feistel network on the next power of four, walked along its cycles until the value is below ``count``
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Another (seed, epoch) is another permutation.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    value = index.astype(np.uint64)
    walking = np.ones(value.shape, bool)
    while walking.any():
        left, right = value[walking] >> half, value[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[walking] = (left << half) | right
        walking = value >= count
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(index: int, rows: Sequence[int], batch_size: int, count: int, seed: int) -> np.ndarray:
    """The items that ``rows`` of step ``index`` visit when each epoch is a permutation of ``count`` items."""
    position = index * batch_size + np.asarray(rows, np.int64)
    items = np.empty_like(position)
    for epoch in np.unique(position // count):
        here = position // count == epoch
        items[here] = permute(position[here] % count, count, seed, int(epoch))
    return items


def _at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _slices(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)


def _checksum(tokens: np.ndarray) -> int:
    """CRC-32 of all tokens, whatever their dtype. A memory map is read once from start to end."""
    checksum = 0
    for start in range(0, len(tokens), _CHECKED_AT_ONCE):
        part = np.asarray(tokens[start : start + _CHECKED_AT_ONCE]).astype("<u4")
        checksum = zlib.crc32(part.tobytes(), checksum)
    return checksum


_CHECKED_AT_ONCE = 1 << 20
"""Tokens of a memory map that are copied at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomWindows:
    """Windows at every multiple of ``stride``, each exactly once per epoch, in an order drawn anew each epoch.

    A batch may hold the last windows of one epoch and the first of the next: no window is left out.

    Args:
        tokens: ``[N]`` ids; a memory map is read only where it is used.
        length: T.
        stride: distance between window starts; ``length`` makes windows whose inputs do not overlap.

    Raises:
        ValueError: fewer than ``length + 1`` tokens, or a number that is too small.
    """

    tokens: np.ndarray
    length: int
    batch_size: int
    seed: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        _at_least(1, length=self.length, batch_size=self.batch_size, stride=self.stride)
        _at_least(0, seed=self.seed)
        check_row(self.tokens, self.length + 1, f"random windows of length {self.length} and one target more")

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
    """``batch_size`` contiguous columns: each batch continues every row of the one before (truncated BPTT).

    The tokens that do not fill a last batch are left out (``left_out``). ``reset`` is True for the first batch
    of an epoch, where the rows jump back to the start of their columns.

    Raises:
        ValueError: fewer than ``batch_size * length + 1`` tokens.
    """

    tokens: np.ndarray
    length: int
    batch_size: int

    def __post_init__(self) -> None:
        _at_least(1, length=self.length, batch_size=self.batch_size)
        what = f"{self.batch_size} columns of length {self.length} and one target more"
        check_row(self.tokens, self.batch_size * self.length + 1, what)

    @property
    def steps_per_epoch(self) -> int:
        return (len(self.tokens) - 1) // self.batch_size // self.length

    @property
    def rows_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def left_out(self) -> int:
        """Tokens that no batch has as a target, not counting the very first."""
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
    """Whole documents packed side by side into rows, told apart by ``segment_ids``.

    Documents, in a seeded random order, go where they leave the least space (best fit). The rows are then visited
    in an order drawn anew each epoch. A document longer than a row becomes several pieces, each a segment of its
    own that begins with the last token of the piece before: every token but the first is a target exactly once.

    Args:
        documents: ``[tokens]`` arrays, none empty.
        pad_id: the token of padding, which has segment 0.

    Raises:
        ValueError: there is no document, or one is empty or not a row of integers.
    """

    documents: Sequence[np.ndarray]
    length: int
    batch_size: int
    seed: int = 0
    pad_id: int = 0
    _pieces: np.ndarray = dataclasses.field(init=False, repr=False)  # [pieces, (document, start, stop)] row by row
    _borders: np.ndarray = dataclasses.field(init=False, repr=False)  # [rows + 1] into _pieces

    def __post_init__(self) -> None:
        _at_least(1, length=self.length, batch_size=self.batch_size)
        _at_least(0, seed=self.seed, pad_id=self.pad_id)
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
        object.__setattr__(self, "_borders", np.concatenate([[0], np.cumsum(np.bincount(row_of))]))

    @property
    def rows_per_epoch(self) -> int:
        return len(self._borders) - 1

    @property
    def efficiency(self) -> float:
        """Share of positions that hold a token and not padding."""
        return float((self._pieces[:, 2] - self._pieces[:, 1]).sum() / (self.rows_per_epoch * (self.length + 1)))

    def batch(self, index: int, rows: Sequence[int]) -> Window:
        tokens = np.full((len(rows), self.length + 1), self.pad_id, np.int32)
        segment_ids = np.zeros_like(tokens)
        packed = _shuffled(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        for place, row in enumerate(packed):
            at = 0
            pieces = self._pieces[self._borders[row] : self._borders[row + 1]]
            for segment, (number, start, stop) in enumerate(pieces, start=1):
                end = at + stop - start
                tokens[place, at:end] = self.documents[number][start:stop]
                segment_ids[place, at:end] = segment
                at = end
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
    """The row of each size, in turn: the open row with the least sufficient space, else a new one."""
    rows, count = [], 0
    spaces: list[int] = []  # the distinct spaces that open rows have, ascending
    having: dict[int, list[int]] = collections.defaultdict(list)
    for size in sizes:
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, space, count = count, capacity, count + 1
        else:
            space = spaces[at]
            row = having[space].pop()
            if not having[space]:
                del spaces[at]
        rows.append(row)
        if space > size:
            if not having[space - size]:
                bisect.insort(spaces, space - size)
            having[space - size].append(row)
    return np.asarray(rows)


def _fingerprint(source: Any, **facts: int) -> dict[str, Any]:
    """The kind of the source, its plain numbers, and facts about its data."""
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    numbers = {name: int(value) for name, value in fields.items() if isinstance(value, int | np.integer)}
    return {"kind": type(source).__name__, **numbers, **facts}


class Batches(Iterator[Any]):
    """Iterates over a source without end: this process's rows of each batch, made by ``to_batch``.

    The state is ``{"next": step, "source": fingerprint}``, the same in every process and for any number of them. With
    ``prefetch``, a thread makes the next batches while the device works; the state counts the batches that were taken.

    Args:
        source: the data set.
        rows: in a run of several processes, ``sharding.rows(batch_size)``; None reads all rows.
        to_batch: a pure function from what the source gives (a ``Window``, for example) to the batch of an objective;
            None gives the source's own.
        prefetch: number of batches that are made in advance.

    Raises:
        ValueError: the batch has no such rows.

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
        every = range(source.batch_size)
        self.source = source
        self.rows = every if rows is None else rows
        if not self.rows or not set(self.rows) <= set(every):
            raise ValueError(f"rows {list(self.rows)} of a batch of {source.batch_size}: take some of 0 to {every[-1]}")
        _at_least(0, prefetch=prefetch)
        self._to_batch = to_batch or (lambda given: given)
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
            batch = self._waiting[0].result()  # stays first if it raises, so that the others keep their steps
            self._waiting.popleft()
        self._next += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the iterator is, fit for JSON."""
        return {"next": self._next, "source": dict(self._fingerprint)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it was saved over another source; each difference is named with both values.
        """
        match state:
            case {"next": int(step), "source": dict(saved)} if step >= 0:
                pass
            case _:
                raise ValueError(f"not the state of an iterator: {state!r}")
        here = self._fingerprint
        differences = [
            f"{name}: saved {saved.get(name)!r}, now {here.get(name)!r}"
            for name in {**here, **saved}
            if saved.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError("the saved iterator read other data:\n  " + "\n  ".join(differences))
        self._next = step
        self._waiting.clear()

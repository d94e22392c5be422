"""Length buckets: examples of similar length share a batch, and few shapes are compiled.

Each example belongs to one bucket. All batches of a bucket have one shape, so a step is compiled once for each bucket.
The buckets are those with the least padding for their number (dynamic programming over the distinct lengths).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.batching import _at_least, _fingerprint
from jaxlm.data.tokens import check_tokens

Encoded = Mapping[str, Any]
"""An example as numbers: 1-D integer arrays, which are padded, and scalars."""


class Rows(NamedTuple):
    """Examples of one bucket, padded to its lengths.

    Attributes:
        fields: ``[B, T]`` for each array field (T is the bucket's length of that field), ``[B]`` for each scalar.
        lengths: ``[B]`` int32 for each array field: entries that are not padding. 0 in a row without an example.
        indices: ``[B]`` int64, the number of each example; -1 in a row without an example.
    """

    fields: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    indices: np.ndarray

    def segment_ids(self, field: str) -> np.ndarray:
        """``[B, T]`` int32: 1 for the entries of the example, 0 for padding."""
        T = self.fields[field].shape[1]
        return (np.arange(T)[None] < self.lengths[field][:, None]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One shape: the padded length of each array field, the rows of a batch, and the examples that belong to it."""

    lengths: dict[str, int]
    rows: int
    members: np.ndarray

    @property
    def steps(self) -> int:
        """Batches of an epoch; the last one may have rows without an example."""
        return -(-len(self.members) // self.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed:
    """A source of :class:`Rows`: each epoch visits every example exactly once, in batches of one bucket each.

    Both the examples of a bucket and the order of the batches are shuffled anew in each epoch.

    Args:
        examples: fields of every example; all have the same fields.
        batch_size: rows of a batch of the longest bucket.
        num_buckets: how many shapes there may be.
        seed: of the order.
        equal_tokens: shorter buckets have more rows, so that all batches have about as many tokens; the rows are a
            multiple of ``batch_size``. False: every batch has ``batch_size`` rows.
        shuffle: False visits the buckets in order of length, for evaluation.
        pad_id: what is written into padding.
        multiple: lengths are rounded up to a multiple of this, but not above ``max_length``.
        max_length: no array is longer: the positions of the model, for example. None sets no limit.

    Raises:
        ValueError: there is no example, or examples have different fields, or an array that is empty, holds anything
            but integers of 32 bits, or is longer than ``max_length``.
    """

    examples: Sequence[Encoded]
    batch_size: int
    num_buckets: int = 4
    seed: int = 0
    equal_tokens: bool = False
    shuffle: bool = True
    pad_id: int = 0
    multiple: int = 8
    max_length: int | None = None
    buckets: tuple[Bucket, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        _at_least(1, batch_size=self.batch_size, num_buckets=self.num_buckets, multiple=self.multiple)
        _at_least(0, seed=self.seed, pad_id=self.pad_id)
        if self.max_length is not None:
            _at_least(1, max_length=self.max_length)
        if not len(self.examples):
            raise ValueError("no examples to batch")
        names = list(self.examples[0])
        for number, example in enumerate(self.examples):
            if list(example) != names:
                raise ValueError(f"example {number} has the fields {list(example)}, example 0 has {names}")
            for name in self._arrays:
                if np.ndim(example[name]) != 1 or len(example[name]) == 0:
                    raise ValueError(f"{name} of example {number} must be a row of at least one integer")
                _check_integers(np.asarray(example[name]), f"{name} of example {number}")
                if self.max_length is not None and len(example[name]) > self.max_length:
                    raise ValueError(
                        f"{name} of example {number} has {len(example[name])} entries, more than "
                        f"max_length={self.max_length}: shorten it"
                    )
        object.__setattr__(self, "buckets", tuple(self._make_buckets()))

    @property
    def _arrays(self) -> list[str]:
        return [name for name, value in self.examples[0].items() if np.ndim(value) > 0]

    def _make_buckets(self) -> list[Bucket]:
        lengths = np.asarray([[len(example[name]) for name in self._arrays] for example in self.examples])
        rounded = -(-lengths // self.multiple) * self.multiple
        if self.max_length is not None:
            rounded = np.minimum(rounded, self.max_length)
        # Which order of the examples pads less depends on how their lengths correlate, so both are tried.
        by_total, by_longest = (
            _partition(rounded, order, self.num_buckets) for order in (rounded.sum(axis=1), rounded.max(axis=1))
        )
        parts = min(by_total, by_longest, key=lambda parts: sum(shape.sum() * len(members) for shape, members in parts))
        longest = parts[-1][0].sum()
        factors = [max(1, longest // shape.sum()) if self.equal_tokens else 1 for shape, _ in parts]
        return [
            Bucket(dict(zip(self._arrays, shape.tolist(), strict=True)), int(factor) * self.batch_size, members)
            for (shape, members), factor in zip(parts, factors, strict=True)
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(bucket.steps for bucket in self.buckets)

    @property
    def rows_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def efficiency(self) -> float:
        """Share of the entries of an epoch that are not padding."""
        real = sum(len(example[name]) for example in self.examples for name in self._arrays)
        padded = sum(bucket.steps * bucket.rows * sum(bucket.lengths.values()) for bucket in self.buckets)
        return real / padded

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the source lives as long as the run)
    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of an epoch: bucket and indices [rows], -1 where there is no example."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for number, bucket in enumerate(self.buckets):
            members = rng.permutation(bucket.members) if self.shuffle else bucket.members
            filled = np.full(bucket.steps * bucket.rows, -1, np.int64)
            filled[: len(members)] = members
            batches += [(number, indices) for indices in filled.reshape(bucket.steps, bucket.rows)]
        return [batches[at] for at in rng.permutation(len(batches))] if self.shuffle else batches

    def batch(self, index: int, rows: Sequence[int]) -> Rows:
        """``Rows`` of step ``index``. Where the bucket has k times ``batch_size`` rows, each of ``rows`` stands for k.

        The global batch of P processes is split into the same blocks as any other array of rows.
        """
        epoch, step = divmod(index, self.steps_per_epoch)
        number, chosen = self._plan(epoch)[step]
        bucket = self.buckets[number]
        factor = bucket.rows // self.batch_size
        chosen = chosen.reshape(self.batch_size, factor)[np.asarray(rows, np.int64)].ravel()
        return self.collate(chosen, bucket)

    def collate(self, indices: np.ndarray, bucket: Bucket) -> Rows:
        """The examples with these indices, padded to the shape of a bucket."""
        fields: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        for name, first in self.examples[0].items():
            if name in bucket.lengths:
                padded = np.full((len(indices), bucket.lengths[name]), self.pad_id, np.int32)
                lengths[name] = np.zeros(len(indices), np.int32)
                for row, index in enumerate(indices):
                    if index >= 0:
                        values = self.examples[index][name]
                        padded[row, : len(values)] = values
                        lengths[name][row] = len(values)
                fields[name] = padded
            else:
                values = [self.examples[index][name] if index >= 0 else 0 for index in indices]
                fields[name] = np.asarray(values, np.asarray(first).dtype)
        return Rows(fields, lengths, indices)

    def check(self, vocab_size: int) -> None:
        for number, example in enumerate(self.examples):
            for name in self._arrays:
                check_tokens(np.asarray(example[name]), vocab_size, what=f"{name} of example {number}")

    def fingerprint(self) -> dict[str, Any]:
        checksum = 0
        for example in self.examples:
            for value in example.values():
                checksum = zlib.crc32(np.asarray(value).astype("<i8").tobytes(), checksum)
        return _fingerprint(self, examples=len(self.examples), checksum=checksum)

    def describe(self) -> str:
        """The shapes in one line, for the terminal."""
        shapes = ", ".join(
            f"{bucket.rows}x{'+'.join(map(str, dict.fromkeys(bucket.lengths.values())))}" for bucket in self.buckets
        )
        return f"{len(self.buckets)} shapes ({shapes}), {100 * (1 - self.efficiency):.0f} % padding"


def _check_integers(values: np.ndarray, what: str) -> None:
    """Raise ``ValueError`` for values that a batch, of int32, would change."""
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{what} has dtype {values.dtype}, but batches hold int32: convert it to integers")
    limits = np.iinfo(np.int32)
    if not np.can_cast(values.dtype, np.int32) and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"{what} has values outside int32: from {values.min()} to {values.max()}")


def _partition(lengths: np.ndarray, order: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shape [fields] and examples of each part: at most ``most`` ranges of ``order`` with the fewest padded entries.

    Args:
        lengths: [examples, fields].
        order: [examples], by which the examples are sorted; those with the same value stay together.
    """
    groups = [np.flatnonzero(order == value) for value in np.unique(order)]
    counts = np.asarray([len(group) for group in groups])
    largest = np.stack([lengths[group].max(axis=0) for group in groups])
    return [
        (largest[start:stop].max(axis=0), np.sort(np.concatenate(groups[start:stop])))
        for start, stop in _least_padding(counts, largest, most)
    ]


def _least_padding(counts: np.ndarray, largest: np.ndarray, most: int) -> list[tuple[int, int]]:
    """The partition of the groups, in order, into at most ``most`` ranges with the fewest padded entries.

    Args:
        counts: [N] examples of each group.
        largest: [N, fields] lengths that an example of the group needs.
    """
    N = len(counts)
    before = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((N, N + 1), np.inf)
    for start in range(N):
        shape = np.maximum.accumulate(largest[start:], axis=0).sum(axis=1)
        cost[start, start + 1 :] = shape * (before[start + 1 :] - before[start])
    best = np.full((most + 1, N + 1), np.inf)
    best[0, 0] = 0.0
    choice = np.zeros((most + 1, N + 1), int)
    for ranges in range(1, most + 1):
        for stop in range(1, N + 1):
            totals = best[ranges - 1, :stop] + cost[:stop, stop]
            choice[ranges, stop] = int(np.argmin(totals))
            best[ranges, stop] = totals[choice[ranges, stop]]
    ranges = int(np.argmin(best[:, N]))
    parts, stop = [], N
    while stop > 0:
        start = int(choice[ranges, stop])
        parts.append((start, stop))
        stop, ranges = start, ranges - 1
    return parts[::-1]

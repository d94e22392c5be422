"""Length buckets: batches of examples of similar length, with little padding and few distinct shapes.

Each example belongs to one bucket. All batches of a bucket have the same shape, so a step is compiled once per bucket.
A bucket is a range of the examples in the order of their lengths. Dynamic programming finds the ranges with the least
padding. If examples have several arrays, this is done for two orders: by the total length of the arrays, and by the
length of the longest array. The result with less padding is used. Rows without an example are not counted as padding.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import check_int32, check_min
from jaxlm.data.batching import source_fingerprint
from jaxlm.data.tokens import TOKEN_FIELDS, check_tokens

Encoded = Mapping[str, Any]
"""An encoded example: field name -> 1-D integer array or scalar. Batches pad the arrays."""


class BucketBatch(NamedTuple):
    """A batch of examples from one bucket, padded to the lengths of the bucket.

    The last batch of a bucket in an epoch may have rows without an example.

    Attributes:
        fields: field name -> values. An array field is ``[B, T]`` int32, where T is its padded length in the bucket. A
            scalar field is ``[B]``. In a row without an example, arrays have only padding, and scalars are 0.
        lengths: name of an array field -> ``[B]`` int32, the number of entries of each row that are not padding. It is
            0 in a row without an example.
        indices: ``[B]`` int64, the index of each example in ``Bucketed.examples``; -1 in a row without an example.
    """

    fields: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    indices: np.ndarray

    def segment_ids(self, field: str) -> np.ndarray:
        """The segment ids of an array field, ``[B, T]`` int32: 1 for the entries of the example, 0 for padding.

        In a row without an example, the first entry is 1 too. Otherwise a softmax or a mean over the row could be NaN,
        and the loss would be NaN even if the row had weight 0. Give weight 0 to these rows (``indices < 0``): a loss
        that derives its weights from the segment ids would count the first entry.
        """
        T = self.fields[field].shape[1]
        return (np.arange(T)[None] < np.maximum(self.lengths[field], 1)[:, None]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket: the shape of its batches, and its examples.

    Attributes:
        lengths: name of an array field -> padded length.
        rows: number of rows of a batch.
        members: ``[examples]``, the indices of the examples in ``Bucketed.examples``, in increasing order.
    """

    lengths: dict[str, int]
    rows: int
    members: np.ndarray

    @property
    def steps(self) -> int:
        """Number of batches of the bucket in an epoch. The last batch may have rows without an example."""
        return -(-len(self.members) // self.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed:
    """A ``jaxlm.data.Source`` whose batches are :class:`BucketBatch`. Each batch has examples of one bucket.

    Each epoch visits every example once. With ``shuffle``, each epoch shuffles the examples within each bucket, and the
    order of the batches.

    Args:
        examples: the encoded examples. All examples have the same fields in the same order.
        batch_size: number of rows in a batch. With ``equal_tokens``: number of rows in a batch of the longest examples.
        num_buckets: maximum number of buckets, which is also the maximum number of shapes.
        seed: seed of the order.
        equal_tokens: True: the batches of a bucket have ``k * batch_size`` rows. k is the largest integer for which
            such a batch has at most as many entries, including padding, as a batch of the longest examples. False:
            every batch has ``batch_size`` rows.
        shuffle: False visits the buckets in order of length, and the examples of each bucket in their original order,
            for evaluation.
        pad_id: the value that fills the padding of every array, even of an array that has no token ids.
        length_multiple: padded lengths are rounded up to a multiple of this number, but not above ``max_length``.
        max_length: maximum length of an array, for example the number of positions of the model. None: no limit.

    Raises:
        ValueError: there is no example. The examples have different fields, or no array. An array is empty, is not 1-D,
            has values that are not integers in the range of int32, or is longer than ``max_length``. A scalar field has
            values of several types, or values that are not numbers. ``seed`` or ``pad_id`` is negative. ``batch_size``,
            ``num_buckets``, ``length_multiple`` or ``max_length`` is below 1.
    """

    examples: Sequence[Encoded]
    batch_size: int
    num_buckets: int = 4
    seed: int = 0
    equal_tokens: bool = False
    shuffle: bool = True
    pad_id: int = 0
    length_multiple: int = 8
    max_length: int | None = None
    buckets: tuple[Bucket, ...] = dataclasses.field(init=False, repr=False)
    _scalar_dtypes: dict[str, np.dtype] = dataclasses.field(init=False, repr=False, compare=False)
    _epochs: dict[int, list[tuple[int, np.ndarray]]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_min(1, batch_size=self.batch_size, num_buckets=self.num_buckets, length_multiple=self.length_multiple)
        check_min(0, seed=self.seed, pad_id=self.pad_id)
        check_min(1, max_length=self.max_length)
        object.__setattr__(self, "_scalar_dtypes", check_examples(self.examples, self.max_length))
        object.__setattr__(self, "buckets", tuple(self._make_buckets()))

    @property
    def _array_fields(self) -> list[str]:
        """The names of the array fields."""
        return _array_fields(self.examples[0])

    def _make_buckets(self) -> list[Bucket]:
        lengths = np.asarray([[len(example[name]) for name in self._array_fields] for example in self.examples])
        rounded = -(-lengths // self.length_multiple) * self.length_multiple
        if self.max_length is not None:
            rounded = np.minimum(rounded, self.max_length)
        # Try both orders of the examples, because the better order depends on the correlation of the field lengths.
        parts = min(
            (_partition(rounded, order, self.num_buckets) for order in (rounded.sum(axis=1), rounded.max(axis=1))),
            key=lambda parts: sum(shape.sum() * len(members) for shape, members in parts),
        )
        max_entries_per_row = max(shape.sum() for shape, _ in parts)
        row_factors = [max(1, max_entries_per_row // shape.sum()) if self.equal_tokens else 1 for shape, _ in parts]
        return [
            Bucket(dict(zip(self._array_fields, shape.tolist(), strict=True)), int(factor) * self.batch_size, members)
            for (shape, members), factor in zip(parts, row_factors, strict=True)
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return sum(bucket.steps for bucket in self.buckets)

    @property
    def rows_per_epoch(self) -> int:
        """``steps_per_epoch * batch_size``, although batches may have more rows with ``equal_tokens``."""
        return self.steps_per_epoch * self.batch_size

    @property
    def efficiency(self) -> float:
        """Fraction of the entries of an epoch that are not padding."""
        real = sum(len(example[name]) for example in self.examples for name in self._array_fields)
        padded = sum(bucket.steps * bucket.rows * sum(bucket.lengths.values()) for bucket in self.buckets)
        return real / padded

    def _epoch_batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The result of :meth:`_make_epoch`. Two epochs are kept: a prefetched batch may be of the next epoch."""
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._make_epoch(epoch)
            for old in list(self._epochs)[:-1]:
                self._epochs.pop(old, None)
            self._epochs[epoch] = batches
        return batches

    def _make_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of an epoch, each as (bucket number, example indices [rows]). Index -1 means no example."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for number, bucket in enumerate(self.buckets):
            members = rng.permutation(bucket.members) if self.shuffle else bucket.members
            padded_members = np.full(bucket.steps * bucket.rows, -1, np.int64)
            padded_members[: len(members)] = members
            batches += [(number, indices) for indices in padded_members.reshape(bucket.steps, bucket.rows)]
        return [batches[number] for number in rng.permutation(len(batches))] if self.shuffle else batches

    def batch(self, index: int, rows: Sequence[int]) -> BucketBatch:
        """The given rows of the global batch of step ``index``.

        If the global batch has ``k * batch_size`` rows, each number i in ``rows`` selects its rows ``i * k`` to
        ``(i + 1) * k - 1``. So a process with contiguous ``rows`` gets a contiguous block of the global batch.
        """
        epoch, step = divmod(index, self.steps_per_epoch)
        number, indices = self._epoch_batches(epoch)[step]
        bucket = self.buckets[number]
        factor = bucket.rows // self.batch_size
        indices = indices.reshape(self.batch_size, factor)[np.asarray(rows, np.int64)].ravel()
        return self.collate(indices, bucket)

    def collate(self, indices: np.ndarray, bucket: Bucket) -> BucketBatch:
        """The batch of the examples with these indices. Index -1 gives a row without an example."""
        fields: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        for name in self.examples[0]:
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
                fields[name] = np.asarray(values, self._scalar_dtypes[name])
        return BucketBatch(fields, lengths, indices)

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if ``pad_id``, or an id in a field of ``TOKEN_FIELDS``, is outside the vocabulary."""
        check_tokens(np.asarray([self.pad_id]), vocab_size, name="pad_id")
        names = [name for name in TOKEN_FIELDS if name in self._array_fields]
        for number, example in enumerate(self.examples):
            for name in names:
                check_tokens(np.asarray(example[name]), vocab_size, name=f"{name} of example {number}")

    def fingerprint(self) -> dict[str, Any]:
        checksum = 0
        for example in self.examples:
            for name, value in ((name, np.asarray(value)) for name, value in example.items()):
                # Integers are converted to int64, so that equal integers of different dtypes have equal checksums.
                # Floats are converted to float64, because a conversion to int64 would discard their fractions.
                value = value.astype("<f8" if value.dtype.kind == "f" else "<i8")
                checksum = zlib.crc32(f"{name} {value.shape}".encode() + value.tobytes(), checksum)
        return source_fingerprint(self, examples=len(self.examples), checksum=checksum)

    def describe(self) -> str:
        """The shapes of the buckets and the percentage of padding, such as "2 shapes (8x16, 8x32), 21 % padding".

        A shape is the number of rows, and the distinct padded lengths of the array fields, joined by "+".
        """
        shapes = ", ".join(
            f"{bucket.rows}x{'+'.join(map(str, dict.fromkeys(bucket.lengths.values())))}" for bucket in self.buckets
        )
        return f"{len(self.buckets)} shapes ({shapes}), {100 * (1 - self.efficiency):.0f} % padding"


def check_examples(examples: Sequence[Encoded], max_length: int | None = None) -> dict[str, np.dtype]:
    """The dtype of each scalar field, after a check of the examples.

    Raises:
        ValueError: the examples are invalid, as listed in :class:`Bucketed`.
    """
    if not len(examples):
        raise ValueError("no examples to batch")
    first, array_fields = examples[0], _array_fields(examples[0])
    names, dtypes = list(first), dict[str, np.dtype]()
    if not array_fields:
        raise ValueError(f"the examples have no array (fields: {', '.join(names) or 'none'}): encode their texts")
    for number, example in enumerate(examples):
        if list(example) != names:
            raise ValueError(f"example {number} has the fields {list(example)}, but example 0 has {names}")
        for name, value in example.items():
            what, array = f"{name} of example {number}", np.asarray(value)
            if name not in array_fields:
                _check_scalar(value, first[name], what)
                dtypes[name] = np.result_type(dtypes.get(name, array.dtype), array.dtype)
                continue
            if array.ndim != 1 or not array.size:
                raise ValueError(f"{what} must be a 1-D array with at least one integer")
            check_int32(array, what)
            if max_length is not None and array.size > max_length:
                raise ValueError(f"{what} has {array.size} entries, more than max_length={max_length}: truncate it")
    return dtypes


def _array_fields(example: Encoded) -> list[str]:
    """The names of the fields of an example that are arrays."""
    return [name for name, value in example.items() if np.ndim(value) > 0]


def _check_scalar(value: Any, first: Any, what: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a scalar of the same kind as ``first``.

    The kinds are signed integer, unsigned integer, float and boolean.
    """
    kind, first_kind = np.asarray(value).dtype.kind, np.asarray(first).dtype.kind
    if np.ndim(value) or kind not in "biuf" or kind != first_kind:
        raise ValueError(
            f"{what} is {value!r}, but example 0 has {first!r}: all values of a field must be of one type "
            "(signed integers, unsigned integers, floats or booleans)"
        )


def _partition(lengths: np.ndarray, sort_keys: np.ndarray, max_parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Partition the examples with minimal padding. Returns (padded lengths [fields], example indices) of each part.

    A part is a contiguous range of the examples in the order of ``sort_keys``.

    Args:
        lengths: [examples, fields] rounded lengths of the array fields.
        sort_keys: [examples]. Examples with equal keys are in the same part.
        max_parts: maximum number of parts.
    """
    groups = [np.flatnonzero(sort_keys == key) for key in np.unique(sort_keys)]
    counts = np.asarray([len(group) for group in groups])
    max_lengths = np.stack([lengths[group].max(axis=0) for group in groups])
    return [
        (max_lengths[start:stop].max(axis=0), np.sort(np.concatenate(groups[start:stop])))
        for start, stop in _least_padding(counts, max_lengths, max_parts)
    ]


def _least_padding(counts: np.ndarray, max_lengths: np.ndarray, max_ranges: int) -> list[tuple[int, int]]:
    """Split the groups into ranges (start, stop) of consecutive groups with the least padding, by dynamic programming.

    All examples of a range are padded to the maximum length of each field in the range.

    Args:
        counts: [N] number of examples in each group.
        max_lengths: [N, fields] the maximum length of each field in each group.
        max_ranges: maximum number of ranges.
    """
    N = len(counts)
    num_before = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((N, N + 1), np.inf)
    for start in range(N):
        shape = np.maximum.accumulate(max_lengths[start:], axis=0).sum(axis=1)
        cost[start, start + 1 :] = shape * (num_before[start + 1 :] - num_before[start])
    # [num_ranges, stop]: the fewest entries, padding included, if the groups before stop form this number of ranges
    least_entries = np.full((max_ranges + 1, N + 1), np.inf)
    least_entries[0, 0] = 0.0
    last_start = np.zeros((max_ranges + 1, N + 1), int)  # [num_ranges, stop]: start of the last range
    for num_ranges in range(1, max_ranges + 1):
        for stop in range(1, N + 1):
            totals = least_entries[num_ranges - 1, :stop] + cost[:stop, stop]
            last_start[num_ranges, stop] = int(np.argmin(totals))
            least_entries[num_ranges, stop] = totals[last_start[num_ranges, stop]]
    num_ranges = int(np.argmin(least_entries[:, N]))
    ranges, stop = [], N
    while stop > 0:
        start = int(last_start[num_ranges, stop])
        ranges.append((start, stop))
        stop, num_ranges = start, num_ranges - 1
    return ranges[::-1]

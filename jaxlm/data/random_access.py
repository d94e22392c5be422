"""Batches from random-access data: a ``grain.MapDataset``, a map-style data set, or a list.

Shapes: B batch size.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import check_min
from jaxlm.data.batching import shuffled_indices, source_fingerprint
from jaxlm.data.examples import check_random_access
from jaxlm.data.tokens import TOKEN_FIELDS, check_tokens

FINGERPRINT_SAMPLES = 16
"""Maximum number of elements that :meth:`RandomAccess.fingerprint` reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomAccess:
    """A ``jaxlm.data.Source`` of random-access elements. Each epoch visits every element exactly once.

    All elements must have the same fields, shapes and dtypes. Each batch is checked for this. For elements of unequal
    length, use ``Bucketed(Examples.from_random_access(elements), batch_size)``. A batch may contain the last elements
    of one epoch and the first elements of the next epoch, so no element is dropped. A batch is a function of its step,
    so a resumed run does not read earlier elements again.

    Args:
        elements: an object with ``len(elements)``. ``elements[n]`` must be a mapping of field names to numeric arrays
            and numbers. Each access must return the same values.
        batch_size: B.
        seed: seed of the order. Each epoch has a different order.
        shuffle: False keeps the order of the elements, for example if ``grain.MapDataset.shuffle`` has shuffled them.

    Raises:
        TypeError: ``elements`` has no length or cannot be indexed.
        ValueError: the number of elements is 0 or infinite, the first element is not a mapping to numeric arrays and
            numbers, ``batch_size`` is below 1, or ``seed`` is negative.

    Example:
        >>> elements = [{"tokens": np.arange(n, n + 4), "label": n % 2} for n in range(10)]
        >>> batch = RandomAccess(elements, batch_size=2).batch(0, range(2))
        >>> batch["tokens"].shape, batch["label"].shape
        ((2, 4), (2,))
    """

    elements: Any
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_min(1, batch_size=self.batch_size)
        check_min(0, seed=self.seed)
        check_random_access(self.elements, "the source")
        self._read(0)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.elements)

    def _read(self, number: int) -> Mapping[str, np.ndarray]:
        """The arrays of an element. Raises ``ValueError`` if it is not a mapping of numeric arrays."""
        element = self.elements[number]
        if not isinstance(element, Mapping) or not element:
            raise ValueError(f"element {number} must be a mapping of arrays, got {type(element).__name__}")
        arrays = {name: np.asarray(value) for name, value in element.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name} of element {number} has dtype {array.dtype}: it must hold numbers")
        return arrays

    def batch(self, index: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The given rows of the global batch of step ``index``: an array ``[rows, ...]`` for each field.

        Raises:
            ValueError: ``rows`` is empty; an element is not a mapping to numeric arrays and numbers; or its fields,
                shapes or dtypes differ from those of the first of the given rows.
        """
        if not len(rows):
            raise ValueError("rows is empty: give the number of at least one row of the batch")
        if self.shuffle:
            numbers = shuffled_indices(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        else:
            numbers = (index * self.batch_size + np.asarray(rows, np.int64)) % self.rows_per_epoch
        elements = [self._read(int(number)) for number in numbers]
        first = _shapes(elements[0])
        for number, element in zip(numbers, elements, strict=True):
            if _shapes(element) != first:
                raise ValueError(
                    f"element {number} has {_shapes(element)}, but element {numbers[0]} of the same batch has {first}: "
                    "give all elements the same fields, dtypes and shapes (truncate or pad them), or use Bucketed"
                )
        return {name: np.stack([element[name] for element in elements]) for name in elements[0]}

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if a field of ``TOKEN_FIELDS`` has an id outside the vocabulary. Reads all elements."""
        for number in range(self.rows_per_epoch):
            for name, array in self._read(number).items():
                if name in TOKEN_FIELDS and array.ndim and array.dtype.kind in "iu":
                    check_tokens(array.ravel(), vocab_size, name=f"{name} of element {number}")

    def fingerprint(self) -> dict[str, Any]:
        checksum = 0
        for number in range(0, self.rows_per_epoch, -(-self.rows_per_epoch // FINGERPRINT_SAMPLES)):
            for name, array in sorted(self._read(number).items()):
                checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes(), checksum)
        return source_fingerprint(self, elements=self.rows_per_epoch, checksum=checksum)


def _shapes(element: Mapping[str, np.ndarray]) -> str:
    """The names, dtypes and shapes of the fields as a string, such as "label int64[], tokens int64[4]"."""
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in sorted(element.items()))

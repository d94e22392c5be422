"""A source of batches over anything with random access: a ``grain.MapDataset``, a map-style data set, a list.

Shapes: B batch.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.batching import _at_least, _fingerprint, _shuffled
from jaxlm.data.examples import check_random_access
from jaxlm.data.tokens import check_tokens

SAMPLES = 16
"""Elements that the fingerprint reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomAccess:
    """A source of batches of elements that all have the same fields and shapes, each exactly once an epoch.

    A batch may hold the last elements of one epoch and the first of the next: none is left out. A batch is a function
    of its number, so a run resumes without reading what it has read before. Elements of unequal length:
    ``Bucketed(Examples.from_random_access(source))``.

    Args:
        elements: has ``len(elements)``; ``elements[number]`` is a mapping of arrays and numbers, the same each time.
        batch_size: B.
        seed: of the order, which is drawn anew each epoch.
        shuffle: False visits the elements in their own order, such as that of ``grain.MapDataset.shuffle``.

    Raises:
        TypeError: the elements have no length or no index.
        ValueError: there is no element, or no end of them; the first one is no mapping.

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
        _at_least(1, batch_size=self.batch_size)
        _at_least(0, seed=self.seed)
        check_random_access(self.elements, "the source")
        self._read(0)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.elements)

    def _read(self, number: int) -> Mapping[str, np.ndarray]:
        element = self.elements[number]
        if not isinstance(element, Mapping) or not element:
            raise ValueError(f"element {number} must be a mapping of arrays, got {type(element).__name__}")
        arrays = {name: np.asarray(value) for name, value in element.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name} of element {number} has dtype {array.dtype}: it must hold numbers")
        return arrays

    def batch(self, index: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Each field of the given rows of step ``index``, ``[B, ...]``.

        Raises:
            ValueError: an element with other fields, shapes or dtypes than the first of the batch.
        """
        if self.shuffle:
            numbers = _shuffled(index, rows, self.batch_size, self.rows_per_epoch, self.seed)
        else:
            numbers = (index * self.batch_size + np.asarray(rows, np.int64)) % self.rows_per_epoch
        elements = [self._read(int(number)) for number in numbers]
        first = _shapes(elements[0])
        for number, element in zip(numbers, elements, strict=True):
            if _shapes(element) != first:
                raise ValueError(
                    f"element {number} has {_shapes(element)}, but element {numbers[0]} of the same batch has {first}: "
                    "cut or pad them to one shape, or use Bucketed"
                )
        return {name: np.stack([element[name] for element in elements]) for name in elements[0]}

    def check(self, vocab_size: int) -> None:
        for number in range(self.rows_per_epoch):
            for name, array in self._read(number).items():
                if array.ndim and array.dtype.kind in "iu":
                    check_tokens(array, vocab_size, what=f"{name} of element {number}")

    def fingerprint(self) -> dict[str, Any]:
        checksum = 0
        for number in range(0, self.rows_per_epoch, -(-self.rows_per_epoch // SAMPLES)):
            for name, array in sorted(self._read(number).items()):
                checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes(), checksum)
        return _fingerprint(self, elements=self.rows_per_epoch, checksum=checksum)


def _shapes(element: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in sorted(element.items()))

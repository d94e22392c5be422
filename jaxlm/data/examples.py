"""Data sets of labeled or paired texts: the class :class:`Examples`, and readers of published file formats.

    TSV, CSV             one example per row, named columns         GLUE, most classification data sets
    labeled lines        a label, a space, the text                 TREC, Subj, MR as Kim (2014) used them
    JSONL                one JSON object per line                   SQuAD-like and summarization data sets
    pairs of files       line n of both files is example n          Multi30k, WMT
    datasets.Dataset     a map-style Hugging Face data set          Examples.from_datasets
    random access        an object with ``len`` and ``[n]``         Examples.from_random_access (grain.MapDataset)

An example is a dict with the requested fields. Files may be compressed with gzip (``.gz``). An invalid line raises an
error that names the file and the line. With ``on_error="report"``, the line is listed in ``Examples.rejected`` instead.
A file without a valid line is always an error. Empty lines are skipped in JSONL files, and are invalid in other files.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np

from jaxlm.config import check_same_number, check_value
from jaxlm.data.text_files import check_no_surrogate, read_lines, suffix_without_gz
from jaxlm.json_files import parse

TEXT_COLUMNS = ("sentence", "text", "content")
"""Names of the text column in classification files, in order of preference."""
_MAX_FIELD_SIZE = 1 << 24
"""Maximum number of characters of a field in a CSV file. It limits the memory if a quote is not closed."""

T = TypeVar("T")
Example = dict[str, Any]
OnError = Literal["raise", "report"]


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A line, or a record of several lines such as a chess game, that cannot be used as an example, and the reason.

    Attributes:
        line: the number (from 1) of the line, or of the first line of the record. For a SQuAD question: the number of
            the question. For docstrings: the number of the source file.
        reason: why the line or record is rejected.
    """

    line: int
    reason: str


class InvalidLineError(ValueError):
    """A line, a row or a SQuAD question is not a valid example. The readers raise it with ``on_error="raise"``."""


_PART_PREFIX = "a part of "


@dataclasses.dataclass(frozen=True)
class Examples(Sequence[Example]):
    """A data set: a sequence of examples.

    Attributes:
        rows: the examples.
        name: the name of the file or data set, for messages.
        rejected: the lines of the file that cannot be used as examples. Empty for a part of a data set.
        class_names: field -> class names, in the order of the class numbers. Only for fields whose class names the data
            set declares (the ``ClassLabel`` columns of a Hugging Face data set).

    Example:
        >>> Examples([{"text": "a fine film", "label": "1"}]).column("label")
        ['1']
    """

    rows: Sequence[Example]
    name: str = "the examples"
    rejected: tuple[Rejected, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_datasets(cls, dataset: Any, fields: Mapping[str, str], *, name: str | None = None) -> Examples:
        """Examples from a map-style Hugging Face data set (``datasets.Dataset``), read into memory.

        Class names replace the class numbers of a ``ClassLabel`` column. :meth:`label_names` keeps the order of the
        classes.

        Args:
            dataset: the data set.
            fields: field of the example -> name of the column.
            name: the name in messages. None: the name of the data set, or "the data set" if it has no name.

        Raises:
            TypeError: the data set is a streaming data set or a dictionary of data sets.
            ValueError: a column is missing, the data set or a text is empty, a text has a surrogate, a value is None,
                or a value of a ``ClassLabel`` column is not the number of a class (-1 means that there is no label).

        Example:
            >>> Examples.from_datasets(dataset["train"], {"text": "sentence", "label": "label"})   # doctest: +SKIP
        """
        if isinstance(dataset, Mapping):
            raise TypeError(f"this is a dictionary of data sets: pass one of {', '.join(map(repr, dataset))}")
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} has no __len__ or no __getitem__: load it with streaming=False, or read a "
                "part with datasets.Dataset.from_list(list(dataset.take(1000)))"
            )
        name = name or getattr(getattr(dataset, "info", None), "dataset_name", None) or "the data set"
        missing = [column for column in fields.values() if column not in dataset.column_names]
        if missing:
            columns = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"{name} has no column {missing[0]!r}: its columns are {columns}")
        if not len(dataset):
            raise ValueError(f"{name} has no examples")
        values: dict[str, list[Any]] = {}
        class_names = {}
        for field, column in fields.items():
            values[column] = list(dataset[column])
            names = getattr(dataset.features[column], "names", None)
            if names is not None:
                class_names[field] = tuple(names)
                values[column] = [_class_name(number, names, column, n) for n, number in enumerate(values[column])]
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        return cls(list(_RenamedExamples(rows, fields, name, range(len(rows)))), name, class_names=class_names)

    @classmethod
    def from_random_access(
        cls, source: Any, fields: Mapping[str, str] | None = None, *, name: str = "the source"
    ) -> Examples:
        """Examples from a random-access source, such as a ``grain.MapDataset``. Each access reads ``source[n]`` again.

        Args:
            source: an object with ``len(source)``. ``source[n]`` must be a mapping.
            fields: field of the example -> name in the mapping. None: all names are kept.
            name: the name in messages.

        Raises:
            TypeError: the source has no length or cannot be indexed.
            ValueError: the source is empty or infinite. An example is None or not a mapping, or has a field that is
                missing, None, an empty text or a text with a surrogate. This method checks only the first example. Each
                other example is checked when it is accessed.
        """
        check_random_access(source, name)
        rows = _RenamedExamples(source, fields, name, range(len(source)))
        rows[0]  # raises an error if the first example is invalid
        return cls(rows, name)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self._part(self.rows[index])
        return self.rows[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def column(self, field: str) -> list[Any]:
        """The values of one field.

        Raises:
            ValueError: an example does not have the field.
        """
        for number, row in enumerate(self.rows):
            if field not in row:
                raise ValueError(f"example {number} of {self.name} has no field {field!r}: it has {', '.join(row)}")
        return [row[field] for row in self.rows]

    def select(self, indices: Iterable[int]) -> Examples:
        """The examples with these indices. Examples of a random-access source are read and kept in memory."""
        return self._part([self.rows[index] for index in indices])

    def _part(self, rows: Sequence[Example]) -> Examples:
        """A data set with these rows, which are some of the examples.

        Its name begins with "a part of". So a reader of a message knows that the number of an example is its index in
        the part, which may differ from its index in the file.
        """
        name = self.name if self.name.startswith(_PART_PREFIX) else f"{_PART_PREFIX}{self.name}"
        return dataclasses.replace(self, rows=rows, name=name, rejected=())

    def split(self, *fractions: float, seed: int = 0, by: str | Sequence[Hashable] | None = None) -> list[Examples]:
        """Split at random into one part for each fraction, and one part for the remaining examples.

        The examples of a part keep their order.

        Args:
            fractions: fractions of the examples (with ``by``: of the groups).
            seed: seed of the random split.
            by: a field, or one value for each example. Examples with the same value form a group and are in one part.
                None: no groups.

        Raises:
            ValueError: a fraction is not between 0 and 1, the sum of the fractions is not below 1, a part is empty, an
                example does not have the field ``by``, or the number of values differs from the number of examples.
        """
        # math.fsum, because sum((0.7, 0.2, 0.1)) is 0.9999999999999999, which is below 1.
        if not all(0.0 < fraction < 1.0 for fraction in fractions) or math.fsum(fractions) >= 1.0:
            raise ValueError(f"fractions {fractions} must be positive, and their sum must be below 1")
        groups, what = self._groups(by)
        order = np.random.default_rng(seed).permutation(len(groups))
        stops = [round(math.fsum(fractions[: n + 1]) * len(groups)) for n in range(len(fractions))]
        parts = [sorted(index for number in part for index in groups[number]) for part in np.split(order, stops)]
        if not all(parts):
            raise ValueError(f"{len(groups)} {what} in {self.name} are too few for the fractions {fractions}")
        return [self.select(part) for part in parts]

    def folds(
        self, count: int, seed: int = 0, *, by: str | Sequence[Hashable] | None = None
    ) -> list[tuple[Examples, Examples]]:
        """``count`` random pairs (training, test) for cross-validation. Each example is in exactly one test split.

        Args:
            seed: seed of the random folds.
            by: as in :meth:`split`. The examples of a group are in one test split.

        Raises:
            ValueError: ``count`` is below 2 or above the number of examples (with ``by``: of groups), an example does
                not have the field ``by``, or the number of values differs from the number of examples.
        """
        groups, what = self._groups(by)
        if not 2 <= count <= len(groups):
            raise ValueError(f"{count} folds of {len(groups)} {what}: choose from 2 to the number of {what}")
        order = np.random.default_rng(seed).permutation(len(groups))
        parts = [[index for number in part for index in groups[number]] for part in np.array_split(order, count)]
        return [
            (self.select(itertools.chain(*parts[:fold], *parts[fold + 1 :])), self.select(part))
            for fold, part in enumerate(parts)
        ]

    def _groups(self, by: str | Sequence[Hashable] | None) -> tuple[list[list[int]], str]:
        """The indices of the examples of each group (see :meth:`split`), and the word for groups in messages.

        The groups are in the order of their first examples.
        """
        if by is None:
            return [[index] for index in range(len(self))], "examples"
        values = self.column(by) if isinstance(by, str) else by
        check_same_number(example=self, value=values)
        return group_indices(values), f"different values of {by!r}" if isinstance(by, str) else "groups"

    def label_names(self, field: str = "label") -> tuple[str, ...]:
        """The declared class names of the field. If there are none: the distinct labels as strings, sorted.

        The labels are sorted as numbers if all of them consist of digits, and alphabetically otherwise.

        Raises:
            ValueError: there are no declared class names, and an example does not have the field, or has a label that
                is neither a string nor an integer.
        """
        if field in self.class_names:
            return self.class_names[field]
        names = set(_label_texts(self.column(field), self.name, field))
        if all(name.isdecimal() for name in names):
            return tuple(sorted(names, key=lambda name: (int(name), name)))
        return tuple(sorted(names))


def group_indices(values: Iterable[Hashable]) -> list[list[int]]:
    """The indices of equal values: one list for each distinct value, in the order of the first occurrences."""
    groups: dict[Hashable, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class _RenamedExamples(Sequence[Example]):
    """The examples ``source[n]`` for each n in ``numbers``, with renamed fields. Each access reads the source again."""

    source: Any
    fields: Mapping[str, str] | None
    name: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return dataclasses.replace(self, numbers=self.numbers[index])
        number = self.numbers[index]
        row = self.source[number]
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            if row is None:
                kind = "None (a grain.MapDataset returns None for a filtered element: filter the data first)"
            raise ValueError(f"example {number} of {self.name} must be a mapping, got {kind}")
        try:
            return _extract_fields(row, {column: column for column in row} if self.fields is None else self.fields)
        except ValueError as error:
            raise ValueError(f"example {number} of {self.name}: {error}") from error

    def __iter__(self) -> Iterator[Example]:
        # Sequence.__iter__ would treat an IndexError of the source as the end of the sequence.
        return map(self.__getitem__, range(len(self)))


def check_random_access(source: Any, name: str) -> None:
    """Check that ``source`` has a finite length of at least 1, and that it can be indexed.

    Raises:
        TypeError: the source has no length or cannot be indexed.
        ValueError: the source is empty or infinite.
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise TypeError(f"{name} is a {type(source).__name__}: it needs __len__ and __getitem__, like grain.MapDataset")
    if len(source) == 0:
        raise ValueError(f"{name} has no examples")
    if len(source) >= sys.maxsize:
        raise ValueError(f"{name} is infinite: remove repeat(), because every epoch visits all examples once")


def _class_name(number: Any, names: Sequence[str], column: str, example: int) -> str | None:
    if number is None:
        return None
    if not 0 <= number < len(names):
        raise ValueError(
            f"example {example} has {column}={number}, which is not the number of a class ({', '.join(names)}): the "
            "data set may have no labels, like many test sets"
        )
    return names[number]


def label_ids(labels: Sequence[Any], names: Sequence[Any], name: str = "the examples") -> np.ndarray:
    """The index of each label in ``names``, int32 [N]. Integers are converted with ``str``.

    Raises:
        ValueError: a label is not in ``names``, or is neither a string nor an integer.
    """
    names = [str(name) for name in names]
    index = {label: number for number, label in enumerate(names)}
    texts = _label_texts(labels, name)
    for number, (label, text) in enumerate(zip(labels, texts, strict=True)):
        if text not in index:
            raise ValueError(f"example {number} of {name} has the label {label!r}: known labels are {', '.join(names)}")
    return np.asarray([index[text] for text in texts], np.int32)


def _label_texts(labels: Sequence[Any], name: str, field: str = "label") -> list[str]:
    """The labels as strings. Raises ``ValueError`` if a label is neither a string nor an integer.

    Args:
        name: the name of the examples, for messages.
        field: the field of the labels, for messages.
    """
    for number, label in enumerate(labels):
        try:
            check_value(str | int, label, field)
        except ValueError as error:
            raise ValueError(
                f"example {number} of {name}: {error}; convert the labels, or leave the example out"
            ) from error
    return [str(label) for label in labels]


# --------------------------------------------------------------------------------------------------- readers


def make_examples(
    path: str | Path,
    items: Iterable[tuple[int, T | ValueError]],
    make_example: Callable[[T], Example],
    on_error: OnError,
    kind: str = "line",
) -> Examples:
    """The examples that ``make_example`` returns for the items of a file.

    Args:
        path: the file, for messages and for the name of the examples.
        items: the number and the content of each item. An item that cannot be read has a ``ValueError`` as content.
        make_example: the function from content to example. It raises ``ValueError`` for an invalid item.
        on_error: "report" lists invalid items in ``Examples.rejected`` instead of raising an error.
        kind: the word for an item in messages.

    Raises:
        InvalidLineError: an item is invalid. The message names the file and the number of the item.
        ValueError: there is no valid item, or ``on_error`` is unknown.
    """
    check_value(OnError, on_error, "on_error")
    rows, rejected = [], []
    for number, item in items:
        try:
            if isinstance(item, ValueError):
                raise item
            rows.append(make_example(item))
        except ValueError as error:
            if on_error == "raise":
                raise InvalidLineError(f"{path}, {kind} {number}: {error}") from error
            rejected.append(Rejected(number, str(error)))
    if not rows:
        message = f"{path} has no examples"
        if rejected:
            first = rejected[0]
            message += f": all {len(rejected)} {kind}s are invalid, for example {kind} {first.line}: {first.reason}"
        raise ValueError(message)
    return Examples(rows, str(path), tuple(rejected))


def _extract_fields(row: Mapping[str, Any], fields: Mapping[str, str]) -> Example:
    """The example with the ``fields`` (field of the example -> column) of a row.

    Raises:
        ValueError: a column is missing, or its value is None, a text of only white space or a text with a surrogate.
    """
    example = {}
    for field, column in fields.items():
        if column not in row:
            raise ValueError(f"no column {column!r}: the columns are {', '.join(map(repr, row))}")
        value = row[column]
        if value is None:
            raise ValueError(f"{column!r} is null")
        if isinstance(value, str):
            if not value.strip():
                raise ValueError(f"{column!r} is empty")
            check_no_surrogate(value, repr(column))
        example[field] = value
    return example


def _read_rows(
    path: str | Path, delimiter: Literal["\t", ","] | None, encoding: str
) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Yield the number of the first line and the fields of each row of a TSV or CSV file.

    For a malformed row of a CSV file, a ``ValueError`` is yielded instead of the fields. Lines of a TSV file are only
    split at tabs.

    Raises:
        ValueError: the delimiter is not a tab, a comma or None. The delimiter is None, and the suffix of the file is
            neither ``.tsv`` nor ``.csv``. A quote of a CSV file is not closed: the rest of the file cannot be split
            into rows.
    """
    if delimiter is None:
        if suffix_without_gz(path) not in (".tsv", ".csv"):
            raise ValueError(f"{path} is neither a .tsv nor a .csv file: pass the delimiter")
        delimiter = "\t" if suffix_without_gz(path) == ".tsv" else ","
    if delimiter not in ("\t", ","):
        raise ValueError(f"delimiter={delimiter!r} is not supported: convert {path} to TSV (tab) or CSV (comma)")
    if delimiter == "\t":
        for number, line in read_lines(path, encoding):
            yield number, line.split("\t")
        return
    # With strict=True, an unclosed quote is an error. Otherwise the rest of the file would be one field.
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path, encoding)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = _next_row(reader)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise ValueError(
                    f"{path}, line {number}: the row that begins here has a quote that is not closed, so the rest "
                    "of the file cannot be read. Close the quote. A quote inside a quoted text is written as two quotes"
                ) from error
            reason = f"{error} (or a quote is not closed)" if "field limit" in str(error) else str(error)
            if reader.line_num > number:  # a malformed row of several lines: reading continues after its last line
                reason += f" (lines {number} to {reader.line_num})"
            yield number, ValueError(f"not CSV: {reason}")
            continue
        if row is None:
            return
        yield number, row


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row of a CSV reader, or None at the end.

    A field may have ``_MAX_FIELD_SIZE`` characters, or more if ``csv.field_size_limit()`` is larger.
    """
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, _MAX_FIELD_SIZE))
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _read_header(path: str | Path, rows: Iterator[tuple[int, list[str] | ValueError]]) -> list[str]:
    """The column names in the first row.

    Raises:
        ValueError: the file is empty, or the first row of a CSV file is empty or malformed.
    """
    _, names = next(rows, (1, []))
    if isinstance(names, ValueError):
        raise ValueError(f"{path}, line 1: {names}") from names
    if not names:
        raise ValueError(f"{path} is empty: the first line must name the columns")
    return names


def read_table(
    path: str | Path,
    fields: Mapping[str, str],
    *,
    delimiter: Literal["\t", ","] | None = None,
    encoding: str = "utf-8",
    on_error: OnError = "raise",
) -> Examples:
    """Examples from a TSV or CSV file whose first line names the columns.

    Fields of TSV files are not quoted, as in GLUE. Fields of CSV files may be quoted (RFC 4180). A line break in a
    quoted field is read as ``\\n``.

    Args:
        fields: field of the example -> name of the column.
        delimiter: a tab for TSV, a comma for CSV. None: the suffix of the file name (``.tsv`` or ``.csv``) determines
            the delimiter. The case of the suffix does not matter.
        encoding: encoding of the file.
        on_error: "report" lists invalid rows in ``Examples.rejected`` instead of raising an error. Errors that concern
            the whole file or the rest of the file are always raised.

    Raises:
        FileNotFoundError: the file does not exist.
        LookupError: the encoding is unknown.
        InvalidLineError: a row is invalid: a requested value is empty, the number of columns differs from the first
            line, or the quotes are malformed. ``InvalidLineError`` is a ``ValueError``.
        ValueError: the file is not text in this encoding. A requested column is missing or occurs twice. There is no
            valid row. ``on_error`` or ``delimiter`` is unknown. ``delimiter`` is None, and the suffix is neither
            ``.tsv`` nor ``.csv``. A quote is not closed.

    Example:
        >>> read_table("sst2_train.tsv", {"text": "sentence", "label": "label"})   # doctest: +SKIP
    """
    rows = _read_rows(path, delimiter, encoding)
    header = _read_header(path, rows)
    for column in fields.values():
        if header.count(column) != 1:
            count = "no column" if column not in header else f"{header.count(column)} columns"
            raise ValueError(f"{path} has {count} {column!r}: its columns are {', '.join(map(repr, header))}")

    def make_example(row: list[str]) -> Example:
        if len(row) != len(header):
            raise ValueError(f"the row has {len(row)} columns, but the first line has {len(header)}: {row}")
        return _extract_fields(dict(zip(header, row, strict=True)), fields)

    return make_examples(path, rows, make_example, on_error)


def read_jsonl(
    path: str | Path,
    fields: Mapping[str, str],
    *,
    texts: Collection[str] = (),
    labels: Collection[str] = (),
    encoding: str = "utf-8",
    on_error: OnError = "raise",
) -> Examples:
    """Examples from a file with one JSON object per line. Lines of only white space are skipped.

    Args:
        fields: field of the example -> key of the object.
        texts: fields of the example whose values must be strings.
        labels: fields of the example whose values must be strings or integers.
        encoding, on_error: as in :func:`read_table`.

    Raises:
        FileNotFoundError, LookupError: as in :func:`read_table`.
        InvalidLineError: a line is invalid: it is not a JSON object, a requested key is missing, a key occurs twice, or
            a requested value is null, an empty text, a text with a surrogate, or of a type that ``texts`` or ``labels``
            does not allow. ``InvalidLineError`` is a ``ValueError``.
        ValueError: the file is not text in this encoding, there is no valid line, or ``on_error`` is unknown.
    """

    def make_example(line: str) -> Example:
        try:
            row = parse(line)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"the line must be a JSON object, got {type(row).__name__}")
        example = _extract_fields(row, fields)
        for name in texts:
            check_value(str, example[name], name)
        for name in labels:
            check_value(str | int, example[name], name)
        return example

    lines = ((number, line) for number, line in read_lines(path, encoding) if line.strip())
    return make_examples(path, lines, make_example, on_error)


def first_object_keys(path: str | Path, encoding: str = "utf-8", one_of: Collection[str] = ()) -> list[str]:
    """The keys of the first line that is a JSON object with at least one of the keys ``one_of``.

    If ``one_of`` is empty or no line has such an object, the result is the keys of the first line that is a JSON
    object. If no line is a JSON object, the result is empty.
    """
    first: list[str] = []
    for _, line in read_lines(path, encoding):
        with contextlib.suppress(ValueError):
            row = parse(line)
            if isinstance(row, dict):
                if not one_of or not row.keys().isdisjoint(one_of):
                    return list(row)
                first = first or list(row)
    return first


def read_labelled_lines(path: str | Path, *, encoding: str = "utf-8", on_error: OnError = "raise") -> Examples:
    """Examples ``{"label", "text"}`` from a file with a label, a space and a text on each line.

    The label ends at the first space, and must not contain a tab. White space at both ends of a text is removed.
    ``encoding``, ``on_error`` and the errors are as in :func:`read_table`.
    """

    def make_example(line: str) -> Example:
        label, _, text = line.partition(" ")
        if not label or "\t" in label or not text.strip():
            raise ValueError(f"the line must have a label, a space and a text, got {line!r}")
        return {"label": label, "text": text.strip()}

    return make_examples(path, read_lines(path, encoding), make_example, on_error)


def read_labelled(path: str | Path, *, encoding: str = "utf-8", on_error: OnError = "raise") -> Examples:
    """Examples ``{"label", "text"}`` from a classification file.

    The suffix of the file name determines the format:

    - ``.tsv``, ``.csv``: the file has a column "label" and a text column.
    - ``.jsonl``: each line is an object with the key "label" and a text key.
    - any other suffix except ``.json``: each line has a label, a space and a text.

    The text column is the first name of :data:`TEXT_COLUMNS` that the file has. The text key is the first of these
    names in the first object that has at least one of them.

    Args:
        encoding, on_error: as in :func:`read_table`.

    Raises:
        ValueError: the suffix is ``.json``, or there is no text column. Other errors are those of :func:`read_table`,
            :func:`read_jsonl` and :func:`read_labelled_lines`.
    """
    kind = suffix_without_gz(path)
    if kind == ".json":
        raise ValueError(
            f"{path} is a JSON file: convert it to .jsonl, with one object on each line, or to .tsv or .csv"
        )
    if kind not in (".tsv", ".csv", ".jsonl"):
        return read_labelled_lines(path, encoding=encoding, on_error=on_error)
    if kind == ".jsonl":
        names = first_object_keys(path, encoding, TEXT_COLUMNS)
    else:
        names = _read_header(path, _read_rows(path, None, encoding))
    text_column = next((name for name in TEXT_COLUMNS if name in names), None)
    if names and text_column is None:
        raise ValueError(
            f"{path} has no text column (one of {', '.join(map(repr, TEXT_COLUMNS))}): its columns are "
            f"{', '.join(map(repr, names))}"
        )
    fields = {"text": text_column or TEXT_COLUMNS[0], "label": "label"}
    if kind == ".jsonl":
        return read_jsonl(path, fields, texts=("text",), labels=("label",), encoding=encoding, on_error=on_error)
    return read_table(path, fields, encoding=encoding, on_error=on_error)


def read_pairs(
    source: str | Path, target: str | Path, *, encoding: str = "utf-8", on_error: OnError = "raise"
) -> Examples:
    """Examples ``{"source", "target"}`` from two files. Line n of both files is example n.

    White space at both ends of a line is removed.

    Args:
        encoding, on_error: as in :func:`read_table`.

    Raises:
        FileNotFoundError, LookupError: as in :func:`read_table`.
        InvalidLineError: a line is empty. ``InvalidLineError`` is a ``ValueError``.
        ValueError: a file is not text in this encoding, the files have different numbers of lines, there is no valid
            pair, or ``on_error`` is unknown.
    """
    sources, targets = ([line for _, line in read_lines(path, encoding)] for path in (source, target))
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources)} lines and {target} has {len(targets)}: line n of both must be a pair"
        )

    def make_example(pair: tuple[str, str]) -> Example:
        for text, path in zip(pair, (source, target), strict=True):
            if not text.strip():
                raise ValueError(f"the line of {path} is empty")
        return {"source": pair[0].strip(), "target": pair[1].strip()}

    return make_examples(source, enumerate(zip(sources, targets, strict=True), start=1), make_example, on_error)

"""Data sets of other libraries, read by column or by index. Fake classes replace these libraries."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data import Batches, RandomAccess
from jaxlm.data.buckets import Bucketed
from jaxlm.data.examples import Examples


class FakeDataset:
    """A fake ``datasets.Dataset`` with the attributes that ``from_datasets`` uses."""

    def __init__(self, classes=("positive", "negative"), **columns):
        self.columns, self.column_names = columns, list(columns)
        label = SimpleNamespace(names=list(classes))
        self.features = {name: label if name == "label" else SimpleNamespace(dtype="string") for name in columns}
        self.info = SimpleNamespace(dataset_name="films")

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column):
        return iter(self.columns[column])


class LazyElements:
    """A random-access source that creates elements when they are read, and records their indices."""

    def __init__(self, count, make):
        self.count, self.make, self.read = count, make, []

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.read.append(number)
        return self.make(number % self.count)  # like grain.MapDataset


FIELDS = {"text": "sentence", "label": "label"}
FILMS = FakeDataset(sentence=["fine", "dull", "good", "bad"], label=[0, 1, 0, 1], other=[None] * 4)


def test_columns_are_renamed_and_classes_keep_their_names_and_order():
    examples = Examples.from_datasets(FILMS, FIELDS)
    assert list(examples)[:2] == [{"text": "fine", "label": "positive"}, {"text": "dull", "label": "negative"}]
    assert examples.name == "films"
    assert examples.label_names() == ("positive", "negative"), "class names are not sorted"
    assert all(subset.label_names() == ("positive", "negative") for subset in (examples[:1], *examples.split(0.5)))
    assert "label" in examples.class_names
    renamed = Examples.from_datasets(FILMS, {"source": "sentence"}, name="x")
    assert (renamed.column("source"), renamed.name, renamed.class_names) == (["fine", "dull", "good", "bad"], "x", {})


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ({"train": FILMS, "test": FILMS}, TypeError, "a dictionary of data sets: pass one of 'train', 'test'"),
        (iter(()), TypeError, r"has no __len__ or no __getitem__: load it with streaming=False, or .*dataset.take"),
        (
            FakeDataset(text=["a"], label=[0]),
            ValueError,
            "films has no column 'sentence': its columns are 'text', 'label'",
        ),
        (FakeDataset(sentence=[], label=[]), ValueError, "films has no examples"),
        (
            FakeDataset(sentence=["a"], label=[-1]),
            ValueError,
            "example 0 has label=-1, which is not the number of a class",
        ),
        (FakeDataset(sentence=["a", " "], label=[0, 1]), ValueError, "example 1 of films: 'sentence' is empty"),
        (FakeDataset(sentence=["a"], label=[None]), ValueError, "example 0 of films: 'label' is null"),
    ],
)
def test_invalid_datasets_raise_errors(dataset, error, message):
    with pytest.raises(error, match=message):
        Examples.from_datasets(dataset, FIELDS)


def test_examples_are_read_on_access():
    source = LazyElements(10, lambda n: {"sentence": f"text {n}", "label": n, "other": None})
    examples = Examples.from_random_access(source, FIELDS)
    assert source.read == [0]
    assert examples[-1] == {"text": "text 9", "label": 9}
    subset = examples[2:8:2]
    assert source.read == [0, 9]
    assert subset.column("label") == [2, 4, 6]
    assert subset[1:].column("text") == ["text 4", "text 6"]
    assert [row["label"] for row in examples] == list(range(10))
    with pytest.raises(IndexError):
        examples[10]
    assert Examples.from_random_access(LazyElements(2, lambda n: {"x": n}))[1] == {"x": 1}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (iter(()), TypeError, "here is a .*iterator: it needs __len__ and __getitem__, like grain.MapDataset"),
        ([], ValueError, "here has no examples"),
        (
            LazyElements(sys.maxsize, lambda n: {"sentence": "a", "label": 0}),
            ValueError,
            "here is infinite: remove repeat",
        ),
        ([{"text": "a"}], ValueError, "example 0 of here: no column 'sentence': the columns are 'text'"),
        ([None], ValueError, r"example 0 of here must be a mapping, got None \(a grain.MapDataset returns None for"),
    ],
)
def test_invalid_random_access_sources_raise_errors(source, error, message):
    with pytest.raises(error, match=message):
        Examples.from_random_access(source, FIELDS, name="here")


def element(number):
    return {"tokens": np.arange(number, number + 5), "label": number % 3}


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_element_occurs_once_per_epoch(shuffle):
    source = RandomAccess(LazyElements(12, element), 4, seed=1, shuffle=shuffle)
    epochs = []
    for epoch in range(2):
        batches = [source.batch(3 * epoch + step, range(4)) for step in range(3)]
        assert all(batch["tokens"].shape == (4, 5) and batch["label"].shape == (4,) for batch in batches)
        assert all(np.array_equal(batch["tokens"][:, 0] % 3, batch["label"]) for batch in batches)
        epochs.append(np.concatenate([batch["tokens"][:, 0] for batch in batches]).tolist())
        assert sorted(epochs[-1]) == list(range(12))
    assert (epochs[0] == epochs[1]) == (not shuffle)
    np.testing.assert_array_equal(
        np.concatenate([source.batch(1, [row])["tokens"] for row in range(4)]), source.batch(1, range(4))["tokens"]
    )


def test_a_restored_iterator_does_not_read_earlier_elements():
    batches = Batches(RandomAccess(LazyElements(100, element), 4))
    saved_state = [next(batches) for _ in range(7)] and json.loads(json.dumps(batches.state()))
    next_batches = [next(batches)["tokens"].tolist() for _ in range(2)]
    elements = LazyElements(100, element)
    restored = Batches(RandomAccess(elements, 4))
    elements.read.clear()
    restored.restore(saved_state)
    assert [next(restored)["tokens"].tolist() for _ in range(2)] == next_batches
    assert len(elements.read) == 8
    other_data = Batches(RandomAccess(LazyElements(100, lambda n: element(n + 1)), 4))
    with pytest.raises(ValueError, match="the saved iterator read other data:\n  checksum"):
        other_data.restore(saved_state)


def test_elements_of_different_lengths_need_buckets():
    source = LazyElements(9, lambda n: {"ids": np.arange(1, n + 2), "label": n})
    bucketed = Bucketed(
        Examples.from_random_access(source, {"tokens": "ids", "label": "label"}), 3, 2, length_multiple=1
    )
    rows = [bucketed.batch(step, range(3)) for step in range(bucketed.steps_per_epoch)]
    seen = itertools.chain.from_iterable(batch.indices.tolist() for batch in rows)
    assert sorted(index for index in seen if index >= 0) == list(range(9))
    with pytest.raises(
        ValueError, match=r"element \d has ids int64\[\d\], .* but element \d of the same batch has ids"
    ):
        RandomAccess(source, 3).batch(0, range(3))


@pytest.mark.parametrize(
    ("elements", "options", "error", "message"),
    [
        ([], {}, ValueError, "the source has no examples"),
        ([{"x": 1}], {"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ([np.ones(3)], {}, ValueError, "element 0 must be a mapping of arrays, got ndarray"),
        ([{"text": "a"}], {}, ValueError, "text of element 0 has dtype <U1: it must hold numbers"),
    ],
)
def test_invalid_elements_raise_errors(elements, options, error, message):
    with pytest.raises(error, match=message):
        RandomAccess(elements, **{"batch_size": 2, **options})


def test_a_batch_without_rows_raises_an_error():
    with pytest.raises(ValueError, match="rows is empty: give the number of at least one row of the batch"):
        RandomAccess([element(0)], 2).batch(0, [])


def test_errors_name_ids_outside_the_vocabulary():
    source = RandomAccess([element(0), element(9)], 2)
    source.check(14)
    with pytest.raises(ValueError, match="tokens of element 1"):
        source.check(13)
    # Only tokens are ids. They may have several axes.
    pairs = RandomAccess([{"tokens": np.arange(6).reshape(2, 3), "labels": np.array([-100, 8])}], 1)
    pairs.check(6)
    with pytest.raises(ValueError, match="tokens of element 0: id 5 at position 5"):
        pairs.check(5)

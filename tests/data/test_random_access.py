"""Data sets that other libraries hold: read by column or by index, without those libraries."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data import Batches, RandomAccess
from jaxlm.data.buckets import Bucketed
from jaxlm.data.examples import Examples


class Table:
    """What ``from_datasets`` uses of a ``datasets.Dataset``."""

    def __init__(self, classes=("positive", "negative"), **columns):
        self.columns, self.column_names = columns, list(columns)
        label = SimpleNamespace(names=list(classes))
        self.features = {name: label if name == "label" else SimpleNamespace(dtype="string") for name in columns}
        self.info = SimpleNamespace(dataset_name="films")

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column):
        return iter(self.columns[column])


class Indexed:
    """Elements that are made when they are read; records which were."""

    def __init__(self, count, make):
        self.count, self.make, self.read = count, make, []

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.read.append(number)
        return self.make(number % self.count)  # like grain.MapDataset


FIELDS = {"text": "sentence", "label": "label"}
FILMS = Table(sentence=["fine", "dull", "good", "bad"], label=[0, 1, 0, 1], other=[None] * 4)


def test_columns_are_renamed_and_classes_keep_their_names_and_order():
    found = Examples.from_datasets(FILMS, FIELDS)
    assert list(found)[:2] == [{"text": "fine", "label": "positive"}, {"text": "dull", "label": "negative"}]
    assert found.name == "films"
    assert found.label_names() == ("positive", "negative"), "not sorted"
    assert all(part.label_names() == ("positive", "negative") for part in (found[:1], *found.split(0.5)))
    assert "label" in found.class_names
    plain = Examples.from_datasets(FILMS, {"source": "sentence"}, name="x")
    assert (plain.column("source"), plain.name, plain.class_names) == (["fine", "dull", "good", "bad"], "x", {})


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ({"train": FILMS, "test": FILMS}, TypeError, "a dictionary of data sets: pass one of 'train', 'test'"),
        (iter(()), TypeError, r"has no length and no index: load it with streaming=False, or .*dataset.take"),
        (Table(text=["a"], label=[0]), ValueError, "films has no column 'sentence': its columns are 'text', 'label'"),
        (Table(sentence=[], label=[]), ValueError, "films has no examples"),
        (Table(sentence=["a"], label=[-1]), ValueError, "example 0 has label=-1, which is not the number of a class"),
        (Table(sentence=["a", " "], label=[0, 1]), ValueError, "example 1 of films: 'sentence' is empty"),
        (Table(sentence=["a"], label=[None]), ValueError, "example 0 of films: 'label' is null"),
    ],
)
def test_what_is_no_data_set_of_examples_is_named(dataset, error, message):
    with pytest.raises(error, match=message):
        Examples.from_datasets(dataset, FIELDS)


def test_examples_are_read_when_they_are_used():
    source = Indexed(10, lambda n: {"sentence": f"text {n}", "label": n, "other": None})
    found = Examples.from_random_access(source, FIELDS)
    assert source.read == [0]
    assert found[-1] == {"text": "text 9", "label": 9}
    part = found[2:8:2]
    assert source.read == [0, 9]
    assert part.column("label") == [2, 4, 6]
    assert part[1:].column("text") == ["text 4", "text 6"]
    assert [row["label"] for row in found] == list(range(10))
    with pytest.raises(IndexError):
        found[10]
    assert Examples.from_random_access(Indexed(2, lambda n: {"x": n}))[1] == {"x": 1}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (iter(()), TypeError, "here is a .*iterator: it needs a length and an index, like grain.MapDataset"),
        ([], ValueError, "here has no examples"),
        (
            Indexed(sys.maxsize, lambda n: {"sentence": "a", "label": 0}),
            ValueError,
            "here is infinite: remove repeat",
        ),
        ([{"text": "a"}], ValueError, "example 0 of here: no column 'sentence': the columns are 'text'"),
        ([None], ValueError, r"example 0 of here must be a mapping, got None \(a grain.MapDataset returns None for"),
    ],
)
def test_bad_random_access(source, error, message):
    with pytest.raises(error, match=message):
        Examples.from_random_access(source, FIELDS, name="here")


def element(number):
    return {"tokens": np.arange(number, number + 5), "label": number % 3}


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_element_is_in_an_epoch_once(shuffle):
    source = RandomAccess(Indexed(12, element), 4, seed=1, shuffle=shuffle)
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


def test_a_run_goes_on_without_reading_what_it_has_read():
    batches = Batches(RandomAccess(Indexed(100, element), 4))
    saved = [next(batches) for _ in range(7)] and json.loads(json.dumps(batches.state()))
    rest = [next(batches)["tokens"].tolist() for _ in range(2)]
    elements = Indexed(100, element)
    again = Batches(RandomAccess(elements, 4))
    elements.read.clear()
    again.restore(saved)
    assert [next(again)["tokens"].tolist() for _ in range(2)] == rest
    assert len(elements.read) == 8
    other = Batches(RandomAccess(Indexed(100, lambda n: element(n + 1)), 4))
    with pytest.raises(ValueError, match="the saved iterator read other data:\n  checksum"):
        other.restore(saved)


def test_elements_of_unequal_length_go_into_buckets():
    source = Indexed(9, lambda n: {"ids": np.arange(1, n + 2), "label": n})
    bucketed = Bucketed(Examples.from_random_access(source, {"tokens": "ids", "label": "label"}), 3, 2, multiple=1)
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
        ([{"x": 1}], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ([np.ones(3)], {}, ValueError, "element 0 must be a mapping of arrays, got ndarray"),
        ([{"text": "a"}], {}, ValueError, "text of element 0 has dtype <U1: it must hold numbers"),
    ],
)
def test_bad_elements(elements, options, error, message):
    with pytest.raises(error, match=message):
        RandomAccess(elements, **{"batch_size": 2, **options})


def test_ids_outside_the_vocabulary_are_named():
    source = RandomAccess([element(0), element(9)], 2)
    source.check(14)
    with pytest.raises(ValueError, match="tokens of element 1"):
        source.check(13)

"""Examples and random access with the real packages ``datasets`` and ``grain``."""

import numpy as np
import pytest

from jaxlm.data import Batches, RandomAccess
from jaxlm.data.buckets import Bucketed
from jaxlm.data.examples import Examples

pytestmark = pytest.mark.live

FIELDS = {"text": "sentence", "label": "label"}


def films():
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])}
    )
    rows = {"sentence": [f"film {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hugging_face_datasets_as_examples():
    import datasets

    examples = Examples.from_datasets(films(), FIELDS)
    assert len(examples) == 20
    assert examples[3] == {"text": "film 3", "label": "negative"}
    assert examples.label_names() == ("positive", "negative")
    chosen = films().shuffle(seed=1).select(range(5))
    assert Examples.from_datasets(chosen, {"text": "sentence"}).column("text") == list(chosen["sentence"])
    with pytest.raises(TypeError, match="IterableDataset has no __len__ or no __getitem__: load it"):
        Examples.from_datasets(films().to_iterable_dataset(), FIELDS)
    with pytest.raises(TypeError, match="a dictionary of data sets: pass one of 'train', 'test'"):
        Examples.from_datasets(datasets.DatasetDict({"train": films(), "test": films()}), FIELDS)
    with pytest.raises(ValueError, match="has no column 'text': its columns are 'sentence', 'label'"):
        Examples.from_datasets(films(), {"text": "text"})


def test_hugging_face_datasets_as_random_access():
    rows = films().map(lambda row: {"tokens": [ord(c) for c in row["sentence"][:6]]}, remove_columns=["sentence"])
    batch = RandomAccess(rows, 4).batch(2, range(4))
    assert batch["tokens"].shape == (4, 6)
    assert Examples.from_random_access(films(), FIELDS)[5] == {"text": "film 5", "label": 1}


def test_grain_datasets_as_examples_and_random_access():
    import grain

    def element(number):
        return {"ids": np.arange(1, number + 2), "label": number}

    data = grain.MapDataset.range(12).shuffle(seed=3).map(element)
    examples = Examples.from_random_access(data, {"tokens": "ids", "label": "label"})
    assert sorted(examples.column("label")) == list(range(12))
    assert examples[2]["label"] == data[2]["label"]
    members = np.concatenate([bucket.members for bucket in Bucketed(examples, 4, 2).buckets])
    assert sorted(members.tolist()) == list(range(12))
    fixed_length = data.map(lambda row: {"tokens": np.full(3, row["label"])})
    batches = Batches(RandomAccess(fixed_length, 4, shuffle=False))
    numbers = np.concatenate([next(batches)["tokens"][:, 0] for _ in range(3)])
    assert numbers.tolist() == [int(fixed_length[n]["tokens"][0]) for n in range(12)]
    saved_state, next_tokens = batches.state(), next(batches)["tokens"]
    restored = Batches(RandomAccess(fixed_length, 4, shuffle=False))
    restored.restore(saved_state)
    np.testing.assert_array_equal(next(restored)["tokens"], next_tokens)


def test_infinite_filtered_and_iterable_grain_datasets_are_rejected():
    import grain

    data = grain.MapDataset.range(4).map(lambda number: {"x": number})
    with pytest.raises(ValueError, match=r"the source is infinite: remove repeat\(\)"):
        RandomAccess(data.repeat(), 2)
    with pytest.raises(ValueError, match="example 0 of the source must be a mapping, got None"):
        Examples.from_random_access(data.filter(lambda row: row["x"] > 0))
    with pytest.raises(TypeError, match="is a .*IterDataset.*: it needs __len__ and __getitem__"):
        RandomAccess(data.to_iter_dataset(), 2)

"""Length buckets: every example once per epoch, few batch shapes, and minimal padding."""

import itertools

import numpy as np
import pytest

from jaxlm.data import Batches
from jaxlm.data.buckets import Bucketed, _least_padding, _partition


def examples(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"source": np.full(rng.integers(1, 60), n % 97 + 1), "target": np.full(rng.integers(1, 30), 2), "label": n % 3}
        for n in range(count)
    ]


@pytest.mark.parametrize("equal_tokens", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_occurs_once_per_epoch(equal_tokens, shuffle):
    data = examples()
    source = Bucketed(data, 4, num_buckets=5, equal_tokens=equal_tokens, shuffle=shuffle, seed=2)
    orders = []
    for epoch in (0, 1):
        indices = []
        for step in range(source.steps_per_epoch):
            rows = source.batch(epoch * source.steps_per_epoch + step, range(4))
            for row, index in enumerate(rows.indices):
                if index < 0:
                    assert rows.lengths["source"][row] == 0
                    continue
                indices.append(int(index))
                length = len(data[index]["source"])
                assert rows.lengths["source"][row] == length
                assert rows.fields["source"][row, :length].tolist() == data[index]["source"].tolist()
                assert not rows.fields["source"][row, length:].any()
                assert rows.fields["label"][row] == data[index]["label"]
                assert rows.segment_ids("source")[row].sum() == length
        assert sorted(indices) == list(range(len(data)))
        orders.append(indices)
    assert (orders[0] == orders[1]) != shuffle


def test_the_fingerprint_depends_on_names_and_lengths():
    examples = [{"source": [1, 2], "target": [3]}, {"source": [1], "target": [2, 3]}, {"source": [1, 2], "other": [3]}]
    assert len({str(Bucketed([example], 1).fingerprint()) for example in examples}) == 3
    assert (
        Bucketed(examples[:1], 1).fingerprint()
        == Bucketed([{"source": np.array([1, 2]), "target": [3]}], 1).fingerprint()
    )


def test_each_bucket_has_one_shape_and_a_similar_number_of_tokens():
    source = Bucketed(examples(600), 8, num_buckets=4, equal_tokens=True)
    shapes = {source.batch(step, range(8)).fields["source"].shape for step in range(source.steps_per_epoch)}
    assert len(shapes) == len(source.buckets) == 4
    tokens = [bucket.rows * sum(bucket.lengths.values()) for bucket in source.buckets]
    assert max(tokens) <= 8 * sum(source.buckets[-1].lengths.values())
    assert min(tokens) > 0.5 * max(tokens)
    assert all(length % 8 == 0 for bucket in source.buckets for length in bucket.lengths.values())
    one_bucket = Bucketed(examples(600), 8, num_buckets=1)
    assert source.efficiency > one_bucket.efficiency
    assert source.describe().startswith("4 shapes (")


def test_the_partition_has_minimal_padding():
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(1, 9, 6)
        largest = np.stack([np.sort(rng.integers(1, 40, 6)), rng.integers(1, 20, 6)], axis=1)

        def padded_size(parts, counts=counts, largest=largest):
            return sum(counts[a:b].sum() * largest[a:b].max(axis=0).sum() for a, b in parts)

        costs = []
        for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 6), n) for n in range(3)):
            stops = [0, *cuts, 6]
            costs.append(padded_size(list(itertools.pairwise(stops))))
        assert padded_size(_least_padding(counts, largest, 3)) == min(costs)


def test_examples_are_sorted_by_the_length_that_needs_less_padding():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 50, 400)
    similar_lengths = [{"a": np.ones(n, int), "b": np.ones(max(1, n + rng.integers(-6, 7)), int)} for n in lengths]
    proportional_lengths = [{"a": np.ones(n, int), "b": np.ones(n // 8 + 1, int)} for n in lengths]
    for data in (similar_lengths, proportional_lengths):
        source = Bucketed(data, 4, num_buckets=4, length_multiple=1)
        sizes = np.asarray([[len(example[name]) for name in "ab"] for example in data])
        padded_size = sum(sum(bucket.lengths.values()) * len(bucket.members) for bucket in source.buckets)
        for order in (sizes.sum(axis=1), sizes.max(axis=1)):
            parts = _partition(sizes, order, 4)
            assert padded_size <= sum(shape.sum() * len(members) for shape, members in parts)


def test_two_processes_read_the_same_rows_as_one():
    source = Bucketed(examples(), 4, num_buckets=3, equal_tokens=True)
    for step in range(source.steps_per_epoch):
        expected = source.batch(step, range(4)).indices
        rows_of_processes = [source.batch(step, rows).indices for rows in (range(2), range(2, 4))]
        assert np.concatenate(rows_of_processes).tolist() == expected.tolist()


def test_prefetched_batches_are_equal_and_can_be_resumed():
    source = Bucketed(examples(), 4)
    unprefetched, prefetched = (
        Batches(source, to_batch=lambda rows: rows.indices),
        Batches(source, to_batch=lambda rows: rows.indices, prefetch=3),
    )
    expected = [next(unprefetched).tolist() for _ in range(9)]
    assert [next(prefetched).tolist() for _ in range(5)] == expected[:5]
    assert prefetched.state()["next"] == 5
    restored = Batches(source, to_batch=lambda rows: rows.indices, prefetch=2)
    next(restored)
    restored.restore(prefetched.state())
    assert [next(restored).tolist() for _ in range(4)] == expected[5:]
    other_data = Batches(Bucketed(examples(seed=1), 4))
    with pytest.raises(ValueError, match="read other data"):
        other_data.restore(prefetched.state())


def test_an_error_in_a_prefetched_batch_is_raised():
    def refuse(rows):
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        next(Batches(Bucketed(examples(), 4), to_batch=refuse, prefetch=2))


def test_a_batch_that_failed_is_not_skipped():
    source = Bucketed(examples(), 4)
    second = source.batch(1, range(4)).indices.tolist()

    def refuse_second(rows):
        if rows.indices.tolist() == second:
            raise ValueError("no second batch")
        return rows

    batches = Batches(source, to_batch=refuse_second, prefetch=2)
    next(batches)
    for _ in range(2):
        with pytest.raises(ValueError, match="no second batch"):
            next(batches)
    assert batches.state()["next"] == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_can_be_read_again_after_an_error(prefetch):
    source = Bucketed(examples(), 4)
    failures = [OSError("a transient error")]

    def fail_once(rows):
        if failures:
            raise failures.pop()
        return rows.indices.tolist()

    batches = Batches(source, to_batch=fail_once, prefetch=prefetch)
    with pytest.raises(OSError, match="a transient error"):
        next(batches)
    assert [next(batches) for _ in range(3)] == [source.batch(step, range(4)).indices.tolist() for step in range(3)]


def test_lengths_are_not_rounded_above_max_length():
    data = [{"tokens": np.arange(1, length + 1)} for length in (3, 9, 11)]
    assert [bucket.lengths["tokens"] for bucket in Bucketed(data, 2, 2).buckets] == [8, 16]
    source = Bucketed(data, 2, 2, shuffle=False, max_length=11)
    assert [bucket.lengths["tokens"] for bucket in source.buckets] == [8, 11]
    assert source.batch(1, range(2)).fields["tokens"].tolist()[1] == list(range(1, 12))


IDS = np.arange(1, 3)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no examples"),
        ([{"label": 1}], {}, r"the examples have no array \(fields: label\): encode their texts"),
        ([{"a": IDS}, {"b": IDS}], {}, r"example 1 has the fields \['b'\]"),
        ([{"a": IDS}, {"a": IDS[:0]}], {}, "a of example 1 must be a 1-D array with at least one integer"),
        ([{"a": IDS}], {"num_buckets": 0}, "num_buckets=0 must be at least 1"),
        ([{"a": IDS}, {"a": np.ones(2)}], {}, "a of example 1 has dtype float64, but batches hold int32: convert it"),
        ([{"a": IDS}, {"a": [1, 2.5]}], {}, "a of example 1 has dtype float64"),
        ([{"a": IDS == 1}], {}, "a of example 0 has dtype bool"),
        ([{"a": IDS}, {"a": IDS + 2**32}], {}, "a of example 1 has values outside int32: from 4294967297 to"),
        ([{"a": IDS}, {"a": [1, 2, 3]}], {"max_length": 2}, "a of example 1 has 3 entries, more than max_length=2"),
        ([{"a": IDS}], {"max_length": 0}, "max_length=0 must be at least 1"),
    ],
)
def test_invalid_input_raises_an_error(data, options, message):
    with pytest.raises(ValueError, match=message):
        Bucketed(data, 2, **options)


def test_errors_name_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match="source of example 0"):
        Bucketed(examples(), 4).check(1)
    with pytest.raises(ValueError, match="pad_id: id 900 at position 0 is outside the vocabulary of 900 ids"):
        Bucketed(examples(), 4, pad_id=900).check(900)
    Bucketed([{"tokens": IDS, "labels": np.array([-100, 8])}], 1).check(3)  # labels are not ids


@pytest.mark.parametrize(
    ("scores", "dtype"),
    [
        ([np.float16(1), 1e6], np.float64),
        ([np.int8(1), 300], np.int64),
        ([np.float32(1), np.float32(2)], np.float32),
        ([True, False], np.bool_),
    ],
)
def test_the_dtype_of_scalars_represents_all_values(scores, dtype):
    batch = Bucketed([{"tokens": IDS, "score": score} for score in scores], 3, shuffle=False).batch(0, range(3))
    assert batch.fields["score"].dtype == dtype
    assert batch.fields["score"].tolist() == [*scores, 0]


def test_scalars_of_several_types_raise():
    rows = [{"tokens": np.ones(3, np.int32), "score": 1}, {"tokens": np.ones(2, np.int32), "score": 2.5}]
    with pytest.raises(ValueError, match=r"score of example 1 is 2.5, but example 0 has 1"):
        Bucketed(rows, 2)
    names = [{"tokens": np.ones(3, np.int32), "name": "a"}]
    with pytest.raises(ValueError, match="name of example 0 is 'a'"):
        Bucketed(names, 1)

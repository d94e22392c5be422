"""Length buckets: every example once an epoch, few shapes, the least padding."""

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
def test_every_example_is_in_an_epoch_once(equal_tokens, shuffle):
    data = examples()
    source = Bucketed(data, 4, num_buckets=5, equal_tokens=equal_tokens, shuffle=shuffle, seed=2)
    orders = []
    for epoch in (0, 1):
        seen = []
        for step in range(source.steps_per_epoch):
            rows = source.batch(epoch * source.steps_per_epoch + step, range(4))
            for row, index in enumerate(rows.indices):
                if index < 0:
                    assert rows.lengths["source"][row] == 0
                    continue
                seen.append(int(index))
                length = len(data[index]["source"])
                assert rows.lengths["source"][row] == length
                assert rows.fields["source"][row, :length].tolist() == data[index]["source"].tolist()
                assert not rows.fields["source"][row, length:].any()
                assert rows.fields["label"][row] == data[index]["label"]
                assert rows.segment_ids("source")[row].sum() == length
        assert sorted(seen) == list(range(len(data)))
        orders.append(seen)
    assert (orders[0] == orders[1]) != shuffle


def test_shapes_are_as_many_as_buckets_and_batches_have_about_equal_tokens():
    source = Bucketed(examples(600), 8, num_buckets=4, equal_tokens=True)
    shapes = {source.batch(step, range(8)).fields["source"].shape for step in range(source.steps_per_epoch)}
    assert len(shapes) == len(source.buckets) == 4
    tokens = [bucket.rows * sum(bucket.lengths.values()) for bucket in source.buckets]
    assert max(tokens) <= 8 * sum(source.buckets[-1].lengths.values())
    assert min(tokens) > 0.5 * max(tokens)
    assert all(length % 8 == 0 for bucket in source.buckets for length in bucket.lengths.values())
    one = Bucketed(examples(600), 8, num_buckets=1)
    assert source.efficiency > one.efficiency
    assert source.describe().startswith("4 shapes (")


def test_the_partition_has_the_least_padding():
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(1, 9, 6)
        largest = np.stack([np.sort(rng.integers(1, 40, 6)), rng.integers(1, 20, 6)], axis=1)

        def cost(parts, counts=counts, largest=largest):
            return sum(counts[a:b].sum() * largest[a:b].max(axis=0).sum() for a, b in parts)

        every = []
        for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 6), n) for n in range(3)):
            stops = [0, *cuts, 6]
            every.append(cost(list(itertools.pairwise(stops))))
        assert cost(_least_padding(counts, largest, 3)) == min(every)


def test_examples_are_ordered_by_the_length_that_pads_less():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 50, 400)
    alike = [{"a": np.ones(n, int), "b": np.ones(max(1, n + rng.integers(-6, 7)), int)} for n in lengths]
    opposite = [{"a": np.ones(n, int), "b": np.ones(n // 8 + 1, int)} for n in lengths]
    for data in (alike, opposite):
        source = Bucketed(data, 4, num_buckets=4, multiple=1)
        sizes = np.asarray([[len(example[name]) for name in "ab"] for example in data])
        padded = sum(sum(bucket.lengths.values()) * len(bucket.members) for bucket in source.buckets)
        for order in (sizes.sum(axis=1), sizes.max(axis=1)):
            parts = _partition(sizes, order, 4)
            assert padded <= sum(shape.sum() * len(members) for shape, members in parts)


def test_two_processes_read_the_rows_of_one():
    source = Bucketed(examples(), 4, num_buckets=3, equal_tokens=True)
    for step in range(source.steps_per_epoch):
        whole = source.batch(step, range(4)).indices
        parts = [source.batch(step, rows).indices for rows in (range(2), range(2, 4))]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_batches_ahead_are_the_same_and_resume():
    source = Bucketed(examples(), 4)
    plain, ahead = (
        Batches(source, to_batch=lambda rows: rows.indices),
        Batches(source, to_batch=lambda rows: rows.indices, prefetch=3),
    )
    taken = [next(plain).tolist() for _ in range(9)]
    assert [next(ahead).tolist() for _ in range(5)] == taken[:5]
    assert ahead.state()["next"] == 5
    fresh = Batches(source, to_batch=lambda rows: rows.indices, prefetch=2)
    next(fresh)
    fresh.restore(ahead.state())
    assert [next(fresh).tolist() for _ in range(4)] == taken[5:]
    other = Batches(Bucketed(examples(seed=1), 4))
    with pytest.raises(ValueError, match="read other data"):
        other.restore(ahead.state())


def test_an_error_of_a_batch_made_ahead_is_raised():
    def refuse(rows):
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        next(Batches(Bucketed(examples(), 4), to_batch=refuse, prefetch=2))


def test_no_batch_takes_the_step_of_one_that_failed():
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


def test_no_length_is_rounded_above_the_longest_that_a_model_reads():
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
        ([{"a": IDS}, {"b": IDS}], {}, r"example 1 has the fields \['b'\]"),
        ([{"a": IDS}, {"a": IDS[:0]}], {}, "a of example 1 must be a 1-D array with at least one integer"),
        ([{"a": IDS}], {"num_buckets": 0}, "num_buckets must be at least 1"),
        ([{"a": IDS}, {"a": np.ones(2)}], {}, "a of example 1 has dtype float64, but batches hold int32: convert it"),
        ([{"a": IDS}, {"a": [1, 2.5]}], {}, "a of example 1 has dtype float64"),
        ([{"a": IDS == 1}], {}, "a of example 0 has dtype bool"),
        ([{"a": IDS}, {"a": IDS + 2**32}], {}, "a of example 1 has values outside int32: from 4294967297 to"),
        ([{"a": IDS}, {"a": [1, 2, 3]}], {"max_length": 2}, "a of example 1 has 3 entries, more than max_length=2"),
        ([{"a": IDS}], {"max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        Bucketed(data, 2, **options)


def test_ids_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="source of example 0"):
        Bucketed(examples(), 4).check(1)

"""Sources of batches: correct tokens, complete epochs, equal batches for any number of processes, and restarts."""

import json

import numpy as np
import pytest

from jaxlm.data import Batches, ContiguousStreams, PackedDocuments, RandomWindows, batching
from jaxlm.data.batching import permute

TOKENS = np.arange(1, 1004, dtype=np.uint16)  # a token is its position + 1, so that 0 can only be padding


def documents(seed=0, count=60, max_length=40):
    """Return documents of 1 to ``max_length`` tokens. All tokens are distinct and nonzero."""
    lengths = np.random.default_rng(seed).integers(1, max_length + 1, count)
    return np.split(np.arange(1, lengths.sum() + 1, dtype=np.int32), np.cumsum(lengths)[:-1])


SOURCES = {
    "windows": lambda **kw: RandomWindows(**{"tokens": TOKENS, "length": 10, "batch_size": 8, "seed": 3, **kw}),
    "columns": lambda **kw: ContiguousStreams(**{"tokens": TOKENS, "length": 10, "batch_size": 8, **kw}),
    "packed": lambda **kw: PackedDocuments(
        **{"documents": documents(), "length": 16, "batch_size": 8, "seed": 3, **kw}
    ),
}
each_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def global_batch(source, index):
    return source.batch(index, range(source.batch_size))


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_equal(left, right)


# ----------------------------------------------------------------------------------------- the permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 64, 65, 1000, 1023, 1025])
def test_permute_visits_each_index_once(count):
    for seed, epoch in [(0, 0), (0, 1), (2**40, 12)]:
        visited = permute(np.arange(count), count, seed, epoch)
        np.testing.assert_array_equal(np.sort(visited), np.arange(count))


def test_permute_of_an_index_does_not_depend_on_the_other_indices():
    expected = permute(np.arange(1000), 1000, 7, 2)
    np.testing.assert_array_equal(permute(np.asarray([999, 3, 3]), 1000, 7, 2), expected[[999, 3, 3]])


def test_permute_has_fixed_values():
    """If these values change, saved iterators continue with other batches: change them only in a new major version."""
    assert permute(np.arange(8), 1000, seed=0, epoch=0).tolist() == [0, 136, 123, 595, 967, 77, 980, 755]
    assert permute(np.asarray([10**12]), 10**12 + 1, seed=1, epoch=5).tolist() == [495376031047]


@pytest.mark.thorough
@pytest.mark.parametrize("count", [2, 3, 7])
def test_permute_is_uniform(count):
    """Each (index, result) pair is expected 1000 times. The limit is five standard deviations of at most 32."""
    hits = np.zeros((count, count))
    for seed in range(1000 * count):
        hits[np.arange(count), permute(np.arange(count), count, seed, 0)] += 1
    assert np.abs(hits - 1000).max() < 5 * 32


def test_orders_of_epochs_and_seeds_are_uncorrelated():
    count = 5000
    orders = [permute(np.arange(count), count, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, order in enumerate(orders):
        # The correlation of random orders has a standard deviation of 1/sqrt(count) = 0.014.
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.07
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.07
        for earlier_order in orders[:i]:
            assert abs(np.corrcoef(order, earlier_order)[0, 1]) < 0.07


# -------------------------------------------------------------------------------------------- every source


@each_source
def test_shapes_and_types(make):
    """Tokens and segment ids are int32 [batch, length + 1]; resets are bool [batch]."""
    source = make()
    token_batch = global_batch(source, 5)
    for array in (token_batch.tokens, token_batch.segment_ids):
        assert array is None or (array.shape == (8, source.length + 1) and array.dtype == np.int32)
    assert token_batch.reset is None or (token_batch.reset.shape == (8,) and token_batch.reset.dtype == bool)


@each_source
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(make, process_count):
    source = make()
    share = 8 // process_count
    processes = [Batches(make(), range(i * share, (i + 1) * share)) for i in range(process_count)]
    for step in range(2 * source.rows_per_epoch // source.batch_size + 2):
        process_batches = [next(process) for process in processes]
        actual = [None if field[0] is None else np.concatenate(field) for field in zip(*process_batches, strict=True)]
        assert_same(actual, global_batch(source, step))
    assert all(process.state() == processes[0].state() for process in processes)


@each_source
def test_a_restored_iterator_continues_exactly(make):
    uninterrupted, interrupted = Batches(make()), Batches(make())
    for _ in range(7):
        next(uninterrupted), next(interrupted)
    state = json.loads(json.dumps(interrupted.state()))
    assert len(json.dumps(state)) < 300
    restored = [Batches(make(), rows) for rows in (range(4), range(4, 8))]  # with two processes instead of one
    for iterator in restored:
        iterator.restore(state)
    for _ in range(30):
        expected = next(uninterrupted)
        np.testing.assert_array_equal(np.concatenate([next(iterator).tokens for iterator in restored]), expected.tokens)


@each_source
@pytest.mark.parametrize(("field", "value"), [("batch_size", 4), ("length", 11)])
def test_a_state_of_other_settings_is_rejected(make, field, value):
    state = Batches(make()).state()
    other = Batches(make(**{field: value}))
    with pytest.raises(ValueError, match=f"{field}: saved {state['source'][field]}, now {value}"):
        other.restore(state)
    assert other.state()["next"] == 0


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (SOURCES["windows"](seed=4), SOURCES["windows"](), r"seed: saved 4, now 3"),
        (SOURCES["windows"](stride=2), SOURCES["windows"](), r"stride: saved 2, now 1"),
        (
            SOURCES["windows"](),
            SOURCES["columns"](),
            r"kind: saved 'RandomWindows', now 'ContiguousStreams'\n  seed: saved 3, now N",
        ),
        (SOURCES["windows"](tokens=TOKENS[:-1]), SOURCES["windows"](), r"tokens: saved 1002, now 1003"),
        (SOURCES["columns"](tokens=TOKENS[::-1]), SOURCES["columns"](), r"data:\n  checksum: saved \d+, now \d+$"),
        (
            SOURCES["packed"](documents=documents()[::-1]),
            SOURCES["packed"](),
            r"data:\n  checksum: saved \d+, now \d+$",
        ),
        (SOURCES["packed"](seed=4), SOURCES["packed"](), r"seed: saved 4, now 3"),
    ],
)
def test_a_state_of_other_data_is_rejected(saved, now, message):
    with pytest.raises(ValueError, match=message):
        Batches(now).restore(Batches(saved).state())


@pytest.mark.parametrize(
    "state",
    [{}, {"next": -1, "source": {}}, {"next": True, "source": {}}, {"next": "3", "source": {}}, {"next": 3}],
)
def test_an_invalid_state_is_rejected(state):
    with pytest.raises(ValueError, match="not the state of an iterator"):
        Batches(SOURCES["columns"]()).restore(state)


def test_a_memory_map_and_an_array_have_the_same_fingerprint(tmp_path):
    np.save(tmp_path / "a.npy", TOKENS)
    source = SOURCES["windows"](tokens=np.load(tmp_path / "a.npy", mmap_mode="r"), seed=np.int64(3))
    assert source.fingerprint() == SOURCES["windows"](tokens=TOKENS.astype(np.int64)).fingerprint()
    json.dumps(source.fingerprint())


def test_any_changed_token_changes_the_fingerprint(monkeypatch):
    monkeypatch.setattr(batching, "_CHECKSUM_CHUNK", 100)  # so that the tokens have several chunks
    tokens = np.arange(5000) % 97
    for name in ("windows", "columns"):
        fingerprint = SOURCES[name](tokens=tokens).fingerprint()
        for position in (0, 99, 100, 1237, 4999):
            changed = tokens.copy()
            changed[position] += 1
            assert SOURCES[name](tokens=changed).fingerprint() != fingerprint
    texts = [np.arange(5), np.arange(7), np.arange(5)]
    changed_texts = [texts[0], texts[1], np.array([0, 1, 2, 4, 3])]
    assert SOURCES["packed"](documents=texts).fingerprint() != SOURCES["packed"](documents=changed_texts).fingerprint()


@pytest.mark.parametrize("rows", [[], [7, 8], [-1], [0, 0], [0.5], np.array([True, False]), np.array([8])])
def test_rows_must_be_different_rows_of_the_batch(rows):
    with pytest.raises(ValueError, match=r"rows=\[.*\] must be one or more of the rows 0 to 7 of a batch of 8"):
        Batches(SOURCES["columns"](), rows)


def test_rows_may_be_an_array():
    expected, actual = (next(Batches(SOURCES["columns"](), rows)) for rows in ([4, 1], np.array([4, 1])))
    assert_same(actual, expected)


@each_source
@pytest.mark.parametrize("field", ["length", "batch_size", "seed"])
def test_options_have_minimum_values(make, field):
    if field == "seed" and make is SOURCES["columns"]:
        field = "batch_size"
    minimum = 0 if field == "seed" else 1
    with pytest.raises(ValueError, match=f"{field}={minimum - 1} must be at least {minimum}"):
        make(**{field: minimum - 1})


@each_source
def test_check_finds_ids_outside_the_vocabulary(make):
    source = make()
    largest = int(TOKENS[-1]) if make is not SOURCES["packed"] else int(documents()[-1][-1])
    source.check(largest + 1)
    with pytest.raises(ValueError, match=f"id {largest} at position \\d+ is outside the vocabulary of {largest} ids"):
        source.check(largest)


# ------------------------------------------------------------------------------------------ random windows


@pytest.mark.parametrize(("stride", "count"), [(1, 993), (7, 142), (10, 100), (2000, 1)])
def test_each_window_occurs_once_per_epoch(stride, count):
    source = SOURCES["windows"](stride=stride)
    assert source.rows_per_epoch == count
    rows = np.concatenate([global_batch(source, i).tokens for i in range(2 * count // 8 + 1)])[: 2 * count]
    np.testing.assert_array_equal(rows - rows[:, :1], np.broadcast_to(np.arange(11), rows.shape))
    for epoch in (rows[:count], rows[count:]):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]) - 1, stride * np.arange(count))
    assert count == 1 or (rows[:count] != rows[count:]).any()


def test_windows_need_length_plus_1_tokens():
    assert SOURCES["windows"](tokens=TOKENS[:11]).rows_per_epoch == 1
    with pytest.raises(ValueError, match=r"random windows of length 10 .*: 10 tokens, at least 11 needed"):
        SOURCES["windows"](tokens=TOKENS[:10])
    with pytest.raises(ValueError, match="no tokens, at least 11 needed"):
        SOURCES["windows"](tokens=TOKENS[:0])
    with pytest.raises(ValueError, match=r"got float64\[1003\]"):
        SOURCES["windows"](tokens=TOKENS.astype(float))
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        SOURCES["windows"](stride=0)


# ------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(("tokens", "steps", "left_out"), [(1003, 12, 42), (961, 12, 0), (960, 11, 79), (81, 1, 0)])
def test_columns_continue_across_batches_and_reset_each_epoch(tokens, steps, left_out):
    source = SOURCES["columns"](tokens=TOKENS[:tokens])
    assert (source.steps_per_epoch, source.num_dropped_tokens) == (steps, left_out)
    first = global_batch(source, 0)
    assert first.reset.all()
    width = (tokens - 1) // 8
    np.testing.assert_array_equal(first.tokens[:, 0], 1 + width * np.arange(8))
    previous, targets = first.tokens, [first.tokens[:, 1:]]
    for step in range(1, steps):
        token_batch = global_batch(source, step)
        assert not token_batch.reset.any()
        np.testing.assert_array_equal(token_batch.tokens[:, 0], previous[:, -1])
        previous = token_batch.tokens
        targets.append(token_batch.tokens[:, 1:])
    target_tokens = np.unique(np.concatenate(targets))
    assert len(target_tokens) == sum(target.size for target in targets) == tokens - 1 - left_out
    assert_same(global_batch(source, steps), first)


def test_columns_need_enough_tokens_for_a_batch():
    with pytest.raises(ValueError, match=r"8 streams of length 10 .*: 80 tokens, at least 81 needed"):
        SOURCES["columns"](tokens=TOKENS[:80])


# -------------------------------------------------------------------------------------------------- packed


def segments(token_batch):
    """Return each segment of each row as a list. Assert that segment ids of a row are 1, 2, ... followed by padding."""
    result = []
    for tokens, ids in zip(token_batch.tokens, token_batch.segment_ids, strict=True):
        segment_ids = ids[ids > 0]
        assert (np.diff(segment_ids) >= 0).all()
        assert (ids[len(segment_ids) :] == 0).all()
        np.testing.assert_array_equal(np.unique(segment_ids), np.arange(1, segment_ids.max() + 1))
        result += [tokens[ids == segment].tolist() for segment in range(1, segment_ids.max() + 1)]
    return result


@pytest.mark.parametrize("max_length", [3, 17, 40, 100])
def test_packed_rows_contain_every_document(max_length):
    original = documents(max_length=max_length)
    source = PackedDocuments(original, length=16, batch_size=1, seed=1)
    for epoch in range(2):
        steps = range(epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch)
        chunks = sorted(chunk for step in steps for chunk in segments(global_batch(source, step)))
        joined = [chunks[0]]
        for chunk in chunks[1:]:
            if chunk[0] == joined[-1][-1]:  # the chunk continues the previous chunk, because tokens are distinct
                joined[-1] = joined[-1] + chunk[1:]
            else:
                joined.append(chunk)
        assert joined == [document.tolist() for document in original]


def test_packing_has_little_padding_and_reports_its_efficiency():
    original = documents(count=2000)
    source = PackedDocuments(original, length=63, batch_size=4)
    token_batches = [source.batch(0, range(row, row + 1)) for row in range(source.rows_per_epoch)]
    num_tokens = sum((token_batch.segment_ids > 0).sum() for token_batch in token_batches)
    assert num_tokens == sum(map(len, original))
    assert source.efficiency == pytest.approx(num_tokens / (64 * source.rows_per_epoch))
    assert source.efficiency > 0.97
    assert PackedDocuments([np.arange(8)] * 6, length=15, batch_size=1).efficiency == 1.0, (
        "two documents fill a row exactly"
    )


def test_padding_has_segment_id_0():
    source = PackedDocuments([np.asarray([5, 6]), np.asarray([7])], length=4, batch_size=1, pad_id=9)
    token_batch = global_batch(source, 0)
    assert sorted(segments(token_batch)) == [[5, 6], [7]]
    assert token_batch.tokens[0, 3:].tolist() == [9, 9]
    assert token_batch.segment_ids[0, 3:].tolist() == [0, 0]
    assert source.efficiency == 3 / 5
    with pytest.raises(ValueError, match="pad_id: id 9 at position 0 is outside the vocabulary of 8 ids"):
        source.check(8)


@pytest.mark.parametrize(("tokens", "num_chunks"), [(1, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_a_long_document_is_split_into_overlapping_chunks(tokens, num_chunks):
    source = PackedDocuments([np.arange(1, tokens + 1)], length=4, batch_size=1)
    chunks = [chunk for step in range(source.rows_per_epoch) for chunk in segments(global_batch(source, step))]
    assert len(chunks) == num_chunks
    targets = sorted(token for chunk in chunks for token in chunk[1:])
    assert targets == list(range(2, tokens + 1))


def test_errors_for_documents_that_cannot_be_packed():
    with pytest.raises(ValueError, match="no documents to pack"):
        PackedDocuments([], length=4, batch_size=1)
    with pytest.raises(ValueError, match="document 1: no tokens"):
        PackedDocuments([np.arange(3), np.arange(0)], length=4, batch_size=1)
    with pytest.raises(ValueError, match=r"document 0: expected a 1-D array of integer ids, got int64\[1, 3\]"):
        PackedDocuments([np.ones((1, 3), np.int64)], length=4, batch_size=1)

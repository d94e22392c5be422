"""Every source: each token where it should be, once an epoch, the same for any number of processes and any restart."""

import json

import numpy as np
import pytest

from jaxlm.data import Batches, Columns, Packed, RandomWindows, batching
from jaxlm.data.batching import permute

TOKENS = np.arange(1, 1004, dtype=np.uint16)  # a token is its position + 1, so that 0 can only be padding


def documents(seed=0, count=60, longest=40):
    """Documents of 1 to ``longest`` tokens, all tokens distinct and none 0."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    return np.split(np.arange(1, lengths.sum() + 1, dtype=np.int32), np.cumsum(lengths)[:-1])


SOURCES = {
    "windows": lambda **kw: RandomWindows(**{"tokens": TOKENS, "length": 10, "batch_size": 8, "seed": 3, **kw}),
    "columns": lambda **kw: Columns(**{"tokens": TOKENS, "length": 10, "batch_size": 8, **kw}),
    "packed": lambda **kw: Packed(**{"documents": documents(), "length": 16, "batch_size": 8, "seed": 3, **kw}),
}
each_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def whole(source, index):
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


def test_permute_does_not_depend_on_what_is_asked_together():
    every = permute(np.arange(1000), 1000, 7, 2)
    np.testing.assert_array_equal(permute(np.asarray([999, 3, 3]), 1000, 7, 2), every[[999, 3, 3]])


def test_permute_is_fixed_for_ever():
    """Update only with a new major version: a saved iterator would go on with other batches."""
    assert permute(np.arange(8), 1000, seed=0, epoch=0).tolist() == [0, 136, 123, 595, 967, 77, 980, 755]
    assert permute(np.asarray([10**12]), 10**12 + 1, seed=1, epoch=5).tolist() == [495376031047]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_permute_sends_an_index_anywhere_with_equal_chance(count):
    """Each place has 2000 expected hits, standard deviation below 45: five of them are allowed."""
    hits = np.zeros((count, count))
    for seed in range(2000 * count):
        hits[np.arange(count), permute(np.arange(count), count, seed, 0)] += 1
    assert np.abs(hits - 2000).max() < 5 * 45


def test_epochs_and_seeds_are_unrelated_orders():
    count = 5000
    orders = [permute(np.arange(count), count, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, order in enumerate(orders):
        # Correlation of random orders has standard deviation 1/sqrt(count) = 0.014.
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.07
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.07
        for other in orders[:i]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.07


# -------------------------------------------------------------------------------------------- every source


@each_source
def test_shapes_and_types(make):
    source = make()
    window = whole(source, 5)
    for array in (window.tokens, window.segment_ids):
        assert array is None or (array.shape == (8, source.length + 1) and array.dtype == np.int32)
    assert window.reset is None or (window.reset.shape == (8,) and window.reset.dtype == bool)


@each_source
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(make, process_count):
    source = make()
    share = 8 // process_count
    processes = [Batches(make(), range(i * share, (i + 1) * share)) for i in range(process_count)]
    for step in range(2 * source.rows_per_epoch // source.batch_size + 2):
        parts = [next(process) for process in processes]
        joined = [None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True)]
        assert_same(joined, whole(source, step))
    assert all(process.state() == processes[0].state() for process in processes)


@each_source
def test_a_restored_iterator_goes_on_exactly(make):
    straight, saved = Batches(make()), Batches(make())
    for _ in range(7):
        next(straight), next(saved)
    state = json.loads(json.dumps(saved.state()))
    assert len(json.dumps(state)) < 300
    halves = [Batches(make(), rows) for rows in (range(4), range(4, 8))]  # and with another number of processes
    for half in halves:
        half.restore(state)
    for _ in range(30):
        expected = next(straight)
        np.testing.assert_array_equal(np.concatenate([next(half).tokens for half in halves]), expected.tokens)


@each_source
@pytest.mark.parametrize(("field", "value"), [("batch_size", 4), ("length", 11)])
def test_a_state_of_other_settings_is_refused_by_name(make, field, value):
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
            r"kind: saved 'RandomWindows', now 'Columns'\n  seed: saved 3, now N",
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
def test_a_state_of_other_data_is_refused_by_name(saved, now, message):
    with pytest.raises(ValueError, match=message):
        Batches(now).restore(Batches(saved).state())


@pytest.mark.parametrize("state", [{}, {"next": -1, "source": {}}, {"next": "3", "source": {}}, {"next": 3}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="not the state of an iterator"):
        Batches(SOURCES["columns"]()).restore(state)


def test_a_memory_map_and_an_array_give_the_same_fingerprint(tmp_path):
    np.save(tmp_path / "a.npy", TOKENS)
    mapped = SOURCES["windows"](tokens=np.load(tmp_path / "a.npy", mmap_mode="r"), seed=np.int64(3))
    assert mapped.fingerprint() == SOURCES["windows"](tokens=TOKENS.astype(np.int64)).fingerprint()
    json.dumps(mapped.fingerprint())


def test_any_changed_token_changes_the_fingerprint(monkeypatch):
    monkeypatch.setattr(batching, "_CHECKSUM_CHUNK", 100)  # several parts
    tokens = np.arange(5000) % 97
    for name in ("windows", "columns"):
        whole = SOURCES[name](tokens=tokens).fingerprint()
        for at in (0, 99, 100, 1237, 4999):
            changed = tokens.copy()
            changed[at] += 1
            assert SOURCES[name](tokens=changed).fingerprint() != whole
    texts = [np.arange(5), np.arange(7), np.arange(5)]
    swapped = [texts[0], texts[1], np.array([0, 1, 2, 4, 3])]
    assert SOURCES["packed"](documents=texts).fingerprint() != SOURCES["packed"](documents=swapped).fingerprint()


@pytest.mark.parametrize("rows", [[], [7, 8], [-1]])
def test_rows_that_a_batch_does_not_have_are_named(rows):
    with pytest.raises(ValueError, match=r"rows=\[.*\] must be one or more of the rows 0 to 7 of a batch of 8"):
        Batches(SOURCES["columns"](), rows)


@each_source
@pytest.mark.parametrize("field", ["length", "batch_size", "seed"])
def test_numbers_that_are_too_small_are_named(make, field):
    if field == "seed" and make is SOURCES["columns"]:
        field = "batch_size"
    least = 0 if field == "seed" else 1
    with pytest.raises(ValueError, match=f"{field} must be at least {least}, got {least - 1}"):
        make(**{field: least - 1})


@each_source
def test_ids_outside_the_vocabulary_are_found_before_the_first_step(make):
    source = make()
    largest = int(TOKENS[-1]) if make is not SOURCES["packed"] else int(documents()[-1][-1])
    source.check(largest + 1)
    with pytest.raises(ValueError, match=f"id {largest} at position \\d+ is outside the vocabulary of {largest} ids"):
        source.check(largest)


# ------------------------------------------------------------------------------------------ random windows


@pytest.mark.parametrize(("stride", "count"), [(1, 993), (7, 142), (10, 100), (2000, 1)])
def test_each_window_comes_once_an_epoch(stride, count):
    source = SOURCES["windows"](stride=stride)
    assert source.rows_per_epoch == count
    rows = np.concatenate([whole(source, i).tokens for i in range(2 * count // 8 + 1)])[: 2 * count]
    np.testing.assert_array_equal(rows - rows[:, :1], np.broadcast_to(np.arange(11), rows.shape))
    for epoch in (rows[:count], rows[count:]):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]) - 1, stride * np.arange(count))
    assert count == 1 or (rows[:count] != rows[count:]).any()


def test_windows_need_one_token_more_than_their_length():
    assert SOURCES["windows"](tokens=TOKENS[:11]).rows_per_epoch == 1
    with pytest.raises(ValueError, match=r"random windows of length 10 .*: 10 tokens, at least 11 needed"):
        SOURCES["windows"](tokens=TOKENS[:10])
    with pytest.raises(ValueError, match="no tokens, at least 11 needed"):
        SOURCES["windows"](tokens=TOKENS[:0])
    with pytest.raises(ValueError, match=r"got float64\[1003\]"):
        SOURCES["windows"](tokens=TOKENS.astype(float))
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        SOURCES["windows"](stride=0)


# ------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(("tokens", "steps", "left_out"), [(1003, 12, 42), (961, 12, 0), (960, 11, 79), (81, 1, 0)])
def test_columns_continue_and_start_anew_each_epoch(tokens, steps, left_out):
    source = SOURCES["columns"](tokens=TOKENS[:tokens])
    assert (source.steps_per_epoch, source.left_out) == (steps, left_out)
    first = whole(source, 0)
    assert first.reset.all()
    width = (tokens - 1) // 8
    np.testing.assert_array_equal(first.tokens[:, 0], 1 + width * np.arange(8))
    before, targets = first.tokens, [first.tokens[:, 1:]]
    for step in range(1, steps):
        window = whole(source, step)
        assert not window.reset.any()
        np.testing.assert_array_equal(window.tokens[:, 0], before[:, -1])
        before = window.tokens
        targets.append(window.tokens[:, 1:])
    seen = np.unique(np.concatenate(targets))
    assert len(seen) == sum(target.size for target in targets) == tokens - 1 - left_out
    assert_same(whole(source, steps), first)


def test_columns_need_a_batch_of_tokens():
    with pytest.raises(ValueError, match=r"8 columns of length 10 .*: 80 tokens, at least 81 needed"):
        SOURCES["columns"](tokens=TOKENS[:80])


# -------------------------------------------------------------------------------------------------- packed


def segments(window):
    """Each segment of each row, as lists; the ids of a row must be 1, 2, ... and then padding."""
    found = []
    for tokens, ids in zip(window.tokens, window.segment_ids, strict=True):
        present = ids[ids > 0]
        assert (np.diff(present) >= 0).all()
        assert (ids[len(present) :] == 0).all()
        np.testing.assert_array_equal(np.unique(present), np.arange(1, present.max() + 1))
        found += [tokens[ids == segment].tolist() for segment in range(1, present.max() + 1)]
    return found


@pytest.mark.parametrize("longest", [3, 17, 40, 100])
def test_packing_gives_back_every_document(longest):
    given = documents(longest=longest)
    source = Packed(given, length=16, batch_size=1, seed=1)
    for epoch in range(2):
        steps = range(epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch)
        pieces = sorted(piece for step in steps for piece in segments(whole(source, step)))
        joined = [pieces[0]]
        for piece in pieces[1:]:
            if piece[0] == joined[-1][-1]:  # tokens are distinct: it carries on the piece before, from its last token
                joined[-1] = joined[-1] + piece[1:]
            else:
                joined.append(piece)
        assert joined == [document.tolist() for document in given]


def test_packing_is_tight_and_says_how_tight():
    given = documents(count=2000)
    source = Packed(given, length=63, batch_size=4)
    windows = [source.batch(0, range(row, row + 1)) for row in range(source.rows_per_epoch)]
    held = sum((window.segment_ids > 0).sum() for window in windows)
    assert held == sum(map(len, given))
    assert source.efficiency == pytest.approx(held / (64 * source.rows_per_epoch))
    assert source.efficiency > 0.97
    assert Packed([np.arange(8)] * 6, length=15, batch_size=1).efficiency == 1.0, "two documents fill a row exactly"


def test_padding_is_segment_zero():
    source = Packed([np.asarray([5, 6]), np.asarray([7])], length=4, batch_size=1, pad_id=9)
    window = whole(source, 0)
    assert sorted(segments(window)) == [[5, 6], [7]]
    assert window.tokens[0, 3:].tolist() == [9, 9]
    assert window.segment_ids[0, 3:].tolist() == [0, 0]
    assert source.efficiency == 3 / 5
    with pytest.raises(ValueError, match="pad_id: id 9 at position 0 is outside the vocabulary of 8 ids"):
        source.check(8)


@pytest.mark.parametrize(("tokens", "pieces"), [(1, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_a_long_document_becomes_overlapping_pieces(tokens, pieces):
    source = Packed([np.arange(1, tokens + 1)], length=4, batch_size=1)
    found = [piece for step in range(source.rows_per_epoch) for piece in segments(whole(source, step))]
    assert len(found) == pieces
    targets = sorted(token for piece in found for token in piece[1:])
    assert targets == list(range(2, tokens + 1))


def test_documents_that_cannot_be_packed_are_named():
    with pytest.raises(ValueError, match="no documents to pack"):
        Packed([], length=4, batch_size=1)
    with pytest.raises(ValueError, match="document 1: no tokens"):
        Packed([np.arange(3), np.arange(0)], length=4, batch_size=1)
    with pytest.raises(ValueError, match=r"document 0: expected a 1-D array of integer ids, got int64\[1, 3\]"):
        Packed([np.ones((1, 3), np.int64)], length=4, batch_size=1)

"""Token files: writing, memory-mapped reading, and errors for invalid files and ids."""

import numpy as np
import pytest

from jaxlm.data import ByteTokenizer, check_tokens, open_tokens, split_documents, split_tokens, tokens, write_tokens


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_open_tokens_returns_a_memory_map_of_the_smallest_dtype(tmp_path, vocab_size, dtype):
    ids = np.asarray([0, 5, vocab_size - 1], np.int32)
    assert write_tokens(tmp_path / "a.npy", ids, vocab_size) == 3
    mapped = open_tokens(tmp_path / "a.npy", vocab_size)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert mapped.dtype == dtype
    np.testing.assert_array_equal(mapped, ids)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), ids)


def test_an_iterable_of_arrays_is_written(tmp_path):
    yielded = []

    def arrays():
        for i in range(300):
            yielded.append(i)
            yield np.full(1000, i, np.int64)
        yield np.zeros(0, np.int32)
        yield ByteTokenizer().encode("end")

    assert write_tokens(tmp_path / "a.npy", arrays(), 300) == 300_003
    mapped = open_tokens(tmp_path / "a.npy", 300)
    np.testing.assert_array_equal(mapped[:-3], np.repeat(np.arange(300), 1000))
    assert bytes(mapped[-3:].astype(np.uint8)) == b"end"
    assert yielded == list(range(300))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.npy"
    write_tokens(path, np.arange(4), 10)
    original_bytes = path.read_bytes()
    with pytest.raises(ValueError, match=r"id 10 at position 5 is outside the vocabulary of 10 ids"):
        write_tokens(path, iter([np.arange(4), np.asarray([1, 10])]), 10)
    with pytest.raises(ValueError, match="no tokens"):
        write_tokens(path, [], 10)
    with pytest.raises(ValueError, match="expected a 1-D array of integer ids, got a int: use np.asarray"):
        write_tokens(path, [1, 2], 10)
    assert path.read_bytes() == original_bytes
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]


def test_a_file_of_a_larger_vocabulary_is_rejected(tmp_path):
    path = tmp_path / "a.npy"
    write_tokens(path, np.asarray([3, 1, 80, 90]), 100)
    with pytest.raises(ValueError, match=r"a\.npy: id 80 at position 2 is outside the vocabulary of 77 ids; use"):
        open_tokens(path, 77)


def test_invalid_token_files_are_rejected(tmp_path):
    path = tmp_path / "a.npy"
    write_tokens(path, np.arange(100), 100)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.npy is not a complete token file"):
        open_tokens(path, 100)
    path.write_bytes(b"To be, or not to be")
    with pytest.raises(ValueError, match=r"a\.npy is not a complete token file"):
        open_tokens(path, 100)
    path.write_bytes(b"PK\x03\x04")  # the beginning of an .npz file
    with pytest.raises(ValueError, match=r"a\.npy is an archive of arrays"):
        open_tokens(path, 100)
    np.save(path, np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"1-D array of integer ids, got int32\[2, 3\]"):
        open_tokens(path, 100)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"got float64\[3\]"):
        open_tokens(path, 100)


@pytest.mark.parametrize("bad", [-1, 50])
@pytest.mark.parametrize("position", [0, 7, 8, 20])
def test_the_error_names_the_first_invalid_id_in_any_chunk(monkeypatch, bad, position):
    monkeypatch.setattr(tokens, "_CHUNK", 8)
    ids = np.arange(21)
    check_tokens(ids, 50)
    ids[position] = bad
    ids[-1] = bad
    with pytest.raises(ValueError, match=f"train: id {bad} at position {position} is outside the vocabulary of 50 ids"):
        check_tokens(ids, 50, name="train")


def test_the_error_for_too_few_tokens_has_the_minimum():
    with pytest.raises(ValueError, match="train: no tokens, at least 1 needed"):
        check_tokens(np.zeros(0, np.int32), 50, name="train")
    with pytest.raises(ValueError, match="train: 3 tokens, at least 5 needed; use more data"):
        check_tokens(np.zeros(3, np.int32), 50, min_length=5, name="train")


def test_a_list_of_ids_is_named():
    with pytest.raises(ValueError, match="train: expected a 1-D array of integer ids, got a list: use np.asarray"):
        tokens.check_ids_1d([1, 2, 3], name="train")


def test_the_last_tokens_are_the_validation_split():
    ids = np.arange(1000)
    train, validation = split_tokens(ids, 0.1)
    np.testing.assert_array_equal(train, ids[:900])
    np.testing.assert_array_equal(validation, ids[900:])
    assert train.base is ids
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
            split_tokens(ids, fraction)
    with pytest.raises(ValueError, match="1 tokens cannot be split .* use more tokens or another fraction"):
        split_tokens(ids[:1], 0.5)


@pytest.mark.parametrize(
    ("count", "fraction", "boundary"),
    [(10, 0.9, 1), (5, 0.8, 1), (15, 0.8, 3), (90, 0.3, 63), (11, 0.5, 5), (1_115_394, 0.1, 1_003_854)],
)
def test_the_boundary_of_the_splits_has_no_rounding_error(count, fraction, boundary):
    assert len(split_tokens(np.zeros(count, np.int32), fraction)[0]) == boundary


def test_split_documents_cuts_after_each_end_id():
    ids = np.asarray([1, 2, 9, 3, 9, 9, 4])
    assert [d.tolist() for d in split_documents(ids, 9)] == [[1, 2, 9], [3, 9], [9], [4]]
    assert [d.tolist() for d in split_documents(ids[:3], 9)] == [[1, 2, 9]]

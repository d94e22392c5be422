"""Tests of the checksums of exported directories: every changed byte is detected, and users can accept a change."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import jaxlm
from jaxlm import integrity
from jaxlm.data import CharTokenizer, load_tokenizer
from jaxlm.integrity import CHECKSUMS, install_files, staging_directory, verify_checksums, write_checksums
from jaxlm.models import get_model
from jaxlm.testing.helpers import initial_params


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    tokenizer = CharTokenizer.from_text("abc def")
    model = get_model("gpt2-tiny", vocab_size=tokenizer.vocab_size)
    jaxlm.save_pretrained(directory, model, initial_params(model), tokenizer)
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def test_every_written_file_is_listed(exported):
    listed = set(json.loads((exported / CHECKSUMS).read_text())["sha256"])
    assert listed == {path.name for path in exported.iterdir()} - {CHECKSUMS}
    assert {"config.json", "model.safetensors", "jaxlm_tokenizer.json"} <= listed


def test_every_flipped_bit_of_an_export_is_detected(copy):
    generator = np.random.default_rng(0)
    for path in sorted(copy.iterdir()):
        original = path.read_bytes()
        for index in generator.choice(len(original), min(len(original), 12), replace=False):
            changed = bytearray(original)
            changed[index] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            if path.name == CHECKSUMS:
                try:
                    harmless = json.loads(changed) == json.loads(original)
                except ValueError:
                    harmless = False
                if harmless:
                    continue
            with pytest.raises(ValueError, match=r"damaged|is missing: checksums.json"):
                jaxlm.load_pretrained(copy)
        path.write_bytes(original)
    jaxlm.load_pretrained(copy)


def test_load_tokenizer_rejects_a_changed_tokenizer(copy):
    path = copy / "jaxlm_tokenizer.json"
    path.write_text(path.read_text().replace("abc", "acb").replace("f", "g"))
    with pytest.raises(ValueError, match=f"jaxlm_tokenizer.json has changed since it was saved.*delete .*{CHECKSUMS}"):
        load_tokenizer(copy)


def test_a_changed_file_loads_after_checksums_are_deleted(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has changed since it was saved"):
        jaxlm.load_pretrained(copy)
    (copy / CHECKSUMS).unlink()
    model, params = jaxlm.load_pretrained(copy)
    # Saving only a tokenizer, or a model over an older export, leaves no outdated checksums.
    jaxlm.save_pretrained(copy, model, params, CharTokenizer.from_text("abc def"))
    CharTokenizer.from_text("uvwxyz ").save(copy)
    assert load_tokenizer(copy).decode([0, 1]) == " u"
    verify_checksums(copy)
    jaxlm.save_pretrained(copy, model, params)
    jaxlm.load_pretrained(copy)


def test_error_names_a_missing_file(copy):
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="generation_config.json is missing: checksums.json lists it"):
        jaxlm.load_pretrained(copy)


def test_a_full_disk_keeps_the_old_export(copy, monkeypatch):
    model, params = jaxlm.load_pretrained(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.interop.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        jaxlm.save_pretrained(copy, model, params)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# ------------------------------------------------------------------------------------- replacement of a set of files

NAMES = ["weights", "index", "config"]


@pytest.fixture
def old(tmp_path):
    """A directory with three old files and their checksums."""
    for name in NAMES:
        (tmp_path / name).write_text(f"old {name}")
    write_checksums(tmp_path, NAMES)
    (tmp_path / "mine.txt").write_text("mine")
    return tmp_path


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def replace(directory, **options):
    with staging_directory(directory) as temporary:
        for name in NAMES:
            (temporary / name).write_text(f"new {name}")
        install_files(temporary, directory, NAMES, **options)


def test_checksums_without_an_entry_are_damaged(old):
    (old / CHECKSUMS).write_text("{}")
    with pytest.raises(ValueError, match="is damaged .it has no entry sha256.: delete it"):
        verify_checksums(old)


def test_install_replaces_all_files_and_keeps_others(old):
    (old / ".saving-of-a-killed-process").mkdir()
    (old / ".saving-of-a-killed-process" / "weights").write_text("half")
    replace(old)
    verify_checksums(old)
    remaining = contents(old)
    assert remaining.pop(CHECKSUMS)
    assert remaining == {"mine.txt": "mine", **{name: f"new {name}" for name in NAMES}}


KILLED = """
import os, pathlib, runpy, signal, sys
integrity = runpy.run_path(sys.argv[3])  # without jax, which takes seconds
directory, left = pathlib.Path(sys.argv[1]), int(sys.argv[2])
real = os.replace
def replace(*paths):
    global left
    if paths[1].parent == directory:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    real(*paths)
os.replace = replace
with integrity["staging_directory"](directory) as temporary:
    for name in ("weights", "index", "config"):
        (temporary / name).write_text(f"new {name}")
    integrity["install_files"](temporary, directory, ["weights", "index", "config"])
"""


@pytest.mark.parametrize("renames", range(5))
def test_a_mixture_of_old_and_new_files_after_a_kill_is_detected(old, renames):
    process = subprocess.run([sys.executable, "-c", KILLED, old, str(renames), integrity.__file__], check=False)
    assert process.returncode == (0 if renames == 4 else -signal.SIGKILL)
    if renames in (0, 4):
        verify_checksums(old)
        age = "old" if renames == 0 else "new"
        assert all((old / name).read_text() == f"{age} {name}" for name in NAMES)
    else:
        with pytest.raises(ValueError, match="has changed since it was saved"):
            verify_checksums(old)
    replace(old)
    verify_checksums(old)
    assert not list(old.glob(".saving-*"))


@pytest.mark.parametrize(
    ("error", "number", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "disk of .* is full .*are unchanged. Free"),
        (
            RuntimeError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'),
            errno.ENOSPC, "the disk of .* is full",
        ),
        (OSError(errno.EFBIG, "File too large"), errno.EFBIG, "larger than the limit .*are unchanged. Raise"),
        (RuntimeError("I/O error: File too large (os error 27)"), errno.EFBIG, "a file in .* would be larger"),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES, "is not writable .*Change its"),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS, "is not writable .*Read-only"),
    ],
)  # fmt: skip
def test_an_unwritable_disk_keeps_the_old_files_and_raises(old, error, number, message):
    before = contents(old)
    with pytest.raises(OSError, match=message) as caught, staging_directory(old):
        raise error
    assert caught.value.errno == number
    assert str(old) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(old) == before


@pytest.mark.parametrize(("renames", "changed"), [(0, ""), (2, f"index, {CHECKSUMS}, weights")])
def test_an_error_between_two_replacements_names_the_changed_files(old, monkeypatch, renames, changed):
    before, left = contents(old), list(range(renames))

    def failing(source, target, real=os.replace):
        if target.parent == old and not left:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(target))
        del left[: target.parent == old]
        real(source, target)

    monkeypatch.setattr(integrity.os, "replace", failing)
    message = (
        f"already replaced, created or deleted: {changed}; all other files are unchanged"
        if changed
        else "the previous files are unchanged"
    )
    with pytest.raises(PermissionError, match=f"^[^:]* is not writable [^:]*: [^:]*: {message}"):
        replace(old, delete_first=["index"] if renames else [])
    after = contents(old)
    assert {name for name in before if before[name] != after.get(name)} == set(filter(None, changed.split(", ")))


def test_other_errors_propagate(old):
    with pytest.raises(ZeroDivisionError), staging_directory(old):
        raise ZeroDivisionError
    assert sorted(os.listdir(old)) == sorted([*NAMES, CHECKSUMS, "mine.txt"])

"""Checksums of exported directories: every changed byte is found, and meant changes have a way out."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import CharTokenizer, load_tokenizer
from jaxlm.integrity import CHECKSUMS, verify_checksums
from jaxlm.models import get_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    tokenizer = CharTokenizer.from_text("abc def")
    model = get_model("gpt2-tiny", vocab_size=tokenizer.vocab_size)
    jaxlm.save_pretrained(directory, model, model.init(jax.random.key(0)), tokenizer)
    return directory


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def test_every_written_file_is_listed(exported):
    listed = set(json.loads((exported / CHECKSUMS).read_text())["sha256"])
    assert listed == {path.name for path in exported.iterdir()} - {CHECKSUMS}
    assert {"config.json", "model.safetensors", "jaxlm_tokenizer.json"} <= listed


def test_no_flipped_bit_of_an_export_is_used(copy):
    generator = np.random.default_rng(0)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for at in generator.choice(len(whole), min(len(whole), 12), replace=False):
            changed = bytearray(whole)
            changed[at] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            if path.name == CHECKSUMS:
                try:
                    harmless = json.loads(changed) == json.loads(whole)
                except ValueError:
                    harmless = False
                if harmless:
                    continue
            with pytest.raises(ValueError, match=r"damaged|is missing: checksums.json"):
                jaxlm.load_pretrained(copy)
        path.write_bytes(whole)
    jaxlm.load_pretrained(copy)


def test_a_changed_tokenizer_is_refused_by_load_tokenizer(copy):
    path = copy / "jaxlm_tokenizer.json"
    path.write_text(path.read_text().replace("abc", "acb").replace("f", "g"))
    with pytest.raises(ValueError, match=f"jaxlm_tokenizer.json is not as it was saved.*delete .*{CHECKSUMS}"):
        load_tokenizer(copy)


def test_meant_changes_work(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json is not as it was saved"):
        jaxlm.load_pretrained(copy)
    (copy / CHECKSUMS).unlink()
    model, params = jaxlm.load_pretrained(copy)
    # A tokenizer that is saved alone, and a whole save over an older one, leave no old checksums.
    jaxlm.save_pretrained(copy, model, params, CharTokenizer.from_text("abc def"))
    CharTokenizer.from_text("uvwxyz ").save(copy)
    assert load_tokenizer(copy).decode([0, 1]) == " u"
    verify_checksums(copy)
    jaxlm.save_pretrained(copy, model, params)
    jaxlm.load_pretrained(copy)


def test_a_lost_file_is_named(copy):
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="generation_config.json is missing: checksums.json lists it"):
        jaxlm.load_pretrained(copy)


def test_a_full_disk_leaves_the_old_export(copy, monkeypatch):
    model, params = jaxlm.load_pretrained(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.interop.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        jaxlm.save_pretrained(copy, model, params)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before

"""Flipped bits in the files of a checkpoint and of an export: an error names the file, or nothing read has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm import spec
from jaxlm.checkpoint import Checkpointer, CorruptCheckpointError
from jaxlm.data import CharTokenizer, load_tokenizer
from tests.faults.faults import Fault

EXPECTED = "an error that names a file of it, or the same values"


def same(a: Any, b: Any) -> bool:
    """Whether two trees have equal names and equal bits."""
    one, two = spec.flatten(a), spec.flatten(b)
    return one.keys() == two.keys() and all(
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        == np.asarray(jax.random.key_data(y) if jnp.issubdtype(y.dtype, jax.dtypes.prng_key) else y).tobytes()
        for x, y in zip(one.values(), two.values(), strict=True)
    )


def flipped(directory: Path, read: Callable[[], bool], kind: str, count: int, seed: int) -> Iterator[Fault]:
    """``count`` random bits of random files of ``directory``, one after the other; each is set back.

    ``read`` reads the directory and returns whether the values are those that were saved.
    """
    random = np.random.default_rng(seed)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(count):
        path = files[random.integers(len(files))]
        whole = path.read_bytes()
        at, bit = int(random.integers(len(whole))), int(random.integers(8))
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        try:
            seen, held = ("the same values", True) if read() else ("other values, silently", False)
        except (CorruptCheckpointError, ValueError) as error:
            names = [str(name) for name in (path, *path.parents) if name.is_relative_to(directory.parent)]
            held = any(name in str(error) for name in names)
            seen = "an error that names a file of it" if held else f"an error without a name: {str(error)[:80]}"
        except Exception as error:
            seen, held = f"{type(error).__name__}: {str(error)[:80]}", False
        finally:
            path.write_bytes(whole)
        yield Fault(kind, f"bit {bit} of byte {at} of {path.relative_to(directory)}", EXPECTED, seen, held)


def checkpoint_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Flips in the newest step of two."""
    tree = {
        "weight": jax.random.normal(jax.random.key(1), (48, 48)), "step": jnp.int32(2), "key": jax.random.key(3),
        "half": jnp.arange(6, dtype=jnp.bfloat16),
    }  # fmt: skip
    meta = {"data": {"next": 2, "seed": 7}, "name": "a run"}
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, tree, {"data": {"next": 1, "seed": 7}, "name": "a run"}, wait=True)
        checkpointer.save(2, tree, meta, wait=True)

    def read() -> bool:
        with Checkpointer(directory) as checkpointer:
            found, found_meta = checkpointer.restore(tree)
        return same(tree, found) and found_meta == meta

    yield from flipped(directory / "2", read, "bit flip, newest checkpoint", count, seed)


def export_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Flips in the files of ``save_pretrained``."""
    tokenizer = CharTokenizer.from_text("to be, or not to be")
    model = jaxlm.get_model("gpt2-tiny", vocab_size=tokenizer.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0))
    jaxlm.save_pretrained(directory, model, params, tokenizer)
    ids = tokenizer.encode("not to be").tolist()

    def read() -> bool:
        found, found_params = jaxlm.load_pretrained(directory)
        text = load_tokenizer(directory)
        return found.config == model.config and same(params, found_params) and text.encode("not to be").tolist() == ids

    yield from flipped(directory, read, "bit flip, export", count, seed)


def all_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Half of ``count`` in a checkpoint, half in an export."""
    shutil.rmtree(directory, ignore_errors=True)
    yield from checkpoint_flips(directory / "checkpoints", count // 2, seed)
    yield from export_flips(directory / "model", count - count // 2, seed)

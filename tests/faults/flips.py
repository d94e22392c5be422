"""Flip bits in the files of a checkpoint and an export.

Loading must raise an error that names the file or its directory, or return the saved values.
"""

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
from jaxlm.testing.helpers import initial_params
from tests.faults.faults import Fault

EXPECTED = "an error that names the file or its directory, or the same values"


def trees_equal(a: Any, b: Any) -> bool:
    """Whether two trees have equal names and equal bits."""
    leaves_a, leaves_b = spec.flatten(a), spec.flatten(b)
    return leaves_a.keys() == leaves_b.keys() and all(
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        == np.asarray(jax.random.key_data(y) if jnp.issubdtype(y.dtype, jax.dtypes.prng_key) else y).tobytes()
        for x, y in zip(leaves_a.values(), leaves_b.values(), strict=True)
    )


def flip_bits(directory: Path, read: Callable[[], bool], kind: str, count: int, seed: int) -> Iterator[Fault]:
    """Flip ``count`` random bits in files of ``directory``, one at a time. Restore the file after each flip.

    ``read`` reads the directory and returns whether the values equal the saved ones.
    """
    random = np.random.default_rng(seed)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(count):
        path = files[random.integers(len(files))]
        original = path.read_bytes()
        index, bit = int(random.integers(len(original))), int(random.integers(8))
        changed = bytearray(original)
        changed[index] ^= 1 << bit
        path.write_bytes(changed)
        try:
            outcome, passed = ("the same values", True) if read() else ("other values, silently", False)
        except (CorruptCheckpointError, ValueError) as error:
            names = [str(name) for name in (path, *path.parents) if name.is_relative_to(directory.parent)]
            passed = any(name in str(error) for name in names)
            outcome = (
                "an error that names the file or its directory"
                if passed
                else f"an error without a name: {str(error)[:80]}"
            )
        except Exception as error:
            outcome, passed = f"{type(error).__name__}: {str(error)[:80]}", False
        finally:
            path.write_bytes(original)
        yield Fault(kind, f"bit {bit} of byte {index} of {path.relative_to(directory)}", EXPECTED, outcome, passed)


def checkpoint_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Flip bits in the newer one of two checkpoints."""
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
            restored, restored_meta = checkpointer.restore(tree)
        return trees_equal(tree, restored) and restored_meta == meta

    yield from flip_bits(directory / "2", read, "bit flip, newest checkpoint", count, seed)


def export_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Flip bits in the files of ``save_pretrained``."""
    tokenizer = CharTokenizer.from_text("to be, or not to be")
    model = jaxlm.get_model("gpt2-tiny", vocab_size=tokenizer.vocab_size)
    params = initial_params(model)
    jaxlm.save_pretrained(directory, model, params, tokenizer)
    ids = tokenizer.encode("not to be").tolist()

    def read() -> bool:
        loaded_model, loaded_params = jaxlm.load_pretrained(directory)
        loaded_tokenizer = load_tokenizer(directory)
        return (
            loaded_model.config == model.config
            and trees_equal(params, loaded_params)
            and loaded_tokenizer.encode("not to be").tolist() == ids
        )

    yield from flip_bits(directory, read, "bit flip, export", count, seed)


def all_flips(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Flip ``count`` bits: half of them in a checkpoint, half in an export."""
    shutil.rmtree(directory, ignore_errors=True)
    yield from checkpoint_flips(directory / "checkpoints", count // 2, seed)
    yield from export_flips(directory / "model", count - count // 2, seed)

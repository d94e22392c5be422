"""Tests of ``keep_freed_memory``. Without it, every step gets the memory of its temporaries from the system again."""

import ctypes
import subprocess
import sys

import pytest

from jaxlm import host

STEPS = """
import resource, sys
from jaxlm import host
if sys.argv[1] == "keep":
    assert host.keep_freed_memory()
assert host.is_freed_memory_kept() == (sys.argv[1] == "keep")
import jax, jax.numpy as jnp
@jax.jit
def step(x):
    return jnp.sin(x[:, None] * jnp.arange(4000.0)[None]) @ jnp.ones((4000, 8))
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(jnp.ones(4000)).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[-10:]))
"""


def page_faults(choice: str) -> int:
    """Page faults of the last ten of 24 equal steps. The first steps are not counted, because they allocate memory."""
    process = subprocess.run([sys.executable, "-c", STEPS, choice], capture_output=True, text=True, check=True)
    return int(process.stdout)


@pytest.mark.thorough
def test_kept_memory_is_reused():
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert not host.keep_freed_memory()
        return
    usual = page_faults("usual")
    assert usual > 10 * 15_000  # each step allocates an array of 64 MB, in pages of 4 KB
    assert page_faults("keep") < usual / 2  # a quarter or less if nothing else needs the memory of the machine


def test_keep_freed_memory_does_nothing_without_glibc(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(host, "_enabled", False)
    assert host.keep_freed_memory() is False
    assert host.is_freed_memory_kept() is False

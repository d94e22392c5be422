"""Memory that a process keeps: without it, every step has its temporaries from the system anew."""

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
assert host.keeps_freed_memory() == (sys.argv[1] == "keep")
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


def faults(choice: str) -> int:
    """Pages that the last ten of 24 equal steps had from the system: at first, blocks find their places."""
    found = subprocess.run([sys.executable, "-c", STEPS, choice], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_kept_memory_is_used_again():
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert not host.keep_freed_memory()
        return
    usual = faults("usual")
    assert usual > 10 * 15_000  # an array of 64 MB, 4 KB a page
    assert faults("keep") < usual / 4


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(host, "_kept", False)
    assert host.keep_freed_memory() is False
    assert host.keeps_freed_memory() is False

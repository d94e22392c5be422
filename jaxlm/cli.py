"""The ``jaxlm`` command: ``generate`` text from a run or a model directory, ``plan`` a training or decoding step for an
accelerator that is not there, ``launch`` prints scripts for rented ones, ``doctor`` for what this machine has."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import jaxlm
from jaxlm import load_pretrained
from jaxlm.config import exit_status
from jaxlm.data import load_tokenizer
from jaxlm.decoding import Sampling, stream_text
from jaxlm.devices import by_kind
from jaxlm.launch import script


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, token by token on the terminal."""

    directory: tyro.conf.Positional[Path]
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 500
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Below 1 more probable, above more surprising; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens."""
    top_p: float | None = None
    """Keep only the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Keep only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already there less likely."""
    stop: tuple[str, ...] = ()
    """Stop at the first of these strings."""
    seed: int = 0
    """Seed of the draws."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Print the prompt and its continuation as it is made."""
        directory = self.directory / "model" if (self.directory / "model").is_dir() else self.directory
        overrides: dict[str, Any] = {} if self.dtype is None else {"dtype": self.dtype}
        model, params = load_pretrained(directory, **overrides)
        tokenizer = load_tokenizer(directory)
        sampling = Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )  # fmt: skip
        pieces = stream_text(
            model, params, tokenizer, self.prompt, max_new_tokens=self.max_new_tokens, sampling=sampling,
            key=jax.random.key(self.seed), stop=self.stop,
        )  # fmt: skip
        sys.stdout.write(self.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Print versions, devices, memory, and which optional packages are missing."""

    def run(self) -> int:
        """Print the report."""
        print(f"python {platform.python_version()} on {platform.platform()}")
        for package in ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
            found = jaxlm.__version__ if package == "jaxlm" else _version(package)
            print(f"{package:18} {found or 'MISSING'}")
        print(f"\nbackend            {jax.default_backend()}, process {jax.process_index()} of {jax.process_count()}")
        for device in jax.devices():
            print(f"device {device.id:<11} {device.device_kind}{_memory(device)}{_peak(device)}")
        print(f"host memory        {_host_memory()}")
        print()
        for package, extra, purpose in EXTRAS:
            found = _version(package)
            print(f"{package:18} {found or f'missing: {purpose}; pip install {extra}'}")
        return 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a training or decoding step for accelerators that are not there: does it fit, how long will it take?"""

    model: str
    """A family or variant, as gpt2 or t5-base."""
    topology: str
    """The devices: v5e:4x4, v5p:2x2x1, v6e:2x2, ... (extra tpu) or h100:8 (extra cuda13)."""
    mesh: str
    """Axes over these devices, as data=4,fsdp=4."""
    batch: int
    """Rows of a step, over all devices."""
    sequence: int | None = None
    """Tokens of a row (decoding: those before); None takes what the model has positions for, at most 1024."""
    decode: bool = False
    """Plan the decoding of one token instead of a training step."""
    compare: tuple[str, ...] = ()
    """Further meshes, to be shown beside the first."""
    set: tuple[str, ...] = ()
    """Config fields of the model that differ, as num_layers=24 remat=full."""
    dtype: str = "bfloat16"
    """Compute dtype."""
    param_dtype: str = "float32"
    """Dtype of the parameters when decoding; training keeps float32 masters."""
    accumulate: int = 1
    """Parts that a batch is cut into, whose gradients are summed."""
    dropout: bool = True
    """Keep the config's dropout rates; --no-dropout sets all of them to 0."""
    layers_apart: bool = False
    """Each layer's parameters in arrays of their own, and no loop over layers (training.layers_apart)."""
    xla: tuple[str, ...] = ()
    """Options of the compiler that differ, as xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000."""
    json: Path | None = None
    """Write everything there, too."""

    def run(self) -> int:
        """Print the plans."""
        from rich.console import Console

        from jaxlm import plan

        plan.prepare()
        console = Console(soft_wrap=False)
        model, xla = self._model(), dict(_assignment("xla", option) for option in self.xla)
        plans = []
        for mesh in (self.mesh, *self.compare):
            with console.status(f"compiling for {self.topology}, {mesh}"):
                one = plan.plan(
                    model, self.topology, mesh, batch=self.batch, sequence=self.sequence, decode=self.decode,
                    accumulate=self.accumulate, param_dtype=self.param_dtype, layers_apart=self.layers_apart,
                    name=self.model, xla=xla,
                )  # fmt: skip
            plans.append(one)
        plan.show(plans, console)
        if self.json is not None:
            self.json.write_text(json.dumps([dataclasses.asdict(one) for one in plans], indent=2) + "\n", "utf-8")
        return 0

    def _model(self) -> jaxlm.Model:
        changes: dict[str, Any] = {}
        for change in self.set:
            name, value = _assignment("set", change)
            try:
                changes[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                changes[name] = value  # a word, as in remat=full
        model = jaxlm.get_model(self.model, **changes)
        fields = [field.name for field in dataclasses.fields(model.config)]
        if "dtype" in fields and "dtype" not in changes:
            changes["dtype"] = self.dtype
        if not self.dropout:
            changes = {**{name: 0.0 for name in fields if name.endswith("dropout")}, **changes}
        return jaxlm.get_model(self.model, **changes)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Print the script that creates a cloud machine, runs a command there and fetches the results."""

    topology: str
    """v5e:4x4, v5p:2x2x1, v6e:2x2, v4:2x2x1; or gpu, a node that is there already."""
    command: str | None = None
    """What to run there, python -m MODULE ...; what it writes to results/ is fetched. None: the training benchmark, or
    on several hosts the training of a GPT as large as GPT-2."""
    zone: str | None = None
    """Where a TPU is to be, as us-central1-a."""
    name: str = "jaxlm"
    """What a TPU is to be called."""
    host: str | None = None
    """user@machine of a GPU node."""
    spot: bool = False
    """Take a TPU that may be taken away again, for less."""
    dry_run: bool = False
    """Needed: scripts are printed, and never executed by jaxlm."""

    def run(self) -> int:
        """Print the script."""
        if not self.dry_run:
            raise ValueError(
                "jaxlm rents no machines: say --dry-run, read the script that it prints, and run it yourself"
            )
        command = None if self.command is None else shlex.split(self.command)
        print(
            script(self.topology, command, zone=self.zone, name=self.name, host=self.host, spot=self.spot), end=""
        )  # fmt: skip
        return 0


def _assignment(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"cannot read --{option} {text!r}: write name=value, e.g. num_layers=24")
    return name, value


EXTRAS = (
    ("tokenizers", "'jaxlm[tokenizers]'", "reading tokenizer.json and vocab/merges files"),
    ("pytest", "'jaxlm[test]'", "running the tests"),
    ("libtpu", "'jaxlm[tpu]'", "planning for TPUs (jaxlm plan), or running on one"),
    ("torch", "'jaxlm[reference]'", "live comparisons with the reference implementations"),
    ("transformers", "'jaxlm[reference]'", "live comparisons with the reference implementations"),
)
"""Optional packages: name, how to install, what for."""


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


def _peak(device: jax.Device) -> str:
    known = by_kind(device.device_kind)
    if known is None:
        return ""
    return f"; datasheet: {known.tflops:g} TFLOP/s bfloat16, {known.memory / 1e9:g} GB, {known.bandwidth / 1e9:g} GB/s"


def _host_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "unknown"
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB available"


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``jaxlm``; returns the exit status. Errors of the user are one line."""
    command: Generate | Plan | Launch | Doctor = tyro.cli(Command, args=arguments, prog="jaxlm", description=__doc__)
    return exit_status(command.run, "jaxlm")


if __name__ == "__main__":
    sys.exit(main())

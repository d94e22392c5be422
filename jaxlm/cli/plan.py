"""``jaxlm plan``: estimates of a step that is compiled for devices that this machine may lack."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jaxlm
from jaxlm.command_line import check_output_file
from jaxlm.config import assignments, parse_assignments_as_text


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate the memory of a training or decoding step, and its time on a TPU. The step is compiled, but not run, so
    this machine may lack the devices."""

    model: str
    """Family or variant, for example gpt2 or t5-base."""
    topology: str
    """The devices: v5e:4x4, v5p:2x2x1, v6e:2x2, ... (needs the extra tpu); h100:8 (needs the extra cuda13, and has no
    time estimate); or local, the devices of this machine (without a time estimate on a CPU or GPU, and without
    estimates for Pallas kernels)."""
    mesh: str
    """Mesh axes over the devices, for example data=4,fsdp=4."""
    batch: int
    """Rows per step, summed over all devices."""
    sequence: int | None = None
    """Tokens per row. For an encoder-decoder: tokens per source (in training, span corruption determines the target
    length). With --decode, it is also the number of cache slots, including the slot of the new token. None:
    max_positions of the model, but at most 1024; 512 if the model has no max_positions."""
    decode: bool = False
    """Plan the decoding of one token instead of a training step."""
    compare: tuple[str, ...] = ()
    """Other meshes to compare with --mesh."""
    set: tuple[str, ...] = ()
    """Changes to fields of the model's config, for example num_layers=24 remat=full scan_layers=true."""
    dtype: str = "bfloat16"
    """Compute dtype. It has no effect if --set has dtype."""
    param_dtype: str = "float32"
    """Dtype of the parameters for --decode; training uses float32 parameters."""
    grad_accum_steps: int = 1
    """Gradient accumulation: number of micro-batches per batch."""
    dropout: bool = True
    """Use the dropout rates of the config. --no-dropout sets each rate to 0, unless --set sets this rate."""
    xla: tuple[str, ...] = ()
    """XLA compiler options, for example xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000."""
    json: Path | None = None
    """Write all results to this JSON file too."""

    def run(self) -> int:
        """Print the plans and return the exit status."""
        check_output_file("json", self.json)
        from rich.console import Console

        from jaxlm import plan
        from jaxlm.plan.topology import LOCAL_TOPOLOGY

        if self.topology != LOCAL_TOPOLOGY:
            plan.prepare_environment()
        console = Console(soft_wrap=False)
        if self.decode and self.grad_accum_steps != 1:
            raise ValueError(f"--grad-accum-steps {self.grad_accum_steps} has no effect with --decode: remove it")
        if self.decode and not self.dropout:
            raise ValueError("--no-dropout has no effect with --decode: remove it")
        if not self.decode and self.param_dtype != "float32":
            raise ValueError(f"--param-dtype {self.param_dtype} needs --decode: training uses float32 parameters")
        model = self._model()
        if self.decode:
            self._check_decodes(model)
        xla = parse_assignments_as_text("xla", self.xla, "xla_tpu_enable_latency_hiding_scheduler=true")
        plans, meshes = [], (self.mesh, *self.compare)
        plan.check_meshes(model, self.topology, meshes, self.batch)
        for mesh in meshes:
            with console.status(f"compiling for {self.topology}, {mesh}"):
                result = plan.plan(
                    model, self.topology, mesh, batch=self.batch, sequence=self.sequence, decode=self.decode,
                    grad_accum_steps=self.grad_accum_steps, param_dtype=self.param_dtype,
                    compiler_options=xla,
                )  # fmt: skip
            plans.append(dataclasses.replace(result, model=self.model))
        plan.show(plans, console)
        if self.json is not None:
            self.json.write_text(json.dumps([dataclasses.asdict(item) for item in plans], indent=2) + "\n", "utf-8")
        return 0

    def _check_decodes(self, model: jaxlm.Model) -> None:
        try:
            model.state_specs(1, 1, **({"source_length": 1} if model.reads_source else {}))
        except TypeError as error:
            raise ValueError(f"{error}: remove --decode") from error

    def _model(self) -> jaxlm.Model:
        changes = assignments("set", self.set)
        model = jaxlm.get_model(self.model, **changes)
        dropout = {} if self.dropout else model.zero_dropout
        return model.with_known_fields(**{"dtype": self.dtype, **dropout, **changes})

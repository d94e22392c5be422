"""``jaxlm plan``: compile a step for accelerators that are not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jaxlm
from jaxlm.command_line import check_output_file
from jaxlm.config import assignment, assignments


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
        check_output_file("json", self.json)
        from rich.console import Console

        from jaxlm import plan

        plan.prepare()
        console = Console(soft_wrap=False)
        model, xla = self._model(), dict(assignment("xla", option) for option in self.xla)
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
        changes = assignments("set", self.set)
        model = jaxlm.get_model(self.model, **changes)
        fields = [field.name for field in dataclasses.fields(model.config)]
        if "dtype" in fields and "dtype" not in changes:
            changes["dtype"] = self.dtype
        if not self.dropout:
            changes = {**{name: 0.0 for name in fields if name.endswith("dropout")}, **changes}
        return jaxlm.get_model(self.model, **changes)

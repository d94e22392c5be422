"""``jaxlm calibrate``: the fastest block sizes and limits for this processor, measured and written to a file."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import sys
from pathlib import Path

import jaxlib.version
import numpy as np

from jaxlm import config, host
from jaxlm.command_line import check_output_file
from jaxlm.nn import calibration
from jaxlm.nn.cpu_choices import VARIABLE, Calibration, CpuChoices
from jaxlm.training.compare import aligned_table

DEFAULT_FILE = Path("~/.config/jaxlm/choices.json")


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Measure block sizes and limits on this processor, and write the fastest to a file. This takes a few minutes.

    jaxlm uses the file only in processes whose environment variable JAXLM_CHOICES is its path. End other programs
    first. A value stays at its default if no other value is faster by more than 5 %.
    """

    output: Path = DEFAULT_FILE
    """The file to write. An existing file is replaced."""
    quick: bool = False
    """Measure each value with one shape only, in about a minute. The result is less reliable."""

    def run(self) -> int:
        """Print the tables, write the file, and return the exit status."""
        path = Path(os.path.expanduser(self.output))
        if self.output == DEFAULT_FILE:
            path.parent.mkdir(parents=True, exist_ok=True)
        check_output_file("output", path)
        host.select_cpu()
        host.keep_freed_memory()  # as in the experiments, so that page faults do not disturb the measurements
        processor, cores = host.processor_model(), host.num_cores()
        print(f"{processor}, {cores} {'core' if cores == 1 else 'cores'}, jaxlib {jaxlib.version.__version__}")
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > 0.5:
            print(f"jaxlm calibrate: other programs are running (load {load:.1f}): end them first", file=sys.stderr)
        values = CpuChoices()
        for name in calibration.MEASUREMENTS:
            result = calibration.measure(name, values, quick=self.quick)
            print(f"\n{describe(result)}", flush=True)
            values = dataclasses.replace(values, **{name: result.chosen})
        today = datetime.date.today().isoformat()
        config.write(Calibration(processor, cores, jaxlib.version.__version__, today, values), path)
        print(f"\n{path}: {values.changes()}\nTo use it: export {VARIABLE}={shlex.quote(str(path))}")
        return 0


def describe(result: calibration.Result) -> str:
    """A text: the name of a value, its default, the chosen candidate, and a table of the median times in ms."""
    rows = [["ms", *map(str, result.candidates)]]
    for label, times in result.seconds.items():
        rows.append([label, *(f"{1000 * seconds:.3g}" for seconds in np.median(times, axis=0))])
    rows.append(["relative to the default", *(f"{ratio:.2f}" for ratio in result.relative_times())])
    change = "kept" if result.chosen == result.default else f"-> {result.chosen}"
    return f"{result.name}: default {result.default}, {change}\n{aligned_table(rows)}"

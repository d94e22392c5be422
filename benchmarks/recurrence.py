"""Speed of LSTM and GRU layers: jaxlm, torch (oneDNN on a CPU) and Flax with the same weights and inputs, float32.

    python -m benchmarks.recurrence            three sizes; passes forward and both (forward and backward)
    python -m benchmarks.recurrence --layers lstm --sizes 512x1x650 --json recurrence.json
    python -m benchmarks.recurrence --quick    a short test that the benchmark works

``gru`` applies the reset gate after the product of the state and its weights, as torch and Flax do. ``gru-before``
applies it before this product (Cho et al. 2014). It has no baseline, because torch and Flax have no such layer. Before
the measurement, 64 elements of the output, of the last state and of each gradient are compared and must agree.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from benchmarks import harness, shapes

IMPLEMENTATIONS = {
    "jaxlm": "benchmarks.recurrence_baselines:JaxlmRecurrence",
    "torch": "benchmarks.recurrence_baselines:TorchRecurrence",
    "flax": "benchmarks.recurrence_baselines:FlaxRecurrence",
}
WITHOUT_BASELINE = ("gru-before",)
"""Layers that torch and Flax do not have."""
PASSES = ("forward", "both")
TOLERANCE = 1e-4
"""Maximum difference between jaxlm and a baseline, for 64 random elements of each result, relative to the largest
absolute value of these elements in jaxlm."""


@dataclasses.dataclass(frozen=True)
class Recurrence(harness.Options):
    """Measure recurrent layers."""

    rounds: int = 11
    """Measured repetitions of each implementation."""
    layers: str = ",".join(shapes.NUM_GATES)
    """Layers: lstm, gru, gru-before, separated by commas."""
    passes: str = ",".join(PASSES)
    """Passes, separated by commas: forward, both (forward and backward, with gradients of parameters and input)."""
    sizes: str = ",".join(f"{shape.length}x{shape.batch}x{shape.width}" for shape in shapes.RECURRENCES)
    """Sizes, separated by commas: time steps x rows x width, such as 512x1x650. Input and state have the same width."""


def run(options: Recurrence) -> None:
    """Measure and print the results."""
    layers = harness.names("layers", options.layers, tuple(shapes.NUM_GATES))
    passes = harness.names("passes", options.passes, PASSES)
    sizes = shapes.QUICK_RECURRENCES if options.quick else [_parse_size(text) for text in options.sizes.split(",")]
    harness.check_distinct("sizes", sizes)
    targets = harness.choose_implementations(options.against, IMPLEMENTATIONS)
    rows: list[harness.Row] = []
    with harness.session(None, options.device) as session:
        for layer in layers:
            for pass_name in passes:
                for shape in sizes:
                    measured = _measure(options, session, targets, layer, pass_name, shape)
                    print("; ".join(f"{row.implementation} {1e3 * row.median:.4g} ms" for row in measured), flush=True)
                    rows += measured
        print("\n" + recurrence_table(rows))
        records = [{**row.record(), "us_per_step": _us_per_step(row)} for row in rows]
        harness.write_json(options.json, "recurrence", options, session.description, records)


def _measure(
    options: Recurrence,
    session: harness.Session,
    targets: dict[str, str],
    layer: str,
    pass_name: str,
    shape: shapes.Recurrence,
) -> list[harness.Row]:
    op = f"{layer} {pass_name}"
    print(f"{op}, {shape}: ", end="")
    return session.compare(
        {name: target for name, target in targets.items() if name == harness.JAXLM or layer not in WITHOUT_BASELINE},
        {"layer": layer, "pass_name": pass_name, **dataclasses.asdict(shape)},
        op, str(shape), shapes.recurrence_work(shape, layer, pass_name),
        warm_up=2, rounds=options.rounds, check=lambda values: harness.check_samples(values, TOLERANCE),
    )  # fmt: skip


def recurrence_table(rows: Sequence[harness.Row]) -> str:
    """The measurements as a table. The last column is the time in microseconds / the number of time steps."""
    return harness.comparison_table(rows, "layer, pass", "us/step", lambda row: f"{_us_per_step(row):.4g}")


def _us_per_step(row: harness.Row) -> float:
    return 1e6 * row.median / int(row.shape.split()[0].removeprefix("T"))


def _parse_size(text: str) -> shapes.Recurrence:
    parts = text.strip().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise harness.UserError(f"--sizes {text!r} must be steps x rows x width, such as 128x32x512")
    return shapes.Recurrence(*map(int, parts))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Recurrence, run, arguments, name="recurrence", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

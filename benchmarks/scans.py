"""Speed of linear recurrences and depthwise convolution: jaxlm compared with plain JAX, torch, fla and JLA.

    python -m benchmarks.scans                                   all operations, forward and with gradients, float32
    python -m benchmarks.scans --only linear_scan --json scans.json
    python -m benchmarks.scans --against lax.scan,jla            plain JAX and the package jax-linear-attention (JLA)
    python -m benchmarks.scans --quick                           a short test that the benchmark works

Before the measurement, samples of the output and of each gradient are compared and must agree. In jaxlm and plain
JAX, a repetition may overwrite two buffers, because they are donated: the input of ``linear_scan``, and the gradient of
the output. They are created again before each repetition. This is not part of the measured time, because in a model
other layers compute these arrays. The column "% of peak" is relative to the memory bandwidth of an in-place copy for
``linear_scan`` and ``depthwise_convolution``, and to the FLOP/s of a matrix product for the other operations.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from benchmarks import harness, shapes
from benchmarks.harness import JAXLM, UserError

BASELINES = {
    "linear_scan": ("lax.scan", "associative_scan"),
    "linear_attention": ("lax.scan", "fla", "jla"),
    "gated_delta_rule": ("lax.scan", "torch", "fla", "jla"),
    "generalized_delta_rule": ("lax.scan", "fla", "jla"),
    "mlstm": ("lax.scan", "torch", "jla"),
    "depthwise_convolution": ("lax.conv", "torch", "jla"),
}
"""Baselines of each operation. ``lax.scan`` and ``lax.conv`` are jaxlm's implementation ``reference``."""
IMPLEMENTATIONS = {
    JAXLM: "benchmarks.scan_baselines:Jaxlm",
    "lax.scan": "benchmarks.scan_baselines:Reference",
    "associative_scan": "benchmarks.scan_baselines:AssociativeScan",
    "lax.conv": "benchmarks.scan_baselines:Reference",
    "torch": "benchmarks.scan_baselines:Torch",
    "fla": "benchmarks.scan_baselines:Fla",
    "jla": "benchmarks.scan_baselines:Jla",
}
TOLERANCE = 2e-4
"""Maximum difference between jaxlm and a baseline, for sampled elements of each result, relative to the largest
absolute value of these elements in jaxlm. Some results are sums of thousands of terms, so their rounding errors are
large."""


@dataclasses.dataclass(frozen=True)
class Scans(harness.Options):
    """Measure scans and depthwise convolutions."""

    against: str = "lax.scan,associative_scan,lax.conv,torch,fla"
    """Baselines, separated by commas. Each operation is compared only with the baselines that support it. Empty: only
    jaxlm is measured. ``jla`` is not a default, because it needs Python 3.12 and one version of JAX (extra ``jla``)."""
    only: str = ""
    """One operation (a key of ``BASELINES``), such as linear_scan; empty: all operations."""


def run(options: Scans) -> None:
    """Measure and print the results."""
    if options.only and options.only not in BASELINES:
        raise UserError(f"--only {options.only} is unknown: choose from {', '.join(BASELINES)}")
    chosen = harness.choose_implementations(options.against, IMPLEMENTATIONS)
    cases = [case for case in shapes.SCANS if not options.only or case.op == options.only]
    if options.quick:
        cases = [case.quick() for case in cases]
    records: list[dict[str, Any]] = []
    with harness.session(None, options.device) as session:
        for case in cases:
            for backward in (False, True):
                rows = session.compare(
                    {name: chosen[name] for name in (JAXLM, *BASELINES[case.op]) if name in chosen},
                    {"op": case.op, "sizes": dict(case.sizes), "backward": backward},
                    f"{case.op}, forward{' and backward' if backward else ''}", case.shown,
                    shapes.scan_work(case, backward), warm_up=2, rounds=options.rounds,
                    check=lambda values: harness.check_samples(values, TOLERANCE),
                )  # fmt: skip
                print("\n" + harness.speed_table(rows) + "\n", flush=True)
                records += [row.record() for row in rows]
    harness.write_json(options.json, "scans", options, session.description, records)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Scans, run, arguments, name="scans", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

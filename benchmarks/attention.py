"""Attention: jaxlm and torch's scaled_dot_product_attention with the same random inputs, float32, causal.

    python -m benchmarks.attention                                 1024 and 4096 tokens, three variants
    python -m benchmarks.attention --variants plain --lengths 1024 --json attention.json
    python -m benchmarks.attention --variants decode                  one query over caches of different fill lengths
    python -m benchmarks.attention --quick                         a short test that the benchmark works

``bias`` adds T5's bias of bucketed distances. ``relative`` adds the bias of Transformer-XL. The backward pass also
computes the gradients of the bias tables. torch supports these biases only as a dense array for all query-key pairs, so
each repetition computes this array. Outputs and all gradients must agree before the measurement.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from benchmarks import harness, shapes

IMPLEMENTATIONS = {"jaxlm": "benchmarks.attention_baselines:Jaxlm", "torch": "benchmarks.attention_baselines:Torch"}
VARIANTS = ("plain", "bias", "relative", "decode")
PASSES = ("forward", "both")
TOLERANCE = 1e-4
"""Maximum difference of sampled elements of a result, relative to the largest sampled element."""


@dataclasses.dataclass(frozen=True)
class Attention(harness.Options):
    """Measure attention."""

    against: str = "torch"
    """Baselines, separated by commas; empty: only jaxlm is measured."""
    rounds: int = 11
    """Repetitions of each implementation, after warm-up."""
    variants: str = "plain,bias,relative"
    """Variants: plain, bias, relative, decode, separated by commas."""
    lengths: str = ",".join(map(str, shapes.ATTENTION_LENGTHS))
    """Tokens, separated by commas. For decode, the capacity of the cache is the largest number, and each number is a
    fill length."""


def run(options: Attention) -> None:
    """Measure and print the results."""
    variants = harness.names("variants", options.variants, VARIANTS)
    lengths = [32] if options.quick else harness.numbers("lengths", options.lengths)
    targets = harness.choose(options.against, IMPLEMENTATIONS)
    rows: list[harness.Row] = []
    with harness.session(None, options.device) as session:
        for variant in variants:
            for length in lengths:
                shape = shapes.Attention(variant, length, max(lengths), heads=2 if options.quick else 12)
                for pass_name in PASSES[: 1 if variant == "decode" else 2]:
                    rows += _measure(options, session, targets, shape, pass_name)
        print("\n" + attention_table(rows))
        harness.write_json(options.json, "attention", options, session.description, [row.record() for row in rows])


def _measure(
    options: Attention, session: harness.Session, targets: dict[str, str], shape: shapes.Attention, pass_name: str
) -> list[harness.Row]:
    return session.compare(
        targets, {"pass_name": pass_name, **dataclasses.asdict(shape)},
        f"{shape.variant} {pass_name}", str(shape), shapes.attention_work(shape, pass_name),
        warm_up=2, rounds=options.rounds, check=lambda values: harness.check_samples(values, TOLERANCE),
    )  # fmt: skip


def attention_table(rows: Sequence[harness.Row]) -> str:
    """The measurements as a table, with the time of jaxlm relative to each baseline and to its own plain variant."""
    ours = {(row.op, row.shape): row for row in rows if row.implementation == harness.OURS}

    def over_plain(row: harness.Row) -> str:
        plain = ours.get((f"plain {row.op.split()[1]}", row.shape))
        return "" if plain is None or row.implementation != harness.OURS else f"{row.median / plain.median:.2f}"

    return harness.comparison_table(rows, "variant, pass", "/plain", over_plain)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Attention, run, arguments, name="attention", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

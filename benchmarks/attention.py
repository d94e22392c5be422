"""Speed of causal attention in float32: jaxlm, jax.nn.dot_product_attention ("jax.nn") and torch's
scaled_dot_product_attention ("torch") with the same random inputs.

    python -m benchmarks.attention                                 1024 and 4096 tokens; variants plain, bias, relative
    python -m benchmarks.attention --variants plain --lengths 1024 --json attention.json
    python -m benchmarks.attention --variants decode                  one query over caches of different fill lengths
    python -m benchmarks.attention --quick                         a short test that the benchmark works

``plain`` adds no bias to the scores. ``bias`` adds T5's bias of bucketed distances (Raffel et al. 2020, section 2.1).
``relative`` adds the product of the query and a vector for the distance (Dai et al. 2019, section 3.3). The backward
pass also computes the gradients of the table of biases or vectors. The baselines accept a bias only as a dense array
for all query-key pairs. They compute this array in each repetition. ``decode`` is one query over a key-value cache,
which may have free slots. Before the measurement, 64 elements of the output and of each gradient are compared and must
agree.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from benchmarks import harness, shapes

IMPLEMENTATIONS = {
    "jaxlm": "benchmarks.attention_baselines:Jaxlm",
    "torch": "benchmarks.attention_baselines:Torch",
    "jax.nn": "benchmarks.attention_baselines:JaxNN",
}
VARIANTS = ("plain", "bias", "relative", "decode")
PASSES = ("forward", "both")
TOLERANCE = 1e-4
"""Maximum difference between jaxlm and a baseline, for 64 random elements of each result, relative to the largest
absolute value of these elements in jaxlm."""


@dataclasses.dataclass(frozen=True)
class Attention(harness.Options):
    """Measure attention."""

    against: str = "torch,jax.nn"
    """Baselines, separated by commas; empty: only jaxlm is measured."""
    rounds: int = 11
    """Measured repetitions of each implementation."""
    variants: str = "plain,bias,relative"
    """Variants: plain, bias, relative, decode, separated by commas."""
    lengths: str = ",".join(map(str, shapes.ATTENTION_LENGTHS))
    """Numbers of tokens, separated by commas. For decode, each number is a number of filled slots of the cache, whose
    capacity is the largest number."""


def run(options: Attention) -> None:
    """Measure and print the results."""
    variants = harness.names("variants", options.variants, VARIANTS)
    lengths = [32] if options.quick else harness.parse_numbers("lengths", options.lengths)
    targets = harness.choose_implementations(options.against, IMPLEMENTATIONS)
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
    """The measurements as a table. The last column, for jaxlm only, is the time of a variant / the time of plain."""
    ours = {(row.op, row.shape): row for row in rows if row.implementation == harness.JAXLM}

    def over_plain(row: harness.Row) -> str:
        plain = ours.get((f"plain {row.op.split()[1]}", row.shape))
        return "" if plain is None or row.implementation != harness.JAXLM else f"{row.median / plain.median:.2f}"

    return harness.comparison_table(rows, "variant, pass", "time/plain", over_plain)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Attention, run, arguments, name="attention", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

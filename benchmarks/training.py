"""Optimizer steps of GPT-2: jaxlm against torch and Flax, from one random checkpoint on the same random tokens.

    python -m benchmarks.training                                    GPT-2 124M, float32, batch 2 of 512 tokens
    python -m benchmarks.training --against torch,torch-compile,flax --json training.json
    python -m benchmarks.training --quick                            does it work?

Before anything is timed, the losses of all peers must agree, before the first update and after the third.
"""

from __future__ import annotations

import dataclasses
import sys

import tyro

from benchmarks import harness, shapes

PEERS = {
    "jaxlm": "benchmarks.peers:JaxlmTraining",
    "torch": "benchmarks.peers:TorchTraining",
    "torch-compile": "benchmarks.peers:TorchCompiledTraining",
    "flax": "benchmarks.peers:FlaxTraining",
}
TOLERANCES = ((0, 1e-4), (3, 1e-3))
"""Updates made, and how far losses may be apart, relatively."""


@dataclasses.dataclass(frozen=True)
class Training(shapes.Training, harness.Options):
    """Measure optimizer steps."""


def run(options: Training) -> None:
    """Measure and print."""
    if options.quick:
        options = dataclasses.replace(options, **dataclasses.asdict(shapes.QUICK_TRAINING))
    targets = harness.choose(options.against, PEERS)
    with harness.session(options.model) as session:
        peers = {
            name: session.start(name, target, batch=options.batch, length=options.length)
            for name, target in targets.items()
        }
        rows = harness.measure(
            "training step", f"{options.model} B{options.batch} T{options.length}",
            shapes.training_work(options, session.model), session.machine, peers,
            warm_up=TOLERANCES[-1][0] + 1, rounds=options.rounds,
            check=lambda losses: harness.check_losses(losses, TOLERANCES),
        )  # fmt: skip
        print("\n" + harness.speed_table(rows))
        harness.write_json(options.json, "training", options, session.description, [row.record() for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Training, args=arguments, prog="python -m benchmarks.training", description=__doc__)
    return harness.exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

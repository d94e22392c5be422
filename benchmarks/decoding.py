"""Greedy generation with GPT-2: jaxlm against torch and Flax, from one random checkpoint and the same random prompts.

    python -m benchmarks.decoding                                    GPT-2 124M, float32, 64 tokens after a prompt of 32
    python -m benchmarks.decoding --batch 8 --json decoding.json
    python -m benchmarks.decoding --quick                            does it work?

Before anything is timed, all peers must have generated the same tokens. No end token: each row has all its tokens.
"""

from __future__ import annotations

import dataclasses
import sys

import tyro

from benchmarks import harness, shapes

PEERS = {
    "jaxlm": "benchmarks.peers:JaxlmDecoding",
    "torch": "benchmarks.peers:TorchDecoding",
    "flax": "benchmarks.peers:FlaxDecoding",
}


@dataclasses.dataclass(frozen=True)
class Decoding(shapes.Decoding, harness.Options):
    """Measure greedy generation."""


def run(options: Decoding) -> None:
    """Measure and print."""
    if options.quick:
        options = dataclasses.replace(options, **dataclasses.asdict(shapes.QUICK_DECODING))
    targets = harness.choose(options.against, PEERS)
    with harness.session(options.model) as session:
        sizes = {"batch": options.batch, "prompt": options.prompt, "tokens": options.tokens}
        peers = {name: session.start(name, target, **sizes) for name, target in targets.items()}
        rows = harness.measure(
            "greedy decoding", f"{options.model} B{options.batch} prompt {options.prompt} + {options.tokens} tokens",
            shapes.decoding_work(options, session.model), session.machine, peers, warm_up=2, rounds=options.rounds,
            check=harness.check_same,
        )  # fmt: skip
        print("\n" + harness.speed_table(rows))
        harness.write_json(options.json, "decoding", options, session.description, [row.record() for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Decoding, args=arguments, prog="python -m benchmarks.decoding", description=__doc__)
    return harness.exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

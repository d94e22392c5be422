"""Optimizer steps and losses of whole models: jaxlm against torch and Flax, from one random checkpoint and batch.

    python -m benchmarks.training                                    GPT-2 124M, float32, batch 2 of 512 tokens
    python -m benchmarks.training --model bert-base-uncased,t5-small,xlnet-base-cased,lstm-zaremba-medium,vdcnn-9
    python -m benchmarks.training --model transformer-xl-base
    python -m benchmarks.training --passes forward,step --against torch,torch-compile,flax --json training.json
    python -m benchmarks.training --quick                            does it work?

Each model learns its own objective, without dropout; no torch class is slowed down by one that it would not have.
Transformer-XL reads words as frequent as their ranks, for which its softmax is made.
Masked models: all sides predict the same 15 % of the tokens; the classes of transformers compute the vocabulary at all
places, as they always do, jaxlm at those that are predicted.
Before anything is timed, the losses of all peers must agree, before the first update and after the third.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

from benchmarks import harness, shapes, wholes

PEERS = {
    "jaxlm": "benchmarks.training_peers:Jaxlm",
    "torch": "benchmarks.training_peers:Torch",
    "torch-compile": "benchmarks.training_peers:TorchCompiled",
    "flax": "benchmarks.training_peers:Flax",
}
OPERATIONS = {"forward": "loss", "step": "training step"}
UPDATES = 3
TOLERANCES = ((0, 1e-4), (UPDATES, 1e-4))
"""Updates made, and how far losses may be apart, relatively."""
LOOSE = {"resnet": ((0, 1e-4), (UPDATES, 2e-2))}
"""The same for steps of a family. Adam's first updates are as large where a gradient is nothing but rounding as
elsewhere, and what stands before a batch norm has many of those."""


@dataclasses.dataclass(frozen=True)
class Training(shapes.Training, harness.Options):
    """Measure losses and optimizer steps."""


def run(options: Training) -> None:
    """Measure and print."""
    targets = harness.choose(options.against, PEERS)
    passes = harness.names("passes", options.passes, ("forward", "step"))
    rows: list[harness.Row] = []
    for name in options.model.replace(" ", "").split(","):
        sizes = {"batch": options.batch, "length": options.length, "quick": options.quick}
        with harness.session(name, options.device, **sizes) as session:
            model = session.model
            found = harness.with_class(targets, model["family"], wholes.CLASSES, wholes.SIZES)
            for which in passes:
                tolerances = LOOSE.get(model["family"], TOLERANCES) if which == "step" else TOLERANCES
                arguments = {"family": model["family"], "passes": which}
                measured = session.compare(
                    found, arguments, OPERATIONS[which], f"{name} B{model['batch']} T{model['length']}",
                    shapes.training_work(which, model), warm_up=UPDATES + 1, rounds=options.rounds,
                    check=functools.partial(harness.check_losses, tolerances=tolerances),
                )  # fmt: skip
                rows += session.with_cached_compile(measured, targets[harness.OURS], **arguments)
                print("\n" + harness.speed_table(rows[-len(found) :]) + "\n", flush=True)
        harness.write_json(options.json, "training", options, session.description, [row.record() for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return harness.main(Training, run, arguments, name="training", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

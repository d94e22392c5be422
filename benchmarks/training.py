"""Optimizer steps and losses of complete models: jaxlm, torch and Flax with the same random checkpoint and batch.

    python -m benchmarks.training                                    GPT-2 124M, float32, batch 2 of 512 tokens
    python -m benchmarks.training --model bert-base-uncased,t5-small,xlnet-base-cased,lstm-zaremba-medium,vdcnn-9
    python -m benchmarks.training --model transformer-xl-base
    python -m benchmarks.training --passes forward,step --against torch,torch-compile,flax --json training.json
    python -m benchmarks.training --quick                            a short test that the benchmark works

Each model is trained with its own objective and without dropout; no torch class computes an objective that is not its
own. Transformer-XL reads tokens with Zipf frequencies, for which its adaptive softmax is designed. For masked models,
all peers predict the same 15 % of the tokens. The classes of transformers always compute logits at all positions, and
jaxlm only at the predicted positions.
The losses of all peers must agree before the first update and after the third one; only then are steps measured.
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
"""Number of updates, and the maximum relative difference of the losses after them."""
LOOSE = {"resnet": ((0, 1e-4), (UPDATES, 2e-2))}
"""Tolerances of the steps of single families. Adam's first updates have the same size for gradients that are only
rounding errors as for others, and parameters before a batch normalisation have many such gradients."""


@dataclasses.dataclass(frozen=True)
class Training(shapes.Training, harness.Options):
    """Measure losses and optimizer steps."""


def run(options: Training) -> None:
    """Measure and print the results."""
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
    """The exit status of the command line."""
    return harness.main(Training, run, arguments, name="training", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

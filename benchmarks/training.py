"""Optimizer steps and losses of complete models: jaxlm, torch and Flax with the same random checkpoint and batch.

    python -m benchmarks.training                                    GPT-2 124M, float32, batch 2 of 512 tokens
    python -m benchmarks.training --model bert-base-uncased,t5-small,xlnet-base-cased,lstm-zaremba-medium,vdcnn-9
    python -m benchmarks.training --model transformer-xl-base
    python -m benchmarks.training --model mamba2-130m,griffin-12-layers,gated-deltanet-12-layers,xlstm-12-layers
    python -m benchmarks.training --model smollm2-135m,mixtral-12-layers
    python -m benchmarks.training --passes forward,step --against torch,torch-compile,flax --json training.json
    python -m benchmarks.training --quick                            a short test that the benchmark works

Dropout is off. The family of a model determines its objective, because each torch class has the head of only one
objective. The tokens of Transformer-XL have the frequencies of words, because the FLOPs of its adaptive softmax depend
on the frequencies (``shapes.zipf_tokens``). The other models read uniformly distributed tokens. All implementations of
a BERT predict the same 15 % of the tokens. Its classes in transformers compute logits at all positions, jaxlm only at
the predicted positions.

The losses of all implementations must agree, or the program ends with an error. They are compared before the first
update, and for steps also after the third update. The relative difference must be at most 1e-4 (VDCNN after the third
update: 2e-2).
"""

from __future__ import annotations

import dataclasses
import functools
import sys

from benchmarks import complete_models, harness, shapes

IMPLEMENTATIONS = {
    "jaxlm": "benchmarks.training_baselines:Jaxlm",
    "torch": "benchmarks.training_baselines:Torch",
    "torch-compile": "benchmarks.training_baselines:TorchCompiled",
    "flax": "benchmarks.training_baselines:Flax",
}
OPERATIONS = {"forward": "loss", "step": "training step"}
UPDATES = 3
TOLERANCES = ((0, 1e-4), (UPDATES, 1e-4))
"""Pairs (number of updates, maximum relative difference of the losses after these updates)."""
FAMILY_TOLERANCES = {"resnet": ((0, 1e-4), (UPDATES, 2e-2))}
"""Tolerances of training steps for families that need other values than :data:`TOLERANCES`.

The losses of a VDCNN are sensitive to rounding errors. If jaxlm reads the rows of a batch in reversed order, only the
rounding errors change. Still, the losses after two and three updates differ by 5e-3 and 3e-3 (vdcnn-9, 8 rows, CPU).
Adam's first updates amplify rounding errors of gradients near 0, because the size of these updates hardly depends on
the size of the gradient. It is not known which parameters cause most of the difference.
"""


@dataclasses.dataclass(frozen=True)
class Training(harness.Options):
    """Measure losses and optimizer steps."""

    model: str = "gpt2"
    """Models of the families gpt, llama, bert, t5, xlnet, transformer_xl, lstm, resnet (VDCNN), mamba2, griffin,
    gated_deltanet and xlstm, separated by commas. ``complete_models.REDUCED_MODELS`` has reduced large models."""
    passes: str = "step"
    """Passes, separated by commas: forward (only the loss), step (an optimizer step)."""
    batch: int | None = None
    """Rows per batch; None: the default of the family."""
    length: int | None = None
    """Tokens per row; None: the default of the family."""


def run(options: Training) -> None:
    """Measure and print the results."""
    passes = harness.names("passes", options.passes, ("forward", "step"))
    targets = harness.choose_implementations(options.against, IMPLEMENTATIONS)
    rows: list[harness.Row] = []
    for name in harness.split_models(options.model):
        sizes = {"batch": options.batch, "length": options.length, "quick": options.quick}
        with harness.session(name, options.device, **sizes) as session:
            model = session.model
            supported = harness.implementations_with_family(
                targets, model["family"], complete_models.FAMILIES_BY_BASELINE, complete_models.DEFAULT_BATCH_SIZES
            )
            for pass_name in passes:
                tolerances = FAMILY_TOLERANCES.get(model["family"], TOLERANCES) if pass_name == "step" else TOLERANCES
                arguments = {"family": model["family"], "pass_name": pass_name}
                measured = session.compare(
                    supported, arguments, OPERATIONS[pass_name], f"{name} B{model['batch']} T{model['length']}",
                    shapes.training_work(pass_name, model), warm_up=UPDATES + 1, rounds=options.rounds,
                    check=functools.partial(harness.check_losses, tolerances=tolerances),
                )  # fmt: skip
                rows += session.add_cached_compile_seconds(measured, targets[harness.JAXLM], **arguments)
                print("\n" + harness.speed_table(rows[-len(supported) :]) + "\n", flush=True)
        harness.write_json(options.json, "training", options, session.description, [row.record() for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Training, run, arguments, name="training", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

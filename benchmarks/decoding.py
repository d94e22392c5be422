"""Speed of greedy generation: jaxlm, torch and Flax with the same random checkpoint and prompts.

    python -m benchmarks.decoding                                    GPT-2 124M, float32, 64 tokens after a prompt of 32
    python -m benchmarks.decoding --batch 1,8 --prompt 32,512 --json decoding.json
    python -m benchmarks.decoding --model gpt2,t5-small,lstm-zaremba-medium
    python -m benchmarks.decoding --quick                            a short test that the benchmark works

Before the measurement, the tokens that the implementations generate are compared and must be the same. There is no end
token, so each row gets the number of tokens of the option ``--tokens``.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

from benchmarks import complete_models, harness, shapes

IMPLEMENTATIONS = {
    "jaxlm": "benchmarks.decoding_baselines:Jaxlm",
    "torch": "benchmarks.decoding_baselines:Torch",
    "flax": "benchmarks.decoding_baselines:Flax",
}


@dataclasses.dataclass(frozen=True)
class Decoding(harness.Options):
    """Measure greedy generation."""

    model: str = "gpt2"
    """Models of the families gpt, llama, t5, xlnet, lstm and mamba2, separated by commas."""
    batch: str = "1"
    """Rows per batch; one or more numbers, separated by commas."""
    prompt: str = "32"
    """Tokens per prompt (for T5, per source); one or more numbers, separated by commas."""
    tokens: int = 64
    """New tokens per row."""


def run(options: Decoding) -> None:
    """Measure and print the results."""
    if options.quick:
        options = dataclasses.replace(options, batch="2", prompt="8", tokens=16)
    batches, prompts = harness.parse_numbers("batch", options.batch), harness.parse_numbers("prompt", options.prompt)
    targets = harness.choose_implementations(options.against, IMPLEMENTATIONS)
    rows: list[harness.Row] = []
    for name in harness.split_models(options.model):
        with harness.session(name, options.device, quick=options.quick) as session:
            family = session.model["family"]
            supported = harness.implementations_with_family(
                targets, family, complete_models.FAMILIES_BY_BASELINE, complete_models.DECODED_FAMILIES
            )
            for batch, prompt in itertools.product(batches, prompts):
                sizes = {"family": family, "batch": batch, "prompt": prompt, "tokens": options.tokens}
                measured = session.compare(
                    supported, sizes, "greedy decoding", f"{name} B{batch} prompt {prompt} + {options.tokens} tokens",
                    shapes.decoding_work(batch, options.tokens, session.model),
                    warm_up=2, rounds=options.rounds, check=harness.check_same,
                )  # fmt: skip
                rows += session.add_cached_compile_seconds(measured, targets[harness.JAXLM], **sizes)
                print("\n" + harness.speed_table(rows[-len(supported) :]) + "\n", flush=True)
        harness.write_json(options.json, "decoding", options, session.description, [row.record() for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Decoding, run, arguments, name="decoding", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

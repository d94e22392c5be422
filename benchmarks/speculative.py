"""Compare the speed of speculative decoding with that of ``generate`` for the same target model, in one process.

    python -m benchmarks.speculative --target runs/large --draft runs/small --prompt "ROMEO:"

``--target`` and ``--draft`` are run directories, or directories in Hugging Face layout with a tokenizer. Use trained
models, because the speed depends on how many proposals the target model accepts.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Measure speculative decoding."""

    target: Path
    """Run directory or model directory of the target model."""
    draft: Path
    """Run directory or model directory of the draft model. It needs the tokenizer of the target model."""
    prompt: str = "ROMEO:"
    """The prompt of every row."""
    batch: int = 1
    """Number of rows."""
    tokens: int = 256
    """Number of new tokens per row."""
    proposed: str = "2,4,8"
    """Numbers of proposals per round, separated by commas. Each number is measured."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    rounds: int = 7
    """Number of measurements of each implementation, after warm-up."""
    json: Path | None = None
    """Also write all results to this JSON file."""


def run(options: Speculative) -> None:
    """Measure and print the results."""
    proposed = harness.numbers("proposed", options.proposed)
    for name, number in (("batch", options.batch), ("tokens", options.tokens), ("rounds", options.rounds)):
        if number < 1:
            raise harness.UserError(f"--{name} {number} must be at least 1")
    import jax
    import numpy as np

    from jaxlm.cli.common import load
    from jaxlm.decoding import Sampling, SpeculativeModels, generate, speculative_generate

    (target, target_params, tokenizer), (draft, draft_params, draft_tokenizer) = (
        load(directory, None) for directory in (options.target, options.draft)
    )
    ids = tokenizer.encode(options.prompt)
    if not np.array_equal(ids, draft_tokenizer.encode(options.prompt)):
        raise harness.UserError("the tokenizers differ: the draft model needs the tokenizer of the target model")
    prompts = np.tile(ids[None], (options.batch, 1))
    arguments: dict[str, Any] = {
        "max_new_tokens": options.tokens,
        "sampling": Sampling(temperature=options.temperature),
        "key": jax.random.key(0),
        "allowed_ids": tokenizer.vocab_size,
    }

    def plain() -> Any:
        return jax.block_until_ready(generate(target, target_params, prompts, **arguments))

    def speculative(number: int) -> Any:
        models = SpeculativeModels(target, target_params, draft, draft_params, number)
        return jax.block_until_ready(speculative_generate(models, prompts, **arguments))

    functions: dict[str, Any] = {"plain": plain} | {
        f"{number} proposals": lambda number=number: speculative(number) for number in proposed
    }
    description = harness.describe_machine()
    for name, value in description.items():
        print(f"{name:10} {value}")
    results = {name: function() for name, function in functions.items()}  # compiles
    if options.temperature == 0.0:
        for name in list(functions)[1:]:
            if not np.array_equal(results[name].generation.tokens, results["plain"].tokens):
                raise harness.Failure(f"{name}: the tokens differ from those of plain decoding")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(options.rounds):
        for name in harness.rotated(list(functions), number):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    records = []
    for name in functions:
        median = statistics.median(seconds[name])
        record: dict[str, Any] = {"implementation": name, "seconds": seconds[name], "median": median}
        record["tokens_per_second"] = options.batch * options.tokens / median
        record["ratio"] = harness.paired_ratio(seconds["plain"], seconds[name])
        if name != "plain":
            result, number = results[name], int(name.split()[0])
            record["accepted"] = float(np.sum(result.accepted) / (np.sum(result.rounds) * number))
            record["tokens_per_round"] = float(np.sum(result.generation.lengths) / np.sum(result.rounds))
        records.append(record)
    cells = [
        [
            record["implementation"], f"{record['tokens_per_second']:,.0f}", f"{record['median']:.3f}",
            f"{record['ratio']:.2f}x", f"{record.get('accepted', float('nan')):.2f}",
            f"{record.get('tokens_per_round', 1.0):.2f}",
        ]
        for record in records
    ]  # fmt: skip
    header = ("decoding", "tokens/s", "median s", "speed over plain", "accepted", "tokens/round")
    print(f"target {options.target} {target.num_parameters:,} parameters, draft {draft.num_parameters:,}")
    print(harness.table(header, cells))
    harness.write_json(options.json, "speculative", options, description, records)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Speculative, run, arguments, name="speculative", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

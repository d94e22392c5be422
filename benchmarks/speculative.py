"""Compare the speed of speculative decoding and of ``generate`` for the same target model, in one process.

    python -m benchmarks.speculative                          trains both models first: some minutes on two cores
    python -m benchmarks.speculative --target runs/large --draft runs/small --prompt "ROMEO:"
    python -m benchmarks.speculative --quick                  a short test that the benchmark works

``--target`` and ``--draft`` are run directories, or directories in Hugging Face layout with a tokenizer. The draft
model proposes tokens, and the target model accepts or rejects them. Use trained models, because the speed depends on
how many of these tokens are accepted. Without the two options, the benchmark trains a large and a small GPT on the
included plays (``experiments.text_generation``), measures them and deletes them.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

PLAIN = "plain"
"""Name of decoding without a draft model, with ``generate``."""
TRAINING_SETTINGS = {
    "target": ("num_layers=6 num_heads=6 embed_dim=384", 500, 1e-3), "draft": ("num_layers=2", 1000, 3e-3),
}  # fmt: skip
"""For the target model and the draft model: config fields, number of training steps, and learning rate. A model is
trained with them if the option with its name (``--target``, ``--draft``) is missing."""
QUICK_TRAINING_SETTINGS = ("num_layers=1 num_heads=2 embed_dim=16", 2, 3e-3)
"""Config fields, number of training steps and learning rate of each of the two models with ``--quick``."""


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Measure speculative and plain decoding."""

    target: Path | None = None
    """Run directory or model directory of the target model. None: a model is trained."""
    draft: Path | None = None
    """Run directory or model directory of the draft model. Its tokenizer must be the same as that of the
    target model. None: a model is trained."""
    prompt: str = "ROMEO:"
    """The prompt of every row."""
    batch: int = 1
    """Number of rows."""
    tokens: int = 256
    """Number of new tokens per row."""
    num_proposed: str = "2,4,8"
    """Numbers of tokens that the draft model proposes per call of the target model, separated by commas. Each number is
    measured."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    rounds: int = 7
    """Number of measured calls of each kind of decoding, after one call that compiles."""
    json: Path | None = None
    """Also write all results to this JSON file."""
    quick: bool = False
    """Train tiny models in two steps, to test that the benchmark works; the measured times have no meaning."""


def run(options: Speculative) -> None:
    """Measure and print the results."""
    proposed = harness.parse_numbers("num-proposed", options.num_proposed)
    if options.tokens < 2:
        raise harness.UserError(f"--tokens {options.tokens} must be at least 2")
    if (options.target is None) != (options.draft is None):
        raise harness.UserError("give both --target and --draft, or neither of them to train both models")
    if options.quick and options.target is not None:
        raise harness.UserError(f"--quick trains tiny models: leave out --target {options.target} and --draft")
    with tempfile.TemporaryDirectory() as temporary:
        target = options.target or _train("target", Path(temporary), options)
        draft = options.draft or _train("draft", Path(temporary), options)
        shape, functions = _decoders(options, target, draft, proposed)
    description = harness.describe_machine()
    for name, value in description.items():
        print(f"{name:10} {value}")
    results = {name: function() for name, function in functions.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(options.rounds):
        for name in harness.rotated(list(functions), number):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    records = [{"shape": shape, **_record(options, name, seconds, results)} for name in functions]
    columns = ("tokens_per_second", "median", "ratio", "accepted", "tokens_per_round", "equal")
    cells = [
        [record["implementation"], *("n/a" if record[name] is None else f"{record[name]:,.2f}" for name in columns)]
        for record in records
    ]
    header = ("decoding", "tokens/s", "median s", "speed over plain", "accepted", "tokens/round", "equal tokens")
    print(harness.table(header, cells))
    harness.write_json(options.json, "speculative", options, description, records)


def _train(name: str, directory: Path, options: Speculative) -> Path:
    """Train a model with its :data:`TRAINING_SETTINGS`, and return its run directory.

    With ``--quick``, the settings are :data:`QUICK_TRAINING_SETTINGS`.

    Args:
        directory: the parent directory of the run directory.

    Raises:
        Failure: the training failed.
    """
    fields, steps, learning_rate = QUICK_TRAINING_SETTINGS if options.quick else TRAINING_SETTINGS[name]
    # Number of positions of the model. The last proposals can extend past the last new token and need positions too.
    length = len(options.prompt) + options.tokens + max(harness.parse_numbers("num-proposed", options.num_proposed))
    arguments: dict[str, Any] = {
        "--training.steps": steps, "--training.batch-size": 4, "--training.sequence-length": length,
        "--training.checkpoint-every": None, "--optimizer.learning-rate": learning_rate,
        "--optimizer.warmup-steps": steps // 10, "--validation-fraction": 0.01, "--sample-tokens": 1,
        "--output": directory / name,
    }  # fmt: skip
    harness.run_experiment("text_generation", arguments, fields)
    return directory / name


def _decoders(
    options: Speculative, target_directory: Path, draft_directory: Path, proposed: Sequence[int]
) -> tuple[str, dict[str, Callable[[], Any]]]:
    """The sizes as text, and the functions to measure, by name: plain decoding, then speculative decoding for each
    number of proposals.

    Each function waits for its result and returns it.
    """
    import jax
    import numpy as np

    from jaxlm.cli.common import load_draft
    from jaxlm.decoding import Sampling, SpeculativeModels, generate, speculative_generate
    from jaxlm.tasks.loading import load

    target, target_params, tokenizer = load(target_directory, None)
    draft, draft_params = load_draft(draft_directory, None, tokenizer, [options.prompt])
    ids = tokenizer.encode(options.prompt)
    print(f"target {target.num_parameters:,} parameters, draft {draft.num_parameters:,}")
    prompts = np.tile(ids[None], (options.batch, 1))
    arguments: dict[str, Any] = {
        "max_new_tokens": options.tokens,
        "sampling": Sampling(temperature=options.temperature),
        "key": jax.random.key(0),
        "num_allowed_ids": tokenizer.vocab_size,
    }

    def plain() -> Any:
        return jax.block_until_ready(generate(target, target_params, prompts, **arguments))

    def speculative(number: int) -> Any:
        models = SpeculativeModels(target, target_params, draft, draft_params, number)
        return jax.block_until_ready(speculative_generate(models, prompts, **arguments))

    sizes = [f"{model.num_parameters / 1e6:.3g}M" for model in (target, draft)]
    shape = f"{sizes[0]} parameters, draft {sizes[1]}, B{options.batch} {options.tokens} tokens"
    proposals = {f"{number} proposals": functools.partial(speculative, number) for number in proposed}
    return shape, {PLAIN: plain, **proposals}


def _record(
    options: Speculative, name: str, seconds: dict[str, list[float]], results: dict[str, Any]
) -> dict[str, Any]:
    """The result of one function as a dict: one line of the table, and the times of all measured calls.

    ``ratio`` is the speed / the speed of plain decoding: the median over the rounds of the time of plain decoding / the
    time of this function. ``plain_median`` is the median time of plain decoding. ``accepted`` is the fraction of the
    proposed tokens that became part of the text. ``tokens_per_round`` is the number of new tokens per row and call of
    the target model. The call for the prompt and the token that it generates do not count. ``equal`` is the fraction of
    tokens that are equal to those of plain decoding. With greedy decoding, it is below 1 only if rounding errors change
    which logit is the largest. For plain decoding, ``accepted`` is None, and the last two values are 1.

    Args:
        name: a key of ``seconds`` and ``results``.
        seconds: the times of the measured calls of each function.
        results: the result of one call of each function.
    """
    median = statistics.median(seconds[name])
    record: dict[str, Any] = {
        "implementation": name, "seconds": seconds[name], "median": median,
        "plain_median": statistics.median(seconds[PLAIN]),
        "tokens_per_second": options.batch * options.tokens / median,
        "ratio": harness.paired_ratio(seconds[PLAIN], seconds[name]),
        "accepted": None, "tokens_per_round": 1.0, "equal": 1.0,
    }  # fmt: skip
    if name == PLAIN:
        return record
    result, number = results[name], int(name.split()[0])
    rounds = float(result.rounds.sum())
    return record | {
        "accepted": float(result.accepted.sum()) / (rounds * number),
        "tokens_per_round": float((result.generation.lengths - 1).sum()) / rounds,
        "equal": float((result.generation.tokens == results[PLAIN].tokens).mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Speculative, run, arguments, name="speculative", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

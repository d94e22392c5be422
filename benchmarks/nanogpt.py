"""Training of nanoGPT's CPU configuration, from a text file to a validation loss, with jaxlm and then with torch.

    python -m benchmarks.nanogpt --data tinyshakespeare.txt

jaxlm and torch use the same batches in the same order, and the same learning-rate schedule, gradient clipping and
weight decay. Their initial weights are different samples of the same distributions. torch trains ``GPT2LMHeadModel`` of
transformers in eager mode. (On a CPU, nanoGPT also trains its own GPT in eager mode.) The nanoGPT readme states a
validation loss of 1.88 for this configuration.

"seconds" is the time of the complete process, including imports and compilation. The process of jaxlm also generates a
passage and writes a report. "tokens/s" is for the training steps only. For jaxlm, it excludes the first step, which
compiles, and the first step after each evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from benchmarks import harness

CPU_ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
"""Environment variables of both processes. jaxlm runs on the CPU, as torch does."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the same GPT with jaxlm and with torch."""

    data: Path
    """UTF-8 text file, such as tinyshakespeare (``input.txt`` of Karpathy's char-rnn)."""
    steps: int = 2000
    """Optimizer steps."""
    side: Literal["both", "torch"] = "both"
    """both: measure jaxlm and torch in two processes and print a table. torch: run only torch, in the current process,
    and print its results as JSON."""
    json: Path | None = None
    """Write the results to this JSON file too."""


def run_jaxlm(options: Options) -> dict[str, float]:
    """Run ``experiments.text_generation --preset nanogpt`` in a separate process and return its results.

    The results are ``validation_loss`` (nats per character), ``tokens_per_second`` and ``seconds``.
    """
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [
            sys.executable, "-m", "experiments.text_generation", "--preset", "nanogpt", "--data", str(options.data),
            "--training.steps", str(options.steps), "--output", str(run),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=CPU_ENVIRONMENT)
        seconds = time.perf_counter() - start
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")][-1]
    loss = [record["validation_loss"] for record in records if "validation_loss" in record][-1]
    return {"validation_loss": loss, "tokens_per_second": rate, "seconds": seconds}


def run_torch(options: Options) -> dict[str, float]:
    """Train the same configuration with torch in the current process and return its results.

    The results are those of :func:`run_jaxlm`, but ``seconds`` is the time of the training steps only.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from experiments.text_generation import PRESETS
    from jaxlm.data import Batches, CharTokenizer, RandomWindows, read_text, split_tokens
    from jaxlm.training.optimizer import learning_rate

    experiment = PRESETS["nanogpt"]
    training, settings = experiment.training, experiment.optimizer
    text = read_text(options.data)
    tokenizer = CharTokenizer.from_text(text)
    train, validation = split_tokens(tokenizer.encode(text), experiment.validation_fraction)
    length, rows = training.sequence_length, training.batch_size
    torch.manual_seed(training.seed)
    ours = experiment.model.build(vocab_size=tokenizer.vocab_size, max_positions=length)[0].config
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=length, n_embd=ours.embed_dim, n_layer=ours.num_layers,
        n_head=ours.num_heads,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), settings.epsilon)
    schedule = learning_rate(settings, options.steps)

    def loss_of(token_batch: object) -> torch.Tensor:
        tokens = torch.from_numpy(token_batch.tokens.astype("int64"))  # type: ignore[attr-defined]
        logits = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    batches, start = Batches(RandomWindows(train, length, rows, seed=training.seed)), time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.zero_grad(set_to_none=True)
        loss_of(next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf"))
        optimizer.step()
    seconds = time.perf_counter() - start
    held_out = Batches(RandomWindows(validation, length, rows, seed=0, stride=length))
    with torch.no_grad():
        losses = [loss_of(next(held_out)).item() for _ in range(training.evaluation_batches)]
    return {
        "validation_loss": sum(losses) / len(losses),
        "tokens_per_second": options.steps * rows * length / seconds,
        "seconds": seconds,
    }


def run(options: Options) -> None:
    """Measure and print the results. ``options.side`` selects what is run and printed."""
    if not options.data.is_file():
        raise harness.UserError(f"--data {options.data} is not a file: give the path of a text file")
    if options.steps < 2:
        raise harness.UserError(f"--steps {options.steps} must be at least 2: jaxlm's tokens/s exclude the first step")
    if options.side == "torch" and options.json is not None:
        raise harness.UserError("--json needs --side both")
    if options.side == "torch":
        print(json.dumps(run_torch(options)))
        return
    rows = {"jaxlm": run_jaxlm(options)}
    command = [sys.executable, "-m", "benchmarks.nanogpt", "--data", str(options.data), "--steps", str(options.steps)]
    start = time.perf_counter()
    process = subprocess.run([*command, "--side", "torch"], check=True, stdout=subprocess.PIPE, env=CPU_ENVIRONMENT)
    rows["torch"] = {**json.loads(process.stdout.splitlines()[-1]), "seconds": time.perf_counter() - start}
    print(f"{'':8}{'validation loss':>16}{'tokens/s':>12}{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:8}{row['validation_loss']:16.4f}{row['tokens_per_second']:12,.0f}{row['seconds']:10.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit status."""
    return harness.main(Options, run, arguments, name="nanogpt", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

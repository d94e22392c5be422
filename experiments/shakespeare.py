"""A character-level GPT learns Shakespeare in about a minute on two CPU cores, and writes some.

    python -m experiments.shakespeare

trains on the embedded plays (or ``--data FILE``: your own text), prints a passage, and leaves a run directory with
``config.json``, ``metrics.jsonl``, ``loss.png``, ``checkpoints/`` and ``model/`` (Hugging Face layout). Expected: see
README.md. ``--preset nanogpt --data tinyshakespeare.txt`` is nanoGPT's CPU configuration (4 layers of width 128,
context 64, batch 12, 2000 steps), for which nanoGPT states a validation loss of 1.88.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

import jaxlm
from jaxlm import config as config_lib
from jaxlm import host, processes
from jaxlm.data import (
    Batches,
    ByteTokenizer,
    CharTokenizer,
    RandomWindows,
    Tokenizer,
    Window,
    load_tokenizer,
    read_text,
    shakespeare,
    split,
)
from jaxlm.decoding import GenerationConfig, Sampling, stream_text
from jaxlm.models import Model, gpt
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training.evaluation import Evaluator, bits_per_character
from jaxlm.training.loop import Result, Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxlm.training.report import draw_losses

SMALL = gpt.Config(
    vocab_size=1, max_positions=1, num_layers=4, num_heads=4, embed_dim=128,
    embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a GPT on a text and let it write."""

    model: gpt.Config = dataclasses.replace(SMALL, vocab_multiple=8)
    """The model. vocab_size and max_positions are raised to what tokenizer and sequences need."""
    training: TrainingConfig = TrainingConfig(steps=1500, batch_size=12, sequence_length=96)
    """The training."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3)
    """The optimizer."""
    data: Path | None = None
    """UTF-8 text to train on (.gz too); None is the embedded Shakespeare."""
    tokenizer: Literal["character", "byte"] = "character"
    """Characters of the text, or bytes."""
    validation_fraction: float = 0.1
    """Last part of the text, kept for validation."""
    mesh: str | None = None
    """Split over devices, e.g. data=4,tensor=2; axes: data, fsdp, tensor, sequence. None: one device."""
    output: Path | None = None
    """Run directory; None makes runs/shakespeare-<time>."""
    prompt: str = "ROMEO:"
    """What the generated passage starts with."""
    sample_tokens: int = 600
    """Length of the generated passage."""
    temperature: float = 0.8
    """Below 1 the passage is more probable, above more surprising; 0 always takes the likeliest token."""


NANOGPT = Experiment(
    model=SMALL,
    training=TrainingConfig(steps=2000, batch_size=12, sequence_length=64, evaluation_batches=140),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99, weight_decay=0.1),
)


def make_tokenizer(kind: str, text: str) -> Tokenizer:
    """The tokenizer called ``kind`` for ``text``."""
    return CharTokenizer.from_text(text) if kind == "character" else ByteTokenizer()


def to_batch(window: Window) -> causal.Batch:
    """A window of tokens as inputs and targets."""
    return causal.batch(window.tokens, window.segment_ids)


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train, report, export and sample; returns the result of the training."""
    begun = time.perf_counter()
    training = experiment.training
    if resume is not None:
        _check_unchanged(experiment, config_lib.read(Experiment, resume / "config.json"))
    text = shakespeare() if experiment.data is None else read_text(experiment.data)
    tokenizer = load_tokenizer(resume / "model") if resume else make_tokenizer(experiment.tokenizer, text)
    tokens = tokenizer.encode(text)
    parts = dict(zip(("training", "validation"), split(tokens, experiment.validation_fraction), strict=True))
    model = Model(
        "gpt",
        dataclasses.replace(
            experiment.model,
            vocab_size=max(experiment.model.vocab_size, tokenizer.vocab_size),
            max_positions=max(experiment.model.max_positions, training.sequence_length),
        ),
    )
    sharding = None if experiment.mesh is None else Sharding(make_mesh(experiment.mesh))

    def batches(part: str, stride: int, seed: int) -> Batches:
        try:
            source = RandomWindows(parts[part], training.sequence_length, training.batch_size, seed=seed, stride=stride)
        except ValueError as error:
            raise ValueError(f"{part} part of {experiment.data or 'the embedded text'}: {error}") from error
        source.check(model.config.vocab_size)
        rows = None if sharding is None else sharding.rows(source.batch_size)
        return Batches(source, rows, to_batch=to_batch)

    validation = batches("validation", training.sequence_length, 0)
    held_out = [next(validation) for _ in range(training.evaluation_batches)]
    evaluate = Evaluator(model, causal.loss, held_out, sharding=sharding)
    optimizer = make_optimizer(experiment.optimizer, model.specs, training.steps)
    data = batches("training", 1, training.seed)

    tokenizer.encode(experiment.prompt)  # a prompt that cannot be read should not be found out after the training
    directory = resume or Path(processes.from_first(lambda: str(_start_directory(experiment, tokenizer))))
    say(f"{model.num_parameters:,} parameters · {len(tokens):,} tokens of {tokenizer.vocab_size} kinds · {directory}")
    schedule = learning_rate(experiment.optimizer, training.steps)
    trainer = training.trainer(model, optimizer, causal.loss, sharding=sharding, learning_rate=schedule)
    meta = {"experiment": config_lib.to_json(experiment), "jaxlm": jaxlm.__version__, "jax": jax.__version__}
    result = train(trainer, data, evaluate, training, Run(directory, meta, resume=resume is not None))
    if processes.is_first():
        if resume is not None:  # only now: a run that cannot go on as asked keeps the configuration that it had
            config_lib.write(experiment, directory / "config.json")
        draw_losses(directory / "metrics.jsonl", directory / "loss.png")
    if result.validation_loss is None:
        return result
    jaxlm.save_pretrained(directory / "model", model, result.params)
    params = jax.tree.map(processes.on_host, result.params)
    bits = bits_per_character(result.validation_loss, len(tokens), len(text))
    say(
        f"validation loss {result.validation_loss:.4f} nats per token = {bits:.3f} bits per character · "
        f"{result.tokens_per_second:,.0f} tokens/s · first loss after {result.seconds_to_first_loss:.1f} s"
    )
    if processes.is_first():
        passage = write_passage(experiment, model, jax.tree.map(jnp.asarray, params), tokenizer)
        (directory / "sample.txt").write_text(passage, encoding="utf-8")
    seconds = time.perf_counter() - begun
    say(f"\n{seconds:.0f} s in all · more: jaxlm generate {directory} --prompt {experiment.prompt!r}")
    return result


def write_passage(experiment: Experiment, model: Model, params: object, tokenizer: Tokenizer) -> str:
    """Generate a passage, shown while it is written."""
    passage = experiment.prompt
    sys.stdout.write(f"\n{experiment.prompt}")
    config = GenerationConfig(
        max_new_tokens=experiment.sample_tokens, sampling=Sampling(temperature=experiment.temperature)
    )
    key = jax.random.key(experiment.training.seed)
    for piece in stream_text(model, params, tokenizer, experiment.prompt, config, key=key):
        sys.stdout.write(piece)
        sys.stdout.flush()
        passage += piece
    sys.stdout.write("\n")
    return passage


def _check_unchanged(asked: Experiment, saved: Experiment) -> None:
    for name in ("output", "tokenizer", "validation_fraction"):
        if getattr(asked, name) != getattr(saved, name):
            was = getattr(saved, name)
            raise ValueError(
                f"{name}={getattr(asked, name)} cannot change when a run goes on (it is {was}): leave it out"
            )


def _start_directory(experiment: Experiment, tokenizer: Tokenizer) -> Path:
    directory = experiment.output or Path("runs") / f"shakespeare-{time.strftime('%Y%m%d-%H%M%S')}"
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: choose another --output, or go on with --resume {directory}")
    (directory / "model").mkdir(parents=True)
    tokenizer.save(directory / "model")
    config_lib.write(experiment, directory / "config.json")
    return directory


def say(text: str) -> None:
    """Print a line at once; of several processes, the first does."""
    if processes.is_first():
        print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (128 + signal when interrupted)."""
    experiment, resume = config_lib.parse(
        Experiment(), {"nanogpt": NANOGPT}, arguments, program="python -m experiments.shakespeare",
        description=(__doc__ or "").split("\n")[0],
    )  # fmt: skip

    def command() -> int:
        return {None: 0, "SIGINT": 130, "SIGTERM": 143}[run(experiment, resume).interrupted]

    return config_lib.exit_status(command, "experiments.shakespeare")


if __name__ == "__main__":
    host.keep_freed_memory()
    sys.exit(main())

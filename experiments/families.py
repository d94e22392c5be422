"""Every family learns Shakespeare for about a minute, each by its own objective: one table and one plot.

    python -m experiments.families                      all of them
    python -m experiments.families --family lstm t5     some

The text is the embedded corpus, character by character; its last tenth is for validation. What a family is asked
follows from what it is:

    causal             the next character                      gpt llama resnet_lm alexnet attention_rnn_lm
    causal, streamed   the same along contiguous columns, with the state carried from batch to batch
                                                               transformer_xl lstm gru
    masked             hidden characters, from both sides      bert roberta
    permutation        some characters, in a random order      xlnet
    span_corruption    the spans that are missing in a source  t5 attention_rnn
    classification     which of the thirteen plays a passage is from            resnet

Each loss is to be held against the entropy of what is predicted, that of a model that knows the frequencies only:
expected figures are in docs/families.md. Optimizers are the published ones (``jaxlm.training.recipes``) with learning
rates for small models and a minute; families whose published optimizer needs many more updates have AdamW.

A run directory holds ``table.md``, ``results.json``, ``losses.png``, and for each family its metrics and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from jaxlm import config as config_lib
from jaxlm import host
from jaxlm.command_line import Parser, exit_status, split_debug
from jaxlm.data import Batches, CharTokenizer, Columns, RandomWindows, Source, Window, shakespeare
from jaxlm.data.corpora import PLAYS
from jaxlm.models import FAMILIES, Model, get_model
from jaxlm.objectives import causal, classification, masked, objective, permutation, span_corruption
from jaxlm.objectives.batch import Batch
from jaxlm.training.checks import check_output
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.recipes import recipe
from jaxlm.training.report import curve, read_metrics

VOCABULARY = 128
"""Ids: the characters of the text from 0 on, and at the end of the vocabulary those of :data:`MASK` and so on."""
MASK, CLS, SEP, START, END, FIRST_SENTINEL = 127, 126, 125, 124, 123, 122
SENTINELS = 30
VALIDATION = 0.1
PART = 16
"""Places of each of the two parts of a row of XLNet's."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one family is trained."""

    variant: str
    """Family or variant that the model starts from."""
    model: dict[str, Any]
    """Config fields that differ."""
    objective: str
    """What it learns."""
    steps: int
    """Updates: about a minute on two CPU cores."""
    batch_size: int = 16
    """Rows of a batch."""
    length: int = 96
    """Characters of a row."""
    stream: int | None = None
    """Tokens remembered along contiguous columns; None draws windows at random."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the optimizer that differ from the published ones."""

    def build(self) -> Model:
        """The model, without dropout: nothing is seen often enough to be learnt by heart."""
        names = [field.name for field in dataclasses.fields(get_model(self.variant).config)]
        rates = {name: 0.0 for name in names if name.endswith("dropout")}
        return get_model(self.variant, **{"vocab_size": VOCABULARY, **rates, **self.model})

    def optimizer(self, steps: int) -> OptimizerConfig:
        """The published optimizer with the changes."""
        optimizer = dataclasses.replace(recipe(get_model(self.variant).family, steps), **self.changes)
        return dataclasses.replace(optimizer, warmup_steps=min(optimizer.warmup_steps, steps - 1))


WIDE = {"num_layers": 4, "num_heads": 4, "embed_dim": 128}
# With few places and larger initial weights, a model that sees both ways finds out in a minute that neighbours matter.
SHALLOW = {"num_layers": 2, "num_heads": 4, "embed_dim": 128, "init_stddev": 0.08}
RECURRENT = {"num_layers": 2, "embed_dim": 128, "hidden_dim": 256, "init_bound": 0.5}
# Wider models and longer trainings have lower learning rates; a higher one needs a longer warm-up.
SMALL = {"learning_rate": 3e-3, "warmup_steps": 50}


def adamw(learning_rate: float) -> dict[str, Any]:
    """Changes that make the optimizer AdamW: a minute is too short for the published one."""
    config = OptimizerConfig(learning_rate=learning_rate, warmup_steps=50)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


RECIPES = {
    "gpt": Recipe("gpt2", {**WIDE, "max_positions": 96}, "causal", 900, changes=SMALL),
    "llama": Recipe(
        "llama", {**WIDE, "num_kv_heads": 2, "mlp_dim": 352, "max_positions": 96}, "causal", 900,
        changes=SMALL,
    ),
    "bert": Recipe("bert", {**SHALLOW, "max_positions": 32}, "masked", 1300, batch_size=48, length=32, changes=SMALL),
    "roberta": Recipe(
        "roberta", {**SHALLOW, "max_positions": 32}, "masked", 1300, batch_size=48, length=32, changes=SMALL
    ),
    "t5": Recipe(
        "t5",
        {**WIDE, "num_layers": 2, "head_dim": 32, "mlp_dim": 512, "decoder_start_id": START},
        "span_corruption", 1200,
    ),
    "xlnet": Recipe(
        "xlnet", {**SHALLOW, "mlp_dim": 512}, "permutation", 1000, batch_size=48, length=2 * PART - 3, changes=SMALL
    ),
    "transformer_xl": Recipe(
        "transformer-xl-base",
        {
            **WIDE, "head_dim": 32, "token_dim": 128, "mlp_dim": 512, "cutoffs": (), "memory_length": 64,
            "embedding_divisor": 1,
        },
        "causal", 850, length=64, stream=64, changes=SMALL,
    ),
    "lstm": Recipe("lstm", RECURRENT, "causal", 1500, stream=1, changes=adamw(1e-2)),
    "gru": Recipe("gru", RECURRENT, "causal", 1500, stream=1, changes=adamw(1e-2)),
    "attention_rnn": Recipe(
        "attention_rnn",
        {
            "source_vocab_size": VOCABULARY, "embed_dim": 96, "hidden_dim": 192, "output_dim": 96, "init_bound": 0.3,
        },
        "span_corruption", 900, changes=adamw(5e-3),
    ),
    "attention_rnn_lm": Recipe(
        "attention_rnn_lm",
        {"embed_dim": 128, "hidden_dim": 256, "attention_dim": 128, "init_bound": 0.3},
        "causal", 700, changes={**SMALL, "learning_rate": 5e-3, "schedule": "cosine"},
    ),
    "resnet": Recipe(
        "vdcnn-9",
        {"num_labels": len(PLAYS), "max_positions": 256, "channels": 32, "fc_dim": 128, "shortcut": True},
        "classification", 1500, length=256, changes=adamw(1e-3),
    ),
    "resnet_lm": Recipe(
        "resnet_lm", {"embed_dim": 64, "blocks": ((128, 4, 1),) * 5}, "causal", 1400, changes=adamw(3e-3),
    ),
    "alexnet": Recipe(
        "alexnet-lm-tiny",
        {"embed_dim": 64, "channels": 128, "kernels": (7, 7, 3, 3), "pools": (3, 1, 1, 1), "fc_dim": 256,
         "init_stddev": 0.05},
        "causal", 2600, changes=adamw(1e-3),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus as ids: one text for training and one for validation, and the same as passages with labels."""

    training: np.ndarray
    validation: np.ndarray
    plays: tuple[np.ndarray, ...]

    @classmethod
    def load(cls) -> Data:
        """Read the embedded plays."""
        text = shakespeare()
        tokens = CharTokenizer.from_text(text).encode(text)
        starts = [text.index(f"{title}\n\n") for title in PLAYS]
        split = int(len(tokens) * (1 - VALIDATION))
        return cls(tokens[:split], tokens[split:], tuple(np.split(tokens, starts[1:])))

    def passages(self, part: str, length: int, stride: int) -> np.ndarray:
        """Passages of ``length`` characters from the first nine tenths of each play (or the last tenth), each with the
        number of its play after it: windows of ``length + 1`` in one row of ids."""
        rows = []
        for number, play in enumerate(self.plays):
            split = int(len(play) * (1 - VALIDATION))
            text = play[:split] if part == "training" else play[split:]
            for start in range(0, len(text) - length + 1, stride):
                rows.append(np.append(text[start : start + length], number))
        return np.concatenate(rows).astype(np.int32)


def source(data: Data, recipe: Recipe, part: str, seed: int) -> Source:
    """The windows of a part of the data as a recipe wants them."""
    length, rows = recipe.length, recipe.batch_size
    if recipe.objective == "classification":
        stride = length // 4 if part == "training" else length
        return RandomWindows(data.passages(part, length, stride), length, rows, seed=seed, stride=length + 1)
    text = getattr(data, part)
    if recipe.stream is not None:
        return Columns(text, length, rows)
    return RandomWindows(text, length, rows, seed=seed, stride=1 if part == "training" else length)


def to_batch(recipe: Recipe) -> Callable[[Window], Batch]:
    """What the objective makes of a window. Random choices follow from the window itself, so that a resumed run and
    every evaluation see the same."""

    def rng(window: Window) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(np.ascontiguousarray(window.tokens).tobytes()))

    def masked_batch(window: Window) -> Batch:
        return masked.batch(window.tokens[:, :-1], rng(window), mask_id=MASK, vocab_size=VOCABULARY)

    def permuted_batch(window: Window) -> Batch:
        return permutation.batch(
            window.tokens[:, :-1], rng(window), reuse_length=PART, permutation_length=PART, num_predict=PART // 3,
            cls_id=CLS, sep_id=SEP,
        )  # fmt: skip

    def corrupted_batch(window: Window) -> Batch:
        return span_corruption.batch(
            window.tokens, rng(window), first_sentinel=FIRST_SENTINEL, end_id=END, start_id=START, sentinels=SENTINELS
        )

    def labelled_batch(window: Window) -> Batch:
        return classification.batch(window.tokens[:, :-1], window.tokens[:, -1], num_labels=len(PLAYS))

    return {
        "causal": lambda window: causal.batch(window.tokens, reset=window.reset),
        "masked": masked_batch,
        "permutation": permuted_batch,
        "span_corruption": corrupted_batch,
        "classification": labelled_batch,
    }[recipe.objective]


def entropy(batches: Iterable[Batch]) -> float:
    """Entropy in nats of the targets that count: the loss of knowing their frequencies and nothing else."""
    counts: np.ndarray = np.zeros(0)
    for batch in batches:
        counted = np.bincount(np.ravel(batch.targets), np.ravel(batch.weights), minlength=len(counts))
        counts = counted + np.pad(counts, (0, len(counted) - len(counts)))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


# ------------------------------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one family."""

    family: str
    variant: str
    objective: str
    optimizer: str
    parameters: int
    steps: int
    seconds: float
    tokens_per_second: float
    loss: float
    entropy: float


def train_family(name: str, data: Data, directory: Path, steps: int | None = None) -> Row:
    """Train one family into ``directory``. ``steps`` replaces those of the recipe."""
    recipe = RECIPES[name]
    model, make = recipe.build(), to_batch(recipe)
    training = TrainingConfig(
        steps=steps or recipe.steps, batch_size=recipe.batch_size, sequence_length=recipe.length,
        evaluate_every=200, checkpoint_every=10_000, log_every=20,
    )  # fmt: skip
    config = recipe.optimizer(training.steps)
    optimizer = make_optimizer(config, model.specs, training.steps)
    validation = Batches(source(data, recipe, "validation", 0))
    held_out = [make(next(validation)) for _ in range(training.evaluation_batches)]
    loss = objective(recipe.objective).loss
    stream = None if recipe.stream is None else (recipe.batch_size, recipe.stream)
    begun = time.perf_counter()
    meta = {"family": name, "config": config_lib.to_json(model.config), "jaxlm": jaxlm.__version__}
    result = train(
        training.trainer(model, optimizer, loss, carry=stream),
        Batches(source(data, recipe, "training", training.seed), to_batch=make),
        Evaluator(model, loss, held_out, carry=stream), training, Run(directory, meta),
    )  # fmt: skip
    if result.validation_loss is None:
        raise KeyboardInterrupt
    jaxlm.save_pretrained(directory / "model", model, result.params)
    return Row(
        name, recipe.variant, recipe.objective + (", streamed" if stream else ""), config.name, model.num_parameters,
        training.steps, time.perf_counter() - begun, result.tokens_per_second, result.validation_loss,
        entropy(held_out),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The results in Markdown; ``share`` is loss / entropy."""
    lines = [
        "| family | objective | optimizer | parameters | steps | seconds | targets/s | loss | entropy | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.objective} | {row.optimizer} | {row.parameters:,} | {row.steps} | {row.seconds:.0f} | "
        f"{row.tokens_per_second:,.0f} | {row.loss:.3f} | {row.entropy:.3f} | {row.loss / row.entropy:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], directory: Path) -> None:
    """Validation loss over entropy, step by step, of every family (needs matplotlib, which is imported here)."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        steps, losses = curve(read_metrics(directory / row.family / "metrics.jsonl"), "loss")
        smooth = np.convolve(np.pad(losses, (2, 2), mode="edge"), np.full(5, 0.2), mode="valid") / row.entropy
        axes.plot(
            np.asarray(steps) / row.steps, smooth, color=colormaps["tab20"](number % 20),
            label=f"{row.family} ({row.loss / row.entropy:.2f})",
        )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0.0, 1.6)
    axes.set_xlabel("share of the training (about a minute each)")
    axes.set_ylabel("training loss / entropy of the targets")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, title="family (validation loss / entropy)")
    figure.savefig(directory / "losses.png", dpi=130)


def run(families: list[str], directory: Path, steps: int | None = None) -> list[Row]:
    """Train the families one after the other; the table is written anew after each."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: choose another --output")
    check_output(directory, resume=False)
    data, rows = Data.load(), []
    for name in families:
        print(f"\n{name}: {RECIPES[name].objective}, {RECIPES[name].build().num_parameters:,} parameters", flush=True)
        rows.append(train_family(name, data, directory / name, steps))
        (directory / "table.md").write_text(table(rows), encoding="utf-8")
        results = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
        (directory / "results.json").write_text(results + "\n", encoding="utf-8")
    draw(rows, directory)
    print(f"\n{table(rows)}\n{directory / 'table.md'} · {directory / 'losses.png'}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments, debug = split_debug(arguments)
    parser = Parser(
        prog="python -m experiments.families", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which (default: all)")
    parser.add_argument("--steps", type=int, help="updates of each, instead of about a minute's")
    parser.add_argument("--output", type=Path, help="run directory (default: runs/families-<time>)")
    parsed = parser.parse_args(arguments)
    directory = parsed.output or Path("runs") / f"families-{time.strftime('%Y%m%d-%H%M%S')}"
    if parsed.steps is not None and parsed.steps < 2:
        parser.error(f"--steps {parsed.steps} must be at least 2")

    def command() -> int:
        run(parsed.family, directory, parsed.steps)
        return 0

    return exit_status(command, "experiments.families", debug=debug)


if __name__ == "__main__":
    host.keep_freed_memory()
    sys.exit(main())

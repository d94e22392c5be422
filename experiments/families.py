"""Train each family for about a minute on Shakespeare with its own objective, and write one table and one plot.

    python -m experiments.families                      all families
    python -m experiments.families --family lstm t5     some families

The tokens are the characters of the included corpus. Its last 10 % (for classification: the last 10 % of each play) is
for validation. Objectives of the families:

    causal             the next character                      gpt llama resnet_lm alexnet attention_rnn_lm
    causal, streamed   the next character; each row continues  transformer_xl lstm gru mamba2 griffin
                       the same row of the previous batch      gated_deltanet xlstm rwkv7
    masked             masked characters, bidirectional        bert roberta
    permutation        some characters, in a random order      xlnet
    span_corruption    the spans removed from the source       t5 attention_rnn
    classification     from which of 13 plays a passage comes  resnet

Compare each loss with the entropy of the targets. The entropy is the loss of a model that knows only the frequencies of
the targets. docs/families/index.md has the results.

Each family uses its published optimizer (``jaxlm.training.recipes``), or AdamW if the published optimizer needs many
more updates. For a small model and a minute of training, all families except t5 have another learning rate and warm-up.
A family that is not in the table above, such as a family of another package, is trained with AdamW. Its model is the
first tiny variant for which the table has an objective, or another variant if there is no tiny one.

A run directory has ``table.md``, ``results.json`` and ``losses.png``, and for each family a directory with
``metrics.jsonl`` and the trained model (``model/``).
"""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from experiments.variants import default_variant
from jaxlm import config as config_lib
from jaxlm import host
from jaxlm.command_line import Parser, end_process, exit_status, split_debug
from jaxlm.data import Batches, CharTokenizer, ContiguousStreams, RandomWindows, Source, TokenBatch, shakespeare
from jaxlm.data.corpora import PLAYS
from jaxlm.models import FAMILIES, Model, family_names, get_model
from jaxlm.objectives import classification, masked, objective, permutation, span_corruption
from jaxlm.objectives.batch import Batch
from jaxlm.tasks import text_generation
from jaxlm.training.checks import check_output
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.experiment import EXIT_STATUS
from jaxlm.training.loop import Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.recipes import recipe
from jaxlm.training.report import metric_curve, read_metrics

VOCABULARY = 128
"""Vocabulary size. The first ids are the characters of the text. The last ids are special tokens and sentinels."""
MASK, CLS, SEP, START, END, FIRST_SENTINEL = 127, 126, 125, 124, 123, 122
SENTINELS = 30
"""Number of sentinels. Their ids descend from :data:`FIRST_SENTINEL`."""
VALIDATION = 0.1
"""Fraction of the text (for classification: of each play) for validation."""
XLNET_PART_LENGTH = 16
"""Number of positions in each of the two parts of an XLNet row. The positions of each part are permuted separately."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Model, objective, data and optimizer of one family."""

    variant: str
    """Name of the family or variant for ``get_model``."""
    model: dict[str, Any]
    """Changes to config fields of the variant."""
    objective: str
    """Name of the training objective."""
    steps: int
    """Number of updates, which take about a minute on two CPU cores (three minutes for rwkv7)."""
    batch_size: int = 16
    """Rows per batch."""
    length: int = 96
    """Characters per row."""
    state_length: int | None = None
    """The ``length`` argument of ``Model.state_specs`` for the model state that training carries from batch to batch.
    None: batches of random windows, without a state."""
    optimizer_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to fields of the published ``OptimizerConfig``."""

    def build(self) -> Model:
        """The model. Its dropout rates are 0, because the training is too short for overfitting."""
        dropout = get_model(self.variant).zero_dropout
        return get_model(self.variant, **{"vocab_size": VOCABULARY, **dropout, **self.model})

    def optimizer(self, steps: int) -> OptimizerConfig:
        """The published optimizer of the family with ``optimizer_changes``, for ``steps`` updates.

        The warm-up has at most ``steps - 1`` updates.
        """
        optimizer = dataclasses.replace(recipe(get_model(self.variant).family), **self.optimizer_changes)
        return dataclasses.replace(optimizer, warmup_steps=min(optimizer.warmup_steps, steps - 1))


SMALL_TRANSFORMER = {"num_layers": 4, "num_heads": 4, "embed_dim": 128}
# With large initial weights and short rows (at most 32 characters), a bidirectional model learns within a minute to
# attend to the characters next to a masked character.
SHALLOW = {"num_layers": 2, "num_heads": 4, "embed_dim": 128, "init_stddev": 0.08}
RECURRENT = {"num_layers": 2, "embed_dim": 128, "hidden_dim": 256, "init_bound": 0.5}
# Learning rate and warm-up of small models. A wider model or a longer training needs a lower learning rate. A higher
# learning rate needs a longer warm-up.
SMALL = {"learning_rate": 3e-3, "warmup_steps": 50}


def adamw(learning_rate: float) -> dict[str, Any]:
    """Values of all fields of ``OptimizerConfig`` for AdamW, for ``Recipe.optimizer_changes``.

    They replace a published optimizer that needs more than a minute of training.
    """
    config = OptimizerConfig(learning_rate=learning_rate, warmup_steps=50)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


RECIPES = {
    "gpt": Recipe("gpt2", {**SMALL_TRANSFORMER, "max_positions": 96}, "causal", 900, optimizer_changes=SMALL),
    "llama": Recipe(
        "llama", {**SMALL_TRANSFORMER, "num_kv_heads": 2, "mlp_dim": 352, "max_positions": 96}, "causal", 900,
        optimizer_changes=SMALL,
    ),
    "bert": Recipe(
        "bert", {**SHALLOW, "max_positions": 32}, "masked", 1300, batch_size=48, length=32, optimizer_changes=SMALL
    ),
    "roberta": Recipe(
        "roberta", {**SHALLOW, "max_positions": 32}, "masked", 1300, batch_size=48, length=32, optimizer_changes=SMALL
    ),
    "t5": Recipe(
        "t5",
        {**SMALL_TRANSFORMER, "num_layers": 2, "head_dim": 32, "mlp_dim": 512, "decoder_start_id": START},
        "span_corruption", 1200,
    ),
    "xlnet": Recipe(
        "xlnet", {**SHALLOW, "mlp_dim": 512}, "permutation", 1000, batch_size=48, length=2 * XLNET_PART_LENGTH - 3,
        optimizer_changes=SMALL,
    ),
    "transformer_xl": Recipe(
        "transformer-xl-base",
        {
            **SMALL_TRANSFORMER, "head_dim": 32, "token_dim": 128, "mlp_dim": 512, "cutoffs": (), "memory_length": 64,
            "embedding_divisor": 1,
        },
        "causal", 850, length=64, state_length=64, optimizer_changes=SMALL,
    ),
    "lstm": Recipe("lstm", RECURRENT, "causal", 1500, state_length=1, optimizer_changes=adamw(1e-2)),
    "gru": Recipe("gru", RECURRENT, "causal", 1500, state_length=1, optimizer_changes=adamw(1e-2)),
    "attention_rnn": Recipe(
        "attention_rnn",
        {
            "source_vocab_size": VOCABULARY, "embed_dim": 96, "hidden_dim": 192, "output_dim": 96, "init_bound": 0.3,
        },
        "span_corruption", 900, optimizer_changes=adamw(5e-3),
    ),
    "attention_rnn_lm": Recipe(
        "attention_rnn_lm",
        {"embed_dim": 128, "hidden_dim": 256, "attention_dim": 128, "init_bound": 0.3},
        "causal", 700, optimizer_changes={**SMALL, "learning_rate": 5e-3, "schedule": "cosine"},
    ),
    "resnet": Recipe(
        "vdcnn-9",
        {"num_labels": len(PLAYS), "max_positions": 256, "channels": 32, "fc_dim": 128, "shortcut": True},
        "classification", 1500, length=256, optimizer_changes=adamw(3e-4),
    ),
    "resnet_lm": Recipe(
        "resnet_lm", {"embed_dim": 64, "blocks": ((128, 4, 1),) * 5}, "causal", 1400, optimizer_changes=adamw(3e-3),
    ),
    "alexnet": Recipe(
        "alexnet-lm-tiny",
        {"embed_dim": 64, "channels": 128, "kernels": (7, 7, 3, 3), "pools": (3, 1, 1, 1), "fc_dim": 256,
         "init_stddev": 0.05},
        "causal", 2600, optimizer_changes=adamw(1e-3),
    ),
    "mamba2": Recipe(
        "mamba2", {"num_layers": 4, "embed_dim": 128, "head_dim": 32, "state_size": 64}, "causal", 600, state_length=1,
        optimizer_changes=SMALL,
    ),
    "griffin": Recipe(
        "griffin",
        {**SMALL_TRANSFORMER, "mlp_dim": 384, "window": 64},
        "causal", 600, state_length=1, optimizer_changes=SMALL,
    ),
    "gated_deltanet": Recipe(
        "gated_deltanet",
        {"num_layers": 4, "embed_dim": 128, "mlp_dim": 352, "pattern": ("delta_rule",), "max_positions": None,
         "delta_key_heads": 4, "delta_value_heads": 4, "delta_key_dim": 32, "delta_value_dim": 32},
        "causal", 600, state_length=1, optimizer_changes=SMALL,
    ),
    "xlstm": Recipe(
        "xlstm",
        {"num_layers": 4, "embed_dim": 128, "mlp_dim": 352, "num_heads": 4, "key_dim": 64, "value_dim": 128},
        "causal", 600, state_length=1, optimizer_changes=SMALL,
    ),
    "rwkv7": Recipe(
        "rwkv7",
        {"num_layers": 4, "embed_dim": 128, "mlp_dim": 384, "head_dim": 16, "decay_rank": 16, "rate_rank": 16,
         "value_rank": 16, "gate_rank": 32},
        "causal", 600, state_length=1, optimizer_changes=SMALL,
    ),
}  # fmt: skip


LENGTHS = {"causal": 96, "masked": 32, "permutation": 2 * XLNET_PART_LENGTH - 3, "span_corruption": 96,
           "classification": 256}  # fmt: skip
"""Characters per row of each objective, in recipes of families that are not in :data:`RECIPES`."""


def objective_of(model: Model) -> str:
    """The name of the training objective: span_corruption for an encoder-decoder, otherwise the task of the model."""
    return "span_corruption" if model.reads_source else model.task


def recipe_of(name: str) -> Recipe:
    """The recipe of a family.

    A family that is not in ``RECIPES`` trains a small variant (``default_variant``) with AdamW and the objective of the
    variant's task.

    Raises:
        ValueError: the family is not in ``RECIPES``, and either it has no variant for an objective of :data:`LENGTHS`,
            or the model must read a text from its first token.
    """
    if name in RECIPES:
        return RECIPES[name]
    variant = default_variant(name, lambda model: objective_of(model) in LENGTHS)
    if variant is None:
        raise ValueError(
            f"family {name!r} has no variant that experiments.families can train: add a variant to its VARIANTS with "
            "one of the tasks causal, masked, permutation and classification, or an encoder-decoder"
        )
    model = get_model(variant)
    if model.needs_whole_text:
        raise ValueError(
            f"family {name!r} must read a text from its first token, but experiments.families trains on windows of a "
            "long text: choose another family"
        )
    objective_name = objective_of(model)
    default_length = LENGTHS[objective_name]
    changes = {"num_labels": len(PLAYS)} if objective_name == "classification" else {"decoder_start_id": START}
    return Recipe(
        variant, {field: value for field, value in changes.items() if hasattr(model.config, field)}, objective_name,
        steps=1000, length=min(default_length, model.max_positions or default_length),
        state_length=model.carried_state_length, optimizer_changes=adamw(3e-3),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """The ids of the training text, of the validation text, and of each play (for classification)."""

    training: np.ndarray
    validation: np.ndarray
    plays: tuple[np.ndarray, ...]

    @classmethod
    def load(cls) -> Data:
        """The data of the included plays."""
        text = shakespeare()
        tokens = CharTokenizer.from_text(text).encode(text)
        starts = [text.index(f"{title}\n\n") for title in PLAYS]
        split = int(len(tokens) * (1 - VALIDATION))
        return cls(tokens[:split], tokens[split:], tuple(np.split(tokens, starts[1:])))

    def passages(self, part: str, length: int, stride: int) -> np.ndarray:
        """Passages of ``length`` characters, each followed by the index of its play, concatenated into one array.

        Args:
            part: "training" for passages from the first 90 % of each play, "validation" for the last 10 %.
            length: number of characters of a passage.
            stride: number of characters from the start of a passage to the start of the next passage.
        """
        rows = []
        for number, play in enumerate(self.plays):
            split = int(len(play) * (1 - VALIDATION))
            text = play[:split] if part == "training" else play[split:]
            for start in range(0, len(text) - length + 1, stride):
                rows.append(np.append(text[start : start + length], number))
        return np.concatenate(rows).astype(np.int32)


def source(data: Data, recipe: Recipe, part: str, seed: int) -> Source:
    """The token batches of a split for the objective of a recipe.

    Args:
        part: "training" or "validation".
        seed: seed of the order of random windows.
    """
    length, rows = recipe.length, recipe.batch_size
    if recipe.objective == "classification":
        stride = length // 4 if part == "training" else length
        return RandomWindows(data.passages(part, length, stride), length, rows, seed=seed, stride=length + 1)
    text = getattr(data, part)
    if recipe.state_length is not None:
        return ContiguousStreams(text, length, rows)
    return RandomWindows(text, length, rows, seed=seed, stride=1 if part == "training" else length)


def to_batch(recipe: Recipe) -> Callable[[TokenBatch], Batch]:
    """A function that converts a token batch to a batch of the recipe's objective.

    The seed of its random choices is a checksum of the tokens. So equal tokens always give equal batches.
    """

    def rng(token_batch: TokenBatch) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(np.ascontiguousarray(token_batch.tokens).tobytes()))

    masking = masked.MaskingConfig(mask_id=MASK, vocab_size=VOCABULARY)
    permuting = permutation.PermutationConfig(
        reuse_length=XLNET_PART_LENGTH, permutation_length=XLNET_PART_LENGTH, num_predict=XLNET_PART_LENGTH // 3,
        cls_id=CLS, sep_id=SEP,
    )  # fmt: skip

    def masked_batch(token_batch: TokenBatch) -> Batch:
        return masked.batch(token_batch.tokens[:, :-1], rng(token_batch), masking)

    def permuted_batch(token_batch: TokenBatch) -> Batch:
        return permutation.batch(token_batch.tokens[:, :-1], rng(token_batch), permuting)

    def corrupted_batch(token_batch: TokenBatch) -> Batch:
        return span_corruption.batch(
            token_batch.tokens,
            rng(token_batch),
            first_sentinel=FIRST_SENTINEL,
            end_id=END,
            start_id=START,
            num_sentinels=SENTINELS,
        )

    def labelled_batch(token_batch: TokenBatch) -> Batch:
        return classification.batch(token_batch.tokens[:, :-1], token_batch.tokens[:, -1], num_labels=len(PLAYS))

    return {
        "causal": text_generation.to_batch,
        "masked": masked_batch,
        "permutation": permuted_batch,
        "span_corruption": corrupted_batch,
        "classification": labelled_batch,
    }[recipe.objective]


def entropy(batches: Iterable[Batch]) -> float:
    """The entropy of the weighted targets in nats: the loss of a model that knows only the target frequencies."""
    counts_of_batches = [
        np.bincount(np.ravel(batch.targets), np.ravel(batch.weights), minlength=VOCABULARY) for batch in batches
    ]
    counts = np.sum(counts_of_batches, axis=0)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


# ------------------------------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one family: a row of the table.

    ``parameters`` and ``steps`` are numbers of parameters and updates. ``seconds`` is the duration of training,
    evaluations and export. ``loss`` is the validation loss after the last update, in nats per target. ``entropy`` is
    the entropy of the validation targets, in nats.
    """

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


def train_family(name: str, data: Data, directory: Path, steps: int | None = None) -> tuple[Row, str | None]:
    """Train one family, write its files to ``directory``, and return its result and a signal.

    The signal is the name of a signal that arrived after the last step (``jaxlm.training.loop.Result.signal``), or
    None.

    Args:
        steps: number of updates. None: the ``steps`` of the recipe.

    Raises:
        KeyboardInterrupt: SIGINT ended the training.
        SystemExit: another signal ended the training.
    """
    recipe = recipe_of(name)
    model, make_batch = recipe.build(), to_batch(recipe)
    training = TrainingConfig(
        steps or recipe.steps, recipe.batch_size, evaluate_every=200, checkpoint_every=None, log_every=20
    )
    config = recipe.optimizer(training.steps)
    optimizer = make_optimizer(config, model.specs, training.steps)
    validation = Batches(source(data, recipe, "validation", 0))
    held_out = [make_batch(next(validation)) for _ in range(20)]
    loss = objective(recipe.objective).loss
    carry_size = None if recipe.state_length is None else (recipe.batch_size, recipe.state_length)
    start_time = time.perf_counter()
    meta = {"family": name, "config": config_lib.to_json(model.config), "jaxlm": jaxlm.__version__}
    result = train(
        training.trainer(model, optimizer, loss, carry_size=carry_size),
        Batches(source(data, recipe, "training", training.seed), to_batch=make_batch),
        Evaluator(model, loss, held_out, carry_size=carry_size), training, Run(directory, meta),
    )  # fmt: skip
    if result.validation_loss is None:
        raise _end_of_run(result.interrupted)
    jaxlm.save_pretrained(directory / "model", model, result.params)
    row = Row(
        name, recipe.variant, recipe.objective + (", streamed" if carry_size else ""), config.name,
        model.num_parameters, training.steps, time.perf_counter() - start_time, result.tokens_per_second,
        result.validation_loss, entropy(held_out),
    )  # fmt: skip
    return row, result.signal


def _end_of_run(signal: str | None) -> BaseException:
    """The exception that ends the program after the signal with this name."""
    return KeyboardInterrupt() if signal == "SIGINT" else SystemExit(EXIT_STATUS[signal])


def table(rows: list[Row]) -> str:
    """The results as a Markdown table. The column ``share`` is loss / entropy."""
    lines = [
        "| family | objective | optimizer | parameters | steps | seconds | tokens/s | loss | entropy | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.objective} | {row.optimizer} | {row.parameters:,} | {row.steps} | {row.seconds:.0f} | "
        f"{row.tokens_per_second:,.0f} | {row.loss:.3f} | {row.entropy:.3f} | {row.loss / row.entropy:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], directory: Path) -> None:
    """Plot the training loss of each family to ``losses.png``.

    A curve is a moving average of five logged losses, divided by the entropy of the validation targets.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        steps, losses = metric_curve(read_metrics(directory / row.family / "metrics.jsonl"), "loss")
        smooth = np.convolve(np.pad(losses, (2, 2), mode="edge"), np.full(5, 0.2), mode="valid") / row.entropy
        axes.plot(
            np.asarray(steps) / row.steps, smooth, color=colormaps["tab20"](number % 20),
            label=f"{row.family} ({row.loss / row.entropy:.2f})",
        )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0.0, 1.6)
    axes.set_xlabel("fraction of the training (about a minute per family)")
    axes.set_ylabel("training loss / entropy of the targets")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, title="family (validation loss / entropy)")
    figure.savefig(directory / "losses.png", dpi=130)


def run(families: list[str], directory: Path, steps: int | None = None) -> list[Row]:
    """Train the families one after the other and return their results. The table is written again after each family.

    If a signal arrives after the last step of a family, the result of this family, the table and the plot are still
    written. The next family does not start.

    Args:
        steps: number of updates of each family. None: the ``steps`` of its recipe.

    Raises:
        FileExistsError: ``directory`` is not empty.
        KeyboardInterrupt: SIGINT ended the run.
        SystemExit: another signal ended the run.
        ValueError: a family has no recipe.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: choose another --output")
    check_output(directory, resume=False)
    recipes = {name: recipe_of(name) for name in families}
    data, rows, signal = Data.load(), [], None
    for name, family_recipe in recipes.items():
        print(f"\n{name}: {family_recipe.objective}, {family_recipe.build().num_parameters:,} parameters", flush=True)
        row, signal = train_family(name, data, directory / name, steps)
        rows.append(row)
        (directory / "table.md").write_text(table(rows), encoding="utf-8")
        results = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
        (directory / "results.json").write_text(results + "\n", encoding="utf-8")
        if signal is not None:
            break
    draw(rows, directory)
    print(f"\n{table(rows)}\n{directory / 'table.md'} · {directory / 'losses.png'}")
    if signal is not None:
        raise _end_of_run(signal)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments, debug = split_debug(arguments)
    parser = Parser(
        prog="python -m experiments.families", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--family", nargs="+", choices=family_names(), default=list(FAMILIES), help="families (default: those of jaxlm)"
    )
    parser.add_argument("--steps", type=int, help="updates per family (default: about a minute of training)")
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
    end_process(main())

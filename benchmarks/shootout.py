"""Loss and speed of the causal families of jaxlm, at equal parameter counts and at equal FLOPs.

    python -m benchmarks.shootout                            a million parameters, 400,000 characters per family
    python -m benchmarks.shootout --families gpt,lstm --tokens 2000000
    python -m benchmarks.shootout --quick                    a short test that the benchmark works

The text is the included Shakespeare plays. The depth of each family is fixed, and the command chooses its width. At
equal parameters, the number of parameters is as near as possible to ``--parameters``. At equal FLOPs, the training
FLOPs per character are as near as possible to those of the GPT with ``--parameters`` parameters. The training FLOPs are
three times the FLOPs of the dots and convolutions in the jaxpr of the loss without remat.

All families are trained on the same number of characters. Families that carry a state between batches read contiguous
streams, and the others read random windows. The validation loss is measured on 16 batches from the last 10 % of the
text. Decoding generates one character at a time in one row, after contexts of several lengths. Its state has capacity
for the longest context and the generated characters.

The output directory has ``table.md``, ``results.json`` and ``shootout.png``. docs/families/index.md explains the
columns of the table. One process measures the families one after the other, while the load of the machine may change.
So the times are accurate only to an order of magnitude. The losses do not depend on the load.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import UserError

BASES = ("parameters", "flops")
"""The quantities that can be made equal: number of parameters, training FLOPs per character."""


@dataclasses.dataclass(frozen=True)
class Shootout:
    """Train and decode with the causal families, and compare them."""

    families: str = ""
    """Families, separated by commas; empty: all families of this benchmark."""
    equal: str = "parameters,flops"
    """Quantities to make equal, separated by commas: parameters, flops (training FLOPs per character)."""
    parameters: int = 1_000_000
    """Approximate number of parameters of each model; at equal FLOPs, of the GPT whose FLOPs the other models match."""
    tokens: int = 400_000
    """Number of training characters of each model, rounded down to complete batches."""
    batch: int = 16
    """Rows per batch."""
    length: int = 128
    """Characters per row."""
    contexts: str = "64,512"
    """Context lengths for decoding, in characters; one or more numbers, separated by commas."""
    output: Path | None = None
    """Directory to create; None: runs/shootout-<time>."""
    quick: bool = False
    """Use tiny models and budgets, to test that the benchmark works; the results have no meaning."""


# For each family, a function from the width factor (an integer from 1 to 64) to the config fields that depend on this
# factor. The recipes in ``experiments.families`` have the other fields.
_FIELDS_BY_WIDTH: dict[str, Callable[[int], dict[str, Any]]] = {
    "gpt": lambda u: {"embed_dim": 16 * u},
    "llama": lambda u: {"embed_dim": 16 * u, "mlp_dim": 44 * u},
    "transformer_xl": lambda u: {"embed_dim": 16 * u, "token_dim": 16 * u, "head_dim": 4 * u, "mlp_dim": 64 * u},
    "lstm": lambda u: {"embed_dim": 16 * u, "hidden_dim": 32 * u},
    "gru": lambda u: {"embed_dim": 16 * u, "hidden_dim": 32 * u},
    "attention_rnn_lm": lambda u: {"embed_dim": 16 * u, "hidden_dim": 32 * u, "attention_dim": 16 * u},
    "resnet_lm": lambda u: {"embed_dim": 8 * u, "blocks": ((16 * u, 4, 1),) * 5},
    "alexnet": lambda u: {"embed_dim": 8 * u, "channels": 16 * u, "fc_dim": 32 * u},
    "mamba2": lambda u: {"embed_dim": 16 * u},
    "griffin": lambda u: {"embed_dim": 16 * u, "mlp_dim": 48 * u},
    "gated_deltanet": lambda u: {
        "embed_dim": 16 * u, "mlp_dim": 44 * u, "delta_key_dim": 4 * u, "delta_value_dim": 4 * u,
    },
    "xlstm": lambda u: {"embed_dim": 16 * u, "mlp_dim": 44 * u, "key_dim": 8 * u, "value_dim": 16 * u},
    "rwkv7": lambda u: {"embed_dim": 16 * u, "mlp_dim": 48 * u},
}  # fmt: skip
_MAX_WIDTH_FACTOR = 64


def sized(
    build: Callable[[int], Any],
    measure: Callable[[Any], float],
    target: float,
    *,
    family: str,
    unit: str,
    parameters: int,
) -> Any:
    """The model whose width factor, from 1 to 64, brings ``measure(model) / target`` nearest to 1.

    Args:
        build: a function from the width factor to the model.
        measure: a function that returns the size of a model, which must increase with the width factor.
        target: the size to reach.
        family, unit, parameters: for the error message: the family of the models, the unit of ``measure``, and the
            value of ``--parameters``.

    Raises:
        UserError: ``target`` is below the size of the narrowest model or above that of the widest.
    """
    low, high = 1, _MAX_WIDTH_FACTOR
    smallest, largest = measure(build(low)), measure(build(high))
    if not smallest <= target <= largest:
        raise UserError(
            f"--parameters {parameters} is too {'small' if target < smallest else 'large'}: the {family} models of "
            f"this benchmark have {smallest:,.0f} to {largest:,.0f} {unit}, and the comparison needs {target:,.0f}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if measure(build(middle)) < target:
            low = middle
        else:
            high = middle
    return min(map(build, (low, high)), key=lambda model: abs(math.log(measure(model) / target)))


def run(options: Shootout) -> None:
    """Measure, print the results and write them to the output directory."""
    if options.quick:
        options = dataclasses.replace(
            options, parameters=50_000, tokens=512, batch=4, length=16, contexts="4,20"
        )  # fmt: skip
    families = harness.names("families", options.families or ",".join(_FIELDS_BY_WIDTH), tuple(_FIELDS_BY_WIDTH))
    bases = harness.names("equal", options.equal, BASES)
    contexts = sorted(harness.parse_numbers("contexts", options.contexts))
    steps = options.tokens // (options.batch * options.length)
    if steps < 8:
        raise UserError(
            f"--tokens {options.tokens} gives {steps} batches of {options.batch} x {options.length}: at least 8 are "
            "needed"
        )
    directory = options.output or Path("runs") / f"shootout-{time.strftime('%Y%m%d-%H%M%S')}"
    if directory.exists():
        raise UserError(f"--output {directory} exists: choose another directory")
    # The widths of all models are chosen before the first measurement, because ``sized`` may raise an error.
    setups = [
        (basis, family, _set_up(family, basis, options, steps, contexts)) for basis in bases for family in families
    ]
    directory.mkdir(parents=True)
    machine = harness.describe_machine()
    rows: list[dict[str, Any]] = []
    for basis, family, setup in setups:
        row = _measure(family, basis, setup, options, steps, contexts)
        rows.append(row)
        print(f"{basis}: {family}, {row['parameters']:,} parameters: loss {row['loss']:.3f}", flush=True)
        record = {"program": "shootout", "machine": machine, "rows": rows}
        (directory / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (directory / "table.md").write_text(table(rows), encoding="utf-8")
    draw(rows, directory / "shootout.png")
    print(f"\n{table(rows)}\n{directory}")


class _Setup(NamedTuple):
    """The model of a family with the width chosen by :func:`sized`, its recipe and its trainer."""

    model: Any
    recipe: Any
    trainer: Any
    flops_per_token: float


def _set_up(family: str, basis: str, options: Shootout, steps: int, contexts: Sequence[int]) -> _Setup:
    import jax

    from experiments.families import RECIPES
    from jaxlm.objectives import causal
    from jaxlm.plan.flops import counted_training_flops
    from jaxlm.training.optimizer import make_optimizer
    from jaxlm.training.trainer import Trainer

    B, T = options.batch, options.length

    def make_recipe(name: str) -> Any:
        state_length = RECIPES[name].state_length
        return dataclasses.replace(
            RECIPES[name],
            batch_size=B,
            length=T,
            state_length=T if state_length is not None and state_length > 1 else state_length,
        )

    def make_builder(name: str) -> Callable[[int], Any]:
        def build(width_factor: int) -> Any:
            changes = {**RECIPES[name].model, **_FIELDS_BY_WIDTH[name](width_factor)}
            if "max_positions" in changes:
                changes["max_positions"] = max(T, contexts[-1] + _DECODE_STEPS + 1)
            if "memory_length" in changes:
                changes["memory_length"] = T
            return dataclasses.replace(RECIPES[name], model=changes).build()

        return build

    def make_trainer(name: str, model: Any) -> Trainer:
        recipe = make_recipe(name)
        carry_size = None if recipe.state_length is None else (B, recipe.state_length)
        config = dataclasses.replace(recipe.optimizer(steps), warmup_steps=max(1, min(50, steps // 4)))
        return Trainer(model, make_optimizer(config, model.specs, steps), causal.loss, carry_size=carry_size)

    def make_flops_counter(name: str) -> Callable[[Any], float]:
        def count(model: Any) -> float:
            trainer = make_trainer(name, model)
            window = jax.ShapeDtypeStruct((B, T), "int32")
            weights = jax.ShapeDtypeStruct((B, T), "float32")
            reset = None if trainer.carry_size is None else jax.ShapeDtypeStruct((B,), "bool")
            batch = causal.Batch(window, window, weights, reset=reset)
            model_state = trainer.abstract().model_state
            return counted_training_flops(model, trainer.loss, batch, model_state).amount / (B * T)

        return count

    def build_at_equal_parameters(name: str) -> Any:
        return sized(
            make_builder(name), lambda model: model.num_parameters, options.parameters,
            family=name, unit="parameters", parameters=options.parameters,
        )  # fmt: skip

    model = build_at_equal_parameters(family)
    if basis == "flops":
        target = make_flops_counter("gpt")(build_at_equal_parameters("gpt"))
        model = sized(
            make_builder(family), make_flops_counter(family), target,
            family=family, unit="training FLOPs per character", parameters=options.parameters,
        )  # fmt: skip
    flops_per_token = make_flops_counter(family)(model)
    return _Setup(model, make_recipe(family), make_trainer(family, model), flops_per_token)


def _measure(
    family: str, basis: str, setup: _Setup, options: Shootout, steps: int, contexts: Sequence[int]
) -> dict[str, Any]:
    import jax

    from experiments.families import Data, source, to_batch
    from jaxlm.data import Batches
    from jaxlm.training.evaluation import Evaluator
    from jaxlm.training.layouts import with_formats

    model, recipe, trainer, flops_per_token = setup
    data, convert = Data.load(), to_batch(recipe)
    tokens_per_step = options.batch * options.length
    state = trainer.init(jax.random.key(0))
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    training = Batches(source(data, recipe, "training", 0))
    batch = convert(next(training))
    start = time.perf_counter()
    step: Any = trainer.jit_step()
    step = step.lower(state, batch).compile()
    state = with_formats(state, step.input_formats[0][0])
    compile_seconds = time.perf_counter() - start
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))  # waits for the step
        seconds.append(time.perf_counter() - start)
        batch = convert(next(training))
    validation = Batches(source(data, recipe, "validation", 0))
    validation_batches = [convert(next(validation)) for _ in range(2 if options.quick else 16)]
    evaluate = Evaluator(model, trainer.loss, validation_batches, carry_size=trainer.carry_size)
    memory = step.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    decoded, state_bytes = _decode(model, state.params, contexts)
    return {
        "family": family, "equal": basis, "parameters": model.num_parameters, "flops_per_token": flops_per_token,
        "tokens": steps * tokens_per_step, "loss": evaluate(state.params)["loss"],
        "losses": losses, "tokens_per_second": tokens_per_step / statistics.median(seconds),
        "compile_seconds": compile_seconds,
        "step_bytes": arrays + memory.temp_size_in_bytes, "parameter_bytes": parameter_bytes,
        "state_bytes": state_bytes, "decode_seconds": decoded,
    }  # fmt: skip


_DECODE_STEPS = 16


def _decode(model: Any, params: Any, contexts: Sequence[int]) -> tuple[dict[int, float], int]:
    """``{context length: median seconds per character}``, and the bytes of the state for the longest context."""
    import jax
    import jax.numpy as jnp

    from jaxlm.decoding.prompts import read_tokens

    capacity = contexts[-1] + _DECODE_STEPS
    initial_state = model.init_state(1, capacity)
    prefill = jax.jit(lambda params, state, tokens: model.apply(params, tokens, state=state)[1])

    def step(params: Any, state: Any, token_1: Any) -> Any:
        state, logits_1V = read_tokens(model, params, state, token_1)
        return state, jnp.argmax(logits_1V, axis=-1).astype(jnp.int32)

    step = jax.jit(step, donate_argnums=1)
    medians = {}
    for context in contexts:
        state = prefill(params, initial_state, jnp.arange(context, dtype=jnp.int32)[None] % 64)
        token_1, seconds = jnp.zeros((1,), jnp.int32), []
        for _ in range(_DECODE_STEPS):
            start = time.perf_counter()
            state, token_1 = jax.block_until_ready(step(params, state, token_1))
            seconds.append(time.perf_counter() - start)
        medians[context] = statistics.median(seconds[1:])  # the first call includes compilation
    return medians, sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    contexts = list(rows[0]["decode_seconds"])
    header = ["equal", "family", "parameters", "MFLOP/char", "loss", "chars/s", "step MB", "state kB", "compile s"]
    header += [f"us/char after {context}" for context in contexts]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["equal"], row["family"], f"{row['parameters']:,}", f"{row['flops_per_token'] / 1e6:.1f}"]
        cells += [f"{row['loss']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['step_bytes'] / 1e6:.0f}"]
        cells += [f"{row['state_bytes'] / 1e3:,.0f}", f"{row['compile_seconds']:.1f}"]
        cells += [f"{1e6 * row['decode_seconds'][context]:,.0f}" for context in contexts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the training loss, a moving average over up to 10 steps, against the number of characters read.

    The figure has one plot for each quantity that is made equal.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    bases = list(dict.fromkeys(row["equal"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(6.2 * len(bases), 4.6), layout="constrained")
    for axes, basis in zip(figure.subplots(1, len(bases), squeeze=False, sharey=True)[0], bases, strict=True):
        for row in rows:
            if row["equal"] != basis:
                continue
            width = min(10, len(row["losses"]))
            smooth = np.convolve(row["losses"], np.full(width, 1 / width), mode="valid")
            num_characters = np.linspace(row["tokens"] * width / len(row["losses"]), row["tokens"], len(smooth))
            color = colormaps["tab20"](families.index(row["family"]))
            axes.plot(num_characters, smooth, label=f"{row['family']} ({row['loss']:.2f})", color=color)
        axes.set(title=f"equal {basis}", xlabel="characters read", ylabel="training loss, nats per character")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="family (validation loss)", ncols=2, loc="upper right", fontsize="small")
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    return harness.main(Shootout, run, arguments, name="shootout", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Train a language model (GPT, Llama, LSTM, GRU, Transformer-XL or gated convolutions) on a text and generate text.

    python -m experiments.text_generation                   a GPT on the included plays: 1.68 nats, 1 to 3 minutes
    python -m experiments.text_generation --preset lstm     an LSTM on the same text, about 2 minutes
    python -m experiments.text_generation --data FILE       a GPT on a UTF-8 text file (also .gz)

All losses are in nats per character. The next commands train on tinyshakespeare. The preset nanogpt is the CPU
configuration of nanoGPT. It trains for 1 minute, and its validation loss is 1.89 (nanoGPT's README states 1.88). The
presets lstm_large and gpt_large train for about 45 minutes. Their scores on the whole validation split are 1.41 and
1.47. The preset transformer_xl_large was not run yet.

    python -m experiments.text_generation --preset nanogpt --data tinyshakespeare.txt
    python -m experiments.text_generation --preset lstm_large --data tinyshakespeare.txt
    python -m experiments.text_generation --preset transformer_xl_large --data tinyshakespeare.txt
    python -m experiments.text_generation --preset gpt_large --data tinyshakespeare.txt

The next loop trains LSTMs and GRUs with 1 to 3 layers of width 128 on War and Peace. Karpathy et al. (2015, table 1)
compare such models. The training takes about 5 minutes per layer on one core. The training, validation and test splits
have 80 %, 10 % and 10 % of the text.

    for name in lstm_1 lstm_2 lstm_3 gru_1 gru_2 gru_3; do python -m experiments.text_generation \\
        --preset war_and_peace_$name --data war_and_peace.txt --output runs/peace_$name || break; done

A score is computed over all tokens of the validation or test split except the first. For recurrent families and
Transformer-XL, the split is divided into eight contiguous columns, and the state is carried through each column. Other
families read windows that overlap by half. docs/tasks/text_generation.md has the measured results.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import host, processes
from jaxlm.command_line import end_process
from jaxlm.data import Batches, ByteTokenizer, CharTokenizer, Tokenizer, read_text, shakespeare
from jaxlm.decoding import GenerationConfig, Sampling
from jaxlm.models import Model, get_model
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.tasks.text_generation import Corpus, check_family, print_passage, scores, to_batch, write_sample
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator, first_epoch
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.trainer import carry_size_of


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a language model on a text and generate a passage."""

    model: lib.ModelConfig = lib.ModelConfig()
    """The model."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3)
    """The optimizer."""
    data: Path | None = None
    """UTF-8 text file to train on (also .gz); None: the included Shakespeare plays."""
    tokenizer: Literal["character", "byte"] = "character"
    """character: each character of the text is a token. byte: each byte of the text (in UTF-8) is a token."""
    validation_fraction: float = 0.1
    """Fraction of the text in the validation split: the end of the text, or the part directly before the test split."""
    test_fraction: float = 0.0
    """Fraction of the text in the test split, which is the end of the text. 0: no test split."""
    mesh: str | None = None
    """Device mesh, for example data=4,tensor=2; axes: data, fsdp, tensor, sequence, expert. None: one device."""
    output: Path | None = None
    """Run directory; None: runs/text_generation-<time>."""
    prompt: str | None = None
    """Prompt of the passage; None: "ROMEO:" for the included plays, else the first 32 tokens of the validation split
    (fewer if the model has fewer than 64 positions)."""
    sample_tokens: int = 600
    """Number of tokens that are generated after the prompt."""
    temperature: float = 0.8
    """Sampling temperature, which divides the logits. 0: greedy decoding."""


def preset(
    family: str, fields: str, steps: int, rows: int, length: int, learning_rate: float, **options: Any
) -> Experiment:  # fmt: skip
    """An experiment with a randomly initialized model.

    ``fields`` are changes to the model's config, separated by spaces. ``rows`` is the batch size. ``options`` are
    fields of ``ExperimentTraining``, ``OptimizerConfig`` or ``Experiment``.
    """

    def fields_of(kind: type) -> dict[str, Any]:
        return {field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options}

    training = lib.ExperimentTraining(steps, rows, sequence_length=length, **fields_of(lib.ExperimentTraining))
    optimizer = OptimizerConfig(learning_rate=learning_rate, **fields_of(OptimizerConfig))
    return Experiment(lib.ModelConfig(family, tuple(fields.split())), training, optimizer, **options)


SMALL_TRANSFORMER = "num_layers=4 num_heads=4 embed_dim=128 "
NO_DROPOUT = "embedding_dropout=0.0 attention_dropout=0.0 residual_dropout=0.0 "
NO_RNN_DROPOUT = "embedding_dropout=0.0 weight_dropout=0.0 hidden_dropout=0.0 input_dropout=0.0 output_dropout=0.0 "
NO_CLUSTERS = "cutoffs=() embedding_divisor=1 "
LONG_RUN: dict[str, Any] = {
    "prompt": "ROMEO:", "ema_decay": 0.998, "restore_best": True, "evaluation_batches": 100, "final_fraction": 0.0,
}  # fmt: skip
PRESETS = {
    "gpt": preset("gpt", SMALL_TRANSFORMER + NO_DROPOUT + "vocab_multiple=8", 1500, 12, 96, 3e-3),
    "nanogpt": preset(
        "gpt", SMALL_TRANSFORMER + NO_DROPOUT, 2000, 12, 64, 1e-3, evaluation_batches=140, beta2=0.99, prompt="ROMEO:"
    ),
    "llama": preset("llama", SMALL_TRANSFORMER + "num_kv_heads=2 mlp_dim=352", 1000, 16, 96, 3e-3),
    **{
        name: preset(
            name, "num_layers=2 embed_dim=128 hidden_dim=256 init_bound=0.5 " + NO_RNN_DROPOUT, 1500, 16, 96, 1e-2
        )
        for name in ("lstm", "gru")
    },
    "transformer_xl": preset(
        "transformer_xl",
        SMALL_TRANSFORMER + NO_CLUSTERS + "head_dim=32 token_dim=128 mlp_dim=512 memory_length=64 dropout=0.0",
        1200, 16, 64, 3e-3,
    ),
    "gated_convolutions": preset(
        "resnet_lm", "embed_dim=64 blocks=((128,4,1),(128,4,1),(128,4,1),(128,4,1),(128,4,1)) dropout=0.0",
        1500, 16, 96, 3e-3,
    ),
    "lstm_large": preset(
        "lstm", "num_layers=2 embed_dim=512 hidden_dim=512 embedding_dropout=0.0 input_dropout=0.1 hidden_dropout=0.25 "
        "output_dropout=0.25 weight_dropout=0.3",
        3500, 32, 100, 3e-3, evaluate_every=500, checkpoint_every=500, weight_decay=0.01, **LONG_RUN,
    ),
    "transformer_xl_large": preset(
        "transformer_xl",
        NO_CLUSTERS + "num_layers=4 num_heads=4 head_dim=64 embed_dim=256 token_dim=256 mlp_dim=1024 "
        "memory_length=128 pre_norm=True dropout=0.1 remat=none",
        2500, 32, 128, 2e-3, evaluate_every=250, name="muon", beta2=0.95, **LONG_RUN,
    ),
    "gpt_large": preset(
        "gpt", "num_layers=4 num_heads=4 embed_dim=256 embedding_dropout=0.1 attention_dropout=0.0 "
        "residual_dropout=0.1 remat=none",
        2500, 16, 256, 2e-3, evaluate_every=250, name="muon", beta2=0.95, **LONG_RUN,
    ),
    **{
        f"war_and_peace_{family}_{layers}": preset(
            family, f"num_layers={layers} embed_dim=128 hidden_dim=128 init_bound=0.3 " + NO_RNN_DROPOUT,
            5000, 50, 100, 5e-3, evaluate_every=500, evaluation_batches=100, restore_best=True, test_fraction=0.1,
            final_fraction=0.01, weight_decay=0.01,
        )
        for family in ("lstm", "gru")
        for layers in (1, 2, 3)
    },
}  # fmt: skip


def build(experiment: Experiment, resume: Path | None) -> tuple[Corpus, Tokenizer, Model, Any]:
    """The corpus, its tokenizer, the model, and the initial parameters of the model (None: random)."""
    text = shakespeare() if experiment.data is None else read_text(experiment.data)
    config, is_character = experiment.model, experiment.tokenizer == "character"
    tokenizer = config.tokenizer(resume, lambda: CharTokenizer.from_text(text) if is_character else ByteTokenizer())
    fractions, name = (experiment.validation_fraction, experiment.test_fraction), experiment.data or "the included text"
    corpus = Corpus.split(text, tokenizer, *fractions, name=str(name))
    fields = {"vocab_size": tokenizer.vocab_size}
    if get_model(config.name).max_positions is not None:
        fields["max_positions"] = experiment.training.sequence_length
    model, params = config.build(experiment.training.seed, fields)
    check_family(model)
    return corpus, tokenizer, model, params


def passage_prompt(experiment: Experiment, corpus: Corpus, tokenizer: Tokenizer, model: Model) -> str:
    """The prompt of the passage. Raises ``ValueError`` if it has no tokens, or more tokens than the model can read."""
    prompt, limit = experiment.prompt, model.max_positions
    if prompt is None and experiment.data is not None:
        beginning = tokenizer.decode(corpus.parts["validation"][: min(32, (limit or 64) // 2)])
        prompt = beginning.strip("\ufffd")  # remove incomplete characters at both ends
    prompt = "ROMEO:" if prompt is None else prompt
    size = tokenizer.encode(prompt).size
    if size < 1 or (limit is not None and size > limit):
        sizes = "at least 1 token" if limit is None else f"from 1 to {limit} tokens"
        raise ValueError(f"--prompt has {size} tokens: the model reads {sizes}")
    return prompt


def generation_config(experiment: Experiment) -> GenerationConfig:
    """The generation settings of the passage: its length and the sampling temperature."""
    return GenerationConfig(experiment.sample_tokens, Sampling(temperature=experiment.temperature))


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train and export a model, write a passage and the report, and return the result of training."""
    start_time, config = time.perf_counter(), experiment.training
    fields = ["tokenizer", "validation_fraction", "test_fraction", "training.evaluation_batches"]
    lib.check_unchanged(experiment, resume, ["output", *fields])
    corpus, tokenizer, model, params = build(experiment, resume)
    prompt = passage_prompt(experiment, corpus, tokenizer, model)
    sharding = None if experiment.mesh is None else Sharding(make_mesh(experiment.mesh))
    length, rows, carry_size = config.sequence_length, config.batch_size, carry_size_of(model, config.batch_size)

    def batches(part: str, seed: int) -> Batches:
        source = corpus.batches(part, length=length, batch_size=rows, model=model, seed=seed)
        return Batches(source, None if sharding is None else sharding.local_rows(rows), to_batch=to_batch)

    held_out, data = first_epoch(batches("validation", 0), config.evaluation_batches), batches("training", config.seed)
    evaluate = Evaluator(model, causal.evaluation_loss(model), held_out, sharding=sharding, carry_size=carry_size)
    loss = causal.training_loss(model)
    trainer = config.trainer(model, experiment.optimizer, loss, carry_size=carry_size, sharding=sharding)
    directory = lib.prepare_run(
        "text_generation", experiment, resume, trainer, tokenizer, evaluate, generation_config(experiment)
    )  # fmt: skip
    sizes = ", ".join(f"{len(ids):,} for {part}" for part, ids in corpus.parts.items())
    lib.print_once(
        f"{model.num_parameters:,} parameters · {tokenizer.vocab_size} token ids · tokens {sizes} · {directory}"
    )
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume), params)
    if not lib.export(directory, model, result, tokenizer):
        return result
    final_params = jax.tree.map(processes.gather_to_host, result.params)
    if processes.is_first():
        final_params = jax.tree.map(jnp.asarray, final_params)
        key = jax.random.key(config.seed)
        passage = print_passage(model, final_params, tokenizer, prompt, generation_config(experiment), key=key)
        write_sample(directory, model, final_params, tokenizer, prompt, passage)
        parts = [part for part in ("validation", "test") if part in corpus.parts]
        lib.report(
            directory, task="text_generation", model=model, start_time=start_time, data=corpus.name, result=result,
            scores=[score for part in parts for score in scores(model, final_params, corpus, part, length)],
            validation_loss=result.validation_loss,
        )  # fmt: skip
        command = ["jaxlm", "generate", str(directory), f"--prompt={prompt}"]
        lib.print_once(f"to generate more text: {shlex.join(command)}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status (128 + signal number after an interruption)."""
    return lib.command_line(
        PRESETS["gpt"], PRESETS, run, name="text_generation", description=__doc__ or "", arguments=arguments
    )


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())

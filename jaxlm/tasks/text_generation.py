"""Language models of one long text: the ids of its training, validation and test splits, batches, and scores.

    corpus = Corpus.split(text, CharTokenizer.from_text(text))
    data = Batches(corpus.batches("training", length=96, batch_size=16, model=model), to_batch=to_batch)
    ...                                                                 # train
    scores(model, params, corpus, "validation", length=96)

Some models (for example LSTM, GRU and Transformer-XL) carry a state from batch to batch in training. Their
``Model.carried_state_length`` is not None. For these models, a split is divided into contiguous columns, one per batch
row. Each batch continues the columns of the previous batch. Other models (for example GPT, Llama and gated
convolutions) read windows in random order, without a state.

Shapes: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm.config import check_min
from jaxlm.data import ContiguousStreams, RandomWindows, TokenBatch, Tokenizer
from jaxlm.data.tokens import check_tokens, split_tokens
from jaxlm.decoding import GenerationConfig, stream_text
from jaxlm.decoding.describe import describe, require_task
from jaxlm.decoding.score import perplexity, perplexity_of
from jaxlm.metrics import Score
from jaxlm.models import Model
from jaxlm.objectives import causal
from jaxlm.objectives.batch import Batch
from jaxlm.spec import Params
from jaxlm.tasks.attention_maps import write_attention_maps
from jaxlm.training.evaluation import Evaluator, bits_per_character
from jaxlm.training.report import write_samples
from jaxlm.training.trainer import carry_size_of

NUM_SCORING_ROWS = 8
"""Number of contiguous columns into which :func:`scores` divides a split for a model whose training carries a state.

Only the first tokens of a column are scored with little context."""

MAP_TOKENS = 40
"""Maximum number of tokens, including special tokens, in the attention map of a passage."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The ids of a text, divided into consecutive splits.

    Attributes:
        name: name of the text, for messages.
        parts: name of a split (``training``, ``validation`` and optionally ``test``) -> its ids [tokens].
        num_characters: name of a split -> its number of characters.
    """

    name: str
    parts: dict[str, np.ndarray]
    num_characters: dict[str, int]

    @classmethod
    def split(
        cls, text: str, tokenizer: Tokenizer, validation_fraction: float = 0.1, test_fraction: float = 0.0,
        name: str = "the text",
    ) -> Corpus:  # fmt: skip
        """The corpus of a text: first the training split, then the validation split, and last the test split.

        Args:
            validation_fraction: fraction of the tokens in the validation split, above 0 and below 1.
            test_fraction: fraction of the tokens in the test split, at least 0 and below 1. 0: no test split.
            name: name of the text, for messages.

        Raises:
            ValueError: a fraction is outside its range, a split would be empty, the test split would have a single
                token, or the tokenizer cannot encode a character of the text.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction={validation_fraction} must be above 0 and less than 1")
        if not 0.0 <= test_fraction < 1.0:
            raise ValueError(f"test_fraction={test_fraction} must be at least 0 and less than 1")
        if validation_fraction + test_fraction >= 1.0:
            raise ValueError(
                f"validation_fraction={validation_fraction} and test_fraction={test_fraction} leave nothing to train on"
            )
        tokens = tokenizer.encode(text)
        parts, remaining = {}, tokens
        if test_fraction:
            remaining, parts["test"] = split_tokens(tokens, test_fraction)
            if len(parts["test"]) < 2:  # the first token of a split is not scored
                raise ValueError(
                    f"test_fraction={test_fraction} of {name}: 1 token, at least 2 needed; use a larger fraction or "
                    "more text"
                )
        parts["training"], parts["validation"] = split_tokens(
            remaining, validation_fraction * len(tokens) / len(remaining)
        )
        num_characters = {part: len(tokenizer.decode(ids)) for part, ids in parts.items() if part != "training"}
        num_characters["training"] = len(text) - sum(num_characters.values())
        return cls(name, parts, num_characters)

    def batches(
        self, part: str, *, length: int, batch_size: int, model: Model, seed: int = 0
    ) -> ContiguousStreams | RandomWindows:
        """A source of batches of a split: contiguous columns if training carries a state, else windows in random order.

        Windows of the training split can start at any token. In the other splits, the inputs of windows do not overlap.

        Args:
            part: name of the split.
            length: number of input tokens of a row.
            batch_size: number of rows in a batch.
            seed: seed of the order of the windows.

        Raises:
            ValueError: the split is too short, or has ids outside the vocabulary of the model; or ``length`` is larger
                than ``max_positions`` of the model.
        """
        check_row_length(model, length)
        source: ContiguousStreams | RandomWindows
        stride = 1 if part == "training" else length
        try:
            if model.carried_state_length is not None:
                source = ContiguousStreams(self.parts[part], length, batch_size)
            else:
                source = RandomWindows(self.parts[part], length, batch_size, seed=seed, stride=stride)
        except ValueError as error:
            raise ValueError(f"{part} split of {self.name}: {error}") from error
        source.check(model.config.vocab_size)
        return source


def to_batch(token_batch: TokenBatch) -> Batch:
    """The batch of the causal objective for windows of tokens [B, T + 1]."""
    return causal.batch(token_batch.tokens, token_batch.segment_ids, token_batch.reset)


def check_row_length(model: Model, length: int) -> None:
    """Raise ``ValueError`` if the model has fewer positions than ``length``, the number of input tokens of a row."""
    if model.max_positions is not None and length > model.max_positions:
        raise ValueError(
            f"rows of {length} tokens exceed max_positions={model.max_positions} of the model: use a smaller length "
            "(in the experiment: --training.sequence-length)"
        )


def check_family(model: Model) -> None:
    """Raise ``ValueError`` if the model cannot be trained to continue a text."""
    require_task(model, ("causal",), "it does not continue texts", "choose a causal family, such as gpt or lstm")
    if model.reads_source or not hasattr(model.module, "state_specs"):
        raise ValueError(f"this is {describe(model)}: it cannot decode; choose a causal family, such as gpt or lstm")
    if model.needs_whole_text:
        raise ValueError(
            f"{model.family} must read a text from its first token, but training reads windows of a long text; choose "
            "another family, such as gpt or lstm"
        )


def column_batches(ids: np.ndarray, rows: int, length: int) -> list[Batch]:
    """Batches [rows, length] along contiguous columns. Every token except the first is a target exactly once.

    The last column can end with padding, whose targets have weight 0. If the text is short, several columns have only
    padding.

    Args:
        ids: [tokens].
        rows: number of columns, which is the number of rows in a batch.
        length: number of input tokens of a row.
    """
    steps = -(-(ids.size - 1) // (rows * length))
    width = steps * length
    padded = np.zeros(rows * width + 1, np.int32)
    padded[: ids.size] = ids
    segment_ids = (np.arange(padded.size) < ids.size).astype(np.int32)
    windows = np.arange(rows)[:, None] * width + np.arange(length + 1)
    return [causal.batch(padded[windows + start], segment_ids[windows + start]) for start in range(0, width, length)]


def scores(model: Model, params: Params, corpus: Corpus, part: str, length: int) -> list[Score]:
    """Nats per character, bits per character, and perplexity per token, over all tokens of a split except the first.

    A model whose training carries a state reads :data:`NUM_SCORING_ROWS` contiguous columns and carries its state along
    them. Other models read windows of ``length`` tokens that overlap by half. Each token is scored once. After the
    first window, each scored token has at least half a window of context.

    Args:
        part: name of the split.
        length: number of input tokens of a row in one call of the model.

    Raises:
        ValueError: the split has fewer than 2 tokens or an id outside the vocabulary, ``length`` is below 1, the model
            has fewer positions than ``length``, or the model needs the whole text (``Model.needs_whole_text``) and the
            split needs several windows.
    """
    ids = corpus.parts[part]
    check_min(1, length=length)
    check_tokens(ids, model.config.vocab_size, 2, f"the {part} split of {corpus.name}")
    if model.carried_state_length is not None:
        evaluate = Evaluator(
            model,
            causal.loss,
            column_batches(ids, NUM_SCORING_ROWS, length),
            carry_size=carry_size_of(model, NUM_SCORING_ROWS),
        )
        nats, how = evaluate(params)["loss"], f"state carried along {NUM_SCORING_ROWS} columns"
    else:
        stride = -(-length // 2)
        nats = perplexity(model, params, ids, window=length + 1, stride=stride, batch_size=32).nats_per_token
        how = f"windows of {length} tokens, one every {stride} tokens"
    values = {
        "nats per character": nats * ids.size / corpus.num_characters[part],
        "bits per character": bits_per_character(nats, ids.size, corpus.num_characters[part]),
        "perplexity per token": perplexity_of(nats),
    }
    return [
        Score(f"{part} {name}", value, count=ids.size - 1, detail=f"whole {part} split, {how}")
        for name, value in values.items()
    ]


def print_passage(
    model: Model, params: Params, tokenizer: Tokenizer, prompt: str, config: GenerationConfig, *, key: jax.Array
) -> str:
    """Generate a continuation of the prompt and print it during generation. Returns the prompt and the continuation."""
    passage, started = prompt, time.perf_counter()
    print(f"\n{prompt}", end="")
    for piece in stream_text(model, params, tokenizer, prompt, config, key=key):
        print(piece, end="", flush=True)
        passage += piece
    rate = tokenizer.encode(passage[len(prompt) :]).size / (time.perf_counter() - started)
    print(f"\n\n{rate:.0f} tokens per second, compilation included")
    return passage


def write_sample(run: Path, model: Model, params: Params, tokenizer: Tokenizer, prompt: str, passage: str) -> None:
    """Write a generated passage to ``sample.txt`` and ``samples.jsonl`` of a run, and its attention map.

    The attention map has the first :data:`MAP_TOKENS` tokens of the passage. For families without attention, no map is
    written.

    Args:
        run: the directory of the run.
        passage: the prompt and its continuation.
    """
    (run / "sample.txt").write_text(passage, encoding="utf-8")
    write_samples(run, [{"source": prompt, "output": passage[len(prompt) :]}])
    write_attention_maps(run, model, params, tokenizer, [passage], max_tokens=MAP_TOKENS)

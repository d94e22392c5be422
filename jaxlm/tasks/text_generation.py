"""Language models on one long text: its parts as ids, their batches, and scores of a whole part.

    corpus = Corpus.split(text, CharTokenizer.from_text(text))
    data = Batches(corpus.source("training", length=96, batch_size=16, model=model), to_batch=to_batch)
    ...                                                                 # train
    scores(model, params, corpus, "validation", length=96)

Families with a state (LSTM, GRU, Transformer-XL) read contiguous columns and carry the state from batch to batch; GPT,
Llama and gated convolutions read windows in random order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxlm.data import Columns, RandomWindows, Tokenizer, Window
from jaxlm.data.tokens import split
from jaxlm.decoding.score import perplexity
from jaxlm.metrics import Score
from jaxlm.models import Model
from jaxlm.objectives import causal
from jaxlm.objectives.batch import Batch
from jaxlm.training.evaluation import Evaluator, bits_per_character
from jaxlm.training.trainer import Carry

WINDOWED = ("gpt", "llama", "resnet_lm")
STREAMED = ("lstm", "gru", "transformer_xl")
FAMILIES = WINDOWED + STREAMED
"""Families that learn to continue a text, without and with a state that is carried along it."""

COLUMNS = 8
"""Columns of a part that a model with a state is scored on: only their first tokens have no text before them."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as ids, in consecutive parts.

    Attributes:
        name: of the text, for messages.
        parts: ids [tokens] of ``training``, ``validation`` and, if there is one, ``test``.
        tokens_per_character: of the whole text.
    """

    name: str
    parts: dict[str, np.ndarray]
    tokens_per_character: float

    @classmethod
    def split(
        cls, text: str, tokenizer: Tokenizer, validation_fraction: float = 0.1, test_fraction: float = 0.0,
        name: str = "the text",
    ) -> Corpus:  # fmt: skip
        """The test part is the end of the text, and the validation part is what is before it.

        Raises:
            ValueError: fractions that leave a part empty, or a character that the tokenizer does not know.
        """
        tokens = tokenizer.encode(text)
        if validation_fraction + test_fraction >= 1.0:
            raise ValueError(
                f"validation_fraction={validation_fraction} and test_fraction={test_fraction} leave nothing to train on"
            )
        parts, rest = {}, tokens
        if test_fraction:
            rest, parts["test"] = split(tokens, test_fraction)
        parts["training"], parts["validation"] = split(rest, validation_fraction * len(tokens) / len(rest))
        return cls(name, parts, len(tokens) / len(text))

    def source(
        self, part: str, *, length: int, batch_size: int, model: Model, seed: int = 0
    ) -> Columns | RandomWindows:
        """Batches of a part: contiguous columns for a model with a state, else windows in random order.

        Windows of the training part begin at every token, others do not overlap.

        Raises:
            ValueError: the part is too short, or has ids outside the vocabulary of the model.
        """
        source: Columns | RandomWindows
        stride = 1 if part == "training" else length
        try:
            if model.family in STREAMED:
                source = Columns(self.parts[part], length, batch_size)
            else:
                source = RandomWindows(self.parts[part], length, batch_size, seed=seed, stride=stride)
        except ValueError as error:
            raise ValueError(f"{part} part of {self.name}: {error}") from error
        source.check(model.config.vocab_size)
        return source


def to_batch(window: Window) -> Batch:
    """A window of tokens as inputs and targets."""
    return causal.batch(window.tokens, window.segment_ids, window.reset)


def check_family(model: Model) -> None:
    """Raise ``ValueError`` if the model does not learn to continue a text."""
    task = getattr(model.config, "task", "causal")
    if model.family not in FAMILIES or task != "causal":
        raise ValueError(
            f"a model of family {model.family!r} with task {task!r} does not continue texts: choose one of the "
            f"families {', '.join(FAMILIES)}, with task 'causal'"
        )


def carry(model: Model, rows: int) -> Carry | None:
    """Rows and tokens of the state to carry from batch to batch; None for families that read windows."""
    return (rows, getattr(model.config, "memory_length", 1)) if model.family in STREAMED else None


def whole_columns(ids: np.ndarray, rows: int, length: int) -> list[Batch]:
    """Batches [rows, length] along contiguous columns, in which every token but the first is a target once.

    The last column may end with padding of weight 0; of a short text, columns may be padding only.
    """
    steps = -(-(ids.size - 1) // (rows * length))
    width = steps * length
    padded = np.zeros(rows * width + 1, np.int32)
    padded[: ids.size] = ids
    segment_ids = (np.arange(padded.size) < ids.size).astype(np.int32)
    windows = np.arange(rows)[:, None] * width + np.arange(length + 1)
    return [causal.batch(padded[windows + start], segment_ids[windows + start]) for start in range(0, width, length)]


def scores(model: Model, params: Any, corpus: Corpus, part: str, length: int) -> list[Score]:
    """Nats and bits per character, and perplexity per token, of all tokens of a part but the first.

    A model with a state reads the part along :data:`COLUMNS` columns and carries the state. Other models read windows
    of ``length`` tokens that overlap by half: but for the first window, a token is predicted from at least half a
    window.

    Args:
        length: tokens that the model reads at a time.

    Raises:
        ValueError: the part has fewer than 2 tokens, or the model has fewer positions than ``length``.
    """
    ids = corpus.parts[part]
    if model.family in STREAMED:
        evaluate = Evaluator(model, causal.loss, whole_columns(ids, COLUMNS, length), carry=carry(model, COLUMNS))
        nats, how = evaluate(params)["loss"], f"state carried along {COLUMNS} columns"
    else:
        stride = -(-length // 2)
        nats = perplexity(model, params, ids, window=length + 1, stride=stride, batch_size=32).nats_per_token
        how = f"windows of {length} tokens, a new one every {stride}"
    values = {
        "nats per character": nats * corpus.tokens_per_character,
        "bits per character": bits_per_character(nats, ids.size, round(ids.size / corpus.tokens_per_character)),
        "perplexity per token": math.exp(nats),
    }
    return [
        Score(f"{part} {name}", value, count=ids.size - 1, detail=f"whole {part} part, {how}")
        for name, value in values.items()
    ]

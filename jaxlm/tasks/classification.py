"""Classification of texts: examples as inputs of a classifier, its evaluation, and its test.

Shapes: B batch, T time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlm.data.buckets import Bucketed, Encoded, Rows
from jaxlm.data.examples import Examples, label_ids
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.models import Model
from jaxlm.objectives import classification
from jaxlm.objectives.batch import Batch


def takes_token_types(model: Model) -> bool:
    """Whether the ``apply`` of the family reads token types."""
    return "token_types" in inspect.signature(model.module.apply).parameters


def encode(
    examples: Examples, tokenizer: Tokenizer, labels: Sequence[str], model: Model, *, max_length: int | None = None
) -> list[Encoded]:
    """Each example (``text``, ``label``, and ``pair`` where there are pairs) as ids, token types and label.

    Args:
        labels: the names of the labels, in the order of the model's outputs.
        max_length: cut longer texts to so many tokens; None refuses texts that the model cannot read.

    Raises:
        ValueError: an unknown label, an example without tokens, or one that is longer than the model's positions.
    """
    texts = examples.column("text")
    pairs = examples.column("pair") if "pair" in examples[0] else None
    numbers = label_ids(examples.column("label"), labels, examples.name)
    limit = getattr(model.config, "max_positions", None)
    encoded: list[Encoded] = []
    for number, encoding in enumerate(tokenizer.encode_inputs_batch(texts, pairs, max_length=max_length)):
        if encoding.ids.size == 0 or (limit is not None and encoding.ids.size > limit):
            raise ValueError(
                f"example {number} of {examples.name} has {encoding.ids.size} tokens: it must have from 1 to "
                f"{limit}. Shorten it with max_length, or take a model with more positions"
            )
        types = {"token_types": encoding.token_types} if takes_token_types(model) else {}
        encoded.append({"tokens": encoding.ids, **types, "label": numbers[number]})
    return encoded


def to_batch(num_labels: int) -> Callable[[Rows], Batch]:
    """The function from rows of encoded examples to the batch of the objective."""

    def make(rows: Rows) -> Batch:
        segment_ids = rows.segment_ids("tokens")
        # Rows without an example have no weight; one token of padding keeps their numbers finite.
        segment_ids[rows.indices < 0, 0] = 1
        labels = np.where(rows.indices < 0, classification.IGNORED, rows.fields["label"])
        inputs = {name: rows.fields[name] for name in ("token_types",) if name in rows.fields}
        return classification.batch(rows.fields["tokens"], labels, segment_ids, num_labels=num_labels, inputs=inputs)

    return make


def batches(encoded: Sequence[Encoded], num_labels: int, batch_size: int, num_buckets: int = 4) -> list[Batch]:
    """All examples once, in order of length: the batches of an evaluation."""
    source = Bucketed(encoded, batch_size, num_buckets, shuffle=False)
    make = to_batch(num_labels)
    return [make(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


METRICS: dict[str, Any] = {"loss": classification.loss, "accuracy": classification.accuracy}
"""What an ``Evaluator`` of a classifier computes."""

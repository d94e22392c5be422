"""Sequence-to-sequence tasks (translation, summarization): batches of text pairs for an encoder-decoder.

Shapes: B batch, S source time, T target time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.buckets import Bucketed, Encoded, Rows
from jaxlm.data.examples import Examples
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import decoder_start_id
from jaxlm.models import Model
from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, token_accuracy
from jaxlm.tasks.attention_maps import write_maps
from jaxlm.training.report import write_samples


def encode(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    max_source: int | None = None,
    max_target: int | None = None,
) -> list[Encoded]:
    """The ids of each example (``source``, ``target``), with the special tokens of the tokenizer's template.

    The template must end a text with the eos token.

    Args:
        max_source: maximum number of tokens of a source; longer sources are truncated. None: sources are not truncated.
        max_target: the same for targets.

    Raises:
        ValueError: the tokenizer has no end token, or its template does not end a text with it.
    """
    end = tokenizer.special_ids.eos
    if end is None:
        raise ValueError("the tokenizer has no end token: train one with template='eos'")
    sources = tokenizer.encode_inputs_batch(examples.column("source"), max_length=max_source)
    targets = tokenizer.encode_inputs_batch(examples.column("target"), max_length=max_target)
    if targets[0].ids[-1] != end:
        raise ValueError("the template of the tokenizer does not end a text: train one with template='eos'")
    return [{"source": source.ids, "target": target.ids} for source, target in zip(sources, targets, strict=True)]


def to_batch(model: Model, tokenizer: Tokenizer) -> Callable[[Rows], Batch]:
    """A function that makes the batch of the objective from rows of encoded examples."""
    start_id = decoder_start_id(model, tokenizer)

    def make(rows: Rows) -> Batch:
        segments = {name: rows.segment_ids(name) for name in ("source", "target")}
        for segment_ids in segments.values():
            # A row without an example has weight 0. One real token in it keeps its loss finite.
            segment_ids[rows.indices < 0, 0] = 1
        batch = seq2seq.batch(
            rows.fields["source"], rows.fields["target"], start_id=start_id,
            source_segment_ids=segments["source"], segment_ids=segments["target"],
        )  # fmt: skip
        weights = batch.weights * (rows.indices >= 0)[:, None].astype(np.float32)
        return dataclasses.replace(batch, weights=weights)

    return make


def batches(
    encoded: Sequence[Encoded], model: Model, tokenizer: Tokenizer, batch_size: int, num_buckets: int = 4
) -> list[Batch]:
    """The batches of an evaluation: every example once, in order of length.

    Raises:
        ValueError: a source or a target has more tokens than the model has positions.
    """
    limit = getattr(model.config, "max_positions", None)
    source = Bucketed(encoded, batch_size, num_buckets, shuffle=False, equal_tokens=True, max_length=limit)
    make = to_batch(model, tokenizer)
    return [make(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


METRICS: dict[str, Any] = {"loss": seq2seq.loss, "token_accuracy": token_accuracy}
"""The metrics that an ``Evaluator`` of an encoder-decoder computes."""


def write_test(
    run: Path, model: Model, params: Any, tokenizer: Tokenizer, sources: Sequence[str], references: Sequence[str],
    outputs: Sequence[str],
) -> None:  # fmt: skip
    """Write 40 random outputs for the report of a run (``samples.jsonl``), and attention maps of four of them."""
    chosen = np.random.default_rng(0).permutation(len(sources))[:40].tolist()
    write_samples(run, [{"source": sources[n], "reference": references[n], "output": outputs[n]} for n in chosen])
    # The map of an empty output would have no rows.
    nonempty = [n for n in chosen if outputs[n].strip()][:4]
    pairs = [sources[n] for n in nonempty], [outputs[n] for n in nonempty]
    write_maps(run, model, params, tokenizer, *pairs)

"""Sequence to sequence: pairs of texts as batches of an encoder-decoder (translation, summarization).

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
from jaxlm.tasks.attention_maps import attention_maps
from jaxlm.training.report import write_attention, write_samples


def encode(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    max_source: int | None = None,
    max_target: int | None = None,
) -> list[Encoded]:
    """Each example (``source``, ``target``) as ids: both with the special tokens of the template, which ends with eos.

    Args:
        max_source: cut longer sources to so many tokens; None keeps them whole.
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
    """The function from rows of encoded examples to the batch of the objective."""
    start_id = decoder_start_id(model, tokenizer)

    def make(rows: Rows) -> Batch:
        segments = {name: rows.segment_ids(name) for name in ("source", "target")}
        for segment_ids in segments.values():
            # Rows without an example have no weight; one token of padding keeps their numbers finite.
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
    """All examples once, in order of length: the batches of an evaluation.

    Raises:
        ValueError: a source or a target with more tokens than the model has positions.
    """
    limit = getattr(model.config, "max_positions", None)
    source = Bucketed(encoded, batch_size, num_buckets, shuffle=False, equal_tokens=True, max_length=limit)
    make = to_batch(model, tokenizer)
    return [make(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


METRICS: dict[str, Any] = {"loss": seq2seq.loss, "token_accuracy": token_accuracy}
"""What an ``Evaluator`` of an encoder-decoder computes."""


def write_test(
    run: Path, model: Model, params: Any, tokenizer: Tokenizer, sources: Sequence[str], references: Sequence[str],
    outputs: Sequence[str],
) -> None:  # fmt: skip
    """Write 40 random outputs for the report of a run (``samples.jsonl``) and attention maps of four of them."""
    chosen = np.random.default_rng(0).permutation(len(sources))[:40].tolist()
    write_samples(run, [{"source": sources[n], "reference": references[n], "output": outputs[n]} for n in chosen])
    # Where nothing was generated there is no row to draw.
    drawn = [n for n in chosen if outputs[n].strip()][:4]
    if drawn:
        pairs = [sources[n] for n in drawn], [outputs[n] for n in drawn]
        write_attention(run, attention_maps(model, params, tokenizer, *pairs))

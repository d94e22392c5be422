"""Sequence-to-sequence tasks (translation, summarization): batches of text pairs, and test results of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.buckets import BucketBatch, Bucketed, Encoded
from jaxlm.data.examples import Examples
from jaxlm.data.tokenizers import Tokenizer, encode_truncated
from jaxlm.data.tokens import check_tokens
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.models import Model
from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, token_accuracy
from jaxlm.spec import Params
from jaxlm.tasks.attention_maps import write_attention_maps
from jaxlm.training.report import write_samples


def encode(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    max_source: int | None = None,
    max_target: int | None = None,
) -> list[Encoded]:
    """The ids of the ``source`` and ``target`` of each example, with the special tokens of the tokenizer's template.

    The template must add the EOS token at the end of a text.

    Args:
        max_source: maximum number of tokens of a source, including special tokens. Longer sources are truncated. None:
            sources are not truncated.
        max_target: maximum number of tokens of a target, including special tokens. Longer targets are truncated. None:
            targets are not truncated.

    Raises:
        ValueError: the tokenizer has no EOS token, its template does not add the EOS token at the end of a text, an
            example has no ``source`` or ``target``, or ``max_source`` or ``max_target`` is too small for the special
            tokens and one more token.
    """
    eos_id = tokenizer.special_ids.eos
    if eos_id is None:
        raise ValueError("the tokenizer has no EOS token: train a tokenizer with template='eos'")
    sources, targets = (
        encode_truncated(tokenizer, examples.column(name), None, limit, f"{name}s of {examples.name}")
        for name, limit in (("source", max_source), ("target", max_target))
    )
    if any(not len(target.ids) or target.ids[-1] != eos_id for target in targets):
        raise ValueError("the tokenizer adds no EOS token at the end: train a tokenizer with template='eos'")
    return [{"source": source.ids, "target": target.ids} for source, target in zip(sources, targets, strict=True)]


def check_sources(examples: Examples, tokenizer: Tokenizer) -> None:
    """Raise ``ValueError`` if a ``source`` has no tokens except special tokens. No text can be generated from it.

    Call this function with the test split before the training. Otherwise, the error occurs only after the training,
    when the model generates the outputs of the test.
    """
    sources = examples.column("source")
    for number, encoding in enumerate(tokenizer.encode_inputs_batch(sources)):
        if not encoding.has_text:
            raise ValueError(
                f"example {number} of {examples.name} has the source {sources[number]!r}, which has no tokens except "
                "special tokens: leave the example out, or use a tokenizer that has tokens for it"
            )


def to_batch(model: Model, tokenizer: Tokenizer) -> Callable[[BucketBatch], Batch]:
    """A function that converts a batch of encoded examples to a batch of ``jaxlm.objectives.seq2seq``.

    Rows without an example have weight 0. The returned function raises ``ValueError`` if a row has an id that the model
    does not have.

    Raises:
        ValueError: there is no start token (:func:`jaxlm.decoding.decoder_start_id`).
    """
    start_id = decoder_start_id(model, tokenizer)
    vocab_sizes = {"source": source_vocab_size(model), "target": model.config.vocab_size}

    def convert(rows: BucketBatch) -> Batch:
        for name, size in vocab_sizes.items():
            check_tokens(rows.fields[name].ravel(), size, name=f"the {name} of a batch")
        batch = seq2seq.batch(
            rows.fields["source"], rows.fields["target"], start_id=start_id,
            source_segment_ids=rows.segment_ids("source"), segment_ids=rows.segment_ids("target"),
        )  # fmt: skip
        weights = batch.weights * (rows.indices >= 0)[:, None].astype(np.float32)
        return dataclasses.replace(batch, weights=weights)

    return convert


def batches(
    encoded: Sequence[Encoded], model: Model, tokenizer: Tokenizer, batch_size: int, num_buckets: int = 4
) -> list[Batch]:
    """The batches for an evaluation, in the order of the bucket lengths. Every example occurs once.

    Raises:
        ValueError: there are no examples, a source or a target has no tokens or more tokens than the model has
            positions, or as in :func:`to_batch`.
    """
    limit = model.max_positions
    bucketed = Bucketed(encoded, batch_size, num_buckets, shuffle=False, equal_tokens=True, max_length=limit)
    convert = to_batch(model, tokenizer)
    return [convert(bucketed.batch(index, range(batch_size))) for index in range(bucketed.steps_per_epoch)]


METRICS: dict[str, Any] = {"loss": seq2seq.loss, "token_accuracy": token_accuracy}
"""The metrics that an ``Evaluator`` of an encoder-decoder computes."""


def write_test(
    run: Path, model: Model, params: Params, tokenizer: Tokenizer, sources: Sequence[str], references: Sequence[str],
    outputs: Sequence[str],
) -> None:  # fmt: skip
    """Write ``samples.jsonl`` of a run with at most 40 outputs, and the attention maps of at most four of them.

    The outputs are selected at random with a fixed seed. The maps are those of the first four selected outputs that are
    not empty. For families without attention, no maps are written.

    Args:
        run: the directory of the run.
        sources, references, outputs: the source, the reference and the generated text of each test example.
    """
    chosen = np.random.default_rng(0).permutation(len(sources))[:40].tolist()
    write_samples(run, [{"source": sources[n], "reference": references[n], "output": outputs[n]} for n in chosen])
    # The map of an empty output would have only the row of the EOS token, so skip empty outputs.
    nonempty = [n for n in chosen if outputs[n].strip()][:4]
    pairs = [sources[n] for n in nonempty], [outputs[n] for n in nonempty]
    write_attention_maps(run, model, params, tokenizer, *pairs)

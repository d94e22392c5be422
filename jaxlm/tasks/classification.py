"""Text classification: encoded examples, batches, predictions, and test results of a classifier.

Shapes: N examples, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.buckets import BucketBatch, Bucketed, Encoded, check_examples
from jaxlm.data.examples import Examples, label_ids
from jaxlm.data.tokenizers import Tokenizer, encode_truncated
from jaxlm.data.tokens import check_tokens
from jaxlm.metrics import Score, accuracy, confusion, proportion
from jaxlm.models import Model, resnet
from jaxlm.objectives import classification
from jaxlm.objectives.batch import Batch
from jaxlm.spec import Params
from jaxlm.tasks.predict import label_probabilities, require_classifier
from jaxlm.training.report import read_results, write_confusion, write_results, write_samples


def encode(
    examples: Examples, tokenizer: Tokenizer, labels: Sequence[str], model: Model, *, max_length: int | None = None
) -> list[Encoded]:
    """The encoded examples, each with ``tokens``, ``label`` (an id), and ``token_types`` if the model reads them.

    Args:
        examples: examples with ``text`` and ``label``, and with ``pair`` (the second text) for a task of text pairs.
        labels: the label names, in the order of the model's outputs.
        max_length: maximum number of tokens, including special tokens. Longer texts are truncated. None: texts are not
            truncated.

    Raises:
        ValueError: There are no examples, fewer than two labels, or another number of labels than the model has. An
            example lacks a field or has an unknown label. A text (or both texts of a pair) has no tokens, not counting
            special tokens. A text or pair has more tokens than the model has positions, or an id that the model does
            not have. ``max_length`` is too small for the special tokens and one token of each text.
    """
    if len(labels) < 2:
        raise ValueError(f"the labels of {examples.name} are {list(labels)}: a classifier needs at least two labels")
    if len(labels) != model.config.num_labels:
        raise ValueError(
            f"the labels of {examples.name} are {list(labels)}, but the model has num_labels="
            f"{model.config.num_labels}: make the model with num_labels={len(labels)}"
        )
    if not len(examples):
        raise ValueError(f"{examples.name} must have at least one example, got none")
    texts = examples.column("text")
    pairs = examples.column("pair") if any("pair" in example for example in examples) else None
    label_numbers = label_ids(examples.column("label"), labels, examples.name)
    limit = model.max_positions
    encoded: list[Encoded] = []
    encodings = encode_truncated(tokenizer, texts, pairs, max_length, f"texts of {examples.name}")
    for number, (text, encoding, label) in enumerate(zip(texts, encodings, label_numbers, strict=True)):
        if not encoding.has_text:
            raise ValueError(
                f"example {number} of {examples.name} has the text {text!r}, which has no tokens: leave the example "
                "out, or use a tokenizer that has tokens for it"
            )
        if limit is not None and encoding.ids.size > limit:
            raise ValueError(
                f"the text {text[:60]!r} of {examples.name} has {encoding.ids.size} tokens: it must have from 1 to "
                f"{limit}. Truncate long texts with max_length, or use a model with more positions"
            )
        check_tokens(encoding.ids, model.config.vocab_size, name=f"the text {text[:60]!r} of {examples.name}")
        types = {"token_types": encoding.token_types} if model.reads_token_types else {}
        encoded.append({"tokens": encoding.ids, **types, "label": label})
    return encoded


def to_batch(num_labels: int) -> Callable[[BucketBatch], Batch]:
    """A function that converts a batch of encoded examples to a batch of ``jaxlm.objectives.classification``.

    Rows without an example have weight 0.
    """

    def convert(rows: BucketBatch) -> Batch:
        segment_ids = rows.segment_ids("tokens")
        labels = np.where(rows.indices < 0, classification.IGNORED_LABEL, rows.fields["label"])
        inputs = {name: rows.fields[name] for name in ("token_types",) if name in rows.fields}
        return classification.batch(rows.fields["tokens"], labels, segment_ids, num_labels=num_labels, inputs=inputs)

    return convert


def batches(
    encoded: Sequence[Encoded], num_labels: int, batch_size: int, num_buckets: int = 4, *, max_length: int | None = None
) -> list[Batch]:
    """The batches for an evaluation, in the order of the bucket lengths. Every example occurs once.

    Args:
        max_length: maximum number of tokens of a row, for example the model's ``max_positions``. None: no limit. The
            length of a batch is rounded up to a multiple of 8, but not above ``max_length``.

    Raises:
        ValueError: there are no examples, an example is not valid (:func:`jaxlm.data.buckets.check_examples`), or an
            example has more than ``max_length`` tokens.
    """
    source = Bucketed(encoded, batch_size, num_buckets, shuffle=False, max_length=max_length)
    convert = to_batch(num_labels)
    return [convert(source.batch(index, range(batch_size))) for index in range(source.steps_per_epoch)]


def predict(model: Model, params: Params, encoded: Sequence[Encoded], batch_size: int = 32) -> np.ndarray:
    """The label probabilities of N encoded examples, float32 [N, L].

    For the same tokens, they equal the probabilities of :func:`jaxlm.tasks.predict.classify`.

    Raises:
        ValueError: The model is not a classifier, or its outputs are regression scores, as in ``classify``. An example
            is not valid (:func:`jaxlm.data.buckets.check_examples`), has more tokens than the model has positions, or
            has an id or a token type that the model does not have.
        NotFiniteError: logits are not finite. The message names the examples.
    """
    require_classifier(model)
    if len(encoded):
        check_examples(encoded, model.max_positions)
    ids = [np.asarray(example["tokens"]) for example in encoded]
    for number, row in enumerate(ids):
        check_tokens(row, model.config.vocab_size, name=f"example {number}")
    token_types = [np.asarray(example["token_types"]) for example in encoded if "token_types" in example]
    return label_probabilities(model, params, ids, token_types, batch_size, what="example")


def write_test(directory: Path, examples: Examples, labels: Sequence[str], predicted: np.ndarray) -> Score:
    """The accuracy of the predicted label ids [N]. Also writes ``confusion.json`` and ``samples.jsonl`` of a run.

    The samples are the first wrong predictions and the first correct predictions, at most 20 of each.

    Args:
        directory: the directory of the run.
        predicted: the predicted label id of each example, int [N].
    """
    texts, gold = examples.column("text"), label_ids(examples.column("label"), labels, examples.name)
    write_confusion(directory, labels, confusion(predicted, gold, len(labels)))
    indices = np.concatenate([np.flatnonzero(predicted != gold)[:20], np.flatnonzero(predicted == gold)[:20]])
    write_samples(
        directory,
        [{"source": texts[n], "label": labels[gold[n]], "output": labels[predicted[n]]} for n in indices.tolist()],
    )
    return accuracy(predicted, gold)


METRICS: dict[str, Any] = {"loss": classification.loss, "accuracy": classification.accuracy}
"""The metrics that an ``Evaluator`` of a classifier computes."""


def write_folds(directory: Path, scores: Sequence[Score]) -> Score:
    """Write ``results.json`` of a cross-validation and return the accuracy over the test examples of all folds.

    Args:
        directory: the parent of the run directories of the folds, ``fold-0``, ``fold-1``, ...
        scores: the accuracy of each fold.

    Raises:
        ValueError: there are fewer than two scores. The standard deviation needs at least two.
    """
    if len(scores) < 2:
        raise ValueError(f"a cross-validation needs the scores of at least two folds, got {len(scores)}: add folds")
    results = [read_results(directory / f"fold-{fold}") for fold in range(len(scores))]
    counts = [score.count or 0 for score in scores]
    num_correct = sum(round(score.value * count) for score, count in zip(scores, counts, strict=True))
    pooled = proportion(f"accuracy over {len(scores)} folds", num_correct, sum(counts))
    values = [score.value for score in scores]
    deviation = round(float(np.std(values, ddof=1)), 4)
    write_results(
        directory, task=results[0]["task"], family=results[0]["family"], parameters=results[0]["parameters"],
        minutes=sum(result["minutes"] for result in results), data=results[0]["data"], scores=[pooled],
        folds=len(scores), accuracy_of_folds=values, standard_deviation_over_folds=deviation,
    )  # fmt: skip
    return pooled


def convolution_fields(
    family: str,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, int | tuple[int, ...]]:
    """The config fields of an alexnet or resnet classifier that depend on the longest text.

    A classifier of these families pads every text to ``max_positions`` tokens. The returned ``max_positions`` is the
    number of tokens of the longest text, but at least 32.

    A resnet halves the length between its groups of blocks, and keeps the ``k_max`` largest entries of each channel
    after the last group. So its ``max_positions`` is rounded up to a multiple of 8 and of
    ``2 ** (number of groups - 1)``, and is at least ``k_max * 2 ** (number of groups - 1)``.

    For an alexnet, ``pools`` is also returned if ``changes`` has ``kernels`` with one entry. The max pooling then
    covers the whole text, as in the model of Kim (2014), and ``max_positions`` is at least the kernel size.

    Args:
        family: "alexnet" or "resnet".
        texts: the texts for training and evaluation.
        max_length: maximum number of tokens, to which the caller truncates longer texts. None: no truncation.
        changes: config fields that the caller sets. Only ``kernels`` (alexnet), ``blocks`` and ``k_max`` (resnet) have
            an effect.
    """
    changes = changes or {}
    longest = max(encoding.ids.size for encoding in tokenizer.encode_inputs_batch(texts))
    length = max(32, longest if max_length is None else min(longest, max_length))
    kernels, blocks = changes.get("kernels"), changes.get("blocks", resnet.Config.blocks)
    if family == "resnet" and isinstance(blocks, tuple):
        divisor = 2 ** max(0, len(blocks) - 1)  # the model halves the length between groups
        k_max = changes.get("k_max", resnet.Config.k_max)
        length = max(length, divisor * k_max if type(k_max) is int else 0)  # the config raises for a wrong type
        length += -length % max(8, divisor)
    elif family == "alexnet" and isinstance(kernels, tuple) and len(kernels) == 1 and type(kernels[0]) is int:
        length = max(length, kernels[0])
        return {"max_positions": length, "pools": (length - kernels[0] + 1,)}
    return {"max_positions": length}

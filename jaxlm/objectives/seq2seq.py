"""Sequence-to-sequence objective: each target token is predicted from the source and the previous target tokens.

Shapes: B batch, S source time, T target time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.config import check_int32
from jaxlm.models import common
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.spec import require_arrays

loss = token_loss


def batch(
    source: np.ndarray,
    targets: np.ndarray,
    *,
    start_id: int,
    source_segment_ids: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> Batch:
    """A batch of sources [B, S] and targets [B, T]. Both must include their end tokens.

    The inputs of the decoder are the targets shifted right by one position (:func:`shift_right`). Document n of the
    targets attends to document n of the source. Targets at padding have weight 0.

    Args:
        start_id: the first decoder input of every document, such as ``decoder_start_id`` of a config.
        source_segment_ids: [B, S], 0 for padding and n for document n. None: each source is one document without
            padding.
        segment_ids: [B, T], the same for the targets.

    Raises:
        ValueError: source, targets or their segment ids are not integers [batch, time] with at least one token per row,
            shapes do not match, or a value is outside int32.
        TypeError: an argument is not an array.
    """
    common.check_tokens(source, source_segment_ids, None, None, name="source")
    common.check_tokens(targets, segment_ids, None, None, name="targets")
    if min(source.shape[1], targets.shape[1]) < 1 or len(source) != len(targets):
        raise ValueError(
            f"source {list(source.shape)} and targets {list(targets.shape)} must have at least one token per row and "
            "the same batch size"
        )
    inputs = {"source": source}
    if source_segment_ids is not None:
        inputs["source_segment_ids"] = source_segment_ids
    weights = np.ones(targets.shape, np.float32) if segment_ids is None else (segment_ids > 0).astype(np.float32)
    return Batch(shift_right(targets, start_id, segment_ids), targets, weights, segment_ids, inputs)


def to_decoder_only_batch(batch: Batch) -> Batch:
    """The batch for a causal model without an encoder, [B, S + T]: the source, followed by the inputs of the decoder.

    Positions of the source have weight 0. The first input of the decoder, ``start_id``, separates the two texts.
    Padding of the source and of the targets stays where it is; its segment id is 0.

    Args:
        batch: from :func:`batch`.

    Raises:
        ValueError: a row has several documents.
    """
    source = batch.inputs["source"]
    segments = batch.inputs.get("source_segment_ids"), batch.segment_ids
    source_segments, segment_ids = (
        np.ones(x.shape, np.int32) if ids is None else ids for ids, x in zip(segments, (source, batch.tokens))
    )
    all_segments = np.concatenate([source_segments, segment_ids], axis=1)
    if np.any((all_segments > 0) & (all_segments != all_segments.max(axis=1, keepdims=True))):
        raise ValueError("a row has several documents: a model without encoder needs one source and target per row")
    no_target = np.zeros(source.shape, batch.targets.dtype)
    return Batch(
        np.concatenate([source, batch.tokens], axis=1),
        np.concatenate([no_target, batch.targets], axis=1),
        np.concatenate([no_target.astype(np.float32), batch.weights], axis=1),
        all_segments,
    )


def shift_right(targets: np.ndarray, start_id: int, segment_ids: np.ndarray | None = None) -> np.ndarray:
    """The token before each target, [B, T] int32, or ``start_id`` for the first target of each document.

    Padding and a target directly after padding also get ``start_id``.

    Raises:
        ValueError: the targets are not integers in the range of int32.

    Example:
        >>> shift_right(np.array([[5, 6, 1, 7, 1, 0]]), 0, np.array([[1, 1, 1, 2, 2, 0]])).tolist()
        [[0, 5, 6, 0, 7, 0]]
    """
    require_arrays(targets=targets, segment_ids=segment_ids)
    check_int32(targets, "the array of targets")
    targets = targets.astype(np.int32)  # ``start_id`` may not fit into a smaller dtype
    shifted = np.concatenate([np.full_like(targets[:, :1], start_id), targets[:, :-1]], axis=1)
    if segment_ids is None:
        return shifted
    is_first = np.ones(targets.shape, bool)
    is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.where(is_first | (segment_ids <= 0), start_id, shifted).astype(targets.dtype)


def pad(rows: Sequence[Sequence[int]], length: int | None = None, *, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The rows, padded on the right to the same length: tokens and segment ids (1 for tokens, 0 for padding).

    Both are [B, T] int32.

    Args:
        length: T. None: the length of the longest row.

    Raises:
        ValueError: there are no rows, a row is empty or longer than ``length``, or a row has values that are not
            integers in the range of int32.
    """
    if not len(rows):
        raise ValueError("there are no rows to pad: give at least one")
    arrays = [np.asarray(row) for row in rows]
    sizes = np.array([len(row) for row in arrays])
    length = int(sizes.max()) if length is None else length
    for number, (row, size) in enumerate(zip(arrays, sizes, strict=True)):
        if size < 1:
            raise ValueError(f"row {number} has no tokens: remove it")
        if size > length:
            raise ValueError(f"row {number} has {size} tokens: it must have at most {length}; truncate or remove it")
        check_int32(row, f"row {number}")
    segment_ids = (np.arange(length)[None] < sizes[:, None]).astype(np.int32)
    tokens = np.full(segment_ids.shape, pad_id, np.int32)
    tokens[segment_ids > 0] = np.concatenate(arrays)
    return tokens, segment_ids

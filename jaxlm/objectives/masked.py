"""Masked language modeling (Devlin et al. 2019, section 3.1): masked tokens are predicted from both sides.

Some of the tokens are selected as targets. In the input, by default,

    80 %  of them are replaced by the mask token    10 %  are replaced by a random id    10 %  are unchanged

There are two ways to select the targets:

- With ``rate``, the default, each token (or word) is selected with probability ``rate``, independently of the others,
  as in ``transformers``.
- With ``num_predict``, at most this number of tokens is selected in each row, as in BERT's published code. Then logits
  and their gradients are computed only at these positions, typically 15 % of all positions. If a word has more tokens
  than the row may still select, it is not selected. So long words are selected less often. The published code also
  selects at most the fraction ``rate`` of the tokens of a row. This module has no such limit, so give rows of full
  length.

The tokens of a word are selected together, but replaced independently of each other, as in BERT's published code.

For BERT's static masking, make the masks once before training. For RoBERTa's dynamic masking (Liu et al. 2019, section
4.1), make new masks in each epoch. A ``to_batch`` function (``jaxlm.data.Batches``) gets a token batch, but neither the
step nor the epoch. It can seed its random generator with ``zlib.crc32(token_batch.tokens.tobytes())``. Then a resumed
run has the same masks, and equal token batches have equal masks. But a token batch has only the rows of its process, so
a run with another number of processes has other masks.

Shapes: B batch, T time, P target positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.models import common
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.spec import require_arrays

loss = token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """The settings of :func:`batch`.

    Raises:
        ValueError: an id is outside the vocabulary; a fraction is out of range; or both ``num_predict`` and a ``rate``
            other than the default are given.
    """

    mask_id: int
    """The id of the mask token."""
    vocab_size: int
    """Number of ids in the vocabulary. Random ids are below this number. As in the published code, they may be special
    ids."""
    special_ids: Sequence[int] = ()
    """Ids that are never selected, such as ``[CLS]`` and ``[SEP]``. The mask token and padding (segment 0) are never
    selected either."""
    rate: float = 0.15
    """The probability with which a token (or a word) is selected."""
    num_predict: int | None = None
    """P, the maximum number of tokens to select in each row. It replaces ``rate``. The batch then has
    ``target_positions`` [B, P]. If fewer tokens are selected in a row, the other target positions have weight 0."""
    mask_fraction: float = 0.8
    """Fraction of the selected tokens that are replaced by the mask token."""
    random_fraction: float = 0.1
    """Fraction of the selected tokens that are replaced by a random id. The others are unchanged."""

    def __post_init__(self) -> None:
        self.check_ids("mask_id", [self.mask_id])
        self.check_ids("special_ids", self.special_ids)
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate={self.rate} must be in (0, 1]")
        if self.num_predict is not None and self.rate != MaskingConfig.rate:
            raise ValueError(
                f"num_predict={self.num_predict} and rate={self.rate} exclude each other: set only one of them"
            )
        if min(self.mask_fraction, self.random_fraction) < 0.0 or self.mask_fraction + self.random_fraction > 1.0:
            raise ValueError(
                f"mask_fraction={self.mask_fraction} and random_fraction={self.random_fraction} must be at least 0, "
                "and their sum at most 1"
            )

    def check_ids(self, name: str, ids: Any) -> None:
        """Raise ``ValueError`` if an id is outside the vocabulary."""
        ids = np.asarray(ids)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: id {outside[0]} is outside the vocabulary of {self.vocab_size} ids")


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    config: MaskingConfig,
    *,
    segment_ids: np.ndarray | None = None,
    word_ids: np.ndarray | None = None,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """A batch of masked tokens [B, T]. The targets are the original tokens. A row may have no target.

    Tokens and targets of the batch are int32.

    Args:
        segment_ids: [B, T], 0 for padding. None: no padding.
        word_ids: [B, T] integers. Adjacent tokens of a document with equal word ids form a word, which is selected as a
            whole. Special tokens do not belong to words. None: every token is a word.
        inputs: further keyword arguments of ``apply``, such as ``token_types``.

    Raises:
        ValueError: the shapes do not match, tokens are not integers, an id is outside the vocabulary, or
            ``num_predict`` is not from 1 to T.
        TypeError: an argument is not an array.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    require_arrays(word_ids=word_ids)
    if word_ids is not None and word_ids.shape != tokens.shape:
        raise ValueError(f"word_ids {list(word_ids.shape)} must have the shape of tokens {list(tokens.shape)}")
    config.check_ids("tokens", tokens)
    num_predict, length = config.num_predict, tokens.shape[1]
    if num_predict is not None and not 1 <= num_predict <= length:
        raise ValueError(f"num_predict={num_predict} must be from 1 to the {length} tokens of a row")
    # The mask token and the random ids may not fit into a smaller dtype of the tokens.
    tokens = np.asarray(tokens).astype(np.int32, casting="same_kind", copy=False)

    is_special = np.isin(tokens, [config.mask_id, *config.special_ids])
    if segment_ids is not None:
        is_special |= segment_ids <= 0
    words = _word_indices(is_special, segment_ids, word_ids)
    if num_predict is None:
        selected = np.take_along_axis(rng.random(tokens.shape) < config.rate, words, axis=1) & ~is_special
    else:
        selected = _select_words(is_special, words, num_predict, rng)
    draws = rng.random(tokens.shape)
    random_ids = rng.integers(config.vocab_size, size=tokens.shape, dtype=tokens.dtype)
    replacement = np.where(draws < config.mask_fraction, np.asarray(config.mask_id, tokens.dtype), random_ids)
    masked_tokens = np.where(selected & (draws < config.mask_fraction + config.random_fraction), replacement, tokens)
    weights, inputs = selected.astype(np.float32), dict(inputs or {})
    if num_predict is None:
        return Batch(masked_tokens, tokens, weights, segment_ids, inputs)
    positions = np.argsort(~selected, axis=1, kind="stable")[:, :num_predict].astype(np.int32)
    targets, weights = (np.take_along_axis(x, positions, axis=1) for x in (tokens, weights))
    return Batch(masked_tokens, targets, weights, segment_ids, inputs, target_positions=positions)


def _word_indices(is_special: np.ndarray, segment_ids: np.ndarray | None, word_ids: np.ndarray | None) -> np.ndarray:
    """The index of each token's word in its row, [B, T], from 0. Each special token is a separate word."""
    is_first = np.ones(is_special.shape, bool)
    is_first[:, :1] = False
    if word_ids is not None:
        is_first[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | is_special[:, 1:] | is_special[:, :-1]
        if segment_ids is not None:
            is_first[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.cumsum(is_first, axis=1)


def _select_words(is_special: np.ndarray, words: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of the selected tokens, [B, T] bool, with at most ``limit`` tokens in each row.

    Words are drawn in random order. A word with which the row would have more than ``limit`` selected tokens is
    skipped.
    """
    selected = np.zeros(is_special.shape, bool)
    for row, (row_special, row_words) in enumerate(zip(is_special, words, strict=True)):
        sizes, remaining = np.bincount(row_words, ~row_special).astype(int), limit
        for word in rng.permutation(np.flatnonzero(sizes)):
            if sizes[word] <= remaining:
                selected[row] |= (row_words == word) & ~row_special
                remaining -= sizes[word]
    return selected

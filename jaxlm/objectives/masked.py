"""Masked language modelling (Devlin et al. 2019, section 3.1): hidden tokens are predicted from both sides.

A share ``rate`` of the tokens is selected as targets. Each selected token is replaced in the input by

    80 %  the mask token           10 %  a random id           10 %  itself

Tokens (or words) are selected independently of each other, as in ``transformers``. With ``num_predict``, a fixed number
of tokens is selected in each row, as in the authors' code: a word that no longer fits is skipped, so long words are
selected less often. In return, logits are computed at these positions only (15 % of the logits, their gradients and
their memory). The tokens of a word are selected together and replaced independently, as in the authors' code.

Masks made once are BERT's static masking. Masks made again for each epoch, with a generator seeded by the epoch, are
RoBERTa's dynamic masking (Liu et al. 2019, section 4.1): ``rng = np.random.default_rng([seed, epoch])``.
Shapes: B batch, T time, P target positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.models import common
from jaxlm.objectives.batch import Batch, token_loss

loss = token_loss

RATE = 0.15
"""Share of the tokens that are selected."""
MASKED, RANDOM = 0.8, 0.1
"""Shares of the selected tokens that are replaced by the mask token, and by a random id; the others stay unchanged."""


def batch(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    segment_ids: np.ndarray | None = None,
    word_ids: np.ndarray | None = None,
    inputs: dict[str, Any] | None = None,
    rate: float = RATE,
    num_predict: int | None = None,
    masked: float = MASKED,
    random: float = RANDOM,
) -> Batch:
    """A batch of tokens [B, T] with masked inputs; the targets are the original tokens. A short row may have no target.

    Args:
        mask_id: the mask token.
        vocab_size: random ids are below it; as in the published code, they may be special ids.
        special_ids: ids that are never selected, such as ``[CLS]`` and ``[SEP]``. The mask token and padding (segment
            0) are never selected either.
        word_ids: [B, T] integers; adjacent tokens with equal ids are a word, which is selected as a whole. Default:
            every token is a word.
        inputs: further arrays for ``apply``, such as ``token_types``.
        rate: share of the tokens that are selected.
        num_predict: P, the number of tokens to select in each row, instead of a rate. The batch then has
            ``target_positions``. A row with too few tokens is filled with positions of weight 0.
        masked: share of the selected tokens that are replaced by the mask token.
        random: share of the selected tokens that are replaced by a random id.

    Raises:
        ValueError: shapes that do not match, ids outside the vocabulary, or shares out of range.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    if word_ids is not None and word_ids.shape != tokens.shape:
        raise ValueError(f"word_ids {list(word_ids.shape)} must have the shape of tokens {list(tokens.shape)}")
    for name, ids in (("mask_id", [mask_id]), ("special_ids", special_ids), ("tokens", tokens)):
        outside = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: id {outside[0]} is outside the vocabulary of {vocab_size} ids")
    _check_shares(rate, num_predict, masked, random, tokens.shape[1])

    is_special = np.isin(tokens, [mask_id, *special_ids])
    if segment_ids is not None:
        is_special |= segment_ids == 0
    words = _words(is_special, segment_ids, word_ids)
    if num_predict is None:
        selected = np.take_along_axis(rng.random(tokens.shape) < rate, words, axis=1) & ~is_special
    else:
        selected = _select_words(is_special, words, num_predict, rng)
    draw = rng.random(tokens.shape)
    random_ids = rng.integers(vocab_size, size=tokens.shape, dtype=tokens.dtype)
    replacement = np.where(draw < masked, np.asarray(mask_id, tokens.dtype), random_ids)
    masked_tokens = np.where(selected & (draw < masked + random), replacement, tokens)
    weights, inputs = selected.astype(np.float32), dict(inputs or {})
    if num_predict is None:
        return Batch(masked_tokens, tokens, weights, segment_ids, inputs)
    positions = np.argsort(~selected, axis=1, kind="stable")[:, :num_predict].astype(np.int32)
    targets, weights = (np.take_along_axis(x, positions, axis=1) for x in (tokens, weights))
    return Batch(masked_tokens, targets, weights, segment_ids, inputs, target_positions=positions)


def _check_shares(rate: float, num_predict: int | None, masked: float, random: float, length: int) -> None:
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate={rate} must be in (0, 1]")
    if num_predict is not None and not 1 <= num_predict <= length:
        raise ValueError(f"num_predict={num_predict} must be from 1 to the {length} tokens of a row")
    if num_predict is not None and rate != RATE:
        raise ValueError(f"num_predict={num_predict} is a number and rate={rate} a share: give one of them")
    if min(masked, random) < 0.0 or masked + random > 1.0:
        raise ValueError(f"masked={masked} and random={random} are shares of one whole: they must be within [0, 1]")


def _words(is_special: np.ndarray, segment_ids: np.ndarray | None, word_ids: np.ndarray | None) -> np.ndarray:
    """The index of each token's word in its row, [B, T], from 0. A special token is a word by itself."""
    is_first = np.ones(is_special.shape, bool)
    is_first[:, 0] = False
    if word_ids is not None:
        is_first[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | is_special[:, 1:] | is_special[:, :-1]
        if segment_ids is not None:
            is_first[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.cumsum(is_first, axis=1)


def _select_words(is_special: np.ndarray, words: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are selected, [B, T] bool: whole words in random order, except those that would exceed ``limit``."""
    selected = np.zeros(is_special.shape, bool)
    for row, (row_special, row_words) in enumerate(zip(is_special, words, strict=True)):
        sizes, remaining = np.bincount(row_words, ~row_special).astype(int), limit
        for word in rng.permutation(np.flatnonzero(sizes)):
            if sizes[word] <= remaining:
                selected[row] |= (row_words == word) & ~row_special
                remaining -= sizes[word]
    return selected

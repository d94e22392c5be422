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
MOST_FREQUENT_SHARE = 0.156
"""Share of the most frequent character, the space, in the test part."""
_LENGTH = 3_258_226
"""Number of characters of the novel, without the byte order mark. In one copy of the file, another text follows."""
_SHA256 = "6c598f349d92e16fcf8e29b3328be35c30b814bc0f2bfacf29a429700d9c3141"
_VOCAB_SIZE = 83
"""Number of distinct characters."""
_ROWS, _CONTEXT = 50, 100


def read(path: Path) -> str:
    """The novel, from the file of Karpathy et al. 2015 or its ``.gz``. A text after the novel is left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is another file.
    """
    text = read_text(path)[:_LENGTH]
    if hashlib.sha256(text.encode()).hexdigest() != _SHA256:
        raise ValueError(f"{path} is not War and Peace as in Karpathy et al. 2015: use the file {URL}")
    return text


def cases(text: str | None) -> dict[str, Case]:
    """A case for each number of layers: the models predict the next character.

    The text is split into 80 % for training, 10 % for validation and 10 % for the test, as in the paper.

    Args:
        text: the result of :func:`read`; None: the cases cannot draw batches.
    """

    @functools.cache
    def parts() -> tuple[np.ndarray, ...]:
        if text is None:
            raise ValueError(f"the experiment has no text: download {URL}, and add --war-and-peace FILE")
        training, rest = split_tokens(CharTokenizer.from_text(text).encode(text), 0.2)
        return training, *split_tokens(rest, 0.5)

    def sample(part: int, rng: np.random.Generator) -> Batch:
        tokens = parts()[part]
        starts = rng.integers(0, len(tokens) - _CONTEXT, _ROWS)
        return causal.batch(np.stack([tokens[start : start + _CONTEXT + 1] for start in starts]))

    training, validation, test = (functools.partial(sample, part) for part in range(3))
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

"""``jaxlm classify``: labels of texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlm.cli.common import Directory, Texts, load, read_texts, split_pairs
from jaxlm.tasks.predict import classify


@dataclasses.dataclass(frozen=True)
class Classify:
    """Classify texts: prints the most probable label of each and its probability, separated by a tab."""

    directory: Directory
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    texts: Texts = ()
    """Texts, or pairs TEXT<tab>TEXT. Without any (and without --file), the lines of standard input."""
    file: Path | None = None
    """File with one text (or pair) a line."""
    all: bool = False
    """Print every label with its probability, the most probable first."""
    batch_size: int = 32
    """Texts that are read together."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Print one line for each text."""
        model, params, tokenizer = load(self.directory, self.dtype)
        texts, pairs = split_pairs(read_texts(self.texts, self.file))
        found = classify(model, params, tokenizer, texts, pairs, batch_size=self.batch_size)
        for probabilities in found.probabilities:
            order = (-probabilities).argsort(kind="stable")[: None if self.all else 1].tolist()
            names = [str(i) if found.names is None else found.names[i] for i in order]
            print("\t".join(f"{name}\t{probabilities[i]:.4f}" for name, i in zip(names, order, strict=True)))
        return 0

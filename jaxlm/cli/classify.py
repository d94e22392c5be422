"""``jaxlm classify``: text classification."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlm.cli.common import ModelCommand, Texts, read_texts, split_pairs
from jaxlm.data.text_files import escape_field
from jaxlm.tasks.predict import classify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(ModelCommand):
    """Classify texts. Prints the most probable label of each text and its probability, separated by a tab.

    If the model has no label names, the ids of the labels are printed. In a label name, a line break is printed as \\n,
    a tab as \\t and a backslash as \\\\.
    """

    texts: Texts = ()
    """Texts, or pairs TEXT<tab>TEXT. Without texts and --file, standard input is read: one text (or pair) per line.
    Messages count the texts from 0."""
    file: Path | None = None
    """File with one text (or pair) per line."""
    all: bool = False
    """Print all labels with their probabilities, in descending order of probability."""
    batch_size: int = 32
    """Texts per batch."""

    def run(self) -> int:
        """Print one line per text and return the exit status."""
        model, params, tokenizer = self.load()
        texts, pairs = split_pairs(read_texts(self.texts, self.file))
        result = classify(model, params, tokenizer, texts, pairs, batch_size=self.batch_size)
        for probabilities in result.probabilities:
            order = (-probabilities).argsort(kind="stable")[: None if self.all else 1].tolist()
            names = [str(i) if result.names is None else escape_field(result.names[i]) for i in order]
            print("\t".join(f"{name}\t{probabilities[i]:.4f}" for name, i in zip(names, order, strict=True)))
        return 0

"""``jaxlm score``: likelihoods of texts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from jaxlm.cli.common import Directory, Texts, load, read_texts, split_pairs
from jaxlm.decoding.describe import describe
from jaxlm.tasks.predict import score_texts


@dataclasses.dataclass(frozen=True)
class Score:
    """Score texts: prints log-likelihood (nats), number of tokens and perplexity of each, separated by tabs."""

    directory: Directory
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    texts: Texts = ()
    """Texts; SOURCE<tab>TARGET for an encoder-decoder. Without any (and without --file), lines of standard input."""
    file: Path | None = None
    """File with one text (or SOURCE<tab>TARGET) a line."""
    batch_size: int = 32
    """Texts that are scored together."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Print one line for each text."""
        model, params, tokenizer = load(self.directory, self.dtype)
        texts, sources = read_texts(self.texts, self.file), None
        if model.reads_source:
            sources, targets = split_pairs(texts)
            if targets is None:
                raise ValueError(f"this is {describe(model)}: it scores targets, give each as SOURCE<tab>TARGET")
            texts = targets
        scores = score_texts(model, params, tokenizer, texts, sources, batch_size=self.batch_size)
        for total, count in zip(scores.log_likelihoods.tolist(), scores.num_tokens.tolist(), strict=True):
            print(f"{total:.4f}\t{count}\t{math.exp(-total / count):.4f}")
        return 0

"""``jaxlm score``: log-likelihoods of texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlm.cli.common import ModelCommand, Texts, read_texts, split_pairs
from jaxlm.decoding.describe import describe
from jaxlm.decoding.score import perplexity_of
from jaxlm.tasks.predict import score_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(ModelCommand):
    """Score texts. Prints for each text, separated by tabs: log-likelihood (nats), number of scored tokens, perplexity.

    The perplexity is exp(-log-likelihood / number of tokens). A causal model does not score the first token of a text.
    An encoder-decoder scores all tokens of the target, and the end token if the tokenizer has one.
    """

    texts: Texts = ()
    """Texts; SOURCE<tab>TARGET for an encoder-decoder.
    Without texts and --file, standard input is read: one text (or pair) per line. Messages count the texts from 0."""
    file: Path | None = None
    """File with one text (or SOURCE<tab>TARGET) per line."""
    batch_size: int = 32
    """Texts per batch."""

    def run(self) -> int:
        """Print one line per text and return the exit status."""
        model, params, tokenizer = self.load()
        texts, sources = read_texts(self.texts, self.file), None
        if model.reads_source:
            sources, targets = split_pairs(texts)
            if targets is None:
                raise ValueError(f"this is {describe(model)}: it scores targets, so give SOURCE<tab>TARGET")
            texts = targets
        scores = score_texts(model, params, tokenizer, texts, sources, batch_size=self.batch_size)
        for total, count in zip(scores.log_likelihoods.tolist(), scores.num_tokens.tolist(), strict=True):
            print(f"{total:.4f}\t{count}\t{perplexity_of(-total / count):.4f}")
        return 0

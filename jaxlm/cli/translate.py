"""``jaxlm translate`` and ``jaxlm summarize``: outputs of an encoder-decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax

from jaxlm.cli.common import Directory, Texts, load, one_line, read_texts, sampling_options
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.decoding.describe import describe
from jaxlm.training.checks import check_beams


@dataclasses.dataclass(frozen=True)
class _SourceCommand:
    directory: Directory
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    texts: Texts = ()
    """Sources. Without any (and without --file), the lines of standard input."""
    file: Path | None = None
    """File with one source a line. Line breaks in the output are printed as \\n."""
    prefix: str = ""
    """Text before every source, e.g. "translate English to German: " for the published T5 models."""
    num_beams: int | None = None
    """Hypotheses of beam search; 1 generates token by token. Default: 5."""
    length_penalty: float | None = None
    """Exponent of the length by which the score of a hypothesis is divided: above 1 favours long outputs.
    Default: 1."""
    max_new_tokens: int | None = None
    """Tokens to generate at most for each source. Default: 128."""
    temperature: float | None = None
    """Above 0 draws at random instead of searching; needs --num-beams 1. Default: 0."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens only; 0 is all. Default: 0."""
    top_p: float | None = None
    """Draw from the likeliest tokens only that together have this probability. Default: 1."""
    batch_size: int = 32
    """Sources that are read together."""
    seed: int = 0
    """Seed of the draws."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    refused: ClassVar[str]

    def run(self) -> int:
        """Print one line for each source."""
        model, params, tokenizer = load(self.directory, self.dtype)
        if not model.reads_source:
            raise ValueError(
                f"this is {describe(model)}: it reads no source, so it {self.refused} nothing; load an encoder-decoder "
                "(T5, attention RNN), or continue prompts with jaxlm generate"
            )
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, length_penalty=self.length_penalty,
            batch_size=self.batch_size,
        ).resolve(
            model, tokenizer, default=GenerationConfig(num_beams=5),
            sampling=sampling_options(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p),
        )  # fmt: skip
        check_beams(model, tokenizer, config)
        sources = [self.prefix + text for text in read_texts(self.texts, self.file)]
        for text in generate_text(model, params, tokenizer, sources, config, key=jax.random.key(self.seed)):
            print(one_line(text))
        return 0


@dataclasses.dataclass(frozen=True)
class Translate(_SourceCommand):
    """Translate texts: one line of output for each.

    An option that is not given is that of generation_config.json in DIR, or else the default in its help.
    """

    refused = "translates"


@dataclasses.dataclass(frozen=True)
class Summarize(_SourceCommand):
    """Summarize texts: one line of output for each.

    An option that is not given is that of generation_config.json in DIR, or else the default in its help.
    """

    refused = "summarizes"

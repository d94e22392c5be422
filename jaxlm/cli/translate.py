"""``jaxlm translate`` and ``jaxlm summarize``: text generation with an encoder-decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax

from jaxlm.cli.common import ModelCommand, Texts, generation_config, read_texts
from jaxlm.data.text_files import escape_line_breaks
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.decoding.describe import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SourceCommand(ModelCommand):
    texts: Texts = ()
    """Sources. If neither sources nor --file are given, standard input has one source per line.
    Messages count the sources from 0."""
    file: Path | None = None
    """File with one source per line."""
    prefix: str = ""
    """Text to put before every source, for example "translate English to German: " for the published T5 models."""
    num_beams: int | None = None
    """Number of beams; 1: no beam search. Default: 5."""
    length_penalty: float | None = None
    """The score of a beam is its log-probability divided by its length to this power, so a larger value favors longer
    outputs. Default: 1."""
    max_new_tokens: int | None = None
    """Maximum tokens to generate per source. Default: 128."""
    temperature: float | None = None
    """Sampling temperature. A value above 0 needs --num-beams 1; 0 means no sampling. Default: 0."""
    top_k: int | None = None
    """Number of most probable tokens to sample from; 0: all tokens. Default: 0."""
    top_p: float | None = None
    """Nucleus sampling: sample from the most probable tokens that together have this probability. Default: 1."""
    batch_size: int = 32
    """Sources per batch."""
    seed: int = 0
    """Seed for sampling."""

    verb: ClassVar[str]

    def run(self) -> int:
        """Print one line per source and return the exit status."""
        model, params, tokenizer = self.load()
        if not model.reads_source:
            raise ValueError(
                f"this is {describe(model)}: it reads no source, so it cannot {self.verb}; load an encoder-decoder "
                "(T5, attention RNN), or continue prompts with jaxlm generate"
            )
        config = generation_config(self, model, tokenizer, GenerationConfig(num_beams=5))
        sources = [self.prefix + text for text in read_texts(self.texts, self.file)]
        for text in generate_text(model, params, tokenizer, sources, config, key=jax.random.key(self.seed)):
            print(escape_line_breaks(text))
        return 0


@dataclasses.dataclass(frozen=True)
class Translate(_SourceCommand):
    """Translate texts. Prints one line per text, with a line break as \\n and a backslash as \\\\.

    If num-beams, length-penalty, max-new-tokens or a sampling option is not given, its value is read from
    generation_config.json of the model. If there is no such file, the value is read from config.json. If the file turns
    on sampling with do_sample, sampling options that are missing in the file have the defaults of transformers, which
    are temperature 1 and top-k 50. All other missing options have the defaults below.
    """

    verb = "translate"


@dataclasses.dataclass(frozen=True)
class Summarize(_SourceCommand):
    """Summarize texts. Prints one line per text, with a line break as \\n and a backslash as \\\\.

    If num-beams, length-penalty, max-new-tokens or a sampling option is not given, its value is read from
    generation_config.json of the model. If there is no such file, the value is read from config.json. If the file turns
    on sampling with do_sample, sampling options that are missing in the file have the defaults of transformers, which
    are temperature 1 and top-k 50. All other missing options have the defaults below.
    """

    verb = "summarize"

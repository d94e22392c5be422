"""``jaxlm generate``: continue prompts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax

from jaxlm.cli.common import Directory, Texts, load, one_line, read_texts, sampling_options
from jaxlm.decoding import GenerationConfig, Sampling, generate_text, stream_text
from jaxlm.decoding.describe import describe
from jaxlm.training.checks import check_beams


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts: a single one token by token on the terminal, several as one line each.

    An option that is not given is that of generation_config.json in DIR, or else the default in its help.
    """

    directory: Directory
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    texts: Texts = ()
    """Prompts. Without any (and without --prompt and --file), the lines of standard input."""
    prompt: str | None = None
    """Text to continue, like a single TEXT."""
    file: Path | None = None
    """File with one prompt a line. Line breaks in the output are printed as \\n."""
    max_new_tokens: int | None = None
    """Tokens to generate at most. Default: 500."""
    temperature: float | None = None
    """Below 1 more probable, above more surprising; 0 always takes the likeliest token. Default: 0.8."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens; 0 keeps all. Default: 0."""
    top_p: float | None = None
    """Keep only the likeliest tokens that together have this probability. Default: 1."""
    min_p: float | None = None
    """Keep only tokens at least this likely, relative to the likeliest. Default: off."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were already there less likely. Default: 1."""
    num_beams: int | None = None
    """Hypotheses of beam search; 1 generates token by token. Default: 1."""
    stop: tuple[str, ...] | None = None
    """Stop at the first of these strings. Default: none."""
    batch_size: int = 32
    """Prompts that are continued together."""
    seed: int = 0
    """Seed of the draws."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Print each prompt and its continuation."""
        if (self.prompt is not None) + bool(self.texts) + (self.file is not None) > 1:
            raise ValueError("give --prompt, texts or --file, only one of them")
        given = self.texts if self.prompt is None else (self.prompt,)
        model, params, tokenizer = load(self.directory, self.dtype)
        if model.reads_source:
            raise ValueError(
                f"this is {describe(model)}: it reads a source and continues nothing; use jaxlm translate or summarize"
            )
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, stop=self.stop, batch_size=self.batch_size
        ).resolve(
            model, tokenizer, default=GenerationConfig(500, Sampling(temperature=0.8)),
            sampling=sampling_options(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            ),
        )  # fmt: skip
        check_beams(model, tokenizer, config)
        key = jax.random.key(self.seed)
        prompts = list(given) if given else read_texts((), self.file)
        if len(given) != 1 or config.num_beams != 1:
            texts = generate_text(model, params, tokenizer, prompts, config, key=key)
            for prompt, text in zip(prompts, texts, strict=True):
                print(one_line(prompt + text) if len(given) != 1 else prompt + text)
            return 0
        pieces = stream_text(model, params, tokenizer, prompts[0], config, key=key)
        sys.stdout.write(prompts[0])
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0

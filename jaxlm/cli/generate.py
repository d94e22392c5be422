"""``jaxlm generate``: text generation from prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from jaxlm.cli.common import ModelCommand, Texts, generation_config, load_draft, read_texts
from jaxlm.data.text_files import escape_line_breaks
from jaxlm.decoding import GenerationConfig, Sampling, generate_text, stream_text
from jaxlm.decoding.describe import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand):
    """Generate text from prompts. Prints each prompt with its continuation.

    With one prompt on the command line, the text is printed while it is generated. With beam search or a draft model,
    it is printed when it is complete. With several prompts, or prompts from a file or standard input, each text is
    printed on one line, with a line break as \\n and a backslash as \\\\.

    If max-new-tokens, a sampling option, num-beams or stop is not given, its value is read from generation_config.json
    of the model. If there is no such file, the value is read from config.json. If the file turns on sampling with
    do_sample, sampling options that are missing in the file have the defaults of transformers (temperature 1 and top-k
    50). All other missing options have the defaults below.
    """

    texts: Texts = ()
    """Prompts. If neither prompts nor --file are given, standard input has one prompt per line.
    Messages count the prompts from 0."""
    prompt: str | None = None
    """One prompt; the same as a single TEXT."""
    file: Path | None = None
    """File with one prompt per line. In the output, a line break is printed as \\n and a backslash as \\\\."""
    max_new_tokens: int | None = None
    """Maximum tokens to generate. Default: 500."""
    temperature: float | None = None
    """Sampling temperature. A value below 1 sharpens the distribution, a value above 1 flattens it; 0 is greedy.
    Default: 0.8, but 0 with beam search."""
    top_k: int | None = None
    """Number of most probable tokens to sample from; 0: all tokens. Default: 0."""
    top_p: float | None = None
    """Nucleus sampling: sample from the most probable tokens that together have this probability. Default: 1."""
    min_p: float | None = None
    """Sample only from tokens whose probability is at least min_p times the highest probability; 0: off. Default: 0."""
    repetition_penalty: float | None = None
    """A value above 1 makes tokens that already occur in the text less probable. Default: 1."""
    num_beams: int | None = None
    """Number of beams; 1: no beam search. Default: 1."""
    stop: tuple[str, ...] | None = None
    """End the text before the first occurrence of one of these strings. Default: none."""
    batch_size: int = 32
    """Prompts per batch."""
    draft: Path | None = None
    """Directory of a smaller model with the same tokenizer, which proposes tokens (speculative decoding). The prompt,
    the new tokens and num-proposed - 1 more tokens must fit into the positions of both models."""
    num_proposed: int | None = None
    """Number of tokens that the draft model proposes in each round. Default: 4."""
    seed: int = 0
    """Seed for sampling."""

    def run(self) -> int:
        """Print each prompt with its continuation and return the exit status."""
        if (self.prompt is not None) + bool(self.texts) + (self.file is not None) > 1:
            raise ValueError("give only one of --prompt, texts and --file")
        if self.num_proposed is not None and self.draft is None:
            raise ValueError(f"--num-proposed {self.num_proposed} needs --draft, the directory of a draft model")
        arguments = self.texts if self.prompt is None else (self.prompt,)
        model, params, tokenizer = self.load()
        if model.reads_source:
            raise ValueError(
                f"this is {describe(model)}: it reads a source, so it cannot continue a prompt; use jaxlm "
                "translate or summarize"
            )
        config = generation_config(self, model, tokenizer, GenerationConfig(500, Sampling(temperature=0.8)))
        key = jax.random.key(self.seed)
        prompts = read_texts(arguments, self.file)
        draft = None if self.draft is None else load_draft(self.draft, self.dtype, tokenizer, prompts)
        if len(arguments) != 1 or config.num_beams != 1 or draft is not None:
            texts = generate_text(
                model, params, tokenizer, prompts, config, key=key, draft=draft, num_proposed=self.num_proposed
            )
            for prompt, text in zip(prompts, texts, strict=True):
                print(escape_line_breaks(prompt + text) if len(arguments) != 1 else prompt + text)
            return 0
        pieces = stream_text(model, params, tokenizer, prompts[0], config, key=key)
        print(prompts[0], end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0

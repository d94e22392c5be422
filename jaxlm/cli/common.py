"""Options and functions of several subcommands: load a model, and read texts from the command line or a file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxlm.data.text_files import check_no_surrogate, decode_pieces, read_lines, split_lines
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import GenerationConfig, Sampling
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.loading import load

Texts = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCommand:
    """The options of all commands that load a model."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A run directory (written by an experiment), or a directory in Hugging Face layout with a model and its
    tokenizer."""
    dtype: str | None = None
    """Compute dtype, for example bfloat16; None: the dtype of the model's config."""

    def load(self) -> tuple[Model, Params, Tokenizer]:
        """The model, its parameters and its tokenizer."""
        return load(self.directory, self.dtype)


def load_draft(directory: Path, dtype: str | None, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Model, Params]:
    """The draft model for speculative decoding and its parameters.

    Args:
        tokenizer: the tokenizer of the target model.
        texts: the prompts.

    Raises:
        ValueError: the tokenizer of the draft model and ``tokenizer`` have different vocabulary sizes, or encode one of
            ``texts`` differently.
    """
    model, params, draft_tokenizer = load(directory, dtype)
    same_size = tokenizer.vocab_size == draft_tokenizer.vocab_size
    if not same_size or any(not np.array_equal(tokenizer.encode(x), draft_tokenizer.encode(x)) for x in texts):
        raise ValueError(
            f"the tokenizer of the draft model {directory} differs from that of the target model: use a draft model "
            "that was trained with the same tokenizer"
        )
    return model, params


def generation_config(
    command: ModelCommand, model: Model, tokenizer: Tokenizer, default: GenerationConfig
) -> GenerationConfig:
    """The settings of text generation: the options of ``command`` that are fields of the settings, or their defaults.

    Args:
        default: the defaults of the command (see :meth:`GenerationConfig.resolve`).
    """

    def options(kind: type[GenerationConfig] | type[Sampling]) -> dict[str, Any]:
        return {
            field.name: vars(command)[field.name] for field in dataclasses.fields(kind) if field.name in vars(command)
        }

    config = GenerationConfig(**options(GenerationConfig))
    return config.resolve(model, tokenizer, default=default, sampling=options(Sampling))


STANDARD_INPUT = "standard input"


def standard_input() -> str:
    """The text of standard input, read with the rules of :mod:`jaxlm.data.text_files`.

    Raises:
        ValueError: the input is not UTF-8.
    """
    return "".join(decode_pieces([sys.stdin.buffer.read(), b""], STANDARD_INPUT))


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The texts from the command line, the lines of the file, or the lines of standard input.

    Raises:
        ValueError: both texts and a file are given, a text has a surrogate (Python's replacement for a byte of the
            command line that is not UTF-8), a line is empty, there is no line, or the input is not UTF-8.
    """
    if texts and file is not None:
        raise ValueError("give texts or --file, not both")
    if texts:
        for number, text in enumerate(texts):
            check_no_surrogate(text, f"text {number}")
        return list(texts)
    name = STANDARD_INPUT if file is None else str(file)
    lines = [line for _, line in (split_lines([standard_input()]) if file is None else read_lines(file))]
    if not lines:
        raise ValueError(f"{name} is empty: give one text per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"line {number} of {name} is empty: every line must have a text")
    return lines


def split_pairs(texts: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The texts before the tabs and the texts after the tabs. Without tabs: the texts and None.

    Raises:
        ValueError: the texts have different numbers of tabs, or a text has more than one tab.
    """
    rows = [text.split("\t") for text in texts]
    for number, row in enumerate(rows):
        if len(row) > 2:
            raise ValueError(f"text {number} has {len(row) - 1} tabs: give at most one, TEXT<tab>TEXT")
        if len(row) != len(rows[0]):
            raise ValueError(
                f"text {number} has {len(row) - 1} tabs and text 0 has {len(rows[0]) - 1}: give all texts alone, or "
                "each as TEXT<tab>TEXT"
            )
    return [row[0] for row in rows], [row[1] for row in rows] if len(rows[0]) == 2 else None

"""Load a trained model with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.interop.huggingface import load_pretrained
from jaxlm.models import Model
from jaxlm.training.checks import check_tokenizer


def load(directory: str | Path, dtype: str | None = None) -> tuple[Model, Any, Tokenizer]:
    """The model, its parameters and its tokenizer from a run directory or a directory in Hugging Face layout.

    Args:
        directory: if it has a subdirectory ``model``, the files are read from this subdirectory.
        dtype: compute dtype, for example bfloat16. None: the dtype of the model's config.

    Raises:
        FileNotFoundError: the directory is a run that has not finished, so it has no exported model.
        FileNotFoundError, ImportError, ValueError: as in ``load_pretrained`` and ``load_tokenizer``.
        ValueError: the vocabulary sizes of tokenizer and model do not match, as in
            ``jaxlm.training.checks.check_tokenizer``.
    """
    run = Path(directory)
    directory = run / "model" if (run / "model").is_dir() else run
    if directory != run and (run / "config.json").exists() and not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{run} has no exported model yet: wait until the training ends, or resume it if it was interrupted"
        )
    overrides: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model, params = load_pretrained(directory, **overrides)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(model, tokenizer)
    return model, params, tokenizer

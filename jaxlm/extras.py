"""The extras of the package: groups of optional packages, such as ``chess``, that ``pyproject.toml`` defines."""

from __future__ import annotations

import importlib
from typing import Any


def install_command(extra: str) -> str:
    """A text for messages: the command that installs an extra, and the directory in which to run the command.

    The directory is a clone of the repository, because jaxlm is not on PyPI.

    Example:
        >>> install_command("chess")
        "pip install -e '.[chess]' in the clone of jaxlm"
    """
    return f"pip install -e '.[{extra}]' in the clone of jaxlm"


def import_optional(module: str, extra: str, needed_for: str) -> Any:
    """A module of an optional package.

    Args:
        extra: the extra that installs the package.
        needed_for: the first words of the message, for example "ROUGE needs rouge-score".

    Raises:
        ImportError: the package is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{needed_for}: {install_command(extra)}") from error

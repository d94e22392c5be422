"""The extras of the package: groups of optional packages, such as ``chess``, that ``pyproject.toml`` defines."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """A text for messages: the command that installs an extra, and the directory in which to run the command.

    The directory is a clone of the repository, because jaxlm is not on PyPI.

    Example:
        >>> install_command("chess")
        "pip install -e '.[chess]' in the clone of jaxlm"
    """
    return f"pip install -e '.[{extra}]' in the clone of jaxlm"

"""The extras of the package: groups of optional packages, such as ``chess``, that ``pyproject.toml`` defines."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command that installs an extra, for messages. The command is for a clone, because jaxlm is not on PyPI.

    Example:
        >>> install("chess")
        "pip install -e '.[chess]' in the clone of jaxlm"
    """
    return f"pip install -e '.[{extra}]' in the clone of jaxlm"

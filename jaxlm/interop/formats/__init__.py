"""The published formats of the families: the names of parameters and config fields in Hugging Face files.

The module ``jaxlm.interop.formats.NAME`` has the formats of the family NAME in a tuple ``FORMATS``. A family without
such a module has no published format, and ``save_pretrained`` writes jaxlm's own names. A registered family
(``jaxlm.register_family``) has its formats in an attribute ``FORMATS``. A module or a registered family may have a
tuple ``UNPUBLISHED_FIELDS`` with the config fields that no published format has. ``save_pretrained`` also writes
jaxlm's own names if one of these fields does not have its default value.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from jaxlm.interop.formats.format import Format, Layout
from jaxlm.models.registry import FAMILIES
from jaxlm.models.registry import family as family_module

__all__ = ["Format", "Layout", "of", "unpublished_fields"]


@functools.cache
def of(family: str) -> tuple[Format, ...]:
    """The published formats of a family, in the order in which they are tried; empty if the family has no format.

    Example:
        >>> [table.model_type for table in of("gpt")]
        ['gpt2', 'openai-gpt']
    """
    return tuple(getattr(_module(family), "FORMATS", ()))


def unpublished_fields(family: str) -> tuple[str, ...]:
    """The config fields that no published format of the family has; ``()`` if there are none."""
    return tuple(getattr(_module(family), "UNPUBLISHED_FIELDS", ()))


def _module(family: str) -> Any:
    """The module or object with the formats of a family; None if it has no published format."""
    if family not in FAMILIES:
        return family_module(family)
    name = f"{__name__}.{family}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)

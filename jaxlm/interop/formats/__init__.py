"""The published formats of the families: the names of parameters and config fields in Hugging Face files.

A published format has the tensor names of published files, which are in most cases the names in transformers. The
module ``jaxlm.interop.formats.NAME`` has the published formats of the family NAME in a tuple ``FORMATS``. A registered
family (``jaxlm.register_family``) has its published formats in an attribute ``FORMATS``.

``save_pretrained`` writes jaxlm's own names if the family has no published format that can represent the model. A
published format cannot represent a model if it has no class with the ``task`` of the model, or no value for another
field of the config.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from jaxlm.interop.formats.format import Format, Layout
from jaxlm.models.registry import FAMILIES
from jaxlm.models.registry import family as family_module

__all__ = ["Format", "Layout", "of"]


def of(family: str) -> tuple[Format, ...]:
    """The published formats of a family, in the order in which ``save_pretrained`` tries them; empty if there are none.

    Example:
        >>> [table.model_type for table in of("gpt")]
        ['gpt2', 'openai-gpt']
    """
    return tuple(getattr(_module(family), "FORMATS", ()))


def _module(family: str) -> Any:
    """The module, or the registered object, with the formats of a family; None if there is no such module."""
    if family not in FAMILIES:
        return family_module(family)
    name = f"{__name__}.{family}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)

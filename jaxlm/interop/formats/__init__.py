"""The published formats of the families: the names of parameters and config fields in Hugging Face files.

The module ``jaxlm.interop.formats.NAME`` has the formats of the family NAME in a tuple ``FORMATS``. A family without
such a module has no published format, and ``save_pretrained`` writes jaxlm's own names. A registered family
(``jaxlm.register_family``) has its formats in an attribute ``FORMATS``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

from jaxlm.interop.formats.format import TRANSPOSED, Format, Layout
from jaxlm.models.registry import FAMILIES
from jaxlm.models.registry import family as family_module

__all__ = ["TRANSPOSED", "Format", "Layout", "of"]


@functools.cache
def of(family: str) -> tuple[Format, ...]:
    """The published formats of a family, in the order in which they are tried; empty if the family has no format.

    Example:
        >>> [table.model_type for table in of("gpt")]
        ['gpt2', 'openai-gpt']
    """
    if family not in FAMILIES:
        return tuple(getattr(family_module(family), "FORMATS", ()))
    module = f"{__name__}.{family}"
    if importlib.util.find_spec(module) is None:
        return ()
    return importlib.import_module(module).FORMATS

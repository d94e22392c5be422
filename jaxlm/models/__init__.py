"""Families, one file each, and the table that names them.

A family is a module with ``Config``, ``specs``, ``apply``, ``logits``, ``VARIANTS`` and, when it carries something
between calls, ``state_specs``. To add one: write its file and put its name in :data:`FAMILIES`.
"""

from jaxlm.models.model import FAMILIES, Model, get_model, variant_names

__all__ = ["FAMILIES", "Model", "get_model", "variant_names"]

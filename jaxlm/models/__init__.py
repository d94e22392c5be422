"""The families, one module each, and ``get_model``, which finds them by name.

A family is a module with ``Config``, ``specs``, ``apply``, ``logits``, ``VARIANTS`` and, if it carries state between
calls, ``state_specs``. To add a family, write its module and add its name to :data:`FAMILIES`.
"""

from jaxlm.models.model import FAMILIES, Model, get_model, variant_names

__all__ = ["FAMILIES", "Model", "get_model", "variant_names"]

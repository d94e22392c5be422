"""The model families, one module each, and ``get_model``, which makes a model of a family or variant by name.

A family is a module with ``Config``, ``specs``, ``apply`` and ``logits``. Other attributes are optional, such as
``VARIANTS``, ``state_specs`` (for a family that carries state between calls) and ``pool`` (for a family that classifies
texts). ``register_family`` adds a family of another package.
"""

from jaxlm.models.model import Model, get_model
from jaxlm.models.registry import FAMILIES, family_names, register_family, variant_names

__all__ = ["FAMILIES", "Model", "family_names", "get_model", "register_family", "variant_names"]

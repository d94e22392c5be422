"""jaxlm: language models as pure functions in JAX. Start with docs/tour.md."""

from jaxlm.models import Model, get_model

__all__ = ["Model", "get_model"]
__version__ = "0.1.0"

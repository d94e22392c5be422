"""jaxlm: language models as pure functions in JAX. Start with docs/tour.md."""

from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import Model, get_model, register_family

__all__ = ["Model", "get_model", "load_pretrained", "register_family", "save_pretrained"]
__version__ = "0.2.0"

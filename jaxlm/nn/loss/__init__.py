"""Cross entropy over a vocabulary: the definition, and versions that compute the logits of some positions at a time."""

from jaxlm.nn.loss.chunked import chunked_argmax, chunked_cross_entropy
from jaxlm.nn.loss.cross_entropy import Head, cross_entropy
from jaxlm.nn.loss.selected import selected_cross_entropy

__all__ = ["Head", "chunked_argmax", "chunked_cross_entropy", "cross_entropy", "selected_cross_entropy"]

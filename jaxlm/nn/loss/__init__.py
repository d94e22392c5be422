"""Cross entropy over a vocabulary: the definition, and forms that never hold the logits of all positions."""

from jaxlm.nn.loss.chunked import chunked_argmax, chunked_cross_entropy
from jaxlm.nn.loss.cross_entropy import Head, cross_entropy
from jaxlm.nn.loss.selected import selected_cross_entropy

__all__ = ["Head", "chunked_argmax", "chunked_cross_entropy", "cross_entropy", "selected_cross_entropy"]

"""Attention: one function with several implementations. Also masks, biases, caches and memories."""

from jaxlm.nn.attention.api import Implementation, attention

__all__ = ["Implementation", "attention"]

"""Convolutions over time (full and depthwise), their weight normalization, and pooling."""

from jaxlm.nn.convolution.depthwise import (
    causal_depthwise_convolution,
    depthwise_convolution,
    depthwise_convolution_specs,
)
from jaxlm.nn.convolution.full import causal_convolution, convolution, convolution_specs
from jaxlm.nn.convolution.weight_norm import weight_norm, weight_norm_specs

__all__ = [
    "causal_convolution",
    "causal_depthwise_convolution",
    "convolution",
    "convolution_specs",
    "depthwise_convolution",
    "depthwise_convolution_specs",
    "weight_norm",
    "weight_norm_specs",
]

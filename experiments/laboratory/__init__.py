"""The laboratory: published comparisons of architectures, repeated with the causal families."""

"""The laboratory: published comparisons of architectures, repeated with all causal families."""

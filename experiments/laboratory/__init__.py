"""The laboratory: published comparisons of architectures, repeated with the models of jaxlm."""

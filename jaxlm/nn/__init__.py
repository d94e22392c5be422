"""Primitives: pure functions of arrays, one concept per file. Import the file: ``from jaxlm.nn import attention``."""

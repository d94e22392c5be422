"""Primitives: pure functions of arrays, one concept a file. Import the file: ``from jaxlm.nn import attention``."""

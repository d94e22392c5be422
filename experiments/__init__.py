"""Runnable results: one module, one claim. ``python -m experiments.NAME --help``."""

"""Experiments that train and test a model, one per module. See ``python -m experiments.NAME --help``."""

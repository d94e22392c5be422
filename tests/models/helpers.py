"""Functions that the tests of several families share."""

import json
from pathlib import Path

from jaxlm.interop.huggingface import save_pretrained
from jaxlm.testing.helpers import add_noise, initial_params, random_tokens, tiny_model


def setup(name, batch=2, length=12, **overrides):
    """The tiny model, its initial parameters with noise, and random tokens [batch, length]."""
    model = tiny_model(name, **overrides)
    return model, add_noise(initial_params(model)), random_tokens(model, batch, length)


def save_with_fields(directory: Path, variant: str, **fields) -> Path:
    """Save a tiny model and change fields of its ``config.json`` (``...`` removes a field). Returns the directory."""
    model = tiny_model(variant)
    save_pretrained(directory, model, initial_params(model))
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return directory

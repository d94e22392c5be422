"""The Hugging Face classes that the published formats name, and a small model of each."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.interop import formats
from jaxlm.interop.formats import Format
from jaxlm.models import FAMILIES, Model
from jaxlm.models.model import Metadata
from tests.helpers import tiny_model

CLASSES = [
    (name, table, architecture)
    for name in FAMILIES
    for table in formats.of(name)
    for architecture in table.architectures
]


def tiny(name: str, table: Format, architecture: str) -> Model:
    """A small model that this class holds, with its own number of labels."""
    model = tiny_model(name)
    fixed = {field: value for field, value in table.implied.items() if field not in table.fields}
    config = dataclasses.replace(model.config, **{**fixed, **table.architectures[architecture]})
    if table.model_type == "mistral":
        config = dataclasses.replace(config, window=4)
    if getattr(config, "task", "") in ("classification", "token_classification"):
        config = dataclasses.replace(config, num_labels=3)
    # Some types can express the same models: the loaded one is kept.
    loaded: dict[str, Any] = {"model_type": table.model_type}
    if name == "t5":  # a loaded config without it is saved without it, and then transformers generates nothing
        loaded["decoder_start_token_id"] = config.decoder_start_id
    return Model(name, config, Metadata(config=loaded))

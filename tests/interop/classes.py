"""The classes of all published formats, and a small model for each class."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.interop import formats
from jaxlm.interop.formats import Format
from jaxlm.models import FAMILIES, Model
from jaxlm.models.model import Metadata
from jaxlm.testing.helpers import tiny_model

CLASSES = [
    (name, table, architecture)
    for name in FAMILIES
    for table in formats.of(name)
    for architecture in table.architectures
]


TRANSFORMERS_CLASSES = [case for case in CLASSES if case[0] != "rwkv7"]
"""The classes that transformers has."""


def declare_tied_head(torch_model: Any) -> None:
    """Declare the tied head of a Mamba-2 or xLSTM. Without it, transformers 4.57 raises an error when it saves."""
    if torch_model.config.model_type in ("mamba2", "xlstm") and torch_model.config.tie_word_embeddings:
        torch_model._dynamic_tied_weights_keys = ["lm_head.weight"]


def model_of_class(name: str, table: Format, architecture: str) -> Model:
    """A small model for this class. A classifier has 3 labels."""
    model = tiny_model({"bamba": "bamba-tiny", "falcon_h1": "falcon-h1-tiny"}.get(table.model_type, name))
    implied_fields = {
        field: value for field, value in table.default_fields.items() if field not in table.hf_name_of_field
    }
    config = dataclasses.replace(model.config, **{**implied_fields, **table.architectures[architecture]})
    if table.model_type in ("mixtral", "qwen3_moe", "qwen3_next"):
        config = dataclasses.replace(config, num_experts=3)
    if table.model_type in ("qwen3_moe", "qwen3_next"):
        config = dataclasses.replace(config, experts_per_token=1, expert_dim=20, dense_layers=(0,), head_dim=8)
    if table.model_type == "qwen3_next":
        config = dataclasses.replace(config, shared_expert_dim=12)
    if table.model_type == "mistral":
        config = dataclasses.replace(config, window=4)
    if getattr(config, "task", "") in ("classification", "token_classification"):
        config = dataclasses.replace(config, num_labels=3)
    # Several model types can describe the same config. The metadata says which type to write.
    loaded_config: dict[str, Any] = {"model_type": table.model_type}
    if (
        name == "t5"
    ):  # a field that a loaded config lacks is not written, and without this field transformers cannot generate
        loaded_config["decoder_start_token_id"] = config.decoder_start_id
    if table.model_type == "smollm3":  # its default ids are outside the small vocabulary
        loaded_config |= dict.fromkeys(table.token_ids)
    return Model(name, config, Metadata(config=loaded_config))

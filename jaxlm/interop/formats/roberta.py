"""Formats of :mod:`jaxlm.models.roberta`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.bert import BERT
from jaxlm.interop.formats.format import classes, module_tensors
from jaxlm.models.roberta import FIRST_POSITION, Config


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    rows = config.get("max_position_embeddings", 512)
    if type(rows) is not int or rows <= FIRST_POSITION:
        raise ValueError(f"max_position_embeddings={rows!r} must be an integer above {FIRST_POSITION}")
    return {"max_positions": rows - FIRST_POSITION}


def _write_fields(cfg: Config) -> dict[str, Any]:
    assert BERT.write_fields is not None
    if cfg.vocab_size < FIRST_POSITION:
        raise ValueError(f"model_type='roberta' has the padding id {FIRST_POSITION - 1}: set vocab_size above it")
    return {**BERT.write_fields(cfg), "max_position_embeddings": cfg.max_positions + FIRST_POSITION}


_ROBERTA = dataclasses.replace(
    BERT,
    architectures=classes("Roberta", "masked", "none", "classification", "token_classification", "span_qa"),
    model_type="roberta",
    prefix="roberta.",
    hf_name_of_field={name: hf_name for name, hf_name in BERT.hf_name_of_field.items() if name != "max_positions"},
    # The defaults of transformers' config class. The published models have norm_epsilon=1e-5 and num_token_types=1.
    default_fields={**BERT.default_fields, "norm_epsilon": 1e-12, "num_token_types": 2},
    read_fields=_read_fields,
    write_fields=_write_fields,
    jaxlm_value_of={"hidden_act": {"gelu": "gelu"}},  # only gelu, because the head in transformers always uses gelu
    required={**BERT.required, "pad_token_id": FIRST_POSITION - 1},
    token_ids={"bos_token_id": 0, "eos_token_id": 2},
    unprefixed_tensors={
        "masked/bias": "lm_head.bias",
        **module_tensors("masked/", "lm_head.", dense="dense", norm="layer_norm"),
        **module_tensors("", "classifier.", classifier_dense="dense", classifier="out_proj"),
        **module_tensors("", "", token_classifier="classifier", span="qa_outputs"),
    },
    tied_tensors={"lm_head.decoder.weight": "token_embedding", "lm_head.decoder.bias": "masked/bias"},
)

FORMATS = (_ROBERTA,)

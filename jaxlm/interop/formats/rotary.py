"""Rotary positions in Hugging Face config files: the base of the frequencies, and their scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from jaxlm.nn.attention.rotary import RotaryScaling, ScalingKind

_HF_SCALING_FIELDS = {
    "factor": ("factor", get_args(ScalingKind)),
    "original_positions": ("original_max_position_embeddings", ("llama3", "yarn")),
    "low_frequency_factor": ("low_freq_factor", ("llama3",)),
    "high_frequency_factor": ("high_freq_factor", ("llama3",)),
    "beta_fast": ("beta_fast", ("yarn",)),
    "beta_slow": ("beta_slow", ("yarn",)),
    "truncate": ("truncate", ("yarn",)),
    "attention_factor": ("attention_factor", ("yarn",)),
}
"""Field of ``RotaryScaling`` -> its name in Hugging Face files, and the kinds of scaling that have this field."""


def read_rotary(config: Mapping[str, Any], fraction: float | None) -> dict[str, Any]:
    """The jaxlm config fields ``rotary_base``, ``rotary_fraction`` and ``rotary_scaling``, from ``config.json``.

    The fields are read from the JSON object ``rope_parameters`` (transformers 5). If this object is missing or empty,
    they are read from ``rope_scaling``. Fields that the object does not set are not in the result.

    Args:
        config: the contents of ``config.json``.
        fraction: the fraction of the head width that the family rotates. None: the family has the config field
            ``rotary_fraction``, so any fraction is allowed.

    Raises:
        ValueError: the kind of scaling, one of its fields or the fraction is not supported; a required field is
            missing; the fields ``rope_type`` and ``type`` differ; or ``rope_parameters`` or ``rope_scaling`` is not a
            JSON object.
    """
    fields: dict[str, Any] = {}
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    hf_scaling = config.get(name) or {}
    if not isinstance(hf_scaling, dict):
        raise ValueError(f"{name}={hf_scaling!r} must be a JSON object or null")
    hf_scaling = dict(hf_scaling)
    if "rope_theta" in hf_scaling:  # transformers 5 writes rope_theta into rope_parameters
        fields["rotary_base"] = hf_scaling.pop("rope_theta")
    if "partial_rotary_factor" in hf_scaling:
        factor = hf_scaling.pop("partial_rotary_factor")
        if fraction is None:
            fields["rotary_fraction"] = factor
        elif factor != fraction:
            raise ValueError(
                f"partial_rotary_factor={factor!r} in {name} must be {fraction}: this family has no other fraction"
            )
    given_kinds = [hf_scaling.pop(field) for field in ("rope_type", "type") if field in hf_scaling]
    if len(given_kinds) == 2 and given_kinds[0] != given_kinds[1]:
        raise ValueError(
            f"{name} has rope_type={given_kinds[0]!r} and type={given_kinds[1]!r}, two names of the same field: remove "
            "one of them"
        )
    kind: Any = given_kinds[0] if given_kinds else "default"
    if kind == "default":
        unused = [field for field, value in hf_scaling.items() if value is not None]
        if unused:
            raise ValueError(f"{name} has {', '.join(unused)}, but no rope_type that uses them")
        return fields
    if kind == "dynamic":
        hf_scaling.pop("original_max_position_embeddings", None)  # transformers does not read this field
    if kind == "yarn":
        hf_scaling.pop("finetuned", None)  # a note in the files of the authors of YaRN; transformers does not read it
        if hf_scaling.get("truncate", True) is None:  # transformers reads null as false, but a missing field as true
            hf_scaling["truncate"] = False
    if kind not in get_args(ScalingKind):
        raise ValueError(
            f"rope_type={kind!r} is not supported in {name}: choose from default, {', '.join(get_args(ScalingKind))}"
        )
    field_of = {hf_field: field for field, (hf_field, kinds) in _HF_SCALING_FIELDS.items() if kind in kinds}
    hf_scaling = {field: value for field, value in hf_scaling.items() if value is not None}
    for field, value in hf_scaling.items():
        if field not in field_of or isinstance(value, str):
            raise ValueError(
                f"{field}={value!r} of {kind} {name} is not supported: the supported fields are "
                f"{', '.join(field_of)}; their values must not be strings"
            )
    scaling = {field_of[field]: value for field, value in hf_scaling.items()}
    if "factor" not in scaling:
        raise ValueError(f"{name} of type {kind} has no field factor: add it")
    if kind in ("dynamic", "yarn"):
        if "original_positions" not in scaling and config.get("max_position_embeddings") is None:
            raise ValueError(
                f"{name} of type {kind} needs the length of the training sequences: add max_position_embeddings"
            )
        scaling.setdefault("original_positions", config.get("max_position_embeddings"))
    return {**fields, "rotary_scaling": RotaryScaling(kind, **scaling)}


def write_rotary(scaling: RotaryScaling | None, max_positions: int | None) -> dict[str, Any]:
    """The dict ``{"rope_scaling": ...}`` for a Hugging Face config; an empty dict if ``scaling`` is None.

    Raises:
        ValueError: the scaling is dynamic, and its ``original_positions`` differ from ``max_positions``.
    """
    if scaling is None:
        return {}
    if scaling.kind == "dynamic" and scaling.original_positions != max_positions:
        raise ValueError(
            f"dynamic rotary scaling from {scaling.original_positions} to max_positions={max_positions} cannot be "
            "written to a Hugging Face file: jaxlm computes one base from max_positions, but transformers computes a "
            f"base from the length of each text. Set max_positions={scaling.original_positions}, or use linear or yarn "
            "scaling"
        )
    hf_scaling = {
        name: getattr(scaling, field) for field, (name, kinds) in _HF_SCALING_FIELDS.items() if scaling.kind in kinds
    }
    hf_scaling = {name: value for name, value in hf_scaling.items() if value is not None}
    return {"rope_scaling": {"rope_type": scaling.kind, **hf_scaling}}

"""``config.json`` and ``generation_config.json`` of Hugging Face directories: a model from them, and them from a model.

What a directory said and jaxlm does not decide (``Model.metadata``) is written back as it was. A field that jaxlm
decides keeps its words as long as its meaning is that of the model.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxlm import config as config_lib
from jaxlm import spec
from jaxlm.data.tokenizers import ROLES, Tokenizer
from jaxlm.interop import formats
from jaxlm.interop.formats import Format
from jaxlm.models.model import FAMILIES, Metadata, Model, family, get_model

_NATIVE = "jaxlm-"
_LABELLING = ("classification", "tagging")
_GENERATING = ("causal", "seq2seq", "permutation")
_HEAD_FIELDS = {"task", "num_labels"}
"""Overrides that ask for another head than that of the files."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What ``config.json`` and the overrides describe.

    Attributes:
        model: the model, with the overrides, and metadata without generation config.
        table: the names of its tensors.
        stored: the model of the files, without the overrides. None: the files must hold exactly ``model``; otherwise
            heads may be missing or left over.
    """

    model: Model
    table: Format
    stored: Model | None


def format_of(model: Model) -> Format:
    """The format to write a model with: that of the loaded ``model_type``, or the first one that can express the model.

    A family without a published format has a format with our own names.
    """
    choices = formats.of(model.family)
    if not choices:
        return _native(model)
    loaded = None if model.metadata is None else model.metadata.config.get("model_type")
    for table in sorted(choices, key=lambda table: table.model_type != loaded):
        fixed = {field: value for field, value in table.implied.items() if field not in table.fields}
        if _has(model, fixed) and any(_has(model, implied) for implied in table.architectures.values()):
            return table
    names = ", ".join(f"{table.model_type} ({', '.join(table.architectures)})" for table in choices)
    raise ValueError(f"no Hugging Face class of {names} is {model.config}")


def _has(model: Model, fields: Mapping[str, Any]) -> bool:
    return all(getattr(model.config, field) == value for field, value in fields.items())


def is_stacked(leaf: spec.ArraySpec) -> bool:
    """Whether a parameter has a leading axis of layers."""
    return leaf.axes[0] == spec.LAYERS


def _native(model: Model) -> Format:
    """The format of a family without a published format: names are paths."""

    def name(path: str, *, is_layer: bool) -> str:
        return ".".join(f"{part}.{{layer}}" if part == spec.LAYERS and is_layer else part for part in path.split("/"))

    names = {}
    for path, leaf in spec.flatten(model.specs).items():
        path, layer = spec.split_layer(path)
        names[path] = name(path, is_layer=layer is not None or is_stacked(leaf))
    return Format(architectures={}, model_type=_NATIVE + model.family, prefix="", fields={}, tensors=names)


# ------------------------------------------------------------------------------------------------------ reading


def describe(config: dict[str, Any], path: Path, overrides: dict[str, Any]) -> Description:
    """The model that the contents of ``config.json`` (at ``path``, for messages) and the overrides describe.

    Raises:
        ValueError: an architecture or setting that is not supported.
    """
    model_type = config.get("model_type")
    if model_type in [_NATIVE + name for name in FAMILIES if not formats.of(name)]:
        name, fields = model_type.removeprefix(_NATIVE), _native_fields(config, path)
        implied: Mapping[str, Any] = {}
        table = None
    else:
        name, table, implied = _table(config, path, overrides)
        fields = {**table.implied, **_our_fields(config, table, family(name).Config, path)}
    try:
        if table is not None and table.read_fields is not None:
            fields |= table.read_fields(config)
        labels = _labels(config)
        if hasattr(family(name).Config, "num_labels"):
            if labels is not None:  # how they write the number of labels
                fields["num_labels"] = len(labels)
            elif config.get("num_labels") is not None:
                fields["num_labels"] = config["num_labels"]
        stored = get_model(name, **{**fields, **implied}) if _HEAD_FIELDS & overrides.keys() else None
        if "task" in overrides and overrides["task"] != implied.get("task"):
            implied = {}
        model = get_model(name, **{**fields, **implied, **overrides})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}{f' with {overrides}' if overrides else ''}: {error}") from error
    table = _native(model) if table is None else table
    if getattr(model.config, "task", None) not in _LABELLING:
        labels = None
    metadata = Metadata(labels=labels, token_ids=_token_ids(model, table, config), config=config)
    return Description(dataclasses.replace(model, metadata=metadata), table, stored)


def _native_fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    name = config["model_type"].removeprefix(_NATIVE)
    try:
        read = config_lib.from_json(family(name).Config, config.get("config", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {field.name: getattr(read, field.name) for field in dataclasses.fields(read)}


def _table(config: dict[str, Any], path: Path, overrides: dict[str, Any]) -> tuple[str, Format, Mapping[str, Any]]:
    """The family and the format of the files, and the values of our fields that their class implies."""
    model_type = config.get("model_type")
    known = [(name, table) for name in FAMILIES for table in formats.of(name)]
    supported = "; ".join(f"{table.model_type} ({', '.join(table.architectures)})" for _, table in known)
    known = [(name, table) for name, table in known if table.model_type == model_type]
    if not known:
        raise ValueError(f"{path}: model_type={model_type!r} is not supported: {supported}")
    # Configs that were never saved with a model name no class: the general table of a model type is the last.
    listed = config.get("architectures") or list(known[-1][1].architectures)
    architecture = listed[0] if isinstance(listed, list) else listed
    for name, table in known:
        if architecture in list(table.architectures):
            return name, table, table.architectures[architecture]
    if "task" in overrides:  # the base of a class that has a head of its own
        return *known[-1], {"task": "none"}
    raise ValueError(
        f"{path}: architecture {architecture!r} is not supported; task=... loads its base weights with a fresh head. "
        f"Supported: {supported}"
    )


def _our_fields(config: dict[str, Any], table: Format, config_class: type, path: Path) -> dict[str, Any]:
    for field, value in table.required.items():
        if config.get(field, value) != value:
            raise ValueError(f"{path}: {field}={config[field]!r} is not supported: only {value!r} is")
    for alias, field in table.aliases.items():
        if alias in config and (field not in config or config[alias] != config[field]):
            raise ValueError(
                f"{path}: {alias}={config[alias]!r} is another name of {field}, which is "
                f"{config.get(field, 'missing')!r}: write {field} alone"
            )
    hints = typing.get_type_hints(config_class)
    fields = {}
    for ours, theirs in table.fields.items():
        if theirs not in config:
            continue
        value = config[theirs]
        words = table.values.get(theirs)
        if words is not None:
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{path}: {theirs}={value!r} is not supported: choose from {', '.join(words)}")
            value = words[value]
        elif not _fits(value, hints[ours]):
            raise ValueError(
                f"{path}: {theirs}={value!r} is not of type {getattr(hints[ours], '__name__', hints[ours])}"
            )
        fields[ours] = value
    return fields


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type of a Config field."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    return type(value) in ((int, float) if hint is float else (hint,))


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels in the order of their numbers."""
    names = config.get("id2label")
    if names is None:
        return None
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        raise ValueError(f'id2label={names!r} must name the labels "0", "1", ... without a gap')
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _token_ids(model: Model, table: Format, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of ``config.json`` by role; those that it lacks are the defaults of its class."""
    implied = {field: token for field, token in table.token_ids.items() if token < model.config.vocab_size}
    return {role.removesuffix("_token_id"): ids for role, ids in {**implied, **token_fields(config)}.items()}


def token_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that hold ids of special tokens.

    Raises:
        ValueError: an id that is not an integer, a list of integers or null.
    """
    fields = {field: ids for field, ids in config.items() if field.endswith("_token_id")}
    for field, ids in fields.items():
        if ids is not None and not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(f"{field}={ids!r} must be an integer, a list of integers or null")
    return fields


# ------------------------------------------------------------------------------------------------------ writing


def their_config(model: Model, dtype: Any, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The contents of ``config.json``.

    Args:
        dtype: that of the parameters.
        tokenizer: its special ids are written; None: those of the metadata, or else of the published models.

    Raises:
        ValueError: Hugging Face's form of the family cannot express the model or the special ids.
    """
    table = format_of(model)
    written = _written(model, table)
    loaded = {} if model.metadata is None else model.metadata.config
    if loaded.get("model_type") != table.model_type:
        loaded = {}
    result = _merged(model, written, loaded)
    if not loaded:
        vocabulary = model.config.vocab_size
        result |= {field: token if token < vocabulary else None for field, token in table.token_ids.items()}
    if tokenizer is not None:
        result |= _tokenizer_fields(model, table, tokenizer, result)
    if not table.model_type.startswith(_NATIVE):
        # Transformers calls it "dtype" since version 4.56, and reads both.
        names = [name for name in ("dtype", "torch_dtype") if name in loaded] or ["torch_dtype"]
        result |= dict.fromkeys(names, str(dtype))
    return result


def _written(model: Model, table: Format) -> dict[str, Any]:
    """The fields that jaxlm decides, without special ids and dtype."""
    fields: dict[str, Any] = {}
    if getattr(model.config, "task", None) in _LABELLING and (formats.of(model.family) or model.labels is not None):
        labels = model.labels or [f"LABEL_{number}" for number in range(model.config.num_labels)]
        fields["id2label"] = {str(number): label for number, label in enumerate(labels)}
        fields["label2id"] = {label: number for number, label in enumerate(labels)}
    if not formats.of(model.family):
        return {"model_type": table.model_type, "config": config_lib.to_json(model.config), **fields}
    for ours, theirs in table.fields.items():
        value = getattr(model.config, ours)
        if theirs in table.values:
            words = [word for word, meaning in table.values[theirs].items() if meaning == value]
            if not words:
                raise ValueError(f"{ours}={value!r} has no counterpart in {theirs} of {table.model_type}")
            value = words[0]
        fields[theirs] = value
    if table.write_fields is not None:
        fields |= table.write_fields(model.config)
    architecture = next(name for name, implied in table.architectures.items() if _has(model, implied))
    return {"architectures": [architecture], "model_type": table.model_type, **fields, **table.required}


def _merged(model: Model, written: dict[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The written fields, and the loaded fields that jaxlm does not decide or that mean the same.

    A written field that the loaded config lacks, and whose default is that value, is left out.
    """
    if not loaded:
        return dict(written)
    result = {**loaded, **written}
    try:
        before = describe(dict(loaded), Path("config.json"), {})
    except ValueError:  # a class that was loaded with another task
        return result
    previous = _written(before.model, before.table)
    for field in previous.keys() - written.keys():  # such as the labels of a head that is gone
        result.pop(field, None)
    for field, value in written.items():
        if field in previous and previous[field] == value:
            if field in loaded:
                result[field] = loaded[field]
            else:  # its default is what the model has
                del result[field]
    for alias, field in before.table.aliases.items():
        if alias in result:
            result[alias] = result[field]
    if written.get("id2label") != previous.get("id2label"):  # another number of labels
        result.pop("num_labels", None)
    if model.metadata is not None and model.metadata.fresh:
        result.pop("problem_type", None)  # of the head before
    return result


def _tokenizer_fields(
    model: Model, table: Format, tokenizer: Tokenizer, result: Mapping[str, Any]
) -> dict[str, int | None]:
    """The fields for special ids, from a tokenizer. A role that it does not have keeps its loaded id, or has none."""
    check_vocabulary(model, tokenizer)
    found = tokenizer_ids(model, tokenizer)
    loaded = {} if model.metadata is None else token_fields(model.metadata.config)
    fields: dict[str, int | None] = {}
    for role in ROLES:
        field = f"{role}_token_id"
        if field in table.required:
            if found[role] not in (None, table.required[field]):
                raise ValueError(
                    f"{table.model_type} needs {field}={table.required[field]}, but the tokenizer has {found[role]}: "
                    f"train one with template='bos_eos', or save without the tokenizer"
                )
        elif role in ("pad", "bos", "eos") or field in result:
            before = loaded.get(field)
            keep = found[role] is None or (isinstance(before, list) and found[role] in before)
            fields[field] = before if keep else found[role]
    return fields


def tokenizer_ids(model: Model, tokenizer: Tokenizer) -> dict[str, int | None]:
    """The special ids of a tokenizer by role; a model that generates ends at the end of a document."""
    ids = dataclasses.asdict(tokenizer.special_ids)
    if ids["eos"] is None and getattr(model.config, "task", "causal") in _GENERATING:
        ids["eos"] = tokenizer.end_id
    return ids


def check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the tokenizer has ids that the model does not have."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model has vocab_size={model.config.vocab_size}: "
            "it is not the tokenizer of this model"
        )


def their_generation_config(model: Model, tokenizer: Tokenizer | None = None) -> dict[str, Any] | None:
    """The contents of ``generation_config.json``; None where the directory needs none.

    Without that file, transformers generates by the ids in ``config.json``.
    """
    loaded = None if model.metadata is None else model.metadata.generation_config
    generates = getattr(model.config, "task", "causal") in _GENERATING
    if loaded is None and (tokenizer is None or not generates):
        return None
    result = dict(loaded or {})
    if tokenizer is not None:
        for role in ("pad", "bos", "eos"):
            field, found = f"{role}_token_id", tokenizer_ids(model, tokenizer)[role]
            before = result.get(field)
            if found is not None and not (isinstance(before, list) and found in before):
                result[field] = found
    start = getattr(model.config, "decoder_start_id", None)
    if start is not None and (loaded is None or ("decoder_start_token_id" in loaded and start != _loaded_start(model))):
        result["decoder_start_token_id"] = start
    return result


def _loaded_start(model: Model) -> int | None:
    """The ``decoder_start_id`` that the loaded config describes."""
    loaded = {} if model.metadata is None else model.metadata.config
    try:
        return getattr(describe(dict(loaded), Path("config.json"), {}).model.config, "decoder_start_id", None)
    except ValueError:  # a class that was loaded with another task
        return loaded.get("decoder_start_token_id")

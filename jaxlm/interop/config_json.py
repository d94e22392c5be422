"""Read and write ``config.json`` and ``generation_config.json`` of Hugging Face directories.

``Model.metadata`` contains the contents of the loaded files. If a model is saved in the format in which it was loaded,
the new ``config.json`` is made from the loaded one (:func:`_merge_loaded`):

- A loaded field that jaxlm does not set is kept. It is dropped only if it contradicts a changed field, or describes a
  head that has been replaced.
- A field that describes the model is replaced if its value has changed since loading. All fields that describe the
  model are replaced if the file would otherwise describe another model.

In this module, the prefix ``hf_`` marks names and values of ``config.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm import config as config_lib
from jaxlm import spec
from jaxlm.data.tokenizer_files import ROLES
from jaxlm.data.tokenizers import Tokenizer, num_required_ids
from jaxlm.interop import formats
from jaxlm.interop.formats import Format
from jaxlm.interop.formats.format import JAXLM_PREFIX
from jaxlm.models.model import Metadata, Model, get_model
from jaxlm.models.registry import FAMILIES, family, family_names

_LABEL_TASKS = ("classification", "token_classification")
_GENERATION_TASKS = ("causal", "seq2seq", "permutation")
_HEAD_FIELDS = {"task", "num_labels"}
"""Overrides with which the head of the model may differ from the head in the files."""
_FORMER_ARCHITECTURES = {
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "LLaMAForCausalLM": "LlamaForCausalLM",
}
"""Name of a class in old files -> present name of the class, which new files get."""
GENERATION_DEFAULTS: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "max_time": None,
    "stop_strings": None, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "constraints": None, "force_words_ids": None, "num_return_sequences": 1,
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None, "renormalize_logits": False, "remove_invalid_values": False,
    "guidance_scale": None, "watermarking_config": None, "penalty_alpha": None, "dola_layers": None,
    "token_healing": False,
}  # fmt: skip
"""Generation setting that changes the generated text -> its default in transformers. The padding, BOS, EOS and decoder
start ids are not in this dict."""


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The result of :func:`describe_model`: the model that ``config.json`` and the overrides describe.

    Attributes:
        model: the model with the overrides. Its metadata has no generation config.
        format: the format of the files, with the names of their tensors and config fields.
        model_in_files: the model that ``config.json`` describes without the overrides, if ``task`` or ``num_labels`` is
            overridden. The files may then lack the head of ``model``, and may have another head. None: neither is
            overridden, so the files must have all parameters of ``model``.
    """

    model: Model
    format: Format
    model_in_files: Model | None


def format_of(model: Model) -> Format:
    """The format in which a model is saved. It is the first of these formats:

    1. the published format from which the model was loaded, if it can represent the model;
    2. the first published format of the family that can represent the model;
    3. jaxlm's own format.
    """
    loaded = model.metadata.config.get("model_type")
    published = sorted(formats.of(model.family), key=lambda table: table.model_type != loaded)
    table = next((table for table in published if _represents(table, model)), None)
    return _native_format(model) if table is None else table


def _represents(table: Format, model: Model) -> bool:
    """Whether a published format can represent a model."""
    # The fields that have no HF field in the format have the same value in all models of the format.
    fixed = {field: value for field, value in table.default_fields.items() if field not in table.hf_name_of_field}
    if not _has_fields(model, table, fixed) or _architecture(table, model) is None:
        return False
    try:
        _shape_fields(table, model)
    except ValueError:
        return False
    names = {**table.tensors, **table.unprefixed_tensors}
    return all(spec.split_layer(path)[0] in names for path in spec.flatten(model.specs))


def _architecture(table: Format, model: Model) -> str | None:
    """The name of the class of a published format that has the model's head; None if there is none."""
    return next((name for name, fields in table.architectures.items() if _has_fields(model, table, fields)), None)


def _has_fields(model: Model, table: Format, fields: Mapping[str, Any]) -> bool:
    """Whether the config of the model has the values of ``fields``.

    None equals the value that it stands for (``Format.none_means``).
    """

    def equals(field: str, value: Any) -> bool:
        actual = getattr(model.config, field)
        if actual is not None and value is None and field in table.none_means:
            value = table.none_means[field](model.config)
        return actual == value

    return all(equals(field, value) for field, value in fields.items())


def _native_format(model: Model) -> Format:
    """jaxlm's own format, for a model without a published format.

    The name of a tensor is the path of the parameter with dots, such as ``layers.3.mlp.up.weight``.
    """
    names = {}
    for path, leaf in spec.flatten(model.specs).items():
        path, layer = spec.split_layer(path)
        is_layer = layer is not None or leaf.is_stacked
        keys = (f"{key}.{{layer}}" if key == spec.LAYERS and is_layer else key for key in path.split("/"))
        names[path] = ".".join(keys)
    return Format(
        architectures={}, model_type=JAXLM_PREFIX + model.family, prefix="", hf_name_of_field={}, tensors=names,
        renamed={  # names of jaxlm 0.1
            "tagger.weight": "token_classifier.weight", "tagger.bias": "token_classifier.bias",
        },
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ reading


def describe_model(config: dict[str, Any], path: Path, overrides: dict[str, Any]) -> ModelDescription:
    """The model that a ``config.json`` and overrides describe, and its format.

    Args:
        config: the contents of ``config.json``.
        path: the path of ``config.json``, for error messages.
        overrides: fields of the family's ``Config`` that override the file.

    Raises:
        ValueError: the architecture or a setting is not supported, or an override is unknown or invalid.
    """
    model_type = config.get("model_type")
    table: Format | None = None
    implied: Mapping[str, Any] = {}
    labels: tuple[str, ...] | None = None
    try:
        if isinstance(model_type, str) and model_type.startswith(JAXLM_PREFIX):
            name = model_type.removeprefix(JAXLM_PREFIX)
            fields = _native_fields(config, name)
        else:
            name, table, implied = _find_format(config, overrides)
            fields = {**table.default_fields, **_published_fields(config, table, family(name).Config)}
            fields |= {} if table.read_fields is None else table.read_fields(config)
        config_class = family(name).Config
        task_in_files = {**fields, **implied}.get("task", getattr(config_class, "task", None))
        makes_label_head = overrides.get("task") in _LABEL_TASKS and "num_labels" not in overrides
        # Labels that the model does not need are not read, because they may be invalid.
        needs_labels = task_in_files in _LABEL_TASKS or makes_label_head
        if needs_labels and hasattr(config_class, "num_labels"):
            labels = _labels(config)
            if labels is not None:  # transformers writes id2label instead of num_labels
                fields["num_labels"] = len(labels)
            elif config.get("num_labels") is not None:
                fields["num_labels"] = config["num_labels"]
        if "task" in overrides and "num_labels" in overrides:
            _check_task(name, overrides["task"])
        model_in_files = get_model(name, **{**fields, **implied}) if _HEAD_FIELDS & overrides.keys() else None
        if "task" in overrides and overrides["task"] != implied.get("task"):
            implied = {}  # the class of the files implies these fields only for its own task
        model = get_model(name, **{**fields, **implied, **overrides})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        names = "" if table is None else _names_in_file(table, str(error))
        raise ValueError(f"{path}{f' with {overrides}' if overrides else ''}: {error}{names}") from error
    table = _native_format(model) if table is None else table
    if model.task not in _LABEL_TASKS:
        labels = None
    metadata = Metadata(labels=labels, token_ids=_token_ids(model, table, config, path), config=config)
    return ModelDescription(dataclasses.replace(model, metadata=metadata), table, model_in_files)


def _names_in_file(table: Format, message: str) -> str:
    """A note on the fields of an error message that have another name in the file; "" if there are none.

    The error of a family's ``Config`` has jaxlm's names of the fields, but a user changes the file.
    """
    notes = [
        f"{name} is {hf_name}"
        for name, hf_name in table.hf_name_of_field.items()
        if name != hf_name and re.search(rf"\b{name}=", message)
    ]
    return f" (in this file, {' and '.join(notes)})" if notes else ""


def _check_task(name: str, task: Any) -> None:
    """Raise ``ValueError`` if the family lacks both the field ``num_labels`` and the task.

    Without this check, the error would say that ``num_labels`` is unknown, although the task is the cause.
    """
    config_class = family(name).Config
    if hasattr(config_class, "num_labels"):
        return
    tasks = typing.get_args(config_lib.field_types(config_class).get("task"))
    if task not in tasks:
        raise ValueError(f"family {name} has no task {task!r}: it has {', '.join(tasks)}")


def _native_fields(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The ``Config`` fields of the family ``name``, from a ``config.json`` in jaxlm's own format."""
    content = config.get("config", {})
    if isinstance(content, dict) and content.get("task") == "tagging":  # jaxlm 0.1's name of token_classification
        content = {**content, "task": "token_classification"}
    native = config_lib.from_json(family(name).Config, content)
    return {field.name: getattr(native, field.name) for field in dataclasses.fields(native)}


def _find_format(config: dict[str, Any], overrides: dict[str, Any]) -> tuple[str, Format, Mapping[str, Any]]:
    """The family, the format of the files, and the ``Config`` fields that the architecture implies."""
    model_type = config.get("model_type")
    # The formats of families from other packages are read only if no family of jaxlm has the model type.
    known = [(name, table) for name in FAMILIES for table in formats.of(name)]
    if model_type not in [table.model_type for _, table in known]:
        known = [(name, table) for name in family_names() for table in formats.of(name)]
    supported = "; ".join(f"{table.model_type} ({', '.join(table.architectures)})" for _, table in known)
    candidates = [(name, table) for name, table in known if table.model_type == model_type]
    if not candidates:
        raise ValueError(f"model_type={model_type!r} is not supported: {supported}")
    # A config that was saved without a model has no architectures. Then the first class of the last format of the model
    # type is used. For most model types, this format has the most classes.
    architecture = class_name(config, candidates[-1][1])
    for name, table in candidates:
        if architecture in list(table.architectures):
            return name, table, table.architectures[architecture]
    # A base model can be loaded without the head only if the format has a prefix: the tensor names of the base model
    # have the prefix, and those of the head do not.
    with_base_model = [(name, table) for name, table in candidates if table.prefix]
    if with_base_model and "task" in overrides:  # the head is not supported, but the base model is supported
        return *with_base_model[-1], {"task": "none"}
    advice = "; pass task=... to load its base model with a new head" if with_base_model else ""
    raise ValueError(f"architecture {architecture!r} is not supported{advice}. Supported: {supported}")


def class_name(config: Mapping[str, Any], table: Format) -> Any:
    """The first class in ``architectures`` of ``config.json``; the first class of the format if there is none."""
    architectures = _architectures(config) or list(table.architectures)
    return architectures[0] if isinstance(architectures, list) else architectures


def _architectures(config: Mapping[str, Any]) -> Any:
    """The field ``architectures``, with the present names of the classes."""
    value = config.get("architectures")
    names = value if isinstance(value, list) else [value]
    names = [_FORMER_ARCHITECTURES.get(name, name) if isinstance(name, str) else name for name in names]
    return names if isinstance(value, list) else names[0]


def _published_fields(config: dict[str, Any], table: Format, config_class: type) -> dict[str, Any]:
    """The ``Config`` fields in ``table.hf_name_of_field``, from a ``config.json`` in a published format.

    Raises:
        ValueError: a field in ``config.json`` has a value that is not supported.
    """
    if quantization := config.get("quantization_config"):
        raise ValueError(
            f"quantization_config={quantization!r} is not supported: save the model with float weights, for example "
            "with model.dequantize() and model.save_pretrained(...) in transformers"
        )
    for field, value in table.required.items():
        if config.get(field, value) != value:
            raise ValueError(f"{field}={config[field]!r} is not supported: it must be {value!r}")
    for field in table.not_null:
        if config.get(field, "") is None:
            raise ValueError(f"{field}=null is not supported: model_type={table.model_type!r} needs a value")
    for alias, field in table.aliases.items():
        if alias in config and (field not in config or config[alias] != config[field]):
            raise ValueError(
                f"{alias}={config[alias]!r} is an alias of {field}, which is {config.get(field, 'missing')!r}: set "
                f"only {field}"
            )
    hints = config_lib.field_types(config_class)
    fields = {}
    for name, hf_name in table.hf_name_of_field.items():
        if hf_name not in config:
            continue
        value = config[hf_name]
        if hf_name in table.jaxlm_value_of:
            values = table.jaxlm_value_of[hf_name]
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"{hf_name}={value!r} is not supported: choose from {', '.join(values)}")
            value = values[value]
        else:
            config_lib.check_value(hints[name], value, hf_name)
        # Reject a huge number of layers before ``read_fields`` makes lists with an entry for each layer. These lists
        # would fill the memory.
        config_lib.check_num_layers(name, value, hf_name)
        fields[name] = value
    return fields


def generation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings in ``config.json`` that differ from the defaults of transformers.

    The result contains no fields that are null, and no padding, BOS, EOS and decoder start ids.
    """
    return {name: config[name] for name, value in GENERATION_DEFAULTS.items() if config.get(name) not in (None, value)}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels in the order of their ids; None if the config has no ``id2label``."""
    names = config.get("id2label")
    if names is None:
        return None
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        raise ValueError(f'id2label={names!r} must name the labels "0", "1", ... without a gap')
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _token_ids(model: Model, table: Format, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The special token ids by role, from ``config.json``.

    A missing id has the default of the format (``Format.token_ids``), if this default is in the vocabulary.
    """
    implied = {field: token for field, token in table.token_ids.items() if token < model.config.vocab_size}
    return token_ids_by_role({**implied, **config}, path)


def token_ids_by_role(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The special token ids in a config, by role: the fields whose names end with ``_token_id``.

    Args:
        path: the path of the file that contains the config, for error messages.

    Raises:
        ValueError: a value is not an integer, a list of integers or null.
    """
    fields = {field: ids for field, ids in config.items() if field.endswith("_token_id")}
    for field, ids in fields.items():
        config_lib.check_value(int | list[int] | None, ids, f"{path}: {field}")
    return {field.removesuffix("_token_id"): ids for field, ids in fields.items()}


# ------------------------------------------------------------------------------------------------------ writing


def model_config_json(model: Model, dtype: Any, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The contents of ``config.json`` for saving a model.

    If the loaded config has another model type than the new config, only these fields are kept: its padding, BOS and
    EOS ids, which describe the vocabulary, and its labels and ``problem_type`` if the model has the loaded head.

    Args:
        dtype: dtype of the parameters. If they have several dtypes, the dtype of the largest number of entries.
        tokenizer: its special token ids are written. None: the ids of the loaded config are written. If there is no
            loaded config, the ids of the published models are written (null for an id outside the vocabulary).

    Raises:
        ValueError: the format cannot represent the special token ids, or the tokenizer needs more ids than the model
            has.
    """
    table = format_of(model)
    model_fields = _model_fields(model, table)
    loaded = model.metadata.config
    if loaded.get("model_type") != table.model_type:
        loaded = {}
    result = _merge_loaded(model, model_fields, loaded)
    if not loaded:
        result |= _new_token_fields(model, table)
    if tokenizer is not None:
        result |= _tokenizer_fields(model, table, tokenizer, result)
    if loaded and not _describes(result, model_fields):
        # The meaning of a loaded field, or the default of an omitted field, depends on a changed field. So all fields
        # that describe the model are written.
        result.pop("rope_parameters", None)
        result |= model_fields
    if not table.is_jaxlm_format:
        # Since version 4.56, transformers writes "dtype" and reads both names.
        names = [name for name in ("dtype", "torch_dtype") if name in loaded] or ["torch_dtype"]
        result |= dict.fromkeys(names, str(dtype))
    return result


def _model_fields(model: Model, table: Format) -> dict[str, Any]:
    """The fields of ``config.json`` that describe the model, without special token ids and dtype."""
    fields: dict[str, Any] = {}
    if model.task in _LABEL_TASKS and (not table.is_jaxlm_format or model.labels is not None):
        labels = model.labels or [f"LABEL_{number}" for number in range(model.config.num_labels)]
        fields["id2label"] = {str(number): label for number, label in enumerate(labels)}
        fields["label2id"] = {label: number for number, label in enumerate(labels)}
    if model.task in _LABEL_TASKS and model.problem_type is not None:
        fields["problem_type"] = model.problem_type
    if table.is_jaxlm_format:
        return {"model_type": table.model_type, "config": config_lib.to_json(model.config), **fields}
    fields |= _shape_fields(table, model)
    return {"architectures": [_architecture(table, model)], "model_type": table.model_type, **fields, **table.required}


def _shape_fields(table: Format, model: Model) -> dict[str, Any]:
    """The fields of a published format for the config of a model.

    Raises:
        ValueError: the format has no value for a field of the config.
    """
    fields: dict[str, Any] = {}
    for name, hf_name in table.hf_name_of_field.items():
        value = getattr(model.config, name)
        if hf_name in table.jaxlm_value_of:
            jaxlm_value_of = table.jaxlm_value_of[hf_name]
            hf_values = [hf_value for hf_value, jaxlm_value in jaxlm_value_of.items() if jaxlm_value == value]
            if not hf_values:
                raise ValueError(f"{name}={value!r} has no counterpart in {hf_name} of {table.model_type}")
            value = hf_values[0]
        fields[hf_name] = value
    return fields if table.write_fields is None else fields | table.write_fields(model.config)


_ROTARY_FIELDS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "head_dim"}
"""If the value of one of these fields has changed since loading, all of these fields are written."""


def _merge_loaded(model: Model, model_fields: dict[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json``: the loaded config, in which the fields that changed since loading are replaced.

    - A field of ``model_fields`` is unchanged if ``_model_fields`` gives the same value for the loaded config. An
      unchanged field keeps its loaded value. If the loaded config omits it, the result omits it too.
    - Loaded fields that jaxlm does not set are kept. But ``rope_parameters``, ``scale_decoder_outputs`` and
      ``num_labels`` are dropped if they would contradict a changed field, and ``problem_type`` is dropped if the model
      has a new head.
    - Loaded aliases (``Format.aliases``) get the values of their fields.
    - Former names of classes are replaced by their present names.
    """
    if not loaded:
        return dict(model_fields)
    if "architectures" in loaded:
        loaded = {**loaded, "architectures": _architectures(loaded)}
    previous: dict[str, Any] = {}
    aliases: Mapping[str, str] = {}
    # If jaxlm does not support the loaded class, whose head was replaced with the override ``task``, all fields count
    # as changed.
    with contextlib.suppress(ValueError):
        description = describe_model(dict(loaded), Path("config.json"), {})
        aliases = description.format.aliases
        previous = _model_fields(description.model, description.format)
    missing = object()
    changed = {
        field
        for field in {**previous, **model_fields}
        if previous.get(field, missing) != model_fields.get(field, missing)
    }
    dropped = changed - model_fields.keys()  # for example the labels of a removed head
    if model.metadata.initialized:
        dropped.add("problem_type")  # it describes the loaded head, which this model does not have
    if "id2label" in changed:
        dropped.add("num_labels")
    if previous and changed & _ROTARY_FIELDS:
        changed |= _ROTARY_FIELDS
        dropped.add("rope_parameters")  # in transformers 5, it takes precedence over these fields, except head_dim
    if previous and "tie_word_embeddings" in changed:
        dropped.add("scale_decoder_outputs")  # in transformers 5, it takes precedence over tie_word_embeddings
    result = {**loaded, **{field: value for field, value in model_fields.items() if field in changed}}
    result |= {alias: result[field] for alias, field in aliases.items() if alias in result}
    return {field: value for field, value in result.items() if field not in dropped}


def _describes(config: Mapping[str, Any], model_fields: dict[str, Any]) -> bool:
    """Whether ``config`` is supported, and ``_model_fields`` gives ``model_fields`` for the model that it describes."""
    try:
        description = describe_model(dict(config), Path("config.json"), {})
        return _model_fields(description.model, description.format) == model_fields
    except ValueError:
        return False


def _new_token_fields(model: Model, table: Format) -> dict[str, Any]:
    """The special token ids for ``config.json`` of a model that was not loaded, or was loaded from another model type.

    The padding, BOS and EOS ids of the loaded config are kept. An id that the loaded config omits gets the default of
    the loaded model type. If no model was loaded, all ids get the defaults of the new model type. A default outside the
    vocabulary is not used: the id is then null or missing.
    """
    loaded = model.metadata.config
    fields: dict[str, Any] = dict.fromkeys(table.token_ids)
    for candidate in formats.of(model.family):
        if candidate.model_type == loaded.get("model_type", table.model_type):
            fields |= {field: token for field, token in candidate.token_ids.items() if token < model.config.vocab_size}
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    fields |= {field: loaded[field] for field in names if field in loaded}
    return {field: token for field, token in fields.items() if field not in table.required}


def _tokenizer_fields(
    model: Model, table: Format, tokenizer: Tokenizer, result: Mapping[str, Any]
) -> dict[str, int | None]:
    """The fields of ``config.json`` with the special token ids of a tokenizer.

    If the tokenizer has no token for a role, the field keeps its loaded value, or is null without a loaded value. If
    the loaded value is a list that contains the id of the tokenizer, the field keeps this list.

    Raises:
        ValueError: the tokenizer needs more ids than the model has, or an id is not the id that the format requires.
    """
    check_vocabulary(model, tokenizer)
    ids = tokenizer_ids(model, tokenizer)
    loaded = model.metadata.config
    fields: dict[str, int | None] = {}
    for role in ROLES:
        field = f"{role}_token_id"
        if field in table.required:
            if ids[role] not in (None, table.required[field]):
                raise ValueError(
                    f"{table.model_type} needs {field}={table.required[field]}, but the tokenizer has {ids[role]}: "
                    f"train a tokenizer with template='bos_eos', or save without a tokenizer"
                )
        elif role in ("pad", "bos", "eos") or field in result:
            fields[field] = loaded.get(field) if _keeps_id(loaded.get(field), ids[role]) else ids[role]
    return fields


def _keeps_id(loaded_id: Any, token_id: int | None) -> bool:
    """Whether a field keeps its loaded value, if ``token_id`` is the id of the tokenizer (None: it has no such id)."""
    return token_id is None or (isinstance(loaded_id, list) and token_id in loaded_id)


def tokenizer_ids(model: Model, tokenizer: Tokenizer) -> dict[str, int | None]:
    """The special token ids of a tokenizer, by role, such as "eos".

    If the tokenizer has no EOS token, the EOS id is ``tokenizer.end_id`` for the tasks causal, seq2seq and permutation.
    """
    ids = dataclasses.asdict(tokenizer.special_ids)
    if ids["eos"] is None and model.task in _GENERATION_TASKS:
        ids["eos"] = tokenizer.end_id
    return ids


def check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    """Raise ``ValueError`` if the tokenizer needs more ids than the model has (:func:`num_required_ids`)."""
    needed, available = num_required_ids(tokenizer), model.config.vocab_size
    if needed > available:
        raise ValueError(
            f"the tokenizer has {needed} ids but the model has vocab_size={available}: it is not the tokenizer of this "
            "model"
        )


def generation_config_json(model: Model, tokenizer: Tokenizer | None = None) -> dict[str, Any] | None:
    """The contents of ``generation_config.json`` for saving a model; None if the directory does not need this file.

    transformers and jaxlm read the generation settings in ``config.json`` only if there is no
    ``generation_config.json``. So if the model was loaded without this file, a new file repeats the settings and the
    special token ids of the loaded ``config.json``.
    """
    loaded = model.metadata.generation_config
    generates = model.task in _GENERATION_TASKS
    if loaded is None and (tokenizer is None or not generates):
        return None
    roles = ("pad", "bos", "eos")
    if loaded is None:
        config = model.metadata.config
        ids = {field: config[field] for role in roles if config.get(field := f"{role}_token_id") is not None}
        result = {**ids, **generation_settings(config)}
    else:
        result = dict(loaded)
    if tokenizer is not None:
        for role in roles:
            field, token_id = f"{role}_token_id", tokenizer_ids(model, tokenizer)[role]
            if not _keeps_id(result.get(field), token_id):
                result[field] = token_id
    start = getattr(model.config, "decoder_start_id", None)
    if start is not None and (
        loaded is None or ("decoder_start_token_id" in loaded and start != loaded_decoder_start_id(model))
    ):
        result["decoder_start_token_id"] = start
    return result


def loaded_decoder_start_id(model: Model) -> int | None:
    """The ``decoder_start_id`` that the loaded config describes; None if there is no loaded config or no such id."""
    loaded = model.metadata.config
    try:
        return getattr(describe_model(dict(loaded), Path("config.json"), {}).model.config, "decoder_start_id", None)
    except ValueError:  # jaxlm does not support the loaded class, whose head was replaced with the override ``task``
        return loaded.get("decoder_start_token_id")

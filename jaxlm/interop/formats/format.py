"""``Format``: the names of a family's parameters and config fields in Hugging Face files.

In this package, HF means Hugging Face.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxlm.config import check_min, check_value

T = TypeVar("T")

Layout = tuple[tuple[int, ...], ...]
"""For each axis of an HF tensor, in order, the axes of the jaxlm parameter that are merged into this axis. An empty
tuple stands for an axis of size 1.

Example: a jaxlm weight of one layer has the shape [D, H, K]. The layout is ((0,), (1, 2)) if the HF tensor has the
shape [D, H * K], ((1, 2), (0,)) if it has the shape [H * K, D], and ((1, 2), (), (0,)) if it has the shape
[H * K, 1, D].
"""

JAXLM_PREFIX = "jaxlm-"
"""Start of ``model_type`` in jaxlm's own format, whose tensor names are the paths of the parameters."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The names of tensors and config fields in the HF files of one ``model_type``.

    A family has a tuple of formats. If the tensor names of the classes of a ``model_type`` have different prefixes,
    there is a format for each prefix.

    If ``config.json`` lacks a field, the field gets its value in ``default_fields``. If it has no value there, it gets
    the default of jaxlm's ``Config``. In both cases, the value must be the default in transformers.

    Attributes:
        architectures: class name in ``config.json`` -> the jaxlm config fields that this class implies, such as
            ``task``. A model is saved with the first class whose implied fields equal the fields of the model. Classes
            that are not listed are not supported.
        model_type: ``model_type`` in ``config.json``.
        prefix: the prefix of all tensor names of the base model, in files of classes with a head.
        hf_name_of_field: jaxlm config field -> HF config field. The two fields have the same value, except for the
            fields in ``jaxlm_value_of``.
        default_fields: jaxlm config field -> its value if ``config.json`` lacks the field. A field of this mapping that
            is not in ``hf_name_of_field`` has this value in all models of the format. So the format can represent a
            model only if the model has these values.
        none_means: jaxlm config field -> a function from jaxlm's ``Config`` to the value that None stands for. If
            ``default_fields`` has None for the field, the format can also represent a model with this value.
        read_fields: a function from ``config.json`` to jaxlm config fields, for fields that need a computation. Its
            result replaces values from ``default_fields`` and ``hf_name_of_field``. If the function raises a
            ``ValueError``, the caller adds the path of the file to the message.
        write_fields: the inverse function, from jaxlm's ``Config`` to HF config fields.
        tensors: path of a jaxlm parameter -> name of the HF tensor. ``{layer}`` stands for the index of the layer. If
            files have one tensor for each expert, ``{expert}`` stands for the index of the expert. If a model has no
            parameter with this path, its files do not contain the tensor. If several parameters of a model have the
            same tensor, the tensor is their concatenation along the first axis, in the order of this mapping.
        jaxlm_value_of: HF config field -> {HF value: jaxlm value} with all supported values, for fields whose values
            have different names in HF and jaxlm. If several HF values have the same jaxlm value, the first is written.
        required: HF config field -> the only value that the family supports. A missing field has this value.
        not_null: HF config fields that must not be null, because the classes of this ``model_type`` need a value.
        aliases: other name of an HF config field -> the name that jaxlm reads and writes. An alias is accepted only if
            the field is also present with the same value, because transformers derives other values from the field
            before it applies the alias.
        token_ids: HF config field of a special token id -> the id if ``config.json`` lacks the field. New files contain
            these fields, with null for an id outside the vocabulary.
        unprefixed_tensors: a mapping like ``tensors``, for tensors whose names never have the ``prefix``.
        layouts: path of a jaxlm parameter -> :data:`Layout` of its part for one layer (and one expert). An entry is
            needed only for layouts that differ from these defaults. A ``weight`` is a matrix [out, in] in files, as in
            torch (``jaxlm.adapt.num_row_axes`` defines which axes are the inputs). A ``bias`` has one axis. Any other
            tensor has the axes of the parameter. A block-diagonal weight needs an entry.
        tied_tensors: full name of an additional tensor that a file may contain -> path of the jaxlm parameter that must
            be equal to the tensor. The ``prefix`` is not added to the name.
        layer_copies: name of an HF tensor of each layer, with ``{layer}`` -> path of the jaxlm parameter that all
            layers share. A copy is written for each layer, because transformers does not tie the tensors of the layers.
            A file that is read may lack copies. Copies in a file must be equal to the parameter.
        renamed: suffix of a tensor name in old files -> suffix of the current name.
        ignored: regular expressions for the names (without ``prefix``) of tensors that are not parameters. Files may
            contain these tensors; they are not loaded.
    """

    architectures: Mapping[str, Mapping[str, Any]]
    model_type: str
    prefix: str
    hf_name_of_field: Mapping[str, str]
    tensors: Mapping[str, str]
    default_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    none_means: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    read_fields: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    write_fields: Callable[[Any], dict[str, Any]] | None = None
    jaxlm_value_of: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    not_null: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    token_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unprefixed_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    tied_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer_copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def is_jaxlm_format(self) -> bool:
        """Whether this is jaxlm's own format."""
        return self.model_type.startswith(JAXLM_PREFIX)


def module_tensors(path: str, name: str, /, **modules: str) -> dict[str, str]:
    """``Format.tensors`` of modules: linear layers, convolutions and norms.

    A module has some of the parameters ``weight``, ``scale``, ``scale_minus_one`` and ``bias``. The result has an entry
    for each of them, because files contain only the tensors whose parameters the model has.

    Args:
        path: the start of the paths of all modules.
        name: the start of the names of all modules in files.
        modules: rest of the path of a module -> rest of its name in files.

    Example:
        >>> tensors = module_tensors("layers/", "h.{layer}.", norm="ln_1")
        >>> tensors["layers/norm/scale"], tensors["layers/norm/bias"]
        ('h.{layer}.ln_1.weight', 'h.{layer}.ln_1.bias')
    """
    return {
        f"{path}{key}/{parameter}": f"{name}{module}.{'bias' if parameter == 'bias' else 'weight'}"
        for key, module in modules.items()
        for parameter in ("weight", "scale", "scale_minus_one", "bias")
    }


_USUAL_NAMES = {
    "max_positions": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_stddev": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
"""jaxlm config field -> usual name of the field in transformers. Most other fields have the same name in both."""


def usual_fields(*names: str) -> dict[str, str]:
    """``Format.hf_name_of_field`` of config fields that have their usual name in transformers.

    Example:
        >>> usual_fields("vocab_size", "embed_dim")
        {'vocab_size': 'vocab_size', 'embed_dim': 'hidden_size'}
    """
    return {name: _USUAL_NAMES.get(name, name) for name in names}


_CLASS_OF_TASK = {
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "none": "Model",
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "span_qa": "ForQuestionAnswering",
}
"""Task -> end of the names of classes with this task in transformers."""


def classes(start: str, *tasks: str) -> dict[str, dict[str, str]]:
    """``Format.architectures`` of classes with usual names, which imply only the task.

    Args:
        start: the start of the names of all classes.

    Example:
        >>> classes("Llama", "causal", "none")
        {'LlamaForCausalLM': {'task': 'causal'}, 'LlamaModel': {'task': 'none'}}
    """
    return {start + _CLASS_OF_TASK[task]: {"task": task} for task in tasks}


def class_with_prefix(table: Format, architecture: str, task: str, prefix: str) -> Format:
    """A copy of ``table`` for one class with another ``Format.prefix`` than the other classes of the model type."""
    default_fields = {**table.default_fields, "task": task}
    return dataclasses.replace(
        table, architectures={architecture: {"task": task}}, prefix=prefix, default_fields=default_fields
    )


def shortest_pattern(kinds: Sequence[T]) -> tuple[T, ...]:
    """The shortest pattern whose repetition gives the kinds of all layers. The last repetition may be incomplete."""
    num_layers = len(kinds)
    sizes = (n for n in range(1, num_layers) if all(kinds[i] == kinds[i % n] for i in range(num_layers)))
    return tuple(kinds[: next(sizes, num_layers)])


def read_integer(
    config: Mapping[str, Any], name: str, default: int | None = None, *, minimum: float = -math.inf,
    nullable: bool = False,
) -> Any:  # fmt: skip
    """The integer in the field ``name`` of ``config.json``; ``default`` if the field is missing.

    Args:
        minimum: the smallest allowed integer.
        nullable: whether the result may also be None: the value is null, or the field and the default are missing.

    Raises:
        ValueError: the result would be below ``minimum``, or would be neither an integer nor, if ``nullable``, None.
    """
    value = config.get(name, default)
    check_value(int | None if nullable else int, value, name)
    check_min(minimum, **{name: value})
    return value

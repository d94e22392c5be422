"""``Format``: the names of a family's parameters and config fields in Hugging Face files.

In this package, "our" names and axes are those of jaxlm, "their" names and axes are those of Hugging Face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Layout = tuple[tuple[int, ...], ...]
"""For each axis of their tensor, in order, the axes of our parameter that are merged into it.

For example, our weight of one layer is [D, H, K]. Then the layout is ((0,), (1, 2)) if their tensor is [D, H * K], and
((1, 2), (0,)) if it is [H * K, D].
"""

TRANSPOSED: Layout = ((1,), (0,))
"""The layout of a matrix that their files store as [out, in]."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The published names of one ``model_type``. A family has a tuple of formats.

    If their ``config.json`` lacks a field, its value is that in ``implied``, or the default of our ``Config``. So these
    values must be equal to their defaults.

    Attributes:
        architectures: class in ``config.json`` -> values of our config fields that this class implies, ``task`` in
            particular. A model is written with the first class whose values it has. Other classes are not supported.
        model_type: ``model_type`` in ``config.json``.
        prefix: the prefix of all tensors of the base model in files of classes with a head.
        fields: our config field -> their config field, if both have the same value, or a value in ``values``.
        implied: values of our config fields for all models of this ``model_type``, unless ``config.json`` has another
            value (through ``fields``). Those that are not in ``fields`` also select the format to write a model with:
            the first format of the family whose implied values the model has.
        read_fields: a function from their ``config.json`` to values of our config fields, for fields that need a
            computation. The caller adds the path of the file to a ``ValueError`` that it raises.
        write_fields: the inverse: from our config to their fields.
        tensors: path of our parameter -> name of their tensor. ``{layer}`` is the number of the layer.
            If a config has no parameter with a path, its files do not contain the tensor.
        values: their config field -> {their value: our value}, for values that differ.
        required: their config fields and the only value that the family implements. A missing field has this value.
        aliases: other names of their fields -> the names that are read and written. An alias is accepted only together
            with the field and with the same value, because transformers applies it after it has derived other values
            from the field.
        token_ids: their fields for special tokens. A field is written as null if the id is outside the vocabulary.
        head: as ``tensors``, but without ``prefix`` in all files.
        layouts: path of our parameter -> :data:`Layout` of one layer, if their tensor has another shape.
        copies: name of a tensor (without ``prefix``) that a file may also contain -> path of our parameter that it
            must be equal to.
        renamed: end of a name in old files -> end of the current name.
        ignored: regular expressions of names (without ``prefix``) of tensors that are not parameters.
    """

    architectures: Mapping[str, Mapping[str, Any]]
    model_type: str
    prefix: str
    fields: Mapping[str, str]
    tensors: Mapping[str, str]
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_fields: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    write_fields: Callable[[Any], dict[str, Any]] | None = None
    values: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    token_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    head: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

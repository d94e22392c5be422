"""How a family's parameters are called in Hugging Face files: data, read by ``jaxlm.interop.huggingface``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Layout = tuple[tuple[int, ...], ...]
"""The axes of a tensor of theirs, each as the axes of ours that it merges, in order.

A weight of ours [D, H, K] (layers left out) is ((0,), (1, 2)) where they keep [D, H * K], and ((1, 2), (0,)) where
they keep [H * K, D].
"""

TRANSPOSED: Layout = ((1,), (0,))
"""A matrix that they keep as [out, in]."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The name map between one family and the files of one ``model_type``. A family has a tuple of them.

    A field that their ``config.json`` lacks has the value in ``implied``, or else the default of our ``Config``, so
    those must be theirs.

    Attributes:
        architectures: class in ``config.json`` -> values of our config fields that this class stands for, ``task``
            first of all. On export, the first whose values are those of the model. Classes that are not listed are not
            supported.
        model_type: ``model_type`` in ``config.json``.
        prefix: what the head classes put before every base tensor; files of the base class lack it.
        fields: our config field -> theirs, where the value is the same or in ``values``.
        implied: values of our config fields that every model of this ``model_type`` has unless ``config.json`` says
            otherwise (through ``fields``). A field here that is not in ``fields`` tells which table a model is written
            with: the first of the family whose implied values are the model's.
        read_fields: what is no plain renaming: their ``config.json`` -> values of our config fields. A ``ValueError``
            that it raises gets the path of the file.
        write_fields: the way back: our config -> their fields.
        tensors: our parameter path -> their name; ``{layer}`` runs over the leading ``layers`` axis. Paths that the
            specs of a config lack are not in its files.
        values: their field -> {their value: our value}, where the words differ.
        required: their fields with the only value that the family implements (a missing field has that value).
        aliases: their other names of fields -> the names that are read and written. An alias is accepted only beside
            its field and with the same value, because transformers applies it after values are derived from the field.
        token_ids: their fields for special tokens; written as null when the vocabulary is too small to have the id.
        head: as ``tensors``, never prefixed.
        layouts: our path -> how the axes of one layer lie in the file, where not as ours.
        copies: tensors (never prefixed) that files may hold as well -> our path whose bytes they must equal.
        renamed: endings of names in old files -> what they are called today.
        ignored: regular expressions of names (without prefix) that carry no parameter.
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

"""How a family's parameters are called in Hugging Face files: data, read by ``jaxlm.interop.huggingface``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Format:
    """The name map between one family and the files of one ``model_type``.

    Attributes:
        architectures: class names in ``config.json``; the first is written on export.
        model_type: ``model_type`` in ``config.json``.
        prefix: what the head class puts before every base tensor; files of the base class lack it.
        fields: our config field -> theirs.
        values: their field -> {their value: our value}, where the words differ.
        required: their fields with the only value that the family implements (a missing field has that value).
        tensors: our parameter path -> their name; ``{layer}`` runs over the leading ``layers`` axis. Reshaped, never
            transposed, except paths in ``transposed``.
        head: as ``tensors``, never prefixed, present only in files of a head class whose head is not tied.
        tied_to: our path whose values the head tensor must equal when it is tied and present all the same.
        transposed: our paths stored as [out, in] there.
        ignored: regular expressions of tensors that carry no parameter.
    """

    architectures: tuple[str, ...]
    model_type: str
    prefix: str
    fields: Mapping[str, str]
    tensors: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied_to: str | None = None
    transposed: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

"""``GenerationConfig``: the settings of text generation, with defaults from the files of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxlm.config import check_field_types, check_min, check_value
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.sample import GREEDY, Sampling
from jaxlm.interop.config_json import GENERATION_DEFAULTS, generation_settings
from jaxlm.models import Model

GENERATION_CONFIG_FILE = "generation_config.json"
CONFIG_FILE = "config.json"

EarlyStopping = bool | Literal["never"]


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings of text generation. Hashable.

    A field that is None is not set (except ``batch_size``). For a field that is not set, :meth:`resolve` reads
    ``generation_config.json`` in the directory from which the model was loaded. If the directory has no such file,
    ``resolve`` reads ``config.json``, and ignores values that equal the default of transformers. If the file does
    not set the field, ``resolve`` uses its argument ``default``, or else the default below. ``batch_size`` and
    ``ignored_fields`` are never read from a file.

    Attributes:
        max_new_tokens: maximum number of new tokens per text, including the end token. Default: 128.
        sampling: how the next token is drawn; beam search requires ``GREEDY``. Default: ``GREEDY``. If this field is
            set, the file's ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty``
            have no effect.
        num_beams: number of hypotheses that beam search extends at each step. 1: no beam search. Default: 1.
        length_penalty: exponent of the length in the score of a hypothesis, see :class:`jaxlm.decoding.BeamConfig`.
            Default: 1.
        stop: stop strings. The text ends before the stop string that is complete first. Default: none.
        batch_size: number of texts that are generated together. None: all texts. Default: 32.
        max_length: maximum number of tokens of a prompt and its continuation; for an encoder-decoder, of the output and
            its start token. At most one of ``max_length`` and ``max_new_tokens`` may be set.
        early_stopping: when a beam search ends, see :class:`jaxlm.decoding.BeamConfig`. Default: "never".
        end_ids: token ids that end a text. Default: the end id of the tokenizer, or no id if the tokenizer has none. If
            ``eos_token_id`` in ``config.json`` is a list that contains the end id of the tokenizer, the default also
            contains the other ids of the list. If a file lists several ids, those outside the vocabulary are ignored.
        ignored_fields: names of fields of the file that :meth:`resolve` ignores, for example
            ``("no_repeat_ngram_size",)``. If the file contains a field that jaxlm does not support, with a value that
            changes the text, and ``ignored_fields`` does not name it, ``resolve`` raises an error.

    Raises:
        TypeError: ``stop`` or ``ignored_fields`` is a single string, or ``end_ids`` is a single id.
        ValueError: a value has the wrong type or is outside its range; a stop string is empty; ``max_length`` and
            ``max_new_tokens`` are both set; ``num_beams`` is above 1, and ``sampling`` is set to a value other than
            ``GREEDY``; or ``num_beams`` is 1, and ``length_penalty`` is set to a value other than 1 or
            ``early_stopping`` is True.
    """

    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    batch_size: int | None = 32
    max_length: int | None = None
    early_stopping: EarlyStopping | None = None
    end_ids: tuple[int, ...] | None = None
    ignored_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "ignored_fields"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is a sequence of strings, got one string: pass ({getattr(self, name)!r},)")
        if isinstance(self.end_ids, int):
            raise TypeError(f"end_ids is a sequence of ids, got one id: pass ({self.end_ids},)")
        for name in ("stop", "end_ids", "ignored_fields"):
            if isinstance(getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # so that the config is hashable
        check_field_types(self)
        if self.stop is not None and "" in self.stop:
            raise ValueError(f"stop strings must not be empty, got {list(self.stop)}")
        check_min(1, max_new_tokens=self.max_new_tokens, max_length=self.max_length)
        check_min(1, num_beams=self.num_beams, batch_size=self.batch_size)
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(f"give max_new_tokens={self.max_new_tokens} or max_length={self.max_length}, not both")
        if self.num_beams == 1 and self.length_penalty not in (None, 1.0):
            raise ValueError(f"length_penalty={self.length_penalty} needs beam search: set num_beams above 1")
        if self.num_beams == 1 and self.early_stopping not in (None, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r} needs beam search: set num_beams above 1")
        if self.num_beams is not None and self.num_beams > 1 and self.sampling not in (None, GREEDY):
            if self.sampling.temperature > 0.0:
                raise ValueError(
                    f"num_beams={self.num_beams} searches for likely texts, but temperature="
                    f"{self.sampling.temperature} draws at random: set num_beams=1 or temperature=0"
                )
            raise ValueError(f"num_beams={self.num_beams} does not support {self.sampling}: set num_beams=1 or GREEDY")

    def resolve(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        default: GenerationConfig | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> GenerationConfig:
        """A config in which every field is set. Of ``max_new_tokens`` and ``max_length``, only one is set.

        The value of a field comes from the first of these sources that sets the field: this config, the file,
        ``default``, the defaults of the class. ``max_new_tokens`` and ``max_length`` count as one field.
        ``batch_size`` and ``ignored_fields`` always come from this config.

        The file is ``generation_config.json`` (``model.metadata.generation_config``). If there is no such file, it is
        ``config.json`` (``model.metadata.config``). Old versions of transformers wrote all generation fields into
        ``config.json``, most of them with their default, such as ``max_length`` 20. So a field of ``config.json``
        counts as set only if its value differs from the default of transformers.

        As in transformers, fields of a decoding method that is not used have no effect. Without beam search, the file's
        ``length_penalty`` and ``early_stopping`` have no effect. With greedy decoding, the file's ``temperature``,
        ``top_k``, ``top_p`` and ``min_p`` have no effect. If the file has ``do_sample=True``, the sampling fields that
        the file does not set have the defaults of transformers, such as ``top_k`` 50. If the file has ``num_beams``
        above 1 and no ``early_stopping``, the file's ``early_stopping`` is False, the default of transformers.

        Args:
            default: defaults of the calling program, which replace those of the class.
            sampling: values for ``do_sample`` and for fields of :class:`Sampling`, which override the file. A field
                with the value None counts as not set. This argument is used only if ``self.sampling`` is None. If the
                mapping sets ``temperature``, its ``do_sample`` has no effect. ``do_sample=True`` does not set a
                temperature: if no source sets it, decoding is greedy. As in transformers, 0 turns ``top_k`` and
                ``min_p`` off, and 1 turns ``top_p`` off.

        Raises:
            ValueError: the file has an unsupported field with a value that changes the text; the file has a value of
                the wrong type or outside its range (the message names the field); ``num_beams`` is above the number of
                ids that may be generated; two of the resolved values exclude each other, for example beam search and
                random sampling; or a name in ``ignored_fields`` is not the name of a field.

        Example:
            >>> GenerationConfig(num_beams=4).resolve(model, tokenizer).max_new_tokens   # doctest: +SKIP
            128
        """
        file, file_fields = settings_file(model), _read_file_fields(model, self.ignored_fields)
        file_config = _file_config(file_fields, file)
        configs = (self, file_config, default or GenerationConfig(), _DEFAULT)

        def first_set(name: str) -> Any:
            return next((value for config in configs if (value := getattr(config, name)) is not None), None)

        length_config = next(config for config in configs if (config.max_new_tokens, config.max_length) != (None, None))
        num_beams = self.num_beams or file_fields.get("num_beams") or first_set("num_beams")
        vocab_size = num_ids(model, tokenizer)
        if num_beams > vocab_size:
            raise ValueError(f"num_beams={num_beams} must be at most the {vocab_size} ids of the vocabulary")
        end_ids = first_set("end_ids")
        if self.end_ids is None and file_config.end_ids is not None:
            end_ids = tuple(i for i in file_config.end_ids if 0 <= i < vocab_size) or end_ids
        if end_ids is None:
            end_ids = _model_end_ids(model, tokenizer)
        overrides = {name: value for name, value in (sampling or {}).items() if value is not None}
        resolved_sampling = self.sampling
        if resolved_sampling is None:
            fallback = next(config.sampling for config in configs[2:] if config.sampling is not None)
            resolved_sampling = _resolve_sampling(file_fields, file, fallback, overrides, num_beams, vocab_size)
        try:
            return GenerationConfig(
                max_new_tokens=length_config.max_new_tokens,
                sampling=resolved_sampling,
                num_beams=num_beams,
                length_penalty=first_set("length_penalty") if num_beams > 1 or self.length_penalty is not None else 1.0,
                stop=first_set("stop"),
                batch_size=self.batch_size,
                max_length=length_config.max_length,
                early_stopping=first_set("early_stopping") if num_beams > 1 or self.early_stopping is True else "never",
                end_ids=end_ids,
                ignored_fields=self.ignored_fields,
            )
        except ValueError as error:
            given = {name for name, value in vars(self).items() if value is not None} | overrides.keys()
            given |= set() if self.sampling is None else {"do_sample", *_SAMPLING_FIELDS}
            raise ValueError(f"{error}{_file_hint(error, file_fields, given, file)}") from error


_DEFAULT = GenerationConfig(128, GREEDY, 1, 1.0, (), early_stopping="never")


def _model_end_ids(model: Model, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The default of ``end_ids``: the end id of the tokenizer, and further ids from ``config.json``.

    If ``eos_token_id`` in ``config.json`` is a list that contains the end id of the tokenizer, the other ids of the
    list are end ids too, unless they cannot be generated (:func:`num_ids`).
    """
    listed = model.metadata.config.get("eos_token_id")
    if isinstance(listed, list) and tokenizer.end_id in listed:
        further = (i for i in listed if i != tokenizer.end_id and 0 <= i < num_ids(model, tokenizer))
        return (tokenizer.end_id, *further)
    return () if tokenizer.end_id is None else (tokenizer.end_id,)


def num_ids(model: Model, tokenizer: Tokenizer) -> int:
    """The number of ids that may be generated. These are the ids that both the model and the tokenizer have."""
    return min(tokenizer.vocab_size, model.config.vocab_size)


# ------------------------------------------------------------------------------------------------------ the file


def settings_file(model: Model) -> str:
    """The name of the file with the generation settings.

    It is ``config.json`` if only this file exists, and ``generation_config.json`` otherwise.
    """
    in_config = model.metadata.generation_config is None and model.metadata.config
    return CONFIG_FILE if in_config else GENERATION_CONFIG_FILE


def _file_hint(error: ValueError, file_fields: Iterable[str], given: Iterable[str], file: str) -> str:
    """A hint to append to the message of ``error`` if the message names a field from the file. Otherwise an empty text.

    Args:
        given: names of the fields that the caller set.
    """
    names = {"temperature" if name == "do_sample" else name for name in set(file_fields).difference(given)}
    is_from_file = any(f"{name}=" in str(error) for name in names.difference(given))
    return f" (fields that you do not set are read from {file})" if is_from_file else ""


SUPPORTED_FIELDS: dict[str, Any] = {
    "max_new_tokens": int,
    "max_length": int,
    "num_beams": int,
    "length_penalty": float,
    "early_stopping": bool | str,
    "stop_strings": str | list[str],
    "eos_token_id": int | list[int],
    "decoder_start_token_id": int,
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
"""Supported field of the file -> type of its value, as in ``jaxlm.config.check_value``."""

_NO_EFFECT = {
    # transformers starts an empty prompt with bos_token_id, but jaxlm rejects empty prompts. pad_token_id fills a row
    # after its end.
    "bos_token_id", "pad_token_id",
    # Options for speed and for additional return values.
    "use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size", "compile_config",
    "disable_compile", "low_memory", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind",
    # Metadata of the file.
    "transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code",
}  # fmt: skip
"""Unsupported fields that do not change the text, whatever their value is."""

_NEUTRAL_VALUES: dict[str, Any] = {
    **{name: value for name, value in GENERATION_DEFAULTS.items() if name not in SUPPORTED_FIELDS},
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}
"""Unsupported field -> the value that does not change the text. For an unlisted field, it is None (null in JSON).

An empty list, as in ``"suppress_tokens": []``, does not change the text either.
"""


def _read_file_fields(model: Model, ignored: tuple[str, ...]) -> dict[str, Any]:
    """The supported fields that the file (:func:`settings_file`) sets, after a check of all fields of the file.

    Fields with the value None and the fields in ``ignored`` are left out.
    """
    metadata, file = model.metadata, settings_file(model)
    content = generation_settings(metadata.config) if file == CONFIG_FILE else metadata.generation_config or {}
    unknown = sorted(set(ignored) - content.keys() - SUPPORTED_FIELDS.keys() - _NEUTRAL_VALUES.keys() - _NO_EFFECT)
    if unknown:
        raise ValueError(f"ignored_fields has {unknown[0]!r}, which is not a field of {file}")
    no_effect = _NO_EFFECT.union(ignored)
    values = {name: value for name, value in content.items() if value is not None and name not in no_effect}
    unsupported = sorted(
        name for name in values.keys() - SUPPORTED_FIELDS.keys() if values[name] not in (_NEUTRAL_VALUES.get(name), [])
    )
    if unsupported:
        settings = ", ".join(f"{name}={values[name]!r}" for name in unsupported)
        raise ValueError(
            f"{file} sets {settings}, which jaxlm does not support: to ignore this, remove it from the file or pass "
            f"GenerationConfig(ignored_fields={tuple(unsupported)!r})"
        )
    fields = {name: value for name, value in values.items() if name in SUPPORTED_FIELDS}
    for name, value in fields.items():
        check_value(SUPPORTED_FIELDS[name], value, f"{file}: {name}")
    if fields.get("top_k", 0) < 0:
        raise ValueError(f"{file}: top_k={fields['top_k']} must be at least 0 (0 turns the filter off)")
    return fields


def _file_config(file_fields: Mapping[str, Any], file: str) -> GenerationConfig:
    """The fields of the file as a config in which ``sampling`` is not set."""
    end, stop, num_beams = (file_fields.get(name) for name in ("eos_token_id", "stop_strings", "num_beams"))
    max_new_tokens = file_fields.get("max_new_tokens")
    try:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            # A config with num_beams=1 must not set length_penalty and early_stopping. A file may set them, but they
            # have no effect. So num_beams=1 is left out here, and `resolve` reads it from the fields of the file.
            num_beams=None if num_beams == 1 else num_beams,
            length_penalty=file_fields.get("length_penalty"),
            stop=(stop,) if isinstance(stop, str) else stop,
            # As in transformers, max_new_tokens overrides max_length.
            max_length=file_fields.get("max_length") if max_new_tokens is None else None,
            early_stopping=file_fields.get("early_stopping", None if num_beams in (None, 1) else False),
            end_ids=(end,) if isinstance(end, int) else end,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


def _resolve_sampling(
    file_fields: Mapping[str, Any],
    file: str,
    fallback: Sampling,
    overrides: Mapping[str, Any],
    num_beams: int,
    vocab_size: int,
) -> Sampling:
    """The sampling settings. A field comes from the first of ``overrides``, the file and ``fallback`` that sets it.

    If tokens are drawn at random and the file has ``do_sample=True``, the defaults of transformers replace
    ``fallback``. If tokens are not drawn at random, only the repetition penalty is read from the file, and ``GREEDY``
    replaces ``fallback``.

    Args:
        vocab_size: number of ids that may be generated.
    """
    fields = {name: file_fields[name] for name in _SAMPLING_FIELDS if name in file_fields}
    if "temperature" in overrides:
        is_random = overrides["temperature"] > 0.0
    elif "do_sample" in overrides:
        is_random = overrides["do_sample"]
    elif num_beams > 1:
        is_random = file_fields.get("do_sample", False)
    else:
        is_random = file_fields.get("do_sample", fallback.temperature > 0.0)
    if is_random:
        base = Sampling(top_k=50) if file_fields.get("do_sample") else fallback
        top_k = fields.get("top_k", base.top_k)
        # A top_k of 0 (in the file), or of at least the number of ids, turns the filter off.
        fields["top_k"] = top_k if top_k is not None and 0 < top_k < vocab_size else None
        fields["min_p"] = fields.get("min_p", base.min_p) or None  # in the file, 0 turns the filter off
    else:
        base, fields = GREEDY, {name: fields[name] for name in ("repetition_penalty",) if name in fields}
    off = {"top_k": 0, "min_p": 0, "top_p": 1}
    given = {name: None if value == off.get(name) else value for name, value in overrides.items()}
    given.pop("do_sample", None)
    try:
        return dataclasses.replace(base, **{**fields, **given})
    except ValueError as error:
        raise ValueError(f"{error}{_file_hint(error, file_fields, overrides, file)}") from error

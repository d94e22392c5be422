"""``GenerationConfig``: a request for generated text, whose defaults are those of ``generation_config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.sample import GREEDY, Sampling
from jaxlm.models import Model

FILE = "generation_config.json"

EarlyStopping = bool | Literal["never"]


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """A request for generated text. Hashable.

    A field that is None is not given. :meth:`resolve` fills it: with the value of ``generation_config.json``, if the
    model was loaded from a directory with that file and the file has the field, or else with the default below.

    Attributes:
        max_new_tokens: tokens to generate at most for each text, the end token included. Default: 128.
        sampling: how the next token is drawn; beam search needs ``GREEDY``. Default: ``GREEDY``. A given sampling
            replaces all of ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty``.
        num_beams: live hypotheses of beam search; 1 generates token by token. Default: 1.
        length_penalty: exponent of the length in the score of a hypothesis, see :func:`jaxlm.decoding.beam_search`.
            Default: 1.
        stop: the text ends before the first of these strings to be complete. Default: none.
        batch_size: texts that are generated together; None takes all of them.
        max_length: tokens of a prompt and its continuation at most; for an encoder-decoder, of the output with its
            start token. Given instead of ``max_new_tokens``.
        early_stopping: when a beam search ends, see :func:`jaxlm.decoding.beam_search`. Default: "never".
        end_ids: ids each of which ends a text. Default: the end id of the tokenizer.
        ignored_fields: names of fields of ``generation_config.json`` that have no effect, for example
            ``("no_repeat_ngram_size",)``: without it, a field that jaxlm does not support is an error.

    Raises:
        TypeError: ``stop`` or ``ignored_fields`` is a single string, or ``end_ids`` a single id.
        ValueError: a value outside its range, ``max_length`` together with ``max_new_tokens``, or beams together with
            random sampling.
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
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable
        if self.stop is not None and "" in self.stop:
            raise ValueError(f"stop strings must not be empty, got {list(self.stop)}")
        for name in ("max_new_tokens", "max_length", "num_beams", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(f"give max_new_tokens={self.max_new_tokens} or max_length={self.max_length}, not both")
        if self.early_stopping not in (None, True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} must be finite")
        if self.num_beams == 1 and self.length_penalty not in (None, 1.0):
            raise ValueError(f"length_penalty={self.length_penalty} ranks beams: set num_beams above 1")
        if self.num_beams is not None and self.num_beams > 1 and self.sampling not in (None, GREEDY):
            if self.sampling.temperature > 0.0:
                raise ValueError(
                    f"num_beams={self.num_beams} searches for likely texts, but temperature="
                    f"{self.sampling.temperature} draws at random: set num_beams=1 or temperature=0"
                )
            raise ValueError(f"num_beams={self.num_beams} supports no {self.sampling}: set num_beams=1 or GREEDY")

    def resolve(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        default: GenerationConfig | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> GenerationConfig:
        """The config with every field given, except that only one of ``max_new_tokens`` and ``max_length`` is.

        What is given comes first, then ``generation_config.json`` (``model.metadata.generation_config``), then
        ``default``, then the defaults of the class. Settings of a method that is not used have no effect, as in
        transformers: ``length_penalty`` and ``early_stopping`` of the file without beams, ``temperature`` and the
        filters of the file without ``do_sample``. A file that sets ``do_sample`` or ``num_beams`` is read with the
        defaults of transformers for that method: ``top_k`` 50 and ``early_stopping`` False.

        Args:
            default: fields that a program prefers to the defaults of the class.
            sampling: single fields of :class:`Sampling` that are given, instead of a whole ``self.sampling``.

        Raises:
            ValueError: the file has a field that jaxlm does not support with a value that changes the text, or a value
                outside its range; each is named. A name in ``ignored_fields`` that is no field.

        Example:
            >>> GenerationConfig(num_beams=4).resolve(model, tokenizer).max_new_tokens   # doctest: +SKIP
            128
        """
        said = _read(model, self.ignored_fields)
        layers = (self, _of_file(said), default or GenerationConfig(), _DEFAULT)

        def first(name: str) -> Any:
            return next((value for layer in layers if (value := getattr(layer, name)) is not None), None)

        length = next(layer for layer in layers if (layer.max_new_tokens, layer.max_length) != (None, None))
        num_beams, end_ids = first("num_beams"), first("end_ids")
        if end_ids is None:
            end_ids = () if tokenizer.end_id is None else (tokenizer.end_id,)
        drawn = self.sampling
        if drawn is None:
            fallback = _DEFAULT.sampling if default is None or default.sampling is None else default.sampling
            assert fallback is not None
            drawn = _sampling(said, fallback, sampling or {}, num_beams, num_ids(model, tokenizer))
        try:
            return GenerationConfig(
                max_new_tokens=length.max_new_tokens,
                sampling=drawn,
                num_beams=num_beams,
                length_penalty=first("length_penalty") if num_beams > 1 or self.length_penalty is not None else 1.0,
                stop=first("stop"),
                batch_size=self.batch_size,
                max_length=length.max_length,
                early_stopping=first("early_stopping"),
                end_ids=end_ids,
                ignored_fields=self.ignored_fields,
            )
        except ValueError as error:
            raise ValueError(f"{error} (a field that is not given is that of {FILE})" if said else error) from error


_DEFAULT = GenerationConfig(128, GREEDY, 1, 1.0, (), early_stopping="never")


def num_ids(model: Model, tokenizer: Tokenizer) -> int:
    """Ids that may be generated: those that both the model and the tokenizer have."""
    return min(tokenizer.vocab_size, model.config.vocab_size)


# ------------------------------------------------------------------------------------------------------ the file

_KINDS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "max_length": (int,),
    "num_beams": (int,),
    "length_penalty": (int, float),
    "early_stopping": (bool, str),
    "stop_strings": (str, list),
    "eos_token_id": (int, list),
    "decoder_start_token_id": (int,),
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}
"""The fields that are supported, and the types of their values."""

_NO_EFFECT = {
    # Ids that no text shows: prompts are never empty, and padding is not decoded.
    "bos_token_id", "pad_token_id",
    # How fast, and what is returned beside the tokens.
    "use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size", "compile_config",
    "disable_compile", "low_memory", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind",
    # About the file.
    "transformers_version", "_from_model_config", "_commit_hash",
}  # fmt: skip
"""Fields that do not change the text."""

_OFF: dict[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "diversity_penalty": 0.0,
    "num_beam_groups": 1, "num_return_sequences": 1, "renormalize_logits": False, "remove_invalid_values": False,
    "token_healing": False,
}  # fmt: skip
"""Values with which fields that are not supported do not change the text; that of any other field is null."""


def _read(model: Model, ignored: tuple[str, ...]) -> dict[str, Any]:
    """The fields of ``generation_config.json`` that jaxlm reads; empty where there is no such file."""
    metadata = getattr(model, "metadata", None)
    content = {} if metadata is None else metadata.generation_config or {}
    unknown = sorted(set(ignored) - content.keys() - _KINDS.keys() - _OFF.keys() - _NO_EFFECT)
    if unknown:
        raise ValueError(f"ignored_fields has {unknown[0]!r}, which is no field of {FILE}")
    no_effect = _NO_EFFECT.union(ignored)
    given = {name: value for name, value in content.items() if value is not None and name not in no_effect}
    refused = sorted(name for name in given.keys() - _KINDS.keys() if given[name] != _OFF.get(name))
    if refused:
        named = ", ".join(f"{name}={given[name]!r}" for name in refused)
        raise ValueError(
            f"{FILE} sets {named}, which jaxlm does not support: to generate without it, remove it from the file or "
            f"pass GenerationConfig(ignored_fields={tuple(refused)!r})"
        )
    said = {name: value for name, value in given.items() if name in _KINDS}
    for name, value in said.items():
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
            raise ValueError(f"{FILE}: {name}={value!r} must be of type {kinds}")
    return said


def _of_file(said: Mapping[str, Any]) -> GenerationConfig:
    """The fields of the file, without sampling."""
    end, stop, num_beams = (said.get(name) for name in ("eos_token_id", "stop_strings", "num_beams"))
    max_new_tokens = said.get("max_new_tokens")
    try:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=None if num_beams == 1 else said.get("length_penalty"),
            stop=(stop,) if isinstance(stop, str) else stop,
            max_length=said.get("max_length") if max_new_tokens is None else None,  # as in transformers
            early_stopping=said.get("early_stopping", None if num_beams in (None, 1) else False),
            end_ids=(end,) if isinstance(end, int) else end,
        )
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error


def _sampling(
    said: Mapping[str, Any], fallback: Sampling, given: Mapping[str, Any], num_beams: int, ids: int
) -> Sampling:
    """Sampling of single given fields, the fields of the file, and ``fallback``, in this order."""
    fields = {field.name: said[field.name] for field in dataclasses.fields(Sampling) if field.name in said}
    if "temperature" in given:
        draws = given["temperature"] > 0.0
    elif num_beams > 1:
        draws = said.get("do_sample", False)
    else:
        draws = said.get("do_sample", fallback.temperature > 0.0)
    if draws:
        base = Sampling(top_k=50) if said.get("do_sample") else fallback
        top_k = fields.get("top_k", base.top_k)
        # 0 keeps all in the file, and so does a k that exceeds the number of ids.
        fields["top_k"] = top_k if top_k is not None and 0 < top_k < ids else None
    else:
        base, fields = GREEDY, {name: fields[name] for name in ("repetition_penalty",) if name in fields}
    try:
        return dataclasses.replace(base, **{**fields, **given})
    except ValueError as error:
        raise ValueError(f"{error} (a field that is not given is that of {FILE})" if fields else error) from error

"""Answers to the three kinds of requests of evaluation harnesses, for every generative family.

The requests ask for log-likelihoods of continuations, log-likelihoods of whole texts, and generated texts. Special
tokens, truncation and windows are the same as for the model type ``hf`` of EleutherAI's lm-evaluation-harness, so that
results can be compared.

A causal model reads a context with the special tokens that the tokenizer adds before a text (for example Llama's
``<|begin_of_text|>``), but without the special tokens that the tokenizer adds after a text. An encoder-decoder reads
the context with all special tokens as its source. The continuation is its target, without an end token.

By default, the prefix token is the BOS token (see ``prefix_token_id`` of :class:`TextRequests`). A context that begins
with the text of the prefix token gets no further special tokens. The prefix token replaces an empty context.
Exception: in :meth:`TextRequests.generate`, an encoder-decoder reads only the special tokens as the source for an empty
context.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.config import check_min, check_value
from jaxlm.data.encodings import SPECIAL_TOKEN
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import GenerationConfig, Sampling, decoder_start_id, generate_text
from jaxlm.decoding.config import SUPPORTED_FIELDS, num_ids, settings_file
from jaxlm.decoding.describe import require_next_token_head
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.predict import BATCH_SIZE, TextScores, score_ids

_LOG = logging.getLogger(__name__)

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILTERS = ("top_k", "top_p", "min_p")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")
_TRANSFORMERS_DEFAULTS = GenerationConfig(sampling=Sampling(top_k=50), early_stopping=False)
"""The defaults of transformers for fields that neither the request nor the files of the model set."""
_OPTIONS: dict[str, Any] = {
    "until": str | tuple[str, ...], **dict.fromkeys(_LENGTHS, int),
    **{name: SUPPORTED_FIELDS[name] for name in ("do_sample", "temperature", *_FILTERS, "repetition_penalty", *_BEAMS)},
}  # fmt: skip
"""Supported option -> type of its value, as in ``jaxlm.config.check_value``. A list counts as a tuple."""


class TextRequests:
    """A model and its tokenizer, with one method for each kind of request.

    For a model that needs the whole text (``Model.needs_whole_text``), the methods raise a ``ValueError`` instead of
    truncating a context or scoring a text in several windows. The message names the request.

    Args:
        model: a language model or an encoder-decoder of any family.
        params: the parameters of the model.
        tokenizer: the tokenizer of the model.
        batch_size: number of rows in a batch.
        max_length: maximum number of tokens that the model reads. None: the model's ``max_positions``, or no limit if
            the model has none.
        prefix_token_id: the id of the token that replaces an empty context. None: the tokenizer's BOS token, or its end
            token if it has no BOS token.
        max_gen_toks: maximum number of new tokens of a :meth:`generate` request that sets no maximum.
        seed: seed of random sampling.

    Attributes:
        truncated: name of a method -> a count over all its calls. ``log_likelihoods`` and ``generate``: the number of
            requests with a truncated context. ``rolling_log_likelihoods``: the number of texts that were scored in
            several windows.

    Raises:
        ValueError: the model does not predict next tokens; ``batch_size``, ``max_length`` or ``max_gen_toks`` is not an
            integer of at least 1; ``max_length`` exceeds the model's positions; or ``prefix_token_id`` is not in the
            vocabulary.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        require_next_token_head(model, "it does not score or generate text")
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_gen_toks", max_gen_toks)):
            if (value is not None or name != "max_length") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        positions = model.max_positions
        if max_length is not None and positions is not None and max_length > positions:
            raise ValueError(f"max_length={max_length} exceeds the model's max_positions={positions}")
        last_id = num_ids(model, tokenizer) - 1
        if prefix_token_id is not None and not 0 <= prefix_token_id <= last_id:
            raise ValueError(f"prefix_token_id={prefix_token_id} must be an id of the vocabulary, from 0 to {last_id}")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.max_gen_toks, self.seed = batch_size, max_gen_toks, seed
        self.max_length = positions if max_length is None else max_length
        if prefix_token_id is None:
            bos_id = tokenizer.special_ids.bos
            prefix_token_id = tokenizer.end_id if bos_id is None else bos_id
        self._prefix_id = prefix_token_id
        self._prefix_text = "" if prefix_token_id is None else tokenizer.decode([prefix_token_id])
        self.truncated = {"log_likelihoods": 0, "rolling_log_likelihoods": 0, "generate": 0}

    # ------------------------------------------------------------------------------------------------ requests

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether greedy decoding generates it.

        The beginning of a long context is removed. For an encoder-decoder, ``max_length`` limits the context. For a
        causal model, it limits the context and the continuation together. The last token of the continuation does not
        count, because the model does not read it.

        Args:
            pairs: (context, continuation) of each request. A context may be empty.

        Raises:
            ValueError: a continuation has no tokens or has more than ``max_length`` tokens (the message names the
                request), or a context has no tokens and there is no prefix token.
        """
        if not pairs:
            return []
        contexts, continuations, num_truncated = [], [], 0
        for number, (context, ids) in enumerate(self._encode_pairs(pairs)):
            if self.max_length is not None and ids.size > self.max_length:
                raise ValueError(
                    f"the continuation of request {number} has {ids.size} tokens, but the model reads {self.max_length}"
                    f": {pairs[number][1][:40]!r}...; shorten it, set a larger max_length, or use a model with more "
                    "positions"
                )
            max_context = self.max_length
            if max_context is not None and not self.model.reads_source:
                max_context += 1 - ids.size  # 1, because the model does not read the last token
            if max_context is not None and context.size > max_context:
                self._check_truncation(f"the context of request {number}", context.size, max_context)
                num_truncated += 1
            contexts.append(context if max_context is None else context[-max_context:])
            continuations.append(ids)
        self._count_and_warn("log_likelihoods", num_truncated, len(pairs), "have a truncated context")
        scores = self._score(contexts, continuations)
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text in nats, given the prefix token. A text without tokens has log-likelihood 0.

        The special tokens that the tokenizer adds before a text are also scored. For an encoder-decoder, the special
        tokens after the text are scored, too. So for an encoder-decoder, an empty text can still have special tokens,
        and then its log-likelihood is not 0. A text that begins with the text of the prefix token gets no further
        special tokens.

        A text of more than ``max_length`` tokens is scored in windows of ``max_length`` tokens. Each token is scored
        once. The context of a window is the token before it. If the last window is shorter, its context has more
        tokens, so that the model reads ``max_length`` tokens. An encoder-decoder reads the context of each window as
        its source.

        Raises:
            ValueError: a text has tokens, and there is no prefix token.
        """
        windows: list[tuple[np.ndarray, np.ndarray]] = []
        text_numbers: list[int] = []  # the text of each window
        for number, ids in enumerate(self._encode(texts)):
            if ids.size:
                length = self.max_length or ids.size
                if ids.size > length:
                    self._check_truncation(f"text {number}", ids.size, length)
                text_windows = rolling_windows(ids, self._require_prefix_id(), length)
                windows += text_windows
                text_numbers += [number] * len(text_windows)
        num_split = int(np.sum(np.bincount(text_numbers, minlength=len(texts)) > 1)) if text_numbers else 0
        self._count_and_warn("rolling_log_likelihoods", num_split, len(texts), "were scored in several windows")
        if not text_numbers:
            return [0.0] * len(texts)
        scores = self._score([context for context, _ in windows], [ids for _, ids in windows])
        return np.bincount(text_numbers, scores.log_likelihoods, minlength=len(texts)).tolist()

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The generated text for each (context, options). It ends before the end token or a string of ``until``.

        Special tokens are removed from the text before the search for ``until``. A special token whose text occurs in a
        string of ``until`` ends the text.

        Options:

        - ``until``: the stop strings, a string or a sequence of strings. Default: no stop string.
        - ``max_gen_toks`` (or ``max_new_tokens``, ``max_tokens``, ``max_completion_tokens``): maximum number of new
          tokens. Default: ``max_gen_toks`` of the constructor.
        - ``do_sample``: whether to sample. Default: True if ``temperature`` is set and not 0. Without sampling,
          ``temperature``, ``top_k``, ``top_p`` and ``min_p`` have no effect.
        - ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``,
          ``early_stopping``: as in transformers. Default: the value in the model's ``generation_config.json`` or
          ``config.json`` (:meth:`jaxlm.decoding.GenerationConfig.resolve`), otherwise the default of transformers.

        For a causal model, ``max_length`` limits the context and the maximum number of new tokens together. For an
        encoder-decoder, it limits the context. The beginning of a longer context is removed.

        Raises:
            ValueError: An option is not supported or invalid, or two options are inconsistent. The new tokens leave no
                space for a context. In these cases, the message names the option. A context has no tokens, and there is
                no prefix token.
        """
        groups: dict[GenerationConfig, list[int]] = {}
        for number, (_, options) in enumerate(requests):
            groups.setdefault(self.generation_config(options), []).append(number)
        rows = self._encode([context for context, _ in requests])
        rows = [ids if ids.size else np.array([self._require_prefix_id()], np.int32) for ids in rows]
        num_truncated = 0
        for config, numbers in groups.items():
            max_context = self._max_context(config)
            if max_context < 1:
                raise ValueError(
                    f"max_gen_toks={config.max_new_tokens} leaves no space for the context, because the model reads "
                    f"max_length={self.max_length} tokens: set a smaller max_gen_toks in the generation_kwargs of the "
                    "task (or in gen_kwargs)"
                )
            for number in numbers:
                if rows[number].size > max_context:
                    self._check_truncation(f"the context of request {number}", rows[number].size, max_context)
                    rows[number] = rows[number][-max_context:]
                    num_truncated += 1
        results, key = [""] * len(requests), jax.random.key(self.seed)
        for group, (config, numbers) in enumerate(groups.items()):
            texts = generate_text(
                self.model, self.params, self.tokenizer, [rows[number] for number in numbers], config,
                key=jax.random.fold_in(key, group), skip_special_tokens=True,
            )  # fmt: skip
            for number, text in zip(numbers, texts, strict=True):
                results[number] = text
        self._count_and_warn("generate", num_truncated, len(requests), "have a truncated context")
        return results

    def generation_config(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The ``GenerationConfig`` for the options of a request of :meth:`generate`.

        Raises:
            ValueError: an option is not supported or invalid, or two options are inconsistent.
        """
        unknown = [f"{name}={value!r}" for name, value in options.items() if name not in _OPTIONS]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not supported: choose from {', '.join(_OPTIONS)}")
        given_options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if value is not None
        }
        for name, value in given_options.items():
            check_value(_OPTIONS[name], value, name)
        lengths = [name for name in _LENGTHS if name in given_options]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} have the same meaning: set one of them")
        check_min(1, **{name: given_options[name] for name in lengths})
        until = given_options.get("until", ())
        until = (until,) if isinstance(until, str) else until
        is_random = given_options.get("do_sample", given_options.get("temperature", 0.0) != 0.0)
        sampling = {"do_sample": is_random, "repetition_penalty": given_options.get("repetition_penalty")}
        if is_random:  # the temperature and the filters have no effect in greedy decoding
            sampling |= {name: given_options.get(name) for name in ("temperature", *_FILTERS)}
        config = GenerationConfig(
            max_new_tokens=given_options[lengths[0]] if lengths else self.max_gen_toks,
            # The harness passes an empty string if a task has no delimiter.
            stop=tuple(text for text in until if text),
            batch_size=self.batch_size,
            **{name: given_options[name] for name in _BEAMS if name in given_options},
        ).resolve(self.model, self.tokenizer, default=_TRANSFORMERS_DEFAULTS, sampling=sampling)
        assert config.sampling is not None
        if is_random and config.sampling.temperature == 0.0:
            raise ValueError(
                "do_sample=True and temperature=0.0 contradict each other: set one of them (a temperature that you do "
                f"not set is read from {settings_file(self.model)})"
            )
        further_ids = (i for string in until for text, i in self._special_ids.items() if text in string)
        return dataclasses.replace(config, end_ids=(*(config.end_ids or ()), *further_ids))

    # ------------------------------------------------------------------------------------------------ internals

    def _max_context(self, config: GenerationConfig) -> int:
        """The maximum number of tokens of a context. Without a limit: 2**31."""
        if self.max_length is None:
            return 2**31
        assert config.max_new_tokens is not None
        return self.max_length - (0 if self.model.reads_source else config.max_new_tokens)

    def _check_truncation(self, what: str, num_tokens: int, limit: int) -> None:
        """Raise ``ValueError`` for a text that would be truncated or split, if the model needs the whole text.

        Args:
            what: the name of the text in the message.
            num_tokens: number of tokens of the text.
            limit: number of tokens for which there is space.
        """
        if self.model.needs_whole_text:
            raise ValueError(
                f"{what} has {num_tokens} tokens, but max_length={self.max_length} has space for {limit}, and "
                f"{self.model.family} must read a text from its first token: shorten it, or set a larger max_length "
                "(at most the model's max_positions; if no parameter depends on max_positions, "
                "model.with_fields(max_positions=...) can increase it)"
            )

    def _score(self, contexts: Sequence[np.ndarray], continuations: Sequence[np.ndarray]) -> TextScores:
        start_id = decoder_start_id(self.model, self.tokenizer) if self.model.reads_source else None
        return score_ids(
            self.model, self.params, contexts, continuations, start_id=start_id, batch_size=self.batch_size
        )

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        """The text of each special token that may be generated -> its id."""
        decode, ids = self.tokenizer.decode, range(num_ids(self.model, self.tokenizer))
        return {text: i for i in ids if (text := decode([i])) and not decode([i], skip_special_tokens=True)}

    def _count_and_warn(self, method: str, count: int, total: int, what: str) -> None:
        """Add ``count`` to ``truncated[method]``, and log a warning if ``count`` is not 0.

        Args:
            count, total: number of truncated or split texts, and number of all texts.
            what: what happened to the texts, for the warning.
        """
        self.truncated[method] += count
        if count:
            _LOG.warning("%d of %d requests %s: the model reads at most %d tokens", count, total, what, self.max_length)

    def _require_prefix_id(self) -> int:
        """The id of the prefix token. Raises ``ValueError`` if there is no prefix token."""
        if self._prefix_id is None:
            raise ValueError(
                "a text without a context needs a prefix token, and the tokenizer has neither a BOS token nor an end "
                "token: set prefix_token_id, for example to the id of a line break"
            )
        return self._prefix_id

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, with special tokens (for a causal model, only those before the text).

        For a causal model, an empty text has no ids. For an encoder-decoder, it has only special tokens.
        """
        return [ids for ids, _ in self._encode_with_num_special(texts)]

    def _encode_with_num_special(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """The ids of each text as in :meth:`_encode`, and the number of special tokens before the text.

        A text that begins with the text of the prefix token gets no further special tokens.
        """
        rows: list[tuple[np.ndarray, int]] = []
        for text, encoding in zip(texts, self.tokenizer.encode_inputs_batch(texts), strict=True):
            text_positions = np.flatnonzero(encoding.sequence_ids != SPECIAL_TOKEN)
            if self._prefix_text and text.startswith(self._prefix_text):
                rows.append((self.tokenizer.encode(text), 0))  # the text already begins with the prefix token
            elif text_positions.size == 0:
                rows.append((encoding.ids if self.model.reads_source else encoding.ids[:0], 0))
            else:
                ids = encoding.ids if self.model.reads_source else encoding.ids[: text_positions[-1] + 1]
                rows.append((ids, int(text_positions[0])))
        return rows

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of the context and of the continuation of each pair."""
        stripped = []
        for context, continuation in pairs:
            # In most vocabularies, a token includes the space before a word, so move the space to the continuation.
            text = context.rstrip()
            stripped.append((text, context[len(text) :] + continuation))
        contexts = self._encode([context for context, _ in stripped])
        if self.model.reads_source:
            encoded = [(self.tokenizer.encode(continuation), 0) for _, continuation in stripped]
        else:
            encoded = self._encode_with_num_special([context + continuation for context, continuation in stripped])
        rows = []
        for number, (context_ids, (ids, num_special)) in enumerate(zip(contexts, encoded, strict=True)):
            context, continuation = pairs[number]
            if context == "":  # the prefix token is the context, without other special tokens
                ids = self.tokenizer.encode(continuation)
                has_prefix = int(ids[:1].tolist() == [self._prefix_id])
                context_ids, ids = ids[:has_prefix], ids[has_prefix:]
            elif not self.model.reads_source:
                context_ids = context_ids if stripped[number][0] else ids[:num_special]
                ids = ids[context_ids.size :]
            if ids.size == 0:
                raise ValueError(f"the continuation of request {number} has no tokens: {continuation!r}")
            rows.append((context_ids if context_ids.size else np.array([self._require_prefix_id()], np.int32), ids))
        return rows


def rolling_windows(ids: np.ndarray, prefix_id: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (context, scored tokens) of each window of a text. Every token is scored once.

    Args:
        ids: [tokens].
        prefix_id: the id of the token that is the context of the first token.
        length: maximum number of scored tokens of a window. The context and all scored tokens except the last have
            together at most ``length`` tokens. These are the tokens that a causal model reads.

    Example:
        >>> [(c.tolist(), t.tolist()) for c, t in rolling_windows(np.arange(1, 8), 0, 4)]
        [([0], [1, 2, 3, 4]), ([3, 4], [5, 6, 7])]
    """
    row = np.concatenate([np.array([prefix_id], ids.dtype), ids])
    windows = []
    for start in range(0, ids.size, length):
        end = min(start + length, ids.size)
        windows.append((row[max(end - length, 0) : start + 1], row[start + 1 : end + 1]))
    return windows

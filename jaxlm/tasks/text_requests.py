"""The three requests of evaluation harnesses, for every family that decodes: likelihoods of continuations, likelihoods
of whole texts, and generated text.

Special tokens, truncation and windows are those of the model ``hf`` of EleutherAI's lm-evaluation-harness, so that
results can be compared. A causal model reads a context with the special tokens that the tokenizer's template puts
before a text (Llama's ``<|begin_of_text|>``), and not those that it puts behind. An encoder-decoder reads the context
as its source, with the whole template, and the continuation is its target, without an end token.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.data.encodings import SPECIAL
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import GenerationConfig, decoder_start_id, generate_text
from jaxlm.decoding.describe import require_task
from jaxlm.models import Model
from jaxlm.tasks.predict import BATCH_SIZE, TextScores, score_ids

_LOG = logging.getLogger(__name__)

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILTERS = ("top_k", "top_p", "min_p")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")
_OPTIONS = ("until", *_LENGTHS, "do_sample", "temperature", *_FILTERS, "repetition_penalty", *_BEAMS)


class TextRequests:
    """A model that answers requests in text, in batches of few shapes.

    Args:
        model: a language model or an encoder-decoder, of any family.
        params: its parameters.
        tokenizer: its tokenizer.
        batch_size: rows that are computed together.
        max_length: tokens that the model reads at most. Default: the model's ``max_positions``; families without them
            have no limit.
        prefix_token_id: the context of a text without one. Default: the tokenizer's beginning-of-sequence token, or
            else its end token.
        max_gen_toks: tokens to generate at most where a request does not say.
        seed: of random draws.

    Attributes:
        truncated: for each of the three methods, how many requests lost the beginning of their context
            (``log_likelihoods``, ``generate``) or were scored in several windows (``rolling_log_likelihoods``).

    Raises:
        ValueError: a model that decodes no text, or a number outside its range.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        require_task(
            model, ("causal", "permutation", "seq2seq"), "it scores and generates no text",
            "load a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)",
        )  # fmt: skip
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_gen_toks", max_gen_toks)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        positions = getattr(model.config, "max_positions", None)
        if max_length is not None and positions is not None and max_length > positions:
            raise ValueError(f"max_length={max_length} exceeds the model's max_positions={positions}")
        vocab_size = min(model.config.vocab_size, tokenizer.vocab_size)
        if prefix_token_id is not None and not 0 <= prefix_token_id < vocab_size:
            raise ValueError(f"prefix_token_id={prefix_token_id} is no id of the vocabulary: 0 to {vocab_size - 1}")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.max_gen_toks, self.seed = batch_size, max_gen_toks, seed
        self.max_length = positions if max_length is None else max_length
        if prefix_token_id is None:
            begin = tokenizer.special_ids.bos
            prefix_token_id = tokenizer.end_id if begin is None else begin
        self._prefix = prefix_token_id
        self._spelled_prefix = "" if self._prefix is None else tokenizer.decode([self._prefix])
        self.truncated = {"log_likelihoods": 0, "rolling_log_likelihoods": 0, "generate": 0}

    # ------------------------------------------------------------------------------------------------ requests

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-likelihood of the continuation in nats, and whether greedy decoding
        gives it.

        The context may be empty. Where both exceed ``max_length``, the beginning of the context is left out.

        Raises:
            ValueError: a continuation that has no tokens or alone exceeds ``max_length``, or an empty context without
                a prefix token; each is named.
        """
        contexts, continuations, cut = [], [], 0
        for number, (context, ids) in enumerate(self._encode_pairs(pairs)):
            if self.max_length is not None and ids.size > self.max_length:
                raise ValueError(
                    f"the continuation of request {number} has {ids.size} tokens, but the model reads {self.max_length}"
                    f": {pairs[number][1][:40]!r}..."
                )
            room = self.max_length
            if room is not None and not self.model.reads_source:
                room += 1 - ids.size  # the last token is never read
            cut += room is not None and context.size > room
            contexts.append(context if room is None else context[-room:])
            continuations.append(ids)
        self._report("log_likelihoods", cut, len(pairs), "lost the beginning of their context")
        scores = self._score(contexts, continuations)
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text in nats, given the prefix token; 0 for an empty text.

        A text of more than ``max_length`` tokens is scored in windows of so many. Each token counts once, and the last
        window has as much context as fits. An encoder-decoder reads the context of each window as its source.

        Raises:
            ValueError: there is no prefix token.
        """
        windows, owners = [], []
        for number, ids in enumerate(self._encode(texts)):
            if ids.size:
                found = rolling_windows(ids, self._prefix_id(), self.max_length or ids.size)
                windows += found
                owners += [number] * len(found)
        several = int(np.sum(np.bincount(owners, minlength=len(texts)) > 1)) if owners else 0
        self._report("rolling_log_likelihoods", several, len(texts), "were scored in several windows")
        scores = self._score([context for context, _ in windows], [ids for _, ids in windows])
        return (
            np.bincount(owners, scores.log_likelihoods, minlength=len(texts)).tolist() if owners else [0.0] * len(texts)
        )

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text generated for each (context, options), up to the end token or a string of ``until``.

        Special tokens in the text are left out, after it has been searched for ``until``.

        Options, with the meaning that they have in transformers: ``until`` (a string or several), ``max_gen_toks`` (or
        ``max_new_tokens``, ``max_tokens``, ``max_completion_tokens``), ``do_sample``, ``temperature``, ``top_k``,
        ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty`` and ``early_stopping``. Without
        ``do_sample`` and ``temperature``, decoding is greedy. What is not given is read from
        ``generation_config.json`` of the model (see :meth:`jaxlm.decoding.GenerationConfig.resolve`).

        Where a context leaves no room for the new tokens in ``max_length``, its beginning is left out.

        Raises:
            ValueError: an option that is not supported, options that contradict each other, or as many new tokens as
                ``max_length``; each is named.
        """
        groups: dict[GenerationConfig, list[int]] = {}
        for number, (_, options) in enumerate(requests):
            groups.setdefault(self.generation_config(options), []).append(number)
        for config in groups:
            if self._context_room(config) < 1:
                raise ValueError(
                    f"max_gen_toks={config.max_new_tokens} leaves no room for the context, because the model reads "
                    f"max_length={self.max_length} tokens: set max_gen_toks in the generation_kwargs of the task (or "
                    "gen_kwargs) to less"
                )
        results, cut = [""] * len(requests), 0
        key = jax.random.key(self.seed)
        for group, (config, numbers) in enumerate(groups.items()):
            room = self._context_room(config)
            rows = self._encode([requests[number][0] for number in numbers])
            rows = [ids if ids.size else np.array([self._prefix_id()], np.int32) for ids in rows]
            cut += sum(ids.size > room for ids in rows)
            assert config.sampling is not None
            draws = config.sampling.temperature > 0.0
            texts = generate_text(
                self.model, self.params, self.tokenizer, [ids[-min(room, ids.size) :] for ids in rows], config,
                key=jax.random.fold_in(key, group) if draws else None,
            )  # fmt: skip
            for number, text in zip(numbers, texts, strict=True):
                results[number] = self._special_tokens.sub("", text)
        self._report("generate", cut, len(requests), "lost the beginning of their context")
        return results

    def generation_config(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The request that the options of :meth:`generate` stand for."""
        unknown = [f"{name}={value!r}" for name, value in options.items() if name not in _OPTIONS]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not supported, options of generation are {', '.join(_OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        lengths = [name for name in _LENGTHS if name in given]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} mean the same: give one")
        until = given.get("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        draws = given.get("do_sample", given.get("temperature", 0.0) > 0.0)
        if draws and given.get("temperature") == 0.0:
            raise ValueError("do_sample=True and temperature=0.0 contradict each other: give one")
        sampling: dict[str, Any] = {"temperature": float(given.get("temperature", 1.0)) if draws else 0.0}
        if draws:  # without, they have no effect
            sampling |= {name: given[name] for name in _FILTERS if name in given}
            if sampling.get("top_k") == 0:
                sampling["top_k"] = None  # transformers' number for all
        if "repetition_penalty" in given:
            sampling["repetition_penalty"] = given["repetition_penalty"]
        return GenerationConfig(
            max_new_tokens=int(given[lengths[0]]) if lengths else self.max_gen_toks,
            # The harness gives an empty string where a task has no delimiter.
            stop=tuple(text for text in until if text),
            batch_size=self.batch_size,
            **{name: given[name] for name in _BEAMS if name in given},
        ).resolve(self.model, self.tokenizer, sampling=sampling)

    # ------------------------------------------------------------------------------------------------ their parts

    def _context_room(self, config: GenerationConfig) -> int:
        """Tokens of context at most."""
        if self.max_length is None:
            return 2**31
        assert config.max_new_tokens is not None
        return self.max_length - (0 if self.model.reads_source else config.max_new_tokens)

    def _score(self, contexts: Sequence[np.ndarray], continuations: Sequence[np.ndarray]) -> TextScores:
        start_id = decoder_start_id(self.model, self.tokenizer) if self.model.reads_source else None
        return score_ids(
            self.model, self.params, contexts, continuations, start_id=start_id, batch_size=self.batch_size
        )

    @functools.cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """Matches each special token as it is spelled."""
        decode, ids = self.tokenizer.decode, range(self.tokenizer.vocab_size)
        spelled = {decode([i]) for i in ids if not decode([i], skip_special_tokens=True)} - {""}
        return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))) or r"(?!)")

    def _report(self, method: str, count: int, total: int, what: str) -> None:
        """Count requests that were not computed in one piece, and warn about them."""
        self.truncated[method] += count
        if count:
            _LOG.warning("%d of %d requests %s: the model reads %d tokens", count, total, what, self.max_length)

    def _prefix_id(self) -> int:
        if self._prefix is None:
            raise ValueError(
                "a text without a context needs a prefix token, and the tokenizer has no token for the beginning or "
                "the end of a text: give prefix_token_id, for example the id of a line break"
            )
        return self._prefix

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text with its special tokens; no ids for an empty text of a causal model."""
        return [ids for ids, _ in self._encode_counting(texts)]

    def _encode_counting(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """Ids of each text with its special tokens, and how many of these come first."""
        rows: list[tuple[np.ndarray, int]] = []
        for text, encoding in zip(texts, self.tokenizer.encode_inputs_batch(texts), strict=True):
            real = np.flatnonzero(encoding.sequence != SPECIAL)
            if self._spelled_prefix and text.startswith(self._spelled_prefix):
                rows.append((self.tokenizer.encode(text), 0))  # it brings its special token
            elif real.size == 0:
                rows.append((encoding.ids if self.model.reads_source else encoding.ids[:0], 0))
            else:
                ids = encoding.ids if self.model.reads_source else encoding.ids[: real[-1] + 1]
                rows.append((ids, int(real[0])))
        return rows

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of each context and of its continuation."""
        moved = []
        for context, continuation in pairs:
            # Words of most vocabularies begin with their space.
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation))
        contexts = self._encode([kept for kept, _ in moved])
        if self.model.reads_source:
            wholes = [(self.tokenizer.encode(continuation), 0) for _, continuation in moved]
        else:
            wholes = self._encode_counting([kept + continuation for kept, continuation in moved])
        rows = []
        for number, (context_ids, (ids, first)) in enumerate(zip(contexts, wholes, strict=True)):
            context, continuation = pairs[number]
            if context == "":  # no special tokens beside the prefix token
                ids = self.tokenizer.encode(continuation)
                begins = int(ids[:1].tolist() == [self._prefix])
                context_ids, ids = ids[:begins], ids[begins:]
            elif not self.model.reads_source:
                context_ids = context_ids if moved[number][0] else ids[:first]
                ids = ids[context_ids.size :]
            if ids.size == 0:
                raise ValueError(f"the continuation of request {number} has no tokens: {continuation!r}")
            rows.append((context_ids if context_ids.size else np.array([self._prefix_id()], np.int32), ids))
        return rows


def rolling_windows(ids: np.ndarray, prefix: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(context, tokens that count) of each window of a text: every token counts once, and a window reads ``length``.

    Args:
        ids: [tokens].
        prefix: the token before the first.
        length: tokens that a window reads at most; the last token that counts is not read.

    Example:
        >>> [(c.tolist(), t.tolist()) for c, t in rolling_windows(np.arange(1, 8), 0, 4)]
        [([0], [1, 2, 3, 4]), ([3, 4], [5, 6, 7])]
    """
    row = np.concatenate([np.array([prefix], ids.dtype), ids])
    windows = []
    for start in range(0, ids.size, length):
        end = min(start + length, ids.size)
        windows.append((row[max(end - length, 0) : start + 1], row[start + 1 : end + 1]))
    return windows

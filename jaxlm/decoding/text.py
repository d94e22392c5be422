"""Text generation for every family that decodes: continuations of prompts, or outputs for sources.

Stop strings are searched in decoded text between calls of the jitted loop, every ``CHUNK`` tokens. Tokens beyond a stop
string are discarded, so the text does not depend on where the calls end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.data.encodings import SPECIAL
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.batches import length_batches, pad_rows
from jaxlm.decoding.beam import beam_search
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.decoding.sample import GREEDY, Sampling
from jaxlm.decoding.windows import TokenRequest, Windows, pad_prompts, read_sources
from jaxlm.models import Model
from jaxlm.models.common import layers_apart

CHUNK = 8
"""Tokens between two searches for stop strings."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """A request for generated text. Hashable.

    Attributes:
        max_new_tokens: tokens to generate at most for each text, the end token included.
        sampling: how the next token is drawn; beam search needs ``GREEDY``.
        num_beams: live hypotheses of beam search; 1 generates token by token.
        length_penalty: exponent of the length in the score of a hypothesis, see :func:`jaxlm.decoding.beam_search`.
        stop: the text ends before the first of these strings to be complete.
        batch_size: texts that are generated together; None takes all of them.

    Raises:
        TypeError: ``stop`` is a single string.
        ValueError: a value outside its range, or beams together with random sampling.
    """

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    num_beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int | None = 32

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"stop is a sequence of strings, got one string: pass ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))  # hashable
        if "" in self.stop:
            raise ValueError(f"stop strings must not be empty, got {list(self.stop)}")
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} must be finite")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError(f"length_penalty={self.length_penalty} ranks beams: set num_beams above 1")
        if self.num_beams > 1 and self.sampling != GREEDY:
            raise ValueError(f"num_beams={self.num_beams} searches for likely texts: leave sampling at GREEDY")


def generate_text(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerationConfig = GenerationConfig(),
    *,
    key: jax.Array | None = None,
) -> list[str]:
    """The generated text for each of ``texts``, in their order, without the end token and the stop string.

    ``texts`` are prompts to continue, or sources for an encoder-decoder (translation, summarization). Prompts are
    encoded without special tokens, and their continuations are decoded with them; sources are encoded by
    ``tokenizer.encode_inputs``, and outputs are decoded without special tokens. Incomplete UTF-8 characters at the end
    are decoded as the tokenizer does (U+FFFD).

    Texts are sorted by length, batched, and padded to a few lengths, for each of which the loop is compiled once. The
    draws of a text depend on ``key`` and its index, not on its batch. Prompts may outgrow the model's context: the last
    half of each then becomes the next prompt, when the longest of the batch has reached the end of the context.

    Args:
        key: needed unless ``config.sampling`` is greedy.

    Raises:
        TypeError: ``texts`` is a single string.
        ValueError: the model has no head for text; a text that is empty or longer than the model's positions; what
            :func:`jaxlm.decoding.generate` or :func:`jaxlm.decoding.beam_search` refuses.

    Example:
        >>> generate_text(model, params, tokenizer, ["To be", "O"], GenerationConfig(stop=(".",)))   # doctest: +SKIP
    """
    text = _Text(model, params, tokenizer, config, key)
    rows = text.encode(texts)
    results = [""] * len(rows)
    for numbers in length_batches([ids.size for ids in rows], config.batch_size):
        batch = [rows[number] for number in numbers]
        if config.num_beams > 1:
            outputs = text.beam_texts(batch)
        else:
            *_, outputs = text.partial_texts(batch, numbers, CHUNK if config.stop else config.max_new_tokens)
        for number, output in zip(numbers, outputs, strict=True):
            results[number] = output
    return results


def stream_text(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    text: str,
    config: GenerationConfig = GenerationConfig(),
    *,
    key: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Iterator[str]:
    """The text that :func:`generate_text` gives for one prompt or source, in pieces as they become final.

    A piece is held back while later tokens may change it: an incomplete character, and the beginning of a stop string.

    Args:
        chunk: tokens of each call of the jitted loop.

    Raises:
        As :func:`generate_text`, at the call and not at the first piece. ValueError for beams or ``chunk`` below 1.

    Example:
        >>> for piece in stream_text(model, params, tokenizer, "To be"):   # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if config.num_beams > 1:
        raise ValueError(f"num_beams={config.num_beams}: beam search knows no text before its end; use generate_text")
    generation = _Text(model, params, tokenizer, config, key)
    texts = generation.partial_texts(generation.encode([text]), np.zeros(1, np.int32), chunk)
    first = next(texts)  # raises here what the model refuses

    def pieces() -> Iterator[str]:
        shown = 0
        for (output,) in (first, *texts):
            if len(output) > shown:
                yield output[shown:]
                shown = len(output)

    return pieces()


def decoder_start_id(model: Model, tokenizer: Tokenizer) -> int:
    """The first token that the decoder of an encoder-decoder reads: the config's, or else the tokenizer's bos token.

    Raises:
        ValueError: neither has one.
    """
    start = getattr(model.config, "decoder_start_id", None)
    start = tokenizer.special_ids.bos if start is None else start
    if start is None:
        raise ValueError(f"{model.family} has no decoder_start_id and the tokenizer no beginning-of-sequence token")
    return start


class _Text:
    """A request together with its model and tokenizer."""

    def __init__(
        self, model: Model, params: Any, tokenizer: Tokenizer, config: GenerationConfig, key: jax.Array | None
    ) -> None:
        require_task(
            model, ("causal", "permutation", "seq2seq"), "it generates no text",
            "load a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)",
        )  # fmt: skip
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._start: np.ndarray | None = None
        if model.reads_source:
            self._start = np.array([decoder_start_id(model, tokenizer)], np.int32)
        self._request = TokenRequest(
            model=model,
            params=jax.jit(layers_apart)(params),  # once here, instead of in each call of the loop
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            key=key,
            end_id=tokenizer.end_id,
            num_ids=min(tokenizer.vocab_size, model.config.vocab_size),
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each prompt or source."""
        what = "source" if self._model.reads_source else "prompt"
        if isinstance(texts, str):
            raise TypeError(f"texts are a sequence of strings, got one string: pass [{texts!r}]")
        if not texts:
            raise ValueError(f"there are no {what}s: pass at least one")
        limit = self._request.max_positions
        if self._model.reads_source:
            encodings = self._tokenizer.encode_inputs_batch(texts)
            rows = [encoding.ids for encoding in encodings]
            empty = [bool(np.all(encoding.sequence == SPECIAL)) for encoding in encodings]
        else:
            rows = [self._tokenizer.encode(text) for text in texts]
            empty = [ids.size == 0 for ids in rows]
        for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
            if empty[row]:
                raise ValueError(f"{what} {row} is {text!r}, which has no tokens: pass at least one character")
            check_vocabulary(ids, source_vocab_size(self._model), f"{what} {row}")
            if limit is not None and ids.size > limit:
                raise ValueError(f"{what} {row} has {ids.size} tokens, but max_positions={limit}: shorten it")
        return rows

    def beam_texts(self, batch: Sequence[np.ndarray]) -> list[str]:
        """The text of the best hypothesis of each row."""
        request, config = self._request, self._config
        if self._start is None:
            prompts, state = batch, None
            tokens_BT, segment_ids_BT = pad_prompts(request, prompts, config.max_new_tokens)
        else:
            prompts, state = [self._start] * len(batch), read_sources(request, batch, config.max_new_tokens)
            tokens_BT, segment_ids_BT = pad_rows(prompts, 1)
        beams = beam_search(
            request.model, request.params, tokens_BT, segment_ids_BT, max_new_tokens=config.max_new_tokens,
            beams=config.num_beams, length_penalty=config.length_penalty, end_id=request.end_id,
            allowed_ids=request.num_ids, state=state,
        )  # fmt: skip
        best_BN, lengths_B = np.asarray(beams.tokens[:, 0]), np.asarray(beams.lengths[:, 0])
        rows = [np.concatenate([ids, new[:n]]) for ids, new, n in zip(prompts, best_BN, lengths_B, strict=True)]
        texts = [self._decode(ids, prompt.size) for ids, prompt in zip(rows, prompts, strict=True)]
        return [_final(text, config.stop, over=True)[0] for text in texts]

    def partial_texts(self, batch: Sequence[np.ndarray], numbers: np.ndarray, chunk: int) -> Iterator[list[str]]:
        """The final part of the text of every row, after each chunk; the last one is the whole text."""
        if self._start is None:
            prompts, windows = batch, Windows(self._request, batch, numbers)
        else:
            prompts = [self._start] * len(batch)
            windows = Windows(self._request, prompts, numbers, batch)
        while True:
            # Copies: the buffers are donated to the next call.
            progress = windows.progress
            tokens, lengths, ended = (np.array(x) for x in (progress.tokens, progress.lengths, progress.ended))
            texts, stopped = [], []
            for row, earlier in enumerate(windows.rows):
                ids = np.concatenate([earlier, tokens[row, : lengths[row]]])
                text = self._decode(ids, prompts[row].size)
                text, found = _final(text, self._config.stop, over=windows.over or bool(ended[row]))
                texts.append(text)
                stopped.append(found)
            yield texts
            ended |= np.array(stopped)
            if windows.over or ended.all():
                return
            windows.advance(ended, chunk)

    def _decode(self, ids: np.ndarray, prompt: int) -> str:
        """The text of the ids after the first ``prompt``, without an end token at their end."""
        if ids.size > prompt and ids[-1] == self._request.end_id:
            ids = ids[:-1]
        if self._start is not None:
            return self._tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        # Decoded together with the prompt: some tokenizers treat the beginning of a text differently.
        return self._tokenizer.decode(ids)[len(self._tokenizer.decode(ids[:prompt])) :]


def check_vocabulary(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raise ``ValueError`` for an id outside the vocabulary of the model."""
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"{what} has id {ids.max()}, outside the model's {vocab_size} ids: is this the tokenizer of the model?"
        )


def _final(text: str, stop: Sequence[str], *, over: bool) -> tuple[str, bool]:
    """The part of ``text`` that later tokens cannot change, and whether a stop string ends it.

    ``over``: there are no later tokens.
    """
    if not over:
        text = text.rstrip("\ufffd")
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    if found:
        return text[: min(found)[1]], True
    if over:
        return text, False
    held = max((_overlap(text, string) for string in stop), default=0)
    return text[: len(text) - held], False


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that ``string`` begins with."""
    return next(n for n in range(min(len(text), len(string) - 1), -1, -1) if text.endswith(string[:n]))

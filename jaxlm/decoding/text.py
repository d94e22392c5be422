"""Text generation for every generative family: continuations of prompts, or outputs for sources.

Stop strings are searched in the decoded text between calls of the jitted loop, every ``CHUNK`` tokens. Tokens after a
stop string are discarded, so the text does not depend on ``CHUNK``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxlm.data.encodings import SPECIAL
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.batches import length_batches, pad_rows
from jaxlm.decoding.beam import BeamConfig, beam_search
from jaxlm.decoding.config import FILE, GenerationConfig, num_ids
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.finite import rename_rows_in_errors
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.decoding.windows import TokenRequest, WindowedGeneration, pad_prompts, read_sources
from jaxlm.models import Model
from jaxlm.spec import Params

CHUNK = 8
"""Number of tokens between two searches for stop strings."""

UNSET_CONFIG = GenerationConfig()
"""A request in which no field is set."""


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str] | Sequence[np.ndarray],
    config: GenerationConfig = UNSET_CONFIG,
    *,
    key: jax.Array | None = None,
) -> list[str]:
    """The generated text for each item of ``texts``, in order, without the end token and the stop string.

    ``texts`` are prompts, or sources for an encoder-decoder (translation, summarization). Prompts are encoded without
    special tokens, and special tokens in their continuations are kept. Sources are encoded with
    ``tokenizer.encode_inputs``, and special tokens in the outputs are removed. To use other special tokens, pass all
    texts as token ids (int32 arrays [tokens]). An incomplete UTF-8 character at the end is decoded as U+FFFD.

    Texts are sorted by length, batched, and padded to a few lengths. The loop is compiled once per length. The random
    draws for a text depend on ``key`` and the index of the text, not on its batch. A prompt and its continuation may be
    longer than the model's context: when the longest row of a batch fills the context, generation continues with the
    last ``max_positions // 2`` tokens of each row as its new prompt.

    Args:
        config: fields that are not set are read from ``generation_config.json`` in the directory of the model, see
            :meth:`GenerationConfig.resolve`.
        key: required unless sampling is greedy.

    Raises:
        TypeError: ``texts`` is a single string.
        ValueError: the model has no head for text generation; a text is empty, or longer than the model's positions or
            ``max_length``; or an argument is invalid for :meth:`GenerationConfig.resolve`,
            :func:`jaxlm.decoding.generate` or :func:`jaxlm.decoding.beam_search`.
        NotFiniteError: logits are not finite. The message names the texts and the parameters that are not finite.

    Example:
        >>> generate_text(model, params, tokenizer, ["To be", "O"], GenerationConfig(stop=(".",)))   # doctest: +SKIP
    """
    generator = _TextGenerator(model, params, tokenizer, config, key)
    rows = generator.encode(texts)
    results = [""] * len(rows)
    for numbers in length_batches([ids.size for ids in rows], config.batch_size):
        batch = [rows[number] for number in numbers]
        if generator.num_beams > 1:
            outputs = generator.beam_texts(batch, numbers)
        else:
            *_, outputs = generator.partial_texts(batch, numbers, CHUNK if generator.stop else None)
        for number, output in zip(numbers, outputs, strict=True):
            results[number] = output
    return results


def stream_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    config: GenerationConfig = UNSET_CONFIG,
    *,
    key: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Iterator[str]:
    """The text that :func:`generate_text` returns for one prompt or source, as an iterator of pieces.

    A piece is yielded as soon as later tokens cannot change it. An incomplete character, and a possible beginning of a
    stop string, are yielded later.

    Args:
        chunk: number of tokens in each call of the jitted loop.

    Raises:
        The errors of :func:`generate_text`. ValueError: beam search is requested, or ``chunk`` is below 1. All errors
        are raised by the call, before the first piece is requested.

    Example:
        >>> for piece in stream_text(model, params, tokenizer, "To be"):   # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    generator = _TextGenerator(model, params, tokenizer, config, key)
    if generator.num_beams > 1:
        raise ValueError(f"num_beams={generator.num_beams}: beam search cannot stream text; use generate_text")
    texts = generator.partial_texts(generator.encode([text]), np.zeros(1, np.int32), chunk)
    first = next(texts)  # so that the call raises the errors

    def pieces() -> Iterator[str]:
        yielded = 0
        for (output,) in (first, *texts):
            if len(output) > yielded:
                yield output[yielded:]
                yielded = len(output)

    return pieces()


def decoder_start_id(model: Model, tokenizer: Tokenizer) -> int:
    """The first token that the decoder reads: ``decoder_start_id`` of the config, or the tokenizer's bos token if None.

    Raises:
        ValueError: the config has no ``decoder_start_id`` and the tokenizer has no bos token.
    """
    start = getattr(model.config, "decoder_start_id", None)
    start = tokenizer.special_ids.bos if start is None else start
    if start is None:
        raise ValueError(f"{model.family} has no decoder_start_id and the tokenizer has no beginning-of-sequence token")
    return start


def _generation_start_id(model: Model, tokenizer: Tokenizer) -> int:
    """The first token that the decoder reads in text generation.

    ``decoder_start_token_id`` in ``generation_config.json`` overrides the id in ``config.json``. It does not override
    a different id that the caller passed to ``load_pretrained``.
    """
    metadata, config_id = model.metadata, getattr(model.config, "decoder_start_id", None)
    file_id = None if metadata is None else (metadata.generation_config or {}).get("decoder_start_token_id")
    if metadata is None or file_id is None or metadata.config.get("decoder_start_token_id", config_id) != config_id:
        return decoder_start_id(model, tokenizer)
    return file_id


class _TextGenerator:
    """Generates the texts of a request with a model and a tokenizer."""

    def __init__(
        self, model: Model, params: Params, tokenizer: Tokenizer, config: GenerationConfig, key: jax.Array | None
    ) -> None:
        require_task(
            model, ("causal", "permutation", "seq2seq"), "it generates no text",
            "load a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)",
        )  # fmt: skip
        self._model, self._tokenizer = model, tokenizer
        resolved = config.resolve(model, tokenizer)
        assert resolved.num_beams is not None
        assert resolved.length_penalty is not None
        assert resolved.early_stopping is not None
        assert resolved.sampling is not None
        self.num_beams, self.stop = resolved.num_beams, resolved.stop or ()
        self._length_penalty, self._early_stopping = resolved.length_penalty, resolved.early_stopping
        self._max_new_tokens, self._max_length = resolved.max_new_tokens, resolved.max_length
        if key is None and config.sampling is None and resolved.sampling.temperature > 0.0:
            raise ValueError(f"{FILE} sets do_sample=True: pass key, e.g. jax.random.key(0), or sampling=GREEDY")
        self._start: np.ndarray | None = None
        if model.reads_source:
            self._start = np.array([_generation_start_id(model, tokenizer)], np.int32)
        self._request = TokenRequest(
            model=model,
            params=params,
            max_new_tokens=0,  # set for each batch
            sampling=resolved.sampling,
            key=key,
            end_ids=resolved.end_ids or (),
            num_ids=num_ids(model, tokenizer),
        )

    def encode(self, texts: Sequence[str] | Sequence[np.ndarray]) -> list[np.ndarray]:
        """The token ids of each prompt or source, after a check."""
        what = self._input_name
        if isinstance(texts, str):
            raise TypeError(f"texts are a sequence of strings, got one string: pass [{texts!r}]")
        if not texts:
            raise ValueError(f"there are no {what}s: pass at least one")
        limit = self._request.max_positions
        strings = [text for text in texts if isinstance(text, str)]
        rows = [text for text in texts if isinstance(text, np.ndarray)]
        if rows and strings:
            raise TypeError(
                f"pass all {what}s as strings or all as ids, got {len(strings)} strings of {len(texts)} {what}s"
            )
        if rows:
            empty = [ids.size == 0 for ids in rows]
        elif self._model.reads_source:
            encodings = self._tokenizer.encode_inputs_batch(strings)
            rows = [encoding.ids for encoding in encodings]
            empty = [bool(np.all(encoding.sequence_ids == SPECIAL)) for encoding in encodings]
        else:
            rows = [self._tokenizer.encode(text) for text in strings]
            empty = [ids.size == 0 for ids in rows]
        for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
            if empty[row]:
                raise ValueError(f"{what} {row} is {text!r}, which has no tokens: pass at least one character")
            check_vocabulary(ids, source_vocab_size(self._model), f"{what} {row}")
            if limit is not None and ids.size > limit:
                raise ValueError(f"{what} {row} has {ids.size} tokens, but max_positions={limit}: shorten it")
            if self._max_length is not None and (1 if self._model.reads_source else ids.size) >= self._max_length:
                raise ValueError(
                    f"{what} {row} has {ids.size} tokens, and max_length={self._max_length} leaves no room for new "
                    "tokens: set max_new_tokens instead"
                )
        return rows

    def _limits(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """The maximum number of new tokens for each prompt, [B]."""
        if self._max_length is None:
            return np.full(len(prompts), self._max_new_tokens)
        return np.asarray([self._max_length - ids.size for ids in prompts])

    @property
    def _input_name(self) -> str:
        """The word for an input text in error messages."""
        return "source" if self._model.reads_source else "prompt"

    def beam_texts(self, batch: Sequence[np.ndarray], numbers: np.ndarray) -> list[str]:
        """The text of the best hypothesis for each row."""
        request, prompts = self._request, batch if self._start is None else [self._start] * len(batch)
        limits = self._limits(prompts)
        if self._start is None:
            state = None
            tokens_BT, segment_ids_BT = pad_prompts(request, prompts, int(limits.max()))
        else:
            state = read_sources(request, batch, int(limits.max()))
            tokens_BT, segment_ids_BT = pad_rows(prompts, 1)
        with rename_rows_in_errors(self._input_name, numbers):
            beams = beam_search(
                request.model, request.params, tokens_BT, segment_ids_BT, max_new_tokens=limits,
                beams=BeamConfig(self.num_beams, self._length_penalty, self._early_stopping),
                end_id=request.end_ids, allowed_ids=request.num_ids, state=state,
            )  # fmt: skip
        best_BN, lengths_B = np.asarray(beams.tokens[:, 0]), np.asarray(beams.lengths[:, 0])
        rows = [np.concatenate([ids, new[:n]]) for ids, new, n in zip(prompts, best_BN, lengths_B, strict=True)]
        texts = [self._decode(ids, prompt.size) for ids, prompt in zip(rows, prompts, strict=True)]
        return [_final_part(text, self.stop, is_complete=True)[0] for text in texts]

    def partial_texts(self, batch: Sequence[np.ndarray], numbers: np.ndarray, chunk: int | None) -> Iterator[list[str]]:
        """After each chunk, the part of each row's text that later tokens cannot change. The last texts are complete.

        Args:
            batch: token ids of each prompt or source.
            numbers: [B] index of each text.
            chunk: number of tokens between two results. None: the only result has the complete texts.
        """
        prompts = batch if self._start is None else [self._start] * len(batch)
        limits = self._limits(prompts)
        request = dataclasses.replace(self._request, max_new_tokens=int(limits.max()))
        with rename_rows_in_errors(self._input_name, numbers):
            windows = WindowedGeneration(request, prompts, numbers, None if self._start is None else batch)
        chunk = request.max_new_tokens if chunk is None else chunk
        while True:
            # Copy the arrays, because their buffers are donated to the next call.
            progress = windows.progress
            tokens, lengths, ended = (np.array(x) for x in (progress.tokens, progress.lengths, progress.ended))
            texts, has_stop = [], []
            for row, earlier_ids in enumerate(windows.rows):
                ids = np.concatenate([earlier_ids, tokens[row, : lengths[row]]])
                limit = prompts[row].size + limits[row]
                ended[row] |= ids.size >= limit
                ids = ids[:limit]
                text = self._decode(ids, prompts[row].size)
                text, stopped = _final_part(text, self.stop, is_complete=windows.is_finished or bool(ended[row]))
                texts.append(text)
                has_stop.append(stopped)
            yield texts
            ended |= np.array(has_stop)
            if windows.is_finished or ended.all():
                return
            with rename_rows_in_errors(self._input_name, numbers):
                windows.advance(ended, chunk)

    def _decode(self, ids: np.ndarray, prompt_length: int) -> str:
        """The text of the ids after the prompt, without the end token."""
        if ids.size > prompt_length and ids[-1] in self._request.end_ids:
            ids = ids[:-1]
        if self._start is not None:
            return self._tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
        # Decode the ids together with the prompt, because some tokenizers treat the beginning of a text differently.
        return self._tokenizer.decode(ids)[len(self._tokenizer.decode(ids[:prompt_length])) :]


def check_vocabulary(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raise ``ValueError`` if an id is outside the vocabulary of the model."""
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"{what} has id {ids.max()}, outside the model's {vocab_size} ids: is this the tokenizer of the model?"
        )


def _final_part(text: str, stop: Sequence[str], *, is_complete: bool) -> tuple[str, bool]:
    """The part of ``text`` that later tokens cannot change, and whether a stop string ends the text.

    Args:
        is_complete: whether there are no later tokens.
    """
    if not is_complete:
        text = text.rstrip("\ufffd")
    # The stop string whose last character comes first ends the text.
    found = [(start + len(string), start) for string in stop if (start := text.find(string)) >= 0]
    if found:
        return text[: min(found)[1]], True
    if is_complete:
        return text, False
    possible_stop = max((_overlap(text, string) for string in stop), default=0)
    return text[: len(text) - possible_stop], False


def _overlap(text: str, string: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``string``."""
    return next(n for n in range(min(len(text), len(string) - 1), -1, -1) if text.endswith(string[:n]))

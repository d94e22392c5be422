"""Text in, text out: batched and streaming, with stop strings.

Stop strings are looked for in decoded text between calls of the jitted loop, every ``CHUNK`` tokens; what the loop made
beyond one is dropped, so neither function's text depends on where the calls fall. Texts may outgrow the model's
context: see :class:`_Windows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.sample import GREEDY, Progress, Sampling, advance, prefill
from jaxlm.models import Model
from jaxlm.models.common import layers_apart

CHUNK = 8
"""Tokens between two looks at the text."""


def generate_text(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """The continuation of each prompt, up to the tokenizer's end token or the first stop string (neither is included).

    Of several stop strings, the first to be complete counts. Bytes that are no whole character when the tokens run out
    are what the tokenizer makes of them (U+FFFD).

    Raises:
        TypeError: ``prompts`` or ``stop`` is a single string.
        ValueError: an empty prompt or stop string, or what :func:`jaxlm.decoding.generate` refuses.

    Example:
        >>> generate_text(model, params, tokenizer, ["To be", "O"], max_new_tokens=40, stop=["."])   # doctest: +SKIP
    """
    rows = _encode(tokenizer, prompts)
    _check_stop(stop)
    windows = _Windows(model, params, tokenizer, rows, max_new_tokens, sampling, key)
    *_, texts = _texts(windows, tokenizer, stop, CHUNK if stop else max_new_tokens)
    return texts


def stream_text(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    stop: Sequence[str] = (),
    chunk: int = CHUNK,
) -> Iterator[str]:
    """The same text as :func:`generate_text`, in pieces as they become final.

    Held back is what later tokens may still change: an incomplete character (U+FFFD at the end) and whatever could
    begin a stop string.

    Args:
        chunk: tokens per call of the jitted loop.

    Raises:
        As :func:`generate_text`, at the call and not at the first piece; ValueError for ``chunk`` below 1.

    Example:
        >>> for piece in stream_text(model, params, tokenizer, "To be", max_new_tokens=100):   # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    rows = _encode(tokenizer, [prompt])
    _check_stop(stop)
    windows = _Windows(model, params, tokenizer, rows, max_new_tokens, sampling, key)

    def pieces() -> Iterator[str]:
        shown = 0
        for (text,) in _texts(windows, tokenizer, stop, chunk):
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)

    return pieces()


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    if isinstance(prompts, str):
        raise TypeError(f"prompts are a sequence of strings, got one string: pass [{prompts!r}]")
    if not prompts:
        raise ValueError("there are no prompts: pass at least one")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    for row, (ids, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if ids.size == 0:
            raise ValueError(
                f"prompt {row} is {prompt!r}, which has no tokens: pass at least one character, or a start token"
            )
    return rows


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise TypeError(f"stop is a sequence of strings, got one string: pass [{stop!r}]")
    if "" in stop:
        raise ValueError(f"stop strings must not be empty, got {list(stop)}")


class _Windows:
    """Generation that outlasts the context: whenever it is full, the last half of each row becomes the next prompt.

    Models without ``max_positions`` have one window. ``rows`` is what each row holds from earlier windows, prompt
    included; ``progress`` the window under way.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokenizer: Tokenizer,
        rows: list[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling,
        key: jax.Array | None,
    ) -> None:
        self._model, self._params, self._sampling, self._key = model, params, sampling, key
        self._end_id = tokenizer.end_id
        self._ids = min(tokenizer.vocab_size, model.config.vocab_size)
        self._limit = getattr(model.config, "max_positions", None)
        self._left, self._number = max_new_tokens, 0
        self.rows = rows
        longest = max(ids.size for ids in rows)
        if self._limit is not None and longest > self._limit:
            raise ValueError(f"a prompt of {longest} tokens exceeds max_positions={self._limit}: shorten it")
        self.progress = self._open(rows)
        # Once, and not again in each call of the loop.
        self._apart = jax.jit(layers_apart)(params)

    def _open(self, prompts: list[np.ndarray]) -> Progress:
        """Prompts padded on the left to the longest, and their first tokens."""
        longest = max(ids.size for ids in prompts)
        prompts_BT = np.stack([np.pad(ids, (longest - ids.size, 0)) for ids in prompts])
        segment_ids_BT = np.stack([np.arange(longest) >= longest - ids.size for ids in prompts]).astype(np.int32)
        room = self._left if self._limit is None else min(self._left, self._limit - longest + 1)
        # The first window draws what `generate` draws; the others have keys of their own.
        key = self._key if self._key is None or self._number == 0 else jax.random.fold_in(self._key, self._number)
        return prefill(
            self._model, self._params, prompts_BT, segment_ids_BT, max_new_tokens=room, sampling=self._sampling,
            key=key, end_id=self._end_id, allowed_ids=self._ids,
        )  # fmt: skip

    @property
    def full(self) -> bool:
        """No more tokens fit into this window."""
        return int(self.progress.step) == self.progress.tokens.shape[1]

    @property
    def over(self) -> bool:
        """All tokens that were asked for are made."""
        return self.full and self.progress.tokens.shape[1] == self._left

    def advance(self, ended: np.ndarray, chunk: int) -> None:
        """Up to ``chunk`` more tokens for the rows that have not ended, in this window or the first of the next."""
        if not self.full:
            progress = dataclasses.replace(self.progress, ended=jnp.asarray(ended))
            self.progress = advance(self._model, self._apart, progress, chunk)
            return
        made = [np.asarray(self.progress.tokens)[row, :n] for row, n in enumerate(np.asarray(self.progress.lengths))]
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, made, strict=True)]
        self._left -= self.progress.tokens.shape[1]
        self._number += 1
        assert self._limit is not None
        fresh = self._open([ids[-max(self._limit // 2, 1) :] for ids in self.rows])
        # A row that had ended draws nothing: its first token here is taken back.
        lengths = jnp.where(jnp.asarray(ended), 0, fresh.lengths)
        self.progress = dataclasses.replace(fresh, ended=fresh.ended | jnp.asarray(ended), lengths=lengths)


def _texts(windows: _Windows, tokenizer: Tokenizer, stop: Sequence[str], chunk: int) -> Iterator[list[str]]:
    """The text of every row that is final, after each chunk; the last one is all of it."""
    before = [len(tokenizer.decode(prompt)) for prompt in windows.rows]
    while True:
        # Copies: the buffers are donated to the next call.
        progress = windows.progress
        tokens, lengths, ended = (np.array(x) for x in (progress.tokens, progress.lengths, progress.ended))
        texts, stopped = [], []
        for row, earlier in enumerate(windows.rows):
            ids = np.concatenate([earlier, tokens[row, : lengths[row]]])
            if tokenizer.end_id is not None and ended[row] and ids[-1] == tokenizer.end_id:
                ids = ids[:-1]
            # Decoded together with the prompt: some tokenizers treat the beginning of a text differently.
            text = tokenizer.decode(ids)[before[row] :]
            text, found = _final(text, stop, over=windows.over or bool(ended[row]))
            texts.append(text)
            stopped.append(found)
        yield texts
        ended |= np.array(stopped)
        if windows.over or ended.all():
            return
        windows.advance(ended, chunk)


def _final(text: str, stop: Sequence[str], *, over: bool) -> tuple[str, bool]:
    """What of ``text`` later tokens cannot change, and whether it ends at a stop string. ``over``: none will come."""
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

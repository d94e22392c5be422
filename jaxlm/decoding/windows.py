"""The generation loop for a batch of texts. Each jitted call generates several tokens.

If a prompt and its continuation become longer than the context of the model (``Model.max_positions``), generation
continues in a new window: the last tokens of each row are the new prompt. For a model that needs the whole text
(``Model.needs_whole_text``), an error is raised instead.

Shapes: B batch, S source time, T prompt time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.batches import bucket_length, pad_rows
from jaxlm.decoding.prompts import check_sharding
from jaxlm.decoding.sample import (
    PartialGeneration,
    Sampling,
    advance,
    check_and_make_settings,
    fold_in_rows,
    prefill_with_settings,
)
from jaxlm.models import Model
from jaxlm.sharding import active
from jaxlm.spec import Params, State


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """The model and the settings that all batches of one call share.

    Attributes:
        model: the model.
        params: its parameters.
        sampling: how tokens are drawn.
        key: random key; None for greedy decoding.
        end_ids: token ids that end a row.
        num_ids: only ids below this number are generated.
    """

    model: Model
    params: Any
    sampling: Sampling
    key: jax.Array | None
    end_ids: tuple[int, ...]
    num_ids: int


def pad_prompts(prompts: Sequence[np.ndarray], limit: int | None, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the left, and their segment ids; both [B, T].

    T is the bucket length of the longest prompt (:func:`bucket_length`), but at most the number of positions that the
    new tokens leave, ``limit - new_tokens + 1``. If the longest prompt is longer than this maximum, T is the length of
    the longest prompt. If all prompts have one token, such as the start id of an encoder-decoder, T is 1.

    Args:
        limit: the number of positions of the model. None: there is no limit.
        new_tokens: maximum number of new tokens of a row.
    """
    longest = max(ids.size for ids in prompts)
    max_prompt = None if limit is None else limit - new_tokens + 1  # the model does not read the last new token
    is_padded = longest > 1 and (max_prompt is None or longest <= max_prompt)
    return pad_rows(prompts, bucket_length(longest, max_prompt) if is_padded else longest, left=True)


def next_window_error(model: Model, what: str, num_tokens: int) -> ValueError:
    """The error for a text that needs a second window, for a model that must read a text from its first token.

    Args:
        what: name of the prompt in the message.
        num_tokens: number of tokens of the prompt and its continuation that the model must read.
    """
    return ValueError(
        f"{what}: the model must read {num_tokens} tokens of the prompt and its continuation, but "
        f"max_positions={model.max_positions}. {model.family} cannot continue in a new window, because it must read a "
        "text from its first token. Reduce the number of new tokens. If no parameter shape depends on max_positions, "
        "you can also increase it with model.with_fields(max_positions=...)"
    )


def read_sources(model: Model, params: Params, sources: Sequence[np.ndarray], length: int) -> Any:
    """The initial state of an encoder-decoder, with the encoded ``sources`` and cache slots for ``length`` tokens."""
    check_sharding(active())
    longest = max(ids.size for ids in sources)
    source_BS, segment_ids_BS = pad_rows(sources, bucket_length(longest, model.max_positions))
    return _read_sources(model, params, source_BS, segment_ids_BS, length=length)


@jax.jit(static_argnames=("model", "length"))
def _read_sources(
    model: Model,
    params: Params,
    source_BS: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    length: int,
) -> Any:
    return model.init_decode_state(params, source_BS, length, segment_ids=segment_ids_BS)


class WindowedGeneration:
    """Generation of a batch in one or more windows.

    A window is one generation with at most ``max_positions`` positions. When a window is full, the last
    ``max_positions // 2`` tokens of each row are the prompt of the next window. Encoder-decoders, models without
    ``max_positions`` and models that need the whole text (``Model.needs_whole_text``) have only one window.

    Args:
        request: the model and the settings that all batches share.
        prompts: token ids of each prompt; for an encoder-decoder, the start id.
        text_indices: [B] index of each text. In the first window, the random key of a row is ``request.key`` folded
            with this index. Later windows use other keys (:meth:`_open`).
        max_new_tokens: maximum number of new tokens in each row.
        sources: token ids of each source, for an encoder-decoder.

    Attributes:
        rows: token ids of each row: the prompt and the tokens of earlier windows, but not of the current window.
        progress: the generation in the current window.
    """

    def __init__(
        self,
        request: BatchSettings,
        prompts: Sequence[np.ndarray],
        text_indices: np.ndarray,
        max_new_tokens: int,
        sources: Sequence[np.ndarray] | None = None,
    ) -> None:
        self._request, self._text_indices = request, text_indices
        self._remaining, self._window_index = max_new_tokens, 0
        self.rows = list(prompts)
        state = None if sources is None else read_sources(request.model, request.params, sources, max_new_tokens)
        self.progress = self._open(self.rows, state)

    def _open(
        self, prompts: Sequence[np.ndarray], state: State | None = None, seen: jax.Array | None = None
    ) -> PartialGeneration:
        """The generation in a new window, after it has read the prompts and drawn the first new token of each row.

        Args:
            state: the state of an encoder-decoder; None for other models.
            seen: ``PartialGeneration.seen`` of the previous window; None in the first window.
        """
        request, limit = self._request, self._request.model.max_positions
        tokens_BT, segment_ids_BT = pad_prompts(prompts, limit, self._remaining)
        new_tokens = self._remaining if limit is None else min(self._remaining, limit - tokens_BT.shape[1] + 1)
        key = request.key
        if key is not None:
            # The first window uses the key of the request unchanged, so that its tokens equal those of `generate`.
            # Later windows need other keys, because the number that is folded into the key for each token begins again
            # at 0.
            key = fold_in_rows(
                key if self._window_index == 0 else jax.random.fold_in(key, self._window_index), self._text_indices
            )
        settings = check_and_make_settings(
            request.model, tokens_BT, segment_ids_BT, new_tokens, request.sampling, key, request.end_ids,
            request.num_ids, state,
        )  # fmt: skip
        return prefill_with_settings(
            request.model, request.params, tokens_BT, segment_ids_BT, settings, key=key, state=state, seen=seen
        )

    @property
    def is_full(self) -> bool:
        """Whether the longest row has all tokens that the current window can contain."""
        return int(self.progress.step) == self.progress.tokens.shape[1]

    @property
    def is_finished(self) -> bool:
        """Whether the current window is the last one and is full, so that the longest row has all requested tokens."""
        return self.is_full and self.progress.tokens.shape[1] == self._remaining

    def advance(self, ended: np.ndarray, chunk: int) -> None:
        """Generate up to ``chunk`` more tokens for each row that has not ended.

        If the current window is full, this method opens the next window instead and generates one token for each row.

        Args:
            ended: [B] bool, whether the row needs no more tokens.
            chunk: maximum number of tokens in this call.

        Raises:
            ValueError: the next window is needed, but the model needs the whole text.
        """
        if not self.is_full:
            progress = dataclasses.replace(self.progress, ended=jnp.asarray(ended))
            self.progress = advance(self._request.model, self._request.params, progress, chunk)
            return
        new = [np.asarray(self.progress.tokens)[row, :n] for row, n in enumerate(np.asarray(self.progress.lengths))]
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, new, strict=True)]
        limit = self._request.model.max_positions
        assert limit is not None
        if self._request.model.needs_whole_text:
            row = int(np.argmin(ended))
            raise next_window_error(self._request.model, f"prompt {self._text_indices[row]}", self.rows[row].size)
        self._remaining -= self.progress.tokens.shape[1]
        self._window_index += 1
        prompts = [ids[-max(limit // 2, 1) :] for ids in self.rows]
        progress = self._open(prompts, seen=self.progress.seen)  # the repetition penalty applies to all windows
        # `_open` draws a token for every row. Discard the tokens of rows that have ended.
        lengths = jnp.where(jnp.asarray(ended), 0, progress.lengths)
        self.progress = dataclasses.replace(progress, ended=progress.ended | jnp.asarray(ended), lengths=lengths)

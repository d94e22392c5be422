"""Token loops of a batch of texts, in jitted calls of a few tokens each: prompts that may outgrow the context of the
model, or sources of an encoder-decoder.

Shapes: B rows, S source time, T prompt time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.batches import bucket_length, pad_rows
from jaxlm.decoding.sample import Progress, Sampling, advance, prefill, row_keys
from jaxlm.models import Model
from jaxlm.sharding import Sharding, active


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """What the rows of all batches have in common.

    Attributes:
        model: the model.
        params: its parameters, as ``layers_apart`` gives them.
        max_new_tokens: tokens to generate at most, in each row.
        sampling: how tokens are drawn.
        key: random key; None where greedy.
        end_ids: the tokens each of which ends a row.
        num_ids: only ids below it are generated.
    """

    model: Model
    params: Any
    max_new_tokens: int
    sampling: Sampling
    key: jax.Array | None
    end_ids: tuple[int, ...]
    num_ids: int

    @property
    def max_positions(self) -> int | None:
        """Positions that the model has for prompt and output; None where it has no limit."""
        return getattr(self.model.config, "max_positions", None)


def pad_prompts(request: TokenRequest, prompts: Sequence[np.ndarray], left: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, T] padded on the left, and their segment ids.

    T is a bucket length where the model has positions for it and ``left`` new tokens, else the longest prompt's.
    """
    longest, limit = max(ids.size for ids in prompts), request.max_positions
    room = None if limit is None else limit - left + 1  # the last token is never read
    length = bucket_length(longest, room) if room is None or longest <= room else longest
    return pad_rows(prompts, length, left=True)


def read_sources(request: TokenRequest, sources: Sequence[np.ndarray], length: int) -> Any:
    """The state of an encoder-decoder that has read ``sources`` and has room for ``length`` tokens."""
    longest = max(ids.size for ids in sources)
    source_BS, segment_ids_BS = pad_rows(sources, bucket_length(longest, request.max_positions))
    return _read_sources(request.model, request.params, source_BS, segment_ids_BS, length=length, sharding=active())


@functools.partial(jax.jit, static_argnames=("model", "length", "sharding"))
def _read_sources(
    model: Model,
    params: Any,
    source_BS: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    length: int,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> Any:
    return model.start(params, source_BS, length, segment_ids=segment_ids_BS)


class Windows:
    """Generation in one or more windows: when a window is full, the last half of each row becomes the next prompt.

    Models without ``max_positions`` and encoder-decoders have one window.

    Args:
        request: what all batches have in common.
        prompts: ids of each row; the start id for an encoder-decoder.
        numbers: [B] numbers of the rows, from which their random keys are made.
        sources: ids of each source, for an encoder-decoder.

    Attributes:
        rows: ids of each row from earlier windows, prompt included.
        progress: the current window.
    """

    def __init__(
        self,
        request: TokenRequest,
        prompts: Sequence[np.ndarray],
        numbers: np.ndarray,
        sources: Sequence[np.ndarray] | None = None,
    ) -> None:
        self._request, self._numbers = request, numbers
        self._left, self._window = request.max_new_tokens, 0
        self.rows = list(prompts)
        state = None if sources is None else read_sources(request, sources, request.max_new_tokens)
        self.progress = self._open(self.rows, state)

    def _open(self, prompts: Sequence[np.ndarray], state: Any = None) -> Progress:
        """A new window: the prompts are read, and the first token of each row is drawn."""
        request, limit = self._request, self._request.max_positions
        if state is None:
            tokens_BT, segment_ids_BT = pad_prompts(request, prompts, self._left)
        else:
            tokens_BT, segment_ids_BT = pad_rows(prompts, 1)
        room = self._left if limit is None else min(self._left, limit - tokens_BT.shape[1] + 1)
        key = request.key
        if key is not None:
            # The first window draws what `generate` draws; the others have keys of their own.
            key = row_keys(key if self._window == 0 else jax.random.fold_in(key, self._window), self._numbers)
        return prefill(
            request.model, request.params, tokens_BT, segment_ids_BT, max_new_tokens=room, sampling=request.sampling,
            key=key, end_id=request.end_ids, allowed_ids=request.num_ids, state=state,
        )  # fmt: skip

    @property
    def full(self) -> bool:
        """No more tokens fit into this window."""
        return int(self.progress.step) == self.progress.tokens.shape[1]

    @property
    def over(self) -> bool:
        """All requested tokens have been generated."""
        return self.full and self.progress.tokens.shape[1] == self._left

    def advance(self, ended: np.ndarray, chunk: int) -> None:
        """Generate up to ``chunk`` more tokens for the rows that have not ended, in this window or the next one."""
        if not self.full:
            progress = dataclasses.replace(self.progress, ended=jnp.asarray(ended))
            self.progress = advance(self._request.model, self._request.params, progress, chunk)
            return
        new = [np.asarray(self.progress.tokens)[row, :n] for row, n in enumerate(np.asarray(self.progress.lengths))]
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, new, strict=True)]
        self._left -= self.progress.tokens.shape[1]
        self._window += 1
        limit = self._request.max_positions
        assert limit is not None
        progress = self._open([ids[-max(limit // 2, 1) :] for ids in self.rows])
        # Prefill draws a token in every row: those of rows that have ended are discarded.
        lengths = jnp.where(jnp.asarray(ended), 0, progress.lengths)
        self.progress = dataclasses.replace(progress, ended=progress.ended | jnp.asarray(ended), lengths=lengths)

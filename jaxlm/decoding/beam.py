"""Beam search: the best hypotheses of each prompt, the whole loop inside one ``jit``.

The state of every family is reordered by the name of its ``batch`` axis, so nothing here knows what it holds.
Shapes: B batch, T prompt length, K beams, N new tokens, V ids that may be generated; C candidates of a step, 2 * K.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm import spec
from jaxlm.decoding.config import EarlyStopping
from jaxlm.decoding.prompts import Array, EndId, check_prompts, end_ids_of, is_end, read_prompts, read_tokens
from jaxlm.models import Model
from jaxlm.models.common import layers_apart
from jaxlm.sharding import Sharding, active


@struct.dataclass
class Beams:
    """Hypotheses of each prompt, best first.

    Attributes:
        tokens: [B, K, N] int32; after the end, the (first) end id again and again.
        lengths: [B, K] int32, new tokens of each hypothesis, its end token included.
        scores: [B, K] float32, ``sum of log-probabilities / length ** length_penalty``. Where fewer than K hypotheses
            exist at all, the rest have score -inf and length 0.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def beam_search(
    model: Model,
    params: Any,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int | Array,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = "never",
    end_id: EndId = None,
    allowed_ids: int | None = None,
    state: Any = None,
) -> Beams:
    """The best continuations of each prompt that a beam of ``beams`` live hypotheses finds.

    A hypothesis is finished by ``end_id`` or by having ``max_new_tokens`` tokens, and counts when it is among the best
    ``beams`` of its step. These are the rules of Hugging Face's ``generate``.

    Args:
        max_new_tokens: of every row, or [B] of each row.
        early_stopping: when the search of a row is over. "never": when no live hypothesis can still beat the worst of
            ``beams`` finished ones. False (the default of Hugging Face): when none would beat it if it ended now with
            its present total. True: also when there are ``beams`` finished ones.
        prompts, segment_ids, end_id, allowed_ids, state: as in :func:`jaxlm.decoding.generate`.
        length_penalty: exponent of the length (end token included) that divides the sum of log-probabilities: 0 favours
            short hypotheses, 1 is the mean, more favours long ones (Wu et al. 2016, section 7, has another formula).

    Raises:
        TypeError: the family carries no state.
        ValueError: ``beams`` below 1, a length penalty that is not finite, or what ``generate`` refuses.

    Example:
        >>> beam_search(model, params, prompts, max_new_tokens=8, beams=4).tokens[:, 0]   # doctest: +SKIP
    """
    limits = np.asarray(max_new_tokens)
    if limits.ndim and (limits.shape != prompts.shape[:1] or limits.min() < 1):
        raise ValueError(f"max_new_tokens={limits.tolist()} must be one number of at least 1 for each prompt")
    count = int(limits.max())
    ids, slots = check_prompts(
        model, prompts, segment_ids,
        max_new_tokens=count, end_id=end_id, allowed_ids=allowed_ids, state=state,
    )  # fmt: skip
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} must be finite")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    limits_B = jnp.broadcast_to(jnp.asarray(limits, jnp.int32), prompts.shape[:1])
    return _beam_search(
        model, params, prompts, segment_ids, limits_B, jnp.float32(length_penalty), state,
        count=count, beams=beams, early_stopping=early_stopping, end_ids=end_ids_of(end_id), ids=ids, slots=slots,
        sharding=active(),
    )  # fmt: skip


@struct.dataclass
class _Search:
    """Live hypotheses, all of ``step`` tokens, and the best finished ones.

    ``parents`` [B * K]: which row of the state each live hypothesis continues. ``searching`` [B]: whether the search of
    a row goes on.
    """

    state: Any
    parents: jax.Array
    step: jax.Array
    live_tokens: jax.Array
    live_totals: jax.Array
    finished: Beams
    searching: jax.Array


_STATIC = ("model", "count", "beams", "early_stopping", "end_ids", "ids", "slots", "sharding")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _beam_search(
    model: Model,
    params: Any,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    limits_B: jax.Array,
    length_penalty: jax.Array,
    state: Any,
    *,
    count: int,
    beams: int,
    early_stopping: EarlyStopping,
    end_ids: tuple[int, ...],
    ids: int,
    slots: int,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> Beams:
    B, K, N = prompts_BT.shape[0], beams, count
    state, logits_BV = read_prompts(model, params, prompts_BT, segment_ids_BT, slots, state)
    params, state, state_specs = layers_apart(params), layers_apart(state), model.state_specs(B, slots)
    parents = jnp.repeat(jnp.arange(B), K)
    tokens_BKN = jnp.full((B, K, N), end_ids[0] if end_ids else 0, jnp.int32)
    search = _Search(
        state=spec.take(state_specs, state, parents),
        parents=parents,
        step=jnp.zeros((), jnp.int32),
        live_tokens=tokens_BKN,
        # The beams of a row are still the same hypothesis: only one of them may branch.
        live_totals=jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0),
        finished=Beams(tokens_BKN, jnp.zeros((B, K), jnp.int32), jnp.full((B, K), -jnp.inf)),
        searching=jnp.ones((B,), bool),
    )

    def select(search: _Search, logits: jax.Array) -> _Search:
        search = _select(search, logits[:, :ids], end_ids, limits_B, length_penalty)
        length_B: jax.Array = search.step
        if early_stopping == "never":
            # A total only falls with each token, so this bounds every score that a live hypothesis can still get:
            # divided by the largest length for a positive penalty, by the next one for a negative.
            length_B = jnp.where(length_penalty > 0, limits_B, search.step + 1)
        best_B = _score(jnp.max(search.live_totals, axis=1), length_B, length_penalty)
        worst_B = jnp.min(search.finished.scores, axis=1)
        searching_B = search.searching & (best_B > worst_B)
        if early_stopping is True:
            searching_B &= worst_B == -jnp.inf
        return dataclasses.replace(search, searching=searching_B)

    search = select(search, logits_BV[parents])

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < N) & jnp.any(search.searching)

    def one(search: _Search) -> _Search:
        state = _reorder(state_specs, search.state, search.parents, fixed=("source",) if model.reads_source else ())
        newest = search.live_tokens[:, :, search.step - 1].reshape(B * K)
        # The state is reordered by where its rows were, and from here on its rows are the live hypotheses in order.
        state, logits = read_tokens(model, params, state, newest)
        return select(dataclasses.replace(search, state=state), logits)

    return jax.lax.while_loop(unfinished, one, search).finished


def _reorder(state_specs: spec.Tree, state: Any, parents: jax.Array, fixed: tuple[str, ...]) -> Any:
    """The state of the hypotheses ``parents``.

    All beams of a row have read the same source, and a parent is a beam of the same row: what is ``fixed`` stays.
    """
    moved = {name: part for name, part in state.items() if name not in fixed}
    moved_specs = {name: part for name, part in state_specs.items() if name not in fixed}
    return {**state, **spec.take(moved_specs, moved, parents)}


def _score(totals: jax.Array, length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    return totals / length.astype(jnp.float32) ** length_penalty


def _select(
    search: _Search, logits: jax.Array, end_ids: tuple[int, ...], limits_B: jax.Array, length_penalty: jax.Array
) -> _Search:
    """Extend every live hypothesis by every id, keep the best.

    Of E ids that end a text, at most K * E candidates are among the best (one per beam and id), so that of the best
    K * (1 + E) at least K remain to go on with.
    """
    B, K, _ = search.live_tokens.shape
    V = logits.shape[-1]
    totals_BKV = search.live_totals[:, :, None] + jax.nn.log_softmax(logits, axis=-1).reshape(B, K, V)
    kept = K * (1 + max(1, len(end_ids)))
    totals_BC, flat_BC = jax.lax.top_k(totals_BKV.reshape(B, K * V), min(kept, K * V))
    beam_BC, token_BC = flat_BC // V, (flat_BC % V).astype(jnp.int32)
    tokens_BCN = _pick(search.live_tokens, beam_BC).at[:, :, search.step].set(token_BC)
    length = search.step + 1
    ends_BC = is_end(token_BC, end_ids) | (length >= limits_B)[:, None]

    among_best_C = jnp.arange(totals_BC.shape[1]) < K
    scores_BC = jnp.where(
        ends_BC & among_best_C[None, :] & search.searching[:, None], _score(totals_BC, length, length_penalty), -jnp.inf
    )
    old = search.finished
    # top_k prefers the first of equals: what was there before, and -inf that was never replaced keeps its length of 0.
    scores_BK, chosen_BK = jax.lax.top_k(jnp.concatenate([old.scores, scores_BC], axis=1), K)
    lengths = jnp.concatenate([old.lengths, jnp.broadcast_to(length, token_BC.shape)], axis=1)
    finished = Beams(
        tokens=_pick(jnp.concatenate([old.tokens, tokens_BCN], axis=1), chosen_BK),
        lengths=_pick(lengths, chosen_BK),
        scores=scores_BK,
    )

    live_BK, chosen_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, totals_BC), K)
    parents_BK = jnp.arange(B)[:, None] * K + _pick(beam_BC, chosen_BK)
    return dataclasses.replace(
        search,
        parents=parents_BK.reshape(B * K),
        step=length,
        live_tokens=_pick(tokens_BCN, chosen_BK),
        live_totals=live_BK,
        finished=finished,
    )


def _pick(x: jax.Array, at_BK: jax.Array) -> jax.Array:
    """``x[b, at[b, k]]`` for each row b."""
    return jax.vmap(lambda row, at: row[at])(x, at_BK)

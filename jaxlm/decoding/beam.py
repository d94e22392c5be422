"""Beam search: the best hypotheses of each prompt, in one jitted loop for each size of the cache.

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
from jaxlm.decoding.finite import check_finite, rows_finite
from jaxlm.decoding.prompts import Array, EndId, check_prompts, end_ids_of, is_end, read_prompts, read_tokens
from jaxlm.models import Model
from jaxlm.models.common import layers_apart
from jaxlm.nn import cache
from jaxlm.sharding import Sharding, active

SMALLEST_CACHE = 16
"""A cache of at most twice as many slots is not grown in stages."""


@struct.dataclass
class Beams:
    """Hypotheses of each prompt, best first.

    Attributes:
        tokens: [B, K, N] int32; after the end, the (first) end id again and again.
        lengths: [B, K] int32, new tokens of each hypothesis, its end token included.
        scores: [B, K] float32, ``sum of log-probabilities / length ** length_penalty``. Where fewer than K hypotheses
            exist at all, the rest have score -inf and length 0.
        finite: [B] bool, whether all logits of live hypotheses of the row were finite.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finite: jax.Array


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
        NotFiniteError: as :func:`jaxlm.decoding.generate`; inside ``jit`` nothing is raised: look at ``finite``.

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
    static = {
        "beams": beams, "early_stopping": early_stopping, "end_ids": end_ids_of(end_id), "ids": ids,
        "sharding": active(),
    }  # fmt: skip
    numbers = {"limits_B": limits_B, "length_penalty": jnp.float32(length_penalty)}
    length = prompts.shape[1]
    sizes = _cache_sizes(model, state, length, slots)
    search = _start(
        model, params, prompts, segment_ids, state, **numbers, **static, count=count, slots=slots, first_slots=sizes[0]
    )
    for size in sizes:
        # While jax traces, the flags are unknown: every stage is called, and its loop ends at once.
        if isinstance(search.searching, jax.core.Tracer) or bool(jnp.any(search.searching)):
            search = _advance(model, params, search, **numbers, **static, slots=size, prompt_length=length)
    check_finite(model, params, search.finished.finite, state)
    return search.finished


def _cache_sizes(model: Model, state: Any, prompt_length: int, slots: int) -> list[int]:
    """Slots of the cache in each stage of the search. Most texts end early, so a search starts with a small cache.

    There is one stage without a cache, and for a given state with other slots: it may hold tokens already.
    """
    specs, _ = _split_source(model, model.state_specs(1, slots))
    held = cache.num_slots(specs, specs if state is None else _split_source(model, state)[0])
    sizes = [held or slots]
    if held != slots:
        return sizes
    while sizes[0] > 2 * max(prompt_length, SMALLEST_CACHE):
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


@struct.dataclass
class _Search:
    """Live hypotheses, all of ``step`` tokens, and the best finished ones.

    ``parents`` [B * K]: which row of the state each live hypothesis continues. ``searching`` [B]: whether the search of
    a row goes on. ``source``: what an encoder-decoder has read, [B, ...]; its hypotheses share it.
    """

    state: Any
    source: Any
    parents: jax.Array
    step: jax.Array
    live_tokens: jax.Array
    live_totals: jax.Array
    finished: Beams
    searching: jax.Array


_STATIC = ("model", "beams", "early_stopping", "end_ids", "ids", "slots", "sharding")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "count", "first_slots"))
def _start(
    model: Model,
    params: Any,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    state: Any,
    *,
    limits_B: jax.Array,
    length_penalty: jax.Array,
    count: int,
    beams: int,
    early_stopping: EarlyStopping,
    end_ids: tuple[int, ...],
    ids: int,
    slots: int,
    first_slots: int,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> _Search:
    """The search after the prompts and one token, with a cache of ``first_slots``."""
    B, K, N = prompts_BT.shape[0], beams, count
    state, logits_BV = read_prompts(model, params, prompts_BT, segment_ids_BT, slots, state)
    state, specs = layers_apart(state), model.state_specs(B, slots)
    own, source = _split_source(model, state)
    own_specs, _ = _split_source(model, specs)
    parents = jnp.repeat(jnp.arange(B), K)
    tokens_BKN = jnp.full((B, K, N), end_ids[0] if end_ids else 0, jnp.int32)
    search = _Search(
        state=spec.take(own_specs, cache.resized(own_specs, own, first_slots), parents),
        source=source,
        parents=jnp.arange(B * K),
        step=jnp.zeros((), jnp.int32),
        live_tokens=tokens_BKN,
        # The beams of a row are still the same hypothesis: only one of them may branch.
        live_totals=jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0),
        finished=Beams(tokens_BKN, jnp.zeros((B, K), jnp.int32), jnp.full((B, K), -jnp.inf), jnp.ones((B,), bool)),
        searching=jnp.ones((B,), bool),
    )
    return _select(search, logits_BV[parents, :ids], end_ids, early_stopping, limits_B, length_penalty)


@functools.partial(jax.jit, static_argnames=(*_STATIC, "prompt_length"))
def _advance(
    model: Model,
    params: Any,
    search: _Search,
    *,
    limits_B: jax.Array,
    length_penalty: jax.Array,
    beams: int,
    early_stopping: EarlyStopping,
    end_ids: tuple[int, ...],
    ids: int,
    slots: int,
    prompt_length: int,
    sharding: Sharding | None,
) -> _Search:
    """The search until it is over, or until a cache of ``slots`` is full."""
    B, K, N = search.live_tokens.shape
    params = layers_apart(params)
    specs, _ = _split_source(model, model.state_specs(B * K, slots))
    search = dataclasses.replace(search, state=cache.resized(specs, search.state, slots))

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < min(N, slots - prompt_length + 1)) & jnp.any(search.searching)

    def one(search: _Search) -> _Search:
        state = spec.take(specs, search.state, search.parents)
        newest = search.live_tokens[:, :, search.step - 1].reshape(B * K)
        # The state is reordered by where its rows were, and from here on its rows are the live hypotheses in order.
        state, logits = read_tokens(model, params, {**state, **search.source}, newest)
        own, _ = _split_source(model, state)
        search = dataclasses.replace(search, state=own)
        return _select(search, logits[:, :ids], end_ids, early_stopping, limits_B, length_penalty)

    return jax.lax.while_loop(unfinished, one, search)


def _split_source(model: Model, state: Any) -> tuple[Any, Any]:
    """What each hypothesis has itself, and the source, which all hypotheses of a row share (nothing without one)."""
    shared = ("source",) if model.reads_source else ()
    return (
        {name: part for name, part in state.items() if name not in shared},
        {name: part for name, part in state.items() if name in shared},
    )


def _score(totals: jax.Array, length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    return totals / length.astype(jnp.float32) ** length_penalty


def _select(
    search: _Search,
    logits: jax.Array,
    end_ids: tuple[int, ...],
    early_stopping: EarlyStopping,
    limits_B: jax.Array,
    length_penalty: jax.Array,
) -> _Search:
    """Extend every live hypothesis by every id, keep the best.

    Of E ids that end a text, at most K * E candidates are among the best (one per beam and id), so that of the best
    K * (1 + E) at least K remain to go on with.
    """
    B, K, _ = search.live_tokens.shape
    V = logits.shape[-1]
    kept = K * (1 + max(1, len(end_ids)))
    # The best ids of each hypothesis first: the logits of all the others are needed for their sum only.
    best_RC, ids_RC = jax.lax.top_k(logits, min(kept, V))
    # Not with best_RC[:, :1] as the maximum: XLA's CPU compiler would then sort all logits, in 280 instead of 3 ms.
    total_R1 = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    candidates_BKC = search.live_totals[:, :, None] + (best_RC - total_R1).reshape(B, K, -1)
    totals_BC, flat_BC = jax.lax.top_k(candidates_BKC.reshape(B, -1), min(kept, K * V))
    beam_BC = flat_BC // best_RC.shape[1]
    token_BC = _pick(ids_RC.reshape(B, -1), flat_BC).astype(jnp.int32)
    tokens_BCN = _pick(search.live_tokens, beam_BC).at[:, :, search.step].set(token_BC)
    length = search.step + 1
    ends_BC = is_end(token_BC, end_ids) | (length >= limits_B)[:, None]

    among_best_C = jnp.arange(totals_BC.shape[1]) < K
    scores_BC = jnp.where(
        ends_BC & among_best_C[None, :] & search.searching[:, None], _score(totals_BC, length, length_penalty), -jnp.inf
    )
    old = search.finished
    finite_B = jnp.all(rows_finite(logits).reshape(B, K) | (search.live_totals == -jnp.inf), axis=1)
    # top_k prefers the first of equals: what was there before, and -inf that was never replaced keeps its length of 0.
    scores_BK, chosen_BK = jax.lax.top_k(jnp.concatenate([old.scores, scores_BC], axis=1), K)
    lengths = jnp.concatenate([old.lengths, jnp.broadcast_to(length, token_BC.shape)], axis=1)
    finished = Beams(
        tokens=_pick(jnp.concatenate([old.tokens, tokens_BCN], axis=1), chosen_BK),
        lengths=_pick(lengths, chosen_BK),
        scores=scores_BK,
        finite=old.finite & (finite_B | ~search.searching),
    )

    live_BK, chosen_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, totals_BC), K)
    parents_BK = jnp.arange(B)[:, None] * K + _pick(beam_BC, chosen_BK)
    length_B: jax.Array = length
    if early_stopping == "never":
        # A total only falls with each token, so this bounds every score that a live hypothesis can still get:
        # divided by the largest length for a positive penalty, by the next one for a negative.
        length_B = jnp.where(length_penalty > 0, limits_B, length + 1)
    best_B = _score(jnp.max(live_BK, axis=1), length_B, length_penalty)
    worst_B = jnp.min(finished.scores, axis=1)
    searching_B = search.searching & (best_B > worst_B)
    if early_stopping is True:
        searching_B &= worst_B == -jnp.inf
    return dataclasses.replace(
        search,
        parents=parents_BK.reshape(B * K),
        step=length,
        live_tokens=_pick(tokens_BCN, chosen_BK),
        live_totals=live_BK,
        finished=finished,
        searching=searching_B,
    )


def _pick(x: jax.Array, at_BK: jax.Array) -> jax.Array:
    """``x[b, at[b, k]]`` for each row b."""
    return jax.vmap(lambda row, at: row[at])(x, at_BK)

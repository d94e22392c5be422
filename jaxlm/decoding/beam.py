"""Beam search: the best hypotheses for each prompt, with one jitted loop per cache size.

The specs of a model state name its ``batch`` axis. Beam search gathers the rows of the state along this axis.
Shapes: B batch, T prompt length, K beams, R rows of the model state (B * K), N new tokens, V ids that may be generated
(in ``_start_search``: all ids of the model), C candidates of a step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm import spec
from jaxlm.config import check_field_types, check_min
from jaxlm.decoding.config import EarlyStopping
from jaxlm.decoding.finite import check_finite, rows_finite
from jaxlm.decoding.loop import decoding_loop, loop_params
from jaxlm.decoding.prompts import EndId, is_end, read_prompts, read_tokens
from jaxlm.decoding.sample import GREEDY, Settings, check_and_make_settings
from jaxlm.models import Model
from jaxlm.nn.attention import cache
from jaxlm.spec import Array, Params, State

MIN_CACHE_SLOTS = 16
"""Minimum number of cache slots in the first stage of a search whose cache grows in several stages
(:func:`_cache_sizes`)."""


@struct.dataclass
class Beams:
    """The hypotheses for each prompt, best first.

    Attributes:
        tokens: [B, K, N] int32, the new tokens. The columns after the end of a hypothesis contain the first of the end
            ids (0 if there is no end id).
        lengths: [B, K] int32, number of new tokens of each hypothesis, including its end token.
        scores: [B, K] float32, ``sum of log-probabilities / length ** length_penalty``. If fewer than K hypotheses
            were finished, the remaining entries have score -inf and length 0.
        finite: [B] bool, whether all logits that were used to extend the hypotheses of the row are finite.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """The settings of :func:`beam_search`.

    Raises:
        ValueError: a field has the wrong type, ``num_beams`` is below 1, or the length penalty is not finite.
    """

    num_beams: int
    """K. For each prompt, the search extends K live hypotheses and keeps K finished hypotheses."""
    length_penalty: float = 1.0
    """The score is the sum of log-probabilities divided by ``length ** length_penalty``. The length includes the end
    token. 0 favors short hypotheses, 1 gives the mean, larger values favor long hypotheses. Wu et al. (2016, section 7)
    use another formula."""
    early_stopping: EarlyStopping = "never"
    """When the search of a row ends. If no hypothesis is live, the search always ends. Otherwise it continues at least
    until ``num_beams`` hypotheses are finished. True: it ends at that step. False (the default of Hugging Face): it
    ends when no live hypothesis has a better score at its current length than the worst finished hypothesis. "never":
    it ends when no continuation of a live hypothesis can have a better score than the worst finished hypothesis."""

    def __post_init__(self) -> None:
        check_field_types(self)
        check_min(1, num_beams=self.num_beams)


def beam_search(
    model: Model,
    params: Params,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int | Array,
    beams: BeamConfig,
    end_id: EndId = None,
    num_allowed_ids: int | None = None,
    state: State | None = None,
) -> Beams:
    """The best continuations of each prompt that a beam search finds.

    A step extends every live hypothesis by every id. The results are the candidates of the step. A candidate is
    finished if it ends with ``end_id`` or has ``max_new_tokens`` tokens. If a finished candidate is not among the
    ``num_beams`` candidates of its step with the largest sums of log-probabilities, it is discarded. Of the other
    finished candidates of all steps, the ``num_beams`` with the best scores are kept. The ``num_beams`` best candidates
    that are not finished are the next live hypotheses. Hugging Face's ``generate`` has the same rules.

    Args:
        prompts, segment_ids, end_id, num_allowed_ids, state: as in :func:`jaxlm.decoding.generate`.
        max_new_tokens: maximum number of new tokens. Either one number for all rows, or [B] with one number per row.
        beams: the settings of the search.

    Raises:
        TypeError: the family has no model state, ``beams`` is not a ``BeamConfig``, or ``max_new_tokens`` is not an
            integer or an array of integers.
        ValueError: as in :func:`jaxlm.decoding.generate`, or ``max_new_tokens`` is an array that does not have the
            shape [B] or has a number below 1.
        NotFiniteError: as in :func:`jaxlm.decoding.generate`. Inside ``jit`` no error is raised; check ``finite``.

    Example:
        >>> beam_search(model, params, prompts, max_new_tokens=8, beams=BeamConfig(4)).tokens[:, 0]   # doctest: +SKIP
    """
    if not isinstance(beams, BeamConfig):
        raise TypeError(f"beams={beams!r} must be a BeamConfig: pass BeamConfig(num_beams=4)")
    limits = np.asarray(max_new_tokens)
    if not np.issubdtype(limits.dtype, np.integer):
        raise TypeError(f"max_new_tokens={limits.tolist()} must be an integer, or one integer for each prompt")
    if limits.ndim and (limits.shape != np.shape(prompts)[:1] or limits.min(initial=1) < 1):
        raise ValueError(f"max_new_tokens={limits.tolist()} must be one number of at least 1 for each prompt")
    shared = check_and_make_settings(
        model, prompts, segment_ids, int(limits.max(initial=1)), GREEDY, None, end_id, num_allowed_ids, state
    )
    limits_B = jnp.broadcast_to(jnp.asarray(limits, jnp.int32), prompts.shape[:1])
    settings = _Settings(limits_B, jnp.float32(beams.length_penalty), beams.num_beams, beams.early_stopping, shared)
    length = prompts.shape[1]
    sizes = _cache_sizes(model, state, length, shared.slots)
    search = _start_search(model, params, prompts, segment_ids, state, settings, first_slots=sizes[0])
    for size in sizes:
        # During tracing the flags have no values, so every stage is traced. If the search has ended before a stage, the
        # loop of the stage runs zero iterations.
        if isinstance(search.searching, jax.core.Tracer) or bool(jnp.any(search.searching)):
            search = _continue_search(model, params, search, settings, slots=size, prompt_length=length)
    check_finite(model, params, search.finished.finite, state)
    return search.finished


def _cache_sizes(model: Model, state: State | None, prompt_length: int, slots: int) -> list[int]:
    """The number of cache slots in each stage of the search, in increasing order.

    Most texts end early, so a search starts with a small cache. Each stage has about twice the slots of the stage
    before. There are several stages if ``slots`` is more than ``2 * prompt_length`` and more than twice
    :data:`MIN_CACHE_SLOTS`, except in these cases:

    - The family has no key-value cache.
    - The caller passed a state of a model without encoder. Its cache may contain earlier tokens, and a smaller cache
      might not have slots for them.
    - The caller passed a state whose cache does not have ``slots`` slots.
    """
    specs, _ = _split_source(model, model.state_specs(1, slots))
    current_slots = cache.num_slots(specs, specs if state is None else _split_source(model, state)[0])
    sizes = [current_slots or slots]
    if current_slots != slots or (state is not None and not model.reads_source):
        return sizes
    while sizes[0] > 2 * max(prompt_length, MIN_CACHE_SLOTS):
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


@struct.dataclass
class _Settings:
    """The settings of a search. The first two fields are arrays. A new value of another field causes a compilation.

    Attributes:
        limits_B: [B] int32, maximum number of new tokens of each row.
        length_penalty, num_beams, early_stopping: as in :class:`BeamConfig`.
        shared: the settings that sampling has too. ``max_new_tokens`` is the largest of the limits.
    """

    limits_B: jax.Array
    length_penalty: jax.Array
    num_beams: int = struct.field(pytree_node=False)
    early_stopping: EarlyStopping = struct.field(pytree_node=False)
    shared: Settings = struct.field(pytree_node=False)


@struct.dataclass
class _Search:
    """The live hypotheses, each with ``step`` tokens, and the best finished hypotheses.

    Attributes:
        state: the model state after all tokens except the newest token of each hypothesis, without the encoded source;
            R rows. Its rows are not yet in the order of the live hypotheses (``parents``).
        source: the encoded source of an encoder-decoder, B rows. All hypotheses of a row use the same source.
        parents: [R] int32, for each live hypothesis the row of ``state`` that it continues.
        step: int32, number of new tokens of each live hypothesis.
        live_tokens: [B, K, N] int32, the new tokens of the live hypotheses.
        live_totals: [B, K] float32, the sum of log-probabilities of each live hypothesis.
        finished: the best finished hypotheses.
        searching: [B] bool, whether the search of a row continues.
    """

    state: Any
    source: Any
    parents: jax.Array
    step: jax.Array
    live_tokens: jax.Array
    live_totals: jax.Array
    finished: Beams
    searching: jax.Array


@jax.jit(static_argnames=("model", "first_slots"))
def _start_search(
    model: Model,
    params: Params,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    state: State | None,
    settings: _Settings,
    *,
    first_slots: int,
) -> _Search:
    """The search after it has read the prompts and selected the first new token of each hypothesis.

    Args:
        first_slots: number of cache slots of the returned search.
    """
    B, K, shared = prompts_BT.shape[0], settings.num_beams, settings.shared
    state, logits_BV = read_prompts(model, params, prompts_BT, segment_ids_BT, shared.slots, state)
    row_state, source = _split_source(model, state)
    row_state_specs, _ = _split_source(model, model.state_specs(B, shared.slots))
    parents = jnp.repeat(jnp.arange(B), K)
    tokens_BKN = jnp.full((B, K, shared.max_new_tokens), shared.end_ids[0] if shared.end_ids else 0, jnp.int32)
    search = _Search(
        state=spec.take_rows_clipped(row_state_specs, cache.resize(row_state_specs, row_state, first_slots), parents),
        source=source,
        parents=jnp.arange(B * K),
        step=jnp.zeros((), jnp.int32),
        live_tokens=tokens_BKN,
        # All beams of a row start with the same hypothesis, so only the first beam has a finite total.
        live_totals=jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0),
        finished=Beams(tokens_BKN, jnp.zeros((B, K), jnp.int32), jnp.full((B, K), -jnp.inf), jnp.ones((B,), bool)),
        searching=jnp.ones((B,), bool),
    )
    return _select(search, logits_BV[parents, : shared.num_ids], settings)


@jax.jit(static_argnames=("model", "slots", "prompt_length"))
def _continue_search(
    model: Model, params: Params, search: _Search, settings: _Settings, *, slots: int, prompt_length: int
) -> _Search:
    """The search at its end, or when it has filled a cache of ``slots`` slots, whichever comes first."""
    B, K, N = search.live_tokens.shape
    specs, _ = _split_source(model, model.state_specs(B * K, slots))
    search = dataclasses.replace(search, state=cache.resize(specs, search.state, slots))
    params = loop_params(model, params)

    def unfinished(search: _Search) -> jax.Array:
        return (search.step < min(N, slots - prompt_length + 1)) & jnp.any(search.searching)

    def extend(search: _Search, loop_specs: spec.Tree) -> _Search:
        state = spec.take_rows_clipped(loop_specs, search.state, search.parents)
        newest = search.live_tokens[:, :, search.step - 1].reshape(B * K)
        state, logits = read_tokens(model, params, {**state, **search.source}, newest)
        row_state, _ = _split_source(model, state)
        search = dataclasses.replace(search, state=row_state)
        return _select(search, logits[:, : settings.shared.num_ids], settings)

    return decoding_loop(model, specs, unfinished, extend, search, max_steps=N)


def _split_source(model: Model, state: State) -> tuple[Any, Any]:
    """Split a model state (or its specs) into (the entries without the encoded source, the encoded source).

    Beam search repeats only the rows of the first part, because all hypotheses of a row use the same source. The second
    part is empty if the model is not an encoder-decoder.
    """
    source = {"source": state["source"]} if model.reads_source else {}
    return {name: value for name, value in state.items() if name not in source}, source


def _score(totals: jax.Array, length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    """The scores of hypotheses that have ``length`` tokens and the sums of log-probabilities ``totals``."""
    return totals / length.astype(jnp.float32) ** length_penalty


def _select(search: _Search, logits: jax.Array, settings: _Settings) -> _Search:
    """The search after every live hypothesis is extended by every id and the best candidates are kept.

    With E end ids, at most K * E candidates end with an end id, because each beam has one candidate for each end id. So
    at least K of the best K * (1 + E) candidates are not finished, if the row has not reached its maximum length.

    Args:
        logits: [R, V], the logits of the next token of each live hypothesis.
    """
    B, K, _ = search.live_tokens.shape
    V = logits.shape[-1]
    num_candidates = K * (1 + max(1, len(settings.shared.end_ids)))
    # Select the best ids of each hypothesis first. Only the normalizer of the softmax needs the other logits.
    best_RC, ids_RC = jax.lax.top_k(logits, min(num_candidates, V))
    # Do not use best_RC[:, :1] as the maximum in logsumexp. XLA's CPU compiler would then sort all logits, which takes
    # 280 ms instead of 3 ms.
    log_normalizer_R1 = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    candidates_BKC = search.live_totals[:, :, None] + (best_RC - log_normalizer_R1).reshape(B, K, -1)
    totals_BC, flat_BC = jax.lax.top_k(candidates_BKC.reshape(B, -1), min(num_candidates, K * V))
    beam_BC = flat_BC // best_RC.shape[1]
    token_BC = _pick(ids_RC.reshape(B, -1), flat_BC).astype(jnp.int32)
    tokens_BCN = _pick(search.live_tokens, beam_BC).at[:, :, search.step].set(token_BC)
    length = search.step + 1
    ends_BC = is_end(token_BC, settings.shared.end_ids) | (length >= settings.limits_B)[:, None]

    among_best_C = jnp.arange(totals_BC.shape[1]) < K  # top_k sorts the candidates
    scores_BC = jnp.where(
        ends_BC & among_best_C[None, :] & search.searching[:, None],
        _score(totals_BC, length, settings.length_penalty),
        -jnp.inf,
    )
    earlier = search.finished
    finite_B = jnp.all(rows_finite(logits).reshape(B, K) | (search.live_totals == -jnp.inf), axis=1)
    # For equal scores, top_k selects the entry with the lower index. So earlier hypotheses have priority, and an unused
    # entry (score -inf) keeps its length 0.
    scores_BK, chosen_finished_BK = jax.lax.top_k(jnp.concatenate([earlier.scores, scores_BC], axis=1), K)
    lengths = jnp.concatenate([earlier.lengths, jnp.broadcast_to(length, token_BC.shape)], axis=1)
    finished = Beams(
        tokens=_pick(jnp.concatenate([earlier.tokens, tokens_BCN], axis=1), chosen_finished_BK),
        lengths=_pick(lengths, chosen_finished_BK),
        scores=scores_BK,
        finite=earlier.finite & (finite_B | ~search.searching),
    )

    live_totals_BK, chosen_live_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, totals_BC), K)
    parents_BK = jnp.arange(B)[:, None] * K + _pick(beam_BC, chosen_live_BK)
    bound_length: jax.Array = length
    if settings.early_stopping == "never":
        # A sum of log-probabilities is at most 0 and never increases. So the score of a continuation is at most the
        # current sum with the best length: the maximum length for a positive penalty, otherwise the next length.
        bound_length = jnp.where(settings.length_penalty > 0, settings.limits_B, length + 1)
    best_B = _score(jnp.max(live_totals_BK, axis=1), bound_length, settings.length_penalty)
    worst_B = jnp.min(finished.scores, axis=1)
    searching_B = search.searching & (best_B > worst_B)
    if settings.early_stopping is True:
        searching_B &= worst_B == -jnp.inf
    return dataclasses.replace(
        search,
        parents=parents_BK.reshape(B * K),
        step=length,
        live_tokens=_pick(tokens_BCN, chosen_live_BK),
        live_totals=live_totals_BK,
        finished=finished,
        searching=searching_B,
    )


def _pick(x: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """``x[b, indices[b, k]]`` for each b and k: [B, K, ...]."""
    return jax.vmap(lambda row, indices: row[indices])(x, indices_BK)

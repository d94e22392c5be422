"""Speculative decoding: a small draft model proposes tokens, and the target model reads all of them in one call.

The generated tokens have exactly the distribution of the target model (Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding"; Chen et al. 2023). With greedy decoding, the tokens are those of
:func:`jaxlm.decoding.generate` for the target model, up to rounding. Both models may be of any family with a model
state. The target model must not be a mixture of experts with a ``capacity_factor``, because the logits of such a model
depend on the number of tokens that it reads in one call.

In each round, the draft model draws K tokens one by one, the proposals. Then the target model reads the newest token
and the K proposals in one call. This call gives the target distributions p of the K proposals and of the token after
the last proposal. A proposal x that was drawn from the draft distribution q is accepted with probability
``min(1, p(x) / q(x))``. The first rejected proposal is replaced by a token that is drawn from the normalized
``max(p - q, 0)``. The proposals after it are discarded. If all proposals are accepted, one more token is drawn from p.
So a round generates 1 to K + 1 tokens. At the end of the round, ``Model.rollback`` removes the rejected and discarded
proposals from both model states.

Shapes: B batch, T prompt length, N new tokens, K proposed tokens per round, V ids that may be generated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.config import check_min, check_value
from jaxlm.decoding.finite import check_finite, rows_finite
from jaxlm.decoding.loop import loop_params
from jaxlm.decoding.prompts import (
    EndId,
    check_free_slots,
    check_memory_slots,
    is_end,
    read_prompts,
    read_tokens,
)
from jaxlm.decoding.sample import (
    GREEDY,
    Generation,
    Sampling,
    Settings,
    check_and_make_settings,
    filter_logits,
    sampling_keys,
)
from jaxlm.models import Model
from jaxlm.nn.embedding import argmax
from jaxlm.spec import Array


@struct.dataclass
class SpeculativeModels:
    """A target model and a draft model with the same token ids.

    Attributes:
        target, target_params: the model that defines the distribution of the generated tokens.
        draft, draft_params: a smaller model, which proposes tokens.
        num_proposed: K, number of tokens that the draft model proposes in each round. The best value is larger for a
            higher acceptance rate and for a faster draft model.

    Raises:
        ValueError: ``num_proposed`` is not an integer, or below 1.
    """

    target: Model = struct.field(pytree_node=False)
    target_params: Any
    draft: Model = struct.field(pytree_node=False)
    draft_params: Any
    num_proposed: int = struct.field(pytree_node=False, default=4)

    def __post_init__(self) -> None:
        check_value(int, self.num_proposed, "num_proposed")
        check_min(1, num_proposed=self.num_proposed)

    @property
    def max_positions(self) -> int | None:
        """The maximum number of tokens of a text that both models can read; None if there is no limit."""
        limits = (self.target.max_positions, self.draft.max_positions)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def pairs(self) -> tuple[tuple[Model, Any], tuple[Model, Any]]:
        """Both models with their parameters, the target model first."""
        return (self.target, self.target_params), (self.draft, self.draft_params)


@struct.dataclass
class SpeculativeGeneration:
    """Generated tokens, and how many proposals were accepted.

    Attributes:
        generation: the tokens, in the format of :func:`jaxlm.decoding.generate`.
        rounds: [B] int32, number of rounds until the row ended. A round has one call of the target model. The call that
            reads the prompt is not part of a round.
        accepted: [B] int32, number of proposals that became part of the text. The acceptance rate is
            ``accepted / (rounds * K)``.
        draft_finite: [B] bool, whether the logits from which the draft model drew the proposals are finite. The logits
            after the first rejected proposal of a round, or after the end of the row, are not checked.
    """

    generation: Generation
    rounds: jax.Array
    accepted: jax.Array
    draft_finite: jax.Array


def speculative_generate(
    models: SpeculativeModels,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    end_id: EndId = None,
    num_allowed_ids: int | None = None,
    states: tuple[Any, Any] | None = None,
) -> SpeculativeGeneration:
    """Up to ``max_new_tokens`` new tokens for each prompt, with the distribution of the target model.

    The other arguments are those of :func:`jaxlm.decoding.generate`. ``sampling`` applies to both models. As in
    ``generate``, the random numbers of a row depend only on ``key`` and the index of the row.

    Args:
        models: the two models, and the number of proposals of a round.
        states: the initial states of the target model and of the draft model. A state may be None, except for an
            encoder-decoder. Each key-value cache or memory needs slots for the prompt and ``max_new_tokens +
            num_proposed - 1`` more tokens. The rolling memory of a draft model (``jaxlm.nn.attention.memory``) may have
            fewer slots: other tokens are then proposed, but the distribution of the generated tokens is the same.

    Raises:
        TypeError, ValueError: the errors of :func:`jaxlm.decoding.generate`, for each model. Each model needs
            ``num_proposed`` more positions than in ``generate``.
        ValueError: the models have different vocabulary sizes, and ``num_allowed_ids`` is None; ``sampling`` has
            a repetition penalty; the target model has a ``capacity_factor``; or the state of the target model has a
            rolling memory that is too short for all tokens.
        NotFiniteError: logits of the target model or of the draft model are not finite.

    Example:
        >>> from jaxlm import get_model
        >>> target, draft = get_model("gpt2-tiny"), get_model("lstm-tiny")
        >>> params, draft_params = target.init(jax.random.key(0)), draft.init(jax.random.key(1))
        >>> models = SpeculativeModels(target, params, draft, draft_params)
        >>> result = speculative_generate(models, jnp.array([[5, 6, 7]]), max_new_tokens=6)
        >>> result.generation.tokens.shape
        (1, 6)
    """
    sizes = models.target.config.vocab_size, models.draft.config.vocab_size
    if num_allowed_ids is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the target model has {sizes[0]} token ids and the draft model {sizes[1]}: use models with the same "
            "tokenizer, and set num_allowed_ids to the vocabulary size of the tokenizer"
        )
    if sampling.repetition_penalty != 1.0:
        raise ValueError(
            f"repetition_penalty={sampling.repetition_penalty} is not supported in speculative decoding: set it to 1"
        )
    capacity_factor = models.target.config.capacity_factor if models.target.has_experts else None
    if capacity_factor is not None:
        raise ValueError(
            f"the target model has capacity_factor={capacity_factor}. Its logits depend on the number of tokens that "
            "it reads in one call, so speculative decoding would change the distribution: set capacity_factor=None, or "
            "generate without a draft model"
        )
    target_state, draft_state = states = (None, None) if states is None else states
    for (model, _), state in zip(models.pairs, states, strict=True):
        if model.reads_source and state is None:
            raise ValueError(
                f"{model.family} reads a source: pass states=(state of the target model, state of the draft model). "
                "The state of an encoder-decoder is model.init_decode_state(params, source, length), with a length of "
                f"at least the length of the prompts + {max_new_tokens + models.num_proposed - 1} (max_new_tokens + "
                "num_proposed - 1). The state of another model may be None"
            )
        settings = check_and_make_settings(
            model, prompts, segment_ids, max_new_tokens, sampling, key, end_id, num_allowed_ids, state
        )
        # The settings of both models are equal. The last round may read num_proposed tokens that do not become part of
        # the text.
        settings = dataclasses.replace(settings, slots=settings.slots + models.num_proposed)
        model.state_specs(prompts.shape[0], settings.slots)  # raises if the model has fewer positions
        if state is not None:
            check_free_slots(model, state, settings.slots)
    if target_state is not None:
        check_memory_slots(models.target, target_state, settings.slots)
    result = _generate(models, prompts, segment_ids, key, states, settings)
    check_finite(models.target, models.target_params, result.generation.finite, target_state)
    check_finite(models.draft, models.draft_params, result.draft_finite, draft_state)
    return result


@struct.dataclass
class _Progress:
    """The values that the loop updates in each round.

    Attributes:
        states: the states of the target model and of the draft model. For a row that has not ended, both states contain
            all tokens except the newest.
        newest: [B], the newest token of each row that has not ended.
        ended: [B] bool, whether the row has an end token or ``max_new_tokens`` tokens.
        keys: [B], the random key of each row; None for greedy decoding.
        result: the tokens and counts so far.
    """

    states: tuple[Any, Any]
    newest: jax.Array
    ended: jax.Array
    keys: jax.Array | None
    result: SpeculativeGeneration


@jax.jit(static_argnames="settings")
def _generate(
    models: SpeculativeModels,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    key: jax.Array | None,
    states: tuple[Any, Any],
    settings: Settings,
) -> SpeculativeGeneration:
    B, N = prompts_BT.shape[0], settings.max_new_tokens
    (target_state, logits_BV), (draft_state, _) = (
        read_prompts(model, params, prompts_BT, segment_ids_BT, settings.slots, state)
        for (model, params), state in zip(models.pairs, states, strict=True)
    )
    keys_B = sampling_keys(settings, key, B)
    logits_BV = logits_BV[:, : settings.num_ids]
    newest_B = _draw(settings, keys_B, jnp.zeros(B, jnp.int32), _log_probs(settings, logits_BV))
    log_probs_B = _log_probs_of_tokens(jax.nn.log_softmax(logits_BV), newest_B)
    result = SpeculativeGeneration(
        Generation(
            tokens=jnp.full((B, N), settings.end_ids[0] if settings.end_ids else 0, jnp.int32).at[:, 0].set(newest_B),
            lengths=jnp.ones(B, jnp.int32),
            log_probs=jnp.zeros((B, N), jnp.float32).at[:, 0].set(log_probs_B),
            finite=rows_finite(logits_BV),
        ),
        rounds=jnp.zeros(B, jnp.int32),
        accepted=jnp.zeros(B, jnp.int32),
        draft_finite=jnp.ones(B, bool),
    )
    ended_B = is_end(newest_B, settings.end_ids) | (N == 1)
    target_params, draft_params = (loop_params(*pair) for pair in models.pairs)
    models = dataclasses.replace(models, target_params=target_params, draft_params=draft_params)
    progress = _Progress((target_state, draft_state), newest_B, ended_B, keys_B, result)
    run_round = functools.partial(_round, models, settings)
    return jax.lax.while_loop(lambda progress: ~jnp.all(progress.ended), run_round, progress).result


def _round(models: SpeculativeModels, settings: Settings, progress: _Progress) -> _Progress:
    """The progress after one round: K proposals, one call of the target model, and the new tokens of each row."""
    K, active_B, lengths_B = models.num_proposed, ~progress.ended, progress.result.generation.lengths
    target_state, draft_state = progress.states

    def propose(carry: Any, step: jax.Array) -> Any:
        state, newest_B = carry
        state, logits_BV = read_tokens(models.draft, models.draft_params, state, newest_B, active_B)
        q_BV = _log_probs(settings, logits_BV[:, : settings.num_ids])
        drawn_B = _draw(settings, progress.keys, lengths_B + step, q_BV)
        return (state, drawn_B), (drawn_B, q_BV, rows_finite(logits_BV[:, : settings.num_ids]))

    # Step K + 1 only reads the last proposal, so that the draft state contains the same tokens as the target state.
    (draft_after, _), drawn = jax.lax.scan(propose, (draft_state, progress.newest), jnp.arange(K + 1))
    proposed_BK, q_BKV, draft_finite_BK = (jnp.swapaxes(x, 0, 1)[:, :K] for x in drawn)
    inputs_BT = jnp.concatenate([progress.newest[:, None], proposed_BK], axis=1)  # T = K + 1
    segments_BT = jnp.broadcast_to(active_B[:, None], inputs_BT.shape).astype(jnp.int32)
    hidden_BTD, target_after = models.target.apply(
        models.target_params, inputs_BT, state=target_state, segment_ids=segments_BT
    )
    logits_BTV = models.target.logits(models.target_params, hidden_BTD)[..., : settings.num_ids]
    p_BTV = jax.vmap(functools.partial(_log_probs, settings), 1, 1)(logits_BTV)

    is_accepted_BK = _is_accepted(progress.keys, lengths_B, proposed_BK, p_BTV[:, :K], q_BKV)
    accepted_B = jnp.sum(jnp.cumprod(is_accepted_BK, axis=1), axis=1, dtype=jnp.int32)
    p_BV = jnp.take_along_axis(p_BTV, accepted_B[:, None, None], axis=1)[:, 0]
    q_BV = jnp.take_along_axis(
        jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf), accepted_B[:, None, None], axis=1
    )[:, 0]
    last_B = _draw(settings, progress.keys, lengths_B + accepted_B, _residual(settings, p_BV, q_BV), purpose=2)

    index_T = jnp.arange(K + 1)[None, :]
    new_BT = jnp.where(index_T < accepted_B[:, None], jnp.pad(proposed_BK, ((0, 0), (0, 1))), last_B[:, None])
    ends_BT = is_end(new_BT, settings.end_ids)
    # The new tokens are the accepted proposals and the last token of the round, up to the first end token and up to
    # max_new_tokens tokens in the row.
    is_new_BT = (index_T <= accepted_B[:, None]) & (jnp.cumsum(ends_BT, axis=1) - ends_BT == 0) & active_B[:, None]
    is_new_BT &= lengths_B[:, None] + index_T < settings.max_new_tokens
    count_B = jnp.sum(is_new_BT, axis=1, dtype=jnp.int32)
    finite_or_unused_BT = rows_finite(logits_BTV) | ~is_new_BT
    draft_finite_or_unused_BK = draft_finite_BK | ~is_new_BT[:, :K]
    result, generation = progress.result, progress.result.generation
    B, N = generation.tokens.shape
    new_slots = jnp.arange(B)[:, None], jnp.where(is_new_BT, lengths_B[:, None] + index_T, N)  # "drop" ignores index N
    log_probs_BT = _log_probs_of_tokens(jax.nn.log_softmax(logits_BTV), new_BT)
    result = SpeculativeGeneration(
        Generation(
            tokens=generation.tokens.at[new_slots].set(new_BT, mode="drop"),
            lengths=lengths_B + count_B,
            log_probs=generation.log_probs.at[new_slots].set(log_probs_BT, mode="drop"),
            finite=generation.finite & jnp.all(finite_or_unused_BT, axis=1),
        ),
        rounds=result.rounds + active_B,
        accepted=result.accepted + jnp.where(active_B, jnp.minimum(accepted_B, count_B), 0),
        draft_finite=result.draft_finite & jnp.all(draft_finite_or_unused_BK, axis=1),
    )
    num_kept_B = jnp.where(active_B, accepted_B + 1, 0)
    target_state, draft_state = (
        model.rollback(params, before, inputs_BT, after, num_kept_B, segments_BT)
        for (model, params), before, after in zip(
            models.pairs, progress.states, (target_after, draft_after), strict=True
        )
    )
    ended_B = progress.ended | jnp.any(ends_BT & is_new_BT, axis=1)
    ended_B |= result.generation.lengths >= settings.max_new_tokens
    return _Progress((target_state, draft_state), last_B, ended_B, progress.keys, result)


def _log_probs(settings: Settings, logits_BV: jax.Array) -> jax.Array:
    """The log-probabilities of the distribution from which tokens are drawn.

    For greedy decoding, they are 0 for the most likely token and -inf for all other tokens.
    """
    filtered_BV = filter_logits(settings.sampling, logits_BV)
    if settings.sampling.temperature > 0.0:
        return jax.nn.log_softmax(filtered_BV)
    is_top_BV = argmax(filtered_BV)[:, None] == jnp.arange(filtered_BV.shape[-1])[None, :]
    return jnp.where(is_top_BV, 0.0, -jnp.inf)


def _draw(
    settings: Settings, keys_B: jax.Array | None, index_B: jax.Array, log_probs_BV: jax.Array, purpose: int = 0
) -> jax.Array:
    """One token for each row. ``index_B`` (the index of the token in its row) and ``purpose`` select the random key."""
    if keys_B is None:
        return argmax(log_probs_BV)
    drawn_B = jax.vmap(jax.random.categorical)(_token_keys(keys_B, index_B, purpose), log_probs_BV)
    return drawn_B.astype(jnp.int32)


def _token_keys(keys_B: jax.Array, index_B: jax.Array, purpose: int) -> jax.Array:
    """Random keys [B], different for each purpose.

    Args:
        purpose: 0 to draw a proposal or the first new token, 1 to accept a proposal, 2 to draw the last token of a
            round.
    """
    return jax.vmap(lambda key, index: jax.random.fold_in(jax.random.fold_in(key, index), purpose))(keys_B, index_B)


def _is_accepted(
    keys_B: jax.Array | None,
    lengths_B: jax.Array,
    proposed_BK: jax.Array,
    p_BKV: jax.Array,
    q_BKV: jax.Array,
) -> jax.Array:
    """Whether each proposal passes the acceptance test, bool [B, K]. The first False rejects its proposal."""
    log_ratio_BK = _log_probs_of_tokens(p_BKV, proposed_BK) - _log_probs_of_tokens(q_BKV, proposed_BK)
    if keys_B is None:
        return log_ratio_BK >= 0.0  # True if the proposal is also the target model's most likely token

    def draw(index: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.uniform)(_token_keys(keys_B, lengths_B + index, 1))

    uniform_BK = jax.vmap(draw, out_axes=1)(jnp.arange(proposed_BK.shape[1]))
    return jnp.log(uniform_BK) < log_ratio_BK


def _residual(settings: Settings, p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """``log(max(p - q, 0))``, not normalized; for greedy decoding ``log(p)``.

    Args:
        p_BV, q_BV: log(p) and log(q).
    """
    if settings.sampling.temperature == 0.0:
        return p_BV
    residual_BV = jnp.maximum(jnp.exp(p_BV) - jnp.exp(q_BV), 0.0)
    # If p = q, the residual is 0. Then only rounding can cause a rejection, and p replaces the residual.
    is_empty_B1 = jnp.sum(residual_BV, axis=-1, keepdims=True) <= 0.0
    return jnp.where(is_empty_B1, p_BV, jnp.log(residual_BV))


def _log_probs_of_tokens(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probability of each token: ``log_probs`` [..., V] at ``tokens`` [...]."""
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]

"""Sampling and greedy decoding: autoregressive generation with jitted loops.

:func:`prefill` reads the prompts and draws the first token. :func:`advance` generates more tokens. :func:`generate`
runs both in one ``jit``. To stream tokens, call :func:`prefill` once and :func:`advance` several times. The tokens are
equal to those of :func:`generate`.

Shapes: B batch, T prompt length, N new tokens, V number of ids. The logits that the model returns have all ids of its
vocabulary. ``seen``, and the logits from which tokens are drawn, have only the ids below ``num_allowed_ids``, if it is
given.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm import spec
from jaxlm.config import check_field_types
from jaxlm.decoding.finite import check_finite, rows_finite
from jaxlm.decoding.loop import decoding_loop, loop_params
from jaxlm.decoding.prompts import (
    EndId,
    as_end_ids,
    check_prompts,
    check_sharding,
    is_end,
    read_prompts,
    read_tokens,
)
from jaxlm.models import Model
from jaxlm.nn.embedding import argmax, widen_ids
from jaxlm.sharding import active as active_sharding
from jaxlm.spec import Array, Params, State

MIN_TEMPERATURE = 1e-30
"""The smallest temperature above 0. With a smaller temperature, logits / temperature may overflow in float32."""
REPETITION_PENALTY_LIMITS = 1e-30, 1e30
"""With other penalties, penalized logits may overflow in float32."""


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` if the temperature is neither 0 nor a finite number of at least ``MIN_TEMPERATURE``."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be finite and at least 0 (0 is greedy)")
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} is too small, because logits / temperature must fit in float32: use 0 "
            f"(greedy), or at least {MIN_TEMPERATURE}"
        )


_OFF = "None (on the command line: 0)"
"""The value that turns ``top_k`` or ``min_p`` off, for error messages."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Hashable. A filter (``top_k``, ``top_p``, ``min_p``) that is None is off.

    Attributes:
        temperature: divisor of the logits; 0, or at least 1e-30. With 0, the most likely token after the repetition
            penalty is selected, and the filters have no effect.
        top_k: keep the k most likely tokens (Fan et al. 2018).
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020).
        min_p: keep tokens whose probability is at least ``min_p`` times the largest probability (Nguyen et al. 2024).
        repetition_penalty: for each token that occurs in the prompt or the output, a positive logit is divided by the
            penalty and a negative logit is multiplied by the penalty (Keskar et al. 2019, section 4.1, with the sign
            rule of Hugging Face). From 1e-30 to 1e30; 1 has no effect.

    Raises:
        ValueError: a value has the wrong type or is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        check_temperature(self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; {_OFF} turns it off")
        for name, off in (("top_p", "1"), ("min_p", _OFF)):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name}={value} must be in (0, 1]; {off} turns it off")
        low, high = REPETITION_PENALTY_LIMITS
        if not low <= self.repetition_penalty <= high:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be from {low} to {high}, because penalized logits "
                "must fit in float32; 1 turns it off"
            )


GREEDY = Sampling(temperature=0.0)
"""Greedy decoding: the most likely token is selected. Of several equally likely tokens, the lowest id is selected."""


def filter_logits(sampling: Sampling, logits_BV: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """The logits [B, V] of the distribution from which a token is drawn; -inf for removed tokens.

    The steps have the same order as in Hugging Face's ``generate``: repetition penalty, temperature, top-k, top-p,
    min-p. The output of each step is the input of the next step. Top-k and top-p also keep all tokens with the same
    logit as the least likely token that they keep. With temperature 0 the logits are not divided.

    Args:
        logits_BV: [B, V], the logits of the model.
        seen_BV: [B, V] bool, whether each id occurs in the prompt or the output; required for a repetition penalty.

    Raises:
        ValueError: ``top_k`` exceeds V, or a repetition penalty is given without ``seen_BV``.
    """
    V = logits_BV.shape[-1]
    if sampling.repetition_penalty != 1.0:
        if seen_BV is None:
            raise ValueError(
                f"repetition_penalty={sampling.repetition_penalty} needs seen_BV, bool [batch, vocabulary]"
            )
        penalty = sampling.repetition_penalty
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    if sampling.temperature > 0.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        check_top_k(sampling, V)
        threshold_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        cumulative_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        # Keep a token if the more likely tokens together have a probability below p. Always keep the first token.
        keep_BV = jnp.pad(cumulative_BV[:, :-1] < sampling.top_p, ((0, 0), (1, 0)), constant_values=True)
        threshold_B1 = jnp.min(jnp.where(keep_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        threshold_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    return logits_BV


def check_top_k(sampling: Sampling, num_ids: int) -> None:
    """Raise ``ValueError`` if ``top_k`` exceeds the number of ids that may be generated."""
    if sampling.top_k is not None and sampling.top_k > num_ids:
        raise ValueError(
            f"top_k={sampling.top_k} exceeds the {num_ids} ids that may be generated: use a lower number, or {_OFF}"
        )


# -------------------------------------------------------------------------------------------------- the loop


@struct.dataclass
class PartialGeneration:
    """An unfinished generation, with everything that :func:`advance` needs to continue it.

    Attributes:
        state: the model state after the prompt and all generated tokens except the newest token of each row.
        tokens: [B, N] int32; the first ``step`` columns contain the generated tokens. All other entries (not generated
            yet, or after the end of a row) contain the first of ``end_ids``, or 0 if there are no ``end_ids``.
        log_probs: [B, N] float32, see :class:`Generation`.
        lengths: [B] int32, number of generated tokens in each row, including its end token.
        ended: [B] bool, whether the row has ended.
        step: int32, number of generated tokens in the longest row.
        finite: [B] bool, whether all logits from which tokens of the row were drawn are finite.
        seen: [B, V] bool, whether an id occurs in the prompt or the output; None without a repetition penalty.
        keys: one random key per row; None for greedy decoding.
        sampling: how tokens are drawn.
        end_ids: the ids that end a row.
        num_ids: only ids below this number are generated.
    """

    state: Any
    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    ended: jax.Array
    step: jax.Array
    finite: jax.Array
    seen: jax.Array | None
    keys: jax.Array | None
    sampling: Sampling = struct.field(pytree_node=False)
    end_ids: tuple[int, ...] = struct.field(pytree_node=False)
    num_ids: int = struct.field(pytree_node=False)


@struct.dataclass
class Generation:
    """Generated tokens.

    Attributes:
        tokens: [B, N] int32. The entries after the end of a row contain the first of the end ids.
        lengths: [B] int32, number of generated tokens in each row, including the end token.
        log_probs: [B, N] float32, log-probability of each token under the model in nats; 0 after the end. It is
            computed from the logits before penalty, temperature and filters. It is normalized over the ids that may be
            generated.
        finite: [B] bool, whether all logits from which tokens of the row were drawn are finite. If not, the tokens of
            the row are meaningless.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    finite: jax.Array


def generate(
    model: Model,
    params: Params,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    end_id: EndId = None,
    num_allowed_ids: int | None = None,
    state: State | None = None,
) -> Generation:
    """Up to ``max_new_tokens`` new tokens for each prompt, in one ``jit``. A row ends at its first ``end_id``.

    The loop stops when each row has ended or has ``max_new_tokens`` tokens. The random number for a token depends only
    on ``key``, the index of the row and the index of the token. So padding and the other rows do not change the random
    numbers of a row.

    If logits are not finite, the function raises an error. For this check it waits until the result is computed. Inside
    ``jit`` or another transformation it cannot raise this error; check ``finite`` of the result instead.

    Args:
        prompts: [B, T] integer ids. Each row may be padded on the left or on the right.
        segment_ids: [B, T], 1 for prompt tokens and 0 for padding. Default: no padding.
        key: the random key; None only for greedy decoding. Either one key, which is folded with the index of each row,
            or typed keys [B] (``jax.random.key``), one for each row. With one key per row, the random numbers of a row
            depend neither on the other rows nor on the index of the row. If a key is not a threefry key but, for
            example, an rbg key, a threefry key is drawn from it and replaces it.
        end_id: the token id or token ids that end a row. None: every row gets ``max_new_tokens`` tokens.
        num_allowed_ids: only ids below this number are generated. Set it to the vocabulary size of the tokenizer if the
            model has a larger vocabulary. None: all ids of the model's vocabulary.
        state: the initial model state, with B rows. For an encoder-decoder, it is required: the state with the encoded
            source (``model.init_decode_state``); each prompt then begins with the decoder's start id. For other
            models, it is the state after earlier tokens; default: an empty state. The prompt and the new tokens are
            document 1. So they continue a row of the state only if the last document of the row has the segment id 1.
            A state needs cache slots for the prompt and all new tokens except the last.

    Raises:
        TypeError: the family has no model state, or the prompts or segment ids are not an array.
        ValueError: the model has no head that predicts the next token; an encoder-decoder has no ``state``; ``state``
            does not fit the model or the number of rows, or has too few free cache slots; a prompt is empty or has
            padding inside; an id is outside the vocabulary; ``end_id`` cannot be generated; ``num_allowed_ids``,
            ``top_k`` or ``max_new_tokens`` is outside its range or not an integer; a key is missing or invalid, or
            there is a wrong number of keys; shapes are wrong; there are more tokens than the model has positions
            (padding included); or the function is called in a ``Sharding.scope`` whose mesh splits the axis ``seq``.
        NotFiniteError: logits are not finite. The message names the rows. It also names the parameters or state arrays
            that are not finite, or another possible cause.

    Example:
        >>> from jaxlm import get_model
        >>> model = get_model("gpt2-tiny")
        >>> params = model.init(jax.random.key(0))
        >>> prompts, segment_ids = jnp.array([[5, 6, 7], [0, 8, 9]]), jnp.array([[1, 1, 1], [0, 1, 1]])
        >>> generate(model, params, prompts, segment_ids, max_new_tokens=4).tokens.shape
        (2, 4)
    """
    settings = check_and_make_settings(
        model, prompts, segment_ids, max_new_tokens, sampling, key, end_id, num_allowed_ids, state
    )
    generation = _generate(model, params, prompts, segment_ids, key, state, settings)
    check_finite(model, params, generation.finite, state)
    return generation


def prefill(
    model: Model,
    params: Params,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    end_id: EndId = None,
    num_allowed_ids: int | None = None,
    state: State | None = None,
) -> PartialGeneration:
    """The generation after the prompts have been read and the first token of each row has been drawn.

    The arguments and errors of :func:`generate` apply here too.
    """
    settings = check_and_make_settings(
        model, prompts, segment_ids, max_new_tokens, sampling, key, end_id, num_allowed_ids, state
    )
    return prefill_with_settings(model, params, prompts, segment_ids, settings, key=key, state=state)


def prefill_with_settings(
    model: Model,
    params: Params,
    prompts: Array,
    segment_ids: Array | None,
    settings: Settings,
    *,
    key: jax.Array | None = None,
    state: State | None = None,
    seen: jax.Array | None = None,
) -> PartialGeneration:
    """The result of :func:`prefill` for arguments that :func:`check_and_make_settings` has checked.

    Args:
        seen: [B, V] bool, whether the repetition penalty applies to an id even if the prompt does not contain it. An
            example is ``PartialGeneration.seen`` of an earlier part of the text. None: it applies only to the ids in
            the prompt and the output.

    Raises:
        ValueError: ``seen`` has another shape, or is given without a repetition penalty.
        NotFiniteError: as in :func:`generate`.
    """
    if seen is not None and settings.sampling.repetition_penalty == 1.0:
        raise ValueError("seen needs a repetition penalty: set Sampling(repetition_penalty=...), or pass seen=None")
    if seen is not None and seen.shape != (prompts.shape[0], settings.num_ids):
        raise ValueError(
            f"seen {list(seen.shape)} must have the shape [prompts, ids] = {[prompts.shape[0], settings.num_ids]}"
        )
    progress = _prefill(model, params, prompts, segment_ids, key, state, settings, seen)
    check_finite(model, params, progress.finite, state)
    return progress


def advance(model: Model, params: Params, progress: PartialGeneration, steps: int | jax.Array) -> PartialGeneration:
    """The generation after up to ``steps`` more tokens in every row that has not ended.

    A row has at most ``max_new_tokens`` tokens (see :func:`prefill`). The buffers of ``progress`` are donated, so
    ``progress`` must not be used afterwards.

    Raises:
        ValueError: the function is called in a ``Sharding.scope`` whose mesh splits the axis ``seq``.
        NotFiniteError: as in :func:`generate`.
    """
    check_sharding(active_sharding())
    progress = _advance(model, params, progress, steps)
    check_finite(model, params, progress.finite, progress.state, is_initial=False)
    return progress


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a generation. A new value causes a compilation.

    Attributes:
        max_new_tokens, sampling: as in :func:`generate`.
        end_ids: the ids that end a row.
        num_ids: only ids below this number are generated.
        slots: number of cache slots of a new state.
    """

    max_new_tokens: int
    sampling: Sampling
    end_ids: tuple[int, ...]
    num_ids: int
    slots: int


def check_and_make_settings(
    model: Model,
    prompts: Array,
    segment_ids: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    end_id: EndId,
    num_allowed_ids: int | None,
    state: State | None,
) -> Settings:
    """The :class:`Settings` for arguments of :func:`generate`. The function checks these arguments."""
    end_ids = as_end_ids(end_id)
    num_ids, slots = check_prompts(model, prompts, segment_ids, max_new_tokens, end_ids, num_allowed_ids, state)
    check_top_k(sampling, num_ids)
    if key is None and sampling.temperature > 0.0:
        raise ValueError(
            f"temperature={sampling.temperature} draws at random: pass a key, e.g. jax.random.key(0), or temperature=0"
        )
    check_key(key)
    if key is not None and _has_row_keys(key) and key.shape[0] != prompts.shape[0]:
        raise ValueError(f"{key.shape[0]} keys for {prompts.shape[0]} prompts: pass one key, or one key per prompt")
    return Settings(max_new_tokens, sampling, end_ids, num_ids, slots)


def check_key(key: jax.Array | None) -> None:
    """Raise ``ValueError`` unless ``key`` is None, one key (typed or raw), or a 1-D array of typed keys."""
    if key is None:
        return
    if isinstance(key, jax.Array | np.ndarray):
        is_typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim in (0, 1) if is_typed else key.ndim == 1 and key.dtype == np.uint32:
            return
        got = f"{key.dtype}{list(key.shape)}"
    else:
        got = repr(key)
    raise ValueError(f"key must be one JAX key, or one typed key per prompt (jax.random.key), got {got}")


def fold_in_rows(key: jax.Array, rows_B: Array) -> jax.Array:
    """Threefry keys [B]: ``key`` folded with each of the row numbers ``rows_B``."""
    key = spec.threefry_keys(spec.typed_key(key))
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows_B))


def sampling_keys(settings: Settings, key: jax.Array | None, batch: int) -> jax.Array | None:
    """One random key per row [B], from the argument ``key`` of :func:`generate`; None for greedy decoding."""
    if settings.sampling.temperature == 0.0:
        return None
    assert key is not None
    return spec.threefry_keys(key) if _has_row_keys(key) else fold_in_rows(key, jnp.arange(batch))


def _has_row_keys(key: jax.Array) -> bool:
    """Whether ``key`` is an array of typed keys, one per row."""
    return jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


@jax.jit(static_argnames=("model", "settings"))
def _generate(
    model: Model,
    params: Params,
    prompts_BT: jax.Array,
    segment_ids_BT: Any,
    key: jax.Array | None,
    state: State | None,
    settings: Settings,
) -> Generation:
    progress = _prefill(model, params, prompts_BT, segment_ids_BT, key, state, settings)
    progress = _advance(model, params, progress, settings.max_new_tokens - 1)
    return Generation(progress.tokens, progress.lengths, progress.log_probs, progress.finite)


@jax.jit(static_argnames=("model", "settings"))
def _prefill(
    model: Model,
    params: Params,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    key: jax.Array | None,
    state: State | None,
    settings: Settings,
    seen_BV: jax.Array | None = None,
) -> PartialGeneration:
    B, rows_B = prompts_BT.shape[0], jnp.arange(prompts_BT.shape[0])
    max_new_tokens, sampling, end_ids, num_ids = (
        settings.max_new_tokens, settings.sampling, settings.end_ids, settings.num_ids
    )  # fmt: skip
    state, logits_BV = read_prompts(model, params, prompts_BT, segment_ids_BT, settings.slots, state)
    if sampling.repetition_penalty != 1.0:
        seen_BT = widen_ids(prompts_BT)
        if segment_ids_BT is not None:  # padding gets the id `num_ids`; `.set(..., mode="drop")` below ignores it
            seen_BT = jnp.where(segment_ids_BT > 0, seen_BT, num_ids)
        seen_BV = jnp.zeros((B, num_ids), bool) if seen_BV is None else seen_BV
        seen_BV = seen_BV.at[rows_B[:, None], seen_BT].set(True, mode="drop")
    progress = PartialGeneration(
        state=state,
        tokens=jnp.full((B, max_new_tokens), end_ids[0] if end_ids else 0, jnp.int32),
        log_probs=jnp.zeros((B, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((B,), jnp.int32),
        # In shard_map, zeros_like gives an array that varies over the mesh axes of the prompts. With zeros, the type of
        # `lengths`, which is computed from `ended`, would change in the loop.
        ended=jnp.zeros_like(prompts_BT[:, 0], bool),
        step=jnp.zeros((), jnp.int32),
        finite=jnp.ones((B,), bool),
        seen=seen_BV,
        keys=sampling_keys(settings, key, B),
        sampling=sampling,
        end_ids=end_ids,
        num_ids=num_ids,
    )
    return _draw(progress, logits_BV)


def _draw(progress: PartialGeneration, logits_BV: jax.Array) -> PartialGeneration:
    """The generation after drawing one token for each row that has not ended."""
    rows_B = jnp.arange(logits_BV.shape[0])
    logits_BV = logits_BV[:, : progress.num_ids]
    filtered_BV = filter_logits(progress.sampling, logits_BV, progress.seen)
    if progress.keys is None:
        drawn_B = argmax(filtered_BV)
    else:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, progress.step))(progress.keys)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered_BV)
    drawn_B = drawn_B.astype(jnp.int32)
    log_probs_B = jax.nn.log_softmax(logits_BV, axis=-1)[rows_B, drawn_B]
    active_B, step = ~progress.ended, progress.step
    tokens_B = jnp.where(active_B, drawn_B, progress.tokens[:, step])
    return dataclasses.replace(
        progress,
        tokens=progress.tokens.at[:, step].set(tokens_B),
        log_probs=progress.log_probs.at[:, step].set(jnp.where(active_B, log_probs_B, 0.0)),
        lengths=progress.lengths + active_B.astype(jnp.int32),
        ended=progress.ended | is_end(drawn_B, progress.end_ids),
        step=step + 1,
        finite=progress.finite & (rows_finite(logits_BV) | progress.ended),
        seen=None if progress.seen is None else progress.seen.at[rows_B, drawn_B].max(active_B),
    )


@jax.jit(static_argnames="model", donate_argnames="progress")
def _advance(model: Model, params: Params, progress: PartialGeneration, steps: int | jax.Array) -> PartialGeneration:
    """The result of :func:`advance`, without its check of the logits."""
    last_step = jnp.minimum(progress.step + steps, progress.tokens.shape[1])
    params = loop_params(model, params)

    def unfinished(progress: PartialGeneration) -> jax.Array:
        return (progress.step < last_step) & ~jnp.all(progress.ended)

    def generate_token(progress: PartialGeneration, specs: Any) -> PartialGeneration:
        newest_B = progress.tokens[:, progress.step - 1]
        state, logits_BV = read_tokens(model, params, progress.state, newest_B, ~progress.ended)
        return _draw(dataclasses.replace(progress, state=state), logits_BV)

    return decoding_loop(
        model, model.state_specs(1, 1), unfinished, generate_token, progress, max_steps=progress.tokens.shape[1]
    )

"""Sampling: one token after the other, the whole loop inside one ``jit``.

``prefill`` reads the prompts, ``advance`` makes some more tokens; :func:`generate` is both in one ``jit``, and
streaming calls ``advance`` again and again: the same loop, the same bits.

Shapes: B batch, T prompt length, N new tokens, V ids that may be generated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.decoding.finite import check_finite, rows_finite
from jaxlm.decoding.prompts import Array, EndId, check_prompts, end_ids_of, is_end, read_prompts, read_tokens
from jaxlm.models import Model
from jaxlm.models.common import layers_apart
from jaxlm.sharding import Sharding, active


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Hashable; None turns a filter off.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (the filters then change nothing).
        top_k: keep the k most likely tokens (Fan et al. 2018).
        top_p: keep the most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020).
        min_p: keep tokens at least ``min_p`` times as likely as the most likely one (Nguyen et al. 2024).
        repetition_penalty: logits of tokens of the prompt or the output are divided by it where positive and multiplied
            where negative (Keskar et al. 2019, section 4.1, with the sign rule of Hugging Face); 1 changes nothing.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; None turns it off")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name}={value} must be in (0, 1]; None turns it off")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 turns it off")


GREEDY = Sampling(temperature=0.0)
"""Always the most likely token; of equals, the one with the lowest id."""


def filter_logits(sampling: Sampling, logits_BV: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """Logits of the distribution that is sampled from, [B, V]; -inf for what is filtered out.

    The order is that of Hugging Face's ``generate``: repetition penalty, temperature, top-k, top-p, min-p, each on what
    the one before left. Tokens exactly as likely as the last one that top-k or top-p keeps are kept too. Temperature 0
    divides by nothing.

    Args:
        seen_BV: bool, which ids the prompt and the output hold already; needed for a repetition penalty.

    Raises:
        ValueError: ``top_k`` exceeds V, or a repetition penalty without ``seen``.
    """
    V = logits_BV.shape[-1]
    if sampling.repetition_penalty != 1.0:
        if seen_BV is None:
            raise ValueError(f"repetition_penalty={sampling.repetition_penalty} needs seen, [batch, vocabulary] bools")
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature > 0.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        check_top_k(sampling, V)
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        # A token is kept when those before it do not yet make up p; the first always.
        kept_BV = jnp.pad(mass_BV[:, :-1] < sampling.top_p, ((0, 0), (1, 0)), constant_values=True)
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def check_top_k(sampling: Sampling, ids: int) -> None:
    """Raise ``ValueError`` when there are fewer ids than ``top_k``."""
    if sampling.top_k is not None and sampling.top_k > ids:
        raise ValueError(f"top_k={sampling.top_k} exceeds the {ids} ids that may be generated: lower it, or None")


# -------------------------------------------------------------------------------------------------- the loop


@struct.dataclass
class Progress:
    """A generation under way: all that :func:`advance` needs to go on.

    Attributes:
        state: what the model carries, on a CPU with layers apart; it has read everything but each row's newest token.
        tokens: [B, N] int32, filled up to ``step``.
        log_probs: [B, N] float32, see :class:`Generation`.
        lengths: [B] int32, tokens made in each row, its end token included.
        ended: [B] bool, rows that make no more tokens.
        step: int32, tokens made in the longest row.
        finite: [B] bool, whether all logits that tokens of the row were drawn from are finite.
        seen: [B, V] bool, ids of prompt and output, or None without a repetition penalty.
        keys: one random key per row, or None where greedy.
        sampling, end_ids, ids: how tokens are drawn, which ones end a row, how many ids there are.
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
    ids: int = struct.field(pytree_node=False)


@struct.dataclass
class Generation:
    """What was generated.

    Attributes:
        tokens: [B, N] int32; after a row's end, the (first) end id again and again.
        lengths: [B] int32, tokens in each row, the end token included.
        log_probs: [B, N] float32, log-probability of each token under the model itself (over the ids that may be
            generated, before penalty, temperature and filters); 0 after the end.
        finite: [B] bool, whether all logits that tokens of the row were drawn from are finite; the tokens of other rows
            mean nothing.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    finite: jax.Array


def generate(
    model: Model,
    params: Any,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    end_id: EndId = None,
    allowed_ids: int | None = None,
    state: Any = None,
) -> Generation:
    """Continue each prompt by up to ``max_new_tokens``, until ``end_id``: one ``jit``, which stops when all rows ended.

    The draw of a token depends on ``key``, the row's index and the number of the token, so neither the padding nor the
    other rows change a row.

    Logits that are not finite are an error, which waits for the result. Inside ``jit`` or another transformation of the
    caller nothing can be raised: look at ``finite`` of the result.

    Args:
        prompts: [B, T] integer ids, padded on either side to one length.
        segment_ids: [B, T], 1 on the prompt and 0 on padding. Default: no padding.
        key: needed unless greedy. One key, which is folded with the index of each row; or typed keys [B], one for each
            row, so that a row draws the same in any batch.
        end_id: the id that ends a row, or several ids each of which ends it.
        allowed_ids: only ids below it are generated: the tokenizer's vocabulary where it is smaller than the model's.
        state: what the model carries into the prompts, with as many rows: that of an encoder-decoder that has read a
            source (``model.start``; ``prompts`` then begin with the decoder's start id), or of a model that has read
            earlier tokens. Default: empty.

    Raises:
        TypeError: the family carries no state.
        ValueError: an empty prompt, an id outside the vocabulary, a missing key, more tokens than the model has
            positions for (padding counts), or shapes that do not fit.
        NotFiniteError: logits are not finite; a ValueError that names the rows, and the parameters that are not finite.

    Example:
        >>> from jaxlm import get_model
        >>> model = get_model("gpt2-tiny")
        >>> params = model.init(jax.random.key(0))
        >>> prompts, segment_ids = jnp.array([[5, 6, 7], [0, 8, 9]]), jnp.array([[1, 1, 1], [0, 1, 1]])
        >>> generate(model, params, prompts, segment_ids, max_new_tokens=4).tokens.shape
        (2, 4)
    """
    ids, slots = _check(model, prompts, segment_ids, max_new_tokens, sampling, key, end_id, allowed_ids, state)
    generation = _generate(
        model, params, prompts, segment_ids, key, state,
        count=max_new_tokens, sampling=sampling, end_ids=end_ids_of(end_id), ids=ids, slots=slots, sharding=active(),
    )  # fmt: skip
    check_finite(model, params, generation.finite, state)
    return generation


def prefill(
    model: Model,
    params: Any,
    prompts: Array,
    segment_ids: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    end_id: EndId = None,
    allowed_ids: int | None = None,
    state: Any = None,
) -> Progress:
    """Read the prompts and draw the first token of each row. Arguments and errors are those of :func:`generate`."""
    ids, slots = _check(model, prompts, segment_ids, max_new_tokens, sampling, key, end_id, allowed_ids, state)
    progress = _prefill(
        model, params, prompts, segment_ids, key, state,
        count=max_new_tokens, sampling=sampling, end_ids=end_ids_of(end_id), ids=ids, slots=slots, sharding=active(),
    )  # fmt: skip
    check_finite(model, params, progress.finite, state)
    return progress


def advance(model: Model, params: Any, progress: Progress, steps: int | jax.Array) -> Progress:
    """Up to ``steps`` more tokens in every row. The buffers of ``progress`` are donated: use only what is returned.

    Raises:
        NotFiniteError: as :func:`generate`.
    """
    progress = _advance(model, params, progress, steps, sharding=active())
    check_finite(model, params, progress.finite)
    return progress


def _check(
    model: Model,
    prompts: Array,
    segment_ids: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    end_id: EndId,
    allowed_ids: int | None,
    state: Any,
) -> tuple[int, int]:
    ids, slots = check_prompts(
        model, prompts, segment_ids,
        max_new_tokens=max_new_tokens, end_id=end_id, allowed_ids=allowed_ids, state=state,
    )  # fmt: skip
    check_top_k(sampling, ids)
    if key is None and sampling.temperature > 0.0:
        raise ValueError(
            f"temperature={sampling.temperature} draws at random: pass a key, e.g. jax.random.key(0), or temperature=0"
        )
    if key is not None and _has_row_keys(key) and key.shape[0] != prompts.shape[0]:
        raise ValueError(f"{key.shape[0]} keys for {prompts.shape[0]} prompts: pass one key, or one for each prompt")
    return ids, slots


def row_keys(key: jax.Array, rows_B: Array) -> jax.Array:
    """Random keys [B], one for each row number."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows_B))


def _has_row_keys(key: jax.Array) -> bool:
    """Whether ``key`` is an array of typed keys, one for each row."""
    return jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


# The active sharding is read while tracing (constrain), so it belongs to the cache key of each jit.
_STATIC = ("model", "count", "sampling", "end_ids", "ids", "slots", "sharding")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(
    model: Model,
    params: Any,
    prompts_BT: jax.Array,
    segment_ids_BT: Any,
    key: Any,
    state: Any,
    *,
    count: int,
    **static: Any,
) -> Generation:
    progress = _prefill(model, params, prompts_BT, segment_ids_BT, key, state, count=count, **static)
    progress = _advance(model, params, progress, count - 1, sharding=static["sharding"])
    return Generation(progress.tokens, progress.lengths, progress.log_probs, progress.finite)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(
    model: Model,
    params: Any,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    key: jax.Array | None,
    state: Any,
    *,
    count: int,
    sampling: Sampling,
    end_ids: tuple[int, ...],
    ids: int,
    slots: int,
    sharding: Sharding | None,
) -> Progress:
    B = prompts_BT.shape[0]
    rows_B = jnp.arange(B)
    state, logits_BV = read_prompts(model, params, prompts_BT, segment_ids_BT, slots, state)
    seen_BV = None
    if sampling.repetition_penalty != 1.0:
        read_BT = (
            prompts_BT if segment_ids_BT is None else jnp.where(segment_ids_BT > 0, prompts_BT.astype(jnp.int32), ids)
        )
        seen_BV = jnp.zeros((B, ids), bool).at[rows_B[:, None], read_BT].set(True, mode="drop")
    keys_B = None
    if sampling.temperature > 0.0:
        assert key is not None
        keys_B = key if _has_row_keys(key) else row_keys(key, rows_B)
    progress = Progress(
        state=layers_apart(state),
        tokens=jnp.full((B, count), end_ids[0] if end_ids else 0, jnp.int32),
        log_probs=jnp.zeros((B, count), jnp.float32),
        lengths=jnp.zeros((B,), jnp.int32),
        ended=jnp.zeros((B,), bool),
        step=jnp.zeros((), jnp.int32),
        finite=jnp.ones((B,), bool),
        seen=seen_BV,
        keys=keys_B,
        sampling=sampling,
        end_ids=end_ids,
        ids=ids,
    )
    return _draw(progress, logits_BV)


def _draw(progress: Progress, logits_BV: jax.Array) -> Progress:
    """One token for each row that has not ended."""
    rows_B = jnp.arange(logits_BV.shape[0])
    logits_BV = logits_BV[:, : progress.ids]
    filtered_BV = filter_logits(progress.sampling, logits_BV, progress.seen)
    if progress.keys is None:
        drawn_B = jnp.argmax(filtered_BV, axis=-1)
    else:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, progress.step))(progress.keys)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered_BV)
    drawn_B = drawn_B.astype(jnp.int32)
    log_probs_B = jax.nn.log_softmax(logits_BV, axis=-1)[rows_B, drawn_B]
    going_B, at = ~progress.ended, progress.step
    tokens_B = jnp.where(going_B, drawn_B, progress.tokens[:, at])
    return dataclasses.replace(
        progress,
        tokens=progress.tokens.at[:, at].set(tokens_B),
        log_probs=progress.log_probs.at[:, at].set(jnp.where(going_B, log_probs_B, 0.0)),
        lengths=progress.lengths + going_B,
        ended=progress.ended | is_end(drawn_B, progress.end_ids),
        step=at + 1,
        finite=progress.finite & (rows_finite(logits_BV) | progress.ended),
        seen=None if progress.seen is None else progress.seen.at[rows_B, drawn_B].set(True),
    )


@functools.partial(jax.jit, static_argnames=("model", "sharding"), donate_argnames="progress")
def _advance(
    model: Model, params: Any, progress: Progress, steps: int | jax.Array, *, sharding: Sharding | None
) -> Progress:
    until = jnp.minimum(progress.step + steps, progress.tokens.shape[1])

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.step < until) & ~jnp.all(progress.ended)

    def one(progress: Progress) -> Progress:
        newest_B = progress.tokens[:, progress.step - 1]
        state, logits_BV = read_tokens(model, params, progress.state, newest_B, ~progress.ended)
        return _draw(dataclasses.replace(progress, state=state), logits_BV)

    params = layers_apart(params)
    return jax.lax.while_loop(unfinished, one, progress)
